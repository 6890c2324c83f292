"""One JSON array of objects, or an object that holds one: read a value at a time, in memory that does not grow."""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Iterator
from json import JSONDecodeError
from typing import Any, BinaryIO

from align.data.formats.json_lines import not_an_object
from align.data.formats.source import Source
from align.data.formats.values import LONGEST, READ, READ_TWICE, TOO_DEEP, KeyTwice, check_row_of, key_twice
from align.errors import CorruptFile, InputError

CHUNK = 2**18
"""Bytes that are read at a time."""
BLANK = re.compile(r"[ \t\r\n]*")
NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""Bytes that are no text, as they are read."""
MEND = "Write the file again, or write one object a line."


class Text:
    """The text of a file, of which one value or sign after another is taken."""

    def __init__(self, file: BinaryIO, source: Source) -> None:
        self.file, self.source = file, source
        self.decode = getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self.text, self.at, self.ended = "", 0, False
        self.row, self.done = 0, 0

    def more(self) -> bool:
        """Reads on, and forgets what was taken. False at the end."""
        rest = self.text[self.at :]
        chunk = self.file.read(max(CHUNK, len(rest)))  # as much again: a long value is tried a few times, not often
        self.text, self.at, self.ended = rest + self.decode(chunk, not chunk), 0, not chunk
        return bool(chunk)

    def sign(self) -> str:
        """The next character that is no blank, which is not taken; nothing at the end."""
        while True:
            found = BLANK.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def take(self, *signs: str) -> str:
        """The next sign, one of these. Raises: CorruptFile: it is another, or the file ends."""
        found = self.sign()
        if found not in signs:
            raise self.broken(f"{found!r} stands where {' or '.join(map(repr, signs))} should")
        self.at += 1
        return found

    def value(self) -> tuple[Any, str]:
        """The next value and its text; in place of an object that has a key twice, what says so.

        Raises:
            InputError: it is too long or nested too deeply.
            CorruptFile: it is no JSON, or the file ends.
        """
        self.sign()
        while True:
            try:
                value, end = self.decoded()
                if end - self.at > LONGEST:
                    raise self.too_long("")
                if end + len("e+") < len(self.text) or self.ended:  # a number may go on
                    text, self.at = self.text[self.at : end], end
                    return value, text
            except JSONDecodeError as error:
                if self.ended:
                    self.at = max(self.at, error.pos)
                    raise self.broken(error.msg) from error
                if len(self.text) - self.at > LONGEST:
                    raise self.too_long(f", or no JSON ({error.msg})") from error
            self.more()

    def decoded(self) -> tuple[Any, int]:
        """The value that begins here, and where it ends."""
        try:
            return READ.raw_decode(self.text, self.at)
        except KeyTwice as error:
            return error, READ_TWICE.raw_decode(self.text, self.at)[1]
        except JSONDecodeError:
            raise
        except RecursionError as error:
            raise InputError(self.source.where(self.row), "[…]", TOO_DEEP, "Give it flat.") from error
        except ValueError as error:  # a number of thousands of digits
            raise self.broken(str(error)) from error

    def too_long(self, otherwise: str) -> InputError:
        """The error of a value that is not held in memory whole, or of what is none and has no end."""
        problem = f"a value of more than {LONGEST // 2**20} MiB{otherwise}"
        return InputError(self.source.where(self.row), self.text[self.at : self.at + 60], problem, MEND)

    def broken(self, problem: str) -> CorruptFile:
        """The error of a file that goes on otherwise than JSON does, or ends too early."""
        return self.source.corrupt(f"is no JSON after row {self.done}, or was cut there ({problem})", MEND)


def read_array(source: Source, skip: int = 0) -> Iterator[tuple[int, dict[str, Any] | InputError | None]]:
    """See `align.data.formats.rows.Reader`. Rows are numbered by their places in the array.

    Raises:
        InputError: an object holds several arrays of objects.
        CorruptFile: it is no JSON, or was cut. What stands behind that cannot be found.
    """
    with source.opened() as file:
        text = Text(file, source)
        yield from held(text, skip) if text.take("[", "{") == "{" else elements(text, skip)
        if text.sign():
            raise text.broken("more stands behind its end")
        yield text.row, None


def elements(text: Text, skip: int) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """The rows of an array whose `[` was taken."""
    if text.sign() == "]":
        text.take("]")
        return
    while True:
        text.row += 1
        value, written = text.value()
        text.done = text.row
        if text.row > skip:
            yield text.row, row_of(value, written, text.source.where(text.row))
        if text.take(",", "]") == "]":
            return


def held(text: Text, skip: int) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """The rows of the array of objects that an object holds, whose `{` was taken. Its other values are passed over."""
    found = ""
    while True:
        name, _ = text.value()
        text.take(":")
        if text.sign() != "[":
            text.value()
        else:
            text.take("[")
            if text.sign() == "{" and found:
                remedy = "Write each into a file of its own."
                raise text.source.refused(f"holds several lists of rows ({found}, {name})", remedy)
            if text.sign() == "{":
                found = name
                yield from elements(text, skip)
            else:
                pass_elements(text)
        if text.take(",", "}") == "}":
            return


def pass_elements(text: Text) -> None:
    """The same where nothing in it is a row."""
    while text.sign() != "]":
        text.value()
        if text.take(",", "]") == "]":
            return
    text.take("]")


def row_of(value: Any, written: str, where: str) -> dict[str, Any] | InputError:
    """A value of the array as a row, or why it is none."""
    if isinstance(value, KeyTwice):
        return key_twice(where, str(value))
    if NOT_UTF8.search(written):
        shown = written[:60].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return InputError(where, shown, "not text in UTF-8", "Write the file in UTF-8.")
    if not isinstance(value, dict):
        return not_an_object(value, written[:60], where)
    try:
        check_row_of(written, value, where)
    except InputError as error:
        return error
    return value
