"""Rows of tables: CSV and TSV, and the types of their cells."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from align.core.errors import InputError
from align.data.read.content import split_names
from align.data.read.files import DataFile
from align.data.read.json_rows import DIVIDE_HELP, MAX_ROW_BYTES, NUL_PROBLEM, TOO_LONG, NumberedRows, skip_line

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
        "helpfulness overall_preference preference_strength margin posterior score_chosen score_rejected strength "
        "label weight train training chosen_ended rejected_ended deleted"
    ),
)
