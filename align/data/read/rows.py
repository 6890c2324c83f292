"""Rows of a data set in any file format, numbered from 1 and read in bounded memory.

    .jsonl .ndjson .json    JSON Lines, or one JSON array, or an object that holds one
    .csv .tsv               tables with a header
    .parquet .arrow         Parquet; Arrow's IPC files and streams

Each may be compressed by gzip, zstd, xz or bzip2. The first bytes of a file decide its format, and its name only if
they are ambiguous. A row may not hold a duplicate key, half a surrogate pair, NUL, or values nested too deeply.
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
from align.data.read.arrow_rows import read_arrow_file, read_arrow_stream, read_parquet
from align.data.read.content import split_names
from align.data.read.files import COMPRESSION_ENDINGS, ROW_FILE_ENDINGS, DataFile, list_data_files
from align.data.read.json_rows import BOM, NumberedRows, read_array, read_lines
from align.data.read.tables import detect_delimiter, read_table
from align.run.digests import require_same_bytes

Reader = Callable[[DataFile, int], NumberedRows]
"""Function that reads the rows of one file after the given number."""
BINARY_READERS = {b"PAR1": read_parquet, b"ARROW1": read_arrow_file, b"\xff\xff\xff\xff": read_arrow_stream}
COLUMN_READERS = (read_table, *BINARY_READERS.values())
"""Readers of file formats with columns."""
FORMAT_OF_ENDING = {".parquet": "Parquet", ".arrow": "Arrow", ".feather": "Arrow"}
LINES_ENDINGS = (".jsonl", ".ndjson")
ZIP = ("a zip archive", UNPACK := "Unpack it, and name a file of it that holds rows.")
UTF_16 = ("text in UTF-16", "Write it in UTF-8: iconv -f UTF-16 -t UTF-8 {} > rows.txt.")
UNSUPPORTED_FORMATS = {
    b"PK\x03\x04": ZIP,
    b"PK\x05\x06": ZIP,
    b"7z\xbc\xaf": ("a 7z archive", UNPACK),
    b"SQLite format 3": ("a database", "Write the rows as JSON Lines or Parquet."),
    b"\xff\xfe": UTF_16,
    b"\xfe\xff": UTF_16,
}
"""First bytes of unsupported formats → (description, remedy)."""
LIST_COLUMNS = split_names(
    "messages conversations conversation_a conversation_b prompt completion chosen rejected answers "
    "context history replies tools functions tool_calls images audio expected"
)
"""Columns of a row that hold a list of objects. An object with one of these is a row and no container of rows."""
COLUMN_NAME = re.compile(r"[^\W\d][\w .-]{0,63}")
"""Column name in the header of a table without the ending of one."""


class Row(NamedTuple):
    """A row of a data set, with its file and number, or the error of a row that cannot be read.

    Attributes:
        number: number in the data set, ascending.
        data: column → value. Empty if there is an error.
        file: the file that holds it.
        place: number in the file; the line number in JSON Lines.
        texts: text cells may write values of other types, as in tables and in Parquet and Arrow, whose columns have one
            type.
        error: the error of a row that cannot be read.
        kept_as_metadata: columns that are kept as metadata and not read, see `align.data.read.column_rules`.
    """

    number: int
    data: dict[str, Any]
    file: Path
    place: int
    texts: bool = False
    error: InputError | None = None
    kept_as_metadata: Mapping[str, Any] = MappingProxyType({})

    @property
    def where(self) -> str:
        """File path and row number as text, by which errors name the row."""
        return f"{self.file}, row {self.place}"

    def add_location(self, error: InputError) -> InputError:
        """Return a copy of an error about a field of this row, with the file and the row number put before the
        field."""
        field = f"{self.where}, {error.field}" if error.field else self.where
        return type(error)(field, error.value, error.problem, error.remedy)

    @contextmanager
    def naming_errors(self) -> Iterator[None]:
        """Add this row's file and number to an InputError raised in the block. An error that names a row of this file
        already is left as it is."""
        try:
            yield
        except InputError as error:
            if error.field.startswith(f"{self.file}, row "):
                raise
            raise self.add_location(error) from error

    @property
    def name(self) -> str:
        """Default id of a pair whose row has no `id` column, from file name and row number: `my-file:7`."""
        return f"{strip_endings(self.file)}:{self.place}"


def build_row_id(row: Row) -> str:
    """Return the id of the conversation in a row, `FILE:NUMBER`, from the file's name and the row's number in it."""
    return f"{row.file.name}:{row.place}"


def iter_rows(path: str | Path, field: str = "data.path", skip: int = 0, counts: Sequence[int] = ()) -> Iterator[Row]:
    """Yield the rows of all files of a data set, in any file format. A row that cannot be read has an `error`. See
    `list_data_files` for the path.

    Args:
        path: the data set.
        field: the setting that names it, for errors.
        skip: rows up to this number are not yielded. Parquet and Arrow skip them without reading.
        counts: numbers of rows of the first files, if known (`count_rows`). A file before `skip` is not opened.

    Raises:
        InputError: a file does not exist or cannot be read.
        CorruptFile: a file cannot be decompressed, is cut or is damaged. The rows before that are yielded first.
    """
    before = 0
    for number, file in enumerate(list_data_files(path, field)):
        if number < len(counts) and before + counts[number] <= skip:
            before += counts[number]
            continue
        source = DataFile(file, field)
        place = [0]
        with source.naming_errors(place), require_same_bytes([file], field, str(file)):
            read_rows = choose_reader(source)
            for place[0], data in read_rows(source, max(0, skip - before)):
                if data is None:
                    before += place[0]
                elif isinstance(data, InputError):
                    row = Row(before + place[0], {}, file, place[0])
                    yield row._replace(error=row.add_location(data))
                else:
                    yield Row(before + place[0], data, file, place[0], read_rows in COLUMN_READERS)


def iter_valid_rows(path: str | Path, field: str = "data.path") -> Iterator[Row]:
    """Yield the rows of a data set, or raise InputError at the first row that cannot be read."""
    for row in iter_rows(path, field):
        if row.error is not None:
            raise row.error
        yield row


def count_rows(file: Path, field: str = "data.path") -> int:
    """Count the rows of a file as `iter_rows` numbers them, blank lines included, without parsing the rows.

    Raises:
        InputError: the file cannot be read.
    """
    source = DataFile(file, field)
    place = [0]
    with source.naming_errors(place):
        for place[0], _ in choose_reader(source)(source, sys.maxsize):
            pass
    return place[0]


def is_seekable(file: Path, field: str = "data.path") -> bool:
    """Return whether reading a file may start at any row at little cost: an uncompressed JSON Lines, Parquet or Arrow
    file.

    Raises:
        InputError: the file cannot be read.
    """
    source = DataFile(file, field)
    with source.naming_errors([0]):
        return not source.detect_compression() and choose_reader(source) in (read_lines, read_parquet, read_arrow_file)


def strip_endings(file: Path) -> str:
    """Return a file's name without the endings of its compression and format, such as `.jsonl.gz`."""
    name = file.name
    for endings in (COMPRESSION_ENDINGS, ROW_FILE_ENDINGS):
        name = next((name.removesuffix(ending) for ending in endings if name.endswith(ending)), name)
    return name


def choose_reader(source: DataFile) -> Reader:
    """Return the function that reads the rows of a file's format, which is detected from its first bytes, then from its
    name.

    Raises:
        InputError: the format is not supported.
        CorruptFile: the name says Parquet or Arrow, and the content is something else.
    """
    head = source.read_head()
    name = source.plain_name
    if binary_reader := next((read for magic, read in BINARY_READERS.items() if head.startswith(magic)), None):
        return binary_reader
    for magic, (description, remedy) in UNSUPPORTED_FORMATS.items():
        if head.startswith(magic):
            raise source.build_input_error(
                f"is {description}, which is not read", remedy.format(quote(str(source.path)))
            )
    if format_name := next(
        (format_name for suffix, format_name in FORMAT_OF_ENDING.items() if name.endswith(suffix)), None
    ):
        raise source.build_corrupt_error(f"is no {format_name} file, as its name says: it was cut, or is another file")
    text = head.decode("utf-8", "replace").lstrip(BOM)
    stripped = text.lstrip()
    if not stripped and name.endswith(".json"):
        raise source.build_corrupt_error("is empty, which JSON is not")
    if stripped.startswith("["):
        return read_array
    if stripped.startswith("{"):
        return read_array if not name.endswith(LINES_ENDINGS) and holds_row_array(stripped) else read_lines
    return read_table if name.endswith((".csv", ".tsv")) or has_header(text, name) else read_lines


def holds_row_array(text: str) -> bool:
    """Return whether the beginning of a JSON file is an object that holds an array of rows, and not a row itself."""
    first_line, _, later_lines = text.partition("\n")
    decoder = json.JSONDecoder()
    if later_lines.strip():
        with suppress(ValueError, RecursionError):
            decoder.decode(first_line)
            return False  # one object per line

    def skip_blanks(position: int) -> int:
        return len(text) - len(text[position:].lstrip())

    position = 1
    try:
        while True:
            name, position = decoder.raw_decode(text, skip_blanks(position))
            position = skip_blanks(position) + 1  # the colon
            if re.compile(r"\s*\[\s*\{").match(text, position):
                return name not in LIST_COLUMNS
            _, position = decoder.raw_decode(text, skip_blanks(position))
            position = skip_blanks(position) + 1  # the comma
    except (ValueError, RecursionError):  # the text ends, or is not JSON
        return False


def has_header(text: str, name: str) -> bool:
    """Return whether a text begins like a table: two lines of equally many cells, two or more, of which the first are
    column names."""
    delimiter = detect_delimiter(text.partition("\n")[0], name)
    try:
        table = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
        header = next(table)
        first_row = next(table)
    except (csv.Error, StopIteration):
        return False
    return all(map(COLUMN_NAME.fullmatch, header)) and len(header) == len(set(header)) == len(first_row) > 1
