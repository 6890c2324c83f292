"""Rows of a data set: whatever its files are, one after another, numbered from 1, in memory that does not grow.

    .jsonl .ndjson .json    JSON Lines, or one JSON array, or an object that holds one
    .csv .tsv               tables with a header
    .parquet .arrow         Parquet; Arrow's IPC files and streams

Each may be packed by gzip, zstd, xz or bzip2. What a file begins with tells its format, and its name only
where that does not. A row may hold no key twice, no half character, no NUL, and nothing that is nested too deeply.
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
from align.data.read.files import ENDINGS, KNOWN, DataFile, files_of
from align.run.digests import expect_same_bytes

if TYPE_CHECKING:
    import pyarrow

DEEPEST = 64
"""Lists and objects within one another: what reads a row walks them by recursion."""
LONGEST = 32 * 2**20
"""Bytes of a row of text; reading one takes up to some twenty times that."""
SUSPECT = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")
"""How a file in UTF-8 writes half a character and NUL; half of its matches are followed by their other half."""
ONE = "Write one JSON object a line."
TOO_DEEP = "it is nested too deeply to be read"
TOO_LONG = f"a line of more than {LONGEST // 2**20} MiB"
DIVIDE = "Leave it out, or divide it into several rows."
TWICE = "a key of this name stands twice in one object"
NUL = "it holds U+0000 (NUL), which is no character of a text"
BOM = "\ufeff"
NumberedRows = Iterator[tuple[int, dict[str, Any] | InputError | None]]
"""What a reader yields: (number from 1, the row or why it is none), and at last (the count of numbers, None).
The errors name a field of the row; `placed_rows` adds the file and the number."""


class KeyTwice(ValueError):
    """An object has two values of one name."""


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyTwice(next(name for name in names if names.count(name) > 1))
    return fields


DECODER = json.JSONDecoder(object_pairs_hook=object_of)
"""Made once: `json.loads` with a hook makes a decoder a call, which takes as long as reading a short row."""
LENIENT_DECODER = json.JSONDecoder()
"""The same for an object that has a key twice: it finds the end."""


def parse_object(value: Any, text: str) -> dict[str, Any]:
    """Return a JSON value as a row. Raises InputError if it is no object, or has a value that cannot be kept.

    Args:
        text: that the value was read from. Only one that gives cause is looked at closely.
    """
    if not isinstance(value, dict):
        raise InputError("", text.strip()[:60], f"a {type(value).__name__}, not an object", ONE)
    suspect = "\\u" in text and SUSPECT.search(text)
    if suspect or text.count("[") + text.count("{") > DEEPEST:
        check_values(value)
    return value


def check_values(value: Any, field: str = "", depth: int = 0) -> None:
    """Raise InputError if a value, or one within it, is nested too deeply, or holds half a character or NUL."""
    if isinstance(value, str):
        if half := find_lone_surrogate(value):
            raise InputError(field, value[:60], f"it holds {half}, half a character", "Take it out.")
        if "\0" in value:
            raise InputError(field, value[:60].replace("\0", "␀"), NUL, "Take it out.")
    if depth > DEEPEST:
        raise InputError(field.partition("[")[0], "[…]", TOO_DEEP, "Give it flat.")
    if isinstance(value, dict):
        for key, inner in value.items():
            check_values(key, f"{field}, a key" if field else "a key")
            check_values(inner, f"{field}.{key}" if field else key, depth + 1)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            check_values(inner, f"{field}[{i}]", depth + 1)


def read_lines(source: DataFile, skip: int = 0) -> NumberedRows:
    """Read JSON Lines. Rows are numbered by their lines; blank lines are left out."""
    line = 0
    with source.opened() as file:
        for line, raw in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), start=1):
            if is_long := len(raw) > LONGEST:
                skip_line(file, raw)
            if line <= skip or not raw.strip():
                continue
            try:
                if is_long:
                    raise InputError("", f"{raw[:60]!r}", TOO_LONG, DIVIDE)
                yield line, parse_line(raw)
            except InputError as error:
                yield line, error
    yield line, None


def skip_line(file: BinaryIO, raw: bytes) -> None:
    """Read to the end of a line, and keep nothing of it."""
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(2**20)


def parse_line(raw: bytes) -> dict[str, Any]:
    """Return one line as a row. Raises InputError if it is none."""
    try:
        text = raw.decode()
        data = DECODER.decode(text.lstrip(BOM))
    except KeyTwice as error:
        raise InputError(str(error), "(twice)", TWICE, "Keep one.") from error
    except RecursionError as error:
        raise InputError("", f"{raw[:60]!r}", TOO_DEEP, ONE) from error
    except ValueError as error:  # of which UnicodeDecodeError and JSONDecodeError are kinds
        displayed = raw[:60].decode("utf-8-sig", "replace").replace("\0", "␀").strip()
        why = "it holds NUL bytes" if b"\0" in raw else str(error)
        raise InputError("", displayed, f"not a line of JSON in UTF-8 ({why})", ONE) from error
    return parse_object(data, text)


CHUNK = 2**18
"""Bytes that are read at a time."""
BLANK = re.compile(r"[ \t\r\n]*")
NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""Bytes that are no text, as they are read."""
MEND = "Write the file again, or write one object a line."


class JsonText:
    """The text of a file, of which one value or sign after another is taken.

    Attributes:
        row: the number of the row that is being read.
        done: that of the last row that was read whole.
    """

    def __init__(self, file: BinaryIO, source: DataFile) -> None:
        self.file = file
        self.source = source
        self.decode = getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self.text = ""
        self.at = 0
        self.ended = False
        self.row = 0
        self.done = 0

    def read_on(self) -> bool:
        """Read on, and forget what was taken. Returns False at the end."""
        rest = self.text[self.at :]
        chunk = self.file.read(max(CHUNK, len(rest)))  # as much again: a long value is tried a few times, not often
        self.text = rest + self.decode(chunk, not chunk)
        self.at = 0
        self.ended = not chunk
        return bool(chunk)

    def sign(self) -> str:
        """Return the next character that is no blank, without taking it; an empty text at the end."""
        while True:
            if blank := BLANK.match(self.text, self.at):
                self.at = blank.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.read_on():
                return ""

    def take(self, *signs: str) -> str:
        """Take the next sign, one of these. Raises CorruptFile if it is another, or the file ends."""
        sign = self.sign()
        if sign not in signs:
            raise self.broken(f"{sign!r} stands where {' or '.join(map(repr, signs))} should")
        self.at += 1
        return sign

    def value(self) -> tuple[Any, str]:
        """Take the next value and its text; in place of an object that has a key twice, its KeyTwice.

        Raises:
            InputError: it is too long or nested too deeply.
            CorruptFile: it is no JSON, or the file ends.
        """
        self.sign()
        while True:
            try:
                value, end = self._decode_value()
                if end - self.at > LONGEST:
                    raise self._too_long("")
                if end + len("e+") < len(self.text) or self.ended:  # a number may go on
                    text = self.text[self.at : end]
                    self.at = end
                    return value, text
            except JSONDecodeError as error:
                if self.ended:
                    self.at = max(self.at, error.pos)
                    raise self.broken(error.msg) from error
                if len(self.text) - self.at > LONGEST:
                    raise self._too_long(f", or no JSON ({error.msg})") from error
            self.read_on()

    def _decode_value(self) -> tuple[Any, int]:
        """Return the value that begins here, and where it ends."""
        try:
            return DECODER.raw_decode(self.text, self.at)
        except KeyTwice as error:
            return error, LENIENT_DECODER.raw_decode(self.text, self.at)[1]
        except JSONDecodeError:
            raise
        except RecursionError as error:
            raise InputError(self._where, "[…]", TOO_DEEP, "Give it flat.") from error
        except ValueError as error:  # a number of thousands of digits
            raise self.broken(str(error)) from error

    @property
    def _where(self) -> str:
        return f"{self.source.path}, row {self.row}"

    def _too_long(self, otherwise: str) -> InputError:
        problem = f"a value of more than {LONGEST // 2**20} MiB{otherwise}"
        return InputError(self._where, self.text[self.at : self.at + 60], problem, MEND)

    def broken(self, problem: str) -> CorruptFile:
        return self.source.corrupt(f"is no JSON after row {self.done}, or was cut there ({problem})", MEND)


def read_array(source: DataFile, skip: int = 0) -> NumberedRows:
    """Read one JSON array of objects, or an object that holds one. Rows are numbered by their places in the array.

    Raises:
        InputError: an object holds several arrays of objects.
        CorruptFile: it is no JSON, or was cut. What stands behind that cannot be found.
    """
    with source.opened() as file:
        text = JsonText(file, source)
        yield from rows_of_object(text, skip) if text.take("[", "{") == "{" else rows_of_array(text, skip)
        if text.sign():
            raise text.broken("more stands behind its end")
        yield text.row, None


def rows_of_array(text: JsonText, skip: int) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Yield the rows of an array whose `[` was taken."""
    sign = text.take("]") if text.sign() == "]" else ","
    while sign == ",":
        text.row += 1
        value, written = text.value()
        text.done = text.row
        if text.row > skip:
            yield text.row, row_of_value(value, written)
        sign = text.take(",", "]")


def rows_of_object(text: JsonText, skip: int) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Yield the rows of the array of objects that an object holds, whose `{` was taken. Its other values are passed
    over, element by element, for an array may be long."""
    holder = ""
    sign = ","
    while sign == ",":
        name, _ = text.value()
        text.take(":")
        if text.sign() != "[":
            text.value()
        else:
            text.take("[")
            if text.sign() == "{":
                if holder:
                    remedy = "Write each into a file of its own."
                    raise text.source.refused(f"holds several lists of rows ({holder}, {name})", remedy)
                holder = name
                yield from rows_of_array(text, skip)
            else:
                end = text.take("]") if text.sign() == "]" else ","
                while end == ",":
                    text.value()
                    end = text.take(",", "]")
        sign = text.take(",", "}")


def row_of_value(value: Any, written: str) -> dict[str, Any] | InputError:
    """Return a value of the array as a row, or why it is none."""
    if isinstance(value, KeyTwice):
        return InputError(str(value), "(twice)", TWICE, "Keep one.")
    if NOT_UTF8.search(written):
        shown = written[:60].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return InputError("", shown, "not text in UTF-8", "Write the file in UTF-8.")
    try:
        return parse_object(value, written)
    except InputError as error:
        return error


SEPARATORS = {".csv": (",", ";", "\t"), ".tsv": ("\t",)}
"""Ending → what may stand between two cells; the one that the header has most often outside of quotes."""
QUOTES = (
    'Write it with one row a record, and put a cell with a separator, a quote or a line\'s end in double quotes ("").'
)
NOT_UTF_8 = "not text in UTF-8"
IN_UTF_8 = "Save it as UTF-8, for example: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW."
QUOTED = re.compile(r'"[^"]*"')


class TableLines:
    """The lines of a file as text, and what is wrong with those that were read last."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.first = True
        self.wrong = ""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self.file.readline(LONGEST + 1)
        if not raw:
            raise StopIteration
        if self.first:
            self.first = False
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if len(raw) > LONGEST:
            skip_line(self.file, raw)
            self.wrong = TOO_LONG
            raw = raw[:60] + b"\n"
        if b"\0" in raw:
            self.wrong = NUL
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.wrong = f"{NOT_UTF_8} ({error})"
            return raw.decode("utf-8", "replace")


def read_table(source: DataFile, skip: int = 0) -> NumberedRows:
    """Read CSV or TSV: a header, and a row of as many cells for each record. Every value is a text, or null if the cell
    is empty. Rows are numbered from 1 behind the header.

    Raises:
        InputError: the header is empty, or names a column twice.
        CorruptFile: the file ends within a quoted cell.
    """
    csv.field_size_limit(LONGEST)
    row = 0
    with source.opened() as file:
        lines = TableLines(file)
        first = next(lines, "")
        sign = separator(first, source.plain_name)
        header = parse_header(first, sign, lines.wrong, source)
        table = csv.reader(lines, delimiter=sign, strict=True)
        while True:
            lines.wrong = ""
            try:
                cells = next(table)
                problem = lines.wrong
            except StopIteration:
                break
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    raise source.corrupt(f"ends within a quoted cell, after row {row}", QUOTES) from error
                cells = ["…"]
                problem = lines.wrong or f"no row of a table ({error})"
            if not cells:  # a blank line
                continue
            row += 1
            if row <= skip:
                continue
            if not problem and len(cells) != len(header):
                counts = f"{len(cells)} cell{'s' if len(cells) > 1 else ''}, and the header has {len(header)}"
                problem = f"it has another number of cells ({counts})"
            if problem:
                remedy = IN_UTF_8 if problem.startswith(NOT_UTF_8) else DIVIDE if problem == TOO_LONG else QUOTES
                yield row, InputError("", repr(cells[0][:60]), problem, remedy)
            else:
                yield row, {name: cell or None for name, cell in zip(header, cells, strict=True)}
    yield row, None


def separator(header: str, name: str) -> str:
    """Return what stands between the cells."""
    signs = SEPARATORS[".tsv" if name.endswith(".tsv") else ".csv"]
    return max(signs, key=QUOTED.sub("", header).count)


def parse_header(first: str, sign: str, wrong: str, source: DataFile) -> list[str]:
    """Return the names of the columns."""
    try:
        header = next(csv.reader([first], delimiter=sign, strict=True), [])
    except csv.Error as error:
        raise source.refused(f"has no header in its first line ({error})", QUOTES) from error
    if wrong:
        remedy = IN_UTF_8 if wrong.startswith(NOT_UTF_8) else "Write the columns' names there."
        raise source.refused(f"has no header in its first line: {wrong}", remedy)
    if not all(name.strip() for name in header) or not header:
        problem = "has a column without a name" if header else "has no header in its first line"
        raise source.refused(problem, "Write the columns' names into the first line.")
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise source.refused(f"has several columns called {', '.join(twice)}", "Rename them in the first line.")
    return header


class Cells(NamedTuple):
    """Columns of tables that hold something else than a text.

    Attributes:
        lists: a JSON array.
        messages: a text, or a JSON array of turns.
        numbers: a number, `true` or `false`.
    """

    lists: Sequence[str]
    messages: Sequence[str]
    numbers: Sequence[str]

    def typed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row with values in place of the texts that write them; a text that writes none stays."""
        return {name: self.value(name, text) if isinstance(text, str) else text for name, text in row.items()}

    def value(self, name: str, text: str) -> Any:
        is_number = name in self.numbers
        if not is_number and not (text.startswith("[") and (name in self.lists or name in self.messages)):
            return text
        word = text.strip().lower()
        try:
            value = json.loads(word if word in ("true", "false") else text)
        except (ValueError, RecursionError):
            return text
        if is_number:
            return value if isinstance(value, int | float) else text
        # An answer may be JSON itself.
        turns = bool(value) and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)
        return value if name in self.lists or turns else text


CELLS = Cells(
    lists=split_names(
        "messages conversations conversation_a conversation_b history answers completions choices options documents"
    ),
    messages=("prompt", "completion", "response", "chosen", "rejected", "context"),
    numbers=split_names(
        "helpfulness overall_preference preference_strength margin score_chosen score_rejected strength label "
        "weight train training chosen_ended rejected_ended deleted"
    ),
)


ROWS = 1024
"""Rows of a batch, at most."""
BATCH = 8 * 2**20
"""Bytes of a batch, about."""
END = b"\xff\xff\xff\xff\0\0\0\0"
"""What a stream ends with. Without it, it was cut between two batches."""


def number_rows(
    read_batches: Callable[[DataFile, int], Iterator[pyarrow.RecordBatch | int]], source: DataFile, skip: int = 0
) -> NumberedRows:
    """Yield the rows of batches, numbered.

    Args:
        read_batches: yields batches, and in place of rows that are passed over how many they are.

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
            passed = min(max(skip - row, 0), batch.num_rows)
            row += passed
            for data in rows_of(batch.slice(passed)):
                row += 1
                yield row, data
    except InputError:
        raise
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise source.corrupt(f"cannot be read after row {row}: it was cut or damaged ({reason})") from error
    yield row, None


def parquet_batches(source: DataFile, skip: int) -> Iterator[pyarrow.RecordBatch | int]:
    """Read Parquet. Groups of rows that lie before `skip` are not read."""
    from pyarrow import parquet

    with source.seekable() as file:
        whole = parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        check_names(whole.schema_arrow, source)
        metadata = whole.metadata
        row = 0
        for group in range(metadata.num_row_groups):
            here = metadata.row_group(group)
            if row + here.num_rows <= skip:
                row += here.num_rows
                yield here.num_rows
                continue
            at_once = max(1, min(ROWS, BATCH * here.num_rows // max(1, here.total_byte_size)))
            for batch in whole.iter_batches(at_once, row_groups=[group]):
                row += batch.num_rows
                yield batch
        if row != metadata.num_rows:
            raise source.corrupt(f"has {row} rows, and its end says {metadata.num_rows}")


def file_batches(source: DataFile, skip: int) -> Iterator[pyarrow.RecordBatch]:
    """Read an IPC file, such as Feather is one."""
    import pyarrow.ipc

    with source.seekable() as file:
        whole = pyarrow.ipc.open_file(file)
        check_names(whole.schema, source)
        for i in range(whole.num_record_batches):
            yield whole.get_batch(i)


def stream_batches(source: DataFile, skip: int) -> Iterator[pyarrow.RecordBatch]:
    """Read an IPC stream, such as `datasets` writes."""
    import pyarrow.ipc

    with source.opened() as file:
        tail = TailKeeper(file)
        stream = pyarrow.ipc.open_stream(pyarrow.PythonFile(tail, "r"))
        check_names(stream.schema, source)
        row = 0
        for batch in stream:
            row += batch.num_rows
            yield batch
        if tail.last != END:
            raise source.corrupt(f"ends after row {row} without the mark of its end: it was cut")


read_parquet = partial(number_rows, parquet_batches)
read_arrow_file = partial(number_rows, file_batches)
read_arrow_stream = partial(number_rows, stream_batches)


def check_names(schema: pyarrow.Schema, source: DataFile) -> None:
    """Raise InputError if two columns have one name, of which a row could hold one."""
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise source.refused(f"has several columns called {', '.join(twice)}", "Rename them.")


class TailKeeper:
    """A file that remembers the last bytes that were read of it."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.last = (self.last + data[-len(END) :])[-len(END) :]
        return data

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """Do nothing: whoever opened the file closes it."""


def rows_of(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | InputError]:
    """Yield the rows of a batch of any size."""
    import pyarrow

    types = pyarrow.types
    is_strange = any(
        contains(kind, lambda kind: types.is_temporal(kind) or types.is_decimal(kind) or types.is_map(kind))
        for kind in batch.schema.types
    )
    with_json = [field for field in batch.schema if contains(field.type, is_json)]
    shaped = [*with_json, *(field for field in batch.schema if contains(field.type, has_structs))]
    at_once = max(1, min(ROWS, BATCH * batch.num_rows // max(1, batch.nbytes)))
    for start in range(0, batch.num_rows, at_once):
        part = batch.slice(start, at_once)
        suspect = bool(with_json) or any(map(holds_nul, part.columns))
        for data in part.to_pylist():
            try:
                if is_strange:
                    data = {name: plain(value) for name, value in data.items()}
                if shaped:
                    data |= {field.name: as_written(data[field.name], field.type) for field in shaped}
                if suspect:
                    check_values(data)
            except InputError as error:
                yield error
            else:
                yield data


def holds_nul(column: pyarrow.Array) -> bool:
    """Return whether a text within a column holds NUL."""
    import pyarrow
    import pyarrow.compute

    kind: Any = column.type
    pc: Any = pyarrow.compute  # whose functions are made at run time
    types = pyarrow.types
    if types.is_struct(kind):
        return any(map(holds_nul, column.flatten()))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return holds_nul(column.flatten())
    if types.is_dictionary(kind):
        return holds_nul(column.dictionary)
    texts = types.is_string(kind) or types.is_large_string(kind)
    return texts and bool(pc.any(pc.match_substring(column, "\0")).as_py())


def fields_in(kind: pyarrow.DataType) -> list[pyarrow.Field]:
    """Return the fields of a list or a struct. A map has none of its own."""
    import pyarrow

    return [] if pyarrow.types.is_map(kind) else [kind.field(i) for i in range(kind.num_fields)]


def contains(kind: pyarrow.DataType, test: Callable[[pyarrow.DataType], bool]) -> bool:
    """Return whether a type, or one within it, passes a test."""
    import pyarrow

    inner = [kind.value_type] if pyarrow.types.is_dictionary(kind) else [field.type for field in fields_in(kind)]
    return test(kind) or any(contains(other, test) for other in inner)


def is_json(kind: pyarrow.DataType) -> bool:
    """Return whether a type is that of JSON as text, in which `datasets` keeps objects of any form."""
    import pyarrow

    return isinstance(kind, pyarrow.JsonType)


def has_structs(kind: pyarrow.DataType) -> bool:
    """Return whether a type is a struct with structs within it, such as a call's function in a message."""
    import pyarrow

    is_struct = pyarrow.types.is_struct
    return is_struct(kind) and any(contains(field.type, is_struct) for field in fields_in(kind))


def as_written(value: Any, kind: pyarrow.DataType) -> Any:
    """Return a value as JSON Lines write it: JSON for its text, and structs without the fields that are null. All
    structs of a column have the same fields, and null stands in those that others have.

    Raises:
        InputError: what is to be JSON is none.
    """
    import pyarrow

    if is_json(kind) and isinstance(value, str):
        try:
            return DECODER.decode(value)
        except (ValueError, RecursionError) as error:
            problem = f"holds what is no JSON ({error})"
            raise InputError("a column of JSON", value[:60], problem, "Write JSON.") from error
    if isinstance(value, dict) and pyarrow.types.is_struct(kind):
        return {
            field.name: as_written(value[field.name], field.type)
            for field in fields_in(kind)
            if value.get(field.name) is not None
        }
    if isinstance(value, list) and not pyarrow.types.is_map(kind) and len(inner := fields_in(kind)) == 1:
        return [as_written(entry, inner[0].type) for entry in value]
    return value


def plain(value: Any) -> Any:
    """Return a value as JSON Lines write it: times in ISO 8601, durations in seconds, decimals as numbers, maps as
    objects."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        pairs = bool(value) and all(isinstance(entry, tuple) for entry in value)  # as Arrow hands over a map
        return {str(name): plain(inner) for name, inner in value} if pairs else [plain(inner) for inner in value]
    return value


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
        with source.naming_errors(place), expect_same_bytes([file], field, str(file)):
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
