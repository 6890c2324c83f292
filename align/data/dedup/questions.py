"""Questions of evaluation sets that stand in training texts, however they are disguised.

A text gives a question away by one of these rules, beside those of `align.data.dedup.contamination`:

- `CONTAINED`: the whole question stands in it. Case, blanks, punctuation and prefixes such as `Q:` or `12.` do not
  count (`align.data.dedup.question_words`). A question that says little (`Who wrote Hamlet?`) must be a sentence or a
  line of the text, and one of everyday words (`Who are you?`) must be announced as a question there.
- `RUN`: they share a run of as many words as the 5th percentile of the set's examples has, between 8 and 13 (Brown et
  al. 2020, arXiv 2005.14165, appendix C). A run under 13 words that many rows of the set share is a phrase of theirs.
- `CHANGED`: the whole question stands in it but for one word that was changed, put in or left out: not a number, and
  not a word by which two questions of the set differ, as in `capital of France` and `capital of Spain`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute

from align.data.dedup.arrays import held, ranges
from align.data.dedup.hash_table import HashTable
from align.data.dedup.question_words import (
    BREAK,
    LINE,
    TAGS,
    WordBlock,
    all_prefixes,
    find_stripped_bounds,
    is_unspaced,
    question_prefixes,
    strip_prefixes,
    word_blocks,
    word_weights,
)
from align.data.dedup.shingles import shingled
from align.data.dedup.words import mixed

pc: Any = pyarrow.compute  # whose functions are made when it is imported

CONTAINED, RUN, CHANGED = range(3)
RULES = ("contained", "ngram", "changed")
"""Their names, by number."""
LEAST_WIDTH = 8
WIDEST = 13
PERCENTILE = 5
SAYS_ENOUGH = 32
SAYS_SOME = 24
SAYS_LITTLE = 19
SAYS_LEAST = 14
"""What a question says (`word_weights`) from which on it is looked for anywhere; where a sentence begins or ends with
it; as a sentence of its own; and as a line or turn of its own."""
RUN_SAYS = 56
"""What a run of words says at least: eight letters of Thai are one or two words."""
UNSPACED_WIDTH = 40
"""Letters of a run in a script that writes no blanks and whose letters say little."""
GENERIC = 3
SHARED = 1
"""Rows of a set that may ask the same before it is no question of its own (`Which of these is true?`), and that may
share a run of fewer than `WIDEST` words before it is a phrase."""
KEY_SIZES = (64, 32, 16, 8, 4)
"""Letters by which questions are looked up: of these the most that a question has."""
BEGINNING = 8
ANCHOR = 2
"""Words by which halves of questions are looked up."""
CHANGED_WORDS = (4, 26)
CHANGED_LETTERS = (8, 60)
"""Words of a question of which one may be changed; letters, in a script without blanks."""
CHANGED_SPAN = (1, 4)
"""Words that may be changed together; letters, in a script without blanks."""
CHANGED_SAYS = 24
"""What the unchanged words of such a question say at least."""
CROWDED = 32
"""Questions of a set that may share a half before it is a template."""
AT_ONCE = 1 << 15


class Matches(NamedTuple):
    """Texts, each with an evaluation text that it gives away.

    Attributes:
        text: int64, the number of the text.
        owner: int64, the number of the evaluation text.
        rule: int64.
    """

    text: np.ndarray
    owner: np.ndarray
    rule: np.ndarray


@dataclass(frozen=True)
class QuestionSet:
    """An evaluation set.

    Attributes:
        questions: the texts that are looked for as a whole.
        question_rows: int64, the row of each.
        texts, text_rows: all texts of the set, whose runs of words are looked for, and the row of each.
    """

    questions: pa.ChunkedArray
    question_rows: np.ndarray
    texts: pa.ChunkedArray
    text_rows: np.ndarray


def run_width(counts: np.ndarray) -> int:
    """Words of a run for examples of these lengths."""
    if not len(counts):
        return WIDEST
    return int(np.clip(np.percentile(counts, PERCENTILE, method="lower"), LEAST_WIDTH, WIDEST))


class Questions:
    """Questions of one set, in arrays."""

    def __init__(self, given: pa.ChunkedArray, rows: np.ndarray) -> None:
        hashes = np.zeros(0, np.uint64)
        numbers = np.zeros(0, np.int64)
        flags = np.zeros(0, bool)
        parts = [[numbers, numbers, numbers, hashes, numbers, flags, *(hashes for _ in KEY_SIZES)]]
        words = [[hashes, flags, numbers]]
        at = 0
        for block in word_blocks(given):
            start, end = strip_prefixes(block)
            weights = np.append(0, np.cumsum(word_weights(block)))
            unspaced = np.append(0, np.cumsum(is_unspaced(block)))
            kept = np.flatnonzero(end > start)
            start = start[kept]
            end = end[kept]
            keys = np.zeros((len(KEY_SIZES), len(kept)), np.uint64)
            letters = block.begins[end] - block.begins[start]
            for number, size in enumerate(KEY_SIZES):
                keys[number] = block.keys(start, size)
            counts = end - start
            spread = 2 * (unspaced[end] - unspaced[start]) > counts
            parts.append(
                [kept + at, letters, counts, block.runs(start, end), weights[end] - weights[start], spread, *keys]
            )
            chosen = ranges(start, counts)
            tagged = block.values + TAGS[block.tags]
            words.append([tagged[chosen], block.has_digit[chosen], np.diff(weights)[chosen]])
            at += len(block.first) - 1
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        self.owner, self.letters, self.counts, self.value, self.says, self.unspaced, *self.keys = columns
        self.row = rows[self.owner]
        self.words, self.digits, self.weights = (np.concatenate(column) for column in zip(*words, strict=True))
        self.offset = np.append(0, np.cumsum(self.counts)).astype(np.int64)

    def firsts(self) -> tuple[np.ndarray, np.ndarray]:
        """The first question of each wording, and how many rows ask it."""
        order = np.lexsort((self.row, self.value))
        value = self.value[order]
        row = self.row[order]
        new = np.ones(len(order), bool)
        new[1:] = value[1:] != value[:-1]
        other = new.copy()
        other[1:] |= row[1:] != row[:-1]
        group = np.cumsum(new) - 1
        first = np.minimum.reduceat(order, np.flatnonzero(new)) if len(order) else order
        return first, np.bincount(group, other).astype(np.int64)


class QuestionIndex:
    """One evaluation set, to be asked for the training texts that give its questions away."""

    def __init__(self, given: QuestionSet) -> None:
        self.questions = Questions(given.questions, given.question_rows)
        first, asked_by = self.questions.firsts()
        generic = np.zeros(len(self.questions.owner), bool)
        generic[first] = asked_by > GENERIC
        self._says = np.where(generic, 0, self.questions.says)
        self._by_key = self._key_tables(first)
        self._beginnings = self._beginning_table(first)
        self._runs = self._run_tables(given)
        self._halves: dict[int, HashTable] = {}
        self._anchors = HashTable.sort(np.zeros(0, np.uint64), np.zeros(0, np.int64))
        self._slots = np.zeros(0, np.int64)
        self._index_halves(first[asked_by <= GENERIC], given)

    def _key_tables(self, first: np.ndarray) -> list[tuple[int, HashTable]]:
        tables = []
        left = np.zeros(len(self.questions.owner), bool)
        left[first] = True
        for number, size in enumerate(KEY_SIZES):
            chosen = np.flatnonzero(left & (self.questions.letters >= size))
            left[chosen] = False
            if len(chosen):
                tables.append((size, HashTable.sort(self.questions.keys[number][chosen], chosen)))
        return tables

    def _beginning_table(self, first: np.ndarray) -> HashTable:
        """The first letters of questions that have `BEGINNING` of them: what a word is looked up by first."""
        long = first[self.questions.letters[first] >= BEGINNING]
        keys = np.unique(self.questions.keys[KEY_SIZES.index(BEGINNING)][long])
        return HashTable.sort(keys, np.arange(len(keys)))

    def _run_tables(self, given: QuestionSet) -> list[tuple[int, bool, HashTable]]:
        """Runs of words: their width, whether of letters without blanks, and who has them."""
        spaced = list[tuple[np.ndarray, np.ndarray]]()
        unspaced = list[tuple[np.ndarray, np.ndarray]]()
        at = 0
        blocks = [*word_blocks(given.texts)]
        counts = np.concatenate([np.zeros(0, np.int64), *(np.diff(block.first) for block in blocks)])
        lengths = np.zeros(int(given.text_rows.max(initial=-1)) + 1, np.int64)
        np.maximum.at(lengths, given.text_rows, counts)
        self.width = run_width(lengths[lengths > 0])
        for block in blocks:
            for width, found, letters in ((self.width, spaced, False), (UNSPACED_WIDTH, unspaced, True)):
                starts = run_starts(block, width)
                weights = np.append(0, np.cumsum(word_weights(block)))
                without_blanks = np.append(0, np.cumsum(is_unspaced(block)))
                many = without_blanks[starts + width] - without_blanks[starts]
                enough = (many == width) if letters else weights[starts + width] - weights[starts] >= RUN_SAYS
                starts = starts[enough]
                found.append((block.runs(starts, starts + width), block.text[starts] + at))
            at += len(block.first) - 1
        tables = []
        for width, letters, found in ((self.width, False, spaced), (UNSPACED_WIDTH, True, unspaced)):
            values = np.concatenate([np.zeros(0, np.uint64), *(value for value, _ in found)])
            owners = np.concatenate([np.zeros(0, np.int64), *(owner for _, owner in found)])
            if (letters or width < WIDEST) and len(values):
                values, owners = select_owners(values, owners, given.text_rows, SHARED)
                tables.append((width, letters, HashTable.sort(values, owners)))
        return tables

    def _index_halves(self, chosen: np.ndarray, given: QuestionSet) -> None:
        """Index the halves of questions: where one word is changed, one half stays as it is. Then find the words by
        which questions of the set differ."""
        questions = self.questions
        limits = np.where(questions.unspaced[:, None], np.array(CHANGED_LETTERS), np.array(CHANGED_WORDS)).reshape(
            -1, 2
        )
        fits = (questions.counts >= limits[:, 0]) & (questions.counts <= limits[:, 1])
        chosen = chosen[fits[chosen] & (self._says[chosen] >= CHANGED_SAYS)]
        if not len(chosen):
            return
        wanted = set(questions.owner[chosen].tolist())
        found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        number_of = {int(questions.owner[q]): int(q) for q in chosen}
        anchors = []
        at = 0
        for block in word_blocks(given.questions):
            start, end = strip_prefixes(block)
            local = np.array([i for i in range(len(start)) if i + at in wanted], np.int64)
            numbers = np.array([number_of[i + at] for i in local.tolist()], np.int64)
            at += len(start)
            if not len(local):
                continue
            begin = start[local]
            stop = end[local]
            middle = begin + (stop - begin) // 2
            for side, (low, high) in enumerate(((begin, middle), (middle, stop))):
                anchors.append(block.runs(low, low + ANCHOR))
                values = block.runs(low, high)
                for length in np.unique(high - low).tolist():
                    these = high - low == length
                    found.setdefault(length, []).append((values[these], 2 * numbers[these] + side))
        for length, parts in found.items():
            values, numbers = (np.concatenate(column) for column in zip(*parts, strict=True))
            _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
            few = counts[inverse] <= CROWDED
            self._halves[length] = HashTable.sort(values[few], numbers[few])
        unique = np.unique(np.concatenate(anchors))
        self._anchors = HashTable.sort(unique, np.arange(len(unique)))
        slots = []
        for block in word_blocks(given.questions):
            _, question, position = self._find_changed(block)
            slots.append(self._slot(question, position))
        self._slots = np.unique(np.concatenate(slots))

    def _slot(self, question: np.ndarray, position: np.ndarray) -> np.ndarray:
        return self.questions.offset[question] + position

    def find(self, texts: pa.Array | pa.ChunkedArray) -> Matches:
        """The texts that give questions away. `owner` is a question's number for `CONTAINED` and `CHANGED`, and the
        number of another text of the set for `RUN`."""
        parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))]
        at = 0
        for block in word_blocks(texts):
            text = block.text
            words, question = self._find_contained(block)
            parts.append((text[words] + at, self.questions.owner[question], np.full(len(words), CONTAINED)))
            for width, _, table in self._runs:
                starts = run_starts(block, width)
                places, owner = table.find(block.runs(starts, starts + width))
                parts.append((text[starts[places]] + at, owner, np.full(len(owner), RUN)))
            words, question, position = self._find_changed(block)
            slots = held(self._slots, self._slot(question, position))
            changed = self.questions.owner[question[~slots]]
            parts.append((text[words[~slots]] + at, changed, np.full(len(changed), CHANGED)))
            at += len(block.first) - 1
        return Matches(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _find_contained(self, block: WordBlock) -> tuple[np.ndarray, np.ndarray]:
        """Words at which questions stand, and these questions."""
        found = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        everywhere = np.arange(len(block))
        begun = everywhere[self._beginnings.may_hold(block.keys(everywhere, BEGINNING))]
        last_word = np.repeat(block.first[1:], np.diff(block.first))
        for size, table in self._by_key:
            places = begun if size >= BEGINNING else everywhere
            words, question = table.find(block.keys(places, size))
            words = places[words]
            stop = block.begins[words] + self.questions.letters[question]
            end = np.minimum(np.searchsorted(block.begins, stop), len(block))
            whole = np.flatnonzero((block.begins[end] == stop) & (end <= last_word[words]))
            same = block.runs(words[whole], end[whole]) == self.questions.value[question[whole]]
            words, question, end = (column[whole[same]] for column in (words, question, end))
            good = self._is_in_place(block, words, end, self._says[question])
            found.append((words[good], question[good]))
        words, question = (np.concatenate(column) for column in zip(*found, strict=True))
        return words, question

    def _is_in_place(self, block: WordBlock, words: np.ndarray, end: np.ndarray, says: np.ndarray) -> np.ndarray:
        """bool: whether questions that say so much count where they stand."""
        begun = block.breaks[words] >= BREAK
        ended = block.breaks[end] >= BREAK
        before = np.maximum(words - 1, 0)
        announced = begun & ended & (words > 0) & question_prefixes().holds(block.values[before])
        line = (block.breaks[words] == LINE) & (block.breaks[end] == LINE)
        conditions = [says >= SAYS_ENOUGH, says >= SAYS_SOME, says >= SAYS_LITTLE, says >= SAYS_LEAST]
        return np.select(
            conditions, [np.ones(len(words), bool), begun | ended, begun & ended, line | announced], announced
        )

    def _find_changed(self, block: WordBlock) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Words at which halves of questions stand, the questions, and the first word of each that is changed."""
        none = np.zeros(0, np.int64)
        if not self._halves:
            return none, none, none
        starts = run_starts(block, ANCHOR)
        starts = starts[self._anchors.holds(block.runs(starts, starts + ANCHOR))]
        last_word = np.repeat(block.first[1:], np.diff(block.first))
        found = [(none, none, none)]
        for length, table in sorted(self._halves.items()):
            inside = starts[starts + length <= last_word[starts]]
            places, numbers = table.find(block.runs(inside, inside + length))
            words = inside[places]
            for low in range(0, len(words), AT_ONCE):
                some = slice(low, low + AT_ONCE)
                found.append(self._verify_changes(block, words[some], numbers[some] >> 1, numbers[some] & 1))
        words, question, position = (np.concatenate(column) for column in zip(*found, strict=True))
        return words, question, position

    def _verify_changes(
        self, block: WordBlock, words: np.ndarray, question: np.ndarray, side: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the halves of questions at some words whose other half is there too, but for one change."""
        questions = self.questions
        count = questions.counts[question]
        half = count // 2
        rest = np.where(side == 0, count - half, half)
        step = np.where(side == 0, 1, -1)
        # The other half, from the known half outwards.
        question_at = questions.offset[question] + np.where(side == 0, half, half - 1)
        text_at = np.where(side == 0, words + half, words - 1)
        number = np.searchsorted(block.first, words, "right") - 1
        low = block.first[number]
        high = block.first[number + 1]
        available = np.where(side == 0, high - text_at, text_at - low + 1)
        span = np.where(questions.unspaced[question], CHANGED_SPAN[1], CHANGED_SPAN[0])
        widest = int(rest.max(initial=0) + span.max(initial=0))
        column = np.arange(widest)
        tagged = block.values + TAGS[block.tags]
        asked = questions.words[np.clip(question_at[:, None] + step[:, None] * column, 0, len(questions.words) - 1)]
        given = tagged[np.clip(text_at[:, None] + step[:, None] * column, 0, len(tagged) - 1)]
        there = (column < rest[:, None]) & (column < available[:, None])
        before = np.cumprod((asked == given) & there, axis=1).sum(axis=1)
        accepted = np.zeros(len(words), bool)
        position = np.zeros(len(words), np.int64)
        weights = np.append(0, np.cumsum(questions.weights))
        question_digits = np.append(0, np.cumsum(questions.digits))
        text_digits = np.append(0, np.cumsum(block.has_digit))
        for shift in range(-int(span.max(initial=0)), int(span.max(initial=0)) + 1):
            reach = rest + shift
            backwards_asked = np.clip(rest[:, None] - 1 - column, 0, widest - 1)
            backwards_given = np.clip(reach[:, None] - 1 - column, 0, widest - 1)
            equal = np.take_along_axis(asked, backwards_asked, 1) == np.take_along_axis(given, backwards_given, 1)
            equal &= column < np.minimum(rest, reach)[:, None] - before[:, None]
            behind = np.cumprod(equal, axis=1).sum(axis=1)
            changed = rest - before - behind
            written = reach - before - behind
            good = (np.abs(shift) <= span) & (changed <= span) & (written >= 0) & (written <= span)
            good &= (reach <= available) & (reach >= 0) & (changed >= 0)
            first_asked = np.where(side == 0, question_at + before, question_at - before - changed + 1)
            first_given = np.where(side == 0, text_at + before, text_at - before - written + 1)
            first_asked = np.clip(first_asked, 0, len(questions.words))
            first_given = np.clip(first_given, 0, len(tagged))
            last_asked = np.clip(first_asked + changed, 0, len(questions.words))
            last_given = np.clip(first_given + written, 0, len(tagged))
            good &= question_digits[first_asked] == question_digits[last_asked]
            good &= text_digits[first_given] == text_digits[last_given]
            left = questions.says[question] - (weights[last_asked] - weights[first_asked])
            good &= left >= CHANGED_SAYS
            # A change at the edge is one only where the sentence begins or ends there.
            edge = np.where(side == 0, last_given, first_given)
            good &= (behind > 0) | (block.breaks[np.clip(edge, 0, len(tagged))] >= BREAK)
            position[good & ~accepted] = (first_asked - questions.offset[question])[good & ~accepted]
            accepted |= good & (changed + written > 0)
        return words[accepted], question[accepted], position[accepted]


def run_starts(block: WordBlock, width: int) -> np.ndarray:
    """The words from which on a text has `width` words."""
    counts = np.maximum(np.diff(block.first) - width + 1, 0)
    return ranges(block.first[:-1], counts)


def select_owners(values: np.ndarray, owners: np.ndarray, rows: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Each hash once with its first owner, without those that texts of more than `most` rows have."""
    order = np.lexsort((owners, values))
    values = values[order]
    owners = owners[order]
    new = np.ones(len(values), bool)
    new[1:] = values[1:] != values[:-1]
    other = new.copy()
    other[1:] |= rows[owners[1:]] != rows[owners[:-1]]
    counts = np.add.reduceat(other.astype(np.int64), np.flatnonzero(new))
    few = counts <= most
    return values[new][few], owners[new][few]


LEAST_BAG = 6
"""Words of a question with choices, at least, for it to be known in any order of these."""
SOUTHERN = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\\s]+")
"""Thai, Lao, Khmer and Burmese: each letter is a word for `align.data.dedup.words`, and says little."""


def letter_runs(texts: pa.ChunkedArray, width: int) -> np.ndarray:
    """Hashes, ascending, of runs of `width` letters in such scripts, as `align.data.dedup.shingles` makes them: a few
    words, and no leak."""
    foreign = texts.filter(pc.invert(pc.string_is_ascii(texts)))
    fragments = [fragment for text in foreign.to_pylist() if text for fragment in SOUTHERN.findall(text)]
    return np.unique(shingled(pa.array(fragments, pa.string()), width).values)


class QuestionKeys(NamedTuple):
    """Keys of texts that ask something.

    Attributes:
        text: int64, ascending: the number of the text.
        key: uint64. A text has several: with and without prefixes.
    """

    text: np.ndarray
    key: np.ndarray


def evaluation_keys(texts: pa.Array | pa.ChunkedArray) -> QuestionKeys:
    """Keys of questions without prefixes, and of their words in any order. A text without words has none."""
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.uint64))]
    at = 0
    for block in word_blocks(texts):
        start, end = strip_prefixes(block)
        some = np.flatnonzero(end > start)
        parts.append((some + at, block.runs(start[some], end[some])))
        several, bags = bag_keys(block)
        parts.append((several + at, bags))
        at += len(start)
    return order_keys(parts)


def hash_asked(texts: pa.Array | pa.ChunkedArray) -> QuestionKeys:
    """Keys of what training rows ask: with and without each prefix that they have, and their words in any order."""
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.uint64))]
    at = 0
    for block in word_blocks(texts):
        starts, ends = find_stripped_bounds(block)
        for start in starts:
            for end in ends:
                some = np.flatnonzero((start >= 0) & (end > start))
                if not len(some):
                    continue
                parts.append((some + at, block.runs(start[some], end[some])))
        several, bags = bag_keys(block)
        parts.append((several + at, bags))
        at += len(block.first) - 1
    return order_keys(parts)


def bag_keys(block: WordBlock) -> tuple[np.ndarray, np.ndarray]:
    """Texts that list choices, of at least `LEAST_BAG` words, and hashes of these in any order: without single letters
    and what announces questions and answers."""
    sizes = np.diff(block.begins)
    lettered = (sizes == 1) & (block.letters[block.begins[:-1]] > ord("a"))
    listed = (per_text(block, block.breaks[:-1] == LINE) > 2) | (per_text(block, lettered) > 1)
    if not listed.any():
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    words = np.flatnonzero(np.repeat(listed, np.diff(block.first)))
    alone = (sizes[words] == 1) & (block.letters[block.begins[words]] >= ord("a"))
    values = block.runs(words, words + 1)
    words, values = (column[~alone & ~all_prefixes().holds(values)] for column in (words, values))
    counted = np.zeros(len(block), bool)
    counted[words] = True
    hashes = np.zeros(len(block) + 1, np.uint64)
    hashes[words + 1] = mixed(values)
    sums = np.cumsum(hashes)
    several = np.flatnonzero(listed & (per_text(block, counted) >= LEAST_BAG))
    return several, mixed(sums[block.first[several + 1]] - sums[block.first[several]])


def per_text(block: WordBlock, marked: np.ndarray) -> np.ndarray:
    """Count the marked words of each text, int64."""
    totals = np.append(0, np.cumsum(marked))
    return totals[block.first[1:]] - totals[block.first[:-1]]


def order_keys(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> QuestionKeys:
    text, key = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(text, kind="stable")
    return QuestionKeys(text[order], key[order])
