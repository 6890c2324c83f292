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
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from shlex import quote
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from align.core.errors import CorruptFile, InputError, find_lone_surrogate
from align.data.read.content import split_names
from align.data.read.files import COMPRESSION_ENDINGS, ROW_FILE_ENDINGS, DataFile, list_data_files
from align.run.digests import require_same_bytes

if TYPE_CHECKING:
    import pyarrow

MAX_DEPTH = 64
"""Maximum nesting of lists and objects, which are walked by recursion."""
MAX_ROW_BYTES = 32 * 2**20
"""Maximum bytes of a row of text. Reading one takes up to about twenty times that in memory."""
SUSPECT_ESCAPE = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")
"""JSON escapes of surrogates and NUL. A match may also be the first half of a complete pair."""
ONE_OBJECT_HELP = "Write one JSON object a line."
TOO_DEEP = "it is nested too deeply to be read"
TOO_LONG = f"a line of more than {MAX_ROW_BYTES // 2**20} MiB"
DIVIDE_HELP = "Leave it out, or divide it into several rows."
DUPLICATE_KEY = "a key of this name stands twice in one object"
NUL_PROBLEM = "it holds U+0000 (NUL), which is no character of a text"
BOM = "\ufeff"
NumberedRows = Iterator[tuple[int, dict[str, Any] | InputError | None]]
"""Rows of one file as a reader yields them: (number from 1, row or its error) for each row, then (last number, None).
The errors name a field of the row; `iter_rows` adds the file and the number."""


class DuplicateKeyError(ValueError):
    """Error of a JSON object that has a key twice."""


def build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict from the (key, value) pairs of a JSON object, or raise DuplicateKeyError if a key occurs twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateKeyError(next(name for name in names if names.count(name) > 1))
    return fields


DECODER = json.JSONDecoder(object_pairs_hook=build_object)
"""JSON decoder that refuses duplicate keys. Shared, because `json.loads` with a hook makes a decoder per call, which
takes as long as reading a short row."""
LENIENT_DECODER = json.JSONDecoder()
"""JSON decoder that accepts duplicate keys, to find the end of such an object."""


def parse_object(value: Any, text: str) -> dict[str, Any]:
    """Return a decoded JSON value as a row, or raise InputError if it is no object or holds a value that cannot be
    kept.

    Args:
        value: the decoded JSON.
        text: the JSON text. Nested values are only checked if the text has suspect escapes or many brackets.

    Raises:
        InputError: the value is no object, or holds a value that cannot be kept.
    """
    if not isinstance(value, dict):
        raise InputError("", text.strip()[:60], f"a {type(value).__name__}, not an object", ONE_OBJECT_HELP)
    suspect = "\\u" in text and SUSPECT_ESCAPE.search(text)
    if suspect or text.count("[") + text.count("{") > MAX_DEPTH:
        check_json_values(value)
    return value


def check_json_values(value: Any, field: str = "", depth: int = 0) -> None:
    """Raise InputError if a value is nested too deeply, or a text within it holds half a surrogate pair or NUL."""
    if isinstance(value, str):
        if surrogate := find_lone_surrogate(value):
            raise InputError(field, value[:60], f"it holds {surrogate}, half a character", "Take it out.")
        if "\0" in value:
            raise InputError(field, value[:60].replace("\0", "␀"), NUL_PROBLEM, "Take it out.")
    if depth > MAX_DEPTH:
        raise InputError(field.partition("[")[0], "[…]", TOO_DEEP, "Give it flat.")
    if isinstance(value, dict):
        for key, inner in value.items():
            check_json_values(key, f"{field}, a key" if field else "a key")
            check_json_values(inner, f"{field}.{key}" if field else key, depth + 1)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            check_json_values(inner, f"{field}[{i}]", depth + 1)


def read_lines(source: DataFile, skip: int = 0) -> NumberedRows:
    """Yield (line number, row or its InputError) for each line of a JSON Lines file, then (last number, None). Blank
    lines are skipped, but counted."""
    line = 0
    with source.open_stream() as file:
        for line, raw in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""), start=1):
            if is_long := len(raw) > MAX_ROW_BYTES:
                skip_line(file, raw)
            if line <= skip or not raw.strip():
                continue
            try:
                if is_long:
                    raise InputError("", f"{raw[:60]!r}", TOO_LONG, DIVIDE_HELP)
                yield line, parse_line(raw)
            except InputError as error:
                yield line, error
    yield line, None


def skip_line(file: BinaryIO, raw: bytes) -> None:
    """Read and discard the rest of a line of a file, in pieces. `raw` is the beginning of the line, which has been
    read."""
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(2**20)


def parse_line(raw: bytes) -> dict[str, Any]:
    """Parse one line of a JSON Lines file as a row, or raise InputError if it is no JSON object in UTF-8."""
    try:
        text = raw.decode()
        data = DECODER.decode(text.lstrip(BOM))
    except DuplicateKeyError as error:
        raise InputError(str(error), "(twice)", DUPLICATE_KEY, "Keep one.") from error
    except RecursionError as error:
        raise InputError("", f"{raw[:60]!r}", TOO_DEEP, ONE_OBJECT_HELP) from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are subclasses
        displayed = raw[:60].decode("utf-8-sig", "replace").replace("\0", "␀").strip()
        reason = "it holds NUL bytes" if b"\0" in raw else str(error)
        raise InputError("", displayed, f"not a line of JSON in UTF-8 ({reason})", ONE_OBJECT_HELP) from error
    return parse_object(data, text)


CHUNK_BYTES = 2**18
"""Bytes read at a time."""
BLANK = re.compile(r"[ \t\r\n]*")
INVALID_UTF8 = re.compile("[\udc80-\udcff]")
"""Invalid UTF-8 bytes, as the error handler `surrogateescape` decodes them."""
REWRITE_HELP = "Write the file again, or write one object a line."


class JsonText:
    """The text of a JSON file, which is read in chunks and consumed value by value.

    Attributes:
        row: number of the row being read.
        last_row: number of the last row that was read completely.
        position: index of the next character in `text`.
        is_at_end: the file has been read to its end.
    """

    def __init__(self, file: BinaryIO, source: DataFile) -> None:
        self.file = file
        self.source = source
        self.decode = getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self.text = ""
        self.position = 0
        self.is_at_end = False
        self.row = 0
        self.last_row = 0

    def read_chunk(self) -> bool:
        """Read the next chunk of the file into `text`, and drop the text that has been consumed. Returns False at the
        end of the file."""
        unread = self.text[self.position :]
        chunk = self.file.read(
            max(CHUNK_BYTES, len(unread))
        )  # doubling, so that a long value is decoded only a few times
        self.text = unread + self.decode(chunk, not chunk)
        self.position = 0
        self.is_at_end = not chunk
        return bool(chunk)

    def peek(self) -> str:
        """Return the next character after blanks without consuming it, or an empty text at the end of the file."""
        while True:
            if blanks := BLANK.match(self.text, self.position):
                self.position = blanks.end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.read_chunk():
                return ""

    def consume(self, *expected: str) -> str:
        """Consume and return the next character, or raise CorruptFile if it is none of `expected`."""
        character = self.peek()
        if character not in expected:
            raise self.build_corrupt_error(f"{character!r} stands where {' or '.join(map(repr, expected))} should")
        self.position += 1
        return character

    def consume_value(self) -> tuple[Any, str]:
        """Consume the next JSON value, and return the decoded value and its JSON text. An object with a duplicate key
        is returned as a DuplicateKeyError.

        Raises:
            InputError: the value is too long or nested too deeply.
            CorruptFile: the text is not JSON, or the file ends.
        """
        self.peek()
        while True:
            try:
                value, end = self._decode_value()
                if end - self.position > MAX_ROW_BYTES:
                    raise self._build_too_long_error("")
                # A number at the end of the chunk may continue in the next one.
                if end + len("e+") < len(self.text) or self.is_at_end:
                    text = self.text[self.position : end]
                    self.position = end
                    return value, text
            except JSONDecodeError as error:
                if self.is_at_end:
                    self.position = max(self.position, error.pos)
                    raise self.build_corrupt_error(error.msg) from error
                if len(self.text) - self.position > MAX_ROW_BYTES:
                    raise self._build_too_long_error(f", or no JSON ({error.msg})") from error
            self.read_chunk()

    def _decode_value(self) -> tuple[Any, int]:
        """Decode the JSON value at the current position, and return it and the position of its end. An object with a
        duplicate key is returned as a DuplicateKeyError."""
        try:
            return DECODER.raw_decode(self.text, self.position)
        except DuplicateKeyError as error:
            return error, LENIENT_DECODER.raw_decode(self.text, self.position)[1]
        except JSONDecodeError:
            raise
        except RecursionError as error:
            raise InputError(self._where, "[…]", TOO_DEEP, "Give it flat.") from error
        except ValueError as error:  # a number with thousands of digits
            raise self.build_corrupt_error(str(error)) from error

    @property
    def _where(self) -> str:
        return f"{self.source.path}, row {self.row}"

    def _build_too_long_error(self, alternative: str) -> InputError:
        problem = f"a value of more than {MAX_ROW_BYTES // 2**20} MiB{alternative}"
        return InputError(self._where, self.text[self.position : self.position + 60], problem, REWRITE_HELP)

    def build_corrupt_error(self, problem: str) -> CorruptFile:
        return self.source.build_corrupt_error(
            f"is no JSON after row {self.last_row}, or was cut there ({problem})", REWRITE_HELP
        )


def read_array(source: DataFile, skip: int = 0) -> NumberedRows:
    """Yield (number, row or its InputError) for each element of a JSON array, or of the one array of objects within a
    JSON object. Rows are numbered by their place in the array; (last number, None) follows.

    Raises:
        InputError: the object holds several arrays of objects.
        CorruptFile: the text is not JSON, or is cut. Rows after that place cannot be found.
    """
    with source.open_stream() as file:
        json_text = JsonText(file, source)
        iter_rows_of_value = iter_object_rows if json_text.consume("[", "{") == "{" else iter_array_rows
        yield from iter_rows_of_value(json_text, skip)
        if json_text.peek():
            raise json_text.build_corrupt_error("there is more text after its end")
        yield json_text.row, None


def iter_array_rows(json_text: JsonText, skip: int) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Yield (number, row or its InputError) for the elements after the first `skip` of a JSON array whose `[` has been
    consumed."""
    separator_sign = json_text.consume("]") if json_text.peek() == "]" else ","
    while separator_sign == ",":
        json_text.row += 1
        value, value_text = json_text.consume_value()
        json_text.last_row = json_text.row
        if json_text.row > skip:
            yield json_text.row, parse_array_value(value, value_text)
        separator_sign = json_text.consume(",", "]")


def iter_object_rows(json_text: JsonText, skip: int) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Yield (number, row or its InputError) for the elements of the only array of objects within a JSON object whose
    `{` has been consumed. Other values are skipped; arrays element by element, as they may be long."""
    rows_key = ""
    separator_sign = ","
    while separator_sign == ",":
        name, _ = json_text.consume_value()
        json_text.consume(":")
        if json_text.peek() != "[":
            json_text.consume_value()
        else:
            json_text.consume("[")
            if json_text.peek() == "{":
                if rows_key:
                    remedy = "Write each into a file of its own."
                    problem = f"holds several lists of rows ({rows_key}, {name})"
                    raise json_text.source.build_input_error(problem, remedy)
                rows_key = name
                yield from iter_array_rows(json_text, skip)
            else:
                element_sign = json_text.consume("]") if json_text.peek() == "]" else ","
                while element_sign == ",":
                    json_text.consume_value()
                    element_sign = json_text.consume(",", "]")
        separator_sign = json_text.consume(",", "}")


def parse_array_value(value: Any, value_text: str) -> dict[str, Any] | InputError:
    """Return a decoded element of a JSON array as a row, or an InputError (not raised) if it is no valid row."""
    if isinstance(value, DuplicateKeyError):
        return InputError(str(value), "(twice)", DUPLICATE_KEY, "Keep one.")
    if INVALID_UTF8.search(value_text):
        beginning = value_text[:60].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return InputError("", beginning, "not text in UTF-8", "Write the file in UTF-8.")
    try:
        return parse_object(value, value_text)
    except InputError as error:
        return error


DELIMITERS = {".csv": (",", ";", "\t"), ".tsv": ("\t",)}
"""Ending → possible cell delimiters. The one that occurs most often in the header, outside of quotes, is used."""
QUOTES_HELP = (
    'Write it with one row a record, and put a cell with a separator, a quote or a line\'s end in double quotes ("").'
)
NOT_UTF8_PROBLEM = "not text in UTF-8"
UTF8_HELP = "Save it as UTF-8, for example: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW."
QUOTED = re.compile(r'"[^"]*"')


class TableLines:
    """Iterator over the lines of a CSV or TSV file as text. A line that is too long, holds NUL or is not UTF-8 sets
    `problem` instead of raising.

    Attributes:
        problem: the problem of the lines read last, or an empty text. The caller resets it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.is_first_line = True
        self.problem = ""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self.file.readline(MAX_ROW_BYTES + 1)
        if not raw:
            raise StopIteration
        if self.is_first_line:
            self.is_first_line = False
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if len(raw) > MAX_ROW_BYTES:
            skip_line(self.file, raw)
            self.problem = TOO_LONG
            raw = raw[:60] + b"\n"
        if b"\0" in raw:
            self.problem = NUL_PROBLEM
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.problem = f"{NOT_UTF8_PROBLEM} ({error})"
            return raw.decode("utf-8", "replace")


def read_table(source: DataFile, skip: int = 0) -> NumberedRows:
    """Yield (number, row or its InputError) for each record of a CSV or TSV file, with the header's column names as
    keys. Every value is a text, or None for an empty cell. Rows are numbered from 1 after the header; (last number,
    None) follows.

    Raises:
        InputError: the header is empty, or names a column twice.
        CorruptFile: the file ends within a quoted cell.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    row = 0
    with source.open_stream() as file:
        lines = TableLines(file)
        first_line = next(lines, "")
        delimiter = detect_delimiter(first_line, source.plain_name)
        header = parse_header(first_line, delimiter, lines.problem, source)
        table = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            lines.problem = ""
            try:
                cells = next(table)
                problem = lines.problem
            except StopIteration:
                break
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    raise source.build_corrupt_error(
                        f"ends within a quoted cell, after row {row}", QUOTES_HELP
                    ) from error
                cells = ["…"]
                problem = lines.problem or f"no row of a table ({error})"
            if not cells:  # a blank line
                continue
            row += 1
            if row <= skip:
                continue
            if not problem and len(cells) != len(header):
                counts = f"{len(cells)} cell{'s' if len(cells) > 1 else ''}, and the header has {len(header)}"
                problem = f"it has another number of cells ({counts})"
            if problem:
                remedy = (
                    UTF8_HELP
                    if problem.startswith(NOT_UTF8_PROBLEM)
                    else DIVIDE_HELP
                    if problem == TOO_LONG
                    else QUOTES_HELP
                )
                yield row, InputError("", repr(cells[0][:60]), problem, remedy)
            else:
                yield row, {name: cell or None for name, cell in zip(header, cells, strict=True)}
    yield row, None


def detect_delimiter(header: str, name: str) -> str:
    """Return the cell delimiter of a CSV or TSV file, such as `,` or a tab, as detected from its header.

    Args:
        header: the first line.
        name: the file name.
    """
    delimiters = DELIMITERS[".tsv" if name.endswith(".tsv") else ".csv"]
    return max(delimiters, key=QUOTED.sub("", header).count)


def parse_header(line: str, delimiter: str, line_problem: str, source: DataFile) -> list[str]:
    """Return the column names in the header of a CSV or TSV file.

    Args:
        line: the first line.
        delimiter: of the cells.
        line_problem: the problem of that line, or an empty text.
        source: the file.

    Raises:
        InputError: the header is missing, has an unnamed column, or names one twice.
    """
    try:
        header = next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise source.build_input_error(f"has no header in its first line ({error})", QUOTES_HELP) from error
    if line_problem:
        remedy = UTF8_HELP if line_problem.startswith(NOT_UTF8_PROBLEM) else "Write the columns' names there."
        raise source.build_input_error(f"has no header in its first line: {line_problem}", remedy)
    if not all(name.strip() for name in header) or not header:
        problem = "has a column without a name" if header else "has no header in its first line"
        raise source.build_input_error(problem, "Write the columns' names into the first line.")
    if duplicates := sorted({name for name in header if header.count(name) > 1}):
        raise source.build_input_error(
            f"has several columns called {', '.join(duplicates)}", "Rename them in the first line."
        )
    return header


class CellTypes(NamedTuple):
    """The columns of tables whose text cells are converted to lists, messages, numbers or booleans.

    Attributes:
        lists: columns of JSON arrays.
        messages: columns of a text, or of a JSON array of messages.
        numbers: columns of numbers or booleans.
    """

    lists: Sequence[str]
    messages: Sequence[str]
    numbers: Sequence[str]

    def convert_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row with its text cells converted to lists, numbers or booleans according to their columns. A text
        that cannot be converted stays."""
        return {name: self.convert_cell(name, text) if isinstance(text, str) else text for name, text in row.items()}

    def convert_cell(self, name: str, text: str) -> Any:
        """Convert a text cell to the list, number or boolean that it writes, if its column has such a type. Otherwise
        returns the text."""
        is_number = name in self.numbers
        if not is_number and not (text.startswith("[") and (name in self.lists or name in self.messages)):
            return text
        lowered = text.strip().lower()
        try:
            value = json.loads(lowered if lowered in ("true", "false") else text)
        except (ValueError, RecursionError):
            return text
        if is_number:
            return value if isinstance(value, int | float) else text
        # The text of an answer may be JSON itself, so only lists of messages are converted.
        is_message_list = bool(value) and all(
            isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value
        )
        return value if name in self.lists or is_message_list else text


CELL_TYPES = CellTypes(
    lists=split_names(
        "messages conversations conversation_a conversation_b history answers completions choices options documents"
    ),
    messages=("prompt", "completion", "response", "chosen", "rejected", "context"),
    numbers=split_names(
        "helpfulness overall_preference preference_strength margin score_chosen score_rejected strength label "
        "weight train training chosen_ended rejected_ended deleted"
    ),
)


BATCH_ROWS = 1024
"""Maximum rows of a batch."""
BATCH_BYTES = 8 * 2**20
"""Approximate maximum bytes of a batch."""
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
"""Last bytes of an Arrow stream. A stream without them was cut between two batches."""


def iter_numbered_rows(
    read_batches: Callable[[DataFile, int], Iterator[pyarrow.RecordBatch | int]], source: DataFile, skip: int = 0
) -> NumberedRows:
    """Yield (number, row or its InputError) for each row of a file's Arrow record batches, then (last number, None).

    Args:
        read_batches: yields batches, and an integer for each number of rows that it skips.
        source: the file.
        skip: rows up to this number are not yielded.

    Raises:
        CorruptFile: Arrow cannot read a batch.
    """
    import pyarrow

    row = 0
    try:
        for batch in read_batches(source, skip):
            if isinstance(batch, int):
                row += batch
                continue
            skipped = min(max(skip - row, 0), batch.num_rows)
            row += skipped
            for data in iter_batch_rows(batch.slice(skipped)):
                row += 1
                yield row, data
    except InputError:
        raise
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise source.build_corrupt_error(f"cannot be read after row {row}: it was cut or damaged ({reason})") from error
    yield row, None


def iter_parquet_batches(source: DataFile, skip: int) -> Iterator[pyarrow.RecordBatch | int]:
    """Yield the record batches of a Parquet file, and for each row group that ends before or at row `skip` only its
    number of rows."""
    from pyarrow import parquet

    with source.open_seekable() as file:
        parquet_file = parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        check_column_names(parquet_file.schema_arrow, source)
        metadata = parquet_file.metadata
        row = 0
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            if row + row_group.num_rows <= skip:
                row += row_group.num_rows
                yield row_group.num_rows
                continue
            batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * row_group.num_rows // max(1, row_group.total_byte_size)))
            for batch in parquet_file.iter_batches(batch_rows, row_groups=[group]):
                row += batch.num_rows
                yield batch
        if row != metadata.num_rows:
            raise source.build_corrupt_error(f"has {row} rows, and its end says {metadata.num_rows}")


def iter_file_batches(source: DataFile, skip: int) -> Iterator[pyarrow.RecordBatch]:
    """Yield all record batches of an Arrow IPC file, such as Feather. `skip` is not used."""
    import pyarrow.ipc

    with source.open_seekable() as file:
        arrow_file = pyarrow.ipc.open_file(file)
        check_column_names(arrow_file.schema, source)
        for i in range(arrow_file.num_record_batches):
            yield arrow_file.get_batch(i)


def iter_stream_batches(source: DataFile, skip: int) -> Iterator[pyarrow.RecordBatch]:
    """Yield all record batches of an Arrow IPC stream, as `datasets` writes it. `skip` is not used. Raises CorruptFile
    if the mark of the stream's end is missing."""
    import pyarrow.ipc

    with source.open_stream() as file:
        tail = TailKeeper(file)
        stream = pyarrow.ipc.open_stream(pyarrow.PythonFile(tail, "r"))
        check_column_names(stream.schema, source)
        row = 0
        for batch in stream:
            row += batch.num_rows
            yield batch
        if tail.last != STREAM_END:
            raise source.build_corrupt_error(f"ends after row {row} without the mark of its end: it was cut")


read_parquet = partial(iter_numbered_rows, iter_parquet_batches)
read_arrow_file = partial(iter_numbered_rows, iter_file_batches)
read_arrow_stream = partial(iter_numbered_rows, iter_stream_batches)


def check_column_names(schema: pyarrow.Schema, source: DataFile) -> None:
    """Raise InputError if two columns of an Arrow schema have the same name, as a row holds one value per name."""
    if duplicates := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise source.build_input_error(f"has several columns called {', '.join(duplicates)}", "Rename them.")


class TailKeeper:
    """A binary file wrapper that remembers the last eight bytes read."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.last = (self.last + data[-len(STREAM_END) :])[-len(STREAM_END) :]
        return data

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """Do nothing: the context that opened the file closes it."""


def iter_batch_rows(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | InputError]:
    """Yield each row of an Arrow record batch as a dict of JSON values, or an InputError for a row that cannot be kept.
    A batch may be of any size: it is converted in parts."""
    import pyarrow

    types = pyarrow.types

    def is_special(data_type: pyarrow.DataType) -> bool:
        return types.is_temporal(data_type) or types.is_decimal(data_type) or types.is_map(data_type)

    has_special_types = any(has_matching_type(data_type, is_special) for data_type in batch.schema.types)
    json_fields = [field for field in batch.schema if has_matching_type(field.type, is_json)]
    nested_fields = [*json_fields, *(field for field in batch.schema if has_matching_type(field.type, has_structs))]
    part_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)))
    for start in range(0, batch.num_rows, part_rows):
        part_batch = batch.slice(start, part_rows)
        needs_check = bool(json_fields) or any(map(has_nul, part_batch.columns))
        for data in part_batch.to_pylist():
            try:
                if has_special_types:
                    data = {name: to_json_value(value) for name, value in data.items()}
                if nested_fields:
                    data |= {field.name: decode_nested(data[field.name], field.type) for field in nested_fields}
                if needs_check:
                    check_json_values(data)
            except InputError as error:
                yield error
            else:
                yield data


def has_nul(column: pyarrow.Array) -> bool:
    """Return whether a text in an Arrow column, or nested in it, contains the character U+0000 (NUL)."""
    import pyarrow
    import pyarrow.compute

    data_type: Any = column.type
    pc: Any = pyarrow.compute  # its functions are created at run time
    types = pyarrow.types
    if types.is_struct(data_type):
        return any(map(has_nul, column.flatten()))
    if types.is_list(data_type) or types.is_large_list(data_type) or types.is_fixed_size_list(data_type):
        return has_nul(column.flatten())
    if types.is_dictionary(data_type):
        return has_nul(column.dictionary)
    is_text = types.is_string(data_type) or types.is_large_string(data_type)
    return is_text and bool(pc.any(pc.match_substring(column, "\0")).as_py())


def list_child_fields(data_type: pyarrow.DataType) -> list[pyarrow.Field]:
    """Return the child fields of an Arrow list or struct type. Returns an empty list for a map."""
    import pyarrow

    return [] if pyarrow.types.is_map(data_type) else [data_type.field(i) for i in range(data_type.num_fields)]


def has_matching_type(data_type: pyarrow.DataType, test: Callable[[pyarrow.DataType], bool]) -> bool:
    """Return whether an Arrow type, or a type nested in it, passes `test`."""
    import pyarrow

    if pyarrow.types.is_dictionary(data_type):
        inner_types = [data_type.value_type]
    else:
        inner_types = [field.type for field in list_child_fields(data_type)]
    return test(data_type) or any(has_matching_type(inner_type, test) for inner_type in inner_types)


def is_json(data_type: pyarrow.DataType) -> bool:
    """Return whether an Arrow type is JSON, in which `datasets` keeps objects of any form."""
    import pyarrow

    return isinstance(data_type, pyarrow.JsonType)


def has_structs(data_type: pyarrow.DataType) -> bool:
    """Return whether an Arrow type is a struct that contains structs, such as a message with a tool call."""
    import pyarrow

    is_struct = pyarrow.types.is_struct
    return is_struct(data_type) and any(
        has_matching_type(field.type, is_struct) for field in list_child_fields(data_type)
    )


def decode_nested(value: Any, data_type: pyarrow.DataType) -> Any:
    """Decode JSON text within a value of an Arrow column, and drop null fields of its structs, as JSON Lines would hold
    it. All structs of a column have the same fields, so that null fills those a row lacks.

    Raises:
        InputError: a value of a JSON column is not JSON.
    """
    import pyarrow

    if is_json(data_type) and isinstance(value, str):
        try:
            return DECODER.decode(value)
        except (ValueError, RecursionError) as error:
            problem = f"holds what is no JSON ({error})"
            raise InputError("a column of JSON", value[:60], problem, "Write JSON.") from error
    if isinstance(value, dict) and pyarrow.types.is_struct(data_type):
        return {
            field.name: decode_nested(value[field.name], field.type)
            for field in list_child_fields(data_type)
            if value.get(field.name) is not None
        }
    if isinstance(value, list) and not pyarrow.types.is_map(data_type):
        inner_fields = list_child_fields(data_type)
        if len(inner_fields) == 1:
            return [decode_nested(entry, inner_fields[0].type) for entry in value]
    return value


def to_json_value(value: Any) -> Any:
    """Convert a value of an Arrow column to JSON types: times to ISO 8601, durations to seconds, decimals to numbers,
    maps to objects."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, dict):
        return {name: to_json_value(inner) for name, inner in value.items()}
    if isinstance(value, list):
        is_map = bool(value) and all(isinstance(entry, tuple) for entry in value)  # Arrow's form of a map
        return (
            {str(name): to_json_value(inner) for name, inner in value}
            if is_map
            else [to_json_value(inner) for inner in value]
        )
    return value


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
        kept_as_metadata: columns that are kept as metadata and not read, see `align.data.read.columns`.
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
