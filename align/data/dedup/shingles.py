"""Words of many texts as 64-bit hashes, computed over the bytes of whole blocks of documents at once; texts as sets of
hashed runs of words: how alike these are, their MinHash keys, and which shingles are rare; and digests of whole
texts.

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
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy import ndarray

from align.data.dedup.arrays import (
    NO_HASHES,
    NO_NUMBERS,
    HashTable,
    Texts,
    count_shared,
    distinct,
    held,
    join,
    join_columns,
    spans,
)

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


HASH_BITS = 54
"""Of a shingle's hash. Ten bits are left for a place in a block, so that one sort orders many documents at once."""
DIGEST_BYTES = 16
BLANK = ord(" ")
SPACED = bytes(BLANK if i < 128 and chr(i).isspace() else ord(chr(i).lower()) if i < 128 else i for i in range(256))
"""ASCII in lower case, its white space as blanks."""
BLOCK_PAIRS = 1 << 64 - HASH_BITS
BLOCK_VALUES = 1 << 17
"""Of both sides of the pairs that are compared at once: they stay in a core's cache."""


@dataclass(frozen=True)
class Shingles:
    """Sets of hashes, one a document.

    In one of 1.5·10¹² pairs of documents with 110 shingles, two different shingles have one hash.
    """

    values: ndarray
    """uint64, under 2^54: ascending in each document, and each one once."""
    offsets: ndarray
    """int64 (N+1): the values of document `i` are those from `offsets[i]` to `offsets[i + 1]`."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> ndarray:
        """int64 (N): how many shingles each document has."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> ndarray:
        """int64: the document of each value."""
        return np.repeat(np.arange(len(self)), self.sizes)

    @staticmethod
    def of_sizes(values: ndarray, sizes: ndarray) -> Shingles:
        return Shingles(values, np.append(0, np.cumsum(sizes, dtype=np.int64)))

    @staticmethod
    def of(lists: pa.ListArray) -> Shingles:
        """Return sets that were kept as a column, see `column`."""
        offsets = lists.offsets.to_numpy().astype(np.int64)
        return Shingles(lists.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0])

    def column(self) -> pa.ListArray:
        """Return the same as a column of lists."""
        return pa.ListArray.from_arrays(pa.array(self.offsets.astype(np.int32)), pa.array(self.values))

    def where(self, chosen: ndarray) -> Shingles:
        """Return the sets of some documents (bool (N))."""
        return Shingles.of_sizes(self.values[np.repeat(chosen, self.sizes)], self.sizes[chosen])

    def only(self, some: ndarray) -> Shingles:
        """Return each set without the values that are not among `some` (ascending)."""
        inside = HashTable(some, some).holds(self.values)
        return Shingles(self.values[inside], np.append(0, np.cumsum(inside))[self.offsets])


def shingled(texts: Texts, width: int = 3) -> Shingles:
    """Return the runs of `width` words of each text, hashed; `align.data.dedup.shingles` says what a word is. A text of
    fewer words has none."""
    parts = (shingles_of(*word_hashes(*block), width) for block in blocks(texts))
    values, sizes = join_columns([(NO_HASHES, NO_NUMBERS), *((part.values, part.sizes) for part in parts)])
    return Shingles.of_sizes(values, sizes)


def hash_runs(hashes: ndarray, width: int) -> ndarray:
    """Return a hash of the run of `width` words that begins at each word, uint64 under 2^54. Runs do not end where a
    document does."""
    many = max(len(hashes) - width + 1, 0)
    joined = hashes[:many].copy()
    for later in range(1, width):
        joined *= ODD
        joined += hashes[later : later + many]
    joined = mixed(joined)
    joined >>= np.uint64(64 - HASH_BITS)
    return joined


def shingles_of(hashes: ndarray, counts: ndarray, width: int) -> Shingles:
    """Return the sets of a block's documents (`word_hashes`)."""
    joined = hash_runs(hashes, width)
    many = len(joined)
    document = np.repeat(np.arange(len(counts), dtype=np.uint64), counts)
    joined |= document[:many] << np.uint64(HASH_BITS)
    joined = distinct(joined[document[:many] == document[len(document) - many :]])  # a run ends with its document
    sizes = np.bincount((joined >> np.uint64(HASH_BITS)).astype(np.int64), minlength=len(counts))
    joined &= np.uint64((1 << HASH_BITS) - 1)
    return Shingles.of_sizes(joined, sizes)


def normalised_digests(texts: Texts) -> ndarray:
    """Return digests of texts but for letter case, white space and how accents are composed (NFC): N of 16 bytes
    (`V16`), by BLAKE2b.

    Punctuation counts: `5 + 3` and `5 * 3`, or two emoji, are not the same text.
    """
    digests = bytearray()
    for data, starts in blocks(
        texts, lambda text: " ".join(unicodedata.normalize("NFC", text).lower().split()), SPACED
    ):
        space = data == BLANK
        before = np.empty(len(data) + 1, bool)
        before[1:] = space
        before[starts] = True  # blanks that a document begins with
        surplus = np.flatnonzero(space & before[:-1])
        whole = np.delete(data, surplus).tobytes()
        for start, end in pairwise((starts - np.searchsorted(surplus, starts)).tolist()):
            digests += blake2b(whole[start:end].rstrip(b" "), digest_size=DIGEST_BYTES).digest()
    return np.frombuffer(bytes(digests), f"V{DIGEST_BYTES}")


def jaccard(a: Shingles, ia: ndarray, b: Shingles, ib: ndarray) -> ndarray:
    """Return |A ∩ B| / |A ∪ B| of the sets `ia[p]` of `a` and `ib[p]` of `b`, for each pair p, float64; 0 if both sets
    are empty."""
    common = count_common(a, ia, b, ib)
    return common / np.maximum(a.sizes[ia] + b.sizes[ib] - common, 1)


def count_common(a: Shingles, ia: ndarray, b: Shingles, ib: ndarray) -> ndarray:
    """Return |A ∩ B| of the sets `ia[p]` of `a` and `ib[p]` of `b`, for each pair p, int64."""
    starts_a, sizes_a = a.offsets[ia], a.sizes[ia]
    starts_b, sizes_b = b.offsets[ib], b.sizes[ib]
    common = np.zeros(len(ia), np.int64)
    for at, end in spans(sizes_a + sizes_b, BLOCK_VALUES, BLOCK_PAIRS):
        part = slice(at, end)
        common[part] = count_shared(
            a.values, starts_a[part], sizes_a[part], b.values, starts_b[part], sizes_b[part], HASH_BITS
        )
    return common


# --- MinHash signatures in bands: documents that are much alike have a band's key in common.

BANDS, ROWS = 32, 4
BLOCK = 1 << 16
"""Shingles that are hashed at once, so that they stay in a core's cache."""


def band_keys(shingles: Shingles, bands: int = BANDS, rows: int = ROWS, seed: int = 1) -> ndarray:
    """Return keys of which two documents have one in common with probability 1 - (1 - J^rows)^bands.

    J is the Jaccard similarity of their sets. The signature has `bands * rows` values: the least of a·x modulo 2^32
    over a document's shingles x, each by an odd a of its own. (x is a hash already, and needs no term.) A key hashes
    `rows` of them.

    Returns:
        uint64 (N, bands). The row of a document without shingles is 0 and is no key: leave such documents out
        (`shingles.sizes == 0`).

    Source: Broder 1997; banding by Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4.
    """
    numbers = mixed(np.arange(1, bands * rows + 1, dtype=np.uint64) * ODD + np.uint64(seed))
    factors = (numbers >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    keys = np.zeros((len(shingles), bands), np.uint64)
    filled = np.flatnonzero(shingles.sizes)
    starts, ends = shingles.offsets[filled], shingles.offsets[filled + 1]
    at = 0
    while at < len(filled):
        end = max(int(np.searchsorted(ends, starts[at] + BLOCK, "right")), at + 1)
        values = shingles.values[starts[at] : ends[end - 1]]
        x = (values >> np.uint64(HASH_BITS - 32)).astype(np.uint32)
        signatures = np.empty((len(factors), end - at), np.uint32)
        room = np.empty_like(x)
        for row, factor in enumerate(factors):
            np.multiply(x, factor, out=room)
            np.minimum.reduceat(room, starts[at:end] - starts[at], out=signatures[row])
        keys[filled[at:end]] = banded(signatures, bands)
        at = end
    return keys


def banded(signatures: ndarray, bands: int) -> ndarray:
    """Return the hash of each band's rows, uint64 (documents, bands)."""
    of_band = signatures.reshape(bands, -1, signatures.shape[1])
    keys = np.zeros((bands, signatures.shape[1]), np.uint64)
    for row in range(of_band.shape[1]):
        keys = mixed(keys * ODD + of_band[:, row] + np.uint64(1))
    return keys.T


# --- The rarest shingles of documents, by which alike ones among very many meet.

BUCKETS = 1 << 20
MARK = np.uint64(1 << 63)
"""Is in every mark that is a shingle, and in none that is a group."""


class Rarity:
    """How common shingles are, as far as a sample tells.

    Marks are right by any fixed order of shingles. Where the rare ones come first, few documents have one in common.

    Args:
        common: shingles that are no marks, ascending; they come last.
    """

    def __init__(self, common: ndarray = NO_HASHES) -> None:
        self.counts = np.zeros(BUCKETS, np.int64)
        self.common = common

    def add(self, sample: Shingles) -> None:
        self.counts += np.bincount(bucket_of(sample.values), minlength=BUCKETS)

    def marks(self, sets: Shingles, threshold: float) -> tuple[ndarray, ndarray]:
        """Return of a set of n its n - ⌈threshold · n⌉ + 1 rarest: sets as similar as the threshold have one in common.
        Those that are common are left out.

        Args:
            sets: at most 1,024.

        Returns:
            The marks (uint64), set after set, and the set of each (int64).
        """
        sizes = sets.sizes
        # 10 bits for the set, 9 for how common the shingle is, and 45 of its hash.
        common = np.minimum(self.counts[bucket_of(sets.values)], 510).astype(np.uint64)
        if len(self.common):
            common[held(self.common, sets.values)] = 511
        ranked = (
            sets.owners.astype(np.uint64) << np.uint64(HASH_BITS)
            | common << np.uint64(45)
            | sets.values >> np.uint64(HASH_BITS - 45)
        )
        ranked.sort()
        least = np.ceil(threshold * sizes * (1 - 1e-12)).astype(np.int64)  # rounding must not ask for one more
        many = np.where(sizes > 0, np.minimum(sizes - least + 1, sizes), 0)
        first = np.arange(len(ranked)) - np.repeat(sets.offsets[:-1], sizes) < np.repeat(many, sizes)
        if len(self.common):
            first &= ranked >> np.uint64(45) & np.uint64(511) != 511
        return ranked[first] & np.uint64((1 << HASH_BITS) - 1) | MARK, sets.owners[first]


def bucket_of(values: ndarray) -> ndarray:
    return (values & np.uint64(BUCKETS - 1)).astype(np.int64)
