"""Which format a file has: by what it begins with, and by its name where that does not tell."""

from __future__ import annotations

import csv
import json
import re
from shlex import quote
from typing import TYPE_CHECKING

from align.data.formats.arrow import read_arrow_file, read_arrow_stream, read_parquet
from align.data.formats.json_array import read_array
from align.data.formats.json_lines import BOM, read_lines
from align.data.formats.source import Source
from align.data.formats.tables import read_table, separator

if TYPE_CHECKING:
    from align.data.formats.rows import Reader

BINARY = {b"PAR1": read_parquet, b"ARROW1": read_arrow_file, b"\xff\xff\xff\xff": read_arrow_stream}
NAMED = {".parquet": "Parquet", ".arrow": "Arrow", ".feather": "Arrow"}
LINES = (".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")
UNPACK = "Unpack it, and name a file of it that holds rows."
UTF_16 = "Write it in UTF-8: iconv -f UTF-16 -t UTF-8 {} > rows.txt."
NOT_READ = {
    b"PK\x03\x04": ("a zip archive", UNPACK), b"PK\x05\x06": ("a zip archive", UNPACK),
    b"7z\xbc\xaf": ("a 7z archive", UNPACK),
    b"SQLite format 3": ("a database", "Write the rows as JSON Lines or Parquet."),
    b"\xff\xfe": ("text in UTF-16", UTF_16), b"\xfe\xff": ("text in UTF-16", UTF_16),
}  # fmt: skip
"""What a file begins with that is not read: what it is, and what to do."""
OF_A_ROW = {
    "messages", "conversations", "conversation_a", "conversation_b", "prompt", "completion", "chosen", "rejected",
    "answers", "context", "history",
    "replies", "tools", "functions", "tool_calls", "images", "audio", "expected",
}  # fmt: skip
"""Columns of one row that hold a list of objects: an object with such a list is a row, and none that holds rows."""
NAME = re.compile(r"[^\W\d][\w .-]{0,63}")
"""What a column is called, in the header of a table whose name does not say that it is one."""


def reader_of(source: Source) -> Reader:
    """What reads a file.

    Raises:
        InputError: it has a format that is not read.
        CorruptFile: its name says Parquet or Arrow, and it is not.
    """
    head, name = source.head(), source.plain_name
    if binary := next((read for mark, read in BINARY.items() if head.startswith(mark)), None):
        return binary
    for mark, (what, remedy) in NOT_READ.items():
        if head.startswith(mark):
            raise source.refused(f"is {what}, which is not read", remedy.format(quote(str(source.path))))
    if said := next((what for ending, what in NAMED.items() if name.endswith(ending)), ""):
        raise source.corrupt(f"is no {said} file, as its name says: it was cut, or is another file")
    text = head.decode("utf-8", "replace").lstrip(BOM)
    begun = text.lstrip()
    if not begun and name.endswith(".json"):
        raise source.corrupt("is empty, which JSON is not")
    if begun.startswith("["):
        return read_array
    if begun.startswith("{"):
        return read_array if not name.endswith(LINES) and holds_rows(begun) else read_lines
    return read_table if name.endswith(TABLES) or has_header(text, name) else read_lines


def holds_rows(text: str) -> bool:
    """Whether a text begins with an object that holds an array of objects, and with no row."""
    first, end, behind = text.partition("\n")
    if end and behind.strip() and is_json(first):  # an object a line
        return False
    decoder, at = json.JSONDecoder(), 1
    try:
        while True:
            name, at = decoder.raw_decode(text, blank(text, at))
            at = blank(text, at) + 1  # the colon
            if re.compile(r"\s*\[\s*\{").match(text, at):
                return name not in OF_A_ROW
            _, at = decoder.raw_decode(text, blank(text, at))
            at = blank(text, at) + 1  # the comma
    except (ValueError, RecursionError):  # it ends, or is no such object
        return False


def blank(text: str, at: int) -> int:
    """Where the next sign stands."""
    return len(text) - len(text[at:].lstrip())


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def has_header(text: str, name: str) -> bool:
    """Whether a text begins with two lines of as many cells, of which the first are names."""
    sign = separator(text.partition("\n")[0], name)
    try:
        table = csv.reader(text.splitlines(keepends=True), delimiter=sign, strict=True)
        header, first = next(table), next(table)
    except (csv.Error, StopIteration):
        return False
    names = all(NAME.fullmatch(column) for column in header)
    return names and len(header) == len(set(header)) == len(first) > 1
