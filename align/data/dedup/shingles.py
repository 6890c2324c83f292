"""Hashes of words, shingles and whole texts, computed over the bytes of many documents at once.

A text is a set of shingles, which are hashed runs of words. This module computes their Jaccard similarity, their
MinHash keys and which of them are rare; and digests of whole texts.

A **word** is a run of letters, digits and the marks that belong to letters (vowel signs, accents), of any script, in
any case. Everything else separates words: blanks, punctuation, symbols, emoji, `_`, NUL. So `Hello,  World!`
and `hello world` have the same words. Characters that Unicode calls compatible (NFKD: composed accents, full width,
ligatures) are the same. In scripts that write no blanks (Han, kana, Thai, Lao, Khmer, Burmese) each letter with
its marks is a word. Python's version of Unicode decides which characters are letters.
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
    concatenate,
    concatenate_columns,
    count_shared_values,
    is_in_sorted,
    sort_unique,
    split_by_budget,
)

BLOCK_BYTES = 1 << 19
"""Maximum bytes of text in a block, so few that its arrays stay in a core's cache."""
BLOCK_DOCUMENTS = 1 << 10
"""Maximum number of documents in a block. A document's place in its block fits the bits that a hash leaves free."""
LONG_WORD = 64
"""Number of bytes up to which words are hashed together. Longer words are hashed one by one."""
WITHOUT_BLANKS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
LOWER = bytes(ord(chr(i).lower()) if i > 127 or chr(i).isalnum() else 0 for i in range(256))
"""Translation table of UTF-8 bytes: lower case, or 0 for a separator of words. Bytes over 127 stay."""
MASKS = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)
ODD_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def mix_bits_in_place(x: ndarray) -> ndarray:
    """Mix the bits of each 64-bit number in place, by a bijection. Returns the same array.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), as Stafford's variant 13.
    """
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


NOT_ASCII = re.compile("[^\x00-\x7f]+")
CACHED_RUN_LENGTH = 8
"""Maximum characters of a run that `fold_run` caches: typographic quotes, accented letters, emoji."""


def fold_unicode(text: str) -> str:
    """Return a text with its non-ASCII characters case-folded and decomposed, so that only ASCII characters separate
    its words."""

    def replace(run: re.Match[str]) -> str:
        follows_letter = text[run.start() - 1 : run.start()].isalnum()
        return (fold_run if len(run[0]) <= CACHED_RUN_LENGTH else fold_run.__wrapped__)(run[0], follows_letter)

    return NOT_ASCII.sub(replace, text)


@lru_cache(1 << 14)
def fold_run(run: str, follows_letter: bool) -> str:
    """Return a run of non-ASCII characters with its case folded, its accents decomposed and its words separated by
    blanks.

    Args:
        follows_letter: whether a letter or digit precedes it.
    """

    def separate(match: re.Match[str]) -> str:
        letter, word = match.groups()
        return f" {letter} " if letter else word or " "

    # Decomposed (NFKD), so that an accent that follows an ASCII letter needs no letter to be composed with.
    placeholder = "x" * follows_letter
    return compile_word_pattern().sub(separate, placeholder + unicodedata.normalize("NFKD", run).casefold())[
        len(placeholder) :
    ]


@cache
def compile_word_pattern() -> re.Pattern[str]:
    """Compile a pattern that matches a word of one letter with marks, else a longer word, else any character."""
    marks = "".join(c for c in map(chr, range(0x300, 0x1F000)) if unicodedata.category(c)[0] == "M")
    marks = re.sub("[\ufe00-\ufe0f]", "", marks)  # variation selectors of emoji
    letter = f"[^\\W_{WITHOUT_BLANKS}]"  # Python's \\w knows letters and digits, but no marks
    return re.compile(f"((?=\\w)[{WITHOUT_BLANKS}][{marks}]*)|({letter}(?:{letter}|[{marks}])*)|.", re.DOTALL)


def iter_byte_blocks(
    texts: Texts, fold: Callable[[str], str] = fold_unicode, table: bytes = LOWER
) -> Iterator[tuple[ndarray, ndarray]]:
    """Yield the normalised bytes of texts in blocks that fit a cache, with the offset of each text. A block has at
    least one text.

    Args:
        fold: normalises a text that is not all ASCII.
        table: translation of each byte afterwards.

    Yields:
        The bytes of a block (uint8), and the offset at which each text begins (int64, one more than texts). By default,
        words are separated by 0.
    """
    for chunk in texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]:
        sizes = pc.call_function("binary_length", [chunk]).fill_null(0).to_numpy(zero_copy_only=False)
        for start, end in split_by_budget(sizes, BLOCK_BYTES, BLOCK_DOCUMENTS):
            block = chunk.slice(start, end - start).fill_null("")
            is_ascii = pc.call_function("string_is_ascii", [block])
            if is_ascii.true_count < len(block):
                is_foreign = pc.call_function("invert", [is_ascii])
                folded_texts = pa.array([fold(text) for text in block.filter(is_foreign).to_pylist()], block.type)
                block = pc.call_function("replace_with_mask", [block, is_foreign, folded_texts])
            _, offsets, data = block.buffers()
            is_large = pa.types.is_large_string(block.type)
            starts = np.frombuffer(offsets, np.int64 if is_large else np.int32)[block.offset :][: len(block) + 1]
            starts = starts.astype(np.int64)
            content = memoryview(data)[starts[0] : starts[-1]] if data is not None else b""
            yield np.frombuffer(bytes(content).translate(table), np.uint8), starts - starts[0]


def find_word_bounds(is_word_byte: ndarray, starts: ndarray) -> tuple[ndarray, ndarray]:
    """Return the offset of each word's first byte in a block, and of the byte after its last one (int64).

    Args:
        is_word_byte: whether each byte belongs to a word, bool. There is at least one byte.
        starts: offset of each document, see `iter_byte_blocks`.
    """
    is_start = is_word_byte.copy()
    is_last = is_word_byte.copy()
    np.greater(is_word_byte[1:], is_word_byte[:-1], out=is_start[1:])
    np.greater(is_word_byte[:-1], is_word_byte[1:], out=is_last[:-1])
    borders = starts[(starts > 0) & (starts < len(is_word_byte))]  # a word ends with its document
    is_start[borders] = is_word_byte[borders]
    is_last[borders - 1] = is_word_byte[borders - 1]
    return np.flatnonzero(is_start), np.flatnonzero(is_last) + 1


def hash_block_words(data: ndarray, starts: ndarray) -> tuple[ndarray, ndarray]:
    """Hash each word of a block to 64 bits, and count the words of each document. Eight bytes are hashed at a time.

    Args:
        data, starts: see `iter_byte_blocks`.

    Returns:
        The hash of each word in order (uint64), and the number of words of each document (int64).
    """
    if not len(data):
        return NO_HASHES, np.zeros(len(starts) - 1, np.int64)
    first, end = find_word_bounds(data != 0, starts)
    length = end - first
    padded = np.append(data, np.zeros(8, np.uint8))
    eights = np.ndarray((len(data),), "<u8", padded, strides=(1,))  # the eight bytes from each offset on
    hashes = mix_bits_in_place(
        (eights[first] & MASKS[np.minimum(length, 8)]) ^ (length.astype(np.uint64) * ODD_MULTIPLIER)
    )
    long_words = np.flatnonzero(length > 8)
    position = 8
    while len(long_words) and position < LONG_WORD:
        piece = eights[first[long_words] + position] & MASKS[np.minimum(length[long_words] - position, 8)]
        hashes[long_words] = mix_bits_in_place(hashes[long_words] * ODD_MULTIPLIER ^ piece)
        position += 8
        long_words = long_words[length[long_words] > position]
    for word in long_words:
        digest = blake2b(data[first[word] : end[word]].tobytes(), digest_size=8).digest()
        hashes[word] = int.from_bytes(digest, "little")
    return hashes, np.diff(np.searchsorted(first, starts))


def count_words(texts: Texts) -> ndarray:
    """Return the number of words of each text, int64 (N)."""
    return concatenate(hash_block_words(*block)[1] for block in iter_byte_blocks(texts))


HASH_BITS = 54
"""Number of bits of a shingle's hash. Ten bits are left for a document's place in its block: one sort orders many
documents."""
DIGEST_BYTES = 16
BLANK = ord(" ")
SPACED = bytes(BLANK if i < 128 and chr(i).isspace() else ord(chr(i).lower()) if i < 128 else i for i in range(256))
"""Translation table of bytes that maps ASCII to lower case, and white space to blanks."""
BLOCK_PAIRS = 1 << 64 - HASH_BITS
BLOCK_VALUES = 1 << 17
"""Maximum number of values in both sets of the pairs that are compared at once, so few that they stay in a core's
cache."""


@dataclass(frozen=True)
class Shingles:
    """The set of shingle hashes (hashed runs of words) of each document, stored in two flat arrays.

    In one of 1.5·10¹² pairs of documents with 110 shingles, two different shingles have one hash.
    """

    values: ndarray
    """uint64, below 2^54: the sets of all documents, each ascending and without repetition."""
    offsets: ndarray
    """int64 (N+1): the values of document `i` are those from `offsets[i]` to `offsets[i + 1]`."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> ndarray:
        """Number of shingles of each document, int64 (N)."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> ndarray:
        """Number of the document that each value belongs to, int64."""
        return np.repeat(np.arange(len(self)), self.sizes)

    @staticmethod
    def from_sizes(values: ndarray, sizes: ndarray) -> Shingles:
        return Shingles(values, np.append(0, np.cumsum(sizes, dtype=np.int64)))

    @staticmethod
    def from_column(lists: pa.ListArray) -> Shingles:
        """Read the sets of shingles from a list column that `to_column` returned."""
        offsets = lists.offsets.to_numpy().astype(np.int64)
        return Shingles(lists.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0])

    def to_column(self) -> pa.ListArray:
        """Return the sets as an Arrow list column with one list of hashes per document."""
        return pa.ListArray.from_arrays(pa.array(self.offsets.astype(np.int32)), pa.array(self.values))

    def select(self, mask: ndarray) -> Shingles:
        """Return the sets of the documents that a mask (bool (N)) selects."""
        return Shingles.from_sizes(self.values[np.repeat(mask, self.sizes)], self.sizes[mask])

    def intersect(self, values: ndarray) -> Shingles:
        """Return each set reduced to its shingles that are in `values`, which are ascending."""
        is_kept = HashTable(values, values).contains(self.values)
        return Shingles(self.values[is_kept], np.append(0, np.cumsum(is_kept))[self.offsets])


def build_shingles(texts: Texts, width: int = 3) -> Shingles:
    """Return the set of shingles of each text: hashes of all its runs of `width` words. A text of fewer words has
    none."""
    parts = (build_block_shingles(*hash_block_words(*block), width) for block in iter_byte_blocks(texts))
    values, sizes = concatenate_columns([(NO_HASHES, NO_NUMBERS), *((part.values, part.sizes) for part in parts)])
    return Shingles.from_sizes(values, sizes)


def hash_runs(hashes: ndarray, width: int) -> ndarray:
    """Hash the run of `width` words that begins at each word, uint64 below 2^54. Runs may cross ends of documents."""
    count = max(len(hashes) - width + 1, 0)
    hashes_of_runs = hashes[:count].copy()
    for shift in range(1, width):
        hashes_of_runs *= ODD_MULTIPLIER
        hashes_of_runs += hashes[shift : shift + count]
    hashes_of_runs = mix_bits_in_place(hashes_of_runs)
    hashes_of_runs >>= np.uint64(64 - HASH_BITS)
    return hashes_of_runs


def build_block_shingles(hashes: ndarray, counts: ndarray, width: int) -> Shingles:
    """Return each document's set of hashed runs of `width` words, from the word hashes and counts that
    `hash_block_words` returns."""
    shingles = hash_runs(hashes, width)
    count = len(shingles)
    document = np.repeat(np.arange(len(counts), dtype=np.uint64), counts)
    shingles |= document[:count] << np.uint64(HASH_BITS)
    is_in_one_document = document[:count] == document[len(document) - count :]
    shingles = sort_unique(shingles[is_in_one_document])
    sizes = np.bincount((shingles >> np.uint64(HASH_BITS)).astype(np.int64), minlength=len(counts))
    shingles &= np.uint64((1 << HASH_BITS) - 1)
    return Shingles.from_sizes(shingles, sizes)


def digest_normalised_texts(texts: Texts) -> ndarray:
    """Return a BLAKE2b digest of each text, regardless of letter case, white space and composition of accents (NFC).

    Punctuation counts: `5 + 3` and `5 * 3`, or two emoji, are different texts.

    Returns:
        N digests of 16 bytes (`V16`).
    """
    digests = bytearray()
    for data, starts in iter_byte_blocks(
        texts, lambda text: " ".join(unicodedata.normalize("NFC", text).lower().split()), SPACED
    ):
        is_blank = data == BLANK
        follows_blank = np.empty(len(data) + 1, bool)
        follows_blank[1:] = is_blank
        follows_blank[starts] = True  # removes blanks at the beginning of a document
        surplus = np.flatnonzero(is_blank & follows_blank[:-1])
        content = np.delete(data, surplus).tobytes()
        for start, end in pairwise((starts - np.searchsorted(surplus, starts)).tolist()):
            digests += blake2b(content[start:end].rstrip(b" "), digest_size=DIGEST_BYTES).digest()
    return np.frombuffer(bytes(digests), f"V{DIGEST_BYTES}")


def compute_jaccard(a: Shingles, a_rows: ndarray, b: Shingles, b_rows: ndarray) -> ndarray:
    """Return the Jaccard similarity of set `a_rows[p]` of `a` and set `b_rows[p]` of `b` for each pair p, float64. It
    is 0 if both sets are empty."""
    common = count_common(a, a_rows, b, b_rows)
    return common / np.maximum(a.sizes[a_rows] + b.sizes[b_rows] - common, 1)


def count_common(a: Shingles, a_rows: ndarray, b: Shingles, b_rows: ndarray) -> ndarray:
    """Return the number of shingles that set `a_rows[p]` of `a` and set `b_rows[p]` of `b` have in common, for each
    pair p, int64."""
    starts_a = a.offsets[a_rows]
    starts_b = b.offsets[b_rows]
    sizes_a = a.sizes[a_rows]
    sizes_b = b.sizes[b_rows]
    common = np.zeros(len(a_rows), np.int64)
    for start, end in split_by_budget(sizes_a + sizes_b, BLOCK_VALUES, BLOCK_PAIRS):
        span = slice(start, end)
        common[span] = count_shared_values(
            a.values, starts_a[span], sizes_a[span], b.values, starts_b[span], sizes_b[span], HASH_BITS
        )
    return common


# --- MinHash signatures in bands: similar documents have the key of a band in common.

BANDS = 32
ROWS_PER_BAND = 4
"""Number of values of a signature in each band."""
BLOCK = 1 << 16
"""Number of shingles that are hashed at once, so few that they stay in a core's cache."""


def compute_band_keys(shingles: Shingles, bands: int = BANDS, rows: int = ROWS_PER_BAND, seed: int = 1) -> ndarray:
    """Return one MinHash key per band for each document, so that similar documents probably have a key in common. The
    probability is 1 - (1 - J^rows)^bands.

    J is the Jaccard similarity of their sets. The signature has `bands * rows` values: for an odd factor a each, the
    minimum of a·x modulo 2^32 over a document's shingles x. (x is a hash already, so no addend is needed.) A key hashes
    `rows` of these values.

    Returns:
        uint64 (N, bands). The row of a document without shingles is 0 and not a key: leave out such documents
        (`shingles.sizes == 0`).

    Source: Broder 1997; banding by Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4.
    """
    numbers = mix_bits_in_place(np.arange(1, bands * rows + 1, dtype=np.uint64) * ODD_MULTIPLIER + np.uint64(seed))
    factors = (numbers >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
    keys = np.zeros((len(shingles), bands), np.uint64)
    filled = np.flatnonzero(shingles.sizes)
    starts = shingles.offsets[filled]
    ends = shingles.offsets[filled + 1]
    start = 0
    while start < len(filled):
        end = max(int(np.searchsorted(ends, starts[start] + BLOCK, "right")), start + 1)
        values = shingles.values[starts[start] : ends[end - 1]]
        shingle_bits = (values >> np.uint64(HASH_BITS - 32)).astype(np.uint32)
        signatures = np.empty((len(factors), end - start), np.uint32)
        products = np.empty_like(shingle_bits)
        for row, factor in enumerate(factors):
            np.multiply(shingle_bits, factor, out=products)
            np.minimum.reduceat(products, starts[start:end] - starts[start], out=signatures[row])
        keys[filled[start:end]] = hash_bands(signatures, bands)
        start = end
    return keys


def hash_bands(signatures: ndarray, bands: int) -> ndarray:
    """Hash the signature values of each band to one key, uint64 (documents, bands).

    Args:
        signatures: uint32 (bands * rows, documents).
    """
    rows_by_band = signatures.reshape(bands, -1, signatures.shape[1])
    keys = np.zeros((bands, signatures.shape[1]), np.uint64)
    for row in range(rows_by_band.shape[1]):
        keys = mix_bits_in_place(keys * ODD_MULTIPLIER + rows_by_band[:, row] + np.uint64(1))
    return keys.T


# --- The rarest shingles of documents, for prefix filtering: similar documents have one of them in common.

BUCKETS = 1 << 20
SHINGLE_BIT = np.uint64(1 << 63)
"""A bit that is set in every mark that is a shingle, and in no mark that is a group."""


class ShingleRarity:
    """Estimated frequencies of shingles, by which the rarest shingles of each set are selected for prefix filtering.

    Prefix filtering is correct for any fixed order of shingles. If rare ones come first, few documents share a mark.

    Args:
        common: shingles that are never marks, ascending. They come last in the order.
    """

    def __init__(self, common: ndarray = NO_HASHES) -> None:
        self.counts = np.zeros(BUCKETS, np.int64)
        self.common = common

    def add(self, sample: Shingles) -> None:
        self.counts += np.bincount(assign_buckets(sample.values), minlength=BUCKETS)

    def select_marks(self, sets: Shingles, threshold: float) -> tuple[ndarray, ndarray]:
        """Return the rarest shingles of each set, so many that two sets at the similarity threshold have one of them in
        common. These marks are the n - ⌈threshold · n⌉ + 1 rarest of a set's n shingles, without common ones.

        Two sets whose similarity reaches the threshold have a mark in common.

        Args:
            sets: at most 1,024.

        Returns:
            The marks (uint64), set after set, and the number of each mark's set (int64).
        """
        sizes = sets.sizes
        # 10 bits for the set, 9 for how common the shingle is, and 45 of its hash.
        frequency = np.minimum(self.counts[assign_buckets(sets.values)], 510).astype(np.uint64)
        if len(self.common):
            frequency[is_in_sorted(self.common, sets.values)] = 511
        ranked = (
            sets.owners.astype(np.uint64) << np.uint64(HASH_BITS)
            | frequency << np.uint64(45)
            | sets.values >> np.uint64(HASH_BITS - 45)
        )
        ranked.sort()
        least = np.ceil(threshold * sizes * (1 - 1e-12)).astype(np.int64)  # rounding must not raise it by one
        mark_counts = np.where(sizes > 0, np.minimum(sizes - least + 1, sizes), 0)
        is_mark = np.arange(len(ranked)) - np.repeat(sets.offsets[:-1], sizes) < np.repeat(mark_counts, sizes)
        if len(self.common):
            is_mark &= ranked >> np.uint64(45) & np.uint64(511) != 511
        return ranked[is_mark] & np.uint64((1 << HASH_BITS) - 1) | SHINGLE_BIT, sets.owners[is_mark]


def assign_buckets(values: ndarray) -> ndarray:
    return (values & np.uint64(BUCKETS - 1)).astype(np.int64)
