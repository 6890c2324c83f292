"""JSON Lines: one object a line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from align.data.formats.source import Source
from align.data.formats.values import (
    DIVIDE,
    LONGEST,
    ONE,
    READ,
    TOO_DEEP,
    TOO_LONG,
    KeyTwice,
    check_row_of,
    key_twice,
)
from align.errors import InputError

BOM = "\ufeff"


def read_lines(source: Source, skip: int = 0) -> Iterator[tuple[int, dict[str, Any] | InputError | None]]:
    """See `align.data.formats.rows.Reader`. Rows are numbered by their lines; blank lines are left out."""
    line = 0
    with source.opened() as file:
        for line, raw in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), start=1):
            long = len(raw) > LONGEST and pass_line(file, raw)
            if line <= skip or not raw.strip():
                continue
            try:
                if long:
                    raise InputError(source.where(line), f"{raw[:60]!r}", TOO_LONG, DIVIDE)
                yield line, row_of(raw, source, line)
            except InputError as error:
                yield line, error
    yield line, None


def pass_line(file: BinaryIO, raw: bytes) -> bool:
    """Reads to the end of a line, and keeps nothing of it."""
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(2**20)
    return True


def row_of(raw: bytes, source: Source, line: int) -> dict[str, Any]:
    """One line as a row. Raises: InputError: it is none."""
    try:
        text = raw.decode()
        data = READ.decode(text if text[0] != BOM else text.lstrip(BOM))
    except (RecursionError, ValueError) as error:  # of which UnicodeDecodeError and JSONDecodeError are kinds
        raise told(error, raw, source.where(line)) from error
    if not isinstance(data, dict):
        raise not_an_object(data, f"{raw[:60]!r}", source.where(line))
    check_row_of(text, data, source.where(line))
    return data


def not_an_object(data: Any, shown: str, where: str) -> InputError:
    return InputError(where, shown, f"a {type(data).__name__}, not an object", ONE)


def told(error: Exception, raw: bytes, where: str) -> InputError:
    """What a line raised that is no JSON, as the error of its row."""
    if isinstance(error, KeyTwice):
        return key_twice(where, str(error))
    if isinstance(error, RecursionError):
        return InputError(where, f"{raw[:60]!r}", TOO_DEEP, ONE)
    displayed = raw[:60].decode("utf-8-sig", "replace").replace("\0", "␀").strip()
    why = "it holds NUL bytes" if b"\0" in raw else str(error)
    return InputError(where, displayed, f"not a line of JSON in UTF-8 ({why})", ONE)
