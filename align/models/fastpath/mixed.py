"""A Llama-like decoder for rows of many requests, each with its own adapter, its own length, its own place.

A prompt is read by itself, in chunks; then one token a row goes through the layers with those of all other requests.
What a row becomes does not depend on its neighbours, to the bit: its products have shapes that agree
(`align.models.fastpath.exact`), and its attention sees as many columns as its own length asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from align.models.bank import BLOCKS, UNIT, Bank, Pass, Site, plan_of
from align.models.fastpath.exact import Product, blocks_agree, padded_rows, product
from align.models.fastpath.layers import Matrix, turn
from align.models.fastpath.llama import is_llama
from align.models.fastpath.weights import NotPlainError, read_decoder
from align.models.memory import untouched
from align.models.plain_path import base_model, decoder_of, route_of

CHUNK, COLUMNS = 64, 32
"""Tokens of a prompt that are read at once, and columns that attention sees in one more or less."""


class Layer(NamedTuple):
    """One layer, its weights laid out; a site's number is 4 · layer + 0 … 3, in this order."""

    norm: Tensor
    qkv: Product
    qk_norms: tuple[Tensor, Tensor] | None
    o: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product


class Row(NamedTuple):
    """The next token of a request.

    Attributes:
        slot: of the cache.
        position: of this token, which is the number of tokens before it.
    """

    slot: int
    adapter: str | None
    token: int
    position: int


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

    def _exact(self) -> bool:
        """Whether the machine's products of the bank's shapes agree."""
        most = min(self.slots, 16)
        a = {(s.inputs, UNIT * len(s.outputs)) for s in self.bank.sites}
        b = {(UNIT, out) for s in self.bank.sites for out in s.outputs}
        return all(blocks_agree(i, o, BLOCKS, most, self.dtype) for i, o in (a | b))

    @torch.inference_mode()
    def prefill(self, slot: int, adapter: str | None, ids: Sequence[int], start: int) -> Tensor:
        """Read a chunk of a prompt; its keys and values join the cache.

        Args:
            ids: at most `CHUNK` tokens, the first at position `start`, a multiple of it.

        Returns:
            their last hidden states [N, D].
        """
        count = len(ids)
        x_ND = self.embedding[torch.tensor(ids)]
        cos_ND, sin_ND = self.cos[start : start + count], self.sin[start : start + count]
        rows = slice(slot * self.groups, (slot + 1) * self.groups)
        columns = start + CHUNK
        future = torch.full((CHUNK, CHUNK), float("-inf")).triu_(1)[:count]
        barred = torch.nn.functional.pad(future, (start, 0)).repeat(self.heads // self.groups, 1)
        for number, layer in enumerate(self.layers):
            normed = self._normed(x_ND, layer.norm)
            q, k, v = self._heads(self._alone(number, 0, layer.qkv, normed, adapter), layer, cos_ND, sin_ND)
            self.keys[number][rows, start : start + count] = k.transpose(0, 1).float()
            self.values[number][rows, start : start + count] = v.transpose(0, 1).float()
            asked = q.transpose(0, 1).float().reshape(self.groups, -1, self.head)
            keys, values = self.keys[number][rows, :columns], self.values[number][rows, :columns]
            scores = torch.baddbmm(barred, asked, keys.transpose(1, 2), alpha=self.scale)
            seen = torch.bmm(scores.softmax(-1), values).view(self.heads, count, self.head)
            seen_ND = seen.transpose(0, 1).reshape(count, -1).to(self.dtype)
            x_ND = self._alone(number, 1, layer.o, seen_ND, adapter).add_(x_ND)
            gate_up = self._alone(number, 2, layer.gate_up, self._normed(x_ND, layer.mlp_norm), adapter)
            gate, up = gate_up.chunk(2, 1)
            x_ND = self._alone(number, 3, layer.down, silu(gate).mul_(up), adapter).add_(x_ND)
        return self._normed(x_ND, self.norm)

    def _alone(self, layer: int, site: int, product: Product, x_NI: Tensor, adapter: str | None) -> Tensor:
        out = product(x_NI)
        if adapter is not None:
            self.bank.add_alone(4 * layer + site, x_NI, out, adapter)
        return out

    @torch.inference_mode()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Of states that one `prefill` gave: [N, V], fp32."""
        return self.lm_head(hidden_ND).float()

    @torch.inference_mode()
    def decode(self, rows: Sequence[Row]) -> Tensor:
        """The next token of each request through the layers; logits of the one behind it [B, V], fp32."""
        order, plan = plan_of([row.adapter for row in rows], self.bank)
        rows = [rows[i] for i in order]
        filled = [*rows, *rows[:1] * (padded_rows(len(rows), self.free) - len(rows))]
        x_PD = self.embedding[torch.tensor([row.token for row in filled])]
        at = torch.tensor([row.position for row in filled])
        cos_PD, sin_PD = self.cos[at], self.sin[at]
        runs = runs_of(rows, len(filled), self.groups, self.columns)
        for number, layer in enumerate(self.layers):
            x_PD = self._layer(number, layer, x_PD, cos_PD, sin_PD, plan, runs)
        logits_BV = self.lm_head.beside_others(self._normed(x_PD, self.norm))[: len(rows)].float()
        back = torch.empty(len(rows), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(rows))
        return logits_BV[back]

    def _layer(
        self, number: int, layer: Layer, x_PD: Tensor, cos_PD: Tensor, sin_PD: Tensor, plan: list[Pass], runs: Runs
    ) -> Tensor:
        add, first = self.bank.add_step, 4 * number
        normed = self._normed(x_PD, layer.norm)
        qkv = layer.qkv.beside_others(normed)
        add(first, normed, qkv, plan)
        q, k, v = self._heads(qkv, layer, cos_PD, sin_PD)
        seen_PD = self._attention(number, q, k, v, runs)
        out = layer.o.beside_others(seen_PD)
        add(first + 1, seen_PD, out, plan)
        x_PD = out.add_(x_PD)
        normed = self._normed(x_PD, layer.mlp_norm)
        gate_up = layer.gate_up.beside_others(normed)
        add(first + 2, normed, gate_up, plan)
        gate, up = gate_up.chunk(2, 1)
        inner = silu(gate).mul_(up)
        out = layer.down.beside_others(inner)
        add(first + 3, inner, out, plan)
        return out.add_(x_PD)

    def _attention(self, number: int, q_PHD: Tensor, k_PGD: Tensor, v_PGD: Tensor, runs: Runs) -> Tensor:
        """What each row reads of its own slot, its new token included: [P, H · D]. Rows that fill up read what the
        first one does."""
        keys, values = self.keys[number], self.values[number]
        count, width = len(runs.slots), self.heads * self.head
        for cache, new in ((keys, k_PGD), (values, v_PGD)):
            cache.view(-1, self.head).index_copy_(0, runs.places, new[:count].float().flatten(0, 1))
        asked = q_PHD.reshape(-1, width).index_select(0, runs.by_slot).float().view(count * self.groups, -1, self.head)
        seen = []
        for first, last, columns, barred in runs.stretches:
            rows = (last - first) * self.groups
            slots = slice(runs.slots[first] * self.groups, runs.slots[first] * self.groups + rows)
            k, v = keys[slots, :columns], values[slots, :columns]
            mine = asked[first * self.groups : last * self.groups]
            scores = torch.baddbmm(barred, mine, k.transpose(1, 2), alpha=self.scale)
            seen.append(torch.bmm(scores.softmax(-1), v))
        seen = seen[0] if len(seen) == 1 else torch.cat(seen)
        return seen.view(count, width).index_select(0, runs.back).to(self.dtype)

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

    def block(self, slot: int, start: int) -> Tensor:
        """A copy of the keys and values of a whole chunk: [layers, 2, G, CHUNK, D]."""
        at = (slice(slot * self.groups, (slot + 1) * self.groups), slice(start, start + CHUNK))
        return torch.stack([torch.stack((k[at], v[at])) for k, v in zip(self.keys, self.values, strict=True)])

    def put_block(self, slot: int, start: int, block: Tensor) -> None:
        """What `block` gave, into a slot."""
        at = (slice(slot * self.groups, (slot + 1) * self.groups), slice(start, start + CHUNK))
        for k, v, (kept_k, kept_v) in zip(self.keys, self.values, block, strict=True):
            k[at], v[at] = kept_k, kept_v


class Runs(NamedTuple):
    """Where a step's rows stand in the cache.

    Attributes:
        places: of each row's groups, its new token's place among all columns of all rows [B · G].
        by_slot: the rows by their slots [B].
        back: where each row of the step stands among those, the first one's for rows that fill up [P].
        slots: by slot.
        stretches: first and last row of those that stand side by side and see as many columns, how many, and what is
            barred of them.
    """

    places: Tensor
    by_slot: Tensor
    back: Tensor
    slots: list[int]
    stretches: list[tuple[int, int, int, Tensor]]


def runs_of(rows: Sequence[Row], filled: int, groups: int, most: int) -> Runs:
    """Args: filled: P, the rows of the step; most: columns of a slot."""
    by_slot = sorted(range(len(rows)), key=lambda i: rows[i].slot)
    back = {row: i for i, row in enumerate(by_slot)}
    slots, lengths = [rows[i].slot for i in by_slot], [rows[i].position + 1 for i in by_slot]
    columns = [min(seen_columns(length), most) for length in lengths]
    starts = [i for i in range(len(rows)) if i == 0 or slots[i] != slots[i - 1] + 1 or columns[i] != columns[i - 1]]
    stretches = []
    for first, last in zip(starts, [*starts[1:], len(rows)], strict=True):
        seen = torch.arange(columns[first]) < torch.tensor(lengths[first:last])[:, None]
        barred = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")).repeat_interleave(groups, 0)[:, None]
        stretches.append((first, last, columns[first], barred))
    places = [(row.slot * groups + group) * most + row.position for row in rows for group in range(groups)]
    places_back = [back.get(i, back[0]) for i in range(filled)]
    return Runs(torch.tensor(places), torch.tensor(by_slot), torch.tensor(places_back), slots, stretches)


def seen_columns(length: int) -> int:
    """Columns that a row of so many tokens looks at: its own number, whatever its neighbours', in ever larger steps, so
    that rows of like length look at as many and go together."""
    step = COLUMNS << max(0, (-(-length // COLUMNS)).bit_length() - 3)
    return -(-length // step) * step


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
