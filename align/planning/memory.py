"""Prediction of a workload's memory and disk space from the model's layer sizes, without importing torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from align import ranks
from align.core.errors import InputError
from align.data.chat.encode import compute_max_prompt_tokens
from align.models.lora import Lora
from align.planning.shapes import Linear, Shape, read_shape
from align.run import Run
from align.track import detect_device

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
MOMENTS = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0}
"""Bytes of optimiser state for each trained weight, by optimiser."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The settings of a training run that determine its memory, in the worst case that all rows have the maximum
    length.

    Attributes:
        stage: `sft`, `full`, `reward`, `ppo`, `dpo` or `kto`.
        method: `qlora`, `lora` or `full`.
        dtype: dtype of the computation.
        cuda: whether it runs on a GPU, where the fast path does not apply.
        micro_batch: rows (or pairs, or rankings) of one forward pass.
        step: rows of an optimiser step.
        texts: texts of a row: 2 for a pair, the number of answers for a ranking.
        prompt, length: tokens of a prompt, and of a whole row.
        rank, targets, dora, dropout: settings of an adapter.
        recompute: whether gradients are checkpointed.
        moments: bytes of the optimiser for each trained weight.
        reference: whether a copy of the trained adapter is kept as reference.
        from_adapter: whether the policy starts from an adapter, which is kept as reference.
        packing: whether several texts share a row.
        value_backbone: `own`, `policy` or `frozen` for PPO; `none` without a critic.
        rewards: number of reward models on the policy's base.
        rollout_rows: answers that are generated at once.
        whole_batch: whether PPO's batch is one minibatch.
        keeps_best: whether the best policy's weights are kept in memory.
        bank: whether rollouts use a copy of the base.
        ranks: number of processes.
        remote: whether servers sample, whose memory is not counted.
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
        """LoRA settings of a new adapter with the workload's rank, target layers, dropout and DoRA flag."""
        return Lora(self.rank, 2 * self.rank, self.dropout, self.targets, dora=self.dora)

    @property
    def size(self) -> int:
        """Bytes of one number in the dtype of the computation."""
        return SIZES[self.dtype]

    @property
    def tokens(self) -> int:
        """Number of tokens in a micro-batch whose texts all have the maximum length."""
        return self.micro_batch * self.texts * self.length

    @property
    def accumulates(self) -> bool:
        """True if a rank accumulates the gradients of several micro-batches in an optimiser step."""
        return self.step > self.micro_batch * self.ranks

    @property
    def one_pass(self) -> bool:
        """True if PPO's first gradient step reuses the forward pass that computed the log-probabilities and values."""
        return self.whole_batch and self.step <= self.micro_batch

    @property
    def answer(self) -> int:
        """Maximum number of tokens of a generated answer."""
        return self.length - self.prompt


def build_workload(
    config: Any, context: int, *, ranks: int, from_adapter: bool, rewards: int, on_gpu: bool
) -> Workload:
    """Build the worst-case workload of a run from its configuration and the model's context length.

    Args:
        config: the run's config, whose method is not `auto` any more.
        context: the model's context length in tokens.
        ranks: number of processes.
        from_adapter: whether the policy starts from an adapter.
        rewards: number of reward models on the base.
        on_gpu: whether it runs on a GPU.
    """
    stage = config.stage
    method = config.method
    rollout = config.rollout
    lora = Lora.from_settings(method)
    checkpointing = stage.gradient_checkpointing
    work = Workload(
        stage.name,
        method.name,
        ("bfloat16" if on_gpu else "float32") if config.dtype == "auto" else config.dtype,
        on_gpu,
        stage.micro_batch,
        min(config.data.max_length, context),
        step=stage.batch_size,
        rank=lora.r,
        targets=lora.targets,
        dora=lora.dora,
        from_adapter=from_adapter,
        recompute=on_gpu if checkpointing == "auto" else checkpointing == "true",
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
    optimiser = ("paged_adamw_8bit" if on_gpu else "adamw") if stage.optimiser == "auto" else stage.optimiser
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


def build_full_rows(count: int, length: int) -> list[list[int]]:
    """Return `count` rows of `length` token ids without common prefixes, for a measurement of the worst case. Rows
    differ from the first token on, or from the second beyond a hundred rows. Common prefixes would be computed only
    once, and the plan assumes rows that share nothing."""
    return [[1 + i % 100, *[1 + i // 100] * (length - 1)] for i in range(count)]


class Part(NamedTuple):
    """One use of memory, such as weights, optimiser moments or activations, with its bytes and the model role that it
    belongs to.

    Attributes:
        role: `base`, `policy`, `reference`, `value`, `reward`; or `work` for memory that is freed after the phase.
        what: description of the use.
    """

    role: str
    what: str
    bytes: float


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of a training step, such as `rollout` or `update`, with the memory that it uses besides the permanent
    parts."""

    name: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Footprint:
    """The predicted memory of a workload: permanent parts, and the additional parts of each phase.

    Attributes:
        always: the permanent parts.
        phases: the phases of a step in order.
    """

    always: tuple[Part, ...]
    phases: tuple[Phase, ...]

    @property
    def standing(self) -> float:
        """Bytes of the parts that stay allocated in all phases."""
        return sum(part.bytes for part in self.always)

    @property
    def peak(self) -> float:
        """Bytes in the phase that uses the most memory, permanent parts included."""
        return self.standing + self.largest.bytes

    @property
    def largest(self) -> Phase:
        """The phase of a step that uses the most memory."""
        return max(self.phases, key=lambda phase: phase.bytes)

    def get_phase_bytes(self, name: str) -> float:
        """Return the bytes that are allocated in the phase called `name`, permanent parts included."""
        return self.standing + next(phase.bytes for phase in self.phases if phase.name == name)


LONGEST = 512
KEPT = 1 << 30
"""Limits of the fast path, copied from `align.models.fastpath.llama`."""
ROWS = 128
LOGITS = 1 << 20
"""Chunk sizes of logits, copied from `align.ops.logprobs`."""
TILE = 32_768
TILE_TOKENS = 4096
"""Columns and rows of a tile of logits in TRL's losses."""
COPY = 1 << 30
"""Limit of the bytes of copied weights, from `align.models.fastpath.decoder`."""
FP32 = 4


class PassMemory(NamedTuple):
    """The bytes that a forward and backward pass needs, for one layer or for a whole model.

    Attributes:
        kept: bytes that are kept from the forward for the backward pass.
        backward: additional bytes of the backward pass in its present layer.
    """

    kept: float
    backward: float


def uses_fast_rollout(shape: Shape, work: Workload) -> bool:
    """Return whether rollouts of this workload decode on the fast path, which needs a CPU, a Llama-like model and short
    prompts."""
    autocast = work.method == "full" and work.dtype != "float32"
    return not work.cuda and shape.llama and work.prompt <= LONGEST and not autocast


def predict_pass(shape: Shape, work: Workload, is_base_trained: bool = False) -> PassMemory:
    """Predict the bytes of activations in the forward and backward pass of one micro-batch through the whole model.

    Args:
        is_base_trained: whether all weights train, without an adapter.
    """
    autocast = is_base_trained and work.dtype != "float32"
    covered = shape.llama and work.dtype != "float16" and not (autocast or work.dropout or work.packing)
    layer, backward = (predict_fast_layer if covered and not work.cuda else predict_plain_layer)(
        shape, work, is_base_trained
    )
    stream = work.tokens * shape.width * (FP32 if autocast else work.size)
    cast_weights = work.size * (shape.linear_weights + shape.vocabulary * shape.width) if autocast else 0
    shared = 2 * stream + cast_weights
    if work.recompute:
        return PassMemory(shape.layers * stream + shared, layer + backward)
    return PassMemory(shape.layers * layer + shared, backward)


def list_adapted_layers(shape: Shape, work: Workload, is_base_trained: bool) -> list[Linear]:
    """Return the model's linear layers that get an adapter, none if the base itself is trained."""
    return [
        linear for linear in shape.linears if not is_base_trained and (not work.targets or linear.name in work.targets)
    ]


def predict_fast_layer(shape: Shape, work: Workload, is_base_trained: bool) -> PassMemory:
    """Predict the bytes of activations in one layer's forward and backward pass on the fast path.

    It keeps the inputs of the layer and of its MLP; queries, keys, values and the output of attention; the two halves
    of the gated unit; each input times A; and the attention weights unless attention is computed row by row. The peak
    of the backward pass is in the MLP or in attention.
    """
    low = work.rank * len(list_adapted_layers(shape, work, is_base_trained))
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
    return PassMemory(kept, backward)


def predict_plain_layer(shape: Shape, work: Workload, is_base_trained: bool) -> PassMemory:
    """Predict the bytes of activations in one layer's forward and backward pass with transformers' own modules."""
    size = work.size
    norms = 2 * shape.width * (FP32 + size)  # inputs in fp32, and outputs
    if is_base_trained:  # the norms' weights have gradients too, and under autocast each product has its own input
        norms = 2 * shape.width * 2 * FP32 + size * shape.width * (5 if size < FP32 else 2)
    attention = size * 2 * (shape.queries + shape.keys) + FP32 * shape.heads
    # PEFT casts the input of each adapted layer to fp32 on a GPU, and copies it for dropout.
    adapted = list_adapted_layers(shape, work, is_base_trained)
    input_size = FP32 + 1 if work.dropout else FP32 if work.cuda and size < FP32 else 0
    factors = input_size * sum(linear.inputs for linear in adapted)
    factors += work.rank * len(adapted) * (FP32 if work.cuda else size)
    kept = work.tokens * (norms + attention + size * 4 * shape.mlp + factors)
    backward = work.tokens * max(5 * shape.width * FP32, 3 * shape.mlp * size) + shape.largest * size
    return PassMemory(kept, backward)


def iter_rollout_parts(shape: Shape, work: Workload) -> Iterator[Part]:
    """Yield the memory parts of a rollout: the key-value cache, and the work memory of its prefill or of a decode step,
    whichever is larger. On the fast path a decode step has a copy of the weights."""
    size = work.size
    fast = uses_fast_rollout(shape, work)
    cached = work.rollout_rows * work.length * shape.layers * shape.keys
    yield Part("policy", "keys and values", cached * ((FP32 if fast else size) + size))
    if fast:
        mlp = size * (4 * shape.mlp + 3 * shape.width + 2 * shape.queries + shape.keys)
        mlp += FP32 * shape.keys * (size < FP32)
        attention = 2 * FP32 * shape.heads * work.prompt + size * (4 * shape.queries + 3 * shape.keys + shape.width)
        copy = size * shape.linear_weights
        weights = copy if copy <= COPY else 0
        per_token = max(mlp, attention)
    else:
        per_token = size * (3 * shape.mlp + 4 * shape.width)
        weights = shape.largest * size
    prompts = work.rollout_rows * work.prompt * per_token
    tokens = 3 * FP32 * work.rollout_rows * shape.vocabulary + weights
    yield Part("work", "reading prompts" if prompts > tokens else "a token each", max(prompts, tokens))


def count_own_logits(shape: Shape, tokens: int, is_head_trained: bool = False) -> float:
    """Return the bytes of the largest chunk of logits, with temporary copies, when our own code computes
    log-probabilities. These are the logits, their softmax, and a product of the two; twice that if the head trains."""
    rows = min(tokens, max(ROWS, LOGITS // shape.vocabulary))
    return (6 if is_head_trained else 3) * FP32 * rows * shape.vocabulary


def count_trl_logits(shape: Shape, work: Workload) -> float:
    """Return the bytes of logits, with temporary copies, when TRL's losses are computed. They are a tile's buffer, and
    on a CPU, without the fused kernel, seven more in fp32. The head of a sharded model cannot be used separately. There
    it is all logits, their copy in fp32, its softmax and its gradient."""
    if work.method == "full" and work.ranks > 1:
        return work.tokens * shape.vocabulary * (work.size + 3 * FP32)
    rows = min(work.tokens, TILE_TOKENS)
    buffer = rows * TILE * work.size
    columns = min(shape.vocabulary, TILE)
    return buffer + (0 if work.cuda else rows * columns * (7 * FP32 + 1))


NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per weight in NF4 with double quantisation. They are 4 bits, 8 bits for each 64 weights, and an fp32 for each
256 of those."""
ADAM = 8
"""Bytes of torch's AdamW state for each trained weight."""


def predict_footprint(shape: Shape, work: Workload) -> Footprint:
    """Predict the memory of a workload on each rank, for a base model with these layer sizes."""
    return (predict_ppo_footprint if work.stage == "ppo" else predict_trainer_footprint)(shape, work)


def count_base_bytes(shape: Shape, method: str, size: int, includes_head: bool = True) -> float:
    """Return the bytes of a base model's weights in the format that the training method loads them in.

    Args:
        method: `full` for fp32, `qlora` for NF4, `lora` for `size` bytes per weight.
        size: bytes of a weight that is not quantised.
        includes_head: whether it has a language head; a classifier has none.
    """
    if method == "full":
        return FP32 * float(shape.weights)
    plain = shape.embeddings + shape.others + shape.output * includes_head
    return (NF4 if method == "qlora" else size) * shape.linear_weights + size * plain


def count_adapter_bytes(shape: Shape, work: Workload) -> int:
    """Return the bytes of one LoRA adapter in fp32."""
    return FP32 * shape.adapter_weights(work.rank, work.targets, work.dora)


def predict_trainer_footprint(shape: Shape, work: Workload) -> Footprint:
    """Predict the memory of SFT, reward, DPO or KTO training on each rank, with all weights or one adapter trained."""
    is_full = work.method == "full"
    adapter = count_adapter_bytes(shape, work)
    base = count_base_bytes(shape, work.method, work.size, work.stage != "reward")
    trained = base if is_full else adapter + shape.width * FP32 * (work.stage == "reward")
    share = work.ranks if is_full else 1  # FSDP2 shards a trained model; every rank has a frozen base
    always = [Part("base", "weights", base / share)]
    if not is_full:
        always.append(Part("policy", "adapter", trained))
    if work.reference:
        always.append(Part("reference", "adapter", adapter))
    always.append(Part("policy", "moments", trained / FP32 * work.moments / share))
    kept, backward = predict_pass(shape, work, is_full)
    if work.stage == "reward":
        logits = 0.0
    elif work.stage == "sft" and not work.cuda and not is_full and shape.llama:
        logits = count_own_logits(shape, work.tokens)
    else:
        logits = count_trl_logits(shape, work)
    gradients = Part("policy", "gradients", trained / share)
    update = (
        gradients._replace(bytes=gradients.bytes if work.accumulates else 0.0),
        Part("work", "activations", kept),
        Part("work", "logits" if logits > backward else "backward pass", max(logits, backward)),
    )
    step = Part("work", "optimiser's own", count_optimiser_bytes(shape, is_full))
    return Footprint(tuple(always), (Phase("update", update), Phase("optimiser", (gradients, step))))


def count_optimiser_bytes(shape: Shape, is_base_trained: bool) -> float:
    """Return the temporary bytes of AdamW's step for the largest weight, or 0 if only adapters are trained, where they
    are negligible."""
    return 2.0 * FP32 * max(shape.embeddings, shape.largest) * is_base_trained


def predict_ppo_footprint(shape: Shape, work: Workload) -> Footprint:
    is_full = work.method == "full"
    adapter = count_adapter_bytes(shape, work)
    policy = count_base_bytes(shape, "full", FP32) if is_full else float(adapter)
    value = count_value_bytes(shape, work)
    always = [
        Part("base", "weights", count_base_bytes(shape, "lora" if is_full else work.method, work.size)),
        Part("policy", "weights" if is_full else "adapter", policy),
        Part("policy", "moments", ADAM / FP32 * policy),
    ]
    if value:
        always += [Part("value", "adapter and head", value), Part("value", "moments", ADAM / FP32 * value)]
    if work.from_adapter and not is_full:
        always.append(Part("reference", "adapter", adapter))
    if work.rewards:
        always.append(Part("reward", "adapters and heads", work.rewards * (adapter + shape.width * FP32)))
    if work.keeps_best and not work.cuda:  # it is kept in main memory
        always.append(Part("policy", "best so far", policy))
    if work.bank:
        always.append(Part("base", "copy that samples", work.size * float(shape.weights)))
    return Footprint(tuple(always), tuple(iter_ppo_phases(shape, work, policy, value)))


def count_value_bytes(shape: Shape, work: Workload) -> float:
    """Return the fp32 bytes of the weights trained for PPO's critic: its head, and its own adapter if it has one; 0
    without a critic."""
    if work.value_backbone == "none":
        return 0.0
    return (count_adapter_bytes(shape, work) if work.value_backbone == "own" else 0.0) + shape.width * FP32


def iter_ppo_phases(shape: Shape, work: Workload, policy: float, value: float) -> Iterator[Phase]:
    """Yield the rollout, estimate, update and optimiser phases of a PPO update with the memory of each.

    Args:
        policy, value: bytes of the trained weights of each role.
    """
    is_full = work.method == "full"
    has_adapter = work.value_backbone == "own"
    if not work.remote:
        yield Phase("rollout", tuple(iter_rollout_parts(shape, work)))
    policy_pass = predict_pass(shape, work, is_full)
    adapter_pass = predict_pass(shape, work)
    logits = count_own_logits(shape, work.micro_batch * work.answer, is_full)
    reading = Part("work", "a pass without gradients", max(logits, adapter_pass.backward))
    policy_gradients = Part("policy", "gradients", policy)
    value_gradients = Part("value", "gradients", value)
    kept_value_gradients = value_gradients._replace(bytes=value * work.accumulates)
    adapter_backward = Part("work", "backward pass", adapter_pass.backward)
    if work.one_pass:
        graph = Part("work", "activations", policy_pass.kept + (adapter_pass.kept if has_adapter else 0.0))
        yield Phase("estimate", (graph, reading) if graph.bytes else (reading,))
        yield Phase("update", (policy_gradients, kept_value_gradients, graph, adapter_backward))
    else:
        yield Phase("estimate", (reading,))
        of_policy = (
            policy_gradients._replace(bytes=policy * work.accumulates),
            kept_value_gradients,
            Part("work", "activations", policy_pass.kept),
            Part(
                "work",
                "logits" if logits > policy_pass.backward else "backward pass",
                max(logits, policy_pass.backward),
            ),
        )
        of_value = (
            policy_gradients,
            kept_value_gradients,
            Part("work", "activations", adapter_pass.kept),
            adapter_backward,
        )
        phases = [Phase("update", parts) for parts in ((of_policy, of_value) if has_adapter else (of_policy,))]
        yield max(phases, key=lambda phase: phase.bytes)
    step = Part("work", "optimiser's own", count_optimiser_bytes(shape, is_full))
    yield Phase("optimiser", (policy_gradients, value_gradients, step))


def predict_peak(run: Run, longest: int, config: Any, texts: int = 0, rewards: int = 0) -> dict[str, float]:
    """Return the predicted peak memory of a run's tensors as `predicted_peak_mb`, in MiB, for comparison with the
    measured one. Returns an empty dictionary for a model whose sizes cannot be read.

    Args:
        longest: tokens of the longest row; of the longest prompt for PPO.
        config: the run's config.
        texts: texts of a row; 0 for the number in the settings.
        rewards: number of reward models on the base.
    """
    init = run.inputs.get("init")
    try:
        shape = read_shape(run.base)
    except InputError:
        return {}
    work = build_workload(
        config,
        shape.context,
        ranks=ranks.world_size(),
        from_adapter=init is not None and init.whole is False,
        rewards=rewards,
        on_gpu=detect_device() == "cuda",
    )
    lengths = {"prompt": longest, "length": longest + work.answer} if work.prompt else {"length": longest}
    work = replace(work, texts=texts or work.texts, **lengths)
    return {"predicted_peak_mb": round(predict_footprint(shape, work).peak / 2**20, 1)}


class DiskBytes(NamedTuple):
    """The bytes on disk of one checkpoint, with fp32 weights and optimiser moments, and of the published artifact."""

    checkpoint: float
    artifact: float


def predict_disk_bytes(shape: Shape, work: Workload) -> DiskBytes:
    """Predict how many bytes on disk one checkpoint of a run takes, and how many its published artifact takes."""
    head = 4 * shape.width
    adapter = float(count_adapter_bytes(shape, work))
    if work.stage == "ppo":
        policy = 4.0 * shape.weights if work.method == "full" else adapter
        value = count_value_bytes(shape, work)
        checkpoint = (policy + value) * (1 + ADAM / 4) + policy * work.keeps_best
        published_policy = work.size * float(shape.weights) if work.method == "full" else adapter
        return DiskBytes(checkpoint, published_policy + value)
    if work.method == "full":
        return DiskBytes((4.0 + work.moments) * shape.weights, work.size * float(shape.weights))
    trained = adapter + head * (work.stage == "reward")
    return DiskBytes(trained * (1 + work.moments / 4), trained)
