"""The rows that are trained on, as text for whoever looks: decoded from the very tokens, and never rendered again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from align.data.chat import IGNORED, Encoded
from align.data.feedback import Labelled
from align.data.pairs import Pair
from align.data.tokens import special_ids
from align.run.files import write_text
from align.track import line_of

FILE = "trained_on.jsonl"
ROWS = 3
"""Of supervised training, that are shown."""


def write_rows(folder: Path, tokenizer: Any, rows: Sequence[Encoded]) -> None:
    """`trained_on.jsonl` of supervised training: its first rows."""
    write(folder, (shown(tokenizer, f"row {i}", row.input_ids, in_loss(row)) for i, row in enumerate(rows[:ROWS], 1)))


def in_loss(row: Encoded) -> list[bool]:
    """Whether a loss is taken on each token. Nothing predicts the first one."""
    return [i > 0 and label != IGNORED for i, label in enumerate(row.labels)]


def write_pair(folder: Path, tokenizer: Any, pair: Pair, answers: bool) -> None:
    """`trained_on.jsonl` of a stage that learns from pairs: its first one.

    Args:
        answers: the loss reads all tokens of the answers; without, the last one, where the score is.
    """
    sides = ("chosen", pair.chosen_ids, pair.chosen_start), ("rejected", pair.rejected_ids, pair.rejected_start)
    write(
        folder,
        (
            shown(tokenizer, side, ids, [i >= (start if answers else len(ids) - 1) for i in range(len(ids))])
            for side, ids, start in sides
        ),
    )


def write_labelled(folder: Path, tokenizer: Any, rows: Sequence[Labelled]) -> None:
    """`trained_on.jsonl` of a stage that learns from answers with a label, of both kinds: the first one of each."""
    firsts = {row.wanted: row for row in reversed(rows)}
    write(
        folder,
        (
            shown(tokenizer, what, row.ids, [i >= row.start for i in range(len(row.ids))])
            for what, row in (("wanted", firsts[True]), ("unwanted", firsts[False]))
        ),
    )


def write(folder: Path, rows: Iterator[dict[str, Any]]) -> None:
    write_text(folder / FILE, "".join(map(line_of, rows)))


def shown(tokenizer: Any, what: str, ids: Sequence[int], counts: Sequence[bool]) -> dict[str, Any]:
    """One line of the file.

    Args:
        counts: whether the loss reads each token.

    Returns:
        `what` the row is, how many `tokens` it has, on how many of them (`trained`) there is a loss, and its text in
        `parts`: `{text, trained, special}`. A special token is one whoever spelled it out, a text is none.
    """
    special = special_ids(tokenizer)
    kinds = [(counted, i in special) for i, counted in zip(ids, counts, strict=True)]
    parts, before = [], ""
    for (trained, marks), places in groupby(range(len(ids)), kinds.__getitem__):
        first, *others = places
        end = (others or [first])[-1] + 1
        # A tokenizer drops the blank that a text begins with, so each part is what it adds to the text before it.
        text = decoded(tokenizer, ids[:end])
        added = text[len(before) :] if text.startswith(before) else decoded(tokenizer, ids[first:end])
        parts.append({"text": added, "trained": trained, "special": marks})
        before = text
    return {"what": what, "tokens": len(ids), "trained": sum(counts), "parts": parts}


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
