"""JSON Lines files, read a row at a time, with errors that name the row."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any

from align.errors import CorruptFile, InputError, half_character

DEEPEST = 64
"""Lists and objects within one another: what reads a row walks them by recursion."""
HALF = re.compile(rb"\\u[dD][89a-fA-F]")
"""What a file in UTF-8 writes half a character with; half of those that it finds have their other half."""
ONE = "Write one JSON object a line."
LONGEST = 32 * 2**20
"""Bytes of a line; reading one takes up to some twenty times that."""
UNPACK = "Unpack it, or save it as text in UTF-8, and name the JSON Lines file that comes of it."
TABS = ", sep='\\t'"
FORMATS = {
    b"PAR1": ("a Parquet file", "parquet"), b"ARROW1": ("an Arrow file", "arrow"), b"PK": ("a zip archive", ""),
    b"SQLite format 3": ("a database", ""), b"(\xb5/\xfd": ("packed by zstd", ""),
    b"\xff\xfe": ("text in UTF-16", ""), b"\xfe\xff": ("text in UTF-16", ""),
    b"\x1f\x8b": ("packed by gzip, and its name does not end in .gz", ""),
}  # fmt: skip
"""What a file of another kind begins with: what it is, and what `datasets` calls it."""
TABLES = (".csv", ".tsv")
TOO_DEEP = "it is nested too deeply to be read"


def json_rows(path: Path, field: str = "data.path") -> Iterator[tuple[int, dict[str, Any]]]:
    """(line from 1, object) of each line of a JSON Lines file, plain or `.gz`; blank lines are left out but counted.

    Args:
        field: what the user calls the file.

    Raises:
        InputError: no such file, or a line that is not a JSON object of whole characters in UTF-8: names file, row and,
            where only a field of it is wrong, that.
        CorruptFile: a `.gz` that cannot be unpacked.
    """
    for line, row in json_lines(path, field):
        if isinstance(row, InputError):
            raise row
        yield line, row


def json_lines(path: Path, field: str = "data.path") -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """The same, with the error of a line that is no row in its place, where the lines behind it can still be read."""
    line = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line, raw in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), start=1):
                if not raw.strip():
                    continue
                if line == 1:
                    check_format(path, raw, field)
                if len(raw) > LONGEST:
                    problem = f"a line of more than {LONGEST // 2**20} MiB"
                    where = f"{path}, row {line}"
                    raise InputError(where, f"{raw[:60]!r}", problem, "Leave it out, or divide it into several rows.")
                try:
                    yield line, row_of(raw, f"{path}, row {line}")
                except InputError as error:
                    yield line, error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        problem = f"cannot be unpacked after row {line} ({error})"
        raise CorruptFile(field, str(path), problem, "Fetch or write the file again.") from error
    except OSError as error:
        remedy = "Check the path: a JSON Lines file, plain or .gz."
        raise InputError(field, str(path), f"cannot be read ({error.strerror})", remedy) from error


def row_of(raw: bytes, where: str) -> dict[str, Any]:
    """One line as a row. Raises: InputError: it is none."""
    try:
        data = json.loads(raw.decode("utf-8-sig"))
    except RecursionError as error:
        raise InputError(where, f"{raw[:60]!r}", TOO_DEEP, ONE) from error
    except ValueError as error:  # of which UnicodeDecodeError and JSONDecodeError are kinds
        displayed = raw[:60].decode("utf-8-sig", "replace").strip()
        raise InputError(where, displayed, f"not a line of JSON in UTF-8 ({error})", ONE) from error
    if not isinstance(data, dict):
        raise InputError(where, f"{raw[:60]!r}", f"a {type(data).__name__}, not an object", ONE)
    if HALF.search(raw) or raw.count(b"[") + raw.count(b"{") > DEEPEST:
        check_values(data, where)
    return data


def check_format(path: Path, beginning: bytes, field: str) -> None:
    """Raises: InputError: a file begins as one of another kind does."""
    text = beginning.lstrip(b"\xef\xbb\xbf \t\r\n")
    found = next((kind for mark, kind in FORMATS.items() if beginning.startswith(mark)), None)
    if path.suffix.lower() in TABLES and not text.startswith(b"{"):
        found = ("a table of comma- or tab-separated values", "csv")
    if text.startswith(b"["):
        remedy = f"Write one object a line: jq -c '.[]' {quote(str(path))} > rows.jsonl."
        raise InputError(field, str(path), "is one JSON array, and JSON Lines are read", remedy)
    if found is not None:
        what, kind = found
        call = f"datasets.load_dataset({kind!r}, data_files={str(path)!r}{TABS if path.suffix == '.tsv' else ''})"
        remedy = f"Convert it: {call}['train'].to_json('rows.jsonl')." if kind else UNPACK
        raise InputError(field, str(path), f"is {what}, and JSON Lines are read", remedy)


def check_values(value: Any, where: str, field: str = "", depth: int = 0) -> None:
    """Raises where a value of a row, or a value within one, is nested too deeply or holds half a character."""
    named = f"{where}, {field}" if field else where
    if isinstance(value, str) and (half := half_character(value)):
        raise InputError(named, value[:60], f"it holds {half}, half a character", "Take it out.")
    if depth > DEEPEST:
        raise InputError(named.partition("[")[0], "[…]", TOO_DEEP, "Give it flat.")
    if isinstance(value, dict):
        for key, inner in value.items():
            check_values(key, named, "a key")
            check_values(inner, where, f"{field}.{key}" if field else key, depth + 1)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            check_values(inner, where, f"{field}[{i}]", depth + 1)
