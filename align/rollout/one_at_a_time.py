"""Serving any architecture that transformers can generate with: one request after another, by its own `generate`.

For models off the fast path. Slower than a batch, and right wherever the plain path is.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from align.core.errors import require
from align.models.adapter_pool import AdapterPool
from align.models.plain_path import base_model
from align.rollout.hf import evaluating, generate_by
from align.rollout.request_queue import Answer, RequestQueue
from align.rollout.requests import Listener, Pending, Request, Stats, Token
from align.rollout.sampling import next_tokens, prompt_tokens


class Over(Exception):
    """The answer has ended: `generate` is left by it."""


class OneAtATime(RequestQueue):
    """See the module, and `align.rollout.requests.ServingEngine`.

    Args:
        model: the base.
        context: tokens of a prompt and its answer together, at most.
        queue: requests that may wait.
        resident: adapters that are kept on the model.
    """

    def __init__(self, model: Any, context: int, queue: int = 256, resident: int = 16) -> None:
        super().__init__(context, queue)
        self.resident, self.pool = resident, AdapterPool(model)
        self._used: OrderedDict[str, None] = OrderedDict()
        self._answer: Answer | None = None
        self._counts = {"prompt_tokens": 0, "generated_tokens": 0, "steps": 0}

    def add(self, request: Request, listener: Listener) -> Pending:
        problem = "scores are given by models on the fast path alone"
        require(not request.scored, "model", (request.adapter or "base")[:12], problem, "Score it by stage=eval.")
        return super().add(request, listener)

    def step(self) -> bool:
        for digest in [digest for digest in self._used if digest not in self.known]:  # known no more: it makes room
            self._let_go(digest)
        pending = self._next((), 1)
        if pending is None:
            return False
        self._answer = answer = Answer(pending)
        try:
            self._read_and_answer(answer)
        except Over:
            pass
        except Exception as error:
            answer.fail(error)
        finally:
            self._answer = None
            self._release(pending.request)
        return len(self._waiting) > 0

    def stats(self) -> Stats:
        counts = self._counts
        running = int(self._answer is not None)
        return Stats(len(self._waiting), running, cached_tokens=0, resident=len(self._used), **counts)

    @torch.no_grad()
    def _read_and_answer(self, answer: Answer) -> None:
        request = answer.pending.request
        with self.pool.actor(self._on_model(request.adapter)).use() as model, evaluating(model):
            tokens, answer.pending.begun = torch.tensor([request.prompt_ids], device=model.device), True
            answer.begin(self._prompt(model, request), 0)
            self._counts["prompt_tokens"] += len(request.prompt_ids)
            if answer.finished:
                return

            def drawn(logits_BV: Tensor, position: int) -> Tensor:
                if answer.pending.aborted:
                    answer.abort()
                    raise Over
                numbers, allowed = [answer.number], [answer.allowed()]
                token = next_tokens(logits_BV.float().cpu(), [request.sampling], numbers, allowed)[0]
                self._counts["steps"] += 1
                self._counts["generated_tokens"] += 1
                answer.take(token)
                if answer.finished:
                    raise Over
                assert token is not None
                return torch.tensor([token.id], device=logits_BV.device)

            ones = torch.ones_like(tokens, dtype=torch.bool)
            generate_by(
                model, tokens, ones, drawn, stop_ids=(), pad_id=0, max_new_tokens=request.sampling.max_tokens
            )  # fmt: skip

    def _prompt(self, model: Any, request: Request) -> tuple[Token | None, ...] | None:
        number = request.sampling.prompt_logprobs
        if number is None:
            return None
        ids = torch.tensor([request.prompt_ids], device=model.device)
        logits = base_model(model)(input_ids=ids, use_cache=False).logits[0].float().cpu()
        return (None, *prompt_tokens(logits[:-1], request.prompt_ids[1:], number))

    def _on_model(self, digest: str | None) -> str | None:
        """Sees that an adapter is on the model; the one that was used least lately makes room."""
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
