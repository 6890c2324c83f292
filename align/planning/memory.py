"""Predict the memory that a workload takes, by role and phase, and what it leaves on disk, from the shapes alone.
Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from align import ranks
from align.core.errors import InputError
from align.data.chat.encode import compute_max_prompt_tokens
from align.models.lora import Lora
from align.planning.shapes import Linear, Shape, shape_of
from align.run import Run
from align.track import detect_device

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
MOMENTS = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0}
"""Optimiser → bytes for each weight that it trains."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The largest work of a stage at once: every row as long as allowed.

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
        """Tokens of a micro-batch."""
        return self.micro_batch * self.texts * self.length

    @property
    def accumulates(self) -> bool:
        """Return whether a rank has several micro-batches of an optimiser step."""
        return self.step > self.micro_batch * self.ranks

    @property
    def one_pass(self) -> bool:
        """Return whether PPO learns from the same pass that estimated."""
        return self.whole_batch and self.step <= self.micro_batch

    @property
    def answer(self) -> int:
        """Tokens of an answer."""
        return self.length - self.prompt


def build_workload(config: Any, context: int, *, ranks: int, from_adapter: bool, rewards: int, cuda: bool) -> Workload:
    """Return the largest work of a stage at once.

    Args:
        config: of the run. The method is decided, and not `auto`.
        context: of the model, in tokens.
        rewards: reward models on the base.
        cuda: whether it runs on a GPU.
    """
    stage = config.stage
    method = config.method
    rollout = config.rollout
    lora = Lora.from_settings(method)
    checkpointing = stage.gradient_checkpointing
    work = Workload(
        stage.name,
        method.name,
        ("bfloat16" if cuda else "float32") if config.dtype == "auto" else config.dtype,
        cuda,
        stage.micro_batch,
        min(config.data.max_length, context),
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
        prompt = compute_max_prompt_tokens(context, config.data.max_length, rollout.max_new_tokens)
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
    texts = {"dpo": 2, "reward": getattr(stage, "answers", 2)}
    return replace(
        work,
        texts=texts.get(stage.name, 1),
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
    """A use of memory.

    Attributes:
        role: `base`, `policy`, `reference`, `value`, `reward`; or `work`, which is freed after the phase.
    """

    role: str
    what: str
    bytes: float


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a step, with what lives in it besides the permanent parts."""

    name: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Footprint:
    """The memory of a workload.

    Attributes:
        always: the permanent parts.
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


LONGEST = 512
KEPT = 1 << 30
"""As in `align.models.fastpath.llama`."""
ROWS = 128
LOGITS = 1 << 20
"""As in `align.ops.logprobs`."""
TILE = 32_768
TILE_TOKENS = 4096
"""Columns and rows of logits that TRL's losses hold at once."""
COPY = 1 << 30
"""As in `align.models.fastpath.decoder`."""
FP32 = 4


class Pass(NamedTuple):
    """The memory of one pass with a gradient.

    Attributes:
        kept: bytes from the forward pass to the backward pass.
        backward: bytes that the backward pass makes beside them, in the layer that it is in.
    """

    kept: float
    backward: float


def samples_fast(shape: Shape, work: Workload) -> bool:
    """Return whether a rollout takes the fast path: prompts must be short enough, and there is no gradient."""
    autocast = work.method == "full" and work.dtype != "float32"
    return not work.cuda and shape.llama and work.prompt <= LONGEST and not autocast


def pass_with_gradient(shape: Shape, work: Workload, trained: bool = False) -> Pass:
    """Return the memory of a micro-batch's pass with a gradient.

    Args:
        trained: every weight trains, and there is no adapter.
    """
    autocast = trained and work.dtype != "float32"
    covered = shape.llama and work.dtype != "float16" and not (autocast or work.dropout or work.packing)
    layer, backward = (fast_layer if covered and not work.cuda else plain_layer)(shape, work, trained)
    stream = work.tokens * shape.width * (FP32 if autocast else work.size)
    beside = 2 * stream + (work.size * (shape.linear_weights + shape.vocabulary * shape.width) if autocast else 0)
    if work.recompute:
        return Pass(shape.layers * stream + beside, layer + backward)
    return Pass(shape.layers * layer + beside, backward)


def adapted_layers(shape: Shape, work: Workload, trained: bool) -> list[Linear]:
    """Return the linear layers that have an adapter."""
    return [linear for linear in shape.linears if not trained and (not work.targets or linear.name in work.targets)]


def fast_layer(shape: Shape, work: Workload, trained: bool) -> tuple[float, float]:
    """Return what the fast path keeps of a layer, and what its backward pass makes there.

    It keeps its input and that of its MLP, queries, keys, values and what they read, the two halves of the gated unit,
    each input through A, and the weights of attention unless attention goes row by row. The backward pass has its peak
    in the MLP or in attention.
    """
    low = work.rank * len(adapted_layers(shape, work, trained))
    numbers = 2 * (shape.width + shape.queries + shape.keys + shape.mlp) + low
    weights = work.tokens * work.length * shape.heads * (1 if work.recompute else shape.layers) * work.size
    if work.length <= LONGEST and weights <= KEPT:
        kept = work.tokens * work.size * (numbers + shape.heads * work.length)
        attention = 2 * shape.heads * work.length
    else:
        kept = work.tokens * (work.size * numbers + FP32 * shape.heads)  # a normaliser for each query
        attention = 4 * shape.queries
    attention += 4 * shape.queries + 2 * shape.width
    backward = work.tokens * work.size * max(4 * shape.mlp + shape.width, attention) + shape.largest * work.size
    return kept, backward


def plain_layer(shape: Shape, work: Workload, trained: bool) -> tuple[float, float]:
    """Return what transformers' modules keep of a layer, and what their backward pass makes there."""
    size = work.size
    norms = 2 * shape.width * (FP32 + size)  # what goes in, in fp32, and what comes out
    if trained:  # its weight has a gradient too; autocast gives each product an input of its own
        norms = 2 * shape.width * 2 * FP32 + size * shape.width * (5 if size < FP32 else 2)
    attention = size * 2 * (shape.queries + shape.keys) + FP32 * shape.heads
    # For the factors of adapters, on a GPU PEFT widens the input of each layer; with dropout each has its own input.
    adapted = adapted_layers(shape, work, trained)
    own = FP32 + 1 if work.dropout else FP32 if work.cuda and size < FP32 else 0
    factors = own * sum(linear.inputs for linear in adapted)
    factors += work.rank * len(adapted) * (FP32 if work.cuda else size)
    kept = work.tokens * (norms + attention + size * 4 * shape.mlp + factors)
    backward = work.tokens * max(5 * shape.width * FP32, 3 * shape.mlp * size) + shape.largest * size
    return kept, backward


def rollout_parts(shape: Shape, work: Workload) -> Iterator[Part]:
    """Yield keys and values of all answers that are generated together, and the larger of reading all prompts at once
    and of a token each, with the weights side by side on the fast path."""
    size = work.size
    fast = samples_fast(shape, work)
    cached = work.rollout_rows * work.length * shape.layers * shape.keys
    yield Part("policy", "keys and values", cached * ((FP32 if fast else size) + size))
    if fast:
        mlp = size * (4 * shape.mlp + 3 * shape.width + 2 * shape.queries + shape.keys)
        mlp += FP32 * shape.keys * (size < FP32)
        attention = 2 * FP32 * shape.heads * work.prompt + size * (4 * shape.queries + 3 * shape.keys + shape.width)
        copy = size * shape.linear_weights
        weights = copy if copy <= COPY else 0
        a_token = max(mlp, attention)
    else:
        a_token = size * (3 * shape.mlp + 4 * shape.width)
        weights = shape.largest * size
    prompts = work.rollout_rows * work.prompt * a_token
    tokens = 3 * FP32 * work.rollout_rows * shape.vocabulary + weights
    yield Part("work", "reading prompts" if prompts > tokens else "a token each", max(prompts, tokens))


def own_logits(shape: Shape, tokens: int, trained: bool = False) -> float:
    """Return the bytes of a chunk of our logits: themselves, their softmax, and a product of the two; twice as much if
    the head trains."""
    rows = min(tokens, max(ROWS, LOGITS // shape.vocabulary))
    return (6 if trained else 3) * FP32 * rows * shape.vocabulary


def trl_logits(shape: Shape, work: Workload) -> float:
    """Return the bytes of a tile of TRL's logits: a buffer, and on a CPU, which has no fused kernel, seven more in
    fp32. The head of a model in shards is not read by itself: there it is all logits, their copy in fp32, its softmax
    and its gradient."""
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
    """Predict the memory of a workload on a base of this shape, on each of its ranks."""
    return (ppo_footprint if work.stage == "ppo" else trainer_footprint)(shape, work)


def base_bytes(shape: Shape, method: str, size: int, head: bool = True) -> float:
    """Return the bytes of a base.

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
    """Return the bytes of one adapter in fp32."""
    return FP32 * shape.adapter_weights(work.rank, work.targets, work.dora)


def trainer_footprint(shape: Shape, work: Workload) -> Footprint:
    """Predict SFT, reward, DPO and KTO: the base itself trains, or one adapter of it."""
    whole = work.method == "full"
    adapter = adapter_bytes(shape, work)
    base = base_bytes(shape, work.method, work.size, work.stage != "reward")
    trained = base if whole else adapter + shape.width * FP32 * (work.stage == "reward")
    share = work.ranks if whole else 1  # FSDP2 divides what trains; a frozen base lies on every rank
    always = [Part("base", "weights", base / share)]
    if not whole:
        always.append(Part("policy", "adapter", trained))
    if work.reference:
        always.append(Part("reference", "adapter", adapter))
    always.append(Part("policy", "moments", trained / FP32 * work.moments / share))
    kept, backward = pass_with_gradient(shape, work, whole)
    if work.stage == "reward":
        logits = 0.0
    elif work.stage == "sft" and not work.cuda and not whole and shape.llama:
        logits = own_logits(shape, work.tokens)
    else:
        logits = trl_logits(shape, work)
    gradients = Part("policy", "gradients", trained / share)
    update = (
        gradients._replace(bytes=gradients.bytes if work.accumulates else 0.0),
        Part("work", "activations", kept),
        Part("work", "logits" if logits > backward else "backward pass", max(logits, backward)),
    )
    step = Part("work", "optimiser's own", optimiser_bytes(shape, whole))
    return Footprint(tuple(always), (Phase("update", update), Phase("optimiser", (gradients, step))))


def optimiser_bytes(shape: Shape, whole: bool) -> float:
    """Return the bytes that AdamW makes for the largest of its weights; those of adapters are negligible."""
    return 2.0 * FP32 * max(shape.embeddings, shape.largest) * whole


def ppo_footprint(shape: Shape, work: Workload) -> Footprint:
    whole = work.method == "full"
    adapter = adapter_bytes(shape, work)
    policy = base_bytes(shape, "full", FP32) if whole else float(adapter)
    value = value_bytes(shape, work)
    always = [
        Part("base", "weights", base_bytes(shape, "lora" if whole else work.method, work.size)),
        Part("policy", "weights" if whole else "adapter", policy),
        Part("policy", "moments", ADAM / FP32 * policy),
    ]
    if value:
        always += [Part("value", "adapter and head", value), Part("value", "moments", ADAM / FP32 * value)]
    if work.from_adapter and not whole:
        always.append(Part("reference", "adapter", adapter))
    if work.rewards:
        always.append(Part("reward", "adapters and heads", work.rewards * (adapter + shape.width * FP32)))
    if work.keeps_best and not work.cuda:  # it lies on the CPU
        always.append(Part("policy", "best so far", policy))
    if work.bank:
        always.append(Part("base", "copy that samples", work.size * float(shape.weights)))
    return Footprint(tuple(always), tuple(ppo_phases(shape, work, policy, value)))


def value_bytes(shape: Shape, work: Workload) -> float:
    """Return the bytes of the trained weights of the value role, in fp32."""
    if work.value_backbone == "none":
        return 0.0
    return (adapter_bytes(shape, work) if work.value_backbone == "own" else 0.0) + shape.width * FP32


def ppo_phases(shape: Shape, work: Workload, policy: float, value: float) -> Iterator[Phase]:
    """Yield the phases of an update.

    Args:
        policy, value: bytes of the trained weights of each role.
    """
    whole = work.method == "full"
    has_adapter = work.value_backbone == "own"
    if not work.remote:
        yield Phase("rollout", tuple(rollout_parts(shape, work)))
    own = pass_with_gradient(shape, work, whole)
    other = pass_with_gradient(shape, work)
    logits = own_logits(shape, work.micro_batch * work.answer, whole)
    reading = Part("work", "a pass without gradients", max(logits, other.backward))
    policy_gradients = Part("policy", "gradients", policy)
    value_gradients = Part("value", "gradients", value)
    kept_value_gradients = value_gradients._replace(bytes=value * work.accumulates)
    other_backward = Part("work", "backward pass", other.backward)
    if work.one_pass:
        graph = Part("work", "activations", own.kept + (other.kept if has_adapter else 0.0))
        yield Phase("estimate", (graph, reading) if graph.bytes else (reading,))
        yield Phase("update", (policy_gradients, kept_value_gradients, graph, other_backward))
    else:
        yield Phase("estimate", (reading,))
        of_policy = (
            policy_gradients._replace(bytes=policy * work.accumulates),
            kept_value_gradients,
            Part("work", "activations", own.kept),
            Part("work", "logits" if logits > own.backward else "backward pass", max(logits, own.backward)),
        )
        of_value = (
            policy_gradients,
            kept_value_gradients,
            Part("work", "activations", other.kept),
            other_backward,
        )
        phases = [Phase("update", parts) for parts in ((of_policy, of_value) if has_adapter else (of_policy,))]
        yield max(phases, key=lambda phase: phase.bytes)
    step = Part("work", "optimiser's own", optimiser_bytes(shape, whole))
    yield Phase("optimiser", (policy_gradients, value_gradients, step))


def predict_peak(run: Run, longest: int, config: Any, texts: int = 0, rewards: int = 0) -> dict[str, float]:
    """Return the memory that a run's tensors were predicted to take, in MiB, as a figure beside the measured one.
    Returns nothing for a model whose sizes cannot be read.

    Args:
        longest: tokens of the longest row that it trains on; of PPO, of the longest prompt.
        config: of the run.
        texts: of a row; 0 for as many as the settings say.
    """
    init = run.inputs.get("init")
    try:
        shape = shape_of(run.base)
    except InputError:
        return {}
    work = build_workload(
        config,
        shape.context,
        ranks=ranks.world_size(),
        from_adapter=init is not None and init.whole is False,
        rewards=rewards,
        cuda=detect_device() == "cuda",
    )
    lengths = {"prompt": longest, "length": longest + work.answer} if work.prompt else {"length": longest}
    work = replace(work, texts=texts or work.texts, **lengths)
    return {"predicted_peak_mb": round(footprint(shape, work).peak / 2**20, 1)}


def disk_bytes(shape: Shape, work: Workload) -> tuple[float, float]:
    """Return the bytes of one checkpoint, and of what is published: adapters in fp32 with their moments; whole
    models."""
    head = 4 * shape.width
    adapter = float(adapter_bytes(shape, work))
    if work.stage == "ppo":
        policy = 4.0 * shape.weights if work.method == "full" else adapter
        value = value_bytes(shape, work)
        kept = (policy + value) * (1 + ADAM / 4) + policy * work.keeps_best
        return kept, (work.size * float(shape.weights) if work.method == "full" else adapter) + value
    if work.method == "full":
        return (4.0 + work.moments) * shape.weights, work.size * float(shape.weights)
    trained = adapter + head * (work.stage == "reward")
    return trained * (1 + work.moments / 4), trained
