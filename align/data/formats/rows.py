"""Rows of a data set: whatever its files are, one after another, numbered from 1.

    .jsonl .ndjson .json    JSON Lines, or one JSON array, or an object that holds one
    .csv .tsv               tables with a header
    .parquet .arrow         Parquet; Arrow's IPC files and streams

Each may be packed by gzip, zstd, xz or bzip2. What a file begins with tells its format, and its name only
where that does not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from align.data.formats.arrow import read_arrow_file, read_arrow_stream, read_parquet
from align.data.formats.files import KNOWN, files_of
from align.data.formats.json_lines import read_lines
from align.data.formats.kinds import reader_of
from align.data.formats.source import ENDINGS, Source
from align.data.formats.tables import read_table
from align.errors import InputError
from align.run.digests import same_bytes

Reader = Callable[[Source, int], Iterator[tuple[int, dict[str, Any] | InputError | None]]]
"""Reads one file: (number from 1, its row or why that is none), and at last (numbers in all, None). Rows up to a number
are not read again."""


OF_COLUMNS = (read_table, read_parquet, read_arrow_file, read_arrow_stream)
"""Readers of files in columns."""


class Row(NamedTuple):
    """One row of a data set.

    Attributes:
        number: in the data set; ascending.
        data: column → value. Empty where there is an error.
        file: that it stands in.
        place: in the file: its line in JSON Lines, elsewhere its number.
        texts: a text may stand for the value that it writes: tables know nothing but texts, and columns of Parquet and
            Arrow are of one type.
        error: why it is no row.
        aside: columns that are kept as metadata and not read, see `align.data.records.column_rules`.
    """

    number: int
    data: dict[str, Any]
    file: Path
    place: int
    texts: bool = False
    error: InputError | None = None
    aside: Mapping[str, Any] = MappingProxyType({})

    @property
    def where(self) -> str:
        """How errors name it."""
        return f"{self.file}, row {self.place}"

    @property
    def name(self) -> str:
        """How ids name it: `my-file:7`."""
        return f"{name_of(self.file)}:{self.place}"


def placed_rows(path: str | Path, field: str = "data.path", skip: int = 0, counts: Sequence[int] = ()) -> Iterator[Row]:
    """The rows of a data set, see `align.data.formats.files.files_of`; rows that are none with their errors.

    Args:
        field: what the user calls the data set.
        skip: rows up to this number were read before. Parquet and Arrow pass over them without reading.
        counts: rows of the files, where they are known (`rows_in`). A file that lies before `skip` is not opened.

    Raises:
        InputError: there is no such file, or it cannot be read.
        CorruptFile: it cannot be unpacked, was cut, or is damaged. The rows before that are given first.
    """
    before = 0
    for number, file in enumerate(files_of(path, field)):
        if number < len(counts) and before + counts[number] <= skip:
            before += counts[number]
            continue
        source, place = Source(file, field), [0]
        with source.told(place), same_bytes([file], field, str(file)):
            read = reader_of(source)
            for place[0], data in read(source, max(0, skip - before)):
                if data is None:
                    before += place[0]
                elif isinstance(data, InputError):
                    yield Row(before + place[0], {}, file, place[0], error=data)
                else:
                    yield Row(before + place[0], data, file, place[0], read in OF_COLUMNS)


def rows_in(file: Path, field: str = "data.path") -> int:
    """How many rows a file has, as `placed_rows` numbers them, blank lines among them. None of them is read.

    Raises:
        InputError: the file cannot be read.
    """
    source, place = Source(file, field), [0]
    with source.told(place):
        for place[0], _ in reader_of(source)(source, sys.maxsize):
            pass
    return place[0]


def passed_over(file: Path, field: str = "data.path") -> bool:
    """Whether rows of a file are passed over at hardly any cost, so that it can be read from anywhere.

    Raises:
        InputError: the file cannot be read.
    """
    source = Source(file, field)
    with source.told([0]):
        return not source.packed_by() and reader_of(source) in (read_lines, read_parquet, read_arrow_file)


def rows(
    path: str | Path, field: str = "data.path", skip: int = 0
) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """(number, columns) of each row, see `placed_rows`; the error of a row that is none stands in its place."""
    return ((row.number, row.error or row.data) for row in placed_rows(path, field, skip))


def checked_rows(path: str | Path, field: str = "data.path") -> Iterator[Row]:
    """The rows of a data set of which none may be wrong. Raises: InputError: one is."""
    for row in placed_rows(path, field):
        if row.error is not None:
            raise row.error
        yield row


def name_of(file: Path) -> str:
    """A file's name without the endings that tell its format."""
    name = file.name
    for endings in (ENDINGS, KNOWN):
        name = next((name.removesuffix(ending) for ending in endings if name.endswith(ending)), name)
    return name
