"""Words of many texts as 64-bit hashes, computed over the bytes of whole blocks of documents at once.

A **word** is a run of letters, digits and the marks that belong to letters (vowel signs, accents), of any script, in
any case. Everything else parts words: blanks, punctuation, symbols, emoji, `_`, NUL. So `Hello,  World!` and
`hello world` have the same words. Characters that Unicode calls compatible (NFKD: composed accents, full width,
ligatures) are the same. In scripts that write no blanks (Han, kana, Thai, Lao, Khmer, Burmese) each letter with
its marks is a word. Which characters are letters is a question to Python's version of Unicode.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray

from align.data.dedup.arrays import NO_HASHES, Texts, join, spans

BLOCK_BYTES = 1 << 19
"""Of text that is worked on at once: what is made of it stays in a core's cache."""
BLOCK_DOCUMENTS = 1 << 10
"""At most as many documents at once, so that a document's place in its block fits the bits a hash leaves."""
LONG_WORD = 64
"""Bytes. Longer words are hashed one by one."""
WITHOUT_BLANKS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
LOWER = bytes(ord(chr(i).lower()) if i > 127 or chr(i).isalnum() else 0 for i in range(256))
"""What becomes of a byte of UTF-8: lower case, or 0 where it parts words. Bytes over 127 stay."""
MASKS = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)
ODD = np.uint64(0x9E3779B97F4A7C15)


def mixed(x: ndarray) -> ndarray:
    """Every bit of each 64-bit number spread over all of its bits, one to one, in place.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), as Stafford's variant 13.
    """
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


NOT_ASCII = re.compile("[^\x00-\x7f]+")
OFTEN = 8
"""Characters of the longest run that is kept in memory: typographic quotes, accented letters, emoji."""


def plain(text: str) -> str:
    """Return a text of any script in whose bytes words are parted by ASCII, and by nothing else."""

    def replaced(run: re.Match[str]) -> str:
        inside = text[run.start() - 1 : run.start()].isalnum()
        return (folded if len(run[0]) <= OFTEN else folded.__wrapped__)(run[0], inside)

    return NOT_ASCII.sub(replaced, text)


@lru_cache(1 << 14)
def folded(run: str, inside: bool) -> str:
    """Return a run of characters that are not ASCII, without case, its words parted by blanks.

    Args:
        inside: a letter or digit precedes it.
    """

    def parted(match: re.Match[str]) -> str:
        alone, word = match.groups()
        return f" {alone} " if alone else word or " "

    # Decomposed (NFKD), so that an accent that follows an ASCII letter needs no letter to be composed with.
    before = "x" * inside
    return word_pattern().sub(parted, before + unicodedata.normalize("NFKD", run).casefold())[len(before) :]


@cache
def word_pattern() -> re.Pattern[str]:
    """A word that is one letter with its marks; or else a run; or else a character of no word."""
    marks = "".join(c for c in map(chr, range(0x300, 0x1F000)) if unicodedata.category(c)[0] == "M")
    marks = re.sub("[\ufe00-\ufe0f]", "", marks)  # these choose how an emoji is drawn
    letter = f"[^\\W_{WITHOUT_BLANKS}]"  # Python's \\w knows letters and digits, but no marks
    return re.compile(f"((?=\\w)[{WITHOUT_BLANKS}][{marks}]*)|({letter}(?:{letter}|[{marks}])*)|.", re.DOTALL)


def blocks(texts: Texts, fold: Callable[[str], str] = plain, table: bytes = LOWER) -> Iterator[tuple[ndarray, ndarray]]:
    """Yield documents in blocks of what a cache holds, at least one a block. Documents of ASCII alone are not looked at
    one by one.

    Args:
        fold: what becomes of a text that is not all ASCII.
        table: what becomes of each byte then.

    Yields:
        Bytes (uint8), and where each document begins in them (int64, one more than documents). By default, words are
        parted by 0.
    """
    for chunk in texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]:
        sizes = pc.call_function("binary_length", [chunk]).fill_null(0).to_numpy(zero_copy_only=False)
        for at, end in spans(sizes, BLOCK_BYTES, BLOCK_DOCUMENTS):
            block = chunk.slice(at, end - at).fill_null("")
            ascii = pc.call_function("string_is_ascii", [block])
            if ascii.true_count < len(block):
                foreign = pc.call_function("invert", [ascii])
                others = pa.array([fold(text) for text in block.filter(foreign).to_pylist()], block.type)
                block = pc.call_function("replace_with_mask", [block, foreign, others])
            _, offsets, data = block.buffers()
            wide = pa.types.is_large_string(block.type)
            starts = np.frombuffer(offsets, np.int64 if wide else np.int32)[block.offset :][: len(block) + 1]
            starts = starts.astype(np.int64)
            whole = memoryview(data)[starts[0] : starts[-1]] if data is not None else b""
            yield np.frombuffer(bytes(whole).translate(table), np.uint8), starts - starts[0]


def bounds_of_words(inside: ndarray, starts: ndarray) -> tuple[ndarray, ndarray]:
    """Return the first byte of each word of a block, and the byte behind it (int64).

    Args:
        inside: whether each byte is one of a word, bool; there is at least one.
        starts: where each document begins (`blocks`).
    """
    opens = inside.copy()
    closes = inside.copy()
    np.greater(inside[1:], inside[:-1], out=opens[1:])
    np.greater(inside[:-1], inside[1:], out=closes[:-1])
    borders = starts[(starts > 0) & (starts < len(inside))]  # a word ends with its document
    opens[borders] = inside[borders]
    closes[borders - 1] = inside[borders - 1]
    return np.flatnonzero(opens), np.flatnonzero(closes) + 1


def word_hashes(data: ndarray, starts: ndarray) -> tuple[ndarray, ndarray]:
    """Return the words of a block (`blocks`) in order: their hashes (uint64), and how many each document has (int64).
    A word is hashed eight bytes after eight."""
    if not len(data):
        return NO_HASHES, np.zeros(len(starts) - 1, np.int64)
    first, end = bounds_of_words(data != 0, starts)
    length = end - first
    padded = np.append(data, np.zeros(8, np.uint8))
    eights = np.ndarray((len(data),), "<u8", padded, strides=(1,))  # the eight bytes from each place on
    hashes = mixed((eights[first] & MASKS[np.minimum(length, 8)]) ^ (length.astype(np.uint64) * ODD))
    long = np.flatnonzero(length > 8)
    at = 8
    while len(long) and at < LONG_WORD:
        part = eights[first[long] + at] & MASKS[np.minimum(length[long] - at, 8)]
        hashes[long] = mixed(hashes[long] * ODD ^ part)
        at += 8
        long = long[length[long] > at]
    for word in long:
        digest = blake2b(data[first[word] : end[word]].tobytes(), digest_size=8).digest()
        hashes[word] = int.from_bytes(digest, "little")
    return hashes, np.diff(np.searchsorted(first, starts))


def word_counts(texts: Texts) -> ndarray:
    """Return how many words each text has, int64 (N)."""
    return join(word_hashes(*block)[1] for block in blocks(texts))
