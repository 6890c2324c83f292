"""Words of many texts, hashed so that a question is recognised however it is written.

Case, blanks and punctuation do not count, nor whether `don't` is written `dont` or `well-known` `wellknown`: the hash
of a run of words is the hash of its letters. Digits of any script are those of ASCII. Numbers stay apart (`12, 3` is
not `1, 23`), and an operator between numbers or single letters counts: `5 + 3` is not `5 * 3`.

A run is hashed as a polynomial of its letters modulo 2^64, so that the hash of any run is had from two sums (Karp and
Rabin 1987).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import pyarrow as pa
from numpy import ndarray

from align.data.dedup.arrays import HashTable, Texts
from align.data.dedup.words import blocks, bounds_of_words, mixed, plain

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
"""ASCII in lower case. Unlike `words.LOWER`, punctuation stays: it says where sentences end."""


def byte_table(characters: str) -> ndarray:
    """A table of 256 booleans that is true for these ASCII characters."""
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
    """Powers of a number modulo 2^64: the first `CHUNK`, and every `CHUNK`-th of the first 2^31."""

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
        """Hashes (uint64) of runs of words, from word `start` to before word `end`."""
        at = self.begins[start]
        sums = self._sums[end] - self._sums[start]
        tagged = np.flatnonzero(self.tags[start])  # what stands before the run is no part of it
        sums[tagged] -= TAGS[self.tags[start[tagged]]] * compute_power(POWERS, at[tagged])
        return mixed(sums * compute_power(INVERSES, at))

    def keys(self, words: ndarray, size: int) -> ndarray:
        """Hashes (uint64) of the first `size` letters (4, or a multiple of 8 up to 64) from these words on."""
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
    """Return the words of one block of `align.data.dedup.words.blocks`."""
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
    """See `WordBlock.breaks`."""
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
    """See `WordBlock.tags`."""
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
    """The polynomial's sum up to each of `begins`, uint64."""
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
    """bool (words): whether a word is a letter of a script that writes no blanks (Han, kana, Thai, Lao, Khmer,
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
    """bool: whether each of these words announces a question or is a number of at most three digits."""
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
