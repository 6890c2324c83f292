"""CSV and TSV files: a header, and a row of as many cells for each record. Every value is a text, or null."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from align.data.formats.json_lines import pass_line
from align.data.formats.source import Source
from align.data.formats.values import DIVIDE, LONGEST, TOO_LONG
from align.errors import InputError

SEPARATORS = {".csv": (",", ";", "\t"), ".tsv": ("\t",)}
"""Ending → what may stand between two cells; the one that the header has most often outside of quotes."""
QUOTES = (
    'Write it with one row a record, and put a cell with a separator, a quote or a line\'s end in double quotes ("").'
)
NOT_UTF_8 = "not text in UTF-8"
IN_UTF_8 = "Save it as UTF-8, for example: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW."
QUOTED = re.compile(r'"[^"]*"')
WORDS = {"true": True, "false": False}
TURN = frozenset({"role", "from"})
"""One of these fields says who speaks in a turn."""


class Lines:
    """The lines of a file as text, and what is wrong with those that were read last."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.first, self.wrong = file, True, ""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self.file.readline(LONGEST + 1)
        if not raw:
            raise StopIteration
        if self.first:
            self.first, raw = False, raw.removeprefix(b"\xef\xbb\xbf")
        if len(raw) > LONGEST:
            pass_line(self.file, raw)
            self.wrong, raw = TOO_LONG, raw[:60] + b"\n"
        if b"\0" in raw:
            self.wrong = "it holds U+0000 (NUL), which is no character of a text"
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.wrong = f"{NOT_UTF_8} ({error})"
            return raw.decode("utf-8", "replace")


def read_table(source: Source, skip: int = 0) -> Iterator[tuple[int, dict[str, Any] | InputError | None]]:
    """See `align.data.formats.rows.Reader`. Rows are numbered from 1 behind the header; an empty cell is null.

    Raises:
        InputError: the header is empty, or names a column twice.
        CorruptFile: the file ends within a quoted cell.
    """
    csv.field_size_limit(LONGEST)
    row = 0
    with source.opened() as file:
        lines = Lines(file)
        first = next(lines, "")
        header = header_of(first, lines, source)
        cells = csv.reader(lines, delimiter=separator(first, source.plain_name), strict=True)
        while True:
            lines.wrong = ""
            try:
                found, problem = next(cells), lines.wrong
            except StopIteration:
                break
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    raise source.corrupt(f"ends within a quoted cell, after row {row}", QUOTES) from error
                found, problem = ["…"], lines.wrong or f"no row of a table ({error})"
            if not found:  # a blank line
                continue
            row += 1
            if row > skip:
                yield row, row_of(found, header, problem, source.where(row))
    yield row, None


def separator(header: str, name: str) -> str:
    """What stands between the cells."""
    known = next((signs for ending, signs in SEPARATORS.items() if name.endswith(ending)), SEPARATORS[".csv"])
    return max(known, key=QUOTED.sub("", header).count)


def header_of(first: str, lines: Lines, source: Source) -> list[str]:
    """The names of the columns."""
    try:
        header = next(csv.reader([first], delimiter=separator(first, source.plain_name), strict=True), [])
    except csv.Error as error:
        raise source.refused(f"has no header in its first line ({error})", QUOTES) from error
    if lines.wrong:
        remedy = IN_UTF_8 if lines.wrong.startswith(NOT_UTF_8) else "Write the columns' names there."
        raise source.refused(f"has no header in its first line: {lines.wrong}", remedy)
    if not all(name.strip() for name in header) or not header:
        problem = "has a column without a name" if header else "has no header in its first line"
        raise source.refused(problem, "Write the columns' names into the first line.")
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise source.refused(f"has several columns called {', '.join(twice)}", "Rename them in the first line.")
    return header


def row_of(cells: list[str], header: list[str], problem: str, where: str) -> dict[str, Any] | InputError:
    """A row by the names of its columns, or why it is none."""
    if problem:
        remedy = IN_UTF_8 if problem.startswith(NOT_UTF_8) else DIVIDE if problem == TOO_LONG else QUOTES
        return InputError(where, repr(cells[0][:60]), problem, remedy)
    if len(cells) != len(header):
        counts = f"{len(cells)} cell{'s' if len(cells) > 1 else ''}, and the header has {len(header)}"
        return InputError(where, repr(cells[0][:60]), f"it has another number of cells ({counts})", QUOTES)
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}


@dataclass(frozen=True, slots=True)
class Cells:
    """Columns of tables that hold something else than a text.

    Attributes:
        lists: a JSON array.
        messages: a text, or a JSON array of turns.
        numbers: a number, `true` or `false`.
    """

    lists: frozenset[str] = frozenset()
    messages: frozenset[str] = frozenset()
    numbers: frozenset[str] = frozenset()

    def typed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row with values in place of the texts that write them; a text that writes none stays."""
        return {name: self.value(name, text) if isinstance(text, str) else text for name, text in row.items()}

    def value(self, name: str, text: str) -> Any:
        """What a cell holds."""
        if name in self.numbers:
            value = WORDS.get(text.strip().lower())
            value = written(text) if value is None else value
            return value if isinstance(value, int | float) else text
        if not text.startswith("[") or not (name in self.lists or name in self.messages):
            return text
        value = written(text)
        kept = isinstance(value, list) and (name in self.lists or are_turns(value))
        return value if kept else text


def are_turns(values: list[Any]) -> bool:
    """Whether a list that stands where a text may stand is one of turns: an answer may be JSON itself."""
    return bool(values) and all(isinstance(one, dict) and not TURN.isdisjoint(one) for one in values)


def written(text: str) -> Any:
    """The JSON value that a text writes; None where it writes none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
