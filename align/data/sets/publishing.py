"""A data set written: the rows of a spool that were chosen, as Parquet shards and `data.json`, see `published`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from align.data.read.content import turn_row
from align.data.read.files import DATA_SET
from align.data.sets.columns import ABOUT_PAIRS, CONTENT, SAID, TOOLS, TURNS, list_offsets, turns_of
from align.data.sets.published import SCHEMA_VERSION, leaves_of, root_of_sides
from align.data.sets.sides import SIDES
from align.data.sets.spool import Rows, as_numpy, first_bits
from align.merkle import Tree, root_of
from align.run.digests import file_digest
from align.run.files import write_json
from align.types import json_text

pc: Any = pyarrow.compute  # whose functions are made when it is imported

FROM_FACTS = ("content_id", "question_id", "source", "row", "metadata")
"""Columns of a spool that stand beside the content."""
SHARD = 250_000
"""Rows of a shard."""
SORTED = 1 << 20
"""Content ids that are sorted at once."""
GROUP, HEAVY = 16_384, 64 * 2**20
"""Rows of a row group at most; bytes from which on it ends."""
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
MESSAGES = pa.list_(MESSAGE)
"""A column of turns that are all trained on."""
MARKED = pa.list_(pa.struct([*MESSAGE, ("train", pa.bool_())]))
"""A column of turns, each of which says whether it is."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a data set keeps of a spool's rows.

    Attributes:
        times: how often each row is written, int32 (N); 0 leaves it out.
        test: whether each row is measured on, bool (N).
        duplicates, heads: rows that are duplicates, and the row under which each is.
        scores: of each row, float64 (N), nan for none; None where rows are not scored.
    """

    times: np.ndarray
    test: np.ndarray
    duplicates: np.ndarray
    heads: np.ndarray
    scores: np.ndarray | None = None

    def clusters(self, rows: Rows) -> np.ndarray:
        """The content id (hex) of the row under which each row's cluster is; None for a row without duplicates."""
        found = np.full(len(self.times), None, object)
        if len(self.heads):
            of, place = np.unique(self.heads, return_inverse=True)
            ids = np.array([id.hex() for id in rows.take(of, ["content_id"])["content_id"].to_pylist()], object)
            found[of], found[self.duplicates] = ids, ids[place]
        return found


def publish(
    folder: Path, rows: Rows, kind: str, names: Sequence[str], chosen: Chosen, said: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a data set.

    Args:
        names: of the sources.
        said: what `data.json` says besides.

    Returns:
        what `data.json` says.
    """
    columns, clusters = used_columns(rows, kind), chosen.clusters(rows)
    turns = turn_type(rows, kind)
    types = {name: turns if CONTENT[kind][name] == TURNS else CONTENT[kind][name] for name in columns}
    types |= {TOOLS: SAID} if TOOLS in types else {}
    written = chosen.times > 0
    wanted = [written & ~chosen.test, written & chosen.test]
    writers = [
        Shards(folder, name, int(chosen.times[of_side].sum())) for name, of_side in zip(SIDES, wanted, strict=True)
    ]

    def columns_at(numbers: np.ndarray, batch: pa.RecordBatch) -> pa.Table:
        about = {"cluster": clusters[numbers]}
        about |= {} if chosen.scores is None else {"score": chosen.scores[numbers]}
        return published_columns(batch, types, names, about)

    for first, batch in rows.batches([*columns, *FROM_FACTS]):
        here = slice(first, first + batch.num_rows)
        for of_side, writer in zip(wanted, writers, strict=True):
            if (mask := of_side[here]).any():
                writer.add(columns_at(first + np.flatnonzero(mask), batch.filter(pa.array(mask))))
    for of_side, writer in zip(wanted, writers, strict=True):
        for numbers in repeated(np.where(of_side, chosen.times, 0)):
            [batch] = rows.take(numbers, [*columns, *FROM_FACTS]).to_batches()
            writer.add(columns_at(numbers, batch))
        writer.distinct = int(of_side.sum())
    sides = {name: writer.close() for name, writer in zip(SIDES, writers, strict=True)}
    shards = {path.name: file_digest(path) for writer in writers for path in writer.paths}
    ids = unique_ids(rows, written)
    data = {
        "schema_version": SCHEMA_VERSION, "kind": kind, **said, "splits": sides,
        "root": root_of_sides(sides), "ids_root": root_of(ids),
        "shards": shards,
    }  # fmt: skip
    write_json(folder / DATA_SET, data)
    return data


def repeated(times: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the numbers of rows that are written again, behind all rows once: those that stand there twice, then those
    that stand there three times, and so on, `GROUP` at a time."""
    numbers = np.flatnonzero(times > 1)
    for often in range(1, int(times.max(initial=0))):
        numbers = numbers[times[numbers] > often]
        for start in range(0, len(numbers), GROUP):
            yield numbers[start : start + GROUP]


def used_columns(rows: Rows, kind: str) -> list[str]:
    """The content columns that say anything of any row."""
    used = set[str]()
    for name in CONTENT[kind]:
        for _, batch in rows.batches([name]):
            column = batch.column(name)
            values = column.unique().to_pylist() if name in ABOUT_PAIRS else [True]
            says_something = any(value not in (None, "") and value is not True for value in values)
            if says_something if name in ABOUT_PAIRS else column.null_count < len(column):
                used.add(name)
                break
    return [name for name in CONTENT[kind] if name in used]


def turn_type(rows: Rows, kind: str) -> pa.DataType:
    """What turns are published as: JSON where tools are called, else structs, which say what is trained on where some
    turn is not."""
    parts = [name for name, type in CONTENT[kind].items() if type == TURNS]
    type = MESSAGES
    for _, batch in rows.batches(parts):
        for name in parts:
            turns = batch.column(name).flatten()
            if turns.field("calls").null_count < len(turns) or pc.any(pc.equal(turns.field("role"), "tool")).as_py():
                return SAID
            type = type if pc.all(turns.field("train"), min_count=0).as_py() else MARKED
    return type


def published_columns(
    batch: pa.RecordBatch, columns: Mapping[str, pa.DataType], names: Sequence[str], about: Mapping[str, Any]
) -> pa.Table:
    """Rows of a spool as rows of a data set.

    Args:
        columns: content column → its type.
    """
    ids = {name: hex_texts(batch.column(name)) for name in ("content_id", "question_id")}
    source = pa.DictionaryArray.from_arrays(batch.column("source").cast(pa.int32()), pa.array(list(names)))
    return pa.table({
        **{name: narrowed(batch.column(name), type) for name, type in columns.items()},
        **ids, "source": source.cast(pa.string()), "row": batch.column("row"),
        "cluster": pa.array(about["cluster"], pa.string()), "metadata": batch.column("metadata"),
        **({"score": pa.array(about["score"], pa.float64(), from_pandas=True)} if "score" in about else {}),
    })  # fmt: skip


def hex_texts(ids: pa.FixedSizeBinaryArray) -> pa.StringArray:
    """Ids in hex, all of a column at once."""
    found = as_numpy(ids)
    offsets = np.arange(len(found) + 1, dtype=np.int32) * (2 * found.shape[1])
    return pa.StringArray.from_buffers(len(found), pa.py_buffer(offsets), pa.py_buffer(found.tobytes().hex().encode()))


def narrowed(column: pa.Array, type: pa.DataType) -> pa.Array:
    """A column of a spool as one of a data set: turns with those fields alone that its type has, or as JSON; tools as a
    list."""
    mask = column.is_null() if column.null_count else None
    if type == SAID and column.type == TURNS:
        return json_lists([None if turns is None else [json_text(turn_row(turn)) for turn in turns_of(turns)]
                           for turns in column.to_pylist()])  # fmt: skip
    if type == SAID:
        return json_lists([None if tools is None else [json_text(tool) for tool in json.loads(tools)]
                           for tools in column.to_pylist()])  # fmt: skip
    if type not in (MESSAGES, MARKED):
        return column
    turns, fields = column.flatten(), list(type.value_type)
    kept = pa.StructArray.from_arrays([turns.field(field.name) for field in fields], fields=fields)
    return pa.ListArray.from_arrays(pa.array(list_offsets(column), pa.int32()), kept, type=type, mask=mask)


def json_lists(values: Sequence[Sequence[str] | None]) -> pa.Array:
    """Lists of JSON texts as a column of JSON."""
    return pa.array(values, pa.list_(pa.string())).cast(SAID)


class Shards:
    """The Parquet files of one side, written in row groups.

    Args:
        count: rows that will come.

    Attributes:
        distinct: how many of its rows are different ones: others are repeated.
    """

    def __init__(self, folder: Path, side: str, count: int) -> None:
        number = -(-count // SHARD)
        self.paths = [folder / f"{side}-{i:05d}-of-{number:05d}.parquet" for i in range(number)]
        self.tree, self.rows, self.distinct, self.forgotten = Tree(), 0, 0, list[tuple[int, str]]()
        self._held: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> None:
        self.tree.extend(leaves_of(table))
        while table.num_rows:
            room = SHARD - self.rows % SHARD
            now, table = table.slice(0, room), table.slice(room)
            self._held.append(now)
            self.rows += now.num_rows
            full = self.rows % SHARD == 0
            if full or sum(t.num_rows for t in self._held) >= GROUP or sum(t.nbytes for t in self._held) >= HEAVY:
                self._flush()
            if full:
                self._end()

    def bury(self, tombstone: bytes) -> None:
        """Put a leaf where a row was."""
        self.forgotten.append((self.tree.size, tombstone.hex()))
        self.tree.add(tombstone)

    def _flush(self) -> None:
        if self._held:
            table = pa.concat_tables(self._held)
            if self._writer is None:
                self._writer = pq.ParquetWriter(self.paths[(self.rows - 1) // SHARD], table.schema, compression="zstd")
            self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
            self._held = []

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def close(self) -> dict[str, Any]:
        """What there is of the side."""
        self._flush()
        self._end()
        told = {"forgotten": self.forgotten} if self.forgotten else {}
        return {"rows": self.rows, "distinct": self.distinct, "root": self.tree.root(), **told}


def unique_ids(rows: Rows, wanted: np.ndarray) -> Iterator[bytes]:
    """The content ids of these rows, sorted, each once; some `SORTED` in memory at a time, by what they begin with."""
    parts = len(wanted) // SORTED + 1
    for part in range(parts):
        some = [np.zeros(0, "V32")]
        for first, batch in rows.batches(["content_id"]):
            ids = as_numpy(batch.column("content_id"))
            of = (first_bits(ids) >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32)
            here = wanted[first : first + len(ids)] & (of == part)
            some.append(ids[here].view("V32").ravel())
        for id in np.unique(np.concatenate(some)):
            yield bytes(id)
