"""A data set on disk: Parquet shards for each side, and `data.json`, which says what they are and how they were made.

    train-00000-of-00002.parquet …   test-00000-of-00001.parquet   data.json

`datasets.load_dataset` reads the folder as it is. Each row has its content and, beside it, `content_id` and
`question_id` (SHA-256, hex), its `source` and the `row` there, its `cluster` (the content id under which its duplicates
were removed, or null), and its `exposure`: how often training sees it in one pass.

The fingerprint of a side is the Merkle root over the sequence of its rows, each a leaf of content id and exposure (32
bytes and 4, big-endian); that of the data set is the root over its sides' roots, train first. `ids_root` is the root
over the sorted set of content ids of all sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from align.data.sets.columns import ABOUT_PAIRS, CONTENT, TURNS, list_offsets, records_of
from align.data.sets.sides import SIDES
from align.data.sets.spool import Rows
from align.errors import CorruptFile, MissingArtifact, require
from align.merkle import Tree, root_of
from align.run.artifacts import done_runs, named_run
from align.run.digests import file_digest, known_digest
from align.run.files import json_object, write_json
from align.run.manifest import FILE as RUN
from align.run.manifest import read_manifest
from align.types import Record

pc: Any = pyarrow.compute  # whose functions are made when it is imported

FILE = "data.json"
SCHEMA_VERSION = 1
FROM_FACTS = ("content_id", "question_id", "source", "row")
"""Columns of a spool that stand beside the content."""
MOST_SEEN = 100_000
"""Times that a row may be seen in one pass."""
SHARD = 250_000
"""Rows of a shard."""
GROUP, HEAVY = 16_384, 64 * 2**20
"""Rows of a row group at most; bytes from which on it ends."""
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
MESSAGES = pa.list_(MESSAGE)
"""A column of turns that are all trained on."""
SHARD_NAME = re.compile(rf"({'|'.join(SIDES)})-\d{{5}}-of-\d{{5}}\.parquet")
ROOTS = ("root", "ids_root")
"""What a run's manifest says of a data set besides its digest."""
RESTORE = "Restore it, or make it again with stage=data."
MAKE = 'Make it with: python -m align stage=data "stage.sources=[…]".'


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a data set keeps of a spool's rows.

    Attributes:
        exposures: how often each row is seen, int32 (N); 0 leaves it out.
        test: whether each row is measured on, bool (N).
        duplicates, heads: rows that are duplicates, and the row under which each is.
    """

    exposures: np.ndarray
    test: np.ndarray
    duplicates: np.ndarray
    heads: np.ndarray

    def clusters(self, rows: Rows) -> np.ndarray:
        """The content id (hex) of the row under which each row's cluster is; None for a row without duplicates."""
        found = np.full(len(self.exposures), None, object)
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
    columns, clusters, sides, shards = used_columns(rows, kind), chosen.clusters(rows), {}, {}
    turns = MESSAGES if all_trained(rows, kind) else TURNS
    types = {name: turns if CONTENT[kind][name] == TURNS else CONTENT[kind][name] for name in columns}
    for side, name in enumerate(SIDES):
        wanted = (chosen.exposures > 0) & (chosen.test == bool(side))
        writer = Shards(folder, name, int(wanted.sum()))
        for first, batch in rows.batches([*columns, *FROM_FACTS]):
            here = slice(first, first + batch.num_rows)
            if wanted[here].any():
                mask = wanted[here]
                about = {"exposure": chosen.exposures[here][mask], "cluster": clusters[here][mask]}
                writer.add(published_columns(batch.filter(pa.array(mask)), types, names, about))
        sides[name] = writer.close()
        shards |= {path.name: file_digest(path) for path in writer.paths}
    ids = unique_ids(rows, chosen.exposures > 0)
    data = {
        "schema_version": SCHEMA_VERSION, "kind": kind, **said, "splits": sides,
        "root": root_of_sides(sides), "ids_root": root_of(ids),
        "shards": shards,
    }  # fmt: skip
    write_json(folder / FILE, data)
    return data


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


def all_trained(rows: Rows, kind: str) -> bool:
    """Whether there is no turn that is read and not imitated."""
    parts = [name for name, type in CONTENT[kind].items() if type == TURNS]
    return all(
        pc.all(batch.column(name).flatten().field("train"), min_count=0).as_py()
        for _, batch in rows.batches(parts) for name in parts
    )  # fmt: skip


def published_columns(
    batch: pa.RecordBatch, columns: Mapping[str, pa.DataType], names: Sequence[str], about: Mapping[str, Any]
) -> pa.Table:
    """Rows of a spool as rows of a data set.

    Args:
        columns: content column → its type.
    """
    ids = {name: [id.hex() for id in batch.column(name).to_pylist()] for name in ("content_id", "question_id")}
    source = pa.DictionaryArray.from_arrays(batch.column("source").cast(pa.int32()), pa.array(list(names)))
    return pa.table({
        **{name: narrowed(batch.column(name), type) for name, type in columns.items()},
        **{name: pa.array(values, pa.string()) for name, values in ids.items()},
        "source": source.cast(pa.string()), "row": batch.column("row"),
        "cluster": pa.array(about["cluster"], pa.string()), "exposure": pa.array(about["exposure"], pa.int32()),
    })  # fmt: skip


def narrowed(column: pa.Array, type: pa.DataType) -> pa.Array:
    """A column of turns without what says of each that it is trained on, where that is its type."""
    if type != MESSAGES:
        return column
    turns = column.flatten()
    kept = pa.StructArray.from_arrays([turns.field("role"), turns.field("content")], fields=list(MESSAGE))
    mask = column.is_null() if column.null_count else None
    return pa.ListArray.from_arrays(pa.array(list_offsets(column), pa.int32()), kept, type=MESSAGES, mask=mask)


class Shards:
    """The Parquet files of one side, written in row groups.

    Args:
        count: rows that will come.
    """

    def __init__(self, folder: Path, side: str, count: int) -> None:
        number = -(-count // SHARD)
        self.paths = [folder / f"{side}-{i:05d}-of-{number:05d}.parquet" for i in range(number)]
        self.tree, self.rows, self.exposures = Tree(), 0, 0
        self._held: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> None:
        for id, exposure in zip(table["content_id"].to_pylist(), table["exposure"].to_pylist(), strict=True):
            self.tree.add(leaf(bytes.fromhex(id), exposure))
            self.exposures += exposure
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
        return {"rows": self.rows, "exposures": self.exposures, "root": self.tree.root()}


def root_of_sides(splits: Mapping[str, Mapping[str, Any]]) -> str:
    """The root over those of the sides, train first; nothing equals it where one is no digest."""
    try:
        return root_of(bytes.fromhex(splits[name]["root"]) for name in SIDES)
    except ValueError:
        return ""


def leaf(content_id: bytes, exposure: int) -> bytes:
    """A row as a leaf of the tree."""
    if not 0 < exposure <= MOST_SEEN:
        raise ValueError(f"an exposure of {exposure}")
    return content_id + exposure.to_bytes(4, "big")


def unique_ids(rows: Rows, wanted: np.ndarray) -> Iterator[bytes]:
    """The content ids of these rows, sorted, each once."""
    ids = rows.numbers("content_id")[wanted]
    for id in np.unique(np.ascontiguousarray(ids).view("V32")) if len(ids) else ():
        yield bytes(id)


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
        """The records of `train` or `test` in order, each as often as it is to be seen: all of them once, then those
        that are seen again.

        Raises:
            CorruptFile: the rows are not those whose root `data.json` has, or no such rows at all.
        """
        found, exposures, tree = list[Record](), list[int](), Tree()
        try:
            for table in self.tables(side):
                places = zip(table["source"].to_pylist(), table["row"].to_pylist(), strict=True)
                found += records_of(self.kind, table, [f"{source}:{row}" for source, row in places])
                for id, exposure in zip(table["content_id"].to_pylist(), table["exposure"].to_pylist(), strict=True):
                    tree.add(leaf(bytes.fromhex(id), exposure))
                    exposures.append(exposure)
        except (pa.ArrowException, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            problem = f"holds no rows of a data set in its {side} files ({type(error).__name__}: {str(error)[:120]})"
            raise CorruptFile("data.path", str(self.folder), problem, RESTORE) from error
        if tree.root() != self.data["splits"][side]["root"]:
            problem = f"has other rows in its {side} files than those whose root {FILE} has"
            raise CorruptFile("data.path", str(self.folder), problem, RESTORE)
        again = [found]
        while any(seen > len(again) for seen in exposures):
            again.append([record for record, seen in zip(found, exposures, strict=True) if seen > len(again)])
        return [record for once in again for record in once]

    def sources(self, side: str) -> list[str]:
        """The source of each row of a side, in the order in which they stand there."""
        return [name for table in self.tables(side) for name in table["source"].to_pylist()]

    def tables(self, side: str) -> Iterator[pa.Table]:
        """The rows of one side, a shard at a time."""
        for name in sorted(self.data["shards"]):
            if name.startswith(f"{side}-"):
                yield pq.read_table(self.folder / name)


def find_data_set(ref: str, root: Path, field: str = "data.path") -> Path:
    """The folder that a reference names: a path, `data:latest` or `data:NAME`.

    Args:
        root: the folder of all runs.

    Raises:
        MissingArtifact: there is none, or its run is not done.
    """
    stage, colon, name = ref.partition(":")
    if Path(ref).expanduser().is_dir() or not (colon and stage == "data"):
        folder = Path(ref).expanduser()
        if not folder.is_dir():
            problem = "there is no such folder, and a reference is data:latest or data:NAME"
            raise MissingArtifact(field, ref, problem, MAKE)
    elif name == "latest":
        done = done_runs(("data",), root)
        if not done:
            raise MissingArtifact(field, ref, f"no finished data run under {root}", MAKE)
        folder = done[0]
    else:
        folder = named_run(("data",), name, root, ref, field, "python -m align stage=data")
    if (folder / RUN).is_file() and not (manifest := read_manifest(folder)).done:
        problem = f"the run in {folder} is {manifest.status}, not done"
        raise MissingArtifact(field, ref, problem, "Run the same command again to finish it.")
    return folder / "artifact" if (folder / "artifact" / FILE).is_file() else folder


def data_set(folder: Path, field: str = "data.path") -> DataSet:
    """The data set in a folder, every shard as it was written.

    Raises:
        MissingArtifact: there is none.
        CorruptFile: a file is not what was published.
    """
    data = described(folder, field)
    for name, digest in data["shards"].items():
        path = folder / name
        if not path.is_file() or known_digest(path) != digest:
            problem = "is missing" if not path.is_file() else "is not the file that was published (its sha256 differs)"
            raise CorruptFile(field, str(path), problem, RESTORE)
    return DataSet(folder, data)


def described(folder: Path, field: str = "data.path") -> dict[str, Any]:
    """What `data.json` of a folder says.

    Raises:
        MissingArtifact: there is none.
        CorruptFile: it says no such thing.
        InputError: it is of another version.
    """
    path = folder / FILE
    if not path.is_file():
        raise MissingArtifact(field, str(folder), f"holds no data set: {FILE} is not there", MAKE)
    data = json_object(path, field, RESTORE)
    version = data.get("schema_version")
    remedy = f"This version of align reads {SCHEMA_VERSION}: make it again with stage=data."
    require(version == SCHEMA_VERSION, f"{path}, schema_version", version, "is another version's", remedy)
    shards, splits = data.get("shards"), data.get("splits")
    named = isinstance(shards, dict) and all(SHARD_NAME.fullmatch(name) for name in shards)
    sides = [splits.get(side) for side in SIDES] if isinstance(splits, dict) else [None]
    told = all(isinstance(side, dict) and isinstance(side.get("root"), str) for side in sides)
    roots = all(isinstance(data.get(key), str) for key in ROOTS)
    if not (named and told and roots and data.get("kind") in [*CONTENT]):
        raise CorruptFile(field, str(path), "does not describe a data set", RESTORE)
    if data["root"] != root_of_sides(data["splits"]):
        raise CorruptFile(field, str(path), "has another root than that of its sides", RESTORE)
    return data
