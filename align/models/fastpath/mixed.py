"""A Llama-like decoder for batches of requests that have different adapters, lengths and slots of the cache.

A step computes chunks of prompts and the next tokens of answers together. The result of a token is bit for bit
independent of the rest of the batch: the shapes of its products are known to agree (`align.models.fastpath.exact`), a
prompt is always split into chunks at the same positions, and the number of columns that attention reads depends on the
request alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from align.models.cpu_memory import reserve_zeros, return_freed_memory_once
from align.models.fastpath.adapter_bank import BLOCKS, UNIT, AdapterBank, BlockedProduct, Site, plan_products
from align.models.fastpath.decoder import (
    Decoder,
    Layer,
    Matrices,
    NotPlainError,
    concatenate_biases,
    read_decoder,
)
from align.models.fastpath.exact import (
    Product,
    are_blocks_independent,
    compute_min_batch,
    count_padded_rows,
    pack_product,
    repeat_to_batch,
)
from align.models.fastpath.llama import is_llama
from align.models.forward import get_decoder, get_route, unwrap_model

CHUNK = 64
"""Number of tokens in a chunk of a prompt."""
COLUMNS = 32
"""Smallest step by which the number of columns that attention reads grows."""


class RequestTokens(NamedTuple):
    """The tokens of one request in a step: the last token of its answer, or a chunk of its prompt.

    Attributes:
        slot: slot of the cache.
        adapter: digest of the adapter; None for the base alone.
        ids: 1 to `CHUNK` token ids.
        start: position of the first token, which is the number of tokens in the slot; a multiple of `CHUNK` for a
            chunk.
    """

    slot: int
    adapter: str | None
    ids: Sequence[int]
    start: int


class AttentionSpan(NamedTuple):
    """A group of tokens for which attention is computed together. It holds the tokens of answers in consecutive slots
    that read the same number of columns, or a chunk of a prompt.

    Attributes:
        rows: the tokens' rows in the order of slots.
        slots: their slots of the cache.
        columns: number of columns that they read.
        bias: 0, and -∞ for columns that a token must not read: [B · G, 1, columns], or [H / G · N, columns] of a chunk.
        chunk: whether it is a chunk.
    """

    rows: slice
    slots: slice
    columns: int
    bias: Tensor
    chunk: bool


class StepPositions(NamedTuple):
    """The slots and columns in the cache of a step's tokens, in the order of their slots, answers before chunks.

    Attributes:
        rows: the tokens' rows in the step [N].
        slots, columns: their positions in the cache [N].
        inverse: index in this order of each row of the step [P].
        stretches: groups of tokens for attention, in this order.
    """

    rows: Tensor
    slots: Tensor
    columns: Tensor
    inverse: Tensor
    stretches: list[AttentionSpan]


class MixedDecoder:
    """A decoder for serving requests with different adapters in one batch, with an adapter bank and a key-value cache.

    Args:
        model: the base with plain weights, which are converted and freed one by one: it cannot be used afterwards.
        slots: maximum requests at once.
        columns: maximum tokens of a prompt and its answer together.
        resident, max_rank: maximum adapters in the bank, and their maximum rank.

    Raises:
        NotPlainError: the model has a forward that this class does not support.
    """

    @torch.no_grad()
    def __init__(self, model: Any, slots: int, columns: int, resident: int, max_rank: int) -> None:
        base = unwrap_model(model)
        decoder = get_decoder(model)
        require_plain_decoder(base, decoder)
        read = read_decoder(decoder)
        self.embedding = decoder.embed_tokens.weight
        self.dtype = self.embedding.dtype
        self.slots = slots
        self.columns = -(-columns // CHUNK) * CHUNK
        self.cos, self.sin = build_rotary_tables(decoder, self.columns)
        self.bank = AdapterBank(list_sites(read.layers), resident, max_rank, self.dtype)
        agree: dict[tuple[int, int], bool] = {}
        prepare = partial(concatenate, dtype=self.dtype, agree=agree)
        layers = []
        for module, layer in zip(decoder.layers, read.layers, strict=True):
            layers.append(layer.convert(prepare))
            for linear in module.modules():
                if isinstance(linear, nn.Linear):  # its weight was converted: free the original
                    linear.weight.data = linear.weight.data.new_empty(0)
        self.decoder: Decoder[Product] = read._replace(layers=layers)  # pyright: ignore
        head = base.get_output_embeddings()
        self.lm_head = pack_product(head.weight, head.bias, agree)
        self.takes_any_rows = all(agree.values())
        self.groups = decoder.config.num_key_value_heads
        self.heads = decoder.config.num_attention_heads
        shape = (slots, self.groups, self.columns, read.head)
        self.keys = [reserve_zeros(shape, torch.float32) for _ in layers]
        self.values = [reserve_zeros(shape, torch.float32) for _ in layers]
        sites = self.bank.sites
        shapes = {(site.inputs, UNIT * len(site.outputs)) for site in sites}
        shapes |= {(UNIT, out) for site in sites for out in site.outputs}
        self.exact = all(are_blocks_independent(inputs, outputs, BLOCKS, self.dtype) for inputs, outputs in shapes)
        return_freed_memory_once()

    @torch.inference_mode()
    def step(self, pieces: Sequence[RequestTokens]) -> list[Tensor]:
        """Compute one step for the tokens of several requests, append their keys and values to the cache, and return
        their last hidden states. There is one tensor [N, D] for each request."""
        tokens = [(id, piece.start + i, piece.adapter) for piece in pieces for i, id in enumerate(piece.ids)]
        order, products = plan_products([adapter for _, _, adapter in tokens], self.bank)
        order += order[:1] * (count_padded_rows(len(order), self.takes_any_rows) - len(order))
        x_PD = self.embedding[torch.tensor([tokens[i][0] for i in order])]
        positions_P = torch.tensor([tokens[i][1] for i in order])
        rotary = self.cos[positions_P], self.sin[positions_P]
        places = self._find_positions(pieces, order)
        for number, layer in enumerate(self.decoder.layers):
            x_PD = self._compute_layer(number, layer, x_PD, rotary, products, places)
        states = self.decoder.normalise(x_PD, self.decoder.norm)[find_rows_of_tokens(order, len(tokens))]
        return list(states.split([len(piece.ids) for piece in pieces]))

    @torch.inference_mode()
    def logits(self, states_ND: Tensor) -> Tensor:
        """Compute the logits [N, V] of hidden states that `step` returned, in fp32."""
        count = len(states_ND)
        filled = torch.cat([states_ND, states_ND[:1].expand(count_padded_rows(count, self.takes_any_rows) - count, -1)])
        return self.lm_head(filled)[:count].float()

    def _find_positions(self, pieces: Sequence[RequestTokens], order: Sequence[int]) -> StepPositions:
        """Find the slot and column in the cache of each token of a step, and group the tokens for attention.

        Args:
            order: index of the token in each row of the step, counted over all pieces.
        """
        first = [0, *accumulate(len(piece.ids) for piece in pieces)]
        by_slot = sorted(range(len(pieces)), key=lambda i: (len(pieces[i].ids) > 1, pieces[i].slot))
        # Group answers in consecutive slots that read the same number of columns; each chunk is a group of its own.
        runs: list[list[RequestTokens]] = []
        for piece in (pieces[i] for i in by_slot):
            last = runs[-1][-1] if runs else None
            if (
                last is not None
                and len(piece.ids) == 1
                and piece.slot == last.slot + 1
                and count_visible_columns(piece, self.columns) == count_visible_columns(last, self.columns)
            ):
                runs[-1].append(piece)
            else:
                runs.append([piece])
        stretches = []
        begin = 0
        for run in runs:
            rows = slice(begin, begin + sum(len(piece.ids) for piece in run))
            begin = rows.stop
            slots = slice(run[0].slot, run[-1].slot + 1)
            if len(run[0].ids) > 1:
                start = run[0].start
                future = torch.full((CHUNK, CHUNK), float("-inf")).triu_(1)[: len(run[0].ids)]
                bias = pad(future, (start, 0)).repeat(self.heads // self.groups, 1)
                stretches.append(AttentionSpan(rows, slots, start + CHUNK, bias, True))
            else:
                columns = count_visible_columns(run[0], self.columns)
                mask = torch.arange(columns) <= torch.tensor([piece.start for piece in run])[:, None]
                bias = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))
                stretches.append(
                    AttentionSpan(rows, slots, columns, bias.repeat_interleave(self.groups, 0)[:, None], False)
                )
        tokens = [token for i in by_slot for token in range(first[i], first[i + 1])]
        place = {token: i for i, token in enumerate(tokens)}
        return StepPositions(
            find_rows_of_tokens(order, len(tokens))[torch.tensor(tokens)],
            torch.tensor([pieces[i].slot for i in by_slot for _ in pieces[i].ids]),
            torch.tensor([pieces[i].start + offset for i in by_slot for offset in range(len(pieces[i].ids))]),
            torch.tensor([place[token] for token in order]),
            stretches,
        )

    def _compute_layer(
        self,
        number: int,
        layer: Layer[Product],
        x_PD: Tensor,
        rotary: tuple[Tensor, Tensor],
        products: list[BlockedProduct],
        places: StepPositions,
    ) -> Tensor:
        def multiply(site: int, x: Tensor) -> Tensor:
            out = layer.matrices[site](x)
            self.bank.add_adapter_outputs(4 * number + site, x, out, products)
            return out

        qkv = multiply(0, self.decoder.normalise(x_PD, layer.norm))
        q, k, v = self.decoder.split_heads(layer, qkv, self.groups, *rotary)
        x_PD = multiply(1, self._attend(number, q, k, v, places)).add_(x_PD)
        gate, up = multiply(2, self.decoder.normalise(x_PD, layer.mlp_norm)).chunk(2, 1)
        return multiply(3, silu(gate).mul_(up)).add_(x_PD)

    def _attend(self, number: int, q_PHD: Tensor, k_PGD: Tensor, v_PGD: Tensor, places: StepPositions) -> Tensor:
        """Cache the keys and values of a step's tokens in one layer, and return each token's attention output [P, H ·
        D]. A token reads the cached tokens of its own slot only."""
        keys = self.keys[number]
        values = self.values[number]
        width = q_PHD.shape[-1]
        q, k, v = (t.index_select(0, places.rows).float() for t in (q_PHD, k_PGD, v_PGD))
        keys[places.slots, :, places.columns] = k
        values[places.slots, :, places.columns] = v
        queries_per_key = self.heads // self.groups
        least = compute_min_batch()
        attended = []
        for stretch in places.stretches:
            queries = q[stretch.rows]
            if stretch.chunk:  # all tokens read the same slot: [G, H / G · N, D]
                queries = queries.view(-1, self.groups, queries_per_key, width).permute(1, 2, 0, 3).flatten(1, 2)
            else:
                queries = queries.view(-1, queries_per_key, width)
            k, v = (cache[stretch.slots, :, : stretch.columns].flatten(0, 1) for cache in (keys, values))
            bias = stretch.bias
            count = len(queries)
            if not stretch.chunk and count < least:
                queries, k, v, bias = (repeat_to_batch(x, least) for x in (queries, k, v, bias))
            scores = torch.baddbmm(bias, queries, k.transpose(1, 2), alpha=self.decoder.scale)
            read = torch.bmm(scores.softmax(-1), v)[:count]
            if stretch.chunk:
                read = read.view(self.groups, queries_per_key, -1, width).permute(2, 0, 1, 3)
            attended.append(read.reshape(-1, self.heads * width))
        return torch.cat(attended).index_select(0, places.inverse).to(self.dtype)

    def clear(self, slot: int, columns: int) -> None:
        """Zero the first columns of a slot in the cache. A value that is not finite would spread even to tokens for
        which it is masked."""
        for cache in (*self.keys, *self.values):
            cache[slot, :, :columns] = 0.0

    def copy_block(self, slot: int, start: int) -> Tensor:
        """Return a copy of the cached keys and values of a prompt chunk that begins at column `start` [layers, 2, G,
        CHUNK, D]."""
        chunk = (slot, slice(None), slice(start, start + CHUNK))
        return torch.stack([torch.stack((k[chunk], v[chunk])) for k, v in zip(self.keys, self.values, strict=True)])

    def write_block(self, slot: int, start: int, block: Tensor) -> None:
        """Write the keys and values that `copy_block` returned to columns of a slot, beginning at `start`."""
        chunk = (slot, slice(None), slice(start, start + CHUNK))
        for k, v, (block_k, block_v) in zip(self.keys, self.values, block, strict=True):
            k[chunk] = block_k
            v[chunk] = block_v


def count_visible_columns(piece: RequestTokens, max_columns: int) -> int:
    """Return the number of cache columns that attention reads for the next token of a request's answer.

    It depends on the request alone, and grows in increasing steps, so that answers of similar lengths read the same
    number and can be computed together.

    Args:
        max_columns: columns of a slot.
    """
    blocks = -(-(piece.start + 1) // COLUMNS)
    step = 1 << max(0, blocks.bit_length() - 3)
    return min(-(-blocks // step) * step * COLUMNS, max_columns)


def find_rows_of_tokens(order: Sequence[int], count: int) -> Tensor:
    """Return for each of `count` tokens its row in a step, int64 [count]; the first one if a token is in several
    rows."""
    row_of = {token: row for row, token in reversed(list(enumerate(order)))}
    return torch.tensor([row_of[token] for token in range(count)])


def require_plain_decoder(base: Any, decoder: Any) -> None:
    """Raise NotPlainError for a model that MixedDecoder does not support: not Llama-like, not on a CPU, or with scaled
    logits."""
    config = base.config.get_text_config()
    scaled = [getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")]
    if not (get_route(base).has_fast_path and is_llama(decoder)) or type(base.get_output_embeddings()) is not nn.Linear:
        raise NotPlainError
    if any(scaled) or decoder.embed_tokens.weight.device.type != "cpu":
        raise NotPlainError


def build_rotary_tables(decoder: Any, columns: int) -> tuple[Tensor, Tensor]:
    """Compute the rotary cosine and sine of each position, both [columns, D].

    Raises:
        NotPlainError: they depend on the length of the row.
    """
    x = decoder.embed_tokens.weight[:1]
    tables, tables_of_chunk = (
        [t[0] for t in decoder.rotary_emb(x, position_ids=torch.arange(length)[None])] for length in (columns, CHUNK)
    )
    if not all(torch.equal(a[:CHUNK], b) for a, b in zip(tables, tables_of_chunk, strict=True)):
        raise NotPlainError
    return tables[0], tables[1]


def list_sites(layers: Sequence[Layer[Matrices]]) -> list[Site]:
    """Return the groups of matrices with a common input, four for each layer, with their modules' names in an adapter's
    file."""
    names = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
    return [
        Site(
            tuple(f"model.layers.{number}.{name}" for name in modules),
            matrices[0].shape[1],
            tuple(matrix.shape[0] for matrix in matrices),
        )
        for number, layer in enumerate(layers)
        for modules, matrices in zip(names, layer.matrices, strict=True)
    ]


def concatenate(matrices: Matrices, dtype: torch.dtype, agree: dict[tuple[int, int], bool]) -> Product:
    """Concatenate matrices that read the same input to one weight and bias, converted to the layout of the matrix
    library."""
    weight = torch.cat([m.weight(dtype) for m in matrices])
    return pack_product(weight, concatenate_biases(matrices, dtype), agree)
