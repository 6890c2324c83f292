"""Serving any architecture that transformers can generate with: one request after another, by its own `generate`.

For models off the fast path. Slower than a batch, and right wherever the plain path is.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from align.errors import AlignError, require
from align.models.adapter_pool import AdapterPool
from align.models.known_adapters import KnownAdapters
from align.models.plain_path import base_model
from align.rollout.answer import Answer
from align.rollout.hf import evaluating
from align.rollout.plain_path import continued
from align.rollout.requests import Listener, Pending, Request, Stats, Token, Waiting, check_room
from align.rollout.sampling import next_tokens, prompt_tokens


class Over(Exception):
    """The answer has ended: `generate` is left by it."""


class OneAtATime:
    """See the module, and `align.rollout.requests.ServingEngine`.

    Args:
        model: the base.
        context: tokens of a prompt and its answer together, at most.
        queue: requests that may wait.
        resident: adapters that are kept on the model.
    """

    def __init__(self, model: Any, context: int, queue: int = 256, resident: int = 16) -> None:
        self.context, self.resident = context, resident
        self.known, self.pool = KnownAdapters(), AdapterPool(model)
        self._waiting, self._lock = Waiting(queue), Lock()
        self._used: OrderedDict[str, None] = OrderedDict()
        self._answer: Answer | None = None
        self._counts = {"prompt_tokens": 0, "generated_tokens": 0, "steps": 0}

    def register(self, folder: Path, expected: str = "") -> str:
        return self.known.register(folder, expected)

    def unregister(self, digest: str) -> None:
        self.known.unregister(digest)

    def add(self, request: Request, listener: Listener) -> Pending:
        check_room(request, self.context)
        problem = "scores are given by models on the fast path alone"
        require(not request.scored, "model", (request.adapter or "base")[:12], problem, "Score it by stage=eval.")
        pending = Pending(request, listener)
        if request.adapter is not None:
            self.known.hold(request.adapter)
        try:
            with self._lock:
                self._waiting.put(pending)
        except AlignError:
            self._release(request)
            raise
        return pending

    def abort(self, pending: Pending) -> None:
        pending.aborted = True
        with self._lock:
            waited = self._waiting.drop(pending)
        if waited:
            self._release(pending.request)
            Answer(pending).abort()

    def step(self) -> bool:
        with self._lock:
            pending = self._waiting.take([])
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

    def give_up(self, error: Exception) -> None:
        with self._lock:
            waiting = self._waiting.clear()
        for pending in waiting:
            self._release(pending.request)
            Answer(pending).fail(error)

    def stats(self) -> Stats:
        counts = self._counts
        running = int(self._answer is not None)
        return Stats(len(self._waiting), running, cached_tokens=0, resident=len(self._used), **counts)

    @torch.no_grad()
    def _read_and_answer(self, answer: Answer) -> None:
        request = answer.pending.request
        with self.pool.actor(self._on_model(request.adapter)).use() as model, evaluating(model):
            tokens = torch.tensor([request.prompt_ids])
            answer.begin(self._prompt(model, request), 0)
            self._counts["prompt_tokens"] += len(request.prompt_ids)
            if answer.finished:
                return

            def drawn(logits_BV: Tensor, position: int) -> Tensor:
                if answer.pending.aborted:
                    answer.abort()
                    raise Over
                numbers, allowed = [answer.number], [answer.allowed()]
                token = next_tokens(logits_BV.float(), [request.sampling], numbers, allowed)[0]
                self._counts["steps"] += 1
                self._counts["generated_tokens"] += 1
                answer.take(token)
                if answer.finished:
                    raise Over
                assert token is not None
                return torch.tensor([token.id])

            ones = torch.ones_like(tokens, dtype=torch.bool)
            continued(
                model, tokens, ones, drawn, stop_ids=(), pad_id=0, max_new_tokens=request.sampling.max_tokens
            )  # fmt: skip

    def _prompt(self, model: Any, request: Request) -> tuple[Token | None, ...] | None:
        number = request.sampling.prompt_logprobs
        if number is None:
            return None
        ids = torch.tensor([request.prompt_ids])
        logits = base_model(model)(input_ids=ids, use_cache=False).logits[0].float()
        return (None, *prompt_tokens(logits[:-1], request.prompt_ids[1:], number))

    def _on_model(self, digest: str | None) -> str | None:
        """Sees that an adapter is on the model; the one that was used least lately makes room."""
        if digest is None:
            return None
        if digest not in self._used:
            while len(self._used) >= self.resident:
                self.pool.remove(self._used.popitem(last=False)[0])
            self.pool.add(self.known.folder(digest))
        self._used[digest] = None
        self._used.move_to_end(digest)
        return digest

    def _release(self, request: Request) -> None:
        if request.adapter is not None:
            self.known.release(request.adapter)
