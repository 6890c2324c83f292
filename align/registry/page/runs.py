"""The table of all runs, with its filters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from align.errors import InputError, readable, require
from align.registry.index import Index
from align.registry.page.markup import (
    HTML,
    address,
    alert,
    alias_links,
    interval_mark,
    link,
    run_link,
    status_mark,
    table,
)
from align.registry.query import found
from align.registry.record import Record
from align.registry.shown import age, base_of, clean, data_in, figure, kl_in, method_in, parents_in
from align.report.page import escape
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

    def address(self, **changes: Any) -> str:
        usual, given = asdict(Filters()), asdict(replace(self, **changes))
        return address("runs", **{key: value for key, value in given.items() if value != usual[key]})


def conditions_in(typed: str) -> Iterator[tuple[str, str]]:
    """(key, comparison) of conditions that are parted by commas, such as `score.value >= 0.7, seed = 0`.

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


def runs_view(index: Index, filters: Filters, now: datetime) -> HTML:
    """The table, its filters, and how many runs there are of each status."""
    statuses = index.statuses()
    every = f'<section data-every="{LIVE_S if statuses.get("running") else IDLE_S}">'
    parts = [every, "<h1>Runs</h1>", summary(filters, statuses), form(filters, index.stages())]
    if index.aliases_error:
        parts.append(alert(f"Aliases left out: {index.aliases_error}"))
    if index.unnamed:
        parts.append(alert(f"{counted(len(index.unnamed), 'folder')} left out: no name in UTF-8."))
    try:
        parts += listed(index, filters, now)
    except InputError as error:
        parts.append(alert(in_words(error)))
    return "".join([*parts, "</section>"])


def in_words(error: InputError) -> str:
    """An error for whoever looks at a page: what is wrong, and what to do."""
    value = readable(clean(str(error.value), longest=200))
    return f"{error.field}={value}: {error.problem.rstrip('.')}. {error.remedy}"


def summary(filters: Filters, statuses: Mapping[str, int]) -> HTML:
    """How many runs there are of each status, each a filter of its own."""
    every = [("", "all", sum(statuses.values())), *((name, name, statuses.get(name, 0)) for name in STATUSES)]
    cards = []
    for status, named, count in every:
        if count or not status:
            here = ' aria-current="true"' if filters.status == status else ""
            href = escape(filters.address(status=status, page=1))
            cards.append(f'<li><a href="{href}"{here}><b>{count:,}</b> {named}</a></li>')
    return f'<ul class="tally" aria-label="By status">{"".join(cards)}</ul>'


def form(filters: Filters, stages: Mapping[str, int]) -> HTML:
    choices = "".join(
        f'<option value="{escape(name)}"{" selected" if filters.stage == name else ""}>{escape(said)}</option>'
        for name, said in [("", "all stages"), *((name, f"{name} ({count:,})") for name, count in stages.items())]
    )
    kept = "".join(
        f'<input type="hidden" name="{name}" value="{escape(value)}">'
        for name, value in (("view", "runs"), ("status", filters.status), ("sort", filters.sort))
        if value
    )
    clear = link("Clear", address("runs"), class_="button") if filters != Filters() else ""
    return (
        f'<form class="filters" role="search" aria-label="Runs">{kept}'
        f'<label>Name<input name="text" type="search" value="{escape(filters.text)}"></label>'
        f'<label>Stage<select name="stage">{choices}</select></label>'
        f'<label class="long">Conditions<input name="where" value="{escape(filters.where)}" '
        f'placeholder="metrics.win_rate.low >= 0.7, seed = 0" spellcheck="false" autocapitalize="off"></label>'
        f'<button type="submit">Filter</button>{clear}</form>'
    )


def listed(index: Index, filters: Filters, now: datetime) -> Iterator[HTML]:
    """One page of the runs that meet the filters."""
    where = list(conditions_in(filters.where))
    where += [(key, f"={value}") for key, value in (("stage", filters.stage), ("status", filters.status)) if value]
    where += [("run", f"=*{filters.text}*")] if filters.text else []
    records, count = found(index, where, [filters.sort], A_PAGE, offset=A_PAGE * (filters.page - 1))
    if not count:
        yield f"<p>{'No run meets this.' if filters != Filters() else 'No runs yet.'}</p>"
        return
    first, pages = A_PAGE * (filters.page - 1), -(-count // A_PAGE)
    here = f"{first + 1:,} to {first + len(records):,} of" if records else "None is on this page, of"
    yield f'<p class="count">{here} {counted(count, "run")}</p>'
    yield table("Runs", heads(filters), (row(record, now) for record in records), naming=1, shape="runs")
    if pages > 1:
        near = [n for n in range(1, pages + 1) if n in (1, pages) or abs(n - filters.page) <= 2]
        steps = [
            f'<li><a href="{escape(filters.address(page=n))}"{" aria-current=page" if n == filters.page else ""}>'
            f"{n:,}</a></li>" for n in near
        ]  # fmt: skip
        yield f'<nav aria-label="Pages"><ul class="pages">{"".join(steps)}</ul></nav>'


def heads(filters: Filters) -> list[HTML]:
    """The heads of the columns, of which a click sorts."""
    key, falls = filters.sort.removeprefix("-"), filters.sort.startswith("-")
    found = ["<th scope=col><span class=unseen>Compare</span></th>"]
    for name, sorts in SORTED.items():
        here = key == sorts
        down = not falls if here else name in FALLING
        upside_down = name == "age"  # the newest run is the youngest
        said = "descending" if falls != upside_down else "ascending"
        marked = f' aria-sort="{said}"' if here else ""
        href = filters.address(sort=f"{'-' if down else ''}{sorts}", page=1)
        found.append(f'<th scope="col"{marked}>{link(name, href)}</th>')
    return [*found, "from"]


def row(record: Record, now: datetime) -> list[HTML]:
    run, error = record["run"], record.get("error")
    minutes = (record.get("cost") or {}).get("minutes")
    box = f'<input type="checkbox" name="chosen" value="{escape(run)}" aria-label="Compare {escape(clean(run))}">'
    why = f'<div class="why">{escape(clean(error, longest=200))}</div>' if error else ""
    aliases = alias_links(record.get("aliases", ()))
    return [
        box, f"{run_link(run)} {aliases}{why}", status_mark(record), escape(age(record, now)),
        escape(clean(base_of(record))), escape(clean(method_in(record))), escape(clean(data_in(record))),
        score(record), escape(kl_in(record)), "–" if minutes is None else f"{minutes:,.1f}", origins(record),
    ]  # fmt: skip


def score(record: Record) -> HTML:
    """Its name, its value, and where it lies with its interval."""
    found = record.get("score")
    if not found:
        return "–"
    value, _, bounds = figure(found if is_interval(found) else found["value"]).partition(" ")
    name = escape(clean(found["name"]).replace("_", " "))
    return (
        f'<span class="score"><span class="soft">{name}</span> <b>{escape(value)}</b> '
        f'<span class="soft">{escape(bounds)}</span> {interval_mark(record)}</span>'
    )


def origins(record: Mapping[str, Any]) -> HTML:
    """Links to the runs that it was made from, those that are gone as text."""
    gone: Sequence[str] = record.get("gone", ())
    if not record.get("parents"):
        return escape(parents_in(record))
    return ", ".join(
        f"{escape(clean(run))} (gone)" if run in gone else run_link(run) for run in record["parents"]
    )  # fmt: skip
