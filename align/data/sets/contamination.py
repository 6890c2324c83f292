"""Contamination of a data set: rows that contain, ask or nearly equal rows of evaluation sets or of the test split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy import ndarray

from align.data.dedup.arrays import (
    NO_HASHES,
    NO_NUMBERS,
    HashTable,
    concatenate,
    concatenate_columns,
    is_in_sorted,
    sort_unique,
)
from align.data.dedup.evaluation_overlap import (
    ASKED,
    MAX_RUN_ROWS,
    NEAR,
    SLICE_BYTES,
    WIDTH,
    OverlapIndex,
    OverlapMatches,
    Prefilter,
    find_overlapping_texts,
)
from align.data.dedup.near_duplicates import find_near, find_shared_shingles, list_groups_with_equal_bands
from align.data.dedup.numbers import hash_numbers
from align.data.dedup.questions import (
    EvaluationTexts,
    QuestionIndex,
    hash_evaluation_questions,
    hash_southern_runs,
    hash_training_prompts,
)
from align.data.dedup.shingles import (
    BANDS,
    Shingles,
    build_shingles,
    compute_band_keys,
    digest_normalised_texts,
    hash_block_words,
    hash_runs,
    iter_byte_blocks,
)
from align.data.sets.spool import SpoolRows, get_first_bits

PART_WORDS = 7
"""Number of words in a part of a run. It is more than half of the run: if many rows share a part, the run is a phrase.
Rows of the test split share phrases with other rows. A separate evaluation set shares none, and a row of it that leaked
often is in many rows."""


def select_first_matches(parts: Sequence[OverlapMatches]) -> OverlapMatches:
    """Return the one overlap to report for each training text, sorted by text.

    An equal question (`ASKED`) goes first, then the set that is configured first, then the order of `RULES`.
    """
    matches = OverlapMatches(*concatenate_columns([(NO_NUMBERS,) * 4, *parts]))
    order = np.lexsort((matches.row, matches.rule, matches.evaluation, matches.rule > ASKED, matches.text))
    order = order[np.diff(matches.text[order], prepend=-1) > 0]
    return OverlapMatches(*(column[order] for column in matches))


class LeakFinder:
    """Indexes of evaluation sets, which find the rows of a data set under construction that overlap with them.

    Args:
        sets: texts of each evaluation set.
        near: least Jaccard similarity of near-duplicates; None if these are not searched.
        phrases: runs of words that are not leaks, see `OverlapIndex.copy_without_runs`. If given, the sets are rows of
            the test split.
    """

    def __init__(self, sets: Sequence[EvaluationTexts], near: float | None, phrases: ndarray | None = None) -> None:
        by_text = concatenate(evaluation.text_rows for evaluation in sets)
        index = OverlapIndex([evaluation.texts for evaluation in sets], threshold=near, rows=by_text)
        self.sets = sets
        self.questions = list[QuestionIndex]()
        if phrases is None:  # separate evaluation sets; rows of the test split contain questions of other rows too
            phrases = sort_unique(
                concatenate((hash_southern_runs(evaluation.texts, index.width) for evaluation in sets), NO_HASHES)
            )
            self.questions = [*map(QuestionIndex, sets, range(len(sets)))]
        self.index = index.copy_without_runs(phrases)
        keys = [hash_evaluation_questions(evaluation.questions) for evaluation in sets]
        self.question_set = np.repeat(np.arange(len(sets)), [len(set_keys.key) for set_keys in keys])
        self.question_row = concatenate(
            evaluation.question_rows[set_keys.text] for evaluation, set_keys in zip(sets, keys, strict=True)
        )
        self.question_table = HashTable(
            *np.unique(concatenate((set_keys.key for set_keys in keys), NO_HASHES), return_index=True)
        )

    def find_leaks(self, rows: SpoolRows, mask: ndarray) -> OverlapMatches:
        """Return the rows that overlap with an evaluation set, one match for each row, sorted by row.

        Args:
            mask: mask of the rows to compare, bool (N).
        """
        parts = list[OverlapMatches]()
        for numbers, texts, prompts in rows.iter_texts(mask, "both", "prompts") if self.sets else ():
            matches = self.find_leaks_in_batch(texts, prompts)
            parts.append(matches._replace(text=numbers[matches.text]))
        return select_first_matches(parts)

    def find_leaks_in_batch(self, texts: pa.Array, prompts: pa.Array) -> OverlapMatches:
        """Return the rows of a batch whose text or prompt overlaps with an evaluation set, one match for each row.

        Args:
            texts, prompts: whole text and prompt of each row.
        """
        parts = [find_overlapping_texts(self.index, texts), *(questions.find(texts) for questions in self.questions)]
        text, key = hash_training_prompts(prompts)
        places, keys = self.question_table.find_owners(key)
        parts.append(
            OverlapMatches(text[places], self.question_set[keys], self.question_row[keys], np.full(len(keys), ASKED))
        )
        return select_first_matches(parts)


def find_split_leaks(
    rows: SpoolRows, is_test: ndarray, is_train: ndarray, near_threshold: float | None
) -> OverlapMatches:
    """Return the training rows that overlap with rows of the test split, one match for each training row.

    Test rows are indexed a slice at a time, so that memory is bounded, and compared only with training rows that a
    filter selects. So the time is linear in the number of rows.

    Args:
        is_test: mask of the test rows, bool (N).
        is_train: mask of the training rows, bool (N).
        near_threshold: least Jaccard similarity of near-duplicates; None if these are not searched.
    """
    parts = list[OverlapMatches]()
    if is_test.any():
        phrases, suspects = prefilter_rows(rows, is_test, is_train, near_threshold)
        phrases = np.union1d(phrases, find_templated_runs(rows, is_test, is_train, suspects, phrases))
        first_row = 0
        for piece in iter_text_slices(rows, is_test):
            matches = LeakFinder([piece], near_threshold, phrases).find_leaks(rows, suspects)
            parts.append(matches._replace(row=matches.row + first_row))
            first_row += len(piece.texts)
    return select_first_matches(parts)


class PrefilterResult(NamedTuple):
    """Hashes of common phrases, and a mask of the training rows that may overlap with test rows.

    Attributes:
        phrases: hashes of runs of words that many training rows have, uint64, ascending.
        is_suspect: mask of the training rows that may be leaks, bool (N). It has false positives and no false
            negatives.
    """

    phrases: ndarray
    is_suspect: ndarray


def prefilter_rows(
    rows: SpoolRows, is_test: ndarray, is_train: ndarray, near_threshold: float | None
) -> PrefilterResult:
    """Find the runs of words that are common phrases, and the training rows that may overlap with test rows."""
    prefilter = Prefilter(near_threshold)
    question_parts = [NO_HASHES]
    for piece in iter_text_slices(rows, is_test):
        prefilter.count_hashes(piece.texts)
        question_parts.append(hash_evaluation_questions(piece.questions).key)
    for piece in iter_text_slices(rows, is_test):
        prefilter.add_evaluation_texts(piece.texts)
    question_hashes = sort_unique(np.concatenate(question_parts))
    may_overlap = np.zeros_like(is_train)
    is_suspect = np.zeros_like(is_train)
    for numbers, texts, prompts in rows.iter_texts(is_train, "both", "prompts"):
        may_overlap[numbers] = prefilter.match_and_count(texts)
        keys = hash_training_prompts(prompts)
        is_suspect[numbers[keys.text[is_in_sorted(question_hashes, keys.key)]]] = True
    for numbers, texts in rows.iter_texts(may_overlap, "both"):
        is_suspect[numbers] |= prefilter.match_without_phrases(texts)
    return PrefilterResult(prefilter.phrases, is_suspect)


def find_templated_runs(
    rows: SpoolRows, is_test: ndarray, is_train: ndarray, suspects: ndarray, phrases: ndarray
) -> ndarray:
    """Return the hashes of word runs (uint64) that are mostly text which many rows share, such as the end of an
    instruction. A part of `PART_WORDS` words of each is in more than `MAX_RUN_ROWS` training rows.

    Args:
        suspects: mask of the training rows that may have a run in common with test rows, bool (N).
        phrases: runs of words that are phrases already, ascending.
    """
    candidates = [NO_HASHES]
    for _, texts in rows.iter_texts(suspects, "both"):
        row_runs = build_shingles(texts, WIDTH).values
        candidates.append(row_runs[~is_in_sorted(phrases, row_runs)])
    runs, parts = find_runs_and_parts(rows, is_test, sort_unique(np.concatenate(candidates)))
    if not len(runs):
        return NO_HASHES
    distinct_parts = sort_unique(parts.ravel())
    counts = np.zeros(len(distinct_parts), np.int64)
    for _, texts in rows.iter_texts(is_train, "both"):
        row_parts = build_shingles(texts, PART_WORDS).values
        places = np.searchsorted(distinct_parts, row_parts[is_in_sorted(distinct_parts, row_parts)])
        counts += np.bincount(places, minlength=len(distinct_parts))
    is_common = is_in_sorted(distinct_parts[counts > MAX_RUN_ROWS], parts.ravel()).reshape(parts.shape)
    return sort_unique(runs[is_common.any(axis=1)])


def find_runs_and_parts(rows: SpoolRows, is_test: ndarray, candidates: ndarray) -> tuple[ndarray, ndarray]:
    """Return the hashes of word runs in test rows that are in `candidates`, and the hashes of the shorter runs within
    each. The runs are uint64 (M), and the parts of `PART_WORDS` words uint64 (M, parts). `candidates` are ascending."""
    steps = np.arange(WIDTH - PART_WORDS + 1)
    parts = [(NO_HASHES, np.zeros((0, len(steps)), np.uint64))]
    for _, texts in rows.iter_texts(is_test, "both") if len(candidates) else ():
        for data, starts in iter_byte_blocks(texts):
            hashes, counts = hash_block_words(data, starts)
            runs = hash_runs(hashes, WIDTH)
            document = np.repeat(np.arange(len(counts)), counts)
            is_in_one_row = document[: len(runs)] == document[len(document) - len(runs) :]
            places = np.flatnonzero(is_in_one_row & is_in_sorted(candidates, runs))
            parts.append((runs[places], hash_runs(hashes, PART_WORDS)[places[:, None] + steps]))
    runs, run_parts = concatenate_columns(parts)
    return runs, run_parts


def iter_text_slices(rows: SpoolRows, mask: ndarray) -> Iterator[EvaluationTexts]:
    """Yield the texts and prompts of the rows in a mask (bool (N)), about `SLICE_BYTES` bytes at a time."""
    texts = list[pa.Array]()
    prompts = list[pa.Array]()
    for _, batch_texts, batch_prompts in rows.iter_texts(mask, "both", "prompts"):
        texts.append(batch_texts)
        prompts.append(batch_prompts)
        if sum(array.nbytes for array in texts) >= SLICE_BYTES:
            yield EvaluationTexts.from_rows(texts, prompts)
            texts = []
            prompts = []
    if texts:
        yield EvaluationTexts.from_rows(texts, prompts)


# --- Rows of one template are not leaks. If near-duplicates were not removed by whole rows, rows of one template are
# all similar. They are compared again, as near-duplicates are (`align.data.dedup.near_duplicates`): text
# that many rows share does not count, and numbers and operators have to be the same.


def drop_templated_leaks(
    leaks: OverlapMatches, rows: SpoolRows, is_test: ndarray, near_threshold: float, finds_all: bool
) -> OverlapMatches:
    """Return the overlaps except for training rows that are near-duplicates of test rows by shared template text only.

    Args:
        is_test: mask of the test rows, bool (N).
        near_threshold: least Jaccard similarity by which the leaks were found.
        finds_all: whether MinHash finds all pairs of this similarity. If not, rows that do not mostly consist of shared
            text stay leaks.
    """
    by_similarity = leaks.rule == NEAR
    suspects = leaks.text[by_similarity]
    if not len(suspects):
        return leaks
    compared = is_test.copy()
    compared[suspects] = True
    with TemporaryDirectory(dir=rows.folder, prefix="sides-") as folder:
        texts = ComparedTexts(Path(folder), rows, compared)
        places = np.arange(len(texts.numbers), dtype=np.int32)
        groups = list_groups_with_equal_bands(places, texts.sizes > 0, texts.keys.__getitem__)
        shared = find_shared_shingles(groups, places, texts.sizes, texts.content, texts.load_shingles)
        is_test_text = is_test[texts.numbers]
        duplicates = find_near(
            np.where(is_test_text, 0, 1),
            texts.sizes,
            texts.keys.__getitem__,
            texts.load_shingles,
            near_threshold,
            sources=is_test_text.astype(np.int64),
            only_across_sources=True,
            numbers=texts.operators,
            shared=shared,
        )
        confirmed = texts.numbers[duplicates.dropped]
        if not finds_all:
            confirmed = np.append(confirmed, texts.numbers[~texts.are_mostly_shared(shared, near_threshold)])
    kept = ~by_similarity | np.isin(leaks.text, confirmed)
    return OverlapMatches(*(column[kept] for column in leaks))


class ComparedTexts:
    """MinHash keys, shingles and hashes of the rows in a mask, for a search of near-duplicates. Keys and shingles are
    in files to save memory.

    Args:
        folder: folder for the files.
        mask: mask of the rows, bool (N).

    Attributes:
        numbers: numbers of the rows, ascending. All other arrays are indexed by place in this one.
        keys: MinHash keys, uint64 (bands, rows).
        sizes: number of shingles of each row.
        operators, content: see `find_near`.
    """

    def __init__(self, folder: Path, rows: SpoolRows, mask: ndarray) -> None:
        self.numbers = np.flatnonzero(mask)
        self.keys = np.memmap(folder / "keys", np.uint64, "w+", shape=(BANDS, len(self.numbers)))
        parts = list[tuple[ndarray, ndarray, ndarray]]()
        start = 0
        with (folder / "shingles").open("wb") as file:
            for _, texts in rows.iter_texts(mask, "both"):
                sets = build_shingles(texts)
                file.write(sets.values.tobytes())
                self.keys[:, start : start + len(sets)] = compute_band_keys(sets).T
                content = get_first_bits(digest_normalised_texts(texts).view(np.uint8).reshape(-1, 16))
                parts.append((sets.sizes, hash_numbers(texts), content))
                start += len(sets)
        self.sizes, self.operators, self.content = concatenate_columns(parts)
        self.ends = np.append(0, np.cumsum(self.sizes))
        self.values = np.memmap(folder / "shingles", np.uint64, "r") if self.ends[-1] else NO_HASHES

    def load_shingles(self, places: ndarray) -> Shingles:
        """Return the shingles of the rows at these places in `numbers`."""
        parts = (self.values[self.ends[place] : self.ends[place + 1]] for place in places.tolist())
        return Shingles.from_sizes(concatenate(parts, NO_HASHES), self.sizes[places])

    def are_mostly_shared(self, shared: ndarray, near_threshold: float) -> ndarray:
        """Return whether each row may be similar to others mostly because of shared text, bool (rows).

        Args:
            shared: shared shingles, ascending.
            near_threshold: least Jaccard similarity.
        """
        is_mostly_shared = np.zeros(len(self.numbers), bool)
        for start in range(0, len(is_mostly_shared), 1024):
            sets = self.load_shingles(np.arange(start, min(start + 1024, len(is_mostly_shared))))
            is_mostly_shared[start : start + len(sets)] = 2 * sets.intersect(shared).sizes > near_threshold * sets.sizes
        return is_mostly_shared
