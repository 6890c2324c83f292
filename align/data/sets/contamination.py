"""Rows that give away what is measured: those that evaluation rows stand in, ask the same, or nearly are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
from numpy import ndarray

from align.data.dedup.arrays import NO_HASHES, NO_NUMBERS, HashTable, distinct, held, join, join_columns
from align.data.dedup.evaluation_overlap import ASKED, COMMON, NEAR, SLICE, WIDTH, Index, Matches, Prefilter, hits
from align.data.dedup.near_duplicates import find_near, find_shared, sharing
from align.data.dedup.numbers import number_hashes
from align.data.dedup.questions import EvaluationTexts, QuestionIndex, evaluation_keys, hash_asked, letter_runs
from align.data.dedup.shingles import (
    BANDS,
    Shingles,
    band_keys,
    blocks,
    hash_runs,
    normalised_digests,
    shingled,
    word_hashes,
)
from align.data.sets.spool import Rows, first_bits

PART = 7
"""Words of a run, more than half of it, that make it a phrase if many rows share them. Rows of the test split share
phrases with other rows; an evaluation set from elsewhere shares none, and the row of it that leaked most often stands
in many rows."""


def first_matches(parts: Sequence[Matches]) -> Matches:
    """Return each text once, in ascending order: by what it asks, else by the first set, and in it by the first rule
    that holds for any."""
    matches = Matches(*join_columns([(NO_NUMBERS,) * 4, *parts]))
    order = np.lexsort((matches.row, matches.rule, matches.evaluation, matches.rule > ASKED, matches.text))
    order = order[np.diff(matches.text[order], prepend=-1) > 0]
    return Matches(*(column[order] for column in matches))


class Evaluations:
    """What rows are compared with.

    Args:
        sets: the texts of each evaluation set.
        near: the least Jaccard similarity of rows that are nearly the same; None if these are not looked for.
        phrases: runs of words that are no leaks, see `Index.without`.
    """

    def __init__(self, sets: Sequence[EvaluationTexts], near: float | None, phrases: ndarray | None = None) -> None:
        by_text = join(texts.said_by for texts in sets)
        index = Index([texts.said for texts in sets], threshold=near, rows=by_text)
        self.sets = sets
        self.questions = list[QuestionIndex]()
        if phrases is None:  # sets from elsewhere; rows that are held out say what other rows say too
            phrases = distinct(join((letter_runs(texts.said, index.width) for texts in sets), NO_HASHES))
            self.questions = [*map(QuestionIndex, sets, range(len(sets)))]
        self.index = index.without(phrases)
        keys = [evaluation_keys(texts.asked) for texts in sets]
        self.asked_set = np.repeat(np.arange(len(sets)), [len(own.key) for own in keys])
        self.asked_row = join(texts.asked_by[own.text] for texts, own in zip(sets, keys, strict=True))
        self.asked = HashTable(*np.unique(join((own.key for own in keys), NO_HASHES), return_index=True))

    def leaks(self, rows: Rows, wanted: ndarray) -> Matches:
        """Return the rows among `wanted` (bool (N)) that give a set away, each once, in ascending order."""
        parts = list[Matches]()
        for numbers, said, asked in rows.texts(wanted, "both", "prompts") if self.sets else ():
            matches = self.find(said, asked)
            parts.append(matches._replace(text=numbers[matches.text]))
        return first_matches(parts)

    def find(self, said: pa.Array, asked: pa.Array) -> Matches:
        """Return what some rows give away, each row once.

        Args:
            said, asked: what each row says, and what it asks.
        """
        parts = [hits(self.index, said), *(questions.find(said) for questions in self.questions)]
        text, key = hash_asked(asked)
        places, keys = self.asked.find(key)
        parts.append(Matches(text[places], self.asked_set[keys], self.asked_row[keys], np.full(len(keys), ASKED)))
        return first_matches(parts)


def leaks_of(rows: Rows, measured: ndarray, trained: ndarray, near: float | None) -> Matches:
    """Return the rows to train on that give away rows to measure on (bool (N), both).

    The latter are looked for a slice at a time, so that memory does not go by how many they are, and only where a row
    to train on may be one that is found. So the time that this takes goes by the rows, and not by their square.
    """
    parts = list[Matches]()
    if measured.any():
        phrases, suspects = worth_asking(rows, measured, trained, near)
        phrases = np.union1d(phrases, templated_runs(rows, measured, trained, suspects, phrases))
        before = 0
        for texts in slices(rows, measured):
            matches = Evaluations([texts], near, phrases).leaks(rows, suspects)
            parts.append(matches._replace(row=matches.row + before))
            before += len(texts.said)
    return first_matches(parts)


def worth_asking(rows: Rows, measured: ndarray, trained: ndarray, near: float | None) -> tuple[ndarray, ndarray]:
    """Return the runs of words that are phrases, and which rows to train on `leaks_of` may find, bool (N): all that it
    finds, and few others."""
    prefilter = Prefilter(near)
    questions = [NO_HASHES]
    for texts in slices(rows, measured):
        prefilter.measure(texts.said)
        questions.append(evaluation_keys(texts.asked).key)
    for texts in slices(rows, measured):
        prefilter.add(texts.said)
    asks = distinct(np.concatenate(questions))
    alike = np.zeros_like(trained)
    found = np.zeros_like(trained)
    for numbers, said, asked in rows.texts(trained, "both", "prompts"):
        alike[numbers] = prefilter.tell(said)
        keys = hash_asked(asked)
        found[numbers[keys.text[held(asks, keys.key)]]] = True
    for numbers, said in rows.texts(alike, "both"):
        found[numbers] |= prefilter.maybe(said)
    return prefilter.phrases, found


def templated_runs(rows: Rows, measured: ndarray, trained: ndarray, suspects: ndarray, phrases: ndarray) -> ndarray:
    """Return the runs of words, uint64, that are mostly text which many rows share: the end of an instruction and a
    word of their own. `PART` words in a row of each are in more than `COMMON` rows to train on.

    Args:
        suspects: the rows to train on that may have a run in common with rows to measure on, bool (N).
        phrases: runs of words that are known to be phrases, ascending.
    """
    candidates = [NO_HASHES]
    for _, said in rows.texts(suspects, "both"):
        runs = shingled(said, WIDTH).values
        candidates.append(runs[~held(phrases, runs)])
    whole, parts = parts_of_runs(rows, measured, distinct(np.concatenate(candidates)))
    if not len(whole):
        return NO_HASHES
    some = distinct(parts.ravel())
    counts = np.zeros(len(some), np.int64)
    for _, said in rows.texts(trained, "both"):
        runs = shingled(said, PART).values
        counts += np.bincount(np.searchsorted(some, runs[held(some, runs)]), minlength=len(some))
    return distinct(whole[held(some[counts > COMMON], parts.ravel()).reshape(parts.shape).any(axis=1)])


def parts_of_runs(rows: Rows, measured: ndarray, candidates: ndarray) -> tuple[ndarray, ndarray]:
    """Return the runs of rows to measure on that are among some (ascending), uint64 (M), and the runs of `PART` words
    within each, uint64 (M, parts)."""
    steps = np.arange(WIDTH - PART + 1)
    found = [(NO_HASHES, np.zeros((0, len(steps)), np.uint64))]
    for _, said in rows.texts(measured, "both") if len(candidates) else ():
        for data, starts in blocks(said):
            hashes, counts = word_hashes(data, starts)
            runs = hash_runs(hashes, WIDTH)
            document = np.repeat(np.arange(len(counts)), counts)
            inside = document[: len(runs)] == document[len(document) - len(runs) :]
            places = np.flatnonzero(inside & held(candidates, runs))
            found.append((runs[places], hash_runs(hashes, PART)[places[:, None] + steps]))
    whole, parts = join_columns(found)
    return whole, parts


def slices(rows: Rows, wanted: ndarray) -> Iterator[EvaluationTexts]:
    """Yield what rows of a spool (bool (N)) say and what they ask, some `SLICE` bytes at a time."""
    said = list[pa.Array]()
    asked = list[pa.Array]()
    for _, *texts in rows.texts(wanted, "both", "prompts"):
        said.append(texts[0])
        asked.append(texts[1])
        if sum(texts.nbytes for texts in said) >= SLICE:
            yield EvaluationTexts.of_rows(said, asked)
            said = []
            asked = []
    if said:
        yield EvaluationTexts.of_rows(said, asked)


# --- Rows of one template give nothing away. Where near-duplicates were not removed over whole rows, rows of one
# template are all alike. They are compared again, as near-duplicates are (`align.data.dedup.near_duplicates`): text
# that many rows share does not count, and numbers and operators have to be the same.


def drop_templated(leaks: Matches, rows: Rows, measured: ndarray, near: float, finds_all: bool) -> Matches:
    """Return the leaks without rows that are near to rows to measure on by shared text only.

    Args:
        measured: the rows to measure on, bool (N).
        near: the least Jaccard similarity that they were found by.
        finds_all: whether MinHash finds all pairs that are so similar. If not, rows that are not made of shared text
            for the most part stay leaks.
    """
    by_similarity = leaks.rule == NEAR
    suspects = leaks.text[by_similarity]
    if not len(suspects):
        return leaks
    compared = measured.copy()
    compared[suspects] = True
    with TemporaryDirectory(dir=rows.folder, prefix="sides-") as folder:
        texts = ComparedTexts(Path(folder), rows, compared)
        places = np.arange(len(texts.numbers), dtype=np.int32)
        groups = sharing(places, texts.sizes > 0, texts.keys.__getitem__)
        shared = find_shared(groups, places, texts.sizes, texts.content, texts.read)
        is_measured = measured[texts.numbers]
        found = find_near(
            np.where(is_measured, 0, 1),
            texts.sizes,
            texts.keys.__getitem__,
            texts.read,
            near,
            sources=is_measured.astype(np.int64),
            across=True,
            numbers=texts.operators,
            shared=shared,
        )
        stay = texts.numbers[found.dropped]
        if not finds_all:
            stay = np.append(stay, texts.numbers[~texts.are_mostly(shared, near)])
    kept = ~by_similarity | np.isin(leaks.text, stay)
    return Matches(*(column[kept] for column in leaks))


class ComparedTexts:
    """Keys, shingles and hashes of rows of a spool. Keys and shingles are in files, since these may be all its rows.

    Args:
        folder: for the files.
        wanted: which rows, bool (N).

    Attributes:
        numbers: of the rows, ascending; all others are by their place among these.
        keys: of MinHash, uint64 (bands, rows).
        sizes: shingles of each row.
        operators, content: see `find_near`.
    """

    def __init__(self, folder: Path, rows: Rows, wanted: ndarray) -> None:
        self.numbers = np.flatnonzero(wanted)
        self.keys = np.memmap(folder / "keys", np.uint64, "w+", shape=(BANDS, len(self.numbers)))
        parts = list[tuple[ndarray, ndarray, ndarray]]()
        start = 0
        with (folder / "shingles").open("wb") as file:
            for _, texts in rows.texts(wanted, "both"):
                sets = shingled(texts)
                file.write(sets.values.tobytes())
                self.keys[:, start : start + len(sets)] = band_keys(sets).T
                content = first_bits(normalised_digests(texts).view(np.uint8).reshape(-1, 16))
                parts.append((sets.sizes, number_hashes(texts), content))
                start += len(sets)
        self.sizes, self.operators, self.content = join_columns(parts)
        self.ends = np.append(0, np.cumsum(self.sizes))
        self.values = np.memmap(folder / "shingles", np.uint64, "r") if self.ends[-1] else NO_HASHES

    def read(self, places: ndarray) -> Shingles:
        """Return the shingles of some rows."""
        parts = (self.values[self.ends[place] : self.ends[place + 1]] for place in places.tolist())
        return Shingles.of_sizes(join(parts, NO_HASHES), self.sizes[places])

    def are_mostly(self, shared: ndarray, near: float) -> ndarray:
        """Return which rows may be alike to others, at the least similarity, mostly by shared text, bool (rows)."""
        mostly = np.zeros(len(self.numbers), bool)
        for start in range(0, len(mostly), 1024):
            sets = self.read(np.arange(start, min(start + 1024, len(mostly))))
            mostly[start : start + len(sets)] = 2 * sets.only(shared).sizes > near * sets.sizes
        return mostly
