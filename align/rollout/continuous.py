"""Continuous batching of requests of different adapters: one that ends makes room at once (Yu et al., Orca, 2022).

Each step reads a chunk of a prompt or two, then draws one token of every answer. An answer is the same, to the bit,
whatever else is in the batch (see `align.models.fastpath.mixed`)."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, cat

from align.core.errors import require
from align.models.fastpath.mixed import CHUNK, MixedDecoder, Piece
from align.rollout.serving_engine import Completion, Request, ServingEngine, Stats, Token, next_tokens, prompt_tokens


class PrefixCache:
    """Blocks of one base, the ones used least lately making room.

    A block is known by the tenant, the adapter, and every token from the beginning of the prompt to its own end. So no
    other adapter, and no other tenant, ever finds it.

    Args:
        chunk: tokens of a block.
        most_bytes: of all blocks together.
    """

    def __init__(self, chunk: int, most_bytes: int) -> None:
        self.chunk = chunk
        self.most_bytes = most_bytes
        self.bytes = 0
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()

    def keys(self, tenant: str, adapter: str | None, ids: Sequence[int]) -> Iterator[bytes]:
        """The key of each whole block of a prompt, but for one that holds its last token: that has to be computed, for
        what comes next."""
        kept = hashlib.sha256(repr((tenant, adapter)).encode())
        for first in range(0, len(ids) - self.chunk, self.chunk):
            kept.update(repr(ids[first : first + self.chunk]).encode())
            yield kept.digest()

    def get(self, key: bytes) -> Tensor | None:
        block = self._blocks.get(key)
        if block is not None:
            self._blocks.move_to_end(key)
        return block

    def put(self, key: bytes, block: Tensor) -> None:
        size = block.nbytes
        if key in self._blocks or size > self.most_bytes:
            return
        while self.bytes + size > self.most_bytes:
            self.bytes -= self._blocks.popitem(last=False)[1].nbytes
        self._blocks[key] = block
        self.bytes += size


log = logging.getLogger(__name__)
PATIENCE = 64
"""Steps for which others go by a request that the bank has no room for."""
OTHER = "Ask a reward model for rewards, and any other adapter, or the base, for answers."


@dataclass(slots=True, eq=False)
class Running:
    """A request that has a slot.

    Attributes:
        blocks: keys of the prompt's whole blocks.
        read: tokens of the prompt that are in the slot.
        cached: of these, how many came from the prefix cache.
        told: the prompt's tokens with their logprobs so far, where they are asked for.
        before: the last state of the chunk before.
        last: the token that was drawn last.
    """

    answer: Completion
    slot: int
    blocks: list[bytes]
    read: int = 0
    cached: int = 0
    told: list[Token] = field(default_factory=list)
    before: Tensor | None = None
    last: int | None = None

    @property
    def request(self) -> Request:
        return self.answer.request

    @property
    def read_whole(self) -> bool:
        return self.read == len(self.request.prompt_ids)

    @property
    def piece(self) -> Piece:
        """The tokens that go through the layers next."""
        prompt = self.request.prompt_ids
        if self.last is None:
            return Piece(self.slot, self.request.adapter, prompt[self.read : self.read + CHUNK], self.read)
        return Piece(self.slot, self.request.adapter, (self.last,), len(prompt) + self.answer.length - 1)


class ContinuousBatch(ServingEngine):
    """See the module, and `align.rollout.serving_engine.ServingEngine`.

    Args:
        decoder: used by no other.
        context: tokens of a prompt and its answer together, at most.
        queue: requests that may wait.
        prefix_bytes: of the prefix cache.
        prefill_tokens: of prompts, read between two steps; at least one chunk is.
        reserve: slots that are kept for tenants who have none.
    """

    def __init__(
        self,
        decoder: MixedDecoder,
        context: int,
        queue: int = 256,
        prefix_bytes: int = 0,
        prefill_tokens: int = 128,
        reserve: int = 0,
    ) -> None:
        super().__init__(min(context, decoder.columns), queue, reserve)
        self.decoder = decoder
        self.prefill_tokens = prefill_tokens
        self.prefixes = PrefixCache(CHUNK, prefix_bytes)
        self._running: list[Running] = []
        self._free = list(range(decoder.slots))[::-1]
        self._held: list[tuple[Completion, int]] = []
        self._counts = {"steps": 0, "prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}

    def give_up(self, error: Exception) -> None:
        super().give_up(error)
        held = self._held
        self._held = []
        for answer, _ in held:
            self._release(answer.request)
            answer.fail(error)
        for running in self._running:
            running.answer.fail(error)
        self._leave()

    def stats(self) -> Stats:
        waiting = len(self._waiting) + len(self._held)
        return Stats(waiting, len(self._running), resident=len(self.decoder.bank.units), **self._counts)

    def step(self) -> bool:
        for running in self._running:
            if running.answer.is_aborted:
                running.answer.abort()
        self._leave()
        self._forget()
        self._admit()
        if self._running:
            self._advance(self._chosen())
        self._leave()
        return bool(self._running or self._held) or len(self._waiting) > 0

    def _admit(self) -> None:
        """Give free slots to those who wait. Those whom the bank has no room for are held, and tried again first.
        Others go by in the meantime, but not for ever."""
        held = self._held
        self._held = []
        while held:  # after an error each request is either held or running, and is released once
            answer, since = held.pop(0)
            try:
                has_begun = bool(self._free) and self._begin_or_end(answer)
            except BaseException:
                if all(running.answer is not answer for running in self._running):
                    self._held.append((answer, since))
                self._held += held
                raise
            if not has_begun:
                self._held.append((answer, since))
        while self._free and all(self._counts["steps"] - since < PATIENCE for _, since in self._held):
            answer = self._next((running.request.tenant for running in self._running), len(self._free))
            if answer is None:
                return
            if not self._begin_or_end(answer):
                self._held.append((answer, self._counts["steps"]))

    def _begin_or_end(self, answer: Completion) -> bool:
        """Give a request a slot, or end it. Returns False if the bank has no room for its adapter now."""
        request = answer.request
        in_use = {each for running in self._running if (each := running.request.adapter) is not None}
        if answer.is_aborted:
            answer.abort()
        elif not (request.adapter is None or request.adapter in in_use or self.decoder.bank.has_room(in_use)):
            return False
        try:
            if not answer.finished and request.adapter is not None and request.adapter not in self.decoder.bank:
                self.decoder.bank.put(request.adapter, self.known.folder(request.adapter), in_use)
            gives_rewards = request.adapter in self.decoder.bank.heads
            problem = "is a reward model, which answers nothing" if gives_rewards else "is no reward model"
            name = (request.adapter or "base")[:12]
            require(gives_rewards == request.scored, "model", name, problem, OTHER)
        except Exception as error:
            answer.fail(error)
        if answer.finished:
            self._release(request)
        else:
            self._begin(answer)
        return True

    def _begin(self, answer: Completion) -> None:
        request = answer.request
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

    def _chosen(self) -> list[Running]:
        """Return whose turn it is: every answer, and as many prompts as may be read at once, first come first."""
        left = self.prefill_tokens
        chosen = []
        for running in self._running:
            if running.last is None:
                if left <= 0:
                    continue
                left -= len(running.piece.ids)
            chosen.append(running)
        return chosen

    def _advance(self, chosen: list[Running]) -> None:
        """One step of these. If it fails for all, each is tried alone: who fails alone is at fault, and the others go
        on with the bits that they would have had."""
        self._counts["steps"] += 1
        for running in chosen:
            running.answer.has_begun = True
        try:
            states = self.decoder.step([running.piece for running in chosen])
        except Exception as error:
            if len(chosen) == 1:
                chosen[0].answer.fail(error)
                return
            log.warning("a step of %d requests failed (%s); each is tried alone", len(chosen), error)
            for running in chosen:
                self._advance([running])
            return
        for running, states_ND in zip(chosen, states, strict=True):
            if running.last is None:
                self._read(running, states_ND)
        ready = [(r, s) for r, s in zip(chosen, states, strict=True) if r.read_whole and r.answer.finished is None]
        if ready:
            self._draw([running for running, _ in ready], self.decoder.logits(cat([s[-1:] for _, s in ready])))

    def _read(self, running: Running, states_ND: Tensor) -> None:
        """A chunk of a prompt has been read."""
        request = running.request
        start = running.read
        running.read += len(states_ND)
        if start // CHUNK < len(running.blocks):
            self.prefixes.put(running.blocks[start // CHUNK], self.decoder.copy_block(running.slot, start))
        number = request.sampling.prompt_logprobs
        if number is not None:
            before = states_ND if running.before is None else cat((running.before, states_ND))
            asked = request.prompt_ids[max(1, start) : running.read]
            if asked:
                running.told += prompt_tokens(self.decoder.logits(before[: len(asked)]), asked, number)
            running.before = states_ND[-1:]
        if running.read_whole:
            prompt_logprobs = None if number is None else (None, *running.told)
            score = None
            if request.scored:  # a reward model reads the whole prompt at its last token
                score = float((states_ND[-1].float() * self.decoder.bank.heads[str(request.adapter)]).sum())
            running.answer.begin(prompt_logprobs, running.cached, score)

    def _draw(self, ready: list[Running], logits_BV: Tensor) -> None:
        """Draw the next token of each answer."""
        settings = [running.request.sampling for running in ready]
        numbers = [running.answer.number for running in ready]
        allowed = [running.answer.allowed() for running in ready]
        drawn = next_tokens(logits_BV, settings, numbers, allowed)
        for running, token in zip(ready, drawn, strict=True):
            if running.answer.finished is None:
                self._counts["generated_tokens"] += 1
                running.answer.take(token)
                running.last = None if token is None else token.id

    def _leave(self) -> None:
        """Free the slots of requests that have finished."""
        for running in [running for running in self._running if running.answer.finished]:
            self._running.remove(running)
            if running.answer.finished in ("error", "abort"):  # nobody looked at what it left
                self.decoder.clear(running.slot, running.read + running.answer.length)
            self._free.append(running.slot)
            self._release(running.request)

    def _forget(self) -> None:
        """Remove adapters that are no longer known."""
        bank = self.decoder.bank
        for digest in [digest for digest in bank.units if digest not in self.known]:
            bank.remove(digest)
