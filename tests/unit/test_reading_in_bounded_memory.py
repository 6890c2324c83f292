"""Large files are read in memory that does not grow with them."""

from __future__ import annotations

import gzip
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from row_formats import COLUMNS, WRITERS, write_row_file

GROWTH = """
import sys
from align.data.read.rows import iter_rows as rows

def kilobytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))

list(rows(sys.argv[2]))  # imports
open("/proc/self/clear_refs", "w").write("5")  # VmHWM begins again
before, count = kilobytes("VmRSS"), sum(1 for _ in rows(sys.argv[1]))
print(count, (kilobytes("VmHWM") - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "d.jsonl",
        "d.jsonl.gz",
        "d.jsonl.zst",
        "array.json",
        "held.json",
        "d.csv",
        "d.parquet",
        "file.arrow",
        "stream.arrow",
        "d.parquet.gz",
    ],
)
def test_a_large_file_is_read_in_memory_that_does_not_grow(tmp_path: Path, name: str) -> None:
    """The file has 180 MB, and memory may grow by 100. Parquet has one group of rows, as pandas writes it."""
    generator = random.Random(0)
    count = 180_000
    words = [f"{generator.getrandbits(48):x}" for _ in range(5000)]

    # Ten blocks by turns: more than the window of any codec or dictionary.
    blocks = [
        [
            {"prompt": " ".join(generator.choices(words, k=40)), "completion": " ".join(generator.choices(words, k=40))}
            for _ in range(1000)
        ]
        for _ in range(10)
    ]
    plain = name.removesuffix(".gz").removesuffix(".zst")
    packed = "." + name.rsplit(".", 1)[1]
    path = tmp_path / plain
    if plain in COLUMNS:
        schema = pa.schema({"prompt": pa.string(), "completion": pa.string()})
        batches = [pa.RecordBatch.from_pylist(block, schema) for block in blocks]
        table = pa.Table.from_batches(batches * (count // 1000 // len(batches)))
        if plain == "d.parquet":
            pq.write_table(table, path, row_group_size=count, compression="none")
        else:
            new = pyarrow.ipc.new_file if plain == "file.arrow" else pyarrow.ipc.new_stream
            with new(path, schema) as writer:
                writer.write_table(table)
    else:
        blobs = [WRITERS[plain](block) for block in blocks]
        with path.open("wb") as file:
            for i in range(count // 1000):
                blob = blobs[i % len(blobs)]
                if plain == "d.csv" and i:
                    blob = blob.partition(b"\n")[2]
                elif plain == "array.json":
                    blob = (b"[" if not i else b"") + blob[1:-1] + (b"]" if i == count // 1000 - 1 else b",")
                elif plain == "held.json":
                    blob = (b'{"data": [' if not i else b"") + blob[blob.index(b"[{") + 1 : blob.rindex(b"}]") + 1]
                    blob += b"]}" if i == count // 1000 - 1 else b","
                file.write(blob)
    assert path.stat().st_size > 165 * 2**20
    if packed in (".gz", ".zst"):
        packed_path = str(tmp_path / name)
        packing = (
            gzip.GzipFile(packed_path, "wb", 1) if packed == ".gz" else pa.CompressedOutputStream(packed_path, "zstd")
        )
        with path.open("rb") as file, packing as out:
            shutil.copyfileobj(file, out, 2**20)
    small = write_row_file(tmp_path / "..", plain, [{"prompt": "a", "completion": "b"}])
    process = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path / name), str(small)], capture_output=True, text=True, check=True
    )
    row_count, grown_mb = map(int, process.stdout.split())
    print(name, grown_mb, "MB")
    assert row_count == count
    assert grown_mb <= 100
