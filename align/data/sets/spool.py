"""Rows of a data set under construction, on disk: parts that are written atomically and read in batches.

A part is some tens of thousands of rows in Arrow files, one for each group of columns that are read together, and a
JSON file with the counts of its rows. The counts are written last: a part without them is incomplete, and is written
again. Arrow reads all columns of a batch of a file, so each group of columns has its own file, and the rows that are
kept of a batch are copied. So memory is proportional to the columns and rows that the caller selects.
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
from align.data.sets.record_columns import CONTENT, columns_to_records, join_record_texts
from align.run.files import write_json

SPARSE = 0.1
"""Share of selected rows below which files are memory-mapped, so that other rows of a batch are not read."""
REMEDY = "Remove the run's folder and run the same command again."


class Spool:
    """A folder of files with the rows of a data set under construction, which are written in parts.

    Args:
        folder: an existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def parts(self, prefix: str = "") -> list[Path]:
        """Return the complete parts whose names begin with `prefix`, as sorted paths of their files without
        suffixes."""
        return sorted(path.with_suffix("") for path in self.folder.glob(f"{prefix}*.json"))

    def read_part_counts(self, part: Path) -> dict[str, Any]:
        """Read the JSON file with the counts of a part's rows. The key `batches` has the sizes of the part's batches.

        Raises:
            CorruptFile: The file is no JSON.
        """
        try:
            return json.loads(read_text(part.with_suffix(".json"), "checkpoints"))
        except ValueError as error:
            raise CorruptFile("checkpoints", str(part), f"is damaged ({error})", REMEDY) from error

    def write(
        self, name: str, batches: Iterator[pa.RecordBatch], groups: Sequence[pa.Schema], part_counts: Mapping[str, Any]
    ) -> None:
        """Write the batches of one part to Arrow files, one for each group of columns, and then its counts to a JSON
        file.

        Args:
            groups: columns of each file.
            part_counts: counts of its rows. They are written after all batches, so `batches` may still change them.
        """
        part = self.folder / name
        sizes = list[int]()
        temporary_suffix = f".{gethostname()}-{os.getpid()}"
        paths = [get_group_path(part, i) for i in range(len(groups))]
        with ExitStack() as stack:
            writers = []
            for path, schema in zip(paths, groups, strict=True):
                file = stack.enter_context(pa.OSFile(f"{path}{temporary_suffix}", "wb"))
                writers.append((schema.names, stack.enter_context(pa.ipc.new_file(file, schema))))
            for batch in batches:
                sizes.append(batch.num_rows)
                for names, writer in writers:
                    writer.write_batch(batch.select(names))
        for path in paths:  # a worker of a run that was killed may still be writing the same part
            os.replace(f"{path}{temporary_suffix}", path)
        counts_path = self.folder / f".{name}{temporary_suffix}"
        write_json(counts_path, {**part_counts, "batches": sizes})
        os.replace(counts_path, part.with_suffix(".json"))


def get_group_path(part: Path, group: int) -> Path:
    """Return the path of a part's Arrow file with one group of its columns."""
    return part.with_suffix(f".{group}.arrow")


class SpoolRows:
    """Read access to the rows of a data set under construction, numbered from 0 through all parts of its spool.

    Args:
        kind: kind of their records.
        names: names of their sources.

    Attributes:
        folder: folder of the parts.
        parts: path of each part, the number of its first row, and the sizes of its batches.
        count: number of all rows.
    """

    def __init__(self, spool: Spool, kind: str = DOCUMENTS, names: Sequence[str] = ()) -> None:
        self.folder = spool.folder
        self.kind = kind
        self.names = names
        self.parts: list[tuple[Path, int, list[int]]] = []
        end = 0
        for part in spool.parts():
            sizes = spool.read_part_counts(part)["batches"]
            self.parts.append((part, end, sizes))
            end += sum(sizes)
        self.count = end

    @cached_property
    def groups(self) -> dict[str, int]:
        """Name of a column → number of the Arrow file of a part that it is in."""
        groups: dict[str, int] = {}
        for part, _, _ in self.parts[:1]:
            for i in range(len([*part.parent.glob(f"{part.name}.*.arrow")])):
                with pa.OSFile(str(get_group_path(part, i))) as file:
                    groups |= dict.fromkeys(pa.ipc.open_file(file).schema.names, i)
        return groups

    def iter_batches(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield (number of the first row, batch) for all batches of rows, in order."""
        for numbers, batch in self.iter_selected(np.ones(self.count, bool), columns):
            yield int(numbers[0]), batch

    def iter_selected(self, mask: ndarray, columns: Sequence[str]) -> Iterator[tuple[ndarray, pa.RecordBatch]]:
        """Yield the numbers of the rows in a mask and the columns of these rows, batch by batch. Batches without any
        are not read.

        Args:
            mask: mask of the rows, bool (N).
            columns: columns to read.
        """
        for part, first, sizes in self.parts:
            part_mask = mask[first : first + sum(sizes)]
            if not part_mask.any():
                continue
            with self.open_part(part, columns, mapped=bool(part_mask.mean() < SPARSE)) as read_batch:
                for i, size in enumerate(sizes):
                    numbers = np.flatnonzero(mask[first : first + size])
                    if len(numbers):
                        batch = read_batch(i)
                        yield first + numbers, batch if len(numbers) == size else batch.take(pa.array(numbers))
                    first += size

    def iter_texts(self, mask: ndarray, *over: str) -> Iterator[Sequence[Any]]:
        """Yield the numbers of the rows in a mask and their texts, batch by batch, with one array of texts for each of
        `over`. See `join_record_texts`.

        Args:
            mask: mask of the rows, bool (N).
        """
        for numbers, batch in self.iter_selected(mask, [*CONTENT[self.kind]]):
            yield numbers, *(join_record_texts(self.kind, batch, setting) for setting in over)

    @contextmanager
    def open_part(
        self, part: Path, columns: Sequence[str], mapped: bool = False
    ) -> Iterator[Callable[[int], pa.RecordBatch]]:
        """Open the Arrow files of a part, and yield a function that reads the given columns of a batch by its number.
        The files are closed afterwards.

        Args:
            mapped: whether batches are views of memory-mapped files. What is read of them counts as memory until the
                part is closed.
        """
        groups = [self.groups[name] for name in columns]
        with ExitStack() as stack:
            open_file = pa.memory_map if mapped else pa.OSFile
            files = {i: stack.enter_context(open_file(str(get_group_path(part, i)))) for i in sorted({*groups})}
            readers = {i: pa.ipc.open_file(file) for i, file in files.items()}

            def read_batch(number: int) -> pa.RecordBatch:
                batches = {i: reader.get_batch(number) for i, reader in readers.items()}
                arrays = [batches[i].column(name) for name, i in zip(columns, groups, strict=True)]
                return pa.RecordBatch.from_arrays(arrays, [*columns])

            yield read_batch

    def load_text_column(self, name: str) -> pa.ChunkedArray:
        """Load a column of texts of all rows as a dictionary-encoded Arrow array."""
        chunks = [batch.column(name).dictionary_encode() for _, batch in self.iter_batches([name])]
        return pa.chunked_array(chunks).unify_dictionaries() if chunks else pa.chunked_array([[]], pa.string())

    def load_numbers(self, name: str) -> ndarray:
        """Load a column of all rows as a NumPy array: numbers without nulls, (N), or binary of fixed length, uint8 (N,
        length)."""
        return self.collect([name], lambda batch: column_to_numpy(batch.column(name)))

    def load_first_bits(self, name: str) -> ndarray:
        """Load the first 64 bits of each id in a column of all rows, uint64 (N)."""
        return self.collect([name], lambda batch: get_first_bits(column_to_numpy(batch.column(name))))

    def collect(self, columns: Sequence[str], convert: Callable[[pa.RecordBatch], ndarray]) -> ndarray:
        """Convert each batch of columns to an array, and return all arrays as one without a second copy in memory."""
        values = np.zeros(0, np.int64)
        for first, batch in self.iter_batches(columns):
            batch_values = convert(batch)
            if not len(values):
                values = np.empty((self.count, *batch_values.shape[1:]), batch_values.dtype)
            values[first : first + len(batch_values)] = batch_values
        return values

    def take(self, indexes: ndarray, columns: Sequence[str]) -> pa.Table:
        """Return the rows with these numbers as a table, in the order of `indexes`. Files are memory-mapped, so that
        other rows of a batch are not read."""
        order = np.argsort(indexes, kind="stable")
        sorted_indexes = indexes[order]
        batches = []
        start = 0
        for part, first, sizes in self.parts:
            ends = np.searchsorted(sorted_indexes, first + np.cumsum(sizes, dtype=np.int64))
            if not len(ends) or start == ends[-1]:
                continue
            with self.open_part(part, columns, mapped=True) as read_batch:
                for i, end in enumerate(ends.tolist()):
                    if end > start:
                        batches.append(read_batch(i).take(pa.array(sorted_indexes[start:end] - first)))
                    start = end
                    first += sizes[i]
        table = pa.Table.from_batches(batches)
        if (np.diff(order) != 1).any():
            table = table.take(pa.array(np.argsort(order)))
        return table.combine_chunks()

    def load_records(self, numbers: ndarray) -> list[tuple[str, Record]]:
        """Return the records of the rows with these numbers, each with its name `source:row`. The name is also the id
        of a record without one."""
        if not len(numbers):
            return []
        table = self.take(numbers, [*CONTENT[self.kind], "source", "row"])
        places = zip(table["source"].to_pylist(), table["row"].to_pylist(), strict=True)
        names = [f"{self.names[source]}:{row}" for source, row in places]
        return list(zip(names, columns_to_records(self.kind, table, names), strict=True))


def get_first_bits(ids: ndarray) -> ndarray:
    """Return the first 64 bits of each id (uint8 (N, length)), uint64 (N)."""
    return np.ascontiguousarray(ids[:, :8]).view(">u8").ravel().astype(np.uint64)


def column_to_numpy(array: pa.Array) -> ndarray:
    """Return a column without nulls as a NumPy array. A column of binary ids becomes uint8 (N, length)."""
    if pa.types.is_fixed_size_binary(array.type):
        width = array.type.byte_width
        return np.frombuffer(array.buffers()[1], np.uint8).reshape(-1, width)[array.offset :][: len(array)]
    return array.to_numpy(zero_copy_only=False)
