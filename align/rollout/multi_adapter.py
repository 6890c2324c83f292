"""The rollout engine `bank`: continuous batching as in stage=serve, on a copy of the base with the actors' adapters.

One batch holds rows of many adapters, and a finished row frees its slot for a waiting one. The engine uses snapshots of
the actors' weights (`sync`), as every engine with its own weights does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch

from align.core.errors import InputError
from align.core.types import Rollout
from align.models.actors import Actor
from align.models.dequantised import dequantise_in_place
from align.models.fastpath.decoder import NotPlainError
from align.models.fastpath.mixed import MixedDecoder
from align.models.load import get_context_length, load_base
from align.rollout.continuous import ContinuousBatch
from align.rollout.engine import SnapshotEngine, build_rollout
from align.rollout.serving_engine import Output, Request, SamplingParams, Token
from align.run import Base

ANY = 1 << 30
"""Maximum waiting requests, so high that there is no limit."""
AT_ONCE = 2048
"""Prompt tokens processed per step. It may be large, because the latency of the first token does not matter."""


@dataclass
class BankEngine(SnapshotEngine):
    """The rollout engine `bank`, which samples rows of many adapters in one batch from a copy of the base.

    Attributes:
        stop_ids, pad_id, max_new_tokens, temperature: see `align.rollout.hf.HfEngine`.
        batch_size: rows decoded at once.
        resident, max_rank: maximum adapters in the bank, and their maximum rank.
    """

    name: ClassVar[str] = "bank"
    stop_ids: tuple[int, ...]
    pad_id: int
    max_new_tokens: int
    temperature: float = 1.0
    batch_size: int = 128
    resident: int = 16
    max_rank: int = 256
    digests: dict[Actor, str | None] = field(default_factory=dict)

    def load(self, base: Base, method: str, dtype: torch.dtype) -> None:
        """Load the base on the CPU into a decoder for many adapters, or raise InputError if it is not Llama-like."""
        model = load_base(base, method, torch.device("cpu"), dtype)
        context = get_context_length(model)
        if method == "qlora":
            model = dequantise_in_place(model, dtype)
        try:
            decoder = MixedDecoder(model, self.batch_size, context, self.resident, self.max_rank)
        except NotPlainError as error:
            problem = f"{base.id} is not on the fast path of Llama-like decoders"
            raise InputError("rollout.engine", "bank", problem, "Use rollout.engine=hf.") from error
        self.base = base
        self.batch = ContinuousBatch(decoder, context, ANY, prefill_tokens=AT_ONCE)
        self.folder = TemporaryDirectory(prefix="align-snapshots-")
        self.snapshots = Path(self.folder.name)

    def load_snapshot(self, actor: Actor, folder: Path | None) -> None:
        if folder is not None:
            self.batch.register(folder)

    def drop_snapshot(self, digest: str) -> None:
        self.batch.unregister(digest)

    def close(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def generate(
        self, prompts: Sequence[Sequence[int]], actor: Actor | Sequence[Actor], seeds: Sequence[int]
    ) -> Rollout:
        digests = self.digests_of_rows(actor, len(prompts))
        answers = [ReceivedAnswer() for _ in prompts]
        for prompt, seed, digest, answer in zip(prompts, seeds, digests, answers, strict=True):
            sampling = SamplingParams(
                self.max_new_tokens,
                self.temperature,
                seed=seed,
                stop_ids=self.stop_ids,
                logprobs=0,
                processed_logprobs=True,
            )
            self.batch.add(Request(tuple(prompt), sampling, digest), answer.receive)
        while self.batch.step():
            pass
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        responses = [[token.id for token in answer.tokens] for answer in answers]
        logprobs = [[token.logprob for token in answer.tokens] for answer in answers]
        return build_rollout(prompts, responses, logprobs, [answer.ended for answer in answers], self.pad_id)


@dataclass
class ReceivedAnswer:
    """The tokens of one answer that the engine has sent so far, and its end or error."""

    tokens: list[Token] = field(default_factory=list)
    ended: bool = False
    error: Exception | None = None

    def receive(self, output: Output) -> None:
        self.tokens += output.tokens
        self.ended = output.finish_reason == "stop"
        self.error = output.error
