"""Texts as sets of hashed runs of words, and digests of whole texts."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import pyarrow as pa

from align.data.dedup.hash_table import HashTable
from align.data.dedup.words import ODD, blocks, mixed, word_hashes

HASH_BITS = 54
"""Of a shingle's hash. Ten bits are left for a place in a block, so that one sort orders many documents at once."""
DIGEST_BYTES = 16
BLANK = ord(" ")
SPACED = bytes(BLANK if i < 128 and chr(i).isspace() else ord(chr(i).lower()) if i < 128 else i for i in range(256))
"""ASCII in lower case, its white space as blanks."""


@dataclass(frozen=True)
class Shingles:
    """Sets of hashes, one a document.

    In one of 1.5·10¹² pairs of documents with 110 shingles, two different shingles have one hash.
    """

    values: np.ndarray
    """uint64, under 2^54: ascending in each document, and each one once."""
    offsets: np.ndarray
    """int64 (N+1): the values of document `i` are those from `offsets[i]` to `offsets[i + 1]`."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray:
        """int64 (N): how many shingles each document has."""
        return np.diff(self.offsets)

    @staticmethod
    def of(lists: pa.ListArray) -> Shingles:
        """Sets that were kept as a column, see `column`."""
        offsets = lists.offsets.to_numpy().astype(np.int64)
        return Shingles(lists.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0])

    def column(self) -> pa.ListArray:
        """The same as a column of lists."""
        return pa.ListArray.from_arrays(pa.array(self.offsets.astype(np.int32)), pa.array(self.values))

    def where(self, chosen: np.ndarray) -> Shingles:
        """Those of some documents (bool (N))."""
        sizes = self.sizes
        return Shingles(self.values[np.repeat(chosen, sizes)], np.append(0, np.cumsum(sizes[chosen])))

    def only(self, some: np.ndarray) -> Shingles:
        """Return each set without the values that are not among `some` (ascending)."""
        inside = HashTable(some, some).holds(self.values)
        return Shingles(self.values[inside], np.append(0, np.cumsum(inside))[self.offsets])


def shingled(texts: pa.Array | pa.ChunkedArray, width: int = 3) -> Shingles:
    """The runs of `width` words of each text, hashed; `align.data.dedup.words` says what a word is.

    Args:
        texts: N strings, or large strings; null is the empty text.

    Returns:
        N sets. A text of fewer than `width` words has none.
    """
    values, sizes = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for data, starts in blocks(texts):
        hashes, counts = word_hashes(data, starts)
        found, size = runs(hashes, counts, width)
        values.append(found)
        sizes.append(size)
    return Shingles(np.concatenate(values), np.concatenate([[0], np.cumsum(np.concatenate(sizes), dtype=np.int64)]))


def hash_runs(hashes: np.ndarray, width: int) -> np.ndarray:
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


def runs(hashes: np.ndarray, counts: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The sets of a block's documents: their values one after another, and their sizes."""
    joined = hash_runs(hashes, width)
    many = len(joined)
    document = np.repeat(np.arange(len(counts), dtype=np.uint64), counts)
    joined |= document[:many] << np.uint64(HASH_BITS)
    joined = joined[document[:many] == document[len(document) - many :]]  # a run ends with its document
    joined.sort()
    once = np.ones(len(joined), bool)
    np.not_equal(joined[1:], joined[:-1], out=once[1:])
    joined = joined[once]
    sizes = np.bincount((joined >> np.uint64(HASH_BITS)).astype(np.int64), minlength=len(counts))
    joined &= np.uint64((1 << HASH_BITS) - 1)
    return joined, sizes


def normalised_digests(texts: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Digests of texts but for letter case, white space and how accents are composed (NFC).

    Punctuation counts: `5 + 3` and `5 * 3`, or two emoji, are not the same text.

    Args:
        texts: N strings; null is the empty text.

    Returns:
        N digests of 16 bytes (`V16`), by BLAKE2b.
    """
    made = bytearray()
    for data, starts in blocks(texts, single_spaced, SPACED):
        space = data == BLANK
        before = np.empty(len(data) + 1, bool)
        before[1:] = space
        before[starts] = True  # blanks that a document begins with
        surplus = np.flatnonzero(space & before[:-1])
        whole = np.delete(data, surplus).tobytes()
        for start, end in pairwise((starts - np.searchsorted(surplus, starts)).tolist()):
            made += blake2b(whole[start:end].rstrip(b" "), digest_size=DIGEST_BYTES).digest()
    return np.frombuffer(bytes(made), f"V{DIGEST_BYTES}")


def single_spaced(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).lower().split())
