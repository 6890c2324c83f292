"""A serving engine with continuous batching of requests for different adapters (Yu et al., Orca, 2022).

A finished request frees its slot at once. Each step prefills a chunk or two of a prompt, and samples one token of every
running answer. An answer is bit for bit the same in any batch (see `align.models.fastpath.mixed`)."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, cat

from align.core.errors import require
from align.models.fastpath.mixed import CHUNK, MixedDecoder, RequestTokens
from align.rollout.serving_engine import (
    Completion,
    Request,
    ServingEngine,
    Stats,
    Token,
    sample_tokens,
    score_prompt_tokens,
)


class PrefixCache:
    """An LRU cache of key-value blocks of prompts.

    The key of a block covers the tenant, the adapter, and all tokens from the beginning of the prompt to the block's
    end, so that another adapter or tenant never hits it.

    Args:
        chunk: tokens of a block.
        most_bytes: maximum size of all blocks.
    """

    def __init__(self, chunk: int, most_bytes: int) -> None:
        self.chunk = chunk
        self.most_bytes = most_bytes
        self.bytes = 0
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()

    def keys(self, tenant: str, adapter: str | None, ids: Sequence[int]) -> Iterator[bytes]:
        """Yield the cache key of each full block of a prompt, except a block with the prompt's last token.

        The state of the last token has to be computed for the next token.
        """
        hasher = hashlib.sha256(repr((tenant, adapter)).encode())
        for first in range(0, len(ids) - self.chunk, self.chunk):
            hasher.update(repr(ids[first : first + self.chunk]).encode())
            yield hasher.digest()

    def get(self, key: bytes) -> Tensor | None:
        block = self._blocks.get(key)
        if block is not None:
            self._blocks.move_to_end(key)
        return block

    def add(self, key: bytes, block: Tensor) -> None:
        size = block.nbytes
        if key in self._blocks or size > self.most_bytes:
            return
        while self.bytes + size > self.most_bytes:
            self.bytes -= self._blocks.popitem(last=False)[1].nbytes
        self._blocks[key] = block
        self.bytes += size


log = logging.getLogger(__name__)
PATIENCE = 64
"""Number of steps for which later requests may overtake one whose adapter does not fit into memory."""
OTHER = "Ask a reward model for rewards, and any other adapter, or the base, for answers."


@dataclass(slots=True, eq=False)
class Running:
    """A request that is being processed in one slot of the batch.

    Attributes:
        blocks: keys of the prompt's full blocks.
        read: tokens of the prompt that are in the slot's cache.
        cached: number of these that came from the prefix cache.
        prompt_logprobs: the prompt's tokens with their logprobs so far, if requested.
        before: last hidden state of the previous chunk.
        last: the last sampled token; None until the first one.
    """

    answer: Completion
    slot: int
    blocks: list[bytes]
    read: int = 0
    cached: int = 0
    prompt_logprobs: list[Token] = field(default_factory=list)
    before: Tensor | None = None
    last: int | None = None

    @property
    def request(self) -> Request:
        return self.answer.request

    @property
    def read_whole(self) -> bool:
        return self.read == len(self.request.prompt_ids)

    @property
    def piece(self) -> RequestTokens:
        """The tokens to feed to the model in the next step: a chunk of the prompt, or the last sampled token."""
        prompt = self.request.prompt_ids
        if self.last is None:
            return RequestTokens(self.slot, self.request.adapter, prompt[self.read : self.read + CHUNK], self.read)
        return RequestTokens(self.slot, self.request.adapter, (self.last,), len(prompt) + self.answer.length - 1)


class ContinuousBatch(ServingEngine):
    """A serving engine with continuous batching, which decodes requests for many adapters in one batch.

    Args:
        decoder: a decoder that nothing else uses.
        context: maximum tokens of a prompt and its answer together.
        queue: maximum waiting requests.
        prefix_bytes: maximum size of the prefix cache.
        prefill_tokens: prompt tokens per step, at least one chunk.
        reserve: slots that are kept for tenants without a running request.
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
        self._blocked: list[tuple[Completion, int]] = []
        self._counts = {"steps": 0, "prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}

    def give_up(self, error: Exception) -> None:
        super().give_up(error)
        blocked = self._blocked
        self._blocked = []
        for answer, _ in blocked:
            self._release(answer.request)
            answer.fail(error)
        for running in self._running:
            running.answer.fail(error)
        self._free_finished_slots()

    def stats(self) -> Stats:
        waiting = len(self._waiting) + len(self._blocked)
        return Stats(waiting, len(self._running), resident=len(self.decoder.bank.units), **self._counts)

    def step(self) -> bool:
        for running in self._running:
            if running.answer.is_aborted:
                running.answer.abort()
        self._free_finished_slots()
        self._unload_unregistered_adapters()
        self._admit()
        if self._running:
            self._advance(self._choose_batch())
        self._free_finished_slots()
        return bool(self._running or self._blocked) or len(self._waiting) > 0

    def _admit(self) -> None:
        """Give free slots to waiting requests, as far as their adapters fit into the adapter bank.

        The others are set aside, and tried first at the next step. Later requests may overtake them for `PATIENCE`
        steps.
        """
        blocked = self._blocked
        self._blocked = []
        while blocked:  # after an error each request is either blocked or running, so that it is released once
            answer, since = blocked.pop(0)
            try:
                has_begun = bool(self._free) and self._begin_or_end_request(answer)
            except BaseException:
                if all(running.answer is not answer for running in self._running):
                    self._blocked.append((answer, since))
                self._blocked += blocked
                raise
            if not has_begun:
                self._blocked.append((answer, since))
        while self._free and all(self._counts["steps"] - since < PATIENCE for _, since in self._blocked):
            answer = self._pop_next_request((running.request.tenant for running in self._running), len(self._free))
            if answer is None:
                return
            if not self._begin_or_end_request(answer):
                self._blocked.append((answer, self._counts["steps"]))

    def _begin_or_end_request(self, answer: Completion) -> bool:
        """Give a waiting request a slot, or end it; return False if its adapter does not fit into memory now."""
        request = answer.request
        in_use = {each for running in self._running if (each := running.request.adapter) is not None}
        if answer.is_aborted:
            answer.abort()
        elif not (request.adapter is None or request.adapter in in_use or self.decoder.bank.has_room(in_use)):
            return False
        try:
            if not answer.finished and request.adapter is not None and request.adapter not in self.decoder.bank:
                self.decoder.bank.load(request.adapter, self.known.folder(request.adapter), in_use)
            gives_rewards = request.adapter in self.decoder.bank.heads
            problem = "is a reward model, which generates no answers" if gives_rewards else "is no reward model"
            name = (request.adapter or "base")[:12]
            require(gives_rewards == request.scored, "model", name, problem, OTHER)
        except Exception as error:
            answer.fail(error)
        if answer.finished:
            self._release(request)
        else:
            self._begin_request(answer)
        return True

    def _begin_request(self, answer: Completion) -> None:
        request = answer.request
        keys = (
            []
            if self.prefixes.most_bytes == 0
            else self.prefixes.keys(request.tenant, request.adapter, request.prompt_ids)
        )
        running = Running(answer, self._free.pop(), list(keys))
        self._running.append(running)
        if request.sampling.prompt_logprobs is None:  # prompt logprobs need all states, which the cache does not have
            for number, key in enumerate(running.blocks):
                block = self.prefixes.get(key)
                if block is None:
                    break
                self.decoder.write_block(running.slot, number * CHUNK, block)
                running.read = running.cached = (number + 1) * CHUNK
        self._counts["prompt_tokens"] += len(request.prompt_ids)
        self._counts["cached_tokens"] += running.cached

    def _choose_batch(self) -> list[Running]:
        """Return the requests of the next step: all that are being decoded, and prompts up to `prefill_tokens`.

        Prompts are taken in the order of arrival.
        """
        remaining_tokens = self.prefill_tokens
        batch = []
        for running in self._running:
            if running.last is None:
                if remaining_tokens <= 0:
                    continue
                remaining_tokens -= len(running.piece.ids)
            batch.append(running)
        return batch

    def _advance(self, batch: list[Running]) -> None:
        """Run the model on one step of a batch, and sample the next tokens.

        If it fails, each request is run alone, and only the ones that fail alone are ended: the others get the same
        bits as in the batch.
        """
        self._counts["steps"] += 1
        for running in batch:
            running.answer.has_begun = True
        try:
            states = self.decoder.step([running.piece for running in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.fail(error)
                return
            log.warning("a batch of %d requests failed (%s); each is retried alone", len(batch), error)
            for running in batch:
                self._advance([running])
            return
        for running, states_ND in zip(batch, states, strict=True):
            if running.last is None:
                self._process_prompt_states(running, states_ND)
        ready = [(r, s) for r, s in zip(batch, states, strict=True) if r.read_whole and r.answer.finished is None]
        if ready:
            self._sample_tokens([running for running, _ in ready], self.decoder.logits(cat([s[-1:] for _, s in ready])))

    def _process_prompt_states(self, running: Running, states_ND: Tensor) -> None:
        """Cache a processed chunk of a prompt, and compute the prompt logprobs or the reward that the request asks for.

        Sends the first output when the whole prompt was processed.
        """
        request = running.request
        start = running.read
        running.read += len(states_ND)
        if start // CHUNK < len(running.blocks):
            self.prefixes.add(running.blocks[start // CHUNK], self.decoder.copy_block(running.slot, start))
        number = request.sampling.prompt_logprobs
        if number is not None:
            states = states_ND if running.before is None else cat((running.before, states_ND))
            ids = request.prompt_ids[max(1, start) : running.read]
            if ids:
                running.prompt_logprobs += score_prompt_tokens(self.decoder.logits(states[: len(ids)]), ids, number)
            running.before = states_ND[-1:]
        if running.read_whole:
            prompt_logprobs = None if number is None else (None, *running.prompt_logprobs)
            score = None
            if request.scored:  # a reward model scores the prompt by the state of its last token
                score = float((states_ND[-1].float() * self.decoder.bank.heads[str(request.adapter)]).sum())
            running.answer.begin(prompt_logprobs, running.cached, score)

    def _sample_tokens(self, ready: list[Running], logits_BV: Tensor) -> None:
        """Sample the next token of each request from its logits, and send it to the request's listener."""
        settings = [running.request.sampling for running in ready]
        numbers = [running.answer.number for running in ready]
        allowed = [running.answer.compute_mask() for running in ready]
        tokens = sample_tokens(logits_BV, settings, numbers, allowed)
        for running, token in zip(ready, tokens, strict=True):
            if running.answer.finished is None:
                self._counts["generated_tokens"] += 1
                running.answer.take(token)
                running.last = None if token is None else token.id

    def _free_finished_slots(self) -> None:
        """Remove finished requests from the batch, and free their slots and adapters."""
        for running in [running for running in self._running if running.answer.finished]:
            self._running.remove(running)
            if running.answer.finished in ("error", "abort"):  # its cache may hold values that are not finite
                self.decoder.clear(running.slot, running.read + running.answer.length)
            self._free.append(running.slot)
            self._release(running.request)

    def _unload_unregistered_adapters(self) -> None:
        """Remove adapters from memory that are neither registered nor in use."""
        bank = self.decoder.bank
        for digest in [digest for digest in bank.units if digest not in self.known]:
            bank.remove(digest)
