"""Rollouts by the engine that serves: a copy of the base, laid out for decoding, and a bank of the actors' adapters.

Answers of many adapters come out of one batch. Rows that finish make room for those that wait. It answers with
snapshots of the actors' weights (`sync`), as any engine does that has weights of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from align.core.errors import InputError, require
from align.core.types import Rollout
from align.models.actor import Actor
from align.models.adapter_pool import snapshot
from align.models.dequantised import dequantised
from align.models.fastpath.mixed import MixedDecoder
from align.models.fastpath.weights import NotPlainError
from align.models.load import context_length, load_base
from align.rollout.continuous import ContinuousBatch
from align.rollout.engine import rollout_of, rows_by_actor
from align.rollout.requests import Output, Request, SamplingParams, Token
from align.run import Base

ANY, AT_ONCE = 1 << 30, 2048
"""Requests that may wait: as many as there are; and tokens of prompts that are read at once: nobody waits for a first
token."""


@dataclass
class BankEngine:
    """See the module, and `align.rollout.engine.Engine`.

    Attributes:
        stop_ids, pad_id, max_new_tokens, temperature: as `align.rollout.hf.HfEngine` has them.
        batch_size: rows decoded at once.
        resident, max_rank: of the bank.
    """

    stop_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int
    temperature: float = 1.0
    batch_size: int = 128
    resident: int = 16
    max_rank: int = 256
    _known: dict[Actor, str | None] = field(default_factory=dict)

    def load(self, base: Base, method: str, dtype: torch.dtype) -> None:
        """Raises: InputError: the architecture is off the fast path."""
        model = load_base(base, method, torch.device("cpu"), dtype)
        context = context_length(model)
        if method == "qlora":
            model = dequantised(model, dtype)
        try:
            decoder = MixedDecoder(model, self.batch_size, context, self.resident, self.max_rank)
        except NotPlainError as error:
            problem = f"{base.id} is not on the fast path of Llama-like decoders"
            raise InputError("rollout.engine", "bank", problem, "Use rollout.engine=hf.") from error
        self.base, self.batch = base, ContinuousBatch(decoder, context, ANY, prefill_tokens=AT_ONCE)
        self.folder = TemporaryDirectory(prefix="align-snapshots-")

    def sync(self, actor: Actor) -> None:
        digest = None
        if not actor.base_alone:
            folder = snapshot(actor, self.base, Path(self.folder.name))
            adapter = (folder / "adapter_config.json").is_file()
            require(adapter, "rollout.engine", "bank", "answers by adapters alone", "Use rollout.engine=hf.")
            digest = self.batch.register(folder)
        before, self._known[actor] = self._known.get(actor), digest
        if before not in (None, *self._known.values()):
            self.batch.unregister(str(before))

    def close(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def generate(
        self, prompts: Sequence[Sequence[int]], actor: Actor | Sequence[Actor], seeds: Sequence[int]
    ) -> Rollout:
        digests: dict[int, str | None] = {}
        for each, rows in rows_by_actor(actor, len(prompts)).items():
            if each not in self._known:
                self.sync(each)
            digests |= dict.fromkeys(rows, self._known[each])
        answers = [Heard() for _ in prompts]
        for row, (prompt, seed, answer) in enumerate(zip(prompts, seeds, answers, strict=True)):
            sampling = SamplingParams(
                self.max_new_tokens, self.temperature, seed=seed, stop_ids=self.stop_ids, logprobs=0,
                processed_logprobs=True,
            )  # fmt: skip
            self.batch.add(Request(tuple(prompt), sampling, digests[row]), answer.hear)
        while self.batch.step():
            pass
        for error in filter(None, (answer.error for answer in answers)):
            raise error
        responses = [[token.id for token in answer.tokens] for answer in answers]
        logprobs = [[token.logprob for token in answer.tokens] for answer in answers]
        return rollout_of(prompts, responses, logprobs, [answer.ended for answer in answers], self.pad_id)


@dataclass
class Heard:
    """An answer as it comes in."""

    tokens: list[Token] = field(default_factory=list)
    ended: bool = False
    error: Exception | None = None

    def hear(self, output: Output) -> None:
        self.tokens += output.tokens
        self.ended = output.finish_reason == "stop"
        self.error = output.error
