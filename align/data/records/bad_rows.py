"""Rows that are refused: all those of a file are told at once, or left out and counted (`data.on_bad_row`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from align.data.formats.rows import Row
from align.data.tally import tally
from align.errors import InputError

DETAILS = re.compile(r" \(.*\)$", re.DOTALL)
"""Of a problem: what differs from row to row."""
ROW = re.compile(r", (row \d+)(?:, (?:.*\.)?(\w+))?")
"""In the field of an error: the row, and the column or the field of a message."""
MOST_NAMED = 6
MOST_SHOWN = 2000
"""Characters of a refused value that are handed over."""


class RefusedSource(InputError):
    """The error of a row that makes the other rows of its file doubtful, so that it cannot be left out alone."""


@dataclass(slots=True)
class Cause:
    """Rows that are refused for one cause: the error of the first, and how many there are."""

    first: InputError
    count: int = 0

    def __str__(self) -> str:
        """`16 × completion: the assistant's turn is empty (row 2)`, the first of them."""
        found = ROW.search(self.first.field)
        row, column = found.groups() if found else (self.first.field, None)
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
        """A row begins."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        if isinstance(error, InputError):
            self.take(error)
        return isinstance(error, InputError)

    def take(self, error: InputError, count: int = 1) -> None:
        """A row is refused; or `count` rows, of which this is the first."""
        column = ROW.search(error.field)
        cause = f"{column[2] if column else ''} {DETAILS.sub('', error.problem)}"
        self._causes.setdefault(cause, Cause(error)).count += count

    @property
    def count(self) -> int:
        """Rows that were refused since the last file ended."""
        return sum(cause.count for cause in self._causes.values())

    def as_json(self) -> list[dict[str, Any]]:
        """What was refused since the last file ended, by cause."""
        return [
            {"field": first.field, "value": str(first.value)[:MOST_SHOWN], "problem": first.problem,
             "remedy": first.remedy, "count": cause.count, "refuses_source": isinstance(first, RefusedSource)}
            for cause in self._causes.values() for first in [cause.first]
        ]  # fmt: skip

    def handed_over(self) -> list[dict[str, Any]]:
        """The same, for whoever counts it from here on (`restore`)."""
        found, self._causes = self.as_json(), {}
        return found

    def restore(self, causes: Iterable[Mapping[str, Any]]) -> None:
        """Count what was refused elsewhere, see `as_json`."""
        for cause in causes:
            kind = RefusedSource if cause["refuses_source"] else InputError
            error = kind(cause["field"], cause["value"], cause["problem"], cause["remedy"])
            self.take(error, cause["count"])

    def good(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Those of a data set that are rows, see `align.data.formats.rows.placed_rows`."""
        for row in rows:
            if row.error is not None:
                self.take(row.error)
            else:
                yield row

    def settle(self, path: str | Path, kept: int) -> None:
        """End a file: its refused rows are counted and named in a line, or raised.

        Args:
            kept: what its other rows gave; where they gave nothing, there is nothing to go on with.

        Raises:
            InputError: the first of them, with how many more there are.
        """
        causes, self._causes = list(self._causes.values()), {}
        if not causes:
            return
        count = sum(cause.count for cause in causes)
        whole = next((cause.first for cause in causes if isinstance(cause.first, RefusedSource)), None)
        first = whole or causes[0].first
        if self.skips and kept and whole is None:
            tally("skipped_rows", count)
            print(f"left out {rows(count)} of {path}: {named(causes)}")
            return
        more = f" {rows(count - 1)} more {'is' if count == 2 else 'are'} refused. Of all: {named(causes)}."
        can_skip = kept and not self.skips and whole is None
        leave = " To leave such rows out: data.on_bad_row=skip." if can_skip else ""
        raise InputError(
            first.field, first.value, first.problem, f"{first.remedy}{more if count > 1 else ''}{leave}"
        ) from first


def rows(count: int) -> str:
    return f"{count} row{'' if count == 1 else 's'}"


def named(causes: list[Cause]) -> str:
    """Counts, causes and where each is met first."""
    told = [str(cause) for cause in causes[:MOST_NAMED]]
    others = sum(cause.count for cause in causes[MOST_NAMED:])
    return "; ".join([*told, *([f"{others} × other causes"] if others else [])])
