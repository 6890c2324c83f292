"""The memory that a workload takes, by role and phase, from the shapes alone. Pure; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from align import ranks
from align.core.errors import InputError
from align.planning.shapes import Linear, Shape, shape_of
from align.planning.workload import Footprint, Part, Phase, Workload, workload_of
from align.run import Run
from align.track import device_in_use

LONGEST, KEPT = 512, 1 << 30
"""As in `align.models.fastpath.llama`."""
ROWS, LOGITS = 128, 1 << 20
"""As in `align.ops.logprobs`."""
TILE, TILE_TOKENS = 32_768, 4096
"""Columns and rows of logits that TRL's losses hold at once."""
COPY = 1 << 30
"""As in `align.models.fastpath.decoding`."""
FP32 = 4


class Pass(NamedTuple):
    """What one pass with a gradient takes.

    Attributes:
        kept: bytes from the forward pass to the backward pass.
        backward: bytes that the backward pass makes beside them, in the layer that it is in.
    """

    kept: float
    backward: float


def is_fast(shape: Shape, work: Workload, autocast: bool = False) -> bool:
    """Whether a pass with a gradient takes the fast path of a CPU.

    Args:
        autocast: fp32 weights are computed with in fewer bits.
    """
    if work.cuda or not shape.llama or work.dtype == "float16" or autocast:
        return False
    return not work.dropout and not work.packing


def keeps_attention(shape: Shape, work: Workload) -> bool:
    """Return whether the fast path keeps the weights of attention. Otherwise attention goes row by row."""
    layers = 1 if work.recompute else shape.layers
    weights = work.tokens * work.length * shape.heads * layers * work.size
    return work.length <= LONGEST and weights <= KEPT


def samples_fast(shape: Shape, work: Workload) -> bool:
    """Whether a rollout does: it does where prompts are short enough, for there is no gradient."""
    autocast = work.method == "full" and work.dtype != "float32"
    return not work.cuda and shape.llama and work.prompt <= LONGEST and not autocast


def pass_of(shape: Shape, work: Workload, trained: bool = False) -> Pass:
    """A pass of a micro-batch with a gradient.

    Args:
        trained: every weight is, and there is no adapter.
    """
    autocast = trained and work.dtype != "float32"
    if is_fast(shape, work, autocast):
        layer, backward = fast_layer(shape, work, trained), fast_backward(shape, work)
    else:
        layer, backward = plain_layer(shape, work, trained), plain_backward(shape, work)
    stream = work.tokens * shape.width * (FP32 if autocast else work.size)
    beside = 2 * stream + (work.size * (shape.linear_weights + shape.vocabulary * shape.width) if autocast else 0)
    if work.recompute:
        return Pass(shape.layers * stream + beside, layer + backward)
    return Pass(shape.layers * layer + beside, backward)


def fast_layer(shape: Shape, work: Workload, trained: bool) -> float:
    """What the fast path keeps of a layer: its input and that of its MLP, queries, keys, values and what they read, the
    two halves of the gated unit, each input through A, and the weights of attention if it keeps them."""
    inside, shared = shape.heads * shape.head, shape.groups * shape.head
    low = 0 if trained else work.rank * len([m for m in shape.linears if bears(m, work)])
    numbers = 2 * shape.width + 2 * inside + 2 * shared + 2 * shape.mlp + low
    if keeps_attention(shape, work):
        return work.tokens * work.size * (numbers + shape.heads * work.length)
    return work.tokens * (work.size * numbers + FP32 * shape.heads)  # a normaliser for each query


def fast_backward(shape: Shape, work: Workload) -> float:
    """What its backward pass makes in a layer: in the MLP, or in attention."""
    inside = shape.heads * shape.head
    mlp = 4 * shape.mlp + shape.width
    weights = 2 * shape.heads * work.length if keeps_attention(shape, work) else 4 * inside
    attention = weights + 4 * inside + 2 * shape.width
    return work.tokens * work.size * max(mlp, attention) + shape.largest * work.size


def plain_layer(shape: Shape, work: Workload, trained: bool) -> float:
    """What transformers' modules keep of a layer."""
    size, inside, shared = work.size, shape.heads * shape.head, shape.groups * shape.head
    norms = 2 * shape.width * (FP32 + size)  # what goes in, in fp32, and what comes out
    if trained:  # its weight has a gradient too; autocast gives each product an input of its own
        norms = 2 * shape.width * 2 * FP32 + size * shape.width * (5 if size < FP32 else 2)
    attention = size * (2 * inside + 2 * shared) + FP32 * shape.heads
    mlp = size * 4 * shape.mlp
    return work.tokens * (norms + attention + mlp + (0 if trained else factor_inputs(shape, work)))


def factor_inputs(shape: Shape, work: Workload) -> float:
    """Bytes a token and layer that are kept for the factors of adapters: on a GPU PEFT widens the input of each layer
    to fp32; with dropout each has an input of its own."""
    bear = [m for m in shape.linears if bears(m, work)]
    inputs, low = sum(m.inputs for m in bear), work.rank * len(bear)
    own = 0.0
    if work.cuda and work.size < FP32:
        own = FP32 * inputs
    if work.dropout:
        own = (FP32 + 1) * inputs
    return own + low * (FP32 if work.cuda else work.size)


def plain_backward(shape: Shape, work: Workload) -> float:
    """What their backward pass makes in a layer."""
    norm, mlp = 5 * shape.width * FP32, 3 * shape.mlp * work.size
    return work.tokens * max(norm, mlp) + shape.largest * work.size


def fast_rollout(shape: Shape, work: Workload) -> tuple[float, float]:
    """What the fast path makes beside keys and values: as it reads all prompts at once, and for each token: the weights
    anew, side by side."""
    size, inside, shared = work.size, shape.heads * shape.head, shape.groups * shape.head
    tokens = work.rollout_rows * work.prompt
    mlp = size * (4 * shape.mlp + 3 * shape.width + 2 * inside + shared) + FP32 * shared * (size < FP32)
    attention = 2 * FP32 * shape.heads * work.prompt + size * (4 * inside + 3 * shared + shape.width)
    copy = size * shape.linear_weights
    if copy > COPY:
        copy = 0
    logits = 3 * FP32 * work.rollout_rows * shape.vocabulary
    return tokens * max(mlp, attention), copy + logits


def plain_rollout(shape: Shape, work: Workload) -> tuple[float, float]:
    """The same of transformers' modules."""
    tokens = work.rollout_rows * work.prompt
    logits = 3 * FP32 * work.rollout_rows * shape.vocabulary
    return tokens * work.size * (3 * shape.mlp + 4 * shape.width), logits + shape.largest * work.size


def bears(linear: Linear, work: Workload) -> bool:
    return not work.targets or linear.name in work.targets


def own_logits(shape: Shape, tokens: int, trained: bool = False) -> float:
    """A chunk of logits of ours: themselves, their softmax, and a product of the two; twice as much where autograd has
    to lead to the head."""
    rows = min(tokens, max(ROWS, LOGITS // shape.vocabulary))
    return (6 if trained else 3) * FP32 * rows * shape.vocabulary


def trl_logits(shape: Shape, work: Workload) -> float:
    """A tile of logits of TRL's: a buffer, and on a CPU, which has no fused kernel, seven more in fp32. The head of a
    model in shards is not read by itself: all logits, their copy in fp32, its softmax and its gradient."""
    if work.method == "full" and work.ranks > 1:
        return work.tokens * shape.vocabulary * (work.size + 3 * FP32)
    rows = min(work.tokens, TILE_TOKENS)
    buffer = rows * TILE * work.size
    columns = min(shape.vocabulary, TILE)
    return buffer + (0 if work.cuda else rows * columns * (7 * FP32 + 1))


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


def predict_peak(
    run: Run,
    longest: int,
    stage: Any,
    data: Any,
    method: Any,
    dtype: str,
    texts: int = 0,
    rewards: int = 0,
    rollout: Any = None,
) -> dict[str, float]:
    """Return the memory that a run's tensors were predicted to take, in MiB, as a figure beside what they took. Returns
    nothing for a model whose sizes cannot be read.

    Args:
        longest: tokens of the longest row that it trains on; of PPO, of the longest prompt.
        stage, data, method, dtype: see `workload_of`.
        texts: of a row; 0 for as many as the settings say.
        rollout: of PPO, see `workload_of`.
    """
    init = run.inputs.get("init")
    try:
        shape = shape_of(run.base)
    except InputError:
        return {}
    work = workload_of(
        stage,
        data,
        rollout,
        method,
        dtype,
        shape.context,
        ranks=ranks.world_size(),
        from_adapter=init is not None and init.whole is False,
        rewards=rewards,
        cuda=device_in_use() == "cuda",
    )
    work = replace(work, length=longest + work.answer if work.prompt else longest, texts=texts or work.texts)
    work = replace(work, prompt=longest if work.prompt else 0)
    return {"predicted_peak_mb": round(footprint(shape, work).peak / 2**20, 1)}
