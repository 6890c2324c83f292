"""Serving any architecture that transformers can generate with: one request after another, by its own `generate`.

For models off the fast path. Slower than a batch, and right wherever the plain path is.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from align.core.errors import require
from align.models.actors import AdapterPool
from align.models.forward import base_model
from align.rollout.hf import evaluating, generate_by
from align.rollout.serving_engine import (
    Completion,
    Listener,
    Request,
    ServingEngine,
    Stats,
    Token,
    next_tokens,
    prompt_tokens,
)


class Over(Exception):
    """The answer has ended: `generate` is left by it."""


class OneAtATime(ServingEngine):
    """See the module, and `align.rollout.serving_engine.ServingEngine`.

    Args:
        model: the base.
        context: tokens of a prompt and its answer together, at most.
        queue: requests that may wait.
        resident: adapters that are kept on the model.
    """

    def __init__(self, model: Any, context: int, queue: int = 256, resident: int = 16) -> None:
        super().__init__(context, queue)
        self.resident = resident
        self.pool = AdapterPool(model)
        self._used: OrderedDict[str, None] = OrderedDict()
        self._answer: Completion | None = None
        self._counts = {"prompt_tokens": 0, "generated_tokens": 0, "steps": 0}

    def add(self, request: Request, listener: Listener) -> Completion:
        problem = "scores are given by models on the fast path alone"
        require(not request.scored, "model", (request.adapter or "base")[:12], problem, "Score it by stage=eval.")
        return super().add(request, listener)

    def step(self) -> bool:
        for digest in [digest for digest in self._used if digest not in self.known]:  # known no more: it makes room
            self._let_go(digest)
        answer = self._answer = self._next((), 1)
        if answer is None:
            return False
        try:
            self._read_and_answer(answer)
        except Over:
            pass
        except Exception as error:
            answer.fail(error)
        finally:
            self._answer = None
            self._release(answer.request)
        return len(self._waiting) > 0

    def stats(self) -> Stats:
        counts = self._counts
        running = int(self._answer is not None)
        return Stats(len(self._waiting), running, cached_tokens=0, resident=len(self._used), **counts)

    @torch.no_grad()
    def _read_and_answer(self, answer: Completion) -> None:
        request = answer.request
        with self.pool.actor(self._on_model(request.adapter)).use() as model, evaluating(model):
            answer.has_begun = True
            tokens = torch.tensor([request.prompt_ids], device=model.device)
            answer.begin(self._prompt_logprobs(model, request))
            self._counts["prompt_tokens"] += len(request.prompt_ids)
            if answer.finished:
                return

            def draw(logits_BV: Tensor, position: int) -> Tensor:
                if answer.is_aborted:
                    answer.abort()
                allowed = [answer.allowed()]
                if answer.finished:
                    raise Over
                [token] = next_tokens(logits_BV.float().cpu(), [request.sampling], [answer.number], allowed)
                self._counts["steps"] += 1
                self._counts["generated_tokens"] += 1
                answer.take(token)
                if answer.finished:
                    raise Over
                assert token is not None
                return torch.tensor([token.id], device=logits_BV.device)

            mask = torch.ones_like(tokens, dtype=torch.bool)
            generate_by(model, tokens, mask, draw, stop_ids=(), pad_id=0, max_new_tokens=request.sampling.max_tokens)

    def _prompt_logprobs(self, model: Any, request: Request) -> tuple[Token | None, ...] | None:
        number = request.sampling.prompt_logprobs
        if number is None:
            return None
        ids = torch.tensor([request.prompt_ids], device=model.device)
        logits = base_model(model)(input_ids=ids, use_cache=False).logits[0].float().cpu()
        return (None, *prompt_tokens(logits[:-1], request.prompt_ids[1:], number))

    def _on_model(self, digest: str | None) -> str | None:
        """Put an adapter on the model, unless it is; the one that was used least lately makes room."""
        if digest is None:
            return None
        if digest not in self._used:
            while len(self._used) >= self.resident:
                self._let_go(next(iter(self._used)))
            self.pool.add(self.known.folder(digest))
        self._used[digest] = None
        self._used.move_to_end(digest)
        return digest

    def _let_go(self, digest: str) -> None:
        del self._used[digest]
        self.pool.remove(digest)
