"""Rows that give away what is measured: those that evaluation rows stand in, ask the same, or nearly are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa

from align.data.dedup.contamination import RULES, Index, hits
from align.data.dedup.shingles import normalised_digests
from align.data.sets.columns import CONTENT, texts_of
from align.data.sets.evaluations import Texts
from align.data.sets.spool import Rows

ASKED = "question"
"""A rule of ours beside those of `align.data.dedup.contamination`: the row asks what an evaluation row asks."""
COMMON = 10
"""Rows that may share a run of 13 words with a row of the test split: what more of them share is a common phrase or
boilerplate (Brown et al. 2020, arXiv 2005.14165, appendix C). An evaluation set from elsewhere shares no phrases, and
the row of it that leaked most often stands in many rows."""
SLICE = 48 << 20
"""Bytes of text to measure on that rows to train on are compared with at once."""


@dataclass(frozen=True, slots=True)
class Leaks:
    """Rows of a spool that were found, one entry a row.

    Attributes:
        rows: their numbers, int64, ascending.
        sets: the number of the evaluation set of each.
        where: the number of the row in that set, from 0.
        rules: by which each was found.
    """

    rows: np.ndarray
    sets: np.ndarray
    where: np.ndarray
    rules: list[str]


class Evaluations:
    """What rows are compared with.

    Args:
        sets: the texts of each evaluation set.
        near: the least Jaccard similarity of rows that are nearly the same; None where these are not looked for.
    """

    def __init__(self, sets: Sequence[Texts], near: float | None) -> None:
        self.index = Index({str(i): texts.said for i, texts in enumerate(sets)}, threshold=near)
        self._said_by = [texts.said_by for texts in sets]
        self._owner = np.repeat(np.arange(len(sets)), [len(texts.asked) for texts in sets])
        self._row = np.concatenate([np.zeros(0, np.int64), *(texts.asked_by for texts in sets)])
        asked = np.concatenate([as_keys(together([])), *(as_keys(texts.asked) for texts in sets)])
        self._questions, self._first = np.unique(asked, return_index=True)

    def leaks(self, rows: Rows, kind: str, wanted: np.ndarray, phrases: bool = False) -> Leaks:
        """The rows among `wanted` (bool (N)) that give a set away.

        Args:
            phrases: runs of words that more than `COMMON` of them have are phrases and no leaks.
        """
        counts = np.zeros(len(self.index.grams.values), np.int64)
        found = self.looked_up(self.index, rows, kind, wanted, counts)
        if phrases and (common := counts > COMMON).any():
            found = self.looked_up(self.index.without(common), rows, kind, wanted)
        return found

    def looked_up(
        self, index: Index, rows: Rows, kind: str, wanted: np.ndarray, counts: np.ndarray | None = None
    ) -> Leaks:
        """The rows that an index finds; `counts` as for `hits`."""
        found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64), list[str]())]
        if self._said_by:
            for first, batch in rows.batches([*CONTENT[kind]]):
                mask = wanted[first : first + batch.num_rows]
                if mask.any():
                    places, sets, where, rules = self.hits(index, kind, batch.filter(pa.array(mask)), counts)
                    found.append((first + np.flatnonzero(mask)[places], sets, where, rules))
        numbers, sets, where, rules = zip(*found, strict=True)
        return Leaks(np.concatenate(numbers), np.concatenate(sets), np.concatenate(where), [*chain(*rules)])

    def hits(
        self, index: Index, kind: str, batch: pa.RecordBatch, counts: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """Of some rows those that are found, each once; its set, the row there, and the rule."""
        found = hits(index, texts_of(kind, batch), counts)
        where = [self._said_by[i][row] for i, row in zip(found.evaluation.tolist(), found.row.tolist(), strict=True)]
        columns = (found.text, found.evaluation, np.array(where, np.int64), found.rule)
        backwards = zip(*(values[::-1].tolist() for values in columns), strict=True)
        by = {text: (evaluation, row, RULES[rule]) for text, evaluation, row, rule in backwards}
        digests = as_keys(texts_of(kind, batch, "prompts")) if len(self._questions) else np.zeros(0, "S16")
        place = np.minimum(np.searchsorted(self._questions, digests), len(self._questions) - 1)
        for text in np.flatnonzero((self._questions[place] == digests) & (digests != EMPTY)).tolist():
            first = self._first[place[text]]
            by[text] = int(self._owner[first]), int(self._row[first]), ASKED
        order = sorted(by)
        sets, rows = (np.array([by[text][i] for text in order], np.int64) for i in (0, 1))
        return np.array(order, np.int64), sets, rows, [by[text][2] for text in order]


def as_keys(texts: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Digests of normalised texts as values that sort, `S16` (N)."""
    return normalised_digests(texts).view("S16")


EMPTY = as_keys(pa.array([""]))[0]


def leaks_of(
    rows: Rows, kind: str, measured: np.ndarray, trained: np.ndarray, near: float | None
) -> Leaks:  # fmt: skip
    """The rows to train on that give away rows to measure on (bool (N), both).

    The latter are looked for a slice at a time, so that memory does not go by how many they are.
    """
    found, before = list[Leaks](), 0
    for said, asked in slices(rows, kind, measured):
        some = Evaluations([Texts.of_rows(said, asked)], near).leaks(rows, kind, trained, phrases=True)
        found.append(Leaks(some.rows, some.sets, some.where + before, some.rules))
        before += len(said)
    return found[0] if len(found) == 1 else first_of(found)


def first_of(found: Sequence[Leaks]) -> Leaks:
    """Each row once, of those that slices of one set give: by the first rule that holds for any."""
    numbers, sets, where = (
        np.concatenate([np.zeros(0, np.int64), *(getattr(leaks, name) for leaks in found)])
        for name in ("rows", "sets", "where")
    )
    rules = [*chain.from_iterable(leaks.rules for leaks in found)]
    rank = np.array([(ASKED, *RULES).index(rule) for rule in rules], np.int64)
    order = np.lexsort((where, rank, numbers))
    order = order[np.diff(numbers[order], prepend=-1) > 0]
    return Leaks(numbers[order], sets[order], where[order], [rules[i] for i in order])


def slices(rows: Rows, kind: str, wanted: np.ndarray) -> Iterator[tuple[pa.ChunkedArray, pa.ChunkedArray]]:
    """What rows of a spool (bool (N)) say and what they ask, some `SLICE` bytes at a time."""
    said, asked, size = list[pa.Array](), list[pa.Array](), 0
    for first, batch in rows.batches([*CONTENT[kind]]) if wanted.any() else ():
        mask = wanted[first : first + batch.num_rows]
        if mask.any():
            some = batch.filter(pa.array(mask))
            said.append(texts_of(kind, some))
            asked.append(texts_of(kind, some, "prompts"))
            size += said[-1].nbytes
        if size >= SLICE:
            yield together(said), together(asked)
            said, asked, size = [], [], 0
    if said:
        yield together(said), together(asked)


def together(texts: Sequence[pa.Array]) -> pa.ChunkedArray:
    return pa.chunked_array(texts, pa.string())
