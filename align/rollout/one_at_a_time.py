"""A serving engine for any architecture of transformers: one request at a time, by transformers' own `generate`.

It is used for models that the fast path does not support, and is slower than continuous batching.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from align.core.errors import require
from align.models.actors import AdapterPool
from align.models.forward import unwrap_model
from align.rollout.hf import generate_with_transformers, use_evaluation_mode
from align.rollout.serving_engine import (
    Completion,
    Listener,
    Request,
    ServingEngine,
    Stats,
    Token,
    sample_tokens,
    score_prompt_tokens,
)


class AnswerEnded(Exception):
    """An exception that leaves transformers' `generate` when the answer has ended."""


class OneAtATime(ServingEngine):
    """A serving engine that answers one request at a time with transformers' `generate`, for any architecture.

    Args:
        model: the base.
        context: maximum tokens of a prompt and its answer together.
        queue: maximum waiting requests.
        resident: maximum adapters loaded at once.
    """

    def __init__(self, model: Any, context: int, queue: int = 256, resident: int = 16) -> None:
        super().__init__(context, queue)
        self.resident = resident
        self.pool = AdapterPool(model)
        self._loaded: OrderedDict[str, None] = OrderedDict()
        self._answer: Completion | None = None
        self._counts = {"prompt_tokens": 0, "generated_tokens": 0, "steps": 0}

    def add(self, request: Request, listener: Listener) -> Completion:
        problem = "scores are given by models on the fast path alone"
        require(not request.scored, "model", (request.adapter or "base")[:12], problem, "Score it by stage=eval.")
        return super().add(request, listener)

    def step(self) -> bool:
        for digest in [digest for digest in self._loaded if digest not in self.known]:  # it was unregistered
            self._unload(digest)
        answer = self._answer = self._pop_next_request((), 1)
        if answer is None:
            return False
        try:
            self._answer_request(answer)
        except AnswerEnded:
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
        return Stats(len(self._waiting), running, cached_tokens=0, resident=len(self._loaded), **counts)

    @torch.no_grad()
    def _answer_request(self, answer: Completion) -> None:
        request = answer.request
        with self.pool.actor(self._load_adapter(request.adapter)).use() as model, use_evaluation_mode(model):
            answer.has_begun = True
            tokens = torch.tensor([request.prompt_ids], device=model.device)
            answer.begin(self._prompt_logprobs(model, request))
            self._counts["prompt_tokens"] += len(request.prompt_ids)
            if answer.finished:
                return

            def draw(logits_BV: Tensor, position: int) -> Tensor:
                if answer.is_aborted:
                    answer.abort()
                allowed = [answer.compute_mask()]
                if answer.finished:
                    raise AnswerEnded
                [token] = sample_tokens(logits_BV.float().cpu(), [request.sampling], [answer.number], allowed)
                self._counts["steps"] += 1
                self._counts["generated_tokens"] += 1
                answer.take(token)
                if answer.finished:
                    raise AnswerEnded
                assert token is not None
                return torch.tensor([token.id], device=logits_BV.device)

            mask = torch.ones_like(tokens, dtype=torch.bool)
            generate_with_transformers(
                model, tokens, mask, draw, stop_ids=(), pad_id=0, max_new_tokens=request.sampling.max_tokens
            )

    def _prompt_logprobs(self, model: Any, request: Request) -> tuple[Token | None, ...] | None:
        number = request.sampling.prompt_logprobs
        if number is None:
            return None
        ids = torch.tensor([request.prompt_ids], device=model.device)
        logits = unwrap_model(model)(input_ids=ids, use_cache=False).logits[0].float().cpu()
        return (None, *score_prompt_tokens(logits[:-1], request.prompt_ids[1:], number))

    def _load_adapter(self, digest: str | None) -> str | None:
        """Load an adapter if it is not loaded, and return its digest; None for the base.

        Unloads the least recently used adapter if `resident` adapters are loaded.
        """
        if digest is None:
            return None
        if digest not in self._loaded:
            while len(self._loaded) >= self.resident:
                self._unload(next(iter(self._loaded)))
            self.pool.add(self.known.folder(digest))
        self._loaded[digest] = None
        self._loaded.move_to_end(digest)
        return digest

    def _unload(self, digest: str) -> None:
        del self._loaded[digest]
        self.pool.remove(digest)
