"""Refused rows and rows without a record, counted for the metrics of the run that reads them.

`BadRows` collects the refused rows of a file and then raises or skips them (`data.on_bad_row`). `Drop` lists the
reasons why a valid row makes no record.
"""

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

ACTIVE_COUNTS: ContextVar[Counter[str] | None] = ContextVar("ACTIVE_COUNTS", default=None)
DETAILS = re.compile(r" \(.*\)$", re.DOTALL)
"""Trailing parenthesis of a problem, which differs from row to row."""
ROW_AND_COLUMN = re.compile(r", (row \d+)(?:, (?:.*\.)?(\w+))?")
"""Row, and column or message field, within the field of an error."""
MAX_LISTED_CAUSES = 6
"""Causes that a message lists."""
MAX_VALUE_CHARACTERS = 2000
"""Characters of a refused value that `BadRows.as_json` keeps."""


@contextmanager
def collect_drop_counts() -> Iterator[Counter[str]]:
    """Collect the counts that `count_dropped` adds inside the `with` block, as a Counter by metric key."""
    counts: Counter[str] = Counter()
    token = ACTIVE_COUNTS.set(counts)
    try:
        yield counts
    finally:
        ACTIVE_COUNTS.reset(token)


def count_dropped(key: str, count: int) -> None:
    """Add `count` to a metric key of the active `collect_drop_counts` block, if there is one. A count of 0 records that
    the filter ran."""
    if (counts := ACTIVE_COUNTS.get()) is not None:
        counts[key] += count


class Drop(Enum):
    """Reasons why a valid comparison, or a path of a message tree, makes no record."""

    IDENTICAL = "chosen and rejected are the same"
    TIE = "neither was preferred"
    UNPAIRED = "no other response to the prompt"
    UNANSWERED = "the path through the tree ends with a question"
    DELETED = "the message was deleted, with all that answers it"


class DoubtfulSourceError(InputError):
    """Error of a row that makes the other rows of its file doubtful, so that the file is refused even if bad rows are
    skipped."""


@dataclass(slots=True)
class RefusalCause:
    """A cause for which rows were refused: the error of the first such row, and the number of rows."""

    first: InputError
    count: int = 0

    def __str__(self) -> str:
        """Return the number of rows, the column, the problem and the first row as text, such as `16 × completion: the
        assistant's turn is empty (row 2)`."""
        match = ROW_AND_COLUMN.search(self.first.field)
        row, column = match.groups() if match else (self.first.field, None)
        problem = DETAILS.sub("", self.first.problem).partition(", ")[0]
        return f"{self.count} × {f'{column}: ' if column else ''}{problem} ({row})"


class BadRows:
    """A collector of the InputErrors of refused rows, which are caught one by one and reported together. `with
    bad_rows: …` catches the InputError of one row; `report_refused_rows` reports all of them.

    Args:
        skips: leave refused rows out. If False, their file is refused.
    """

    def __init__(self, skips: bool = False) -> None:
        self.skips = skips
        self._causes: dict[str, RefusalCause] = {}

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if isinstance(error, InputError):
            self.add(error)
        return isinstance(error, InputError)

    def add(self, error: InputError, count: int = 1) -> None:
        """Add `count` refused rows to the rows with the same cause, that is, the same column and problem.

        Args:
            error: the error of the row, or of the first of `count` rows.
        """
        match = ROW_AND_COLUMN.search(error.field)
        key = f"{match[2] if match else ''} {DETAILS.sub('', error.problem)}"
        self._causes.setdefault(key, RefusalCause(error)).count += count

    @property
    def count(self) -> int:
        """Number of rows refused since the last call of `report_refused_rows`."""
        return sum(cause.count for cause in self._causes.values())

    def as_json(self) -> list[dict[str, Any]]:
        """Return the causes of the rows refused since the last call of `report_refused_rows` as JSON objects, each with
        its row count."""
        return [
            {
                "field": cause.first.field,
                "value": str(cause.first.value)[:MAX_VALUE_CHARACTERS],
                "problem": cause.first.problem,
                "remedy": cause.first.remedy,
                "count": cause.count,
                "refuses_source": isinstance(cause.first, DoubtfulSourceError),
            }
            for cause in self._causes.values()
        ]

    def restore(self, causes: Iterable[Mapping[str, Any]]) -> None:
        """Add the refused rows that another process collected, given as the output of its `as_json`.

        Args:
            causes: output of `as_json`.
        """
        for cause in causes:
            error_type = DoubtfulSourceError if cause["refuses_source"] else InputError
            error = error_type(cause["field"], cause["value"], cause["problem"], cause["remedy"])
            self.add(error, cause["count"])

    def report_refused_rows(self, path: str | Path, kept_count: int) -> None:
        """Raise InputError for the rows refused so far, or print one line if they may be skipped, and reset the counts.
        Does nothing if no row was refused.

        Args:
            path: the file, for messages.
            kept_count: number of usable results of the other rows. If it is 0, refused rows are not skipped.

        Raises:
            InputError: the first refused row's error; its remedy says how many more rows are refused.
        """
        causes = list(self._causes.values())
        count = self.count
        self._causes = {}
        if not causes:
            return
        source_error = next((cause.first for cause in causes if isinstance(cause.first, DoubtfulSourceError)), None)
        can_skip = kept_count and source_error is None
        other_count = sum(cause.count for cause in causes[MAX_LISTED_CAUSES:])
        summary = "; ".join(
            [*map(str, causes[:MAX_LISTED_CAUSES]), *([f"{other_count} × other causes"] if other_count else [])]
        )
        if self.skips and can_skip:
            count_dropped("skipped_rows", count)
            print(f"left out {format_row_count(count)} of {path}: {summary}")
            return
        error = source_error or causes[0].first
        remedy = error.remedy
        if count > 1:
            remedy += f" {format_row_count(count - 1)} more {'is' if count == 2 else 'are'} refused. Of all: {summary}."
        if can_skip:
            remedy += " To leave such rows out: data.on_bad_row=skip."
        raise InputError(error.field, error.value, error.problem, remedy) from error


def format_row_count(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"
