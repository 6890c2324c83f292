"""What a pass through a Llama-like decoder needs of transformers' and PEFT's modules, read off them as they stand."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn

from align.models.fastpath.layers import LowRank, Matrix
from align.models.fastpath.lora import active_on, is_lora


class Layer(NamedTuple):
    """One layer: the weights of its norms, and its matrices by the input that they read."""

    norm: Tensor
    qkv: tuple[Matrix, ...]
    qk_norms: tuple[Tensor, Tensor] | None
    o: tuple[Matrix, ...]
    mlp_norm: Tensor
    gate_up: tuple[Matrix, ...]
    down: tuple[Matrix, ...]


class Decoder(NamedTuple):
    """A decoder's weights with the adapters in force.

    Attributes:
        norm: the weight of the last norm.
        eps: of every norm.
        head: width of a head.
        scale: of the products of queries and keys.
    """

    layers: tuple[Layer, ...]
    norm: Tensor
    eps: float
    head: int
    scale: float


class NotPlainError(Exception):
    """Something that only the model's own forward knows how to compute."""


def read_decoder(model: Any) -> Decoder:
    """The weights of a Llama-like decoder.

    Raises:
        NotPlainError: several adapters are in force at once, there is dropout or a sliding window, or the unit is not
            SwiGLU.
    """
    config, attention = model.config, model.layers[0].self_attn
    windowed = getattr(config, "sliding_window", None) is not None
    if windowed and set(getattr(config, "layer_types", None) or ()) != {"full_attention"}:
        raise NotPlainError
    if config.hidden_act != "silu" or (model.training and config.attention_dropout):
        raise NotPlainError
    layers = tuple(read_layer(layer) for layer in model.layers)
    return Decoder(layers, model.norm.weight, config.rms_norm_eps, attention.head_dim, attention.scaling)


def read_layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    normed = hasattr(attention, "q_norm")
    return Layer(
        norm=layer.input_layernorm.weight,
        qkv=tuple(map(read_matrix, (attention.q_proj, attention.k_proj, attention.v_proj))),
        qk_norms=(attention.q_norm.weight, attention.k_norm.weight) if normed else None,
        o=(read_matrix(attention.o_proj),),
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=(read_matrix(mlp.gate_proj), read_matrix(mlp.up_proj)),
        down=(read_matrix(mlp.down_proj),),
    )


def read_matrix(module: Any) -> Matrix:
    """A linear layer and the adapter in force on it."""
    active: list[str] = []
    layer = module
    if is_lora(module):
        found = active_on(module)
        if found is None or len(found) > 1:
            raise NotPlainError
        active, layer = found, module.base_layer
    low = None
    if active:
        a, b = (factors[active[0]].weight for factors in (module.lora_A, module.lora_B))
        low = LowRank(a, b, module.scaling[active[0]])
    shape = (layer.out_features, layer.in_features)
    if type(layer) is Linear4bit:
        return Matrix(partial(unpacked, layer), shape, layer.bias, low)
    if type(layer) is nn.Linear:
        return Matrix(layer.weight.to, shape, layer.bias, low, layer.weight if layer.weight.requires_grad else None)
    raise NotPlainError


def unpacked(layer: Linear4bit, dtype: torch.dtype) -> Tensor:
    """The weight of a 4-bit layer."""
    weight: Any = layer.weight
    return dequantize_4bit(weight.data, weight.quant_state).to(dtype)
