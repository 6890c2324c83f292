"""Rows that give away what is measured: those that evaluation rows stand in, ask the same, or nearly are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa

from align.data.dedup.arrays import distinct, held
from align.data.dedup.contamination import RULES, Index, Prefilter, hits
from align.data.dedup.questions import RULES as QUESTION_RULES
from align.data.dedup.questions import QuestionIndex, QuestionSet, evaluation_keys, hash_asked, letter_runs
from align.data.dedup.shingles import hash_runs, shingled
from align.data.dedup.words import blocks, word_hashes
from align.data.sets.columns import CONTENT, texts_of
from align.data.sets.evaluations import Texts
from align.data.sets.spool import Rows

ASKED = "question"
"""A rule of ours beside those of `align.data.dedup.contamination`: the row asks what an evaluation row asks."""
COMMON = 10
"""Rows that may share a run of 13 words with a row of the test split: what more of them share is a common phrase or
boilerplate (Brown et al. 2020, arXiv 2005.14165, appendix C). An evaluation set from elsewhere shares no phrases, and
the row of it that leaked most often stands in many rows."""
WIDTH = 13
"""Words of a run that gives a row to measure on away."""
PART = 7
"""Words of a run, more than half of it, that make it a phrase where many rows share them."""
SLICE = 48 << 20
"""Bytes of text to measure on that are indexed at once."""


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
        phrases: runs of words that are no leaks, see `Index.without`.
    """

    def __init__(self, sets: Sequence[Texts], near: float | None, phrases: np.ndarray | None = None) -> None:
        index = Index({str(i): texts.said for i, texts in enumerate(sets)}, threshold=near)
        self.questions = list[QuestionIndex]()
        if phrases is None:  # sets from elsewhere; rows that are held out say what other rows say too
            few_words = [letter_runs(texts.said, index.width) for texts in sets]
            phrases = np.unique(np.concatenate([np.zeros(0, np.uint64), *few_words]))
            self.questions = [
                QuestionIndex(QuestionSet(texts.asked, texts.asked_by, texts.said, texts.said_by)) for texts in sets
            ]
        self.index = index.without(phrases)
        self._said_by = [texts.said_by for texts in sets]
        self._asked_by = [texts.asked_by for texts in sets]
        keys = [evaluation_keys(texts.asked) for texts in sets]
        owner = np.repeat(np.arange(len(sets)), [len(one.key) for one in keys])
        row = np.concatenate(
            [np.zeros(0, np.int64), *(of.asked_by[one.text] for of, one in zip(sets, keys, strict=True))]
        )
        self._keys, first = np.unique(np.concatenate([NO_KEYS, *(one.key for one in keys)]), return_index=True)
        self._key_set, self._key_row = owner[first], row[first]

    def leaks(self, rows: Rows, kind: str, wanted: np.ndarray) -> Leaks:
        """The rows among `wanted` (bool (N)) that give a set away."""
        found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64), list[str]())]
        if self._said_by:
            for numbers, batch in rows.where(wanted, [*CONTENT[kind]]):
                places, sets, where, rules = self.hits(kind, batch)
                found.append((numbers[places], sets, where, rules))
        numbers, sets, where, rules = zip(*found, strict=True)
        return Leaks(np.concatenate(numbers), np.concatenate(sets), np.concatenate(where), [*chain(*rules)])

    def hits(self, kind: str, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """Of some rows those that are found, each once; its set, the row there, and the rule.

        A row that asks what an evaluation row asks is named by that. Otherwise the first set counts, and in it the
        first rule of `ORDER`.
        """
        texts = texts_of(kind, batch)
        alike = hits(self.index, texts)
        where = [self._said_by[i][row] for i, row in zip(alike.evaluation.tolist(), alike.row.tolist(), strict=True)]
        found = [(alike.text, alike.evaluation, np.array(where, np.int64), RANKS[alike.rule])]
        for number, questions in enumerate(self.questions):
            matches = questions.find(texts)
            is_run = QUESTION_RANKS[matches.rule] == ORDER.index("ngram")
            owner = matches.owner
            rows = np.zeros(len(owner), np.int64)
            rows[is_run] = self._said_by[number][owner[is_run]]
            rows[~is_run] = self._asked_by[number][owner[~is_run]]
            found.append((matches.text, np.full(len(owner), number), rows, QUESTION_RANKS[matches.rule]))
        if len(self._keys):
            text, key = hash_asked(texts_of(kind, batch, "prompts"))
            place = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
            same = self._keys[place] == key
            place = place[same]
            found.append((text[same], self._key_set[place], self._key_row[place], np.zeros(len(place), np.int64)))
        text, sets, rows, rank = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.lexsort((rows, rank, sets, rank > 0, text))
        order = order[np.diff(text[order], prepend=-1) > 0]
        return text[order], sets[order], rows[order], [ORDER[i] for i in rank[order].tolist()]


NO_KEYS = np.zeros(0, np.uint64)
ORDER = (ASKED, "exact", "ngram", "contained", "near", "changed")
"""Rules, in the order in which they name a row that several hold for."""
RANKS = np.array([ORDER.index(rule) for rule in RULES])
QUESTION_RANKS = np.array([ORDER.index(rule) for rule in QUESTION_RULES])


def leaks_of(rows: Rows, kind: str, measured: np.ndarray, trained: np.ndarray, near: float | None) -> Leaks:
    """The rows to train on that give away rows to measure on (bool (N), both).

    The latter are looked for a slice at a time, so that memory does not go by how many they are, and only where a row
    to train on may be one that is found. So the time that this takes goes by the rows, and not by their square.
    """
    if not measured.any():
        return first_of([])
    found, before = list[Leaks](), 0
    phrases, suspects = worth_asking(rows, kind, measured, trained, near)
    phrases = np.union1d(phrases, templated_runs(rows, kind, measured, trained, suspects, phrases))
    for said, asked in slices(rows, kind, measured):
        some = Evaluations([Texts.of_rows(said, asked)], near, phrases).leaks(rows, kind, suspects)
        found.append(Leaks(some.rows, some.sets, some.where + before, some.rules))
        before += len(said)
    return found[0] if len(found) == 1 else first_of(found)


def worth_asking(
    rows: Rows, kind: str, measured: np.ndarray, trained: np.ndarray, near: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """The runs of words that are phrases, and which rows to train on `leaks_of` may find, bool (N): all that it finds,
    and few others."""
    prefilter, questions = Prefilter(COMMON, WIDTH, near), [NO_KEYS]
    for said, asked in slices(rows, kind, measured):
        prefilter.measure(said)
        questions.append(evaluation_keys(asked).key)
    for said, _ in slices(rows, kind, measured):
        prefilter.add(said)
    asks, alike, found = np.unique(np.concatenate(questions)), np.zeros_like(trained), np.zeros_like(trained)
    for numbers, batch in rows.where(trained, [*CONTENT[kind]]):
        alike[numbers] = prefilter.tell(texts_of(kind, batch))
        asked_here = hash_asked(texts_of(kind, batch, "prompts"))
        found[numbers[asked_here.text[held(asks, asked_here.key)]]] = True
    for numbers, batch in rows.where(alike, [*CONTENT[kind]]):
        found[numbers] |= prefilter.maybe(texts_of(kind, batch))
    return prefilter.phrases, found


def templated_runs(
    rows: Rows, kind: str, measured: np.ndarray, trained: np.ndarray, suspects: np.ndarray, phrases: np.ndarray
) -> np.ndarray:
    """Return the runs of words, uint64, that are mostly text which many rows share: the end of an instruction and a
    word of their own. `PART` words in a row of each are in more than `COMMON` rows to train on.

    Args:
        suspects: the rows to train on that may have a run in common with rows to measure on, bool (N).
        phrases: runs of words that are known to be phrases, ascending.
    """
    candidates = [NO_KEYS]
    for _, batch in rows.where(suspects, [*CONTENT[kind]]):
        runs = shingled(texts_of(kind, batch), WIDTH).values
        candidates.append(runs[~held(phrases, runs)])
    whole, parts = parts_of_runs(rows, kind, measured, distinct(np.concatenate(candidates)))
    some = distinct(parts.ravel())
    counts = np.zeros(len(some), np.int64)
    for _, batch in rows.where(trained if len(some) else np.zeros_like(trained), [*CONTENT[kind]]):
        runs = shingled(texts_of(kind, batch), PART).values
        counts += np.bincount(np.searchsorted(some, runs[held(some, runs)]), minlength=len(some))
    return distinct(whole[held(some[counts > COMMON], parts.ravel()).reshape(parts.shape).any(axis=1)])


def parts_of_runs(rows: Rows, kind: str, measured: np.ndarray, candidates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the runs of rows to measure on that are among some (ascending), uint64 (M), and the runs of `PART` words
    within each, uint64 (M, parts)."""
    steps = np.arange(WIDTH - PART + 1)
    whole, parts = [NO_KEYS], [np.zeros((0, len(steps)), np.uint64)]
    for _, batch in rows.where(measured if len(candidates) else np.zeros_like(measured), [*CONTENT[kind]]):
        for data, starts in blocks(texts_of(kind, batch)):
            hashes, counts = word_hashes(data, starts)
            runs = hash_runs(hashes, WIDTH)
            document = np.repeat(np.arange(len(counts)), counts)
            inside = document[: len(runs)] == document[len(document) - len(runs) :]
            places = np.flatnonzero(inside & held(candidates, runs))
            whole.append(runs[places])
            parts.append(hash_runs(hashes, PART)[places[:, None] + steps])
    return np.concatenate(whole), np.concatenate(parts)


def first_of(found: Sequence[Leaks]) -> Leaks:
    """Each row once, of those that slices of one set give: by the first rule that holds for any."""
    numbers, sets, where = (
        np.concatenate([np.zeros(0, np.int64), *(getattr(leaks, name) for leaks in found)])
        for name in ("rows", "sets", "where")
    )
    rules = [*chain.from_iterable(leaks.rules for leaks in found)]
    rank = np.array([ORDER.index(rule) for rule in rules], np.int64)
    order = np.lexsort((where, rank, numbers))
    order = order[np.diff(numbers[order], prepend=-1) > 0]
    return Leaks(numbers[order], sets[order], where[order], [rules[i] for i in order])


def slices(rows: Rows, kind: str, wanted: np.ndarray) -> Iterator[tuple[pa.ChunkedArray, pa.ChunkedArray]]:
    """What rows of a spool (bool (N)) say and what they ask, some `SLICE` bytes at a time."""
    said, asked, size = list[pa.Array](), list[pa.Array](), 0
    for _, batch in rows.where(wanted, [*CONTENT[kind]]):
        said.append(texts_of(kind, batch))
        asked.append(texts_of(kind, batch, "prompts"))
        size += said[-1].nbytes
        if size >= SLICE:
            yield together(said), together(asked)
            said, asked, size = [], [], 0
    if said:
        yield together(said), together(asked)


def together(texts: Sequence[pa.Array]) -> pa.ChunkedArray:
    return pa.chunked_array(texts, pa.string())
