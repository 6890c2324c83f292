"""What one process does at once, in numbers, and what that takes: the words of every prediction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from align.data.chat.encode import prompt_room
from align.models.lora import Lora

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
MB = 1e6
MOMENTS = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0}
"""Optimiser → bytes for each weight that it trains."""
TEXTS = {"reward": 2, "dpo": 2}
"""Stage → texts of a row: of a pair two."""


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
    def lora(self) -> Lora:
        """A fresh adapter of this size."""
        return Lora(self.rank, 2 * self.rank, self.dropout, self.targets, dora=self.dora)

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


def workload_of(
    stage: Any,
    data: Any,
    rollout: Any,
    method: Any,
    dtype: str,
    context: int,
    *,
    ranks: int,
    from_adapter: bool,
    rewards: int,
    cuda: bool,
) -> Workload:
    """Return the worst that a stage does at once.

    Args:
        stage, data, rollout, method: the settings of these groups. The method is decided, and not `auto`.
        context: of the model, in tokens.
        rewards: reward models on the base.
        cuda: whether it runs on a GPU.
    """
    lora = Lora.of(method)
    checkpointing = stage.gradient_checkpointing
    work = Workload(
        stage.name,
        method.name,
        ("bfloat16" if cuda else "float32") if dtype == "auto" else dtype,
        cuda,
        stage.micro_batch,
        min(data.max_length, context),
        step=stage.batch_size,
        rank=lora.r,
        targets=lora.targets,
        dora=lora.dora,
        from_adapter=from_adapter,
        recompute=cuda if checkpointing == "auto" else checkpointing == "true",
        rewards=rewards,
        ranks=ranks,
    )
    if stage.name == "ppo":
        prompt = prompt_room(context, data.max_length, rollout.max_new_tokens)
        step = stage.batch_size // stage.minibatches
        together = max(stage.batch_size, stage.normalise_on, stage.eval_prompts if stage.eval_every else 0)
        return replace(
            work,
            micro_batch=min(stage.micro_batch, step),
            step=step,
            prompt=prompt,
            length=prompt + rollout.max_new_tokens,
            value_backbone=stage.value_backbone if stage.has_critic else "none",
            rollout_rows=min(rollout.batch_size, together),
            whole_batch=stage.minibatches == 1,
            bank=rollout.engine == "bank",
            remote=rollout.engine == "vllm",
            keeps_best=bool(stage.eval_every) and stage.publish == "best",
        )
    optimiser = ("paged_adamw_8bit" if cuda else "adamw") if stage.optimiser == "auto" else stage.optimiser
    is_supervised = stage.name in ("sft", "full")
    return replace(
        work,
        texts=getattr(stage, "answers", 2) if stage.name == "reward" else TEXTS.get(stage.name, 1),
        reference=stage.name == "kto" or getattr(stage, "has_reference", False),
        moments=MOMENTS[optimiser],
        packing=is_supervised and stage.packing,
        dropout=lora.dropout if is_supervised and method.name != "full" else 0.0,
    )


def full_rows(count: int, length: int) -> list[list[int]]:
    """Return rows of token ids that differ from the first one on, or, beyond a hundred rows, from the second: a common
    beginning is computed once, and a plan is of rows that share nothing."""
    return [[1 + i % 100, *[1 + i // 100] * (length - 1)] for i in range(count)]


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
