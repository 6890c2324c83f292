"""Scores of the rows of a data set under construction, and selection of rows by score.

Scores are in one file beside the parts, eight bytes for each row in order. Each piece is appended when it is scored, so
a run that was killed resumes after the last whole piece. The score of a row that cannot be scored is nan.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from align.core.types import Record
from align.data.sets.spool import SpoolRows

FILE = "scores.f64"
PIECE = 512
"""Maximum number of rows that are passed to the scorer at once. They do not depend on the batches of the spool, because
scores may depend on the rows that a model processes together."""
BINS = 40
OUTLIER_SHARE = 0.002
"""Share of all scores that lie below a histogram's first edge, and as many above its last one, because of outliers."""
ScoreRecords = Callable[[Sequence[Record]], ndarray]
"""A function that returns the score of each record, float64 (N); nan for none."""


def score_spool(
    rows: SpoolRows, score: ScoreRecords, report_progress: Callable[[int], object] = lambda count: None
) -> ndarray:
    """Score the rows that the score file lacks, append their scores to it, and return the scores of all rows, float64
    (N).

    Args:
        score: scores at most `PIECE` records.
        report_progress: called with the number of rows scored so far.
    """
    first_unscored = count_scored(rows)
    with get_score_path(rows).open("r+b" if first_unscored else "wb") as file:
        file.truncate(8 * first_unscored)  # cuts off the piece that a killed run was writing
        file.seek(8 * first_unscored)
        for first in range(first_unscored, rows.count, PIECE):
            numbers = np.arange(first, min(first + PIECE, rows.count))
            file.write(np.asarray(score(load_records(rows, numbers)), "<f8").tobytes())
            file.flush()
            os.fsync(file.fileno())
            report_progress(int(numbers[-1]) + 1)
    return np.fromfile(get_score_path(rows), "<f8", rows.count)


def load_records(rows: SpoolRows, numbers: ndarray) -> list[Record]:
    return [record for _, record in rows.load_records(numbers)]


def count_scored(rows: SpoolRows) -> int:
    """Return the number of rows that an earlier attempt scored: whole pieces, or all rows if it finished."""
    size = get_score_path(rows).stat().st_size // 8 if get_score_path(rows).is_file() else 0
    return size if size == rows.count else size // PIECE * PIECE


def get_score_path(rows: SpoolRows) -> Path:
    return rows.parts[0][0].with_name(FILE)


def mask_outside_cuts(
    scores: ndarray,
    ids: ndarray,
    source: ndarray,
    kept_quantiles: Sequence[float],
    within: str,
    min_score: float | None = None,
    max_score: float | None = None,
) -> ndarray:
    """Return a mask of the rows to drop because their score is outside of the kept quantiles or limits, bool (N).

    Of n rows in ascending order of score, the ones from place round(n · kept_quantiles[0]) up to
    round(n · kept_quantiles[1]) are kept. Ties are broken by content id, and then by row. Rows without a score are
    kept.

    Args:
        scores: score of each row, float64 (N); nan for none.
        ids: first 64 bits of each row's content id, uint64 (N).
        source: number of each row's source, int (N).
        kept_quantiles: lower and upper quantile.
        within: `source` applies the quantiles to each source on its own, `all` to all rows together.
        min_score, max_score: lowest and highest score that is kept; None for no limit.
    """
    has_score = ~np.isnan(scores)
    out = has_score & (
        (scores < (-np.inf if min_score is None else min_score))
        | (scores > (np.inf if max_score is None else max_score))
    )
    groups = [source == number for number in np.unique(source)] if within == "source" else [np.ones_like(has_score)]
    for in_group in groups:
        numbers = np.flatnonzero(has_score & in_group)
        order = numbers[np.lexsort((numbers, ids[numbers], scores[numbers]))]
        first, end = (round(share * len(order)) for share in kept_quantiles)
        out[order[:first]] = out[order[end:]] = True
    return out


def summarize_scores(scores: ndarray, is_dropped: ndarray, source: ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Return a summary of each source's scores for `data.json`: numbers of rows, quantiles, cuts, and histograms of
    kept and of dropped rows. The outer bins include outliers.

    Args:
        scores, source: see `mask_outside_cuts`.
        is_dropped: whether each row is dropped because of its score, bool (N).
        names: names of the sources.
    """
    has_score = ~np.isnan(scores)
    summary: dict[str, Any] = {"edges": [], "sources": {}}
    if has_score.any():
        low, high = (float(edge) for edge in np.quantile(scores[has_score], [OUTLIER_SHARE, 1 - OUTLIER_SHARE]))
        summary["edges"] = np.linspace(low, high if high > low else low + 1, BINS + 1).tolist()

    def count_binned(values: ndarray) -> list[int]:
        edges = summary["edges"]
        return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()

    for number, name in enumerate(names):
        in_source = source == number
        source_scores = scores[in_source & has_score]
        kept_scores = scores[in_source & has_score & ~is_dropped]
        summary["sources"][name] = {"rows": len(source_scores), "unscored": int((in_source & ~has_score).sum())}
        if len(source_scores):
            summary["sources"][name] |= {
                "dropped": len(source_scores) - len(kept_scores),
                "quantiles": np.quantile(source_scores, [0, 0.05, 0.5, 0.95, 1]).tolist(),
                "kept_from": float(kept_scores.min()) if len(kept_scores) else None,
                "kept_to": float(kept_scores.max()) if len(kept_scores) else None,
                "kept": count_binned(kept_scores),
                "left_out": count_binned(scores[in_source & has_score & is_dropped]),
            }
    return summary


def iter_score_examples(scores: ndarray, is_dropped: ndarray, max_per_kind: int) -> Iterator[tuple[str, ndarray]]:
    """Yield examples of one source's rows by kind: with the lowest scores, around the cuts, and with the highest
    scores.

    Args:
        scores, is_dropped: scores of the source's rows, and whether each is dropped.
        max_per_kind: maximum number of examples of each kind.

    Yields:
        The kind of the examples, and their places in `scores`. Rows at an end are not repeated at a cut.
    """
    order = np.argsort(scores, kind="stable")
    order = order[~np.isnan(scores[order])]
    kept = np.flatnonzero(~is_dropped[order])
    yield "lowest", order[:max_per_kind]
    if len(kept) and kept[0] > 0:
        yield "dropped below the cut", order[max(max_per_kind, kept[0] - max_per_kind) : kept[0]]
        yield "kept above the cut", order[kept[:max_per_kind]]
    if len(kept) and kept[-1] < len(order) - 1:
        yield "kept below the cut", order[kept[-max_per_kind:]]
        yield (
            "dropped above the cut",
            order[kept[-1] + 1 : min(kept[-1] + 1, len(order) - 2 * max_per_kind) + max_per_kind],
        )
    yield "highest", order[-max_per_kind:]
