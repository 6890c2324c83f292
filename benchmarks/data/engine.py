"""Our duplicates on a folder of `corpus.py`: read → filter → exact and near duplicates → Parquet, in one process.

    python benchmarks/data/engine.py FOLDER OUTPUT

Texts lie in one file, shingles in one, and band keys in one file a band: memory holds some 60 bytes a document and no
text.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq

from align.data.dedup.near_duplicates import find_exact, find_near
from align.data.dedup.numbers import hash_numbers
from align.data.dedup.shingles import BANDS, Shingles, build_shingles, compute_band_keys, digest_normalised_texts

SHORTEST = 20
"""Characters that the filter asks for."""
BATCH = 1 << 22
"""Bytes of JSON that are read at once."""


class Spool:
    """Values of any length on disk, read again by index."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w+b")
        self.ends: list[np.ndarray] = [np.zeros(1, np.int64)]

    def add(self, data: Any, offsets: np.ndarray) -> None:
        """Args: offsets: int64 (N + 1), in bytes: where each value begins in `data`."""
        self.file.write(memoryview(data).cast("B")[offsets[0] : offsets[-1]])
        self.ends.append(self.ends[-1][-1] + offsets[1:] - offsets[0])

    def close(self) -> None:
        self.file.flush()
        self.ends = [np.concatenate(self.ends)]

    def read(self, indexes: np.ndarray) -> tuple[bytes, np.ndarray]:
        """What was added, of some."""
        (ends,), fd = self.ends, self.file.fileno()
        starts, sizes = ends[indexes], ends[indexes + 1] - ends[indexes]
        data = b"".join(map(os.pread, [fd] * len(starts), sizes.tolist(), starts.tolist()))
        return data, np.concatenate([[0], np.cumsum(sizes)])


class Texts(Spool):
    def keep(self, texts: pa.Array) -> None:
        _, offsets, data = pa.array(texts, pa.large_string()).buffers()
        self.add(data, np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1])

    def take(self, indexes: np.ndarray) -> pa.Array:
        data, offsets = self.read(indexes)
        return pa.LargeStringArray.from_buffers(len(indexes), pa.py_buffer(offsets), pa.py_buffer(data))


class Sets(Spool):
    def keep(self, sets: Shingles) -> None:
        self.add(sets.values, sets.offsets * 8)

    def take(self, indexes: np.ndarray) -> Shingles:
        data, offsets = self.read(indexes)
        return Shingles(np.frombuffer(data, np.uint64), offsets // 8)


def batches(path: Path) -> Iterator[pa.RecordBatch]:
    schema = pa.schema({"id": pa.string(), "text": pa.string()})
    yield from pyarrow.json.open_json(
        path, pyarrow.json.ReadOptions(block_size=BATCH, use_threads=False), pyarrow.json.ParseOptions(schema)
    )


class Clock:
    """CPU seconds by step."""

    def __init__(self, spent: dict[str, float]) -> None:
        self.spent, self.last = spent, time.process_time()

    def lap(self, step: str) -> None:
        now = time.process_time()
        self.spent[step] = self.spent.get(step, 0.0) + now - self.last
        self.last = now


def run(source: Path, output: Path, work: Path) -> dict[str, Any]:
    """Returns how many documents were read, kept, dropped, and CPU seconds by step."""
    spent: dict[str, float] = {}
    spool, kept = Texts(work / "texts"), Sets(work / "shingles")
    files = [(work / f"keys.{band}").open("wb") for band in range(BANDS)]
    ids, digests, numbers, sizes, read = [], [], [], [], 0
    rows, clock = batches(source / "corpus.jsonl"), Clock(spent)
    for batch in rows:
        read += len(batch)
        clock.lap("read")
        batch = batch.filter(pc.greater_equal(pc.utf8_length(batch["text"]), SHORTEST))
        texts = batch["text"]
        clock.lap("filter")
        digests.append(digest_normalised_texts(texts))
        clock.lap("digests")
        numbers.append(hash_numbers(texts))
        clock.lap("numbers")
        sets = build_shingles(texts)
        clock.lap("shingles")
        keys = compute_band_keys(sets)
        clock.lap("keys")
        spool.keep(texts)
        kept.keep(sets)
        for file, column in zip(files, keys.T, strict=True):
            file.write(column.tobytes())
        sizes.append(sets.sizes.astype(np.int32))
        ids.append(batch["id"])
        clock.lap("spool")
    for file in files:
        file.close()
    spool.close()
    kept.close()
    count = sum(map(len, sizes))
    order, size = np.arange(count), np.concatenate(sizes)
    same = find_exact(np.concatenate(digests), order)
    clock.lap("exact")
    size[same.dropped] = 0  # these have no keys any more
    found = find_near(
        order,
        size,
        lambda band: np.fromfile(work / f"keys.{band}", np.uint64),
        kept.take,
        numbers=np.concatenate(numbers),
        content=np.concatenate(digests).view(np.uint64)[::2].copy(),
    )
    clock.lap("twins")
    keep = np.ones(count, bool)
    keep[same.dropped] = keep[found.dropped] = False
    write(output, pa.chunked_array(ids), spool, np.flatnonzero(keep))
    clock.lap("write")
    return {"read": read, "kept": int(keep.sum()), "exact": len(same.dropped), "near": len(found.dropped), "s": spent}


def write(output: Path, ids: pa.ChunkedArray, spool: Texts, kept: np.ndarray) -> None:
    schema = pa.schema({"id": pa.string(), "text": pa.large_string()})
    with pq.ParquetWriter(output, schema) as writer:
        for at in range(0, len(kept), 8192):
            rows = kept[at : at + 8192]
            writer.write_batch(pa.record_batch([ids.take(pa.array(rows)).combine_chunks(), spool.take(rows)], schema))


if __name__ == "__main__":
    source, output = map(Path, sys.argv[1:])
    pa.set_cpu_count(1)
    work = output.with_suffix(".work")
    work.mkdir()
    print(json.dumps(run(source, output, work)))
