"""Which of vLLM's servers answer for the policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

WITHIN = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}
"""Mean distance of a token's logprob, in nats, that an engine's own rounding makes."""


@dataclass(frozen=True, slots=True)
class Servers:
    """Which servers answer, and what they are given.

    Attributes:
        python: that has vLLM, for those that are started here.
        urls: of those that run already; where there are none, `replicas` are started.
        words: further arguments of `vllm serve`.
        dtype: that they compute in; empty for the learner's.
        device: of the learner, on which NF4 is quantised.
        start_s: time that one has to start, or to answer again.
        rank: of the adapters that are expected; more room is made where one needs it.
        context: tokens of a prompt and its answer.
        bases: the folder of dequantised bases.
        folder: for adapters; servers have to see it.
        logs: the folder of what those say that are started here.
    """

    python: str
    urls: tuple[str, ...]
    replicas: int
    words: tuple[str, ...]
    dtype: str
    device: str
    start_s: float
    rank: int
    context: int
    bases: Path
    folder: Path
    logs: Path
