"""The memory that a workload takes, by role and phase, from the shapes alone. Pure; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from align.planning.activations import (
    FP32,
    fast_rollout,
    own_logits,
    pass_of,
    plain_rollout,
    samples_fast,
    trl_logits,
)
from align.planning.shapes import Shape
from align.planning.workload import Footprint, Part, Phase, Workload

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4 with double quantisation: 4 bits, 8 bits for 64 of them, and an fp32 for 256 of those."""
ADAM = 8
"""Bytes of torch's AdamW for each trained weight."""


def footprint(shape: Shape, work: Workload) -> Footprint:
    """What a workload takes on a base of this shape, on each of its ranks."""
    if work.stage == "ppo":
        return of_ppo(shape, work)
    return of_trainer(shape, work)


def base_bytes(shape: Shape, method: str, size: int, head: bool = True) -> float:
    """A base in memory.

    Args:
        method: `full` keeps it in fp32.
        size: bytes of a number elsewhere, and of what is not quantised.
        head: whether it has its head for tokens; a classifier has none of its own.
    """
    if method == "full":
        return FP32 * float(shape.weights)
    plain = shape.embeddings + shape.others + shape.output * head
    return (NF4 if method == "qlora" else size) * shape.linear_weights + size * plain


def adapter_bytes(shape: Shape, work: Workload) -> int:
    """One adapter in fp32."""
    return FP32 * shape.adapter_weights(work.rank, work.targets, work.dora)


def of_trainer(shape: Shape, work: Workload) -> Footprint:
    """SFT, reward, DPO and KTO: what trains is the base itself, or one adapter of it."""
    whole, ranks = work.method == "full", work.ranks
    head = shape.width * FP32 if work.stage == "reward" else 0
    base = base_bytes(shape, work.method, work.size, work.stage != "reward")
    trained = base if whole else adapter_bytes(shape, work) + head
    share = ranks if whole else 1  # FSDP2 divides what trains; a frozen base lies on every rank
    always = [Part("base", "weights", base / share)]
    if not whole:
        always.append(Part("policy", "adapter", trained))
    if work.reference:
        always.append(Part("reference", "adapter", adapter_bytes(shape, work)))
    always.append(Part("policy", "moments", trained / FP32 * work.moments / share))
    one = pass_of(shape, work, whole)
    if work.stage == "reward":
        logits = 0.0
    elif work.stage == "sft" and not work.cuda and not whole and shape.llama:
        logits = own_logits(shape, work.tokens)
    else:
        logits = trl_logits(shape, work)
    trained_gradients = Part("policy", "gradients", trained / share)
    update = [
        Part("policy", "gradients", trained_gradients.bytes if work.accumulates else 0.0),
        Part("work", "activations", one.kept),
    ]
    if logits > one.backward:
        update.append(Part("work", "logits", logits))
    else:
        update.append(Part("work", "backward pass", one.backward))
    step = Part("work", "optimiser's own", optimiser_bytes(shape, whole))
    return Footprint(tuple(always), (Phase("update", tuple(update)), Phase("optimiser", (trained_gradients, step))))


def optimiser_bytes(shape: Shape, whole: bool) -> float:
    """What AdamW makes for the largest of its weights; beside adapters, nothing to speak of."""
    return 2.0 * FP32 * max(shape.embeddings, shape.largest) * whole


def of_ppo(shape: Shape, work: Workload) -> Footprint:
    whole, adapter, head = work.method == "full", adapter_bytes(shape, work), shape.width * FP32
    policy = base_bytes(shape, "full", FP32) if whole else float(adapter)
    frozen = base_bytes(shape, "lora" if whole else work.method, work.size)
    value = value_bytes(shape, work)
    always = [
        Part("base", "weights", frozen), Part("policy", "weights" if whole else "adapter", policy),
        Part("policy", "moments", ADAM / FP32 * policy),
    ]  # fmt: skip
    if value:
        always += [Part("value", "adapter and head", value), Part("value", "moments", ADAM / FP32 * value)]
    if work.from_adapter and not whole:
        always.append(Part("reference", "adapter", adapter))
    if work.rewards:
        always.append(Part("reward", "adapters and heads", work.rewards * (adapter + head)))
    if work.keeps_best and not work.cuda:  # it lies on the CPU
        always.append(Part("policy", "best so far", policy))
    if work.bank:
        always.append(Part("base", "copy that samples", work.size * float(shape.weights)))
    return Footprint(tuple(always), tuple(ppo_phases(shape, work, policy, value)))


def value_bytes(shape: Shape, work: Workload) -> float:
    """What the value role trains, in fp32."""
    if work.value_backbone == "none":
        return 0.0
    return (adapter_bytes(shape, work) if work.value_backbone == "own" else 0.0) + shape.width * FP32


def ppo_phases(shape: Shape, work: Workload, policy: float, value: float) -> Iterator[Phase]:
    """Args: policy, value: bytes of what trains in each role."""
    whole = work.method == "full"
    if not work.remote:
        yield Phase("rollout", tuple(rollout_parts(shape, work)))
    own, other = pass_of(shape, work, whole), pass_of(shape, work)
    chunk = own_logits(shape, work.micro_batch * work.answer, whole)
    one_more = other.kept if work.one_pass and work.value_backbone == "own" else 0.0
    graph = own.kept + one_more if work.one_pass else 0.0
    reading = Part("work", "a pass without gradients", max(chunk, other.backward))
    yield Phase("estimate", (Part("work", "activations", graph), reading) if graph else (reading,))
    first = (
        Part("policy", "gradients", policy * work.accumulates), Part("value", "gradients", value * work.accumulates),
        Part("work", "activations", own.kept),
        Part("work", "logits" if chunk > own.backward else "backward pass", max(chunk, own.backward)),
    )  # fmt: skip
    second = (
        Part("policy", "gradients", policy), Part("value", "gradients", value * work.accumulates),
        Part("work", "activations", other.kept), Part("work", "backward pass", other.backward),
    )  # fmt: skip
    phases = [Phase("update", first)]
    if work.value_backbone == "own":
        phases.append(Phase("update", second))
    if work.one_pass:
        phases = [Phase("update", (*second[:2], Part("work", "activations", graph), second[3]))]
    yield max(phases, key=lambda phase: phase.bytes)
    step = Part("work", "optimiser's own", optimiser_bytes(shape, whole))
    yield Phase("optimiser", (Part("policy", "gradients", policy), Part("value", "gradients", value), step))


def rollout_parts(shape: Shape, work: Workload) -> Iterator[Part]:
    """Keys and values of all answers that are generated together; and the most of the passes that fill them."""
    fast = samples_fast(shape, work)
    keys = FP32 if fast else work.size
    columns = work.rollout_rows * work.length
    yield Part("policy", "keys and values", columns * shape.layers * shape.groups * shape.head * (keys + work.size))
    prompts, tokens = (fast_rollout if fast else plain_rollout)(shape, work)
    yield Part("work", "reading prompts" if prompts > tokens else "a token each", max(prompts, tokens))
