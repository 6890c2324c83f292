"""Deduplicate a corpus of `corpus.py` with align's functions: read → filter → exact and near duplicates → Parquet.

    python benchmarks/data/align_pipeline.py FOLDER OUTPUT

Runs in one process. Texts are in one temporary file, shingles in another, and band keys in one file per band; memory
holds some 60 bytes per document and no text.
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

MIN_CHARACTERS = 20
"""Shorter documents are filtered out."""
BATCH_BYTES = 1 << 22
"""Bytes of JSON that are read at once."""


class Spool:
    """A file of values of any length, which can be read by index."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w+b")
        self.ends: list[np.ndarray] = [np.zeros(1, np.int64)]

    def add(self, data: Any, offsets: np.ndarray) -> None:
        """Append N values.

        Args:
            offsets: int64 (N + 1), the start of each value in `data` in bytes, and the end of the last one.
        """
        self.file.write(memoryview(data).cast("B")[offsets[0] : offsets[-1]])
        self.ends.append(self.ends[-1][-1] + offsets[1:] - offsets[0])

    def finish(self) -> None:
        """Write buffered values to disk. Values can be read afterwards, and none can be added."""
        self.file.flush()
        self.ends = [np.concatenate(self.ends)]

    def read(self, indexes: np.ndarray) -> tuple[bytes, np.ndarray]:
        """Return the bytes of some values one after another, and their offsets in these bytes."""
        (ends,) = self.ends
        starts = ends[indexes]
        sizes = ends[indexes + 1] - starts
        files = [self.file.fileno()] * len(starts)
        data = b"".join(map(os.pread, files, sizes.tolist(), starts.tolist()))
        return data, np.concatenate([[0], np.cumsum(sizes)])


class TextSpool(Spool):
    """A file of texts."""

    def add_texts(self, texts: pa.Array) -> None:
        _, offsets, data = pa.array(texts, pa.large_string()).buffers()
        self.add(data, np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1])

    def take(self, indexes: np.ndarray) -> pa.Array:
        data, offsets = self.read(indexes)
        return pa.LargeStringArray.from_buffers(len(indexes), pa.py_buffer(offsets), pa.py_buffer(data))


class ShingleSpool(Spool):
    """A file of sets of shingles."""

    def add_sets(self, sets: Shingles) -> None:
        self.add(sets.values, sets.offsets * 8)

    def take(self, indexes: np.ndarray) -> Shingles:
        data, offsets = self.read(indexes)
        return Shingles(np.frombuffer(data, np.uint64), offsets // 8)


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield batches with the columns `id` and `text`."""
    schema = pa.schema({"id": pa.string(), "text": pa.string()})
    yield from pyarrow.json.open_json(
        path, pyarrow.json.ReadOptions(block_size=BATCH_BYTES, use_threads=False), pyarrow.json.ParseOptions(schema)
    )


class CpuClock:
    """CPU seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.process_time()

    def finish_step(self, step: str) -> None:
        """Add the time since the last call to a step."""
        now = time.process_time()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self.last
        self.last = now


def deduplicate(source: Path, output: Path, work: Path) -> dict[str, Any]:
    """Write the documents of a corpus without duplicates.

    Returns the numbers of documents that were read, kept and dropped as exact and near duplicates, and the CPU seconds
    of each step.

    Args:
        source: folder of the corpus.
        output: Parquet file to write.
        work: folder for temporary files.
    """
    texts_spool = TextSpool(work / "texts")
    shingles_spool = ShingleSpool(work / "shingles")
    key_files = [(work / f"keys.{band}").open("wb") for band in range(BANDS)]
    ids = []
    digests = []
    numbers = []
    sizes = []
    documents_read = 0
    clock = CpuClock()
    for batch in read_batches(source / "corpus.jsonl"):
        documents_read += len(batch)
        clock.finish_step("read")
        batch = batch.filter(pc.greater_equal(pc.utf8_length(batch["text"]), MIN_CHARACTERS))
        texts = batch["text"]
        clock.finish_step("filter")
        digests.append(digest_normalised_texts(texts))
        clock.finish_step("digests")
        numbers.append(hash_numbers(texts))
        clock.finish_step("numbers")
        sets = build_shingles(texts)
        clock.finish_step("shingles")
        keys = compute_band_keys(sets)
        clock.finish_step("keys")
        texts_spool.add_texts(texts)
        shingles_spool.add_sets(sets)
        for file, column in zip(key_files, keys.T, strict=True):
            file.write(column.tobytes())
        sizes.append(sets.sizes.astype(np.int32))
        ids.append(batch["id"])
        clock.finish_step("spool")
    for file in key_files:
        file.close()
    texts_spool.finish()
    shingles_spool.finish()
    order = np.arange(sum(map(len, sizes)))
    size = np.concatenate(sizes)
    exact = find_exact(np.concatenate(digests), order)
    clock.finish_step("exact")
    size[exact.dropped] = 0  # find_near skips documents without shingles
    near = find_near(
        order,
        size,
        lambda band: np.fromfile(work / f"keys.{band}", np.uint64),
        shingles_spool.take,
        numbers=np.concatenate(numbers),
        content=np.concatenate(digests).view(np.uint64)[::2].copy(),
    )
    clock.finish_step("twins")
    keep = np.ones(len(order), bool)
    keep[exact.dropped] = False
    keep[near.dropped] = False
    write_documents(output, pa.chunked_array(ids), texts_spool, np.flatnonzero(keep))
    clock.finish_step("write")
    return {
        "read": documents_read,
        "kept": int(keep.sum()),
        "exact": len(exact.dropped),
        "near": len(near.dropped),
        "s": clock.seconds,
    }


def write_documents(output: Path, ids: pa.ChunkedArray, texts: TextSpool, indexes: np.ndarray) -> None:
    """Write the documents at these indexes in order."""
    schema = pa.schema({"id": pa.string(), "text": pa.large_string()})
    with pq.ParquetWriter(output, schema) as writer:
        for start in range(0, len(indexes), 8192):
            rows = indexes[start : start + 8192]
            writer.write_batch(pa.record_batch([ids.take(pa.array(rows)).combine_chunks(), texts.take(rows)], schema))


if __name__ == "__main__":
    source, output = map(Path, sys.argv[1:])
    pa.set_cpu_count(1)
    work = output.with_suffix(".work")
    work.mkdir()
    print(json.dumps(deduplicate(source, output, work)))
