"""Encode and write rows in every format that align reads, for tests of reading."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from align.data.read.rows import iter_rows

Rows = Sequence[Mapping[str, Any]]


def iter_numbered_rows(path: str | Path, field: str = "data.path", skip: int = 0) -> Iterator[tuple[int, Any]]:
    """Yield the number of each row of a data set, and its columns or its error."""
    return ((row.number, row.error or row.data) for row in iter_rows(path, field, skip))


def encode_json_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def encode_table(rows: Rows, separator: str) -> bytes:
    """Write a table as pandas does: lists as JSON, null as an empty cell."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=separator)
    writer.writerow(names)
    for row in rows:
        values = [row.get(name) for name in names]
        writer.writerow([json.dumps(v) if isinstance(v, list | dict | bool) else v for v in values])
    return file.getvalue().encode()


def encode_parquet(rows: Rows) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(map(dict, rows))), file, row_group_size=3)
    return file.getvalue()


def encode_arrow(rows: Rows, new: Callable[..., Any]) -> bytes:
    file = io.BytesIO()
    arrow_table = pa.Table.from_pylist(list(map(dict, rows)))
    with new(file, arrow_table.schema) as writer:
        writer.write_table(arrow_table, max_chunksize=3)
    return file.getvalue()


WRITERS: Mapping[str, Callable[[Rows], bytes]] = {
    "d.jsonl": encode_json_lines,
    "array.json": lambda rows: json.dumps(rows).encode(),
    "indented.json": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).encode("utf-8-sig"),
    "held.json": lambda rows: json.dumps({"version": "1.0", "tags": ["a"], "data": rows, "n": {"rows": 1}}).encode(),
    "lines.json": encode_json_lines,
    "d.csv": lambda rows: encode_table(rows, ",").replace(b"\r\n", b"\n"),
    "semicolons.csv": lambda rows: b"\xef\xbb\xbf" + encode_table(rows, ";"),
    "d.tsv": lambda rows: encode_table(rows, "\t"),
    "d.parquet": encode_parquet,
    "file.arrow": lambda rows: encode_arrow(rows, pyarrow.ipc.new_file),
    "stream.arrow": lambda rows: encode_arrow(rows, pyarrow.ipc.new_stream),
}
"""File name → a function that encodes rows in its format."""
TABLES = ("d.csv", "semicolons.csv", "d.tsv")
COLUMNS = ("d.parquet", "file.arrow", "stream.arrow")
PACKERS: Mapping[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda blob: gzip.compress(blob, mtime=0),
    ".zst": lambda blob: pa.compress(blob, codec="zstd", asbytes=True),
    ".xz": lambda blob: lzma.compress(blob, preset=0),
    ".bz2": lambda blob: bz2.compress(blob, 1),
}


def write_row_file(folder: Path, name: str, rows: Rows, packed: str = "") -> Path:
    """Write rows to a file. Returns its path."""
    path = folder / f"{name}{packed}"
    path.write_bytes(PACKERS[packed](WRITERS[name](rows)))
    return path
