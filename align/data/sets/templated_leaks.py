"""Rows to train on that resemble rows to measure on by shared text only: rows of one template give nothing away.

`align.data.sets.contamination` finds every row that is as similar as the threshold. Where near-duplicates were not
removed over whole rows, rows of one template are all alike. Here they are compared again, as near-duplicates are
(`align.data.dedup.twins`): text that many rows share does not count, and numbers and operators have to be the same.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from align.data.dedup.contamination import NEAR, RULES
from align.data.dedup.groups import sharing
from align.data.dedup.numbers import number_hashes
from align.data.dedup.shared_text import find_shared
from align.data.dedup.shingles import BANDS, Shingles, band_keys, normalised_digests, shingled
from align.data.dedup.twins import twins
from align.data.sets.columns import CONTENT, texts_of
from align.data.sets.contamination import Leaks
from align.data.sets.spool import Rows, first_bits


def drop_templated(leaks: Leaks, rows: Rows, kind: str, measured: np.ndarray, near: float, finds_all: bool) -> Leaks:
    """Return the leaks without rows that are near to rows to measure on by shared text only.

    Args:
        measured: the rows to measure on, bool (N).
        near: the least Jaccard similarity that they were found by.
        finds_all: whether MinHash finds all pairs that are so similar. If not, rows that are not made of shared text
            for the most part stay leaks.
    """
    by_similarity = np.array([rule == RULES[NEAR] for rule in leaks.rules], bool)
    suspects = leaks.rows[by_similarity]
    if not len(suspects):
        return leaks
    compared = measured.copy()
    compared[suspects] = True
    with TemporaryDirectory(dir=rows.folder, prefix="sides-") as folder:
        texts = ComparedTexts(Path(folder), rows, kind, compared)
        groups = sharing(np.arange(len(texts.numbers), dtype=np.int32), texts.sizes > 0, texts.keys.__getitem__, BANDS)
        shared = find_shared(groups, np.arange(len(texts.numbers)), texts.sizes, texts.content, texts.read)
        is_measured = measured[texts.numbers]
        found = twins(
            np.where(is_measured, 0, 1),
            texts.sizes,
            texts.keys.__getitem__,
            texts.read,
            near,
            sources=is_measured.astype(np.int64),
            across=True,
            numbers=texts.operators,
            shared=shared,
        )
        stay = texts.numbers[found.dropped]
        if not finds_all:
            stay = np.append(stay, texts.numbers[~texts.are_mostly(shared, near)])
    kept = ~by_similarity | np.isin(leaks.rows, stay)
    rules = [rule for rule, keep in zip(leaks.rules, kept.tolist(), strict=True) if keep]
    return Leaks(leaks.rows[kept], leaks.sets[kept], leaks.where[kept], rules)


class ComparedTexts:
    """Keys, shingles and hashes of rows of a spool. Keys and shingles are in files, since these may be all its rows.

    Args:
        folder: for the files.
        wanted: which rows, bool (N).

    Attributes:
        numbers: of the rows, ascending; all others are by their place among these.
        keys: of MinHash, uint64 (bands, rows).
        sizes: shingles of each row.
        operators, content: see `twins`.
    """

    def __init__(self, folder: Path, rows: Rows, kind: str, wanted: np.ndarray) -> None:
        self.numbers = np.flatnonzero(wanted)
        shape = (BANDS, len(self.numbers))
        self.keys = np.memmap(folder / "keys", np.uint64, "w+", shape=shape)
        sizes = list[np.ndarray]()
        operators = list[np.ndarray]()
        content = list[np.ndarray]()
        start = 0
        with (folder / "shingles").open("wb") as file:
            for _, batch in rows.where(wanted, [*CONTENT[kind]]):
                texts: pa.Array = texts_of(kind, batch)
                sets = shingled(texts)
                file.write(sets.values.tobytes())
                self.keys[:, start : start + len(sets)] = band_keys(sets).T
                sizes.append(sets.sizes)
                operators.append(number_hashes(texts))
                content.append(first_bits(normalised_digests(texts).view(np.uint8).reshape(-1, 16)))
                start += len(sets)
        self.sizes, self.operators, self.content = (np.concatenate(parts) for parts in (sizes, operators, content))
        self.ends = np.append(0, np.cumsum(self.sizes))
        self.values = np.memmap(folder / "shingles", np.uint64, "r") if self.ends[-1] else np.zeros(0, np.uint64)

    def read(self, places: np.ndarray) -> Shingles:
        """Return the shingles of some rows."""
        parts = [self.values[self.ends[place] : self.ends[place + 1]] for place in places.tolist()]
        return Shingles(np.concatenate([np.zeros(0, np.uint64), *parts]), np.append(0, np.cumsum(self.sizes[places])))

    def are_mostly(self, shared: np.ndarray, near: float) -> np.ndarray:
        """Return which rows may be alike to others, at the least similarity, mostly by shared text, bool (rows)."""
        found = np.zeros(len(self.numbers), bool)
        for start in range(0, len(found), 1024):
            sets = self.read(np.arange(start, min(start + 1024, len(found))))
            found[start : start + len(sets)] = 2 * sets.only(shared).sizes > near * sets.sizes
        return found
