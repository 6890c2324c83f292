"""A Llama-like decoder for tokens of many requests, each with its own adapter, its own length, its own place.

Chunks of prompts and the next tokens of answers go through the layers side by side. What a token becomes does not
depend on its neighbours, to the bit: its products have shapes that agree (`align.models.fastpath.exact`), a prompt is
cut in chunks at the same places always, and attention sees as many columns as its own request asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from align.models.bank import BLOCKS, UNIT, Bank, Pass, Site, plan_of
from align.models.fastpath.exact import Product, at_least, blocks_agree, least_batch, padded_rows, product
from align.models.fastpath.layers import Matrix, turn
from align.models.fastpath.llama import is_llama
from align.models.fastpath.places import CHUNK, Piece, Places, inverse, places_of
from align.models.fastpath.weights import NotPlainError, read_decoder
from align.models.memory import hand_back_freed_memory, untouched
from align.models.plain_path import base_model, decoder_of, route_of


class Layer(NamedTuple):
    """One layer, its weights laid out; a site's number is 4 · layer + 0 … 3, in this order."""

    norm: Tensor
    qkv: Product
    qk_norms: tuple[Tensor, Tensor] | None
    o: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product


class MixedDecoder:
    """The base, laid out for serving, with a bank of adapters and a cache of `slots` rows.

    Args:
        model: the base with plain weights; it is consumed, for its weights are laid out anew and given up one by one.
        slots: requests at once.
        columns: tokens of a prompt and its answer together, at most.
        resident, max_rank: of the bank.

    Raises:
        NotPlainError: the model is none that this computes.
    """

    def __init__(self, model: Any, slots: int, columns: int, resident: int, max_rank: int) -> None:
        base, decoder = base_model(model), decoder_of(model)
        refuse_others(base, decoder)
        read = read_decoder(decoder)
        self.eps, self.head, self.scale = read.eps, read.head, read.scale
        self.embedding, self.norm = decoder.embed_tokens.weight.detach(), read.norm.detach()
        self.dtype, self.slots, self.columns = self.embedding.dtype, slots, -(-columns // CHUNK) * CHUNK
        self.cos, self.sin = angles(decoder, self.columns)
        self.bank = Bank(sites_of(decoder, read.layers), resident, max_rank, self.dtype)
        known: dict[tuple[int, int], bool] = {}
        self.layers = []
        for module, layer in zip(decoder.layers, read.layers, strict=True):
            groups = [side_by_side(ms, self.dtype, known) for ms in (layer.qkv, layer.o, layer.gate_up, layer.down)]
            norms = layer.qk_norms and (layer.qk_norms[0].detach(), layer.qk_norms[1].detach())
            qkv, o, gate_up, down = groups
            self.layers.append(Layer(layer.norm.detach(), qkv, norms, o, layer.mlp_norm.detach(), gate_up, down))
            give_up(module)
        head = base.get_output_embeddings()
        self.lm_head = product(head.weight.detach(), head.bias, known)
        self.free = all(known.values())
        self.groups = decoder.config.num_key_value_heads
        self.heads = decoder.config.num_attention_heads
        shape = (slots * self.groups, self.columns, self.head)
        self.keys = [untouched(shape, torch.float32) for _ in self.layers]
        self.values = [untouched(shape, torch.float32) for _ in self.layers]
        self.exact = self._exact()
        hand_back_freed_memory()

    def _exact(self) -> bool:
        """Whether the machine's products of the bank's shapes agree."""
        a = {(s.inputs, UNIT * len(s.outputs)) for s in self.bank.sites}
        b = {(UNIT, out) for s in self.bank.sites for out in s.outputs}
        return all(blocks_agree(i, o, BLOCKS, self.dtype) for i, o in (a | b))

    @torch.inference_mode()
    def step(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Pieces of different requests through the layers; their keys and values join the cache. Returns the last
        hidden states of each piece [N, D]."""
        tokens = [(id, piece.start + i, piece.adapter) for piece in pieces for i, id in enumerate(piece.ids)]
        order, plan = plan_of([adapter for _, _, adapter in tokens], self.bank)
        order += order[:1] * (padded_rows(len(order), self.free) - len(order))
        x_PD = self.embedding[torch.tensor([tokens[i][0] for i in order])]
        at = torch.tensor([tokens[i][1] for i in order])
        cos_PD, sin_PD = self.cos[at], self.sin[at]
        places = places_of(pieces, order, self.heads, self.groups, self.columns)
        for number, layer in enumerate(self.layers):
            x_PD = self._layer(number, layer, x_PD, cos_PD, sin_PD, plan, places)
        states = self._normed(x_PD, self.norm)[inverse(order, len(tokens))]
        return list(states.split([len(piece.ids) for piece in pieces]))

    @torch.inference_mode()
    def logits(self, states_ND: Tensor) -> Tensor:
        """Of states that steps gave: [N, V], fp32."""
        count = len(states_ND)
        filled = torch.cat([states_ND, states_ND[:1].expand(padded_rows(count, self.free) - count, -1)])
        return self.lm_head(filled)[:count].float()

    def _layer(
        self, number: int, layer: Layer, x_PD: Tensor, cos_PD: Tensor, sin_PD: Tensor, plan: list[Pass], places: Places
    ) -> Tensor:
        add, first = self.bank.add_step, 4 * number
        normed = self._normed(x_PD, layer.norm)
        qkv = layer.qkv(normed)
        add(first, normed, qkv, plan)
        q, k, v = self._heads(qkv, layer, cos_PD, sin_PD)
        seen_PD = self._attention(number, q, k, v, places)
        out = layer.o(seen_PD)
        add(first + 1, seen_PD, out, plan)
        x_PD = out.add_(x_PD)
        normed = self._normed(x_PD, layer.mlp_norm)
        gate_up = layer.gate_up(normed)
        add(first + 2, normed, gate_up, plan)
        gate, up = gate_up.chunk(2, 1)
        inner = silu(gate).mul_(up)
        out = layer.down(inner)
        add(first + 3, inner, out, plan)
        return out.add_(x_PD)

    def _attention(self, number: int, q_PHD: Tensor, k_PGD: Tensor, v_PGD: Tensor, places: Places) -> Tensor:
        """What each token reads of its own slot, itself included: [P, H · D]."""
        keys, values = self.keys[number], self.values[number]
        q, k, v = (t.flatten(1).index_select(0, places.by_slot).float() for t in (q_PHD, k_PGD, v_PGD))
        for cache, new in ((keys, k), (values, v)):
            cache.view(-1, self.head).index_copy_(0, places.columns, new.view(-1, self.head))
        each, seen = self.heads // self.groups, []  # each key serves so many queries
        least = least_batch()
        for stretch in places.stretches:
            asked, slots = q[stretch.rows], stretch.slots
            if stretch.chunk:  # all tokens read one slot: [G, H / G · N, D]
                asked = asked.view(-1, self.groups, each, self.head).permute(1, 2, 0, 3).flatten(1, 2)
            else:
                asked = asked.view(-1, each, self.head)
            k, v = keys[slots, : stretch.columns], values[slots, : stretch.columns]
            count, barred = len(asked), stretch.barred
            if not stretch.chunk and count < least:
                asked, k, v, barred = (at_least(x, least) for x in (asked, k, v, barred))
            scores = torch.baddbmm(barred, asked, k.transpose(1, 2), alpha=self.scale)
            read = torch.bmm(scores.softmax(-1), v)[:count]
            if stretch.chunk:
                read = read.view(self.groups, each, -1, self.head).permute(2, 0, 1, 3)
            seen.append(read.reshape(-1, self.heads * self.head))
        seen = seen[0] if len(seen) == 1 else torch.cat(seen)
        return seen.index_select(0, places.back).to(self.dtype)

    def _heads(self, qkv: Tensor, layer: Layer, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values [N, heads, D], turned by their positions."""
        heads, groups = qkv.unflatten(1, (-1, self.head)), self.groups
        qk, v = heads[:, :-groups], heads[:, -groups:]
        if layer.qk_norms is not None:
            parts = zip((qk[:, :-groups], qk[:, -groups:]), layer.qk_norms, strict=True)
            qk = torch.cat([self._normed(part, weight) for part, weight in parts], 1)
        qk = turn(qk, cos, sin, 1.0)
        return qk[:, :-groups], qk[:, -groups:], v

    def _normed(self, x: Tensor, weight_D: Tensor) -> Tensor:
        return rms_norm(x, weight_D.shape, weight_D, self.eps)

    def clear(self, slot: int, columns: int) -> None:
        """Forget a slot's first columns: what is no number there would spread, though nobody is to see it."""
        for cache in (*self.keys, *self.values):
            cache[slot * self.groups : (slot + 1) * self.groups, :columns] = 0.0

    def block(self, slot: int, start: int) -> Tensor:
        """A copy of the keys and values of a whole chunk: [layers, 2, G, CHUNK, D]."""
        at = (slice(slot * self.groups, (slot + 1) * self.groups), slice(start, start + CHUNK))
        return torch.stack([torch.stack((k[at], v[at])) for k, v in zip(self.keys, self.values, strict=True)])

    def put_block(self, slot: int, start: int, block: Tensor) -> None:
        """What `block` gave, into a slot."""
        at = (slice(slot * self.groups, (slot + 1) * self.groups), slice(start, start + CHUNK))
        for k, v, (kept_k, kept_v) in zip(self.keys, self.values, block, strict=True):
            k[at], v[at] = kept_k, kept_v


def refuse_others(base: Any, decoder: Any) -> None:
    """Raises: NotPlainError: see `MixedDecoder`."""
    config, head = base.config.get_text_config(), base.get_output_embeddings()
    scaled = [getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")]
    if not (route_of(base).fast and is_llama(decoder)) or type(head) is not nn.Linear or any(scaled):
        raise NotPlainError
    if decoder.embed_tokens.weight.device.type != "cpu":
        raise NotPlainError


def angles(decoder: Any, columns: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position [columns, D].

    Raises:
        NotPlainError: those of a position depend on how long a row is.
    """
    x = decoder.embed_tokens.weight[:1]
    whole = [t[0] for t in decoder.rotary_emb(x, position_ids=torch.arange(columns)[None])]
    short = [t[0] for t in decoder.rotary_emb(x, position_ids=torch.arange(CHUNK)[None])]
    if not all(torch.equal(a[:CHUNK], b) for a, b in zip(whole, short, strict=True)):
        raise NotPlainError
    return whole[0], whole[1]


def sites_of(decoder: Any, layers: Sequence[Any]) -> list[Site]:
    """The sites of all layers, four each, named as an adapter's file names them."""
    names = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",),
    )  # fmt: skip
    found = []
    for number, layer in enumerate(layers):
        for mine, matrices in zip(names, (layer.qkv, layer.o, layer.gate_up, layer.down), strict=True):
            modules = tuple(f"model.layers.{number}.{name}" for name in mine)
            found.append(Site(modules, matrices[0].shape[1], tuple(m.shape[0] for m in matrices)))
    return found


def side_by_side(matrices: Sequence[Matrix], dtype: torch.dtype, known: dict[tuple[int, int], bool]) -> Product:
    """Matrices that read the same input, as one."""
    weight = torch.cat([m.weight(dtype).detach() for m in matrices])
    if all(m.bias is None for m in matrices):
        return product(weight, None, known)
    biases = [torch.zeros(m.shape[0], dtype=dtype) if m.bias is None else m.bias.detach() for m in matrices]
    return product(weight, torch.cat(biases), known)


def give_up(layer: nn.Module) -> None:
    """Let go of a layer's matrices: they are laid out elsewhere by now."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.new_empty(0)
