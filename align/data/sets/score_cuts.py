"""Scores of the rows of a spool, and which rows are kept by them.

Scores are one file beside the parts, eight bytes a row in the order of the rows, to which each piece is added when it
is scored. Killed, the scoring goes on behind what is there. A row that nobody can score has none (nan).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from align.core.types import Record
from align.data.sets.spool import Rows

FILE = "scores.f64"
PIECE = 512
"""Rows that are handed to the scorer at once. Which rows go through a model together never depends on how the spool was
written, so that their scores do not either."""
BINS = 40
OUTER = 0.002
"""The share of all scores that lies beyond the bins of a histogram, on either side: one row may be far off."""
Score = Callable[[Sequence[Record]], ndarray]
"""One number a record, float64 (N); nan for none."""


def scored(rows: Rows, score: Score, done: Callable[[int], object] = lambda count: None) -> ndarray:
    """Return the score of each row, float64 (N), from the spool's file as far as it goes.

    Args:
        score: gets some `PIECE` rows, each with its place as its id.
        done: gets how many rows are scored.
    """
    begun = scored_before(rows)
    with file_of(rows).open("r+b" if begun else "wb") as file:
        file.truncate(8 * begun)  # without what a kill left half written
        file.seek(8 * begun)
        for first in range(begun, rows.count, PIECE):
            numbers = np.arange(first, min(first + PIECE, rows.count))
            file.write(np.asarray(score(read(rows, numbers)), "<f8").tobytes())
            file.flush()
            os.fsync(file.fileno())
            done(int(numbers[-1]) + 1)
    return np.fromfile(file_of(rows), "<f8", rows.count)


def read(rows: Rows, numbers: ndarray) -> list[Record]:
    return [record for _, record in rows.records(numbers)]


def scored_before(rows: Rows) -> int:
    """Return how many rows were scored before a kill, in whole pieces; all of them if that was done."""
    size = file_of(rows).stat().st_size // 8 if file_of(rows).is_file() else 0
    return size if size == rows.count else size // PIECE * PIECE


def file_of(rows: Rows) -> Path:
    return rows.parts[0][0].with_name(FILE)


def outside(
    scores: ndarray,
    ids: ndarray,
    source: ndarray,
    keep: Sequence[float],
    within: str,
    least: float | None = None,
    most: float | None = None,
) -> ndarray:
    """Return which rows are left out by their scores, bool (N).

    Of n rows in the order of their scores, those from place round(n · keep[0]) up to round(n · keep[1]) are kept. Rows
    of one score are in the order of their content ids, copies in that of the rows. Rows without a score are in no order
    and stay.

    Args:
        ids: the first 64 bits of each row's content id, uint64 (N).
        source: the number of each row's source, int (N).
        keep: two quantiles.
        within: `source` orders the rows of each source on their own, `all` all of them.
        least, most: the lowest and the highest score that stays.
    """
    there = ~np.isnan(scores)
    out = there & ((scores < (-np.inf if least is None else least)) | (scores > (np.inf if most is None else most)))
    groups = [source == number for number in np.unique(source)] if within == "source" else [np.ones_like(there)]
    for mine in groups:
        numbers = np.flatnonzero(there & mine)
        order = numbers[np.lexsort((numbers, ids[numbers], scores[numbers]))]
        first, end = (round(share * len(order)) for share in keep)
        out[order[:first]] = out[order[end:]] = True
    return out


def account_of_scores(scores: ndarray, out: ndarray, source: ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Return what `data.json` says of the scores of each source: how many rows have one, their quantiles, where the
    cuts are, and a histogram of the kept and of the dropped. The outer bins hold what lies beyond them too.

    Args:
        out: which rows are left out by them, bool (N).
    """
    there = ~np.isnan(scores)
    said: dict[str, Any] = {"edges": [], "sources": {}}
    if there.any():
        low, high = (float(edge) for edge in np.quantile(scores[there], [OUTER, 1 - OUTER]))
        said["edges"] = np.linspace(low, high if high > low else low + 1, BINS + 1).tolist()

    def count_binned(values: ndarray) -> list[int]:
        edges = said["edges"]
        return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()

    for number, name in enumerate(names):
        mine = source == number
        found = scores[mine & there]
        kept = scores[mine & there & ~out]
        said["sources"][name] = {"rows": len(found), "unscored": int((mine & ~there).sum())}
        if len(found):
            said["sources"][name] |= {
                "dropped": len(found) - len(kept),
                "quantiles": np.quantile(found, [0, 0.05, 0.5, 0.95, 1]).tolist(),
                "kept_from": float(kept.min()) if len(kept) else None,
                "kept_to": float(kept.max()) if len(kept) else None,
                "kept": count_binned(kept),
                "left_out": count_binned(scores[mine & there & out]),
            }
    return said


def examples(scores: ndarray, out: ndarray, each: int) -> Iterator[tuple[str, ndarray]]:
    """Yield rows of one source that show what its scores mean: the lowest, those around the cuts, and the highest.

    Args:
        scores, out: of its rows; see `outside`.
        each: rows at a place.

    Yields:
        what they are, and their places in `scores`. What lies at an end is not given at a cut again.
    """
    order = np.argsort(scores, kind="stable")
    order = order[~np.isnan(scores[order])]
    kept = np.flatnonzero(~out[order])
    yield "lowest", order[:each]
    if len(kept) and kept[0] > 0:
        yield "dropped below the cut", order[max(each, kept[0] - each) : kept[0]]
        yield "kept above the cut", order[kept[:each]]
    if len(kept) and kept[-1] < len(order) - 1:
        yield "kept below the cut", order[kept[-each:]]
        yield "dropped above the cut", order[kept[-1] + 1 : min(kept[-1] + 1, len(order) - 2 * each) + each]
    yield "highest", order[-each:]
