"""Rows of a data set: whatever its files are, one after another, numbered from 1.

    .jsonl .ndjson .json    JSON Lines, or one JSON array, or an object that holds one
    .csv .tsv               tables with a header
    .parquet .arrow         Parquet; Arrow's IPC files and streams

Each may be packed by gzip, zstd, xz or bzip2. What a file begins with tells its format, and its name only
where that does not.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from types import MappingProxyType
from typing import Any, NamedTuple

from align.core.errors import InputError
from align.data.read.arrow import read_arrow_file, read_arrow_stream, read_parquet
from align.data.read.content import split_names
from align.data.read.files import ENDINGS, KNOWN, DataFile, files_of
from align.data.read.text_formats import BOM, NumberedRows, read_array, read_lines, read_table, separator
from align.run.digests import same_bytes

Reader = Callable[[DataFile, int], NumberedRows]
"""Reads one file. Rows up to a number are not read again."""
BINARY = {b"PAR1": read_parquet, b"ARROW1": read_arrow_file, b"\xff\xff\xff\xff": read_arrow_stream}
OF_COLUMNS = (read_table, *BINARY.values())
"""Readers of files in columns."""
NAMED = {".parquet": "Parquet", ".arrow": "Arrow", ".feather": "Arrow"}
LINES = (".jsonl", ".ndjson")
ZIP = ("a zip archive", UNPACK := "Unpack it, and name a file of it that holds rows.")
UTF_16 = ("text in UTF-16", "Write it in UTF-8: iconv -f UTF-16 -t UTF-8 {} > rows.txt.")
NOT_READ = {
    b"PK\x03\x04": ZIP,
    b"PK\x05\x06": ZIP,
    b"7z\xbc\xaf": ("a 7z archive", UNPACK),
    b"SQLite format 3": ("a database", "Write the rows as JSON Lines or Parquet."),
    b"\xff\xfe": UTF_16,
    b"\xfe\xff": UTF_16,
}
"""What a file begins with that is not read: what it is, and the remedy."""
LISTS_OF_A_ROW = split_names(
    "messages conversations conversation_a conversation_b prompt completion chosen rejected answers "
    "context history replies tools functions tool_calls images audio expected"
)
"""Columns of one row that hold a list of objects: an object with such a list is a row, and none that holds rows."""
COLUMN_NAME = re.compile(r"[^\W\d][\w .-]{0,63}")
"""What a column is called, in the header of a table whose name does not say that it is one."""


class Row(NamedTuple):
    """One row of a data set.

    Attributes:
        number: in the data set; ascending.
        data: column → value. Empty if there is an error.
        file: that it stands in.
        place: in the file: its line in JSON Lines, elsewhere its number.
        texts: a text may stand for the value that it writes: tables know nothing but texts, and columns of Parquet and
            Arrow are of one type.
        error: why it is no row.
        aside: columns that are kept as metadata and not read, see `align.data.read.columns`.
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

    def located(self, error: InputError) -> InputError:
        """Return the error of a field of this row, which names the row too."""
        field = f"{self.where}, {error.field}" if error.field else self.where
        return type(error)(field, error.value, error.problem, error.remedy)

    @contextmanager
    def naming_errors(self) -> Iterator[None]:
        """Name this row in the errors of its fields. Errors of other rows that are read together with it stay."""
        try:
            yield
        except InputError as error:
            if error.field.startswith(f"{self.file}, row "):
                raise
            raise self.located(error) from error

    @property
    def name(self) -> str:
        """How ids name it: `my-file:7`."""
        return f"{name_of(self.file)}:{self.place}"


def placed_rows(path: str | Path, field: str = "data.path", skip: int = 0, counts: Sequence[int] = ()) -> Iterator[Row]:
    """Yield the rows of a data set, see `files_of`; rows that are none with their errors.

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
        source = DataFile(file, field)
        place = [0]
        with source.naming_errors(place), same_bytes([file], field, str(file)):
            read = reader_of(source)
            for place[0], data in read(source, max(0, skip - before)):
                if data is None:
                    before += place[0]
                elif isinstance(data, InputError):
                    row = Row(before + place[0], {}, file, place[0])
                    yield row._replace(error=row.located(data))
                else:
                    yield Row(before + place[0], data, file, place[0], read in OF_COLUMNS)


def checked_rows(path: str | Path, field: str = "data.path") -> Iterator[Row]:
    """Yield the rows of a data set. Raises InputError if one is none."""
    for row in placed_rows(path, field):
        if row.error is not None:
            raise row.error
        yield row


def rows_in(file: Path, field: str = "data.path") -> int:
    """Count the rows of a file as `placed_rows` numbers them, blank lines among them. None of them is read.

    Raises:
        InputError: the file cannot be read.
    """
    source = DataFile(file, field)
    place = [0]
    with source.naming_errors(place):
        for place[0], _ in reader_of(source)(source, sys.maxsize):
            pass
    return place[0]


def is_seekable(file: Path, field: str = "data.path") -> bool:
    """Return whether rows of a file are passed over at hardly any cost, so that it can be read from anywhere.

    Raises:
        InputError: the file cannot be read.
    """
    source = DataFile(file, field)
    with source.naming_errors([0]):
        return not source.packed_by() and reader_of(source) in (read_lines, read_parquet, read_arrow_file)


def name_of(file: Path) -> str:
    """Return a file's name without the endings that tell its format."""
    name = file.name
    for endings in (ENDINGS, KNOWN):
        name = next((name.removesuffix(ending) for ending in endings if name.endswith(ending)), name)
    return name


def reader_of(source: DataFile) -> Reader:
    """Return what reads a file.

    Raises:
        InputError: it has a format that is not read.
        CorruptFile: its name says Parquet or Arrow, and it is not.
    """
    head = source.head()
    name = source.plain_name
    if binary := next((read for mark, read in BINARY.items() if head.startswith(mark)), None):
        return binary
    for mark, (what, remedy) in NOT_READ.items():
        if head.startswith(mark):
            raise source.refused(f"is {what}, which is not read", remedy.format(quote(str(source.path))))
    if kind := next((kind for suffix, kind in NAMED.items() if name.endswith(suffix)), None):
        raise source.corrupt(f"is no {kind} file, as its name says: it was cut, or is another file")
    text = head.decode("utf-8", "replace").lstrip(BOM)
    begun = text.lstrip()
    if not begun and name.endswith(".json"):
        raise source.corrupt("is empty, which JSON is not")
    if begun.startswith("["):
        return read_array
    if begun.startswith("{"):
        return read_array if not name.endswith(LINES) and holds_rows(begun) else read_lines
    return read_table if name.endswith((".csv", ".tsv")) or has_header(text, name) else read_lines


def holds_rows(text: str) -> bool:
    """Return whether a text begins with an object that holds an array of objects, and with no row."""
    first, _, behind = text.partition("\n")
    decoder = json.JSONDecoder()
    if behind.strip():
        with suppress(ValueError, RecursionError):
            decoder.decode(first)
            return False  # an object a line

    def skip_blanks(at: int) -> int:
        return len(text) - len(text[at:].lstrip())

    at = 1
    try:
        while True:
            name, at = decoder.raw_decode(text, skip_blanks(at))
            at = skip_blanks(at) + 1  # the colon
            if re.compile(r"\s*\[\s*\{").match(text, at):
                return name not in LISTS_OF_A_ROW
            _, at = decoder.raw_decode(text, skip_blanks(at))
            at = skip_blanks(at) + 1  # the comma
    except (ValueError, RecursionError):  # it ends, or is no such object
        return False


def has_header(text: str, name: str) -> bool:
    """Return whether a text begins with two lines of as many cells, of which the first are names."""
    sign = separator(text.partition("\n")[0], name)
    try:
        table = csv.reader(text.splitlines(keepends=True), delimiter=sign, strict=True)
        header = next(table)
        first = next(table)
    except (csv.Error, StopIteration):
        return False
    return all(map(COLUMN_NAME.fullmatch, header)) and len(header) == len(set(header)) == len(first) > 1
