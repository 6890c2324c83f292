"""What one pass through a model keeps and makes: bytes by the way that it is computed.

Two ways, each counted off the code that runs: the fast path of a CPU (`align.models.fastpath`), whose backward passes
are written out and keep little; and transformers' own modules with PEFT's layers, which a GPU runs, and a CPU where the
fast path hands back. docs/sizes.md says how far the counts are from what was measured.
"""

from __future__ import annotations

from typing import NamedTuple

from align.planning.shapes import Linear, Shape
from align.planning.workload import Workload

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
