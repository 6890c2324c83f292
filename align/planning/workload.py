"""What one process does at once, in numbers, and what that takes: the words of every prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
MB = 1e6


@dataclass(frozen=True, slots=True)
class Workload:
    """The worst that a stage does at once: every row as long as it may be.

    Attributes:
        stage: `sft`, `full`, `reward`, `ppo`, `dpo` or `kto`.
        method: `qlora`, `lora` or `full`.
        dtype: of the computation.
        cuda: on a GPU, where nothing takes the fast path of a CPU.
        micro_batch: rows that go through the model at once; pairs, or rankings.
        step: rows of an optimiser step.
        texts: that a row has: a pair two, a ranking as many as it has answers.
        prompt, length: tokens of a prompt, and of a whole row.
        rank, targets, dora, dropout: of an adapter.
        recompute: activations are computed again in the backward pass.
        moments: bytes of the optimiser for each trained weight.
        reference: a copy of the adapter that trains is kept as it starts.
        from_adapter: it starts from an adapter, which is kept beside it as reference.
        packing: several texts share a row.
        value_backbone: of PPO, `own`, `policy` or `frozen`; `none` where its estimator has no critic.
        rewards: reward models on the policy's base.
        rollout_rows: answers that are generated together.
        whole_batch: PPO's batch is one minibatch.
        keeps_best: the best policy's weights are kept aside.
        bank: rollouts come from a copy of the base.
        ranks: processes that a run is dealt to.
        remote: servers sample, whose memory is their own.
    """

    stage: str
    method: str
    dtype: str
    cuda: bool
    micro_batch: int
    length: int
    step: int = 0
    texts: int = 1
    rank: int = 16
    prompt: int = 0
    targets: tuple[str, ...] = ()
    dora: bool = False
    dropout: float = 0.0
    recompute: bool = False
    moments: int = 8
    reference: bool = False
    from_adapter: bool = False
    packing: bool = False
    value_backbone: str = "own"
    rewards: int = 0
    rollout_rows: int = 0
    whole_batch: bool = False
    keeps_best: bool = False
    bank: bool = False
    ranks: int = 1
    remote: bool = False

    @property
    def size(self) -> int:
        """Bytes of a number in the computation."""
        return SIZES[self.dtype]

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch * self.texts * self.length

    @property
    def accumulates(self) -> bool:
        """A rank has several micro-batches of an optimiser step."""
        return self.step > self.micro_batch * self.ranks

    @property
    def one_pass(self) -> bool:
        """PPO learns from the very pass that estimated."""
        return self.whole_batch and self.step <= self.micro_batch

    @property
    def answer(self) -> int:
        """Tokens of an answer."""
        return self.length - self.prompt


class Part(NamedTuple):
    """Something that takes memory.

    Attributes:
        role: whose it is: `base`, `policy`, `reference`, `value`, `reward`; or `work`, which a phase is done with.
    """

    role: str
    what: str
    bytes: float


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a step: what lives in it besides what always does."""

    name: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a workload takes.

    Attributes:
        always: what lives in every phase.
        phases: in their order.
    """

    always: tuple[Part, ...]
    phases: tuple[Phase, ...]

    @property
    def standing(self) -> float:
        """Bytes that always live."""
        return sum(part.bytes for part in self.always)

    @property
    def peak(self) -> float:
        """Bytes that live in the phase that takes the most."""
        return self.standing + self.largest.bytes

    @property
    def largest(self) -> Phase:
        """The phase that takes the most."""
        return max(self.phases, key=lambda phase: phase.bytes)

    def at(self, name: str) -> float:
        """Bytes that live in a phase of that name."""
        return self.standing + next(phase.bytes for phase in self.phases if phase.name == name)
