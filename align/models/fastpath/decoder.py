"""The weights of a Llama-like decoder, its key-value cache, and the forward for one new token of each row.

transformers' dynamic cache concatenates at every token, which copies the whole cache and allocates a larger tensor each
time. The cache here is allocated once for the maximum number of columns. docs/decisions.md has the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu
from transformers.cache_utils import Cache, DynamicLayer

from align.models.fastpath.layers import LowRank, Matrix, concatenate_a, rotate_pairs
from align.models.fastpath.linear import is_lora, list_active_adapters
from align.ops.linear import linear, pack_weight

MAX_COPY = 1 << 30
"""Maximum size of a copy of the weights, in bytes."""

M = TypeVar("M")
N = TypeVar("N")


class Layer(NamedTuple, Generic[M]):
    """The weights of one decoder layer: its norms, and its matrices, grouped by their input, in a form M."""

    norm: Tensor
    qkv: M
    qk_norms: tuple[Tensor, Tensor] | None
    o: M
    mlp_norm: Tensor
    gate_up: M
    down: M

    @property
    def matrices(self) -> tuple[M, M, M, M]:
        return self.qkv, self.o, self.gate_up, self.down

    def convert(self, function: Callable[[M], N]) -> Layer[N]:
        """Return the layer with `function` applied to each of its groups of matrices."""
        qkv, o, gate_up, down = map(function, self.matrices)
        return Layer(self.norm, qkv, self.qk_norms, o, self.mlp_norm, gate_up, down)


class Decoder(NamedTuple, Generic[M]):
    """The weights of a Llama-like decoder with its active adapters, and the numbers that its forward needs.

    Attributes:
        norm: weight of the last norm.
        eps: epsilon of every norm.
        head: width of a head.
        scale: scale of the products of queries and keys.
    """

    layers: Sequence[Layer[M]]
    norm: Tensor
    eps: float
    head: int
    scale: float

    def normalise(self, x: Tensor, weight_D: Tensor) -> Tensor:
        return rms_norm(x, weight_D.shape, weight_D, self.eps)

    def split_heads(
        self, layer: Layer[M], qkv: Tensor, groups: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Split projected tokens into queries, keys and values [N, heads, D], and rotate queries and keys by their
        positions."""
        heads = qkv.unflatten(1, (-1, self.head))
        qk = heads[:, :-groups]
        v = heads[:, -groups:]
        if layer.qk_norms is not None:
            parts = zip((qk[:, :-groups], qk[:, -groups:]), layer.qk_norms, strict=True)
            qk = torch.cat([self.normalise(part, weight) for part, weight in parts], 1)
        qk = rotate_pairs(qk, cos, sin, 1.0)
        return qk[:, :-groups], qk[:, -groups:], v


Matrices = tuple[Matrix, ...]
"""The matrices of a layer that read the same input."""


class NotPlainError(Exception):
    """Exception for a module whose forward the fast path does not support."""


def read_decoder(model: Any) -> Decoder[Matrices]:
    """Collect the weights of a Llama-like decoder and its active adapters from the modules of transformers and PEFT.

    Raises:
        NotPlainError: the model has several active adapters, dropout, a sliding window, or an MLP that is not SwiGLU.
    """
    config = model.config
    windowed = getattr(config, "sliding_window", None) is not None
    if windowed and set(getattr(config, "layer_types", None) or ()) != {"full_attention"}:
        raise NotPlainError
    if config.hidden_act != "silu" or (model.training and config.attention_dropout):
        raise NotPlainError
    layers = tuple(map(read_layer, model.layers))
    attention = model.layers[0].self_attn
    return Decoder(layers, model.norm.weight, config.rms_norm_eps, attention.head_dim, attention.scaling)


def read_layer(layer: Any) -> Layer[Matrices]:
    attention = layer.self_attn
    mlp = layer.mlp
    return Layer(
        norm=layer.input_layernorm.weight,
        qkv=tuple(map(read_matrix, (attention.q_proj, attention.k_proj, attention.v_proj))),
        qk_norms=(attention.q_norm.weight, attention.k_norm.weight) if hasattr(attention, "q_norm") else None,
        o=(read_matrix(attention.o_proj),),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=(read_matrix(mlp.gate_proj), read_matrix(mlp.up_proj)),
        down=(read_matrix(mlp.down_proj),),
    )


def read_matrix(module: Any) -> Matrix:
    """Return the weight of a linear layer as a Matrix with its active adapter, or raise NotPlainError if it has
    several."""
    layer = module
    low = None
    if is_lora(module):
        layer = module.base_layer
        active = list_active_adapters(module)
        if active is None or len(active) > 1:
            raise NotPlainError
        for name in active:
            low = LowRank(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
    shape = (layer.out_features, layer.in_features)
    if type(layer) is Linear4bit:
        return Matrix(partial(dequantise_layer, layer), shape, layer.bias, low)
    if type(layer) is nn.Linear:
        return Matrix(layer.weight.to, shape, layer.bias, low, layer.weight if layer.weight.requires_grad else None)
    raise NotPlainError


def dequantise_layer(layer: Linear4bit, dtype: torch.dtype) -> Tensor:
    """Return the weight of a bitsandbytes 4-bit layer, dequantised to `dtype`."""
    weight: Any = layer.weight
    return dequantize_4bit(weight.data, weight.quant_state).to(dtype)


def concatenate_biases(matrices: Matrices, dtype: torch.dtype) -> Tensor | None:
    """Concatenate the biases of several matrices, with zeros for a matrix without bias, or return None if no matrix has
    one."""
    if all(m.bias is None for m in matrices):
        return None
    return torch.cat([torch.zeros(m.shape[0], dtype=dtype) if m.bias is None else m.bias for m in matrices])


class ReservedLayer(DynamicLayer):
    """The key-value cache of one layer, whose keys and values [B, heads, used columns, D] are views of a reserved
    buffer."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.used = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.is_initialized = True
        self._keys, self._values = (
            states.new_empty(*states.shape[:2], self.columns, states.shape[3]) for states in (key_states, value_states)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first = self.used
        self.used += key_states.shape[2]
        self._keys[:, :, first : self.used] = key_states
        self._values[:, :, first : self.used] = value_states
        return self._get_used_columns()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows of the cache at `indices`, in the same buffer."""
        for buffer in (self._keys, self._values):
            buffer[: len(indices), :, : self.used] = buffer[indices, :, : self.used]
        self._keys = self._keys[: len(indices)]
        self._values = self._values[: len(indices)]
        self._get_used_columns()

    def _get_used_columns(self) -> tuple[Tensor, Tensor]:
        self.keys = self._keys[:, :, : self.used]
        self.values = self._values[:, :, : self.used]
        return self.keys, self.values


class ReservedCache(Cache):
    """A transformers key-value cache with memory reserved for `columns` tokens in each row.

    Attributes:
        decoder: the weights in the layout for decoding, if the fast forward filled the cache; they must not change
            while it is in use. None for an empty cache, or if the model's own forward filled it.
    """

    def __init__(self, columns: int) -> None:
        super().__init__(layer_class_to_replicate=partial(ReservedLayer, columns))  # pyright: ignore[reportArgumentType]
        self.decoder: Decoder[StackedMatrices] | None = None


class StackedMatrices(NamedTuple):
    """Several matrices that read the same input, concatenated to one, with their LoRA factors.

    Attributes:
        weight: all weights concatenated, in oneDNN's layout; None if the copy would be too large.
        bias: all biases concatenated; None without biases.
        a: all A concatenated [Σ r, in]; None without adapters.
        b: block diagonal of s · Bᵀ, fp32 [Σ r, Σ out].
    """

    matrices: Matrices
    weight: Tensor | None
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None

    @classmethod
    def stack(cls, matrices: Matrices, dtype: torch.dtype, rows: int, copied: bool) -> StackedMatrices:
        weight = pack_weight(torch.cat([m.weight(dtype) for m in matrices]), rows) if copied else None
        bias = concatenate_biases(matrices, dtype)
        lows = [m.low for m in matrices if m.low]
        if not lows:
            return cls(matrices, weight, bias, None, None)
        diagonal = [(m.low.b * m.low.scaling).t().float() if m.low else torch.zeros(0, m.shape[0]) for m in matrices]
        return cls(matrices, weight, bias, concatenate_a(lows, dtype), torch.block_diag(*diagonal))

    def __call__(self, x_BI: Tensor) -> Tensor:
        """Multiply x by all matrices and their adapters, and return the concatenated outputs [B, Σ out]."""
        if self.weight is not None:
            out = linear(x_BI, self.weight, self.bias)
        else:
            out = torch.cat([linear(x_BI, m.weight(x_BI.dtype), m.bias) for m in self.matrices], 1)
        return out if self.a is None or self.b is None else out.add_(linear(x_BI, self.a).float() @ self.b)


def stack_decoder(decoder: Decoder[Matrices], dtype: torch.dtype, rows: int) -> Decoder[StackedMatrices]:
    """Convert a decoder's weights to the layout for decoding, with dequantised and concatenated matrices for batches of
    `rows`. Adapters are concatenated, scaled, and cast to the dtype of the activations."""
    weights = sum(m.shape[0] * m.shape[1] for layer in decoder.layers for ms in layer.matrices for m in ms)
    copied = weights * dtype.itemsize <= MAX_COPY
    stack = partial(StackedMatrices.stack, dtype=dtype, rows=rows, copied=copied)
    return decoder._replace(layers=[layer.convert(stack) for layer in decoder.layers])  # pyright: ignore


def decode_one_token(
    self: Any,
    decoder: Decoder[StackedMatrices],
    ids_B1: Tensor,
    mask_BS: Tensor,
    positions_B1: Tensor,
    cache: ReservedCache,
) -> Tensor:
    """Compute the hidden states of one new token of each row [B, 1, D], and append its keys and values to the cache."""
    x_BD = self.embed_tokens(ids_B1[:, 0])
    cos_BD, sin_BD = (t[0] for t in self.rotary_emb(x_BD, position_ids=positions_B1.T))
    first_layer: Any = cache.layers[0]
    groups = first_layer.keys.shape[1]
    bias = torch.zeros(mask_BS.shape).masked_fill_(~mask_BS, float("-inf")).repeat_interleave(groups, 0)[:, None]
    for number, layer in enumerate(decoder.layers):
        qkv = layer.qkv(decoder.normalise(x_BD, layer.norm))
        q, k, v = decoder.split_heads(layer, qkv, groups, cos_BD, sin_BD)
        keys, values = (t.flatten(0, 1) for t in cache.update(k[:, :, None], v[:, :, None], number))
        queries = q.float().reshape(len(keys), -1, decoder.head)
        scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=decoder.scale)
        attended = torch.bmm(scores.softmax(-1).to(values.dtype), values)
        x_BD = layer.o(attended.view(len(x_BD), -1)).add_(x_BD)
        gate, up = layer.gate_up(decoder.normalise(x_BD, layer.mlp_norm)).chunk(2, 1)
        x_BD = layer.down(silu(gate).mul_(up)).add_(x_BD)
    return decoder.normalise(x_BD, decoder.norm)[:, None]
