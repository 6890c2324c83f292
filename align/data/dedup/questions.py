"""Detection of evaluation questions in training texts, also if they are reformatted or slightly changed.

These rules find a question in a text, besides those of `align.data.dedup.evaluation_overlap`:

- `CONTAINED`: the text contains the whole question. Case, blanks, punctuation and prefixes such as `Q:` or `12.` do not
  count. A short question (`Who wrote Hamlet?`) must be a sentence or a line of the text, and one of everyday
  words (`Who are you?`) must follow a prefix such as `Q:` there.
- `NGRAM`: both have a run of words in common. It has as many words as the 5th percentile of the set's examples has,
  between 8 and 13 (Brown et al. 2020, arXiv 2005.14165, appendix C). A run of fewer than 13 words that many rows of the
  set share is a phrase and does not count.
- `CHANGED`: the text contains the question with one word changed, inserted or left out. The word is not a number and
  not one by which two questions of the set differ, as in `capital of France` and `capital of Spain`.

Words are hashed so that a question is recognised in any formatting. Case, blanks and punctuation do not count, and
`don't` equals `dont` as `well-known` equals `wellknown`: the hash of a run of words is the hash of its letters.
Digits of any script are those of ASCII. Numbers stay apart (`12, 3` is not `1, 23`), and an operator between numbers or
single letters counts: `5 + 3` is not `5 * 3`. A run is hashed as a polynomial of its letters modulo 2^64, so that the
hash of any run is computed from two sums (Karp and Rabin 1987).
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
    concatenate,
    concatenate_columns,
    concatenate_ranges,
    differs_from_previous,
    is_in_sorted,
    sort_unique,
)
from align.data.dedup.evaluation_overlap import CHANGED, CONTAINED, NGRAM, OverlapMatches
from align.data.dedup.shingles import (
    build_shingles,
    find_word_bounds,
    fold_unicode,
    iter_byte_blocks,
    mix_bits_in_place,
)

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
"""Punctuation and operators of other scripts → their counterpart in ASCII."""
FOREIGN = re.compile(f"[{''.join(map(re.escape, PUNCTUATION))}]|(?![0-9])\\d")
LOWER_WITH_PUNCTUATION = bytes(ord(chr(i).lower()) if i < 128 else i for i in range(256))
"""Translation table of bytes that maps ASCII to lower case. Unlike with `LOWER`, punctuation stays: it marks the ends
of sentences."""


def build_byte_table(characters: str) -> ndarray:
    """Return a table of 256 booleans that is true at the codes of these ASCII characters."""
    table = np.zeros(256, bool)
    table[[ord(character) for character in characters]] = True
    return table


IS_DIGIT = build_byte_table("0123456789")
IS_WORD = IS_DIGIT | build_byte_table("abcdefghijklmnopqrstuvwxyz") | (np.arange(256) > 127)
ENDS_SEGMENT = build_byte_table('.?!:;"()[]{}<>|*#`\n\r')
ENDS_LINE = build_byte_table("\n\r")
NUMBER_OPERATORS = build_byte_table("+-*/^<>=%.")
"""Table of the bytes of operators that count between two numbers."""
LETTER_OPERATORS = build_byte_table("+*^<>=")
"""Table of the bytes of operators that count between single letters, or a letter and a number."""
SEPARATED = 1
"""Tag of a number after another number without an operator between them. If there is an operator, the tag is its
byte."""

MULTIPLIER = 0x9E3779B97F4A7C15
CHUNK = 1 << 16


def compute_powers(base: int) -> tuple[ndarray, ndarray]:
    """Return the powers of a number modulo 2^64 in two tables: the first `CHUNK`, and every `CHUNK`-th of the first
    2^31."""

    def accumulate(factor: int, count: int) -> ndarray:
        factors = np.full(count, factor, np.uint64)
        factors[0] = 1
        return np.multiply.accumulate(factors)

    return accumulate(base, CHUNK), accumulate(pow(base, CHUNK, 1 << 64), 1 << 15)


POWERS = compute_powers(MULTIPLIER)
INVERSES = compute_powers(pow(MULTIPLIER, -1, 1 << 64))
LETTERS = mix_bits_in_place(np.arange(1, 257, dtype=np.uint64))
TAGS = mix_bits_in_place(np.arange(1001, 1257, dtype=np.uint64))
TAGS[0] = 0


def compute_power(table: tuple[ndarray, ndarray], exponents: ndarray) -> ndarray:
    return table[0][exponents & (CHUNK - 1)] * table[1][exponents >> 16]


BREAK = 1
LINE = 2
"""Values of `WordBlock.breaks`: the word begins a sentence (`BREAK`) or a line (`LINE`). It is 0 inside a sentence."""


@dataclass(frozen=True)
class WordBlock:
    """The words of a block of texts, with the operators before numbers and the beginnings of sentences and lines. Word
    `i` has the letters from `begins[i]` to `begins[i + 1]`.

    Attributes:
        letters: uint8, the letters and digits of all words, and 64 zeros after them.
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
        """Hash of each word, uint64 (words)."""
        words = np.arange(len(self))
        return self.hash_runs_between(words, words + 1)

    @cached_property
    def text(self) -> ndarray:
        """Number of the text in the block that each word is in, int64 (words)."""
        return np.repeat(np.arange(len(self.first) - 1), np.diff(self.first))

    @cached_property
    def last(self) -> ndarray:
        """End (exclusive) of the text that each word is in, as a word number, int64 (words)."""
        return np.repeat(self.first[1:], np.diff(self.first))

    @property
    def tagged(self) -> ndarray:
        """Hash of each word together with the operator before it, uint64 (words)."""
        return self.values + TAGS[self.tags]

    @cached_property
    def has_digit_at_edge(self) -> ndarray:
        """True for each word that begins or ends with a digit, bool (words)."""
        return IS_DIGIT[self.letters[self.begins[:-1]]] | IS_DIGIT[self.letters[self.begins[1:] - 1]]

    def hash_runs_between(self, start: ndarray, end: ndarray) -> ndarray:
        """Return the hash of each run of words from `start` up to, but not including, `end`; uint64."""
        offsets = self.begins[start]
        sums = self._sums[end] - self._sums[start]
        tagged = np.flatnonzero(self.tags[start])  # the operator before the run is not part of it
        sums[tagged] -= TAGS[self.tags[start[tagged]]] * compute_power(POWERS, offsets[tagged])
        return mix_bits_in_place(sums * compute_power(INVERSES, offsets))

    def hash_beginnings(self, words: ndarray, size: int) -> ndarray:
        """Return the hash of the `size` letters that begin at each of these words, also across ends of words, uint64.

        Args:
            size: 4, or a multiple of 8 up to 64.
        """
        eights = ndarray((len(self.letters) - 7,), "<u8", self.letters, strides=(1,))
        offsets = self.begins[words]
        if size < 8:
            return mix_bits_in_place(eights[offsets] & np.uint64((1 << 8 * size) - 1))
        keys = mix_bits_in_place(eights[offsets])
        for offset in range(8, size, 8):
            keys = mix_bits_in_place(keys * np.uint64(MULTIPLIER) ^ eights[offsets + offset])
        return keys


def fold_question_text(text: str) -> str:
    """Return a text that is not all ASCII with its words normalised and its punctuation and digits replaced by ASCII
    ones."""

    def to_ascii(match: re.Match[str]) -> str:
        return PUNCTUATION.get(match[0]) or str(unicodedata.decimal(match[0]))

    return fold_unicode(FOREIGN.sub(to_ascii, text))


def iter_word_blocks(texts: Texts) -> Iterator[WordBlock]:
    """Split texts into words and hash them, and yield the words block by block."""
    for data, starts in iter_byte_blocks(texts, fold_question_text, LOWER_WITH_PUNCTUATION):
        yield parse_words(data, starts)


def parse_words(data: ndarray, starts: ndarray) -> WordBlock:
    """Find and hash the words in one block of bytes that `align.data.dedup.shingles.iter_byte_blocks` yields."""
    is_letter = IS_WORD[data]
    is_word_byte = is_letter.copy()
    apostrophes = np.flatnonzero(data == ord("'"))
    apostrophes = apostrophes[(apostrophes > 0) & (apostrophes < len(data) - 1)]
    is_word_byte[apostrophes] = is_letter[apostrophes - 1] & is_letter[apostrophes + 1]
    begin_bytes, end_bytes = find_word_bounds(is_word_byte, starts)
    letters = np.append(data[is_letter], np.zeros(64, np.uint8))
    skipped = np.flatnonzero(is_word_byte & ~is_letter)  # apostrophes, which are not letters of the word
    sizes = end_bytes - begin_bytes
    if len(skipped):
        sizes -= np.searchsorted(skipped, end_bytes) - np.searchsorted(skipped, begin_bytes)
    begins = np.append(0, np.cumsum(sizes))
    first = np.searchsorted(begin_bytes, starts)
    tags = find_tags(data, begin_bytes, end_bytes, sizes, first)
    sums = sum_letters(letters[: begins[-1]], begins)
    tagged = np.flatnonzero(tags)
    if len(tagged):
        tag_terms = np.zeros(len(sums), np.uint64)
        tag_terms[tagged + 1] = TAGS[tags[tagged]] * compute_power(POWERS, begins[tagged])
        sums += np.cumsum(tag_terms)
    return WordBlock(letters, begins, first, tags, find_breaks(data, begin_bytes, first), sums)


def find_breaks(data: ndarray, begin_bytes: ndarray, first: ndarray) -> ndarray:
    """Return for each word `LINE` if it begins a line, `BREAK` if it begins a sentence, else 0; uint8 (words + 1).

    Args:
        begin_bytes: offset of the first byte of each word.
        first: number of the first word of each text.
    """
    breaks = np.zeros(len(begin_bytes) + 1, np.uint8)
    breaks[np.searchsorted(begin_bytes, np.flatnonzero(ENDS_SEGMENT[data]))] = BREAK
    dashes = np.flatnonzero(data == ord("-"))
    dashes = dashes[(dashes > 0) & (dashes < len(data) - 1)]
    dashes = dashes[(data[dashes - 1] == ord(" ")) & (data[dashes + 1] == ord(" "))]
    breaks[np.searchsorted(begin_bytes, dashes)] = BREAK
    breaks[np.searchsorted(begin_bytes, np.flatnonzero(ENDS_LINE[data]))] = LINE
    breaks[first] = LINE
    breaks[-1] = LINE
    return breaks


def find_tags(data: ndarray, begin_bytes: ndarray, end_bytes: ndarray, sizes: ndarray, first: ndarray) -> ndarray:
    """Return for each word the operator before it if that counts, `SEPARATED` for a number after a number, else 0;
    uint8 (words). See `WordBlock.tags`.

    Args:
        begin_bytes, end_bytes: offsets of the first byte of each word, and of the byte after it.
        sizes: number of letters of each word.
        first: number of the first word of each text.
    """
    tags = np.zeros(len(begin_bytes), np.uint8)
    if len(begin_bytes) < 2:
        return tags
    ends_numeric = IS_DIGIT[data[end_bytes - 1]]
    begins_numeric = IS_DIGIT[data[begin_bytes]]
    is_single_letter = (sizes == 1) & ~begins_numeric
    operators = np.zeros(len(begin_bytes) + 1, np.uint8)
    # In reverse, so that the first of several operators between two words is the one that is stored last.
    places = np.flatnonzero(NUMBER_OPERATORS[data])[::-1]
    operators[np.searchsorted(begin_bytes, places)] = data[places]
    operators = operators[1:-1]
    gaps = begin_bytes[1:] - end_bytes[:-1]
    operators[(operators == ord(".")) & (gaps != 1)] = 0
    between_numbers = (ends_numeric[:-1] | begins_numeric[:-1]) & begins_numeric[1:]
    between_terms = (is_single_letter[:-1] | begins_numeric[:-1] | ends_numeric[:-1]) & (
        is_single_letter[1:] | begins_numeric[1:]
    )
    counted = operators * (between_numbers | (between_terms & LETTER_OPERATORS[operators]))
    is_behind_number = ends_numeric[:-1] & begins_numeric[1:]
    is_thousands = is_behind_number & (gaps == 1) & (data[end_bytes[:-1]] == ord(",")) & (sizes[1:] == 3)
    tags[1:] = np.where(counted > 0, counted, (is_behind_number & ~is_thousands) * SEPARATED)
    tags[first[first < len(tags)]] = 0
    return tags


def sum_letters(letters: ndarray, begins: ndarray) -> ndarray:
    """Return the sum of the hash polynomial over all letters before each offset in `begins`, modulo 2^64, uint64."""
    sums = np.zeros(len(begins), np.uint64)
    total = np.uint64(0)
    for start in range(0, len(letters), CHUNK):
        chunk = letters[start : start + CHUNK]
        terms = LETTERS[chunk] * POWERS[0][: len(chunk)] * POWERS[1][start >> 16]
        chunk_sums = np.append(np.uint64(0), np.cumsum(terms)) + total
        low, high = np.searchsorted(begins, [start, start + len(chunk)])
        sums[low:high] = chunk_sums[begins[low:high] - start]
        total = chunk_sums[-1]
    sums[begins == len(letters)] = total
    return sums


WEIGHTS = np.zeros(256, np.int64)
WEIGHTS[ord("a") : ord("z") + 1] = 2
WEIGHTS[ord("0") : ord("9") + 1] = 6
WEIGHTS[0xC2:0xF5] = 2  # only the first byte of a letter of several bytes has a weight
WEIGHTS[0xE3] = 4
WEIGHTS[0xE4:0xEA] = 6
WEIGHTS[0xF0] = 6
"""Weight of each letter, in halves of an English letter. A digit and a Chinese character weigh three letters, kana
two."""
COMMON_WORDS = (
    "a about all am an and any are as at be been but by can could day did do does doing for from get go going good "
    "had has have he her hers him his how i id if ill im in into is isnt it its ive just know let like make many me "
    "mean more most much my need no not now of on one or our out people please really say see she should so some tell "
    "than that thats the their them then there these they thing things think this time to today too up us want was "
    "way we well were what whats when where which who whom why will with would yes you your youre fun name old help "
    "hello hi hey ok okay yeah thanks thank love kind new two first"
)


def weigh_words(block: WordBlock) -> ndarray:
    """Return the weight of each word by its letters, halved for common words, int64 (words). The unit is half of an
    English letter."""
    letters = np.append(0, np.cumsum(WEIGHTS[block.letters[: block.begins[-1]]]))
    weights = np.diff(letters[block.begins])
    return np.where(build_word_table(COMMON_WORDS).contains(block.values), weights // 2, weights)


@lru_cache
def build_word_table(words: str) -> HashTable:
    """Return a HashTable of the words in a text, which are separated by blanks."""
    (block,) = iter_word_blocks(pa.array([words]))
    return HashTable.from_values(block.values)


def is_unspaced(block: WordBlock) -> ndarray:
    """Return whether each word is in a script without blanks (Han, kana, Thai, Lao, Khmer, Burmese), bool (words)."""
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
    """Return whether each of these words is a prefix of a question, such as `Q`, or a number of at most three
    digits."""
    sizes = block.begins[words + 1] - block.begins[words]
    begins = block.letters[block.begins[words]]
    ends = block.letters[block.begins[words + 1] - 1]
    numbered = (sizes <= 3) & IS_DIGIT[begins] & IS_DIGIT[ends]
    return numbered | build_word_table(QUESTION_PREFIXES).contains(block.values[words])


PREFIX_WORDS = 4
"""Maximum number of words of a prefix such as `Question no. 12:`."""


def find_stripped_bounds(block: WordBlock) -> tuple[list[ndarray], list[ndarray]]:
    """Return the possible bounds of each text's question, with and without prefixes such as `Q:` and a trailing
    `Answer:`.

    Returns:
        The first word of each text after removal of 0, 1, … prefix words; and its end after removal of 0, 1, … words of
        an answer's prefix. Each is int64 (texts), and -1 if the text has no such prefix.
    """
    start = block.first[:-1]
    end = block.first[1:]
    last_word = len(block) - 1
    if last_word < 0:
        return [start], [end]
    starts = [start]
    ends = [end]
    has_prefix = np.ones(len(start), bool)
    for count in range(PREFIX_WORDS):
        word = np.minimum(start + count, last_word)
        has_prefix = has_prefix & (start + count + 1 < end) & is_prefix(block, word)
        starts.append(np.where(has_prefix & (block.breaks[word + 1] > 0), start + count + 1, -1))
    has_prefix = np.ones(len(start), bool)
    for count in range(2):
        word = np.clip(end - 1 - count, 0, last_word)
        has_prefix = (
            has_prefix & (end - 1 - count > start) & build_word_table(ANSWER_PREFIXES).contains(block.values[word])
        )
        ends.append(np.where(has_prefix & (block.breaks[word] > 0), end - 1 - count, -1))
    return starts, ends


def strip_prefixes(block: WordBlock) -> tuple[ndarray, ndarray]:
    """Return the first word and the end of each text after removal of all prefixes such as `Q:` and of a trailing
    `Answer:`. Both are int64 (texts)."""
    starts, ends = find_stripped_bounds(block)
    start = np.max(starts, axis=0)
    end = ends[0]
    for shorter_end in ends[1:]:
        end = np.where((shorter_end > start) & (shorter_end >= 0), shorter_end, end)
    return start, end


pc: Any = pyarrow.compute  # whose functions are made when it is imported

MIN_WIDTH = 8
MAX_WIDTH = 13
PERCENTILE = 5
WEIGHT_ANYWHERE = 32
"""Minimum weight (`weigh_words`) of a question that is found anywhere in a text."""
WEIGHT_AT_BOUNDARY = 24
"""Minimum weight of a question that is found at the beginning or end of a sentence."""
WEIGHT_OF_SENTENCE = 19
"""Minimum weight of a question that is found as a whole sentence."""
WEIGHT_OF_LINE = 14
"""Minimum weight of a question that is found as a whole line or turn."""
MIN_RUN_WEIGHT = 56
"""Minimum weight of a run of words that is searched: eight letters of Thai are one or two words."""
UNSPACED_WIDTH = 40
"""Number of letters of a run in a script without blanks, whose letters have little weight."""
MAX_ASKING_ROWS = 3
"""Maximum number of rows of a set with the same question. If more rows ask it, it is generic (`Which of these is
true?`)."""
MAX_SHARING_ROWS = 1
"""Maximum number of rows of a set with the same run of fewer than `MAX_WIDTH` words. If more rows have it, it is a
phrase."""
KEY_SIZES = (64, 32, 16, 8, 4)
"""Numbers of letters by which questions are looked up. A question uses the largest that it has."""
PREFIX_LETTERS = 8
"""Number of letters by which a question is looked up first."""
ANCHOR_WORDS = 2
"""Number of words by which half of a question is looked up first."""
CHANGED_WORDS = (4, 26)
CHANGED_LETTERS = (8, 60)
"""Minimum and maximum number of words, and in a script without blanks of letters, of questions that may be changed."""
CHANGED_SPAN = (1, 4)
"""Maximum number of words that may be changed together; and of letters, in a script without blanks."""
MIN_CHANGED_WEIGHT = 24
"""Minimum weight of the unchanged words of a changed question."""
MAX_SHARED_HALF = 32
"""Maximum number of questions of a set that share a half. If more share it, it is a template."""
AT_ONCE = 1 << 15


class EvaluationTexts(NamedTuple):
    """The texts and questions of an evaluation set, each with the number of its row.

    Attributes:
        texts: texts that are compared with the whole text of a training row.
        questions: questions that are compared with the prompt of a training row, and that its text may contain.
        text_rows, question_rows: number of the row of each, from 0, int64, ascending.
    """

    texts: pa.ChunkedArray
    questions: pa.ChunkedArray
    text_rows: ndarray
    question_rows: ndarray

    @classmethod
    def from_rows(cls, texts: Sequence[pa.Array], questions: Sequence[pa.Array]) -> EvaluationTexts:
        """Build the EvaluationTexts of rows that have one text and one question each.

        Args:
            texts, questions: the texts and questions, in pieces.
        """
        rows = np.arange(sum(map(len, texts)))
        return cls(pa.chunked_array(texts, pa.string()), pa.chunked_array(questions, pa.string()), rows, rows)


def choose_run_width(counts: ndarray) -> int:
    """Return the number of words in a run that counts as an overlap: the 5th percentile of the examples' word counts,
    from 8 to 13."""
    if not len(counts):
        return MAX_WIDTH
    return int(np.clip(np.percentile(counts, PERCENTILE, method="lower"), MIN_WIDTH, MAX_WIDTH))


class QuestionTable:
    """Questions of one evaluation set as arrays, one entry for each text that has words.

    Attributes:
        owner: number of the text, int64.
        letters, counts: number of its letters and of its words, int64.
        value: hash of all its words, uint64.
        weight: its weight, int64.
        unspaced: whether most of its words are in a script without blanks, bool.
        keys: for each of `KEY_SIZES`, hash of its first letters, uint64.
        row: number of its row, int64.
        words, digits, weights: of the words of all questions: hash with operator, whether it has a digit, and weight.
        offset: index in these of the first word of each question, int64 (questions + 1).
    """

    def __init__(self, texts: pa.ChunkedArray, rows: ndarray) -> None:
        flags = np.zeros(0, bool)
        parts = [[NO_NUMBERS, NO_NUMBERS, NO_NUMBERS, NO_HASHES, NO_NUMBERS, flags, *(NO_HASHES for _ in KEY_SIZES)]]
        words = [[NO_HASHES, flags, NO_NUMBERS]]
        first_text = 0
        for block in iter_word_blocks(texts):
            start, end = strip_prefixes(block)
            kept = np.flatnonzero(end > start)
            start = start[kept]
            end = end[kept]
            counts = end - start
            weight_of_word = weigh_words(block)
            question_weights = sum_between(weight_of_word, start, end)
            spread = 2 * sum_between(is_unspaced(block), start, end) > counts
            keys = (block.hash_beginnings(start, size) for size in KEY_SIZES)
            letters = block.begins[end] - block.begins[start]
            parts.append(
                [
                    kept + first_text,
                    letters,
                    counts,
                    block.hash_runs_between(start, end),
                    question_weights,
                    spread,
                    *keys,
                ]
            )
            word_numbers = concatenate_ranges(start, counts)
            words.append(
                [block.tagged[word_numbers], block.has_digit_at_edge[word_numbers], weight_of_word[word_numbers]]
            )
            first_text += len(block.first) - 1
        columns = concatenate_columns(parts)
        self.owner, self.letters, self.counts, self.value, self.weight, self.unspaced, *self.keys = columns
        self.row = rows[self.owner]
        self.words, self.digits, self.weights = concatenate_columns(words)
        self.offset = np.append(0, np.cumsum(self.counts)).astype(np.int64)

    def find_distinct(self) -> tuple[ndarray, ndarray]:
        """Return the first question of each wording, and the number of rows that ask it."""
        order = np.lexsort((self.row, self.value))
        is_new_wording = differs_from_previous(self.value[order])
        is_new_row = differs_from_previous(self.value[order], self.row[order])
        first_questions = np.minimum.reduceat(order, np.flatnonzero(is_new_wording)) if len(order) else order
        return first_questions, np.bincount(np.cumsum(is_new_wording) - 1, is_new_row).astype(np.int64)


def sum_between(counts: ndarray, start: ndarray, end: ndarray) -> ndarray:
    """Return the sums of an array's values from each `start` up to, but not including, `end`."""
    sums = np.append(0, np.cumsum(counts))
    return sums[end] - sums[start]


class QuestionIndex:
    """An index of the questions of one evaluation set, which finds the training texts that contain them.

    Args:
        evaluation: texts of the set.
        number: number of the set.
    """

    def __init__(self, evaluation: EvaluationTexts, number: int) -> None:
        self.number = number
        self.questions = questions = QuestionTable(evaluation.questions, evaluation.question_rows)
        first_questions, asked_by = questions.find_distinct()
        is_generic = np.zeros(len(questions.owner), bool)
        is_generic[first_questions] = asked_by > MAX_ASKING_ROWS
        self._weight = np.where(is_generic, 0, questions.weight)
        self._by_key = list[tuple[int, HashTable]]()
        is_unkeyed = np.zeros(len(questions.owner), bool)
        is_unkeyed[first_questions] = True
        for number, size in enumerate(KEY_SIZES):
            numbers = np.flatnonzero(is_unkeyed & (questions.letters >= size))
            is_unkeyed[numbers] = False
            if len(numbers):
                self._by_key.append((size, HashTable.from_unsorted(questions.keys[number][numbers], numbers)))
        # A word is first looked up by `PREFIX_LETTERS` letters, so that few are looked up by more.
        long_questions = first_questions[questions.letters[first_questions] >= PREFIX_LETTERS]
        self._beginnings = HashTable.from_values(questions.keys[KEY_SIZES.index(PREFIX_LETTERS)][long_questions])
        self._runs = self._run_tables(evaluation)
        self._halves: dict[int, HashTable] = {}
        self._anchors = HashTable.from_values(NO_HASHES)
        self._slots = NO_NUMBERS
        self._index_halves(first_questions[asked_by <= MAX_ASKING_ROWS], evaluation.questions)

    def _run_tables(self, evaluation: EvaluationTexts) -> list[tuple[int, HashTable]]:
        """Build lookups from hashed runs of words, or of letters in scripts without blanks, to the evaluation row that
        has the run.

        Returns:
            The width of the runs, and a table whose owners are the first row with each run.
        """
        blocks = [*iter_word_blocks(evaluation.texts)]
        counts = concatenate(np.diff(block.first) for block in blocks)
        lengths = np.zeros(int(evaluation.text_rows.max(initial=-1)) + 1, np.int64)
        np.maximum.at(lengths, evaluation.text_rows, counts)
        self.width = choose_run_width(lengths[lengths > 0])
        tables = []
        for width, of_letters in ((self.width, False), (UNSPACED_WIDTH, True)):
            parts = [(NO_HASHES, NO_NUMBERS)]
            first_text = 0
            for block in blocks:
                starts = find_run_starts(block, width)
                if of_letters:
                    is_kept = sum_between(is_unspaced(block), starts, starts + width) == width
                else:
                    is_kept = sum_between(weigh_words(block), starts, starts + width) >= MIN_RUN_WEIGHT
                starts = starts[is_kept]
                parts.append((block.hash_runs_between(starts, starts + width), block.text[starts] + first_text))
                first_text += len(block.first) - 1
            values, owners = concatenate_columns(parts)
            if (of_letters or width < MAX_WIDTH) and len(values):
                tables.append((width, HashTable(*select_rare_hashes(values, evaluation.text_rows[owners]))))
        return tables

    def _index_halves(self, candidates: ndarray, texts: pa.ChunkedArray) -> None:
        """Index the halves of questions: if one word is changed, one half is unchanged. Then find the words by which
        questions of the set differ.

        Args:
            candidates: numbers of the questions.
            texts: the texts that the questions are from.
        """
        questions = self.questions
        min_count = np.where(questions.unspaced, CHANGED_LETTERS[0], CHANGED_WORDS[0])
        max_count = np.where(questions.unspaced, CHANGED_LETTERS[1], CHANGED_WORDS[1])
        fits = (questions.counts >= min_count) & (questions.counts <= max_count) & (self._weight >= MIN_CHANGED_WEIGHT)
        candidates = candidates[fits[candidates]]
        if not len(candidates):
            return
        number_of = {int(questions.owner[q]): int(q) for q in candidates}
        halves: dict[int, list[tuple[ndarray, ndarray]]] = {}
        anchors = []
        first_text = 0
        for block in iter_word_blocks(texts):
            start, end = strip_prefixes(block)
            local_texts = np.array([i for i in range(len(start)) if i + first_text in number_of], np.int64)
            numbers = np.array([number_of[i + first_text] for i in local_texts.tolist()], np.int64)
            first_text += len(start)
            begin = start[local_texts]
            stop = end[local_texts]
            middle = begin + (stop - begin) // 2
            for half_number, (low, high) in enumerate(((begin, middle), (middle, stop))):
                anchors.append(block.hash_runs_between(low, low + ANCHOR_WORDS))
                values = block.hash_runs_between(low, high)
                for length in np.unique(high - low).tolist():
                    has_length = high - low == length
                    halves.setdefault(length, []).append((values[has_length], 2 * numbers[has_length] + half_number))
        for length, parts in halves.items():
            values, numbers = concatenate_columns(parts)
            _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
            is_rare = counts[inverse] <= MAX_SHARED_HALF
            self._halves[length] = HashTable.from_unsorted(values[is_rare], numbers[is_rare])
        self._anchors = HashTable.from_values(np.concatenate(anchors))
        slots = []
        for block in iter_word_blocks(texts):
            _, question, position = self._find_changed(block)
            slots.append(questions.offset[question] + position)
        self._slots = sort_unique(np.concatenate(slots))

    def find(self, texts: Texts) -> OverlapMatches:
        """Find the texts that contain a question of the set, whole or with one change, or share a run of words with the
        set."""
        parts = [(NO_NUMBERS, NO_NUMBERS, NO_NUMBERS)]
        first_text = 0
        for block in iter_word_blocks(texts):
            words, question = self._find_contained(block)
            rule_matches = [(words, self.questions.row[question], CONTAINED)]
            for width, table in self._runs:
                starts = find_run_starts(block, width)
                places, row = table.find_owners(block.hash_runs_between(starts, starts + width))
                rule_matches.append((starts[places], row, NGRAM))
            words, question, position = self._find_changed(block)
            is_leak = ~is_in_sorted(self._slots, self.questions.offset[question] + position)
            rule_matches.append((words[is_leak], self.questions.row[question[is_leak]], CHANGED))
            parts += [
                (block.text[words] + first_text, row, np.full(len(words), rule)) for words, row, rule in rule_matches
            ]
            first_text += len(block.first) - 1
        text, row, rule = concatenate_columns(parts)
        return OverlapMatches(text, np.full(len(text), self.number), row, rule)

    def _find_contained(self, block: WordBlock) -> tuple[ndarray, ndarray]:
        """Return the first word of each whole question in the block, and the number of the question."""
        parts = [(NO_NUMBERS, NO_NUMBERS)]
        all_words = np.arange(len(block))
        likely_words = all_words[self._beginnings.might_contain(block.hash_beginnings(all_words, PREFIX_LETTERS))]
        for size, table in self._by_key:
            places = likely_words if size >= PREFIX_LETTERS else all_words
            words, question = table.find_owners(block.hash_beginnings(places, size))
            words = places[words]
            stop = block.begins[words] + self.questions.letters[question]
            end = np.minimum(np.searchsorted(block.begins, stop), len(block))
            ends_at_word = np.flatnonzero((block.begins[end] == stop) & (end <= block.last[words]))
            is_equal = (
                block.hash_runs_between(words[ends_at_word], end[ends_at_word])
                == self.questions.value[question[ends_at_word]]
            )
            words, question, end = (column[ends_at_word[is_equal]] for column in (words, question, end))
            is_accepted = is_match_in_context(block, words, end, self._weight[question])
            parts.append((words[is_accepted], question[is_accepted]))
        words, question = concatenate_columns(parts)
        return words, question

    def _find_changed(self, block: WordBlock) -> tuple[ndarray, ndarray, ndarray]:
        """Find the questions in the block that have one change. Returns the first word of the unchanged half, the
        number of the question, and the place of its first changed word."""
        parts = [(NO_NUMBERS, NO_NUMBERS, NO_NUMBERS)]
        if not self._halves:
            return parts[0]
        starts = find_run_starts(block, ANCHOR_WORDS)
        starts = starts[self._anchors.contains(block.hash_runs_between(starts, starts + ANCHOR_WORDS))]
        for length, table in sorted(self._halves.items()):
            half_starts = starts[starts + length <= block.last[starts]]
            places, numbers = table.find_owners(block.hash_runs_between(half_starts, half_starts + length))
            words = half_starts[places]
            for low in range(0, len(words), AT_ONCE):
                batch = slice(low, low + AT_ONCE)
                parts.append(self._verify_changes(block, words[batch], numbers[batch] >> 1, numbers[batch] & 1))
        words, question, position = concatenate_columns(parts)
        return words, question, position

    def _verify_changes(
        self, block: WordBlock, words: ndarray, question: ndarray, half_number: ndarray
    ) -> tuple[ndarray, ndarray, ndarray]:
        """Select the halves of questions whose other half stands next to them with exactly one change.

        Args:
            words: first word of each half in the block.
            question, half_number: number of its question, and 0 for the first half or 1 for the second.

        Returns:
            As `_find_changed`.
        """
        questions = self.questions
        count = questions.counts[question]
        half = count // 2
        is_first = half_number == 0
        other_half = np.where(is_first, count - half, half)
        step = np.where(is_first, 1, -1)
        # The words of the other half, starting next to the half that was found.
        question_at = questions.offset[question] + np.where(is_first, half, half - 1)
        text_at = np.where(is_first, words + half, words - 1)
        text_number = np.searchsorted(block.first, words, "right") - 1
        available = np.where(is_first, block.first[text_number + 1] - text_at, text_at - block.first[text_number] + 1)
        span = np.where(questions.unspaced[question], CHANGED_SPAN[1], CHANGED_SPAN[0])
        max_span = int(span.max(initial=0))
        widest = int(other_half.max(initial=0)) + max_span
        column = np.arange(widest)
        question_words = take_clipped(questions.words, question_at[:, None] + step[:, None] * column)
        text_words = take_clipped(block.tagged, text_at[:, None] + step[:, None] * column)
        is_available = (column < other_half[:, None]) & (column < available[:, None])
        equal_before = np.cumprod((question_words == text_words) & is_available, axis=1).sum(axis=1)
        accepted = np.zeros(len(words), bool)
        position = np.zeros(len(words), np.int64)
        for shift in range(-max_span, max_span + 1):
            text_length = other_half + shift
            equal = take_backwards(question_words, other_half, column) == take_backwards(
                text_words, text_length, column
            )
            equal &= column < np.minimum(other_half, text_length)[:, None] - equal_before[:, None]
            equal_behind = np.cumprod(equal, axis=1).sum(axis=1)
            changed = other_half - equal_before - equal_behind
            inserted = text_length - equal_before - equal_behind
            is_accepted = (np.abs(shift) <= span) & (changed <= span) & (inserted >= 0) & (inserted <= span)
            is_accepted &= (text_length <= available) & (text_length >= 0) & (changed >= 0)
            first_in_question = np.where(is_first, question_at + equal_before, question_at - equal_before - changed + 1)
            first_in_text = np.where(is_first, text_at + equal_before, text_at - equal_before - inserted + 1)
            question_span = clip_spans(first_in_question, changed, len(questions.words))
            text_span = clip_spans(first_in_text, inserted, len(block))
            is_accepted &= sum_between(questions.digits, *question_span) == 0
            is_accepted &= sum_between(block.has_digit_at_edge, *text_span) == 0
            is_accepted &= (
                questions.weight[question] - sum_between(questions.weights, *question_span) >= MIN_CHANGED_WEIGHT
            )
            # A change at the edge counts only if the sentence begins or ends there.
            edge = np.where(is_first, text_span[1], text_span[0])
            is_accepted &= (equal_behind > 0) | (block.breaks[edge] >= BREAK)
            is_new_change = is_accepted & ~accepted
            position[is_new_change] = (question_span[0] - questions.offset[question])[is_new_change]
            accepted |= is_accepted & (changed + inserted > 0)
        return words[accepted], question[accepted], position[accepted]


def take_clipped(values: ndarray, places: ndarray) -> ndarray:
    """Return the values at these places of an array, where places outside of it are moved to its ends."""
    return values[np.clip(places, 0, len(values) - 1)]


def take_backwards(rows: ndarray, ends: ndarray, column: ndarray) -> ndarray:
    """Return the values of each row in reverse order, beginning directly before its end in `ends`."""
    return np.take_along_axis(rows, np.clip(ends[:, None] - 1 - column, 0, len(column) - 1), 1)


def clip_spans(starts: ndarray, counts: ndarray, word_count: int) -> tuple[ndarray, ndarray]:
    """Return the start and end of spans of words, clipped to the number of words `word_count`."""
    starts = np.clip(starts, 0, word_count)
    return starts, np.clip(starts + counts, 0, word_count)


def is_match_in_context(block: WordBlock, words: ndarray, end: ndarray, weights: ndarray) -> ndarray:
    """Return whether each question found in a block counts there, bool: a question of low weight must be a whole
    sentence or line.

    Args:
        words, end: first word of each question in the block, and the word after it.
        weights: its weight.
    """
    begins_sentence = block.breaks[words] >= BREAK
    ends_sentence = block.breaks[end] >= BREAK
    previous = np.maximum(words - 1, 0)
    follows_prefix = (
        begins_sentence
        & ends_sentence
        & (words > 0)
        & build_word_table(QUESTION_PREFIXES).contains(block.values[previous])
    )
    is_line = (block.breaks[words] == LINE) & (block.breaks[end] == LINE)
    conditions = [
        weights >= WEIGHT_ANYWHERE,
        weights >= WEIGHT_AT_BOUNDARY,
        weights >= WEIGHT_OF_SENTENCE,
        weights >= WEIGHT_OF_LINE,
    ]
    return np.select(
        conditions,
        [
            np.ones(len(words), bool),
            begins_sentence | ends_sentence,
            begins_sentence & ends_sentence,
            is_line | follows_prefix,
        ],
        follows_prefix,
    )


def find_run_starts(block: WordBlock, width: int) -> ndarray:
    """Return the number of each word at which a run of `width` words of one text begins, ascending."""
    counts = np.maximum(np.diff(block.first) - width + 1, 0)
    return concatenate_ranges(block.first[:-1], counts)


def select_rare_hashes(values: ndarray, rows: ndarray) -> tuple[ndarray, ndarray]:
    """Return the distinct hashes of at most `MAX_SHARING_ROWS` rows in ascending order, and the first row of each."""
    order = np.lexsort((rows, values))
    values = values[order]
    rows = rows[order]
    is_new_value = differs_from_previous(values)
    is_new_row = differs_from_previous(values, rows)
    is_rare = np.add.reduceat(is_new_row.astype(np.int64), np.flatnonzero(is_new_value)) <= MAX_SHARING_ROWS
    return values[is_new_value][is_rare], rows[is_new_value][is_rare]


MIN_BAG_WORDS = 6
"""Minimum number of words of a question with choices that is recognised in any order of these."""
SOUTHERN = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\\s]+")
"""Pattern of text in Thai, Lao, Khmer or Burmese. Each letter is a word for `align.data.dedup.shingles`, with little
weight."""


def hash_southern_runs(texts: pa.ChunkedArray, width: int) -> ndarray:
    """Return the hashes of all runs of `width` letters in Thai, Lao, Khmer and Burmese, ascending. They are a few
    words, and not a leak."""
    foreign = texts.filter(pc.invert(pc.string_is_ascii(texts)))
    fragments = [fragment for text in foreign.to_pylist() if text for fragment in SOUTHERN.findall(text)]
    return sort_unique(build_shingles(pa.array(fragments, pa.string()), width).values)


class QuestionKeys(NamedTuple):
    """Hashes by which equal questions are found, with the number of the text that each comes from.

    Attributes:
        text: number of the text, int64, ascending.
        key: uint64. A text has several keys: with and without prefixes.
    """

    text: ndarray
    key: ndarray


def hash_evaluation_questions(texts: Texts) -> QuestionKeys:
    """Return hashes of evaluation questions without prefixes such as `Q:`, and of their words in any order. A text
    without words has none."""
    return hash_questions(texts, lambda block: [strip_prefixes(block)])


def hash_training_prompts(texts: Texts) -> QuestionKeys:
    """Return hashes of the prompts of training rows with and without prefixes such as `Q:`, and of their words in any
    order."""
    return hash_questions(texts, lambda block: product(*find_stripped_bounds(block)))


def hash_questions(texts: Texts, find_bounds: Callable[[WordBlock], Iterable[tuple[ndarray, ndarray]]]) -> QuestionKeys:
    """Return hashes of each text between the bounds that `find_bounds` returns, and of its words in any order.

    Args:
        find_bounds: returns the first word and the end of each text of a block, for each variant that has a key.
    """
    parts = [(NO_NUMBERS, NO_HASHES)]
    first_text = 0
    for block in iter_word_blocks(texts):
        for start, end in find_bounds(block):
            places = np.flatnonzero((start >= 0) & (end > start))
            if len(places):
                parts.append((places + first_text, block.hash_runs_between(start[places], end[places])))
        places, bags = hash_word_bags(block)
        parts.append((places + first_text, bags))
        first_text += len(block.first) - 1
    text, key = concatenate_columns(parts)
    order = np.argsort(text, kind="stable")
    return QuestionKeys(text[order], key[order])


def hash_word_bags(block: WordBlock) -> tuple[ndarray, ndarray]:
    """Hash texts that list choices by their words in any order, except for single letters and prefixes of questions and
    answers.

    Returns:
        The places of texts with choices and at least `MIN_BAG_WORDS` such words, and a hash of each (uint64).
    """
    texts = block.first[:-1], block.first[1:]
    sizes = np.diff(block.begins)
    letters = block.letters[block.begins[:-1]]
    lines = sum_between(block.breaks[:-1] == LINE, *texts)
    has_choices = (lines > 2) | (sum_between((sizes == 1) & (letters > ord("a")), *texts) > 1)
    if not has_choices.any():
        return NO_NUMBERS, NO_HASHES
    words = np.flatnonzero(np.repeat(has_choices, np.diff(block.first)))
    is_single_letter = (sizes[words] == 1) & (letters[words] >= ord("a"))
    values = block.hash_runs_between(words, words + 1)
    is_counted = ~is_single_letter & ~build_word_table(f"{QUESTION_PREFIXES} {ANSWER_PREFIXES}").contains(values)
    words = words[is_counted]
    values = values[is_counted]
    is_counted_word = np.zeros(len(block), bool)
    is_counted_word[words] = True
    hashes = np.zeros(len(block) + 1, np.uint64)
    hashes[words + 1] = mix_bits_in_place(values)
    sums = np.cumsum(hashes)
    places = np.flatnonzero(has_choices & (sum_between(is_counted_word, *texts) >= MIN_BAG_WORDS))
    return places, mix_bits_in_place(sums[block.first[places + 1]] - sums[block.first[places]])
