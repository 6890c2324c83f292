"""Texts as sets of hashed runs of words: how alike these are, their MinHash keys, and which of their shingles are rare;
and digests of whole texts."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy import ndarray

from align.data.dedup.arrays import (
    NO_HASHES,
    NO_NUMBERS,
    HashTable,
    Texts,
    count_shared,
    distinct,
    held,
    join_columns,
    spans,
)
from align.data.dedup.words import ODD, blocks, mixed, word_hashes

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
    """Return the runs of `width` words of each text, hashed; `align.data.dedup.words` says what a word is. A text of
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
