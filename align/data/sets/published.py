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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.data.read.files import DATA_SET, RESTORE, SHARD_NAME
from align.data.sets.columns import CONTENT, records_of
from align.data.sets.ids import SHA256, kinds_in
from align.data.sets.known import remember
from align.data.sets.sides import SIDES
from align.errors import CorruptFile, MissingArtifact, require_schema_version
from align.files import check_readable, user_path
from align.merkle import Tree, root_of
from align.run.artifacts import check_not_replaced, done_runs, named_run
from align.run.digests import known_digest
from align.run.files import json_object
from align.run.manifest import FILE as RUN
from align.run.manifest import read_manifest
from align.types import Record

SCHEMA_VERSION = 2
TOMBSTONE = ID = 32
"""Bytes of the leaf that stands for a row which was forgotten, and of a content id."""
ROOTS = ("root", "ids_root")
"""What a run's manifest says of a data set besides its digest."""
MAKE = 'Make it with: python -m align stage=data "stage.sources=[…]".'


def root_of_sides(splits: Mapping[str, Mapping[str, Any]]) -> str:
    """The root over those of the sides, train first; nothing equals it where one is no digest."""
    try:
        return root_of(bytes.fromhex(splits[name]["root"]) for name in SIDES)
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
        records, ids, tree = list[Record](), list[bytes](), Tree()
        try:
            for piece in self.pieces(side, [*CONTENT[self.kind], "source", "row", "content_id"]):
                if isinstance(piece, bytes):
                    tree.add(piece)
                    continue
                places = zip(piece["source"].to_pylist(), piece["row"].to_pylist(), strict=True)
                records += records_of(self.kind, piece, [f"{source}:{row}" for source, row in places])
                leaves = [*leaves_of(piece)]
                tree.extend(leaves)
                ids += [one[:ID] for one in leaves]
        except (pa.ArrowException, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            problem = f"holds no rows of a data set in its {side} files ({type(error).__name__}: {str(error)[:120]})"
            raise CorruptFile("data.path", str(self.folder), problem, RESTORE) from error
        if tree.root() != self.data["splits"][side]["root"]:
            problem = f"has other rows in its {side} files than those whose root {DATA_SET} has"
            raise CorruptFile("data.path", str(self.folder), problem, RESTORE)
        self._remember(side, records, ids)
        return records

    def _remember(self, side: str, records: list[Record], ids: list[bytes]) -> None:
        """Tell of the ids of rows that anybody can compute."""
        plain = {name for name, kind in kinds_in(self.data).items() if kind == SHA256}
        if len(plain) < len(self.data["sources"]):
            both = zip(records, ids, self.sources(side), strict=True)
            some = [(record, id) for record, id, source in both if source in plain]
            records, ids = [record for record, _ in some], [id for _, id in some]
        remember(records, ids)

    def sources(self, side: str) -> list[str]:
        """The source of each row of a side, in the order in which they stand there."""
        return [name for table in self.tables(side, ["source"]) for name in table["source"].to_pylist()]

    def tables(self, side: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows of one side, a row group at a time.

        Args:
            columns: those that are read, as far as they are there; None for all.
        """
        for name in sorted(self.data["shards"]):
            if name.startswith(f"{side}-"):
                check_readable(self.folder / name, "data.path", RESTORE)
                with pq.ParquetFile(self.folder / name) as file:
                    for group in range(file.num_row_groups):
                        yield file.read_row_group(group, columns=columns)

    def pieces(self, side: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table | bytes]:
        """The sequence whose root the side has: rows, and where some were forgotten, their tombstones.

        Raises:
            ValueError: the tombstones are none, or stand behind the end.
        """
        forgotten = {int(place): bytes.fromhex(leaf) for place, leaf in self.data["splits"][side].get("forgotten", ())}
        if any(place < 0 or len(leaf) != TOMBSTONE for place, leaf in forgotten.items()):  # a row's leaf is longer
            raise ValueError("a tombstone that is none")
        waiting, place = sorted(forgotten), 0
        for table in self.tables(side, columns):
            while waiting and waiting[0] <= place + table.num_rows:
                first = waiting.pop(0) - place
                if first:
                    yield table.slice(0, first)
                yield forgotten[place + first]
                place, table = place + first + 1, table.slice(first)
            if table.num_rows:
                yield table
            place += table.num_rows
        for left in waiting:  # behind the last row
            if left != place:
                raise ValueError(f"a tombstone at {left} of {place}")
            yield forgotten[left]
            place += 1

    def leaves(self, side: str) -> list[bytes]:
        """The leaves of one side, in order."""
        pieces = self.pieces(side, ["content_id"])
        return [leaf for piece in pieces for leaf in ([piece] if isinstance(piece, bytes) else leaves_of(piece))]


def find_data_set(ref: str, root: Path, field: str = "data.path") -> Path:
    """The folder that a reference names: a path, `data:latest` or `data:NAME`.

    Args:
        root: the folder of all runs.

    Raises:
        MissingArtifact: there is none, or its run is not done.
    """
    stage, colon, name = ref.partition(":")
    if user_path(ref, field).is_dir() or not (colon and stage == "data"):
        folder = user_path(ref, field)
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
    return folder / "artifact" if (folder / "artifact" / DATA_SET).is_file() else folder


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
        InputError: it is of another version, or another data set took its place.
    """
    path = folder / DATA_SET
    check_not_replaced(folder, field)
    if not path.is_file():
        raise MissingArtifact(field, str(folder), f"holds no data set: {DATA_SET} is not there", MAKE)
    data = json_object(path, field, RESTORE)
    require_schema_version(data.get("schema_version"), SCHEMA_VERSION, field, str(path), MAKE)
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
