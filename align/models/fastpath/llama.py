"""The forward of a Llama-like decoder on a CPU.

transformers' modules support every device and option. On a CPU a small model spends its time between the matrix
products, so that the same weights go through `layers` instead: padding is not computed, little is kept for the backward
pass, and decoding one new token for each row has its own forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from align.models.fastpath.decoder import (
    Decoder,
    Layer,
    Matrices,
    NotPlainError,
    ReservedCache,
    decode_one_token,
    read_decoder,
    stack_decoder,
)
from align.models.fastpath.layers import (
    Recompute,
    apply_matrices,
    causal_attention,
    causal_attention_by_row,
    rms_norm,
    rotate,
    swiglu,
)
from align.models.fastpath.packed import PackedIndex

FAMILIES = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
UNKNOWN = ("output_attentions", "output_hidden_states", "inputs_embeds")
HARMLESS = ("use_cache", "return_dict", "num_items_in_batch")
"""Arguments that only the model's own forward supports (`UNKNOWN`), and arguments that change nothing here
(`HARMLESS`)."""
LONGEST = 512
KEPT = 1 << 30
"""Limits of columns, and of bytes kept for the backward pass, above which the attention weights, S² for each head, are
too many. Attention is then computed row by row, and keeps none. A prefill has at most `LONGEST` columns."""
RAGGED = 1.5
RAGGED_COLUMNS = 256
"""Ratio of padded to real attention weights, and width, above which attention is also computed row by row."""


def is_llama(module: nn.Module) -> bool:
    return type(module).__name__ in FAMILIES and type(module).__module__.startswith("transformers.")


def llama_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
    **options: Any,
) -> BaseModelOutputWithPast:
    """Compute the decoder's hidden states by the fast path if it supports the call, and by the model's own forward
    otherwise."""
    if is_supported_call(self, input_ids, attention_mask, position_ids, cache, options):
        try:
            with torch.autocast("cpu", enabled=False):  # autocast would round the attention scores
                hidden = compute_states(self, input_ids, attention_mask, position_ids, cache)  # pyright: ignore
            return BaseModelOutputWithPast(last_hidden_state=hidden, cache=cache)  # pyright: ignore
        except NotPlainError:
            pass
    return type(self).forward(
        self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache, **options
    )


def is_supported_call(
    self: Any, ids: Tensor | None, mask: Tensor | None, positions: Tensor | None, cache: Any, options: dict[str, Any]
) -> bool:
    """Return whether the fast path supports a call of the decoder with these inputs, cache and options."""
    if ids is None or ids.device.type != "cpu" or any(options.get(n) for n in UNKNOWN):
        return False
    if options.keys() - {*UNKNOWN, *HARMLESS}:
        return False
    dtype = self.embed_tokens.weight.dtype
    if torch.is_grad_enabled() and dtype == torch.float16:
        return False  # in fp16 the adapter's gradient would underflow
    if mask.dim() != 2 if mask is not None else positions is not None:
        return False  # positions without a mask mean packed rows
    if torch.is_autocast_enabled("cpu") and dtype == torch.float32:
        return False
    if cache is None:
        return not options.get("use_cache")
    if not isinstance(cache, ReservedCache) or torch.is_grad_enabled() or mask is None or positions is None:
        return False
    if ids.shape[1] > LONGEST:
        return False
    return cache.get_seq_length() == 0 or (cache.decoder is not None and ids.shape[1] == 1)


BY_WIDTH: ContextVar[bool] = ContextVar("BY_WIDTH", default=False)


@contextmanager
def attention_by_width() -> Iterator[None]:
    """Let the batch's width alone decide the kind of attention in the `with` block, so that a row's bits are
    independent of other rows."""
    token = BY_WIDTH.set(True)
    try:
        yield
    finally:
        BY_WIDTH.reset(token)


def uses_attention_by_row(self: Any, index: PackedIndex) -> bool:
    """Return whether attention must be computed row by row, because its weights are too many to keep or are mostly
    padding.

    The result does not depend on whether gradients are needed, so that passes with and without agree to the bit.
    """
    columns = index.longest
    if columns > LONGEST or BY_WIDTH.get():
        return columns > LONGEST
    weights = len(index.mask_BW) * columns**2
    # A pass with gradients keeps the attention weights of all layers, or of one with gradient checkpointing.
    layers = 1 if getattr(self.layers[0], "gradient_checkpointing", False) else len(self.layers)
    kept = weights * self.config.num_attention_heads * layers * self.embed_tokens.weight.dtype.itemsize
    if kept > KEPT:
        return True
    return columns > RAGGED_COLUMNS and weights > RAGGED * sum(length**2 for length in index.lengths())


def compute_states(
    self: Any, ids_BS: Tensor, mask_BS: Tensor | None, positions_BS: Tensor | None, cache: ReservedCache | None
) -> Tensor:
    """Compute hidden states [B, S, D], 0 at padding, by one decoding step if the cache is filled, else by a full
    forward."""
    if cache is not None and cache.decoder is not None and mask_BS is not None and positions_BS is not None:
        return decode_one_token(self, cache.decoder, ids_BS, mask_BS.bool(), positions_BS, cache)
    decoder = read_decoder(self)
    mask_BS = torch.ones_like(ids_BS) if mask_BS is None else mask_BS
    if positions_BS is None:
        positions_BS = torch.arange(ids_BS.shape[1])[None]
    hidden = compute_rows(self, decoder, ids_BS, mask_BS.bool(), positions_BS.expand_as(ids_BS), cache)
    if cache is not None:
        cache.decoder = stack_decoder(decoder, hidden.dtype, len(hidden))
    return hidden


def compute_rows(
    self: Any,
    decoder: Decoder[Matrices],
    ids_BS: Tensor,
    mask_BS: Tensor,
    positions_BS: Tensor,
    cache: ReservedCache | None,
) -> Tensor:
    """Compute the hidden states of whole rows [B, S, D], with only the real tokens going through the layers.

    Rows with a common prefix, such as the answers to one prompt, share its tokens.
    """
    # The fused kernel's order of addition depends on the row's length: rows of different lengths must not share tokens
    # if their bits matter.
    shares = not (BY_WIDTH.get() and ids_BS.shape[1] > LONGEST)
    index = PackedIndex.build(mask_BS, *((ids_BS, positions_BS) if shares else ()))
    x_ND = self.embed_tokens(index.real(ids_BS))
    cos_ND, sin_ND = (t[0] for t in self.rotary_emb(x_ND, position_ids=index.real(positions_BS)[None]))
    attention = causal_attention_by_row if uses_attention_by_row(self, index) else causal_attention

    def norm(x_ND: Tensor, weight_D: Tensor) -> Tensor:
        return rms_norm(x_ND, weight_D, decoder.eps)

    def apply_after_norm(x_ND: Tensor, weight_D: Tensor, matrices: Matrices) -> tuple[Tensor, ...]:
        return apply_matrices(norm(x_ND, weight_D), matrices, Recompute(norm, (x_ND.detach(), weight_D.detach())))

    def compute_layer(x_ND: Tensor, layer: Layer[Matrices], number: int) -> Tensor:
        qkv = apply_after_norm(x_ND, layer.norm, layer.qkv)
        q, k, v = (t.unflatten(1, (-1, decoder.head)) for t in qkv)
        if layer.qk_norms is not None:
            q, k = (norm(t, weight) for t, weight in zip((q, k), layer.qk_norms, strict=True))
        q, k = (rotate(t, cos_ND, sin_ND) for t in (q, k))
        if cache is not None:
            keys, values = (index.rectangle(t).transpose(1, 2) for t in (k.float(), v))
            cache.update(keys, values, number)
        attended = attention(q, k, v, index, decoder.scale)
        x_ND = x_ND + apply_matrices(attended.flatten(1), layer.o)[0]
        gate, up = apply_after_norm(x_ND, layer.mlp_norm, layer.gate_up)
        recompute = Recompute(swiglu, (gate.detach(), up.detach()))
        return x_ND + apply_matrices(swiglu(gate, up), layer.down, recompute)[0]

    for number, (layer, module) in enumerate(zip(decoder.layers, self.layers, strict=True)):
        if torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False):
            x_ND = checkpoint(compute_layer, x_ND, layer, number, use_reentrant=False)  # pyright: ignore
        else:
            x_ND = compute_layer(x_ND, layer, number)
    return index.rectangle(norm(x_ND, decoder.norm))
