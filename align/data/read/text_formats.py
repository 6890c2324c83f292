"""JSON Lines, JSON arrays and tables: formats of text, as rows of Python's values, read in memory that does not grow.

A row may hold no key twice, no half character, no NUL, and nothing that is nested too deeply.
"""

from __future__ import annotations

import csv
import json
import re
from codecs import getincrementaldecoder
from collections.abc import Iterator, Mapping
from json import JSONDecodeError
from typing import Any, BinaryIO, NamedTuple

from align.core.errors import CorruptFile, InputError, half_character
from align.data.read.content import split_names
from align.data.read.files import DataFile

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
The errors name a field of the row; `align.data.read.rows` adds the file and the number."""


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
        if half := half_character(value):
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

    lists: frozenset[str]
    messages: frozenset[str]
    numbers: frozenset[str]

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
    lists=frozenset(
        split_names(
            "messages conversations conversation_a conversation_b history answers completions choices options documents"
        )
    ),
    messages=frozenset(("prompt", "completion", "response", "chosen", "rejected", "context")),
    numbers=frozenset(
        split_names(
            "helpfulness overall_preference preference_strength margin score_chosen score_rejected strength label "
            "weight train training chosen_ended rejected_ended deleted"
        )
    ),
)
