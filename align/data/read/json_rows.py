"""Rows of JSON Lines, and of one JSON array or an object that holds one.

The limits on rows and the check of their values hold for other formats too.
"""

from __future__ import annotations

import json
import re
from codecs import getincrementaldecoder
from collections.abc import Iterator
from json import JSONDecodeError
from typing import Any, BinaryIO

from align.core.errors import CorruptFile, InputError, find_lone_surrogate
from align.data.read.files import DataFile

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
CHUNK_BYTES = 2**18
"""Bytes read at a time."""
BLANK = re.compile(r"[ \t\r\n]*")
INVALID_UTF8 = re.compile("[\udc80-\udcff]")
"""Invalid UTF-8 bytes, as the error handler `surrogateescape` decodes them."""
REWRITE_HELP = "Write the file again, or write one object a line."


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
