"""Where the tokens of a step stand: in the step, in the cache, and what of it each may see."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK, COLUMNS = 64, 32
"""Tokens of a prompt that are read at once, and columns that attention sees in one more or less."""


class Piece(NamedTuple):
    """What a request has in a step: the next token of its answer, or a chunk of its prompt.

    Attributes:
        slot: of the cache.
        adapter: digest; None for the base by itself.
        ids: 1 to `CHUNK` tokens.
        start: position of the first, which is how many are in the slot already; of a chunk, a multiple of `CHUNK`.
    """

    slot: int
    adapter: str | None
    ids: Sequence[int]
    start: int


class Stretch(NamedTuple):
    """Tokens that attention takes together: the next tokens of answers whose slots stand side by side and who see as
    many columns; or a chunk of a prompt.

    Attributes:
        rows: of the tokens by slot.
        slots: of the cache, in rows of its groups.
        columns: how many are seen.
        barred: 0, and -∞ where a token does not see a column: [B · G, 1, columns], or [H / G · N, columns] of a chunk.
        chunk: whether it is one.
    """

    rows: slice
    slots: slice
    columns: int
    barred: Tensor
    chunk: bool


class Places(NamedTuple):
    """Where a step's tokens stand in the cache.

    Attributes:
        by_slot: the rows of the tokens, answers by their slots before chunks [N].
        back: where each row of the step stands among those [P].
        columns: of each token's groups, its place among all columns of all rows of the cache [N · G].
        stretches: in the order of `by_slot`.
    """

    by_slot: Tensor
    back: Tensor
    columns: Tensor
    stretches: list[Stretch]


def places_of(pieces: Sequence[Piece], order: Sequence[int], heads: int, groups: int, most: int) -> Places:
    """Args:
    order: which token stands in which row of the step, tokens counted piece by piece.
    heads, groups: of queries, and of keys and values.
    most: columns of a slot.
    """
    first = [0, *accumulate(len(piece.ids) for piece in pieces)]
    by_slot = sorted(range(len(pieces)), key=lambda i: (len(pieces[i].ids) > 1, pieces[i].slot))
    stretches, begin = [], 0
    for run in runs_of([pieces[i] for i in by_slot], most):
        rows = slice(begin, begin + sum(len(piece.ids) for piece in run))
        begin = rows.stop
        if len(run[0].ids) > 1:
            stretches.append(of_chunk(run[0], rows, groups, heads // groups))
        else:
            stretches.append(of_answers(run, rows, groups, most))
    tokens = [token for i in by_slot for token in range(first[i], first[i + 1])]
    place = {token: i for i, token in enumerate(tokens)}
    columns = [
        (pieces[i].slot * groups + group) * most + pieces[i].start + token - first[i]
        for i in by_slot for token in range(first[i], first[i + 1]) for group in range(groups)
    ]  # fmt: skip
    by_slot_N = inverse(order, len(tokens))[torch.tensor(tokens)]
    return Places(by_slot_N, torch.tensor([place[token] for token in order]), torch.tensor(columns), stretches)


def runs_of(by_slot: Sequence[Piece], most: int) -> list[list[Piece]]:
    """Answers in runs whose slots stand side by side and who see as many columns; each chunk by itself."""
    runs: list[list[Piece]] = []
    for piece in by_slot:
        last = runs[-1][-1] if runs else None
        beside = last is not None and len(piece.ids) == 1 and piece.slot == last.slot + 1
        if beside and last is not None and seen_by(piece, most) == seen_by(last, most):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def of_answers(run: Sequence[Piece], rows: slice, groups: int, most: int) -> Stretch:
    columns = seen_by(run[0], most)
    seen = torch.arange(columns) <= torch.tensor([piece.start for piece in run])[:, None]
    barred = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf")).repeat_interleave(groups, 0)[:, None]
    slots = slice(run[0].slot * groups, (run[-1].slot + 1) * groups)
    return Stretch(rows, slots, columns, barred, False)


def of_chunk(piece: Piece, rows: slice, groups: int, each: int) -> Stretch:
    """Args: each: queries that a key serves."""
    future = torch.full((CHUNK, CHUNK), float("-inf")).triu_(1)[: len(piece.ids)]
    barred = torch.nn.functional.pad(future, (piece.start, 0)).repeat(each, 1)
    slots = slice(piece.slot * groups, (piece.slot + 1) * groups)
    return Stretch(rows, slots, piece.start + CHUNK, barred, True)


def seen_by(piece: Piece, most: int) -> int:
    """Columns that the next token of an answer looks at: the request's own number, whatever its neighbours', in ever
    larger steps, so that answers of like length look at as many and go together."""
    blocks = -(-(piece.start + 1) // COLUMNS)
    step = 1 << max(0, blocks.bit_length() - 3)
    return min(-(-blocks // step) * step * COLUMNS, most)


def inverse(order: Sequence[int], count: int) -> Tensor:
    """The row of each of so many tokens, its first where it stands in several."""
    row_of = {token: row for row, token in reversed(list(enumerate(order)))}
    return torch.tensor([row_of[token] for token in range(count)])
