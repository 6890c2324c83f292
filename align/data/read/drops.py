"""What reading leaves out of a data set: rows that are refused, all told at once or counted (`data.on_bad_row`); rows
that make no record; and the counts of both, for the metrics of the run that reads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any

from align.core.errors import InputError

COUNTS: ContextVar[Counter[str] | None] = ContextVar("COUNTS", default=None)
DETAILS = re.compile(r" \(.*\)$", re.DOTALL)
"""Of a problem: what differs from row to row."""
ROW = re.compile(r", (row \d+)(?:, (?:.*\.)?(\w+))?")
"""In the field of an error: the row, and the column or the field of a message."""
MOST_NAMED = 6
MOST_SHOWN = 2000
"""Characters of a refused value that are handed over."""


@contextmanager
def tallied() -> Iterator[Counter[str]]:
    """Collect what `tally` counts inside the block, by the key of a metric."""
    counts: Counter[str] = Counter()
    token = COUNTS.set(counts)
    try:
        yield counts
    finally:
        COUNTS.reset(token)


def tally(key: str, count: int) -> None:
    """Add to the count of the active `tallied` block. A count of 0 records that the filter ran."""
    if (counts := COUNTS.get()) is not None:
        counts[key] += count


class Drop(Enum):
    """Why one judgement, or one path of a tree, makes no record, though nothing is wrong with it."""

    IDENTICAL = "chosen and rejected are the same"
    TIE = "neither was preferred"
    UNPAIRED = "no other response to the prompt"
    UNANSWERED = "the path through the tree ends with a question"
    DELETED = "the message was deleted, with all that answers it"


class RefusedSource(InputError):
    """The error of a row that makes the other rows of its file doubtful, so that it cannot be left out alone."""


@dataclass(slots=True)
class Cause:
    """Rows that are refused for one cause: the error of the first, and how many there are."""

    first: InputError
    count: int = 0

    def __str__(self) -> str:
        """`16 × completion: the assistant's turn is empty (row 2)`, the first of them."""
        match = ROW.search(self.first.field)
        row, column = match.groups() if match else (self.first.field, None)
        problem = DETAILS.sub("", self.first.problem).partition(", ")[0]
        return f"{self.count} × {f'{column}: ' if column else ''}{problem} ({row})"


class BadRows:
    """The rows of one file that are refused. `with bad_rows: …` takes the error of one row, `settle` ends the file.

    Args:
        skips: they are left out. Without, their file is refused.
    """

    def __init__(self, skips: bool = False) -> None:
        self.skips = skips
        self._causes: dict[str, Cause] = {}

    def __enter__(self) -> None:
        """Begin a row."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        if isinstance(error, InputError):
            self.take(error)
        return isinstance(error, InputError)

    def take(self, error: InputError, count: int = 1) -> None:
        """Count a row that is refused; or `count` rows, of which this is the first."""
        column = ROW.search(error.field)
        cause = f"{column[2] if column else ''} {DETAILS.sub('', error.problem)}"
        self._causes.setdefault(cause, Cause(error)).count += count

    @property
    def count(self) -> int:
        """Rows that were refused since the last file ended."""
        return sum(cause.count for cause in self._causes.values())

    def as_json(self) -> list[dict[str, Any]]:
        """Return what was refused since the last file ended, by cause."""
        return [
            {
                "field": cause.first.field,
                "value": str(cause.first.value)[:MOST_SHOWN],
                "problem": cause.first.problem,
                "remedy": cause.first.remedy,
                "count": cause.count,
                "refuses_source": isinstance(cause.first, RefusedSource),
            }
            for cause in self._causes.values()
        ]

    def restore(self, causes: Iterable[Mapping[str, Any]]) -> None:
        """Count what was refused elsewhere, see `as_json`."""
        for cause in causes:
            kind = RefusedSource if cause["refuses_source"] else InputError
            error = kind(cause["field"], cause["value"], cause["problem"], cause["remedy"])
            self.take(error, cause["count"])

    def settle(self, path: str | Path, kept: int) -> None:
        """End a file: its refused rows are counted and named in a line, or raised.

        Args:
            kept: what its other rows gave; if they gave nothing, there is nothing to go on with.

        Raises:
            InputError: the first of them, with how many more there are.
        """
        causes = list(self._causes.values())
        count = self.count
        self._causes = {}
        if not causes:
            return
        whole = next((cause.first for cause in causes if isinstance(cause.first, RefusedSource)), None)
        can_skip = kept and whole is None
        others = sum(cause.count for cause in causes[MOST_NAMED:])
        named = "; ".join([*map(str, causes[:MOST_NAMED]), *([f"{others} × other causes"] if others else [])])
        if self.skips and can_skip:
            tally("skipped_rows", count)
            print(f"left out {count_rows(count)} of {path}: {named}")
            return
        first = whole or causes[0].first
        remedy = first.remedy
        if count > 1:
            remedy += f" {count_rows(count - 1)} more {'is' if count == 2 else 'are'} refused. Of all: {named}."
        if can_skip:
            remedy += " To leave such rows out: data.on_bad_row=skip."
        raise InputError(first.field, first.value, first.problem, remedy) from first


def count_rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"
