"""The decoder of a Llama-like model on a CPU.

transformers' modules are made for every device and option. On a CPU, where the time of a small model goes to what
stands between the products, the same weights are read by `layers` and `attention` instead: real tokens alone are
computed, no padding; the backward pass keeps little; one new token a row has a way of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from align.models.fastpath.attention import causal_attention, causal_attention_by_row
from align.models.fastpath.cache import ReservedCache
from align.models.fastpath.decoding import one_token, steady
from align.models.fastpath.layers import Again, Matrix, projected, rms_norm, rotated, swiglu
from align.models.fastpath.packed import PackedIndex
from align.models.fastpath.weights import Decoder, Layer, NotPlainError, read_decoder

FAMILIES = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
UNKNOWN = ("output_attentions", "output_hidden_states", "inputs_embeds")
HARMLESS = ("use_cache", "return_dict", "num_items_in_batch")
"""Options of a call that there is no short way for, and those that change nothing here."""
LONGEST, KEPT = 512, 1 << 30
"""Columns, and bytes kept for a backward pass, beyond which the weights of attention, S² a head, are too many.
Attention then goes row by row and keeps none. A pass that fills a cache has `LONGEST` columns at most."""
RAGGED, RAGGED_COLUMNS = 1.5, 256
"""Attention goes row by row too above this ratio of the rectangle's cells to those of the rows, and of columns."""


def is_llama(module: nn.Module) -> bool:
    return type(module).__name__ in FAMILIES and type(module).__module__.startswith("transformers.")


def forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
    **options: Any,
) -> BaseModelOutputWithPast:
    """As the model's own, to which it hands back what is not plain."""
    if suits(self, input_ids, attention_mask, position_ids, cache, options):
        try:
            with torch.autocast("cpu", enabled=False):  # every dtype is said; autocast would round the scores
                hidden = short(self, input_ids, attention_mask, position_ids, cache)  # pyright: ignore
            return BaseModelOutputWithPast(last_hidden_state=hidden, cache=cache)  # pyright: ignore
        except NotPlainError:
            pass
    return type(self).forward(
        self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache, **options
    )


def suits(
    self: Any, ids: Tensor | None, mask: Tensor | None, positions: Tensor | None, cache: Any, options: dict[str, Any]
) -> bool:
    """Whether a call is one of those that have a short way."""
    if ids is None or ids.device.type != "cpu" or any(options.get(n) for n in UNKNOWN):
        return False
    if options.keys() - {*UNKNOWN, *HARMLESS}:
        return False
    dtype = self.embed_tokens.weight.dtype
    if torch.is_grad_enabled() and dtype == torch.float16:
        return False  # in fp16 the adapter's gradient would be too small for its dtype
    if mask.dim() != 2 if mask is not None else positions is not None:
        return False  # positions without a mask: several rows are packed into one
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
    """Choose the kind of attention by the width of a pass alone, so that no bit of a row depends on the other rows."""
    token = BY_WIDTH.set(True)
    try:
        yield
    finally:
        BY_WIDTH.reset(token)


def suits_by_row(self: Any, places: PackedIndex) -> bool:
    """Return whether attention goes row by row: its weights are too many to keep, or mostly those of padding.

    The answer does not depend on whether there is a gradient: both passes give the same bits.
    """
    columns = places.longest
    if BY_WIDTH.get():
        return columns > LONGEST
    cells = len(places.mask_BW) * columns**2
    if columns > LONGEST or attention_bytes(self, cells) > KEPT:
        return True
    return columns > RAGGED_COLUMNS and cells > RAGGED * sum(length**2 for length in places.lengths())


def attention_bytes(self: Any, cells: int) -> int:
    """Return the bytes that a pass with a gradient keeps of attention: of all layers, or of one where they are computed
    again.

    Args:
        cells: weights of one head in one layer.
    """
    recomputed = getattr(self.layers[0], "gradient_checkpointing", False)
    layers = 1 if recomputed else len(self.layers)
    return cells * self.config.num_attention_heads * layers * self.embed_tokens.weight.dtype.itemsize


def short(
    self: Any, ids_BS: Tensor, mask_BS: Tensor | None, positions_BS: Tensor | None, cache: ReservedCache | None
) -> Tensor:
    """Hidden states [B, S, D], 0 on padding."""
    if cache is not None and cache.decoder is not None and mask_BS is not None and positions_BS is not None:
        return one_token(self, cache.decoder, ids_BS, mask_BS.bool(), positions_BS, cache)
    decoder = read_decoder(self)
    mask_BS = torch.ones_like(ids_BS) if mask_BS is None else mask_BS
    if positions_BS is None:
        positions_BS = torch.arange(ids_BS.shape[1])[None]
    hidden = whole_rows(self, decoder, ids_BS, mask_BS.bool(), positions_BS, cache)
    if cache is not None:
        cache.decoder = steady(decoder, hidden.dtype, len(hidden))
    return hidden


def whole_rows(
    self: Any, decoder: Decoder, ids_BS: Tensor, mask_BS: Tensor, positions_BS: Tensor, cache: ReservedCache | None
) -> Tensor:
    """Rows from their beginning: their N real tokens go through the layers, and back into the rectangle. Rows that
    begin alike, such as the answers to one prompt, share the tokens that they begin with."""
    positions_BS = positions_BS.expand_as(ids_BS)
    # The fused kernel adds a token's attention up in an order that follows from its row's length: rows of different
    # lengths share no tokens where bits count.
    is_steady = BY_WIDTH.get() and ids_BS.shape[1] > LONGEST
    places = PackedIndex.of(mask_BS, *(() if is_steady else (ids_BS, positions_BS)))
    x_ND = self.embed_tokens(places.real(ids_BS))
    at_N = places.real(positions_BS)
    cos_ND, sin_ND = (t[0] for t in self.rotary_emb(x_ND, position_ids=at_N[None]))
    attention = causal_attention_by_row if suits_by_row(self, places) else causal_attention
    for number, (layer, module) in enumerate(zip(decoder.layers, self.layers, strict=True)):

        def block(x_ND: Tensor, layer: Layer = layer, number: int = number) -> Tensor:
            q, k, v = heads(layer, decoder, x_ND, cos_ND, sin_ND)
            if cache is not None:
                keys, values = (places.rectangle(t).transpose(1, 2) for t in (k.float(), v))
                cache.update(keys, values, number)
            seen = attention(q, k, v, places, decoder.scale)
            return mlp(layer, decoder, x_ND + projected(seen.flatten(1), layer.o)[0])

        again = torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False)
        x_ND = checkpoint(block, x_ND, use_reentrant=False) if again else block(x_ND)  # pyright: ignore
    return places.rectangle(rms_norm(x_ND, decoder.norm, decoder.eps))


def heads(layer: Layer, decoder: Decoder, x_ND: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values of N tokens, [N, heads, width] each."""
    flat = projected(*normed(decoder, x_ND, layer.norm, layer.qkv))
    q, k, v = (t.unflatten(1, (-1, decoder.head)) for t in flat)
    if layer.qk_norms is not None:
        q, k = (rms_norm(t, weight, decoder.eps) for t, weight in zip((q, k), layer.qk_norms, strict=True))
    return rotated(q, cos_ND, sin_ND), rotated(k, cos_ND, sin_ND), v


def mlp(layer: Layer, decoder: Decoder, x_ND: Tensor) -> Tensor:
    gate, up = projected(*normed(decoder, x_ND, layer.mlp_norm, layer.gate_up))
    return x_ND + projected(swiglu(gate, up), layer.down, Again(swiglu, (gate.detach(), up.detach())))[0]


def normed(
    decoder: Decoder, x_ND: Tensor, weight_D: Tensor, matrices: tuple[Matrix, ...]
) -> tuple[Tensor, tuple[Matrix, ...], Again]:
    """A norm and the matrices that read it, for `projected`."""
    norm = partial(rms_norm, eps=decoder.eps)
    return norm(x_ND, weight_D), matrices, Again(norm, (x_ND.detach(), weight_D.detach()))
