"""Continuous batching of requests with different adapters: whoever finishes makes room at once (Yu et al., Orca, 2022).

Each step reads a chunk of a prompt or two, then draws one token of every answer. An answer is the same, to the bit,
whatever else is in the batch (see `align.models.fastpath.mixed`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from torch import Tensor, cat

from align.errors import AlignError
from align.models.fastpath.mixed import CHUNK, MixedDecoder, Row
from align.models.known_adapters import KnownAdapters
from align.rollout.answer import Answer
from align.rollout.prefix_cache import PrefixCache
from align.rollout.requests import Listener, Pending, Request, Stats, Token, Waiting, check_room
from align.rollout.sampling import next_tokens, prompt_tokens

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Running:
    """A request that has a slot.

    Attributes:
        read: tokens of the prompt that are in the cache.
        blocks: keys of the prompt's whole blocks.
        told: logprobs of the prompt so far, where they are asked for.
        last: the token that was drawn last, once the prompt is read.
    """

    answer: Answer
    slot: int
    blocks: list[bytes]
    read: int = 0
    cached: int = 0
    told: list[Token] = field(default_factory=list)
    hidden: Tensor | None = None
    last: int | None = None

    @property
    def request(self) -> Request:
        return self.answer.pending.request

    @property
    def row(self) -> Row:
        assert self.last is not None
        position = len(self.request.prompt_ids) + self.answer.made - 1
        return Row(self.slot, self.request.adapter, self.last, position)


class ContinuousBatch:
    """See the module, and `align.rollout.requests.ServingEngine`.

    Args:
        decoder: nobody else uses it.
        context: tokens of a prompt and its answer together, at most.
        queue: requests that may wait.
        prefix_bytes: of the prefix cache.
        prefill_tokens: of prompts, read between two steps; at least one chunk is.
    """

    def __init__(
        self, decoder: MixedDecoder, context: int, queue: int = 256, prefix_bytes: int = 0, prefill_tokens: int = 128
    ) -> None:
        self.decoder, self.context, self.prefill_tokens = decoder, min(context, decoder.columns), prefill_tokens
        self.known, self.prefixes = KnownAdapters(), PrefixCache(CHUNK, prefix_bytes)
        self._waiting, self._lock = Waiting(queue), Lock()
        self._running: list[Running] = []
        self._free = list(range(decoder.slots))[::-1]
        self._first: Pending | None = None
        self._counts = {"steps": 0, "prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}

    def register(self, folder: Path) -> str:
        return self.known.register(folder)

    def unregister(self, digest: str) -> None:
        self.known.unregister(digest)

    def add(self, request: Request, listener: Listener) -> Pending:
        check_room(request, self.context)
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

    def give_up(self, error: Exception) -> None:
        with self._lock:
            waiting = self._waiting.clear()
        if self._first is not None:
            waiting, self._first = [self._first, *waiting], None
        for pending in waiting:
            self._release(pending.request)
            Answer(pending).fail(error)
        for running in self._running:
            running.answer.fail(error)
        self._leave()

    def stats(self) -> Stats:
        waiting = len(self._waiting) + (self._first is not None)
        return Stats(waiting, len(self._running), resident=len(self.decoder.bank.units), **self._counts)

    def step(self) -> bool:
        for running in self._running:
            if running.answer.pending.aborted:
                running.answer.abort()
        self._leave()
        self._forget()
        self._admit()
        self._prefill()
        self._leave()
        self._decode()
        self._leave()
        return bool(self._running) or self._first is not None or len(self._waiting) > 0

    def _admit(self) -> None:
        """Give free slots to those who wait. One whose adapter has no room in the bank keeps its turn."""
        while self._free:
            if self._first is None:
                with self._lock:
                    self._first = self._waiting.take(running.request.tenant for running in self._running)
            if self._first is None:
                return
            pending, request = self._first, self._first.request
            in_use = {each for running in self._running if (each := running.request.adapter) is not None}
            if not (request.adapter is None or request.adapter in in_use or self.decoder.bank.room(in_use)):
                return
            self._first = None
            answer = Answer(pending)
            try:
                if pending.aborted:
                    answer.abort()
                elif request.adapter is not None and request.adapter not in self.decoder.bank:
                    self.decoder.bank.put(request.adapter, self.known.folder(request.adapter), in_use)
            except Exception as error:
                answer.fail(error)
            if answer.finished:
                self._release(request)
            else:
                self._begin(answer)

    def _begin(self, answer: Answer) -> None:
        request = answer.pending.request
        keys = (
            []
            if self.prefixes.most_bytes == 0
            else self.prefixes.keys(request.tenant, request.adapter, request.prompt_ids)
        )
        running = Running(answer, self._free.pop(), list(keys))
        self._running.append(running)
        if request.sampling.prompt_logprobs is None:  # which need every state
            for number, key in enumerate(running.blocks):
                block = self.prefixes.get(key)
                if block is None:
                    break
                self.decoder.put_block(running.slot, number * CHUNK, block)
                running.read = running.cached = (number + 1) * CHUNK
        self._counts["prompt_tokens"] += len(request.prompt_ids)
        self._counts["cached_tokens"] += running.cached

    def _prefill(self) -> None:
        """Read on in the prompts, who came first first."""
        left = self.prefill_tokens
        for running in self._running:
            while running.last is None and running.answer.finished is None and left > 0:
                try:
                    left -= self._read_chunk(running)
                except Exception as error:
                    running.answer.fail(error)

    def _read_chunk(self, running: Running) -> int:
        """Read the next chunk of a prompt; behind the last one comes the first token. Returns how many it had."""
        request, start = running.request, running.read
        ids = request.prompt_ids[start : start + CHUNK]
        hidden_ND = self.decoder.prefill(running.slot, request.adapter, ids, start)
        running.read += len(ids)
        if start // CHUNK < len(running.blocks):
            self.prefixes.put(running.blocks[start // CHUNK], self.decoder.block(running.slot, start))
        number = request.sampling.prompt_logprobs
        if number is not None:
            before = hidden_ND if running.hidden is None else cat((running.hidden, hidden_ND))
            asked = request.prompt_ids[max(1, start) : running.read]
            running.told += prompt_tokens(self.decoder.logits(before[: len(asked)]), asked, number)
            running.hidden = hidden_ND[-1:]
        if running.read == len(request.prompt_ids):
            running.answer.begin(None if number is None else (None, *running.told), running.cached)
            if running.answer.finished is None:
                self._draw([running], self.decoder.logits(hidden_ND[-1:]))
        return len(ids)

    def _decode(self) -> None:
        ready = [running for running in self._running if running.last is not None]
        if not ready:
            return
        self._counts["steps"] += 1
        try:
            logits_BV = self.decoder.decode([running.row for running in ready])
        except Exception as error:
            self._decode_alone(ready, error)
            return
        self._draw(ready, logits_BV)

    def _decode_alone(self, ready: list[Running], error: Exception) -> None:
        """What failed for all is tried for each: whoever fails alone is at fault, and the others go on, with the bits
        that they would have had."""
        log.warning("a step of %d rows failed (%s); each is tried alone", len(ready), error)
        for running in ready:
            try:
                self._draw([running], self.decoder.decode([running.row]))
            except Exception as own:
                running.answer.fail(own)

    def _draw(self, ready: list[Running], logits_BV: Tensor) -> None:
        """Draw the next token of each answer."""
        settings = [running.request.sampling for running in ready]
        numbers = [running.answer.number for running in ready]
        drawn = next_tokens(logits_BV, settings, numbers, [running.answer.allowed() for running in ready])
        for running, token in zip(ready, drawn, strict=True):
            self._counts["generated_tokens"] += 1
            try:
                running.answer.take(token)
            except Exception as error:
                running.answer.fail(error)
            running.last = None if token is None else token.id

    def _leave(self) -> None:
        """Those who finished give up their slots."""
        for running in [running for running in self._running if running.answer.finished]:
            self._running.remove(running)
            self._free.append(running.slot)
            self._release(running.request)

    def _forget(self) -> None:
        """Adapters that are known no more make room at once."""
        bank = self.decoder.bank
        for digest in [digest for digest in bank.units if digest not in self.known]:
            bank.remove(digest)

    def _release(self, request: Request) -> None:
        if request.adapter is not None:
            self.known.release(request.adapter)
