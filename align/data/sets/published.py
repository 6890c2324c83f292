"""A data set on disk: Parquet shards for each side, and `data.json`, which says what they are and how they were made.

    train-00000-of-00002.parquet …   test-00000-of-00001.parquet   data.json

`datasets.load_dataset` reads the folder as it is. Each row has its content and, beside it, `content_id` and
`question_id` (hex), its `source` and the `row` there, its `cluster` (the content id under which its duplicates
were removed, or null), and its `metadata`: JSON of the columns that are no part of it, or null. A row that the mixture
repeats stands there as often as it is to be seen: all rows once, then those that are seen again.

The fingerprint of a side is the Merkle root over the sequence of its rows, each a leaf of its content id and the number
1 (32 bytes and 4, big-endian); that of the data set is the root over its sides' roots, train first. `ids_root` is
the root over the sorted set of content ids of all sides. A row that was forgotten is in no file: in its place in the
sequence is a tombstone, a leaf of 32 random bytes, which `splits.SIDE.forgotten` has as [place, leaf in hex].

Content ids and question ids are SHA-256, those of rows of the annotation store HMAC, see `ids`.
"""

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
from numpy import ndarray

from align.core.errors import CorruptFile, MissingArtifact, require_schema_version
from align.core.files import check_readable, parse_user_path
from align.core.merkle import MerkleTree, build_inclusion_proof, compute_proof_root, compute_root
from align.core.types import Record, dump_json
from align.data.read.content import to_turn_row
from align.data.read.files import DATA_SET_FILE, RESTORE_HELP, SHARD_NAME
from align.data.sets.record_columns import (
    ABOUT_PAIRS,
    CONTENT,
    PARTS,
    SAID,
    TOOLS,
    TURNS,
    list_offsets,
    records_of,
    turn_of,
)
from align.data.sets.sides import SIDES
from align.data.sets.spool import Rows, as_numpy, first_bits
from align.run.artifacts import check_not_replaced, find_run, list_done_runs
from align.run.digests import file_digest, lookup_digest
from align.run.files import read_json_object, write_json
from align.run.manifest import FILE as RUN
from align.run.manifest import read_manifest

pc: Any = pyarrow.compute  # whose functions are made when it is imported

SCHEMA_VERSION = 2
TOMBSTONE = 32
"""Bytes of the leaf that stands for a row which was forgotten."""
ROOTS = ("root", "ids_root")
"""What a run's manifest says of a data set besides its digest."""
MAKE = 'Make it with: python -m align stage=data "stage.sources=[…]".'
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


def root_of_sides(splits: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the root over those of the sides, train first; an empty text if one is no digest."""
    try:
        return compute_root(bytes.fromhex(splits[name]["root"]) for name in SIDES)
    except ValueError:
        return ""


def leaf(content_id: bytes, times: int = 1) -> bytes:
    """Return a row as a leaf of a tree.

    Args:
        times: for how many equal rows the leaf stands; for one in the tree of a data set.
    """
    return content_id + times.to_bytes(4, "big")


def leaves_of(table: pa.Table) -> Iterator[bytes]:
    """Yield the leaves of rows of a data set."""
    for id in table["content_id"].to_pylist():
        yield leaf(bytes.fromhex(id))


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set that was published.

    Attributes:
        folder: where it lies.
        data: what `data.json` says.
    """

    folder: Path
    data: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return self.data["kind"]

    def records(self, side: str) -> list[Record]:
        """Return the records of `train` or `test` in order. A row that is repeated is there as often.

        Raises:
            CorruptFile: the rows are not those whose root `data.json` has, or no such rows at all.
        """
        records = list[Record]()
        tree = MerkleTree()
        try:
            for piece in self.pieces(side, [*CONTENT[self.kind], "source", "row", "content_id"]):
                if isinstance(piece, bytes):
                    tree.add(piece)
                    continue
                places = zip(piece["source"].to_pylist(), piece["row"].to_pylist(), strict=True)
                records += records_of(self.kind, piece, [f"{source}:{row}" for source, row in places])
                tree.extend(leaves_of(piece))
        except (pa.ArrowException, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            problem = f"holds no rows of a data set in its {side} files ({type(error).__name__}: {str(error)[:120]})"
            raise CorruptFile("data.path", str(self.folder), problem, RESTORE_HELP) from error
        if tree.root() != self.data["splits"][side]["root"]:
            problem = f"has other rows in its {side} files than those whose root {DATA_SET_FILE} has"
            raise CorruptFile("data.path", str(self.folder), problem, RESTORE_HELP)
        return records

    def sources(self, side: str) -> list[str]:
        """Return the source of each row of a side, in the order in which they stand there."""
        return [name for table in self.tables(side, ["source"]) for name in table["source"].to_pylist()]

    def tables(self, side: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the rows of one side, a row group at a time.

        Args:
            columns: those that are read, as far as they are there; None for all.
        """
        for name in sorted(self.data["shards"]):
            if name.startswith(f"{side}-"):
                check_readable(self.folder / name, "data.path", RESTORE_HELP)
                with pq.ParquetFile(self.folder / name) as file:
                    for group in range(file.num_row_groups):
                        yield file.read_row_group(group, columns=columns)

    def pieces(self, side: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table | bytes]:
        """Yield the sequence whose root the side has: rows, and where some were forgotten, their tombstones.

        Raises:
            ValueError: the tombstones are none, or stand behind the end.
        """
        forgotten = {int(place): bytes.fromhex(leaf) for place, leaf in self.data["splits"][side].get("forgotten", ())}
        if any(place < 0 or len(leaf) != TOMBSTONE for place, leaf in forgotten.items()):  # a row's leaf is longer
            raise ValueError("a tombstone that is none")
        waiting = sorted(forgotten)
        place = 0
        for table in self.tables(side, columns):
            while waiting and waiting[0] <= place + table.num_rows:
                first = waiting.pop(0) - place
                if first:
                    yield table.slice(0, first)
                yield forgotten[place + first]
                place += first + 1
                table = table.slice(first)
            if table.num_rows:
                yield table
            place += table.num_rows
        for left in waiting:  # behind the last row
            if left != place:
                raise ValueError(f"a tombstone at {left} of {place}")
            yield forgotten[left]
            place += 1

    def leaves(self, side: str) -> list[bytes]:
        """Return the leaves of one side, in order."""
        pieces = self.pieces(side, ["content_id"])
        return [leaf for piece in pieces for leaf in ([piece] if isinstance(piece, bytes) else leaves_of(piece))]


def find_data_set(ref: str, root: Path) -> Path:
    """Return the folder that a reference names: a path, `data:latest` or `data:NAME`.

    Args:
        root: the folder of all runs.

    Raises:
        MissingArtifact: there is none, or its run is not done.
    """
    field = "data.path"
    stage, _, name = ref.partition(":")
    folder = parse_user_path(ref, field)
    if not folder.is_dir():
        if stage != "data" or not name:
            problem = "there is no such folder, and a reference is data:latest or data:NAME"
            raise MissingArtifact(field, ref, problem, MAKE)
        if name != "latest":
            folder = find_run(("data",), name, root, ref, field, "python -m align stage=data")
        elif done := list_done_runs(("data",), root):
            folder = done[0]
        else:
            raise MissingArtifact(field, ref, f"no finished data run under {root}", MAKE)
    if (folder / RUN).is_file() and not (manifest := read_manifest(folder)).done:
        problem = f"the run in {folder} is {manifest.status}, not done"
        raise MissingArtifact(field, ref, problem, "Run the same command again to finish it.")
    return folder / "artifact" if (folder / "artifact" / DATA_SET_FILE).is_file() else folder


def data_set(folder: Path) -> DataSet:
    """Return the data set in a folder, every shard as it was written.

    Raises:
        MissingArtifact: there is none.
        CorruptFile: a file is not what was published.
    """
    data = described(folder)
    for name, digest in data["shards"].items():
        path = folder / name
        if not path.is_file() or lookup_digest(path) != digest:
            problem = "is missing" if not path.is_file() else "is not the file that was published (its sha256 differs)"
            raise CorruptFile("data.path", str(path), problem, RESTORE_HELP)
    return DataSet(folder, data)


def described(folder: Path) -> dict[str, Any]:
    """Return what `data.json` of a folder says.

    Raises:
        MissingArtifact: there is none.
        CorruptFile: it says no such thing.
        InputError: it is of another version, or another data set took its place.
    """
    field = "data.path"
    path = folder / DATA_SET_FILE
    check_not_replaced(folder, field)
    if not path.is_file():
        raise MissingArtifact(field, str(folder), f"holds no data set: {DATA_SET_FILE} is not there", MAKE)
    data = read_json_object(path, field, RESTORE_HELP)
    require_schema_version(data.get("schema_version"), SCHEMA_VERSION, field, str(path), MAKE)
    shards = data.get("shards")
    splits = data.get("splits")
    sides = [splits.get(side) for side in SIDES] if isinstance(splits, dict) else [None]
    describes = (
        isinstance(shards, dict)
        and all(SHARD_NAME.fullmatch(name) for name in shards)
        and all(isinstance(side, dict) and isinstance(side.get("root"), str) for side in sides)
        and all(isinstance(data.get(key), str) for key in ROOTS)
        and data.get("kind") in [*CONTENT]
    )
    if not describes:
        raise CorruptFile(field, str(path), "does not describe a data set", RESTORE_HELP)
    if data["root"] != root_of_sides(data["splits"]):
        raise CorruptFile(field, str(path), "has another root than that of its sides", RESTORE_HELP)
    return data


@dataclass(frozen=True, slots=True)
class Proof:
    """Where a row is, and what its root is made with, for somebody who knows the root of a data set alone.

    Attributes:
        side: `train` or `test`.
        place: in the side's sequence, from 0.
        size: rows of the sequence, forgotten ones among them.
        path: see `align.core.merkle.build_inclusion_proof`.
        other: the root of the other side.
    """

    side: str
    place: int
    size: int
    path: tuple[bytes, ...]
    other: str


def proof_of(found: DataSet, side: str, content_id: bytes) -> Proof:
    """Return a proof that one side of a data set has a row: where it stands first, if it is repeated.

    Raises:
        ValueError: it has none.
    """
    leaves = found.leaves(side)
    place = leaves.index(leaf(content_id))
    [other] = (found.data["splits"][name]["root"] for name in SIDES if name != side)
    return Proof(side, place, len(leaves), tuple(build_inclusion_proof(leaves, place)), other)


def holds(proof: Proof, content_id: bytes, root: str) -> bool:
    """Return whether a proof shows that the data set with this root has the row."""
    own = compute_proof_root(leaf(content_id), proof.place, proof.size, proof.path)
    if own is None or proof.side not in SIDES:
        return False
    return compute_root(bytes.fromhex(own if side == proof.side else proof.other) for side in SIDES) == root


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a data set keeps of a spool's rows.

    Attributes:
        times: how often each row is written, int32 (N); 0 leaves it out.
        test: whether each row is measured on, bool (N).
        duplicates, heads: rows that are duplicates, and the row under which each is.
        scores: of each row, float64 (N), nan for none; None if rows are not scored.
    """

    times: ndarray
    test: ndarray
    duplicates: ndarray
    heads: ndarray
    scores: ndarray | None = None

    def clusters(self, rows: Rows) -> ndarray:
        """Return the content id (hex) of the row under which each row's cluster is; None for a row without
        duplicates."""
        clusters = np.full(len(self.times), None, object)
        if len(self.heads):
            of, place = np.unique(self.heads, return_inverse=True)
            ids = np.array([id.hex() for id in rows.take(of, ["content_id"])["content_id"].to_pylist()], object)
            clusters[of] = ids
            clusters[self.duplicates] = ids[place]
        return clusters


def publish(folder: Path, rows: Rows, chosen: Chosen, said: Mapping[str, Any]) -> dict[str, Any]:
    """Write a data set: the rows of a spool that were chosen, as Parquet shards and `data.json`.

    Args:
        said: what `data.json` says besides.

    Returns:
        what `data.json` says.
    """
    types = published_types(rows)
    clusters = chosen.clusters(rows)
    read = [*types, *FROM_FACTS]
    written = chosen.times > 0
    wanted = [written & ~chosen.test, written & chosen.test]
    writers = [
        Shards(folder, name, int(chosen.times[of_side].sum())) for name, of_side in zip(SIDES, wanted, strict=True)
    ]

    def as_published(numbers: ndarray, batch: pa.RecordBatch) -> pa.Table:
        source = pa.DictionaryArray.from_arrays(batch.column("source").cast(pa.int32()), pa.array(list(rows.names)))
        columns = {name: narrowed(batch.column(name), type) for name, type in types.items()}
        columns |= {name: hex_texts(batch.column(name)) for name in ("content_id", "question_id")}
        columns |= {
            "source": source.cast(pa.string()),
            "row": batch.column("row"),
            "cluster": pa.array(clusters[numbers], pa.string()),
            "metadata": batch.column("metadata"),
        }
        if chosen.scores is not None:
            columns["score"] = pa.array(chosen.scores[numbers], pa.float64(), from_pandas=True)
        return pa.table(columns)

    for first, batch in rows.batches(read):
        here = slice(first, first + batch.num_rows)
        for of_side, writer in zip(wanted, writers, strict=True):
            if (mask := of_side[here]).any():
                writer.add(as_published(first + np.flatnonzero(mask), batch.filter(pa.array(mask))))
    for of_side, writer in zip(wanted, writers, strict=True):
        # Rows that are written again, behind all rows once: those that stand there twice, then those three times, …
        times = np.where(of_side, chosen.times, 0)
        for often in range(1, int(times.max(initial=0))):
            again = np.flatnonzero(times > often)
            for start in range(0, len(again), GROUP):
                numbers = again[start : start + GROUP]
                [batch] = rows.take(numbers, read).to_batches()
                writer.add(as_published(numbers, batch))
        writer.distinct = int(of_side.sum())
    sides = {name: writer.close() for name, writer in zip(SIDES, writers, strict=True)}
    data = {
        "schema_version": SCHEMA_VERSION,
        "kind": rows.kind,
        **said,
        "splits": sides,
        "root": root_of_sides(sides),
        "ids_root": compute_root(unique_ids(rows, written)),
        "shards": {path.name: file_digest(path) for writer in writers for path in writer.paths},
    }
    write_json(folder / DATA_SET_FILE, data)
    return data


def published_types(rows: Rows) -> dict[str, pa.DataType]:
    """Return the content columns that say anything of any row, and what they are published as."""
    turns = turn_type(rows)
    types = dict[str, pa.DataType]()
    for name, type in CONTENT[rows.kind].items():
        for _, batch in rows.batches([name]):
            column = batch.column(name)
            if name in ABOUT_PAIRS:
                is_used = any(value not in (None, "") and value is not True for value in column.unique().to_pylist())
            else:
                is_used = column.null_count < len(column)
            if is_used:
                types[name] = turns if type == TURNS else SAID if name == TOOLS else type
                break
    return types


def turn_type(rows: Rows) -> pa.DataType:
    """Return what turns are published as: JSON if tools are called, else structs, which say what is trained on if some
    turn is not."""
    type = MESSAGES
    for _, batch in rows.batches(PARTS[rows.kind]):
        for column in batch.columns:
            turns = column.flatten()
            if turns.field("calls").null_count < len(turns) or pc.any(pc.equal(turns.field("role"), "tool")).as_py():
                return SAID
            if not pc.all(turns.field("train"), min_count=0).as_py():
                type = MARKED
    return type


def hex_texts(ids: pa.FixedSizeBinaryArray) -> pa.StringArray:
    """Return ids in hex, all of a column at once."""
    found = as_numpy(ids)
    offsets = np.arange(len(found) + 1, dtype=np.int32) * (2 * found.shape[1])
    return pa.StringArray.from_buffers(len(found), pa.py_buffer(offsets), pa.py_buffer(found.tobytes().hex().encode()))


def narrowed(column: pa.Array, type: pa.DataType) -> pa.Array:
    """Return a column of a spool as one of a data set: turns with those fields alone that its type has, or as JSON;
    tools as a list."""
    if type == SAID:
        is_turns = column.type == TURNS
        rows = [
            value and [to_turn_row(turn_of(turn)) for turn in value] if is_turns else value and json.loads(value)
            for value in column.to_pylist()
        ]
        return pa.array([row and [*map(dump_json, row)] for row in rows], pa.list_(pa.string())).cast(SAID)
    if type not in (MESSAGES, MARKED):
        return column
    turns = column.flatten()
    fields = list(type.value_type)
    kept = pa.StructArray.from_arrays([turns.field(field.name) for field in fields], fields=fields)
    mask = column.is_null() if column.null_count else None
    return pa.ListArray.from_arrays(pa.array(list_offsets(column), pa.int32()), kept, type=type, mask=mask)


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
        self.tree = MerkleTree()
        self.rows = 0
        self.distinct = 0
        self.forgotten = list[tuple[int, str]]()
        self._held: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> None:
        self.tree.extend(leaves_of(table))
        while table.num_rows:
            room = SHARD - self.rows % SHARD
            self._held.append(table.slice(0, room))
            table = table.slice(room)
            self.rows += self._held[-1].num_rows
            full = self.rows % SHARD == 0
            if full or sum(t.num_rows for t in self._held) >= GROUP or sum(t.nbytes for t in self._held) >= HEAVY:
                self._flush(full)

    def bury(self, tombstone: bytes) -> None:
        """Put a leaf where a row was."""
        self.forgotten.append((self.tree.size, tombstone.hex()))
        self.tree.add(tombstone)

    def _flush(self, ends: bool) -> None:
        """Write a row group, and end the file if it is full."""
        if self._held:
            table = pa.concat_tables(self._held)
            if self._writer is None:
                self._writer = pq.ParquetWriter(self.paths[(self.rows - 1) // SHARD], table.schema, compression="zstd")
            self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
            self._held = []
        if ends and self._writer is not None:
            self._writer.close()
            self._writer = None

    def close(self) -> dict[str, Any]:
        """Return what there is of the side."""
        self._flush(ends=True)
        forgotten = {"forgotten": self.forgotten} if self.forgotten else {}
        return {"rows": self.rows, "distinct": self.distinct, "root": self.tree.root(), **forgotten}


def unique_ids(rows: Rows, wanted: ndarray) -> Iterator[bytes]:
    """Yield the content ids of these rows, sorted, each once; some `SORTED` in memory at a time, by what they begin
    with."""
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
