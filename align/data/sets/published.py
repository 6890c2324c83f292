"""A data set on disk: Parquet shards for each split, and `data.json`, which describes them and their origin.

    train-00000-of-00002.parquet …   test-00000-of-00001.parquet   data.json

`datasets.load_dataset` reads the folder as it is. Each row has its content and also `content_id` and `question_id`
(hex), its `source` and the number of the `row` in it, its `cluster` (content id of the row that was kept of its
duplicates, or null), and its `metadata`: JSON of the columns that are not its content, or null. Rows that the mixture
repeats are written again after all rows.

The fingerprint of a split is the Merkle root over the sequence of its rows. The leaf of a row is its content id and the
number 1 (32 bytes and 4, big-endian). The fingerprint of the data set is the root over its splits' roots, train first.
`ids_root` is the root over the sorted set of content ids of all splits. A row that was forgotten is in no file: in its
place in the sequence is a tombstone, a leaf of 32 random bytes, listed in `splits.SPLIT.forgotten` as [place, leaf in
hex].

Content ids and question ids are SHA-256, and HMAC for rows of the annotation store, see `ids`.
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
from align.core.files import parse_user_path, require_readable
from align.core.merkle import MerkleTree, build_inclusion_proof, compute_proof_root, compute_root
from align.core.types import Record, dump_json
from align.data.read.content import to_turn_row
from align.data.read.files import DATA_SET_FILE, RESTORE_HELP, SHARD_NAME
from align.data.sets.record_columns import (
    CONTENT,
    JSON_TURNS,
    PAIR_COLUMNS,
    PARTS,
    TOOLS,
    TURNS,
    columns_to_records,
    list_offsets,
    parse_turn,
)
from align.data.sets.splits import SPLITS
from align.data.sets.spool import SpoolRows, column_to_numpy, get_first_bits
from align.run.artifacts import find_run, list_done_runs, require_not_replaced
from align.run.digests import file_digest, lookup_digest
from align.run.files import read_json_object, write_json
from align.run.manifest import FILE as RUN
from align.run.manifest import read_manifest

pc: Any = pyarrow.compute  # whose functions are made when it is imported

SCHEMA_VERSION = 2
TOMBSTONE = 32
"""Number of bytes of the leaf that replaces a forgotten row."""
ROOT_FIELDS = ("root", "ids_root")
"""Fields of `data.json` that the manifest of a run on the data set repeats, besides its digest."""
MAKE_REMEDY = 'Make it with: python -m align stage=data "stage.sources=[…]".'
FACT_COLUMNS = ("content_id", "question_id", "source", "row", "metadata")
"""Names of the columns that are published beside the content of rows."""
SHARD_ROWS = 250_000
"""Maximum number of rows of a shard."""
SORTED_AT_ONCE = 1 << 20
"""Number of content ids that are sorted at once."""
ROW_GROUP = 16_384
"""Maximum number of rows of a row group."""
ROW_GROUP_BYTES = 64 * 2**20
"""Number of bytes above which a row group ends."""
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
MESSAGES = pa.list_(MESSAGE)
"""Arrow type of a column of turns that are all trained on."""
MARKED_MESSAGES = pa.list_(pa.struct([*MESSAGE, ("train", pa.bool_())]))
"""Arrow type of a column of turns with a flag whether each is trained on."""


def compute_data_set_root(splits: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the Merkle root over the roots of a data set's train and test splits, in this order. Returns an empty text
    if one of them is no digest."""
    try:
        return compute_root(bytes.fromhex(splits[name]["root"]) for name in SPLITS)
    except ValueError:
        return ""


def encode_row_leaf(content_id: bytes, times: int = 1) -> bytes:
    """Return the leaf of a row in a data set's Merkle tree: its content id, and a count in 4 bytes, big-endian.

    Args:
        times: number of equal rows that the leaf represents. It is 1 in the tree of a data set.
    """
    return content_id + times.to_bytes(4, "big")


def iter_row_leaves(table: pa.Table) -> Iterator[bytes]:
    """Yield the Merkle leaf of each row of a published table, from its column `content_id`."""
    for id in table["content_id"].to_pylist():
        yield encode_row_leaf(bytes.fromhex(id))


@dataclass(frozen=True, slots=True)
class DataSet:
    """A published data set on disk: Parquet shards, and `data.json`, which describes them.

    Attributes:
        folder: its folder.
        data: content of its `data.json`.
    """

    folder: Path
    data: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return self.data["kind"]

    def load_records(self, split: str) -> list[Record]:
        """Load the records of the split `train` or `test` in order, with repeated rows, and check their Merkle root.

        Raises:
            CorruptFile: The rows are invalid, or their root differs from that in `data.json`.
        """
        records = list[Record]()
        tree = MerkleTree()
        try:
            for piece in self.iter_sequence(split, [*CONTENT[self.kind], "source", "row", "content_id"]):
                if isinstance(piece, bytes):
                    tree.add(piece)
                    continue
                places = zip(piece["source"].to_pylist(), piece["row"].to_pylist(), strict=True)
                records += columns_to_records(self.kind, piece, [f"{source}:{row}" for source, row in places])
                tree.extend(iter_row_leaves(piece))
        except (pa.ArrowException, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            problem = f"holds no rows of a data set in its {split} files ({type(error).__name__}: {str(error)[:120]})"
            raise CorruptFile("data.path", str(self.folder), problem, RESTORE_HELP) from error
        if tree.root() != self.data["splits"][split]["root"]:
            problem = f"has other rows in its {split} files than those whose root {DATA_SET_FILE} has"
            raise CorruptFile("data.path", str(self.folder), problem, RESTORE_HELP)
        return records

    def list_row_sources(self, split: str) -> list[str]:
        """Return the name of the source that each row of a split is from, in order."""
        return [name for table in self.iter_tables(split, ["source"]) for name in table["source"].to_pylist()]

    def iter_tables(self, split: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the row groups of the Parquet files of one split, in order.

        Args:
            columns: columns to read if they exist; None for all.
        """
        for name in sorted(self.data["shards"]):
            if name.startswith(f"{split}-"):
                require_readable(self.folder / name, "data.path", RESTORE_HELP)
                with pq.ParquetFile(self.folder / name) as file:
                    for group in range(file.num_row_groups):
                        yield file.read_row_group(group, columns=columns)

    def iter_sequence(self, split: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table | bytes]:
        """Yield the rows of a split as tables, in order, and 32 bytes (a tombstone) in the place of each forgotten row.

        Raises:
            ValueError: A tombstone is invalid, or its place is after the end.
        """
        forgotten = {int(place): bytes.fromhex(leaf) for place, leaf in self.data["splits"][split].get("forgotten", ())}
        if any(place < 0 or len(leaf) != TOMBSTONE for place, leaf in forgotten.items()):  # a row's leaf is longer
            raise ValueError("an invalid tombstone")
        tombstone_places = sorted(forgotten)
        place = 0
        for table in self.iter_tables(split, columns):
            while tombstone_places and tombstone_places[0] <= place + table.num_rows:
                first = tombstone_places.pop(0) - place
                if first:
                    yield table.slice(0, first)
                yield forgotten[place + first]
                place += first + 1
                table = table.slice(first)
            if table.num_rows:
                yield table
            place += table.num_rows
        for tombstone_place in tombstone_places:  # after the last row
            if tombstone_place != place:
                raise ValueError(f"a tombstone at {tombstone_place} of {place}")
            yield forgotten[tombstone_place]
            place += 1

    def list_leaves(self, split: str) -> list[bytes]:
        """Return the Merkle leaves of one split in order, including those of forgotten rows."""
        pieces = self.iter_sequence(split, ["content_id"])
        return [leaf for piece in pieces for leaf in ([piece] if isinstance(piece, bytes) else iter_row_leaves(piece))]


def find_data_set(ref: str, root: Path) -> Path:
    """Return the folder of the data set that a reference names: a path, `data:latest` or `data:NAME`.

    Args:
        root: folder of all runs.

    Raises:
        MissingArtifact: There is no such folder or run, or the run is not done.
    """
    field = "data.path"
    stage, _, name = ref.partition(":")
    folder = parse_user_path(ref, field)
    if not folder.is_dir():
        if stage != "data" or not name:
            problem = "there is no such folder, and a reference is data:latest or data:NAME"
            raise MissingArtifact(field, ref, problem, MAKE_REMEDY)
        if name != "latest":
            folder = find_run(("data",), name, root, ref, field, "python -m align stage=data")
        elif done := list_done_runs(("data",), root):
            folder = done[0]
        else:
            raise MissingArtifact(field, ref, f"no finished data run under {root}", MAKE_REMEDY)
    if (folder / RUN).is_file() and not (manifest := read_manifest(folder)).done:
        problem = f"the run in {folder} is {manifest.status}, not done"
        raise MissingArtifact(field, ref, problem, "Run the same command again to finish it.")
    return folder / "artifact" if (folder / "artifact" / DATA_SET_FILE).is_file() else folder


def load_data_set(folder: Path) -> DataSet:
    """Return the data set in a folder after a check that every shard has its published digest.

    Raises:
        MissingArtifact: There is no data set in the folder.
        CorruptFile: A file is missing or was changed.
    """
    data = read_description(folder)
    for name, digest in data["shards"].items():
        path = folder / name
        if not path.is_file() or lookup_digest(path) != digest:
            problem = "is missing" if not path.is_file() else "is not the file that was published (its sha256 differs)"
            raise CorruptFile("data.path", str(path), problem, RESTORE_HELP)
    return DataSet(folder, data)


def read_description(folder: Path) -> dict[str, Any]:
    """Read the `data.json` of a data set's folder, and check its fields and its root.

    Raises:
        MissingArtifact: There is no such file.
        CorruptFile: It does not describe a data set.
        InputError: It has another version, or the data set was replaced by another one.
    """
    field = "data.path"
    path = folder / DATA_SET_FILE
    require_not_replaced(folder, field)
    if not path.is_file():
        raise MissingArtifact(field, str(folder), f"holds no data set: {DATA_SET_FILE} is not there", MAKE_REMEDY)
    data = read_json_object(path, field, RESTORE_HELP)
    require_schema_version(data.get("schema_version"), SCHEMA_VERSION, field, str(path), MAKE_REMEDY)
    shards = data.get("shards")
    splits = data.get("splits")
    split_fields = [splits.get(name) for name in SPLITS] if isinstance(splits, dict) else [None]
    describes = (
        isinstance(shards, dict)
        and all(SHARD_NAME.fullmatch(name) for name in shards)
        and all(isinstance(fields, dict) and isinstance(fields.get("root"), str) for fields in split_fields)
        and all(isinstance(data.get(key), str) for key in ROOT_FIELDS)
        and data.get("kind") in [*CONTENT]
    )
    if not describes:
        raise CorruptFile(field, str(path), "does not describe a data set", RESTORE_HELP)
    if data["root"] != compute_data_set_root(data["splits"]):
        raise CorruptFile(field, str(path), "has a root that differs from its splits", RESTORE_HELP)
    return data


@dataclass(frozen=True, slots=True)
class RowProof:
    """A Merkle proof that a data set with a known root contains a row.

    Attributes:
        split: `train` or `test`.
        leaf_index: index of the row in the split's sequence, from 0.
        size: number of rows of the sequence, including forgotten ones.
        path: see `align.core.merkle.build_inclusion_proof`.
        other_root: root of the other split.
    """

    split: str
    leaf_index: int
    size: int
    path: tuple[bytes, ...]
    other_root: str


def build_row_proof(dataset: DataSet, split: str, content_id: bytes) -> RowProof:
    """Build a Merkle proof that one split of a data set contains a row. Of equal rows, the first one is proved.

    Raises:
        ValueError: The split does not contain the row.
    """
    leaves = dataset.list_leaves(split)
    leaf_index = leaves.index(encode_row_leaf(content_id))
    [other_root] = (dataset.data["splits"][name]["root"] for name in SPLITS if name != split)
    return RowProof(split, leaf_index, len(leaves), tuple(build_inclusion_proof(leaves, leaf_index)), other_root)


def verify_row_proof(proof: RowProof, content_id: bytes, root: str) -> bool:
    """Return whether a proof shows that the data set with this Merkle root contains the row with a content id."""
    split_root = compute_proof_root(encode_row_leaf(content_id), proof.leaf_index, proof.size, proof.path)
    if split_root is None or proof.split not in SPLITS:
        return False
    roots = [split_root if split == proof.split else proof.other_root for split in SPLITS]
    return compute_root(map(bytes.fromhex, roots)) == root


@dataclass(frozen=True, slots=True)
class RowSelection:
    """The rows to write to a data set, with their repetitions, split, duplicates and scores.

    Attributes:
        times: number of times that each row is written, int32 (N); 0 leaves it out.
        test: whether each row is in the test split, bool (N).
        duplicates, heads: numbers of the duplicates, and of the row that was kept for each.
        scores: score of each row, float64 (N), nan for none. None if rows are not scored.
    """

    times: ndarray
    test: ndarray
    duplicates: ndarray
    heads: ndarray
    scores: ndarray | None = None

    def list_cluster_heads(self, rows: SpoolRows) -> ndarray:
        """Return for each row the content id (hex) of the row that is kept among its duplicates, or None if it has no
        duplicates."""
        clusters = np.full(len(self.times), None, object)
        if len(self.heads):
            kept_rows, cluster_numbers = np.unique(self.heads, return_inverse=True)
            table = rows.take(kept_rows, ["content_id"])
            ids = np.array([id.hex() for id in table["content_id"].to_pylist()], object)
            clusters[kept_rows] = ids
            clusters[self.duplicates] = ids[cluster_numbers]
        return clusters


def write_data_set(
    folder: Path, rows: SpoolRows, selection: RowSelection, description: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the selected rows as a data set of Parquet shards and `data.json`, and return the content of `data.json`.

    Args:
        description: further fields of `data.json`.

    Returns:
        The content of `data.json`.
    """
    types = choose_column_types(rows)
    clusters = selection.list_cluster_heads(rows)
    columns = [*types, *FACT_COLUMNS]
    is_written = selection.times > 0
    side_masks = [is_written & ~selection.test, is_written & selection.test]
    writers = [
        ShardWriter(folder, name, int(selection.times[mask].sum()))
        for name, mask in zip(SPLITS, side_masks, strict=True)
    ]

    def to_published(numbers: ndarray, batch: pa.RecordBatch) -> pa.Table:
        source = pa.DictionaryArray.from_arrays(batch.column("source").cast(pa.int32()), pa.array(list(rows.names)))
        published = {name: convert_column(batch.column(name), type) for name, type in types.items()}
        published |= {name: ids_to_hex(batch.column(name)) for name in ("content_id", "question_id")}
        published |= {
            "source": source.cast(pa.string()),
            "row": batch.column("row"),
            "cluster": pa.array(clusters[numbers], pa.string()),
            "metadata": batch.column("metadata"),
        }
        if selection.scores is not None:
            published["score"] = pa.array(selection.scores[numbers], pa.float64(), from_pandas=True)
        return pa.table(published)

    for first, batch in rows.iter_batches(columns):
        for side_mask, writer in zip(side_masks, writers, strict=True):
            mask = side_mask[first : first + batch.num_rows]
            if mask.any():
                writer.add(to_published(first + np.flatnonzero(mask), batch.filter(pa.array(mask))))
    for side_mask, writer in zip(side_masks, writers, strict=True):
        # Repeated rows are written after all rows: those that occur at least twice, then those three times, …
        times = np.where(side_mask, selection.times, 0)
        for count in range(1, int(times.max(initial=0))):
            repeated = np.flatnonzero(times > count)
            for start in range(0, len(repeated), ROW_GROUP):
                numbers = repeated[start : start + ROW_GROUP]
                [batch] = rows.take(numbers, columns).to_batches()
                writer.add(to_published(numbers, batch))
        writer.distinct = int(side_mask.sum())
    splits = {name: writer.close() for name, writer in zip(SPLITS, writers, strict=True)}
    data = {
        "schema_version": SCHEMA_VERSION,
        "kind": rows.kind,
        **description,
        "splits": splits,
        "root": compute_data_set_root(splits),
        "ids_root": compute_root(iter_unique_ids(rows, is_written)),
        "shards": {path.name: file_digest(path) for writer in writers for path in writer.paths},
    }
    write_json(folder / DATA_SET_FILE, data)
    return data


def choose_column_types(rows: SpoolRows) -> dict[str, pa.DataType]:
    """Return the content columns that are not empty in all rows, each with the Arrow type in which it is published."""
    turns = choose_turn_type(rows)
    types = dict[str, pa.DataType]()
    for name, type in CONTENT[rows.kind].items():
        for _, batch in rows.iter_batches([name]):
            column = batch.column(name)
            if name in PAIR_COLUMNS:
                is_used = any(value not in (None, "") and value is not True for value in column.unique().to_pylist())
            else:
                is_used = column.null_count < len(column)
            if is_used:
                types[name] = turns if type == TURNS else JSON_TURNS if name == TOOLS else type
                break
    return types


def choose_turn_type(rows: SpoolRows) -> pa.DataType:
    """Return the Arrow type in which turns are published: JSON if any turn has tool calls or results, else structs.
    These have the field `train` if any turn is not trained on."""
    type = MESSAGES
    for _, batch in rows.iter_batches(PARTS[rows.kind]):
        for column in batch.columns:
            turns = column.flatten()
            if turns.field("calls").null_count < len(turns) or pc.any(pc.equal(turns.field("role"), "tool")).as_py():
                return JSON_TURNS
            if not pc.all(turns.field("train"), min_count=0).as_py():
                type = MARKED_MESSAGES
    return type


def ids_to_hex(ids: pa.FixedSizeBinaryArray) -> pa.StringArray:
    """Return a column of binary ids as a column of texts in hex."""
    values = column_to_numpy(ids)
    offsets = np.arange(len(values) + 1, dtype=np.int32) * (2 * values.shape[1])
    data = pa.py_buffer(values.tobytes().hex().encode())
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(offsets), data)


def convert_column(column: pa.Array, type: pa.DataType) -> pa.Array:
    """Return a content column in its published type: turns as structs with fewer fields or as JSON, tools as lists."""
    if type == JSON_TURNS:
        is_turns = column.type == TURNS
        rows = [
            value and [to_turn_row(parse_turn(turn)) for turn in value] if is_turns else value and json.loads(value)
            for value in column.to_pylist()
        ]
        return pa.array([row and [*map(dump_json, row)] for row in rows], pa.list_(pa.string())).cast(JSON_TURNS)
    if type not in (MESSAGES, MARKED_MESSAGES):
        return column
    turns = column.flatten()
    fields = list(type.value_type)
    structs = pa.StructArray.from_arrays([turns.field(field.name) for field in fields], fields=fields)
    mask = column.is_null() if column.null_count else None
    return pa.ListArray.from_arrays(pa.array(list_offsets(column), pa.int32()), structs, type=type, mask=mask)


class ShardWriter:
    """A writer of the Parquet files of one split, which also computes the split's Merkle root.

    Args:
        count: number of rows that will be added.

    Attributes:
        paths: the files.
        rows: number of rows added so far.
        distinct: number of different rows, which the caller sets.
        forgotten: place and hex of each tombstone.
    """

    def __init__(self, folder: Path, split: str, count: int) -> None:
        number = -(-count // SHARD_ROWS)
        self.paths = [folder / f"{split}-{i:05d}-of-{number:05d}.parquet" for i in range(number)]
        self.tree = MerkleTree()
        self.rows = 0
        self.distinct = 0
        self.forgotten = list[tuple[int, str]]()
        self._pending: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> None:
        """Add published rows to the split and its Merkle tree, and write row groups that are full."""
        self.tree.extend(iter_row_leaves(table))
        while table.num_rows:
            room = SHARD_ROWS - self.rows % SHARD_ROWS
            self._pending.append(table.slice(0, room))
            table = table.slice(room)
            self.rows += self._pending[-1].num_rows
            is_full = self.rows % SHARD_ROWS == 0
            has_group = sum(pending.num_rows for pending in self._pending) >= ROW_GROUP
            if is_full or has_group or sum(pending.nbytes for pending in self._pending) >= ROW_GROUP_BYTES:
                self._flush(is_full)

    def add_tombstone(self, tombstone: bytes) -> None:
        """Add random bytes (a tombstone) to the Merkle tree in the place of a forgotten row."""
        self.forgotten.append((self.tree.size, tombstone.hex()))
        self.tree.add(tombstone)

    def _flush(self, ends_file: bool) -> None:
        """Write the pending rows as a row group, and close the file if `ends_file`."""
        if self._pending:
            table = pa.concat_tables(self._pending)
            if self._writer is None:
                self._writer = pq.ParquetWriter(
                    self.paths[(self.rows - 1) // SHARD_ROWS], table.schema, compression="zstd"
                )
            self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
            self._pending = []
        if ends_file and self._writer is not None:
            self._writer.close()
            self._writer = None

    def close(self) -> dict[str, Any]:
        """Write the pending rows, close the files, and return the description of the split for `data.json`."""
        self._flush(ends_file=True)
        forgotten = {"forgotten": self.forgotten} if self.forgotten else {}
        return {"rows": self.rows, "distinct": self.distinct, "root": self.tree.root(), **forgotten}


def iter_unique_ids(rows: SpoolRows, mask: ndarray) -> Iterator[bytes]:
    """Yield the distinct content ids of the rows in a mask, sorted. About `SORTED_AT_ONCE` of them are in memory at a
    time, in ranges of their first bits."""
    parts = len(mask) // SORTED_AT_ONCE + 1
    for part in range(parts):
        part_ids = [np.zeros(0, "V32")]
        for first, batch in rows.iter_batches(["content_id"]):
            ids = column_to_numpy(batch.column("content_id"))
            part_of_id = (get_first_bits(ids) >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32)
            in_part = mask[first : first + len(ids)] & (part_of_id == part)
            part_ids.append(ids[in_part].view("V32").ravel())
        for id in np.unique(np.concatenate(part_ids)):
            yield bytes(id)
