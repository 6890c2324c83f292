"""Contamination of a data set: rows that contain, ask or nearly equal rows of evaluation sets or of the test side."""

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
"""Words of a part of a run. It is more than half of the run: if many rows share a part, the run is a phrase. Rows of
the test side share phrases with other rows. A separate evaluation set shares none, and a row of it that leaked often is
in many rows."""


def first_matches(parts: Sequence[Matches]) -> Matches:
    """Select one match for each text, sorted by text: a match of `ASKED` if there is one, else the first set, and in it
    the first rule."""
    matches = Matches(*join_columns([(NO_NUMBERS,) * 4, *parts]))
    order = np.lexsort((matches.row, matches.rule, matches.evaluation, matches.rule > ASKED, matches.text))
    order = order[np.diff(matches.text[order], prepend=-1) > 0]
    return Matches(*(column[order] for column in matches))


class Evaluations:
    """Indexes of evaluation sets, which find the rows of a spool that overlap with them.

    Args:
        sets: texts of each evaluation set.
        near: least Jaccard similarity of near-duplicates; None if these are not looked for.
        phrases: runs of words that are not leaks, see `Index.without`. If given, the sets are rows of the test side.
    """

    def __init__(self, sets: Sequence[EvaluationTexts], near: float | None, phrases: ndarray | None = None) -> None:
        by_text = join(texts.said_by for texts in sets)
        index = Index([texts.said for texts in sets], threshold=near, rows=by_text)
        self.sets = sets
        self.questions = list[QuestionIndex]()
        if phrases is None:  # separate evaluation sets; rows of the test side contain questions of other rows too
            phrases = distinct(join((letter_runs(texts.said, index.width) for texts in sets), NO_HASHES))
            self.questions = [*map(QuestionIndex, sets, range(len(sets)))]
        self.index = index.without(phrases)
        keys = [evaluation_keys(texts.asked) for texts in sets]
        self.question_set = np.repeat(np.arange(len(sets)), [len(set_keys.key) for set_keys in keys])
        self.question_row = join(texts.asked_by[set_keys.text] for texts, set_keys in zip(sets, keys, strict=True))
        self.question_table = HashTable(
            *np.unique(join((set_keys.key for set_keys in keys), NO_HASHES), return_index=True)
        )

    def leaks(self, rows: Rows, mask: ndarray) -> Matches:
        """Find the rows that overlap with an evaluation set. Returns one match for each, sorted by row.

        Args:
            mask: mask of the rows to compare, bool (N).
        """
        parts = list[Matches]()
        for numbers, texts, prompts in rows.texts(mask, "both", "prompts") if self.sets else ():
            matches = self.find(texts, prompts)
            parts.append(matches._replace(text=numbers[matches.text]))
        return first_matches(parts)

    def find(self, texts: pa.Array, prompts: pa.Array) -> Matches:
        """Find the rows of a batch that overlap with an evaluation set. Returns one match for each.

        Args:
            texts, prompts: whole text and prompt of each row.
        """
        parts = [hits(self.index, texts), *(questions.find(texts) for questions in self.questions)]
        text, key = hash_asked(prompts)
        places, keys = self.question_table.find(key)
        parts.append(Matches(text[places], self.question_set[keys], self.question_row[keys], np.full(len(keys), ASKED)))
        return first_matches(parts)


def leaks_of(rows: Rows, measured: ndarray, trained: ndarray, near: float | None) -> Matches:
    """Find the training rows that overlap with test rows.

    Test rows are indexed a slice at a time, so that memory is bounded, and compared only with training rows that a
    filter selects. So the time is linear in the number of rows.

    Args:
        measured: mask of the test rows, bool (N).
        trained: mask of the training rows, bool (N).
        near: least Jaccard similarity of near-duplicates; None if these are not looked for.
    """
    parts = list[Matches]()
    if measured.any():
        phrases, suspects = worth_asking(rows, measured, trained, near)
        phrases = np.union1d(phrases, templated_runs(rows, measured, trained, suspects, phrases))
        first_row = 0
        for texts in slices(rows, measured):
            matches = Evaluations([texts], near, phrases).leaks(rows, suspects)
            parts.append(matches._replace(row=matches.row + first_row))
            first_row += len(texts.said)
    return first_matches(parts)


def worth_asking(rows: Rows, measured: ndarray, trained: ndarray, near: float | None) -> tuple[ndarray, ndarray]:
    """Return the runs of words that are phrases, and a mask of the training rows that `leaks_of` may find, bool (N).

    The mask has false positives and no false negatives.
    """
    prefilter = Prefilter(near)
    question_parts = [NO_HASHES]
    for piece in slices(rows, measured):
        prefilter.measure(piece.said)
        question_parts.append(evaluation_keys(piece.asked).key)
    for piece in slices(rows, measured):
        prefilter.add(piece.said)
    question_hashes = distinct(np.concatenate(question_parts))
    may_overlap = np.zeros_like(trained)
    is_suspect = np.zeros_like(trained)
    for numbers, texts, prompts in rows.texts(trained, "both", "prompts"):
        may_overlap[numbers] = prefilter.tell(texts)
        keys = hash_asked(prompts)
        is_suspect[numbers[keys.text[held(question_hashes, keys.key)]]] = True
    for numbers, texts in rows.texts(may_overlap, "both"):
        is_suspect[numbers] |= prefilter.maybe(texts)
    return prefilter.phrases, is_suspect


def templated_runs(rows: Rows, measured: ndarray, trained: ndarray, suspects: ndarray, phrases: ndarray) -> ndarray:
    """Find the runs of words, uint64, that are mostly text which many rows share, such as the end of an instruction and
    one other word. A part of `PART` words of each is in more than `COMMON` training rows.

    Args:
        suspects: mask of the training rows that may have a run in common with test rows, bool (N).
        phrases: runs of words that are phrases already, ascending.
    """
    candidates = [NO_HASHES]
    for _, texts in rows.texts(suspects, "both"):
        row_runs = shingled(texts, WIDTH).values
        candidates.append(row_runs[~held(phrases, row_runs)])
    runs, parts = parts_of_runs(rows, measured, distinct(np.concatenate(candidates)))
    if not len(runs):
        return NO_HASHES
    distinct_parts = distinct(parts.ravel())
    counts = np.zeros(len(distinct_parts), np.int64)
    for _, texts in rows.texts(trained, "both"):
        row_parts = shingled(texts, PART).values
        places = np.searchsorted(distinct_parts, row_parts[held(distinct_parts, row_parts)])
        counts += np.bincount(places, minlength=len(distinct_parts))
    is_common = held(distinct_parts[counts > COMMON], parts.ravel()).reshape(parts.shape)
    return distinct(runs[is_common.any(axis=1)])


def parts_of_runs(rows: Rows, measured: ndarray, candidates: ndarray) -> tuple[ndarray, ndarray]:
    """Return the runs of words of test rows that are among `candidates` (ascending), uint64 (M), and the parts of
    `PART` words within each, uint64 (M, parts)."""
    steps = np.arange(WIDTH - PART + 1)
    parts = [(NO_HASHES, np.zeros((0, len(steps)), np.uint64))]
    for _, texts in rows.texts(measured, "both") if len(candidates) else ():
        for data, starts in blocks(texts):
            hashes, counts = word_hashes(data, starts)
            runs = hash_runs(hashes, WIDTH)
            document = np.repeat(np.arange(len(counts)), counts)
            is_in_one_row = document[: len(runs)] == document[len(document) - len(runs) :]
            places = np.flatnonzero(is_in_one_row & held(candidates, runs))
            parts.append((runs[places], hash_runs(hashes, PART)[places[:, None] + steps]))
    runs, run_parts = join_columns(parts)
    return runs, run_parts


def slices(rows: Rows, mask: ndarray) -> Iterator[EvaluationTexts]:
    """Yield the texts and prompts of some rows of a spool (mask, bool (N)), about `SLICE` bytes at a time."""
    texts = list[pa.Array]()
    prompts = list[pa.Array]()
    for _, batch_texts, batch_prompts in rows.texts(mask, "both", "prompts"):
        texts.append(batch_texts)
        prompts.append(batch_prompts)
        if sum(array.nbytes for array in texts) >= SLICE:
            yield EvaluationTexts.of_rows(texts, prompts)
            texts = []
            prompts = []
    if texts:
        yield EvaluationTexts.of_rows(texts, prompts)


# --- Rows of one template are not leaks. If near-duplicates were not removed by whole rows, rows of one template are
# all similar. They are compared again, as near-duplicates are (`align.data.dedup.near_duplicates`): text
# that many rows share does not count, and numbers and operators have to be the same.


def drop_templated(leaks: Matches, rows: Rows, measured: ndarray, near: float, finds_all: bool) -> Matches:
    """Return the leaks without rows that are near-duplicates of test rows by shared text only.

    Args:
        measured: mask of the test rows, bool (N).
        near: least Jaccard similarity by which the leaks were found.
        finds_all: whether MinHash finds all pairs of this similarity. If not, rows that do not mostly consist of shared
            text stay leaks.
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
        duplicates = find_near(
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
        confirmed = texts.numbers[duplicates.dropped]
        if not finds_all:
            confirmed = np.append(confirmed, texts.numbers[~texts.are_mostly(shared, near)])
    kept = ~by_similarity | np.isin(leaks.text, confirmed)
    return Matches(*(column[kept] for column in leaks))


class ComparedTexts:
    """Keys, shingles and hashes of some rows of a spool. Keys and shingles are in files to save memory.

    Args:
        folder: folder for the files.
        mask: mask of the rows, bool (N).

    Attributes:
        numbers: numbers of the rows, ascending. All other arrays are indexed by place in this one.
        keys: MinHash keys, uint64 (bands, rows).
        sizes: number of shingles of each row.
        operators, content: see `find_near`.
    """

    def __init__(self, folder: Path, rows: Rows, mask: ndarray) -> None:
        self.numbers = np.flatnonzero(mask)
        self.keys = np.memmap(folder / "keys", np.uint64, "w+", shape=(BANDS, len(self.numbers)))
        parts = list[tuple[ndarray, ndarray, ndarray]]()
        start = 0
        with (folder / "shingles").open("wb") as file:
            for _, texts in rows.texts(mask, "both"):
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
        """Load the shingles of the rows at some places."""
        parts = (self.values[self.ends[place] : self.ends[place + 1]] for place in places.tolist())
        return Shingles.of_sizes(join(parts, NO_HASHES), self.sizes[places])

    def are_mostly(self, shared: ndarray, near: float) -> ndarray:
        """Return whether each row may be similar to others mostly because of shared text, bool (rows).

        Args:
            shared: shared shingles, ascending.
            near: least Jaccard similarity.
        """
        is_mostly_shared = np.zeros(len(self.numbers), bool)
        for start in range(0, len(is_mostly_shared), 1024):
            sets = self.read(np.arange(start, min(start + 1024, len(is_mostly_shared))))
            is_mostly_shared[start : start + len(sets)] = 2 * sets.only(shared).sizes > near * sets.sizes
        return is_mostly_shared
