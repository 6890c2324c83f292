"""Questions of evaluation sets that stand in training texts, however they are disguised.

A text gives a question away by one of these rules, beside those of `align.data.dedup.evaluation_overlap`:

- `CONTAINED`: the whole question stands in it. Case, blanks, punctuation and prefixes such as `Q:` or `12.` do not
  count. A question that says little (`Who wrote Hamlet?`) must be a sentence or a line of the text, and one of everyday
  words (`Who are you?`) must be announced as a question there.
- `NGRAM`: they share a run of as many words as the 5th percentile of the set's examples has, between 8 and 13 (Brown et
  al. 2020, arXiv 2005.14165, appendix C). A run under 13 words that many rows of the set share is a phrase of theirs.
- `CHANGED`: the whole question stands in it but for one word that was changed, put in or left out: not a number, and
  not a word by which two questions of the set differ, as in `capital of France` and `capital of Spain`.

Words are hashed so that a question is recognised however it is written. Case, blanks and punctuation do not count, nor
whether `don't` is written `dont` or `well-known` `wellknown`: the hash of a run of words is the hash of its letters.
Digits of any script are those of ASCII. Numbers stay apart (`12, 3` is not `1, 23`), and an operator between numbers or
single letters counts: `5 + 3` is not `5 * 3`. A run is hashed as a polynomial of its letters modulo 2^64, so that the
hash of any run is had from two sums (Karp and Rabin 1987).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy import ndarray

from align.data.dedup.arrays import (
    NO_HASHES,
    NO_NUMBERS,
    HashTable,
    Texts,
    distinct,
    held,
    is_new,
    join,
    join_columns,
    ranges,
)
from align.data.dedup.evaluation_overlap import CHANGED, CONTAINED, NGRAM, Matches
from align.data.dedup.shingles import blocks, bounds_of_words, mixed, plain, shingled

PUNCTUATION = {
    **{chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F) if not chr(code).isalnum()},  # full width
    **dict.fromkeys("“”„‟«»‹›「」『』【】《》〈〉（）［］", '"'),
    **dict.fromkeys("‘’‚‛ʼ＇", "'"),
    **dict.fromkeys("。．｡।॥။។", "."),
    **dict.fromkeys("？؟¿՞;", "?"),
    **dict.fromkeys("！¡", "!"),
    **dict.fromkeys("：；؛", ":"),
    **dict.fromkeys("、，،､", ","),
    **dict.fromkeys("×✕·⋅＊", "*"),
    **dict.fromkeys("÷／∕", "/"),
    **dict.fromkeys("−－–", "-"),
    **dict.fromkeys("—―", ";"),
    "＋": "+",
    "＝": "=",
    "％": "%",
    "＜": "<",
    "＞": ">",
    "…": ".",
    "\u2028": "\n",
    "\u2029": "\n",
}
"""Punctuation and operators of other scripts, and their kin in ASCII."""
FOREIGN = re.compile(f"[{''.join(map(re.escape, PUNCTUATION))}]|(?![0-9])\\d")
KEPT = bytes(ord(chr(i).lower()) if i < 128 else i for i in range(256))
"""ASCII in lower case. Unlike `LOWER`, punctuation stays: it says where sentences end."""


def byte_table(characters: str) -> ndarray:
    """Return a table of 256 booleans that is true for these ASCII characters."""
    table = np.zeros(256, bool)
    table[[ord(character) for character in characters]] = True
    return table


IS_DIGIT = byte_table("0123456789")
IS_WORD = IS_DIGIT | byte_table("abcdefghijklmnopqrstuvwxyz") | (np.arange(256) > 127)
ENDS_SEGMENT = byte_table('.?!:;"()[]{}<>|*#`\n\r')
ENDS_LINE = byte_table("\n\r")
OF_NUMBERS = byte_table("+-*/^<>=%.")
"""Operators that count between two numbers."""
OF_LETTERS = byte_table("+*^<>=")
"""Operators that count between single letters, or a letter and a number."""
SEPARATED = 1
"""The tag of a number behind another number; an operator between them is its own tag."""

MULTIPLIER = 0x9E3779B97F4A7C15
CHUNK = 1 << 16


def powers(base: int) -> tuple[ndarray, ndarray]:
    """Return powers of a number modulo 2^64: the first `CHUNK`, and every `CHUNK`-th of the first 2^31."""

    def accumulated(factor: int, count: int) -> ndarray:
        factors = np.full(count, factor, np.uint64)
        factors[0] = 1
        return np.multiply.accumulate(factors)

    return accumulated(base, CHUNK), accumulated(pow(base, CHUNK, 1 << 64), 1 << 15)


POWERS = powers(MULTIPLIER)
INVERSES = powers(pow(MULTIPLIER, -1, 1 << 64))
LETTERS = mixed(np.arange(1, 257, dtype=np.uint64))
TAGS = mixed(np.arange(1001, 1257, dtype=np.uint64))
TAGS[0] = 0


def compute_power(table: tuple[ndarray, ndarray], exponents: ndarray) -> ndarray:
    return table[0][exponents & (CHUNK - 1)] * table[1][exponents >> 16]


BREAK = 1
LINE = 2
"""What stands before a word: nothing that ends a sentence (0), something that does, or the beginning of a line."""


@dataclass(frozen=True)
class WordBlock:
    """Words of some texts. Word `i` has the letters from `begins[i]` to `begins[i + 1]`.

    Attributes:
        letters: uint8, the letters and digits of all words, and 64 bytes of nothing behind them.
        begins: int64 (words + 1).
        first: int64 (texts + 1), the first word of each text.
        tags: uint8 (words), the operator before a number, or `SEPARATED`; 0 for none.
        breaks: uint8 (words + 1), 0, `BREAK` or `LINE`.
    """

    letters: ndarray
    begins: ndarray
    first: ndarray
    tags: ndarray
    breaks: ndarray
    _sums: ndarray

    def __len__(self) -> int:
        return len(self.tags)

    @cached_property
    def values(self) -> ndarray:
        """uint64 (words): the hash of each word alone."""
        words = np.arange(len(self))
        return self.runs(words, words + 1)

    @cached_property
    def text(self) -> ndarray:
        """int64 (words): the text of each word."""
        return np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))

    @cached_property
    def last(self) -> ndarray:
        """int64 (words): the word behind the last one of each word's text."""
        return np.repeat(self.first[1:], np.diff(self.first))

    @property
    def tagged(self) -> ndarray:
        """uint64 (words): the hash of each word with the operator before it."""
        return self.values + TAGS[self.tags]

    @cached_property
    def has_digit(self) -> ndarray:
        """bool (words): whether a word begins or ends with a digit."""
        return IS_DIGIT[self.letters[self.begins[:-1]]] | IS_DIGIT[self.letters[self.begins[1:] - 1]]

    def runs(self, start: ndarray, end: ndarray) -> ndarray:
        """Return hashes (uint64) of runs of words, from word `start` to before word `end`."""
        at = self.begins[start]
        sums = self._sums[end] - self._sums[start]
        tagged = np.flatnonzero(self.tags[start])  # what stands before the run is no part of it
        sums[tagged] -= TAGS[self.tags[start[tagged]]] * compute_power(POWERS, at[tagged])
        return mixed(sums * compute_power(INVERSES, at))

    def keys(self, words: ndarray, size: int) -> ndarray:
        """Return hashes (uint64) of the first `size` letters (4, or a multiple of 8 up to 64) from these words on."""
        eights = ndarray((len(self.letters) - 7,), "<u8", self.letters, strides=(1,))
        at = self.begins[words]
        if size < 8:
            return mixed(eights[at] & np.uint64((1 << 8 * size) - 1))
        keys = mixed(eights[at])
        for offset in range(8, size, 8):
            keys = mixed(keys * np.uint64(MULTIPLIER) ^ eights[at + offset])
        return keys


def fold(text: str) -> str:
    """Return a text that is not all ASCII, with punctuation and digits of ASCII."""

    def ascii_kin(match: re.Match[str]) -> str:
        return PUNCTUATION.get(match[0]) or str(unicodedata.decimal(match[0]))

    return plain(FOREIGN.sub(ascii_kin, text))


def word_blocks(texts: Texts) -> Iterator[WordBlock]:
    """Yield the words of texts, some texts at a time."""
    for data, starts in blocks(texts, fold, KEPT):
        yield parse_words(data, starts)


def parse_words(data: ndarray, starts: ndarray) -> WordBlock:
    """Return the words of one block of `align.data.dedup.shingles.blocks`."""
    is_letter = IS_WORD[data]
    inside = is_letter.copy()
    apostrophes = np.flatnonzero(data == ord("'"))
    apostrophes = apostrophes[(apostrophes > 0) & (apostrophes < len(data) - 1)]
    inside[apostrophes] = is_letter[apostrophes - 1] & is_letter[apostrophes + 1]
    opened, closed = bounds_of_words(inside, starts)
    letters = np.append(data[is_letter], np.zeros(64, np.uint8))
    inner = np.flatnonzero(inside & ~is_letter)  # apostrophes: no letters of the word
    sizes = closed - opened
    if len(inner):
        sizes -= np.searchsorted(inner, closed) - np.searchsorted(inner, opened)
    begins = np.append(0, np.cumsum(sizes))
    first = np.searchsorted(opened, starts)
    tags = find_tags(data, opened, closed, sizes, first)
    sums = letter_sums(letters[: begins[-1]], begins)
    tagged = np.flatnonzero(tags)
    if len(tagged):
        added = np.zeros(len(sums), np.uint64)
        added[tagged + 1] = TAGS[tags[tagged]] * compute_power(POWERS, begins[tagged])
        sums += np.cumsum(added)
    return WordBlock(letters, begins, first, tags, find_breaks(data, opened, first), sums)


def find_breaks(data: ndarray, opened: ndarray, first: ndarray) -> ndarray:
    """Return `WordBlock.breaks`."""
    breaks = np.zeros(len(opened) + 1, np.uint8)
    breaks[np.searchsorted(opened, np.flatnonzero(ENDS_SEGMENT[data]))] = BREAK
    dashes = np.flatnonzero(data == ord("-"))
    dashes = dashes[(dashes > 0) & (dashes < len(data) - 1)]
    dashes = dashes[(data[dashes - 1] == ord(" ")) & (data[dashes + 1] == ord(" "))]
    breaks[np.searchsorted(opened, dashes)] = BREAK
    breaks[np.searchsorted(opened, np.flatnonzero(ENDS_LINE[data]))] = LINE
    breaks[first] = LINE
    breaks[-1] = LINE
    return breaks


def find_tags(data: ndarray, opened: ndarray, closed: ndarray, sizes: ndarray, first: ndarray) -> ndarray:
    """Return `WordBlock.tags`."""
    tags = np.zeros(len(opened), np.uint8)
    if len(opened) < 2:
        return tags
    numeric_end = IS_DIGIT[data[closed - 1]]
    numeric_begin = IS_DIGIT[data[opened]]
    single = (sizes == 1) & ~numeric_begin
    operator = np.zeros(len(opened) + 1, np.uint8)
    places = np.flatnonzero(OF_NUMBERS[data])[::-1]  # of several operators the first one counts
    operator[np.searchsorted(opened, places)] = data[places]
    operator = operator[1:-1]
    gaps = opened[1:] - closed[:-1]
    operator[(operator == ord(".")) & (gaps != 1)] = 0
    numbers = (numeric_end[:-1] | numeric_begin[:-1]) & numeric_begin[1:]
    terms = (single[:-1] | numeric_begin[:-1] | numeric_end[:-1]) & (single[1:] | numeric_begin[1:])
    counted = operator * (numbers | (terms & OF_LETTERS[operator]))
    adjacent = numeric_end[:-1] & numeric_begin[1:]
    thousands = adjacent & (gaps == 1) & (data[closed[:-1]] == ord(",")) & (sizes[1:] == 3)
    tags[1:] = np.where(counted > 0, counted, (adjacent & ~thousands) * SEPARATED)
    tags[first[first < len(tags)]] = 0
    return tags


def letter_sums(letters: ndarray, begins: ndarray) -> ndarray:
    """Return the polynomial's sum up to each of `begins`, uint64."""
    sums = np.zeros(len(begins), np.uint64)
    total = np.uint64(0)
    for at in range(0, len(letters), CHUNK):
        part = letters[at : at + CHUNK]
        terms = LETTERS[part] * POWERS[0][: len(part)] * POWERS[1][at >> 16]
        reached = np.append(np.uint64(0), np.cumsum(terms)) + total
        low, high = np.searchsorted(begins, [at, at + len(part)])
        sums[low:high] = reached[begins[low:high] - at]
        total = reached[-1]
    sums[begins == len(letters)] = total
    return sums


WEIGHTS = np.zeros(256, np.int64)
WEIGHTS[ord("a") : ord("z") + 1] = 2
WEIGHTS[ord("0") : ord("9") + 1] = 6
WEIGHTS[0xC2:0xF5] = 2  # of a letter of several bytes, the first byte counts
WEIGHTS[0xE3] = 4
WEIGHTS[0xE4:0xEA] = 6
WEIGHTS[0xF0] = 6
"""What a letter says, in halves of an English letter: a digit three letters, a Chinese character three, kana two."""
COMMON_WORDS = (
    "a about all am an and any are as at be been but by can could day did do does doing for from get go going good "
    "had has have he her hers him his how i id if ill im in into is isnt it its ive just know let like make many me "
    "mean more most much my need no not now of on one or our out people please really say see she should so some tell "
    "than that thats the their them then there these they thing things think this time to today too up us want was "
    "way we well were what whats when where which who whom why will with would yes you your youre fun name old help "
    "hello hi hey ok okay yeah thanks thank love kind new two first"
)


def word_weights(block: WordBlock) -> ndarray:
    """Weigh each word, int64 (words), in halves of an English letter. Common words count half."""
    letters = np.append(0, np.cumsum(WEIGHTS[block.letters[: block.begins[-1]]]))
    weights = np.diff(letters[block.begins])
    return np.where(hash_words(COMMON_WORDS).holds(block.values), weights // 2, weights)


@lru_cache
def hash_words(words: str) -> HashTable:
    """Return the hashes of words, to be looked up."""
    (block,) = word_blocks(pa.array([words]))
    return HashTable.of_values(block.values)


def is_unspaced(block: WordBlock) -> ndarray:
    """Return whether each word is a letter of a script that writes no blanks (Han, kana, Thai, Lao, Khmer,
    Burmese)."""
    lead = block.letters[block.begins[:-1]]
    second = block.letters[block.begins[:-1] + 1]
    southern = ((lead == 0xE0) & (second >= 0xB8)) | ((lead == 0xE1) & np.isin(second, (0x80, 0x81, 0x82, 0x9E, 0x9F)))
    return ((lead >= 0xE3) & (lead <= 0xE9)) | (lead == 0xF0) | southern


QUESTION_PREFIXES = (
    "question q query problem prompt exercise task item quiz user human instruction input number no nr frage aufgabe "
    "pregunta problema domanda pergunta вопрос задача سؤال السؤال प्रश्न 问 题 問 題 질문 문제 คำถาม"
)
ANSWER_PREFIXES = "answer answers a response solution assistant output antwort respuesta réponse ответ الجواب 答 案 답"


def is_prefix(block: WordBlock, words: ndarray) -> ndarray:
    """Return whether each of these words announces a question or is a number of at most three digits."""
    sizes = block.begins[words + 1] - block.begins[words]
    begins = block.letters[block.begins[words]]
    ends = block.letters[block.begins[words + 1] - 1]
    numbered = (sizes <= 3) & IS_DIGIT[begins] & IS_DIGIT[ends]
    return numbered | hash_words(QUESTION_PREFIXES).holds(block.values[words])


PREFIX_WORDS = 4
"""Words of a prefix at most, such as `Question no. 12:`."""


def find_stripped_bounds(block: WordBlock) -> tuple[list[ndarray], list[ndarray]]:
    """Return where each text begins without 0, 1, … prefix words, and where it ends without 0, 1, … words of what
    announces an answer: int64 (texts), -1 where there is no such prefix or end."""
    start = block.first[:-1]
    end = block.first[1:]
    last = len(block) - 1
    if last < 0:
        return [start], [end]
    starts = [start]
    ends = [end]
    still = np.ones(len(start), bool)
    for count in range(PREFIX_WORDS):
        word = np.minimum(start + count, last)
        still = still & (start + count + 1 < end) & is_prefix(block, word)
        starts.append(np.where(still & (block.breaks[word + 1] > 0), start + count + 1, -1))
    still = np.ones(len(start), bool)
    for count in range(2):
        word = np.clip(end - 1 - count, 0, last)
        still = still & (end - 1 - count > start) & hash_words(ANSWER_PREFIXES).holds(block.values[word])
        ends.append(np.where(still & (block.breaks[word] > 0), end - 1 - count, -1))
    return starts, ends


def strip_prefixes(block: WordBlock) -> tuple[ndarray, ndarray]:
    """Return where each text begins and ends without prefixes, int64 (texts)."""
    starts, ends = find_stripped_bounds(block)
    start = np.max(starts, axis=0)
    end = ends[0]
    for shorter in ends[1:]:
        end = np.where((shorter > start) & (shorter >= 0), shorter, end)
    return start, end


pc: Any = pyarrow.compute  # whose functions are made when it is imported

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


class EvaluationTexts(NamedTuple):
    """The texts of an evaluation set.

    Attributes:
        said: texts that are compared with all that a row says.
        asked: texts that are compared with what a row asks, and looked for as a whole.
        said_by, asked_by: the number of the row of each, from 0, int64, ascending.
    """

    said: pa.ChunkedArray
    asked: pa.ChunkedArray
    said_by: ndarray
    asked_by: ndarray

    @classmethod
    def of_rows(cls, said: Sequence[pa.Array], asked: Sequence[pa.Array]) -> EvaluationTexts:
        """Return the texts of rows that have one of each, in pieces."""
        whole = pa.chunked_array(said, pa.string())
        rows = np.arange(len(whole))
        return cls(whole, pa.chunked_array(asked, pa.string()), rows, rows)


def run_width(counts: ndarray) -> int:
    """Return the words of a run for examples of these lengths."""
    if not len(counts):
        return WIDEST
    return int(np.clip(np.percentile(counts, PERCENTILE, method="lower"), LEAST_WIDTH, WIDEST))


class Questions:
    """Questions of one set, in arrays."""

    def __init__(self, given: pa.ChunkedArray, rows: ndarray) -> None:
        flags = np.zeros(0, bool)
        parts = [[NO_NUMBERS, NO_NUMBERS, NO_NUMBERS, NO_HASHES, NO_NUMBERS, flags, *(NO_HASHES for _ in KEY_SIZES)]]
        words = [[NO_HASHES, flags, NO_NUMBERS]]
        at = 0
        for block in word_blocks(given):
            start, end = strip_prefixes(block)
            kept = np.flatnonzero(end > start)
            start, end = start[kept], end[kept]
            counts = end - start
            weights = word_weights(block)
            says = count_between(weights, start, end)
            spread = 2 * count_between(is_unspaced(block), start, end) > counts
            keys = (block.keys(start, size) for size in KEY_SIZES)
            letters = block.begins[end] - block.begins[start]
            parts.append([kept + at, letters, counts, block.runs(start, end), says, spread, *keys])
            chosen = ranges(start, counts)
            words.append([block.tagged[chosen], block.has_digit[chosen], weights[chosen]])
            at += len(block.first) - 1
        columns = join_columns(parts)
        self.owner, self.letters, self.counts, self.value, self.says, self.unspaced, *self.keys = columns
        self.row = rows[self.owner]
        self.words, self.digits, self.weights = join_columns(words)
        self.offset = np.append(0, np.cumsum(self.counts)).astype(np.int64)

    def firsts(self) -> tuple[ndarray, ndarray]:
        """Return the first question of each wording, and how many rows ask it."""
        order = np.lexsort((self.row, self.value))
        new = is_new(self.value[order])
        other = is_new(self.value[order], self.row[order])
        first = np.minimum.reduceat(order, np.flatnonzero(new)) if len(order) else order
        return first, np.bincount(np.cumsum(new) - 1, other).astype(np.int64)


def count_between(counts: ndarray, start: ndarray, end: ndarray) -> ndarray:
    """Return the sums of an array's values from each place to before another one."""
    sums = np.append(0, np.cumsum(counts))
    return sums[end] - sums[start]


class QuestionIndex:
    """One evaluation set, to be asked for the training texts that give its questions away.

    Args:
        number: of the set.
    """

    def __init__(self, given: EvaluationTexts, number: int) -> None:
        self.number = number
        self.questions = questions = Questions(given.asked, given.asked_by)
        first, asked_by = questions.firsts()
        generic = np.zeros(len(questions.owner), bool)
        generic[first] = asked_by > GENERIC
        self._says = np.where(generic, 0, questions.says)
        self._by_key = list[tuple[int, HashTable]]()
        left = np.zeros(len(questions.owner), bool)
        left[first] = True
        for number, size in enumerate(KEY_SIZES):
            chosen = np.flatnonzero(left & (questions.letters >= size))
            left[chosen] = False
            if len(chosen):
                self._by_key.append((size, HashTable.sort(questions.keys[number][chosen], chosen)))
        # The first letters of questions that have `BEGINNING` of them: what a word is looked up by first.
        long = first[questions.letters[first] >= BEGINNING]
        self._beginnings = HashTable.of_values(questions.keys[KEY_SIZES.index(BEGINNING)][long])
        self._runs = self._run_tables(given)
        self._halves: dict[int, HashTable] = {}
        self._anchors = HashTable.of_values(NO_HASHES)
        self._slots = NO_NUMBERS
        self._index_halves(first[asked_by <= GENERIC], given.asked)

    def _run_tables(self, given: EvaluationTexts) -> list[tuple[int, HashTable]]:
        """Return runs of words, and of letters without blanks: their width, and the first row that has each."""
        blocks = [*word_blocks(given.said)]
        counts = join(np.diff(block.first) for block in blocks)
        lengths = np.zeros(int(given.said_by.max(initial=-1)) + 1, np.int64)
        np.maximum.at(lengths, given.said_by, counts)
        self.width = run_width(lengths[lengths > 0])
        tables = []
        for width, of_letters in ((self.width, False), (UNSPACED_WIDTH, True)):
            found = [(NO_HASHES, NO_NUMBERS)]
            at = 0
            for block in blocks:
                starts = run_starts(block, width)
                if of_letters:
                    enough = count_between(is_unspaced(block), starts, starts + width) == width
                else:
                    enough = count_between(word_weights(block), starts, starts + width) >= RUN_SAYS
                starts = starts[enough]
                found.append((block.runs(starts, starts + width), block.text[starts] + at))
                at += len(block.first) - 1
            values, owners = join_columns(found)
            if (of_letters or width < WIDEST) and len(values):
                tables.append((width, HashTable(*select_rows(values, given.said_by[owners]))))
        return tables

    def _index_halves(self, chosen: ndarray, given: pa.ChunkedArray) -> None:
        """Index the halves of questions: where one word is changed, one half stays as it is. Then find the words by
        which questions of the set differ."""
        questions = self.questions
        least = np.where(questions.unspaced, CHANGED_LETTERS[0], CHANGED_WORDS[0])
        most = np.where(questions.unspaced, CHANGED_LETTERS[1], CHANGED_WORDS[1])
        fits = (questions.counts >= least) & (questions.counts <= most) & (self._says >= CHANGED_SAYS)
        chosen = chosen[fits[chosen]]
        if not len(chosen):
            return
        number_of = {int(questions.owner[q]): int(q) for q in chosen}
        found: dict[int, list[tuple[ndarray, ndarray]]] = {}
        anchors = []
        at = 0
        for block in word_blocks(given):
            start, end = strip_prefixes(block)
            local = np.array([i for i in range(len(start)) if i + at in number_of], np.int64)
            numbers = np.array([number_of[i + at] for i in local.tolist()], np.int64)
            at += len(start)
            begin, stop = start[local], end[local]
            middle = begin + (stop - begin) // 2
            for side, (low, high) in enumerate(((begin, middle), (middle, stop))):
                anchors.append(block.runs(low, low + ANCHOR))
                values = block.runs(low, high)
                for length in np.unique(high - low).tolist():
                    these = high - low == length
                    found.setdefault(length, []).append((values[these], 2 * numbers[these] + side))
        for length, parts in found.items():
            values, numbers = join_columns(parts)
            _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
            few = counts[inverse] <= CROWDED
            self._halves[length] = HashTable.sort(values[few], numbers[few])
        self._anchors = HashTable.of_values(np.concatenate(anchors))
        slots = []
        for block in word_blocks(given):
            _, question, position = self._find_changed(block)
            slots.append(questions.offset[question] + position)
        self._slots = distinct(np.concatenate(slots))

    def find(self, texts: Texts) -> Matches:
        """Return the texts that give questions away."""
        parts = [(NO_NUMBERS, NO_NUMBERS, NO_NUMBERS)]
        at = 0
        for block in word_blocks(texts):
            words, question = self._find_contained(block)
            found = [(words, self.questions.row[question], CONTAINED)]
            for width, table in self._runs:
                starts = run_starts(block, width)
                places, row = table.find(block.runs(starts, starts + width))
                found.append((starts[places], row, NGRAM))
            words, question, position = self._find_changed(block)
            differs = ~held(self._slots, self.questions.offset[question] + position)
            found.append((words[differs], self.questions.row[question[differs]], CHANGED))
            parts += [(block.text[words] + at, row, np.full(len(words), rule)) for words, row, rule in found]
            at += len(block.first) - 1
        text, row, rule = join_columns(parts)
        return Matches(text, np.full(len(text), self.number), row, rule)

    def _find_contained(self, block: WordBlock) -> tuple[ndarray, ndarray]:
        """Return words at which questions stand, and these questions."""
        found = [(NO_NUMBERS, NO_NUMBERS)]
        everywhere = np.arange(len(block))
        begun = everywhere[self._beginnings.may_hold(block.keys(everywhere, BEGINNING))]
        for size, table in self._by_key:
            places = begun if size >= BEGINNING else everywhere
            words, question = table.find(block.keys(places, size))
            words = places[words]
            stop = block.begins[words] + self.questions.letters[question]
            end = np.minimum(np.searchsorted(block.begins, stop), len(block))
            whole = np.flatnonzero((block.begins[end] == stop) & (end <= block.last[words]))
            same = block.runs(words[whole], end[whole]) == self.questions.value[question[whole]]
            words, question, end = (column[whole[same]] for column in (words, question, end))
            good = is_in_place(block, words, end, self._says[question])
            found.append((words[good], question[good]))
        words, question = join_columns(found)
        return words, question

    def _find_changed(self, block: WordBlock) -> tuple[ndarray, ndarray, ndarray]:
        """Return words at which halves of questions stand, the questions, and the first word of each that is
        changed."""
        found = [(NO_NUMBERS, NO_NUMBERS, NO_NUMBERS)]
        if not self._halves:
            return found[0]
        starts = run_starts(block, ANCHOR)
        starts = starts[self._anchors.holds(block.runs(starts, starts + ANCHOR))]
        for length, table in sorted(self._halves.items()):
            inside = starts[starts + length <= block.last[starts]]
            places, numbers = table.find(block.runs(inside, inside + length))
            words = inside[places]
            for low in range(0, len(words), AT_ONCE):
                some = slice(low, low + AT_ONCE)
                found.append(self._verify_changes(block, words[some], numbers[some] >> 1, numbers[some] & 1))
        words, question, position = join_columns(found)
        return words, question, position

    def _verify_changes(
        self, block: WordBlock, words: ndarray, question: ndarray, side: ndarray
    ) -> tuple[ndarray, ndarray, ndarray]:
        """Return the halves of questions at some words whose other half is there too, but for one change."""
        questions = self.questions
        count = questions.counts[question]
        half = count // 2
        is_first = side == 0
        rest = np.where(is_first, count - half, half)
        step = np.where(is_first, 1, -1)
        # The other half, from the known half outwards.
        question_at = questions.offset[question] + np.where(is_first, half, half - 1)
        text_at = np.where(is_first, words + half, words - 1)
        number = np.searchsorted(block.first, words, "right") - 1
        available = np.where(is_first, block.first[number + 1] - text_at, text_at - block.first[number] + 1)
        span = np.where(questions.unspaced[question], CHANGED_SPAN[1], CHANGED_SPAN[0])
        most = int(span.max(initial=0))
        widest = int(rest.max(initial=0)) + most
        column = np.arange(widest)
        asked = take_near(questions.words, question_at[:, None] + step[:, None] * column)
        given = take_near(block.tagged, text_at[:, None] + step[:, None] * column)
        there = (column < rest[:, None]) & (column < available[:, None])
        before = np.cumprod((asked == given) & there, axis=1).sum(axis=1)
        accepted = np.zeros(len(words), bool)
        position = np.zeros(len(words), np.int64)
        for shift in range(-most, most + 1):
            reach = rest + shift
            equal = take_backwards(asked, rest, column) == take_backwards(given, reach, column)
            equal &= column < np.minimum(rest, reach)[:, None] - before[:, None]
            behind = np.cumprod(equal, axis=1).sum(axis=1)
            changed = rest - before - behind
            written = reach - before - behind
            good = (np.abs(shift) <= span) & (changed <= span) & (written >= 0) & (written <= span)
            good &= (reach <= available) & (reach >= 0) & (changed >= 0)
            first_asked = np.where(is_first, question_at + before, question_at - before - changed + 1)
            first_given = np.where(is_first, text_at + before, text_at - before - written + 1)
            asked_span = bound_span(first_asked, changed, len(questions.words))
            given_span = bound_span(first_given, written, len(block))
            good &= count_between(questions.digits, *asked_span) == 0
            good &= count_between(block.has_digit, *given_span) == 0
            good &= questions.says[question] - count_between(questions.weights, *asked_span) >= CHANGED_SAYS
            # A change at the edge is one only where the sentence begins or ends there.
            edge = np.where(is_first, given_span[1], given_span[0])
            good &= (behind > 0) | (block.breaks[edge] >= BREAK)
            new = good & ~accepted
            position[new] = (asked_span[0] - questions.offset[question])[new]
            accepted |= good & (changed + written > 0)
        return words[accepted], question[accepted], position[accepted]


def take_near(values: ndarray, places: ndarray) -> ndarray:
    """Return the values at some places; at places outside, those at the ends."""
    return values[np.clip(places, 0, len(values) - 1)]


def take_backwards(rows: ndarray, ends: ndarray, column: ndarray) -> ndarray:
    """Return the values of each row backwards from its end."""
    return np.take_along_axis(rows, np.clip(ends[:, None] - 1 - column, 0, len(column) - 1), 1)


def bound_span(first: ndarray, count: ndarray, most: int) -> tuple[ndarray, ndarray]:
    """Return the first and the last of so many words, none behind the last word of all."""
    first = np.clip(first, 0, most)
    return first, np.clip(first + count, 0, most)


def is_in_place(block: WordBlock, words: ndarray, end: ndarray, says: ndarray) -> ndarray:
    """Return whether questions that say so much count where they stand, bool."""
    begun = block.breaks[words] >= BREAK
    ended = block.breaks[end] >= BREAK
    before = np.maximum(words - 1, 0)
    announced = begun & ended & (words > 0) & hash_words(QUESTION_PREFIXES).holds(block.values[before])
    line = (block.breaks[words] == LINE) & (block.breaks[end] == LINE)
    conditions = [says >= SAYS_ENOUGH, says >= SAYS_SOME, says >= SAYS_LITTLE, says >= SAYS_LEAST]
    return np.select(conditions, [np.ones(len(words), bool), begun | ended, begun & ended, line | announced], announced)


def run_starts(block: WordBlock, width: int) -> ndarray:
    """Return the words from which on a text has `width` words."""
    counts = np.maximum(np.diff(block.first) - width + 1, 0)
    return ranges(block.first[:-1], counts)


def select_rows(values: ndarray, rows: ndarray) -> tuple[ndarray, ndarray]:
    """Return each hash once, in ascending order, with the first row that has it, without those that more than `SHARED`
    rows have."""
    order = np.lexsort((rows, values))
    values, rows = values[order], rows[order]
    new = is_new(values)
    other = is_new(values, rows)
    few = np.add.reduceat(other.astype(np.int64), np.flatnonzero(new)) <= SHARED
    return values[new][few], rows[new][few]


LEAST_BAG = 6
"""Words of a question with choices, at least, for it to be known in any order of these."""
SOUTHERN = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\\s]+")
"""Thai, Lao, Khmer and Burmese: each letter is a word for `align.data.dedup.shingles`, and says little."""


def letter_runs(texts: pa.ChunkedArray, width: int) -> ndarray:
    """Return hashes, ascending, of runs of `width` letters in such scripts, as `align.data.dedup.shingles` makes them:
    a few words, and no leak."""
    foreign = texts.filter(pc.invert(pc.string_is_ascii(texts)))
    fragments = [fragment for text in foreign.to_pylist() if text for fragment in SOUTHERN.findall(text)]
    return distinct(shingled(pa.array(fragments, pa.string()), width).values)


class QuestionKeys(NamedTuple):
    """Keys of texts that ask something.

    Attributes:
        text: int64, ascending: the number of the text.
        key: uint64. A text has several: with and without prefixes.
    """

    text: ndarray
    key: ndarray


def evaluation_keys(texts: Texts) -> QuestionKeys:
    """Return the keys of questions without prefixes, and of their words in any order. A text without words has none."""
    return question_keys(texts, lambda block: [strip_prefixes(block)])


def hash_asked(texts: Texts) -> QuestionKeys:
    """Return the keys of what training rows ask: with and without each prefix that they have, and their words in any
    order."""
    return question_keys(texts, lambda block: product(*find_stripped_bounds(block)))


def question_keys(texts: Texts, bounds: Callable[[WordBlock], Iterable[tuple[ndarray, ndarray]]]) -> QuestionKeys:
    """Return the keys of texts.

    Args:
        bounds: the words from which and up to which each text of a block is looked at.
    """
    parts = [(NO_NUMBERS, NO_HASHES)]
    at = 0
    for block in word_blocks(texts):
        for start, end in bounds(block):
            some = np.flatnonzero((start >= 0) & (end > start))
            if len(some):
                parts.append((some + at, block.runs(start[some], end[some])))
        several, bags = bag_keys(block)
        parts.append((several + at, bags))
        at += len(block.first) - 1
    text, key = join_columns(parts)
    order = np.argsort(text, kind="stable")
    return QuestionKeys(text[order], key[order])


def bag_keys(block: WordBlock) -> tuple[ndarray, ndarray]:
    """Return texts that list choices, of at least `LEAST_BAG` words, and hashes of these in any order: without single
    letters and what announces questions and answers."""
    texts = block.first[:-1], block.first[1:]
    sizes = np.diff(block.begins)
    letters = block.letters[block.begins[:-1]]
    lines = count_between(block.breaks[:-1] == LINE, *texts)
    listed = (lines > 2) | (count_between((sizes == 1) & (letters > ord("a")), *texts) > 1)
    if not listed.any():
        return NO_NUMBERS, NO_HASHES
    words = np.flatnonzero(np.repeat(listed, np.diff(block.first)))
    alone = (sizes[words] == 1) & (letters[words] >= ord("a"))
    values = block.runs(words, words + 1)
    counts = ~alone & ~hash_words(f"{QUESTION_PREFIXES} {ANSWER_PREFIXES}").holds(values)
    words, values = words[counts], values[counts]
    counted = np.zeros(len(block), bool)
    counted[words] = True
    hashes = np.zeros(len(block) + 1, np.uint64)
    hashes[words + 1] = mixed(values)
    sums = np.cumsum(hashes)
    several = np.flatnonzero(listed & (count_between(counted, *texts) >= LEAST_BAG))
    return several, mixed(sums[block.first[several + 1]] - sums[block.first[several]])
