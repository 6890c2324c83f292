"""The table of all runs, with its filters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from markupsafe import Markup

from align.core.errors import InputError, readable, require
from align.registry.index import Index
from align.registry.page.templating import render, view_url
from align.registry.query import found
from align.registry.record import Record
from align.registry.shown import clean, figure
from align.report.words import counted, is_interval

A_PAGE = 100
"""Runs of one page of the table."""
LIVE_S, IDLE_S = 10, 60
"""Seconds after which the table is looked at anew, while a run is at work and while none is."""
NEWEST = "-started"
STATUSES = ("running", "done", "failed", "interrupted", "unreadable")
CONDITION = re.compile(r"""\s*([^\s<>=!,'"]+)\s*(>=|<=|!=|>|<|=)\s*('[^']*'|"[^"]*"|[^\s,'"=][^,]*?)\s*(?:,|$)""")
SORTED: Mapping[str, str] = {
    "run": "run", "status": "status", "age": "started", "base": "base.id", "method": "method.name",
    "data": "data.name", "score": "score.value", "KL": "kl", "minutes": "cost.minutes",
}  # fmt: skip
"""Column → the key by which a click on its head sorts."""
FALLING = ("age", "score", "minutes")
"""Columns that are sorted from high to low at first."""
EXAMPLE = "Write conditions such as metrics.win_rate.low >= 0.7, seed = 0."


@dataclass(frozen=True, slots=True)
class Filters:
    """What the page was asked for.

    Attributes:
        text: part of a run's name.
        where: conditions as they are typed, see `conditions_in`.
        sort: a key, with `-` in front from high to low.
        page: 1, 2, 3, …
    """

    text: str = ""
    stage: str = ""
    status: str = ""
    where: str = ""
    sort: str = NEWEST
    page: int = 1

    @property
    def is_set(self) -> bool:
        return self != Filters()

    def url(self, **changes: Any) -> str:
        defaults = asdict(Filters())
        values = asdict(replace(self, **changes))
        return view_url("runs", **{key: value for key, value in values.items() if value != defaults[key]})


def conditions_in(typed: str) -> Iterator[tuple[str, str]]:
    """Yield (key, comparison) of conditions parted by commas, such as `score.value >= 0.7, seed = 0`.

    Raises:
        InputError: a part is no condition.
    """
    at = 0
    while typed[at:].strip():
        part = CONDITION.match(typed, at)
        require(part is not None, "where", typed[at:], "is no condition", EXAMPLE)
        assert part is not None
        value = part[3][1:-1] if part[3][0] in "'\"" else part[3]
        yield part[1], f"{part[2]}{value}"
        at = part.end()


def runs_view(index: Index, filters: Filters, now: datetime) -> Markup:
    """Return the table of runs, its filters, and how many runs there are of each status."""
    statuses = index.statuses()
    alerts = []
    if index.aliases_error:
        alerts.append(f"Aliases left out: {index.aliases_error}")
    if index.unnamed:
        alerts.append(f"{counted(len(index.unnamed), 'folder')} left out: no name in UTF-8.")
    listing = None
    try:
        listing = list_runs(index, filters)
    except InputError as error:
        alerts.append(describe_error(error))
    return render(
        "runs.html",
        filters=filters,
        every_s=LIVE_S if statuses.get("running") else IDLE_S,
        statuses=[("", "all", sum(statuses.values())), *((name, name, statuses.get(name, 0)) for name in STATUSES)],
        stages=index.stages(),
        alerts=alerts,
        listing=listing,
        now=now,
        score_parts=score_parts,
        minutes_in=minutes_in,
    )


def describe_error(error: InputError) -> str:
    value = readable(clean(str(error.value), longest=200))
    return f"{error.field}={value}: {error.problem.rstrip('.')}. {error.remedy}"


@dataclass(frozen=True, slots=True)
class Listing:
    """One page of the runs that meet the filters.

    Attributes:
        count: of all such runs.
        columns: name, address that sorts by it, and `ascending`, `descending` or empty.
    """

    records: Sequence[Record]
    count: int
    position: str
    columns: Sequence[tuple[str, str, str]]
    pages: int
    near_pages: Sequence[int]


def list_runs(index: Index, filters: Filters) -> Listing:
    """Raises InputError if a condition cannot be read."""
    where = list(conditions_in(filters.where))
    where += [(key, f"={value}") for key, value in (("stage", filters.stage), ("status", filters.status)) if value]
    if filters.text:
        where.append(("run", f"=*{filters.text}*"))
    first = A_PAGE * (filters.page - 1)
    records, count = found(index, where, [filters.sort], A_PAGE, offset=first)
    position = f"{first + 1:,} to {first + len(records):,} of" if records else "None is on this page, of"
    pages = -(-count // A_PAGE)
    near_pages = [page for page in range(1, pages + 1) if page in (1, pages) or abs(page - filters.page) <= 2]
    return Listing(records, count, f"{position} {counted(count, 'run')}", sort_columns(filters), pages, near_pages)


def sort_columns(filters: Filters) -> list[tuple[str, str, str]]:
    """Return the columns that a click sorts; see `Listing`."""
    key = filters.sort.removeprefix("-")
    falls = filters.sort.startswith("-")
    columns = []
    for name, sort_key in SORTED.items():
        is_sorted = key == sort_key
        falls_next = not falls if is_sorted else name in FALLING
        is_inverted = name == "age"  # the newest run is the youngest
        direction = ("descending" if falls != is_inverted else "ascending") if is_sorted else ""
        columns.append((name, filters.url(sort=f"{'-' if falls_next else ''}{sort_key}", page=1), direction))
    return columns


def minutes_in(record: Record) -> str:
    minutes = (record.get("cost") or {}).get("minutes")
    return "–" if minutes is None else f"{minutes:,.1f}"


def score_parts(record: Record) -> dict[str, Any] | None:
    """Return the name of a score, its value, its bounds, and where a share and its interval lie on 60 pixels."""
    score = record.get("score")
    if not score:
        return None
    value, _, bounds = figure(score if is_interval(score) else score["value"]).partition(" ")
    ends = {key: score.get(key) for key in ("value", "low", "high")}
    is_share = all(isinstance(end, int | float) and 0 <= end <= 1 for end in ends.values())
    return {
        "name": clean(score["name"]).replace("_", " "),
        "value": value,
        "bounds": bounds,
        "interval": {key: end * 60 for key, end in ends.items()} if is_share else None,
    }
