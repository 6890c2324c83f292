"""Rows on their way into a data set, on disk: parts that are written once, whole or not at all, and read in pieces.

A part is some tens of thousands of rows in Arrow files, one for each group of columns that are read together, and a
JSON file that says what became of the rows that it was made from. That is written last: a part without it was cut off,
and is written again. Arrow reads a batch of a file as a whole whatever columns are asked for, so each group has a file
of its own; and what is kept of a batch is copied out of it. So memory goes by what was asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from socket import gethostname
from typing import Any

import numpy as np
import pyarrow as pa
from numpy import ndarray

from align.core.errors import CorruptFile
from align.core.files import read_text
from align.core.types import Record
from align.data.read.content import DOCUMENTS
from align.data.sets.record_columns import CONTENT, records_of, texts_of
from align.run.files import write_json

SPARSE = 0.1
"""A share of rows below which files are mapped: of a batch, what is not asked for is not read."""
REMEDY = "Remove the run's folder and run the same command again."


class Spool:
    """The parts in a folder, in the order of their names.

    Args:
        folder: of the parts; it has to be there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def parts(self, prefix: str = "") -> list[Path]:
        """Return the whole parts whose names begin so, as the paths of their files without endings."""
        return sorted(path.with_suffix("") for path in self.folder.glob(f"{prefix}*.json"))

    def account(self, part: Path) -> dict[str, Any]:
        """Return what is known of a part beside its rows; under `batches` the sizes of its batches.

        Raises:
            CorruptFile: the account is no JSON.
        """
        try:
            return json.loads(read_text(part.with_suffix(".json"), "checkpoints"))
        except ValueError as error:
            raise CorruptFile("checkpoints", str(part), f"is damaged ({error})", REMEDY) from error

    def write(
        self, name: str, batches: Iterator[pa.RecordBatch], groups: Sequence[pa.Schema], account: Mapping[str, Any]
    ) -> None:
        """Write one part.

        Args:
            groups: the columns of each file.
            account: what is to be known of it; read when all batches are written, so that it may grow till then.
        """
        part, sizes, own = self.folder / name, list[int](), f".{gethostname()}-{os.getpid()}"
        made = [file_of(part, i) for i in range(len(groups))]
        with ExitStack() as stack:
            writers = []
            for path, schema in zip(made, groups, strict=True):
                file = stack.enter_context(pa.OSFile(f"{path}{own}", "wb"))
                writers.append((schema.names, stack.enter_context(pa.ipc.new_file(file, schema))))
            for batch in batches:
                sizes.append(batch.num_rows)
                for names, writer in writers:
                    writer.write_batch(batch.select(names))
        for path in made:  # a worker of a run that was killed may still be writing the same
            os.replace(f"{path}{own}", path)
        write_json(said := self.folder / f".{name}{own}", {**account, "batches": sizes})
        os.replace(said, part.with_suffix(".json"))


def file_of(part: Path, group: int) -> Path:
    return part.with_suffix(f".{group}.arrow")


class Rows:
    """All rows of some parts, numbered from 0 on.

    Args:
        kind: of their records.
        names: of their sources.

    Attributes:
        folder: of the parts.
        parts: each part, the number of its first row, and the sizes of its batches.
    """

    def __init__(self, spool: Spool, kind: str = DOCUMENTS, names: Sequence[str] = ()) -> None:
        self.folder = spool.folder
        self.kind = kind
        self.names = names
        self.parts: list[tuple[Path, int, list[int]]] = []
        end = 0
        for part in spool.parts():
            sizes = spool.account(part)["batches"]
            self.parts.append((part, end, sizes))
            end += sum(sizes)
        self.count = end

    @cached_property
    def groups(self) -> dict[str, int]:
        """Column → the number of its file."""
        found: dict[str, int] = {}
        for part, _, _ in self.parts[:1]:
            for i in range(len([*part.parent.glob(f"{part.name}.*.arrow")])):
                with pa.OSFile(str(file_of(part, i))) as file:
                    found |= dict.fromkeys(pa.ipc.open_file(file).schema.names, i)
        return found

    def batches(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield (number of its first row, batch) in order, with these columns."""
        for numbers, batch in self.where(np.ones(self.count, bool), columns):
            yield int(numbers[0]), batch

    def where(self, wanted: ndarray, columns: Sequence[str]) -> Iterator[tuple[ndarray, pa.RecordBatch]]:
        """Yield (numbers of its rows, batch) in order, of some rows (bool (N)). Batches without any are not read."""
        for part, first, sizes in self.parts:
            chosen = wanted[first : first + sum(sizes)]
            if not chosen.any():
                continue
            with self.opened(part, columns, mapped=bool(chosen.mean() < SPARSE)) as read_batch:
                for i, size in enumerate(sizes):
                    numbers = np.flatnonzero(wanted[first : first + size])
                    if len(numbers):
                        batch = read_batch(i)
                        yield first + numbers, batch if len(numbers) == size else batch.take(pa.array(numbers))
                    first += size

    def texts(self, wanted: ndarray, *over: str) -> Iterator[Sequence[Any]]:
        """Yield some rows (bool (N)) in order, batch by batch: their numbers, and for each of `over` their texts, see
        `texts_of`."""
        for numbers, batch in self.where(wanted, [*CONTENT[self.kind]]):
            yield numbers, *(texts_of(self.kind, batch, part) for part in over)

    @contextmanager
    def opened(
        self, part: Path, columns: Sequence[str], mapped: bool = False
    ) -> Iterator[Callable[[int], pa.RecordBatch]]:
        """Open a part, and give what reads batches of some columns of it.

        Args:
            mapped: a batch is a view of the file, and no copy. What is read of it counts as memory until the end.
        """
        groups = [self.groups[name] for name in columns]
        with ExitStack() as stack:
            open_file = pa.memory_map if mapped else pa.OSFile
            files = {i: stack.enter_context(open_file(str(file_of(part, i)))) for i in sorted({*groups})}
            readers = {i: pa.ipc.open_file(file) for i, file in files.items()}

            def read_batch(number: int) -> pa.RecordBatch:
                batches = {i: reader.get_batch(number) for i, reader in readers.items()}
                arrays = [batches[i].column(name) for name, i in zip(columns, groups, strict=True)]
                return pa.RecordBatch.from_arrays(arrays, [*columns])

            yield read_batch

    def column(self, name: str) -> pa.ChunkedArray:
        """Return one column of texts of all rows, each text that differs held once in a batch."""
        chunks = [batch.column(name).dictionary_encode() for _, batch in self.batches([name])]
        return pa.chunked_array(chunks).unify_dictionaries() if chunks else pa.chunked_array([[]], pa.string())

    def numbers(self, name: str) -> ndarray:
        """Return one column of numbers without nulls, or of texts of one length in bytes (N, length) as uint8."""
        return self.gathered([name], lambda batch: as_numpy(batch.column(name)))

    def first_bits(self, name: str) -> ndarray:
        """Return the first 64 bits of each id in a column, uint64 (N)."""
        return self.gathered([name], lambda batch: first_bits(as_numpy(batch.column(name))))

    def gathered(self, columns: Sequence[str], made: Callable[[pa.RecordBatch], ndarray]) -> ndarray:
        """Return what is made of each batch, one after another, without a second copy of it."""
        found = np.zeros(0, np.int64)
        for first, batch in self.batches(columns):
            part = made(batch)
            if not len(found):
                found = np.empty((self.count, *part.shape[1:]), part.dtype)
            found[first : first + len(part)] = part
        return found

    def take(self, indexes: ndarray, columns: Sequence[str]) -> pa.Table:
        """Return some rows, in the order of `indexes`. Files are mapped, so that other rows of a batch are not read."""
        order = np.argsort(indexes, kind="stable")
        wanted = indexes[order]
        found = []
        start = 0
        for part, first, sizes in self.parts:
            edges = np.searchsorted(wanted, first + np.cumsum(sizes, dtype=np.int64))
            if not len(edges) or start == edges[-1]:
                continue
            with self.opened(part, columns, mapped=True) as read_batch:
                for i, end in enumerate(edges.tolist()):
                    if end > start:
                        found.append(read_batch(i).take(pa.array(wanted[start:end] - first)))
                    start = end
                    first += sizes[i]
        table = pa.Table.from_batches(found)
        if (np.diff(order) != 1).any():
            table = table.take(pa.array(np.argsort(order)))
        return table.combine_chunks()

    def records(self, numbers: ndarray) -> list[tuple[str, Record]]:
        """Return some rows as `source:row` and their records. Those without an id of their own have that name."""
        if not len(numbers):
            return []
        table = self.take(numbers, [*CONTENT[self.kind], "source", "row"])
        places = zip(table["source"].to_pylist(), table["row"].to_pylist(), strict=True)
        names = [f"{self.names[source]}:{row}" for source, row in places]
        return list(zip(names, records_of(self.kind, table, names), strict=True))


def first_bits(ids: ndarray) -> ndarray:
    """Return the first 64 bits of ids, uint64 (N)."""
    return np.ascontiguousarray(ids[:, :8]).view(">u8").ravel().astype(np.uint64)


def as_numpy(array: pa.Array) -> ndarray:
    if pa.types.is_fixed_size_binary(array.type):
        width = array.type.byte_width
        return np.frombuffer(array.buffers()[1], np.uint8).reshape(-1, width)[array.offset :][: len(array)]
    return array.to_numpy(zero_copy_only=False)
