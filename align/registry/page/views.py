"""The views of the registry's page as HTML: the table of runs, one run, a comparison, and the aliases."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from markupsafe import Markup, escape

from align.core.errors import InputError, MissingArtifact, make_printable, require
from align.registry.comparison import compare
from align.registry.formatting import clean_text, format_cell, format_value, iter_leaves
from align.registry.index import Index, read_stamp
from align.registry.page.lineage import build_lineage, draw_lineage
from align.registry.page.templating import build_view_url, render, render_alert
from align.registry.query import find_runs
from align.registry.record import UNREADABLE, Record, describe_alteration
from align.registry.trace import Tracer, VoteReader
from align.report.figure_text import escape_unprintable, is_interval, pluralize
from align.report.live import build_page_blocks
from align.report.run_view import RunView
from align.run.alias_log import Change, read_alias_log
from align.run.manifest import FILE, Manifest, read_manifest
from align.run.stale import read_stale_mark

A_PAGE = 100
"""Runs on one page of the table."""
LIVE_S = 10
"""Seconds after which the table and a running run's report are reloaded while a run is active."""
IDLE_S = 60
"""Seconds after which the table is reloaded otherwise."""
NEWEST = "-started"
STATUSES = ("running", "done", "failed", "interrupted", "unreadable")
CONDITION = re.compile(r"""\s*([^\s<>=!,'"]+)\s*(>=|<=|!=|>|<|=)\s*('[^']*'|"[^"]*"|[^\s,'"=][^,]*?)\s*(?:,|$)""")
SORTED: Mapping[str, str] = {
    "run": "run",
    "status": "status",
    "age": "started",
    "base": "base.id",
    "method": "method.name",
    "data": "data.name",
    "score": "score.value",
    "KL": "kl",
    "minutes": "cost.minutes",
}
"""Column of the table → key of a run's record by which a click on the column's head sorts."""
FALLING = ("age", "score", "minutes")
"""Columns that are first sorted from high to low."""
EXAMPLE = "Write conditions such as metrics.win_rate.low >= 0.7, seed = 0."


@dataclass(frozen=True, slots=True)
class Filters:
    """The filters, the sort key and the page number of the table of runs.

    Attributes:
        text: part of a run's name.
        where: conditions as typed, see `parse_conditions`.
        sort: a key; a leading `-` sorts from high to low.
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
        """Return the address of the table with these filters, after replacing the given fields."""
        defaults = asdict(Filters())
        values = asdict(replace(self, **changes))
        return build_view_url("runs", **{key: value for key, value in values.items() if value != defaults[key]})


def parse_conditions(typed: str) -> Iterator[tuple[str, str]]:
    """Yield (key, comparison) for each condition in a comma-separated text, such as `score.value >= 0.7, seed = 0`.

    Raises:
        InputError: A part is not a condition.
    """
    start = 0
    while typed[start:].strip():
        part = CONDITION.match(typed, start)
        require(part is not None, "where", typed[start:], "is no condition", EXAMPLE)
        assert part is not None
        value = part[3][1:-1] if part[3][0] in "'\"" else part[3]
        yield part[1], f"{part[2]}{value}"
        start = part.end()


def render_runs(index: Index, filters: Filters, now: datetime) -> Markup:
    """Render the filtered table of runs as HTML, with the number of runs per status. Invalid filters are shown as an
    alert."""
    statuses = index.count_by_status()
    alerts = []
    if index.aliases_error:
        alerts.append(f"Aliases left out: {index.aliases_error}")
    if index.unnamed:
        alerts.append(f"{pluralize(len(index.unnamed), 'folder')} left out: no name in UTF-8.")
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
        stages=index.count_by_stage(),
        alerts=alerts,
        listing=listing,
        columns=list_sortable_columns(filters),
        now=now,
        score_parts=split_score,
    )


def describe_error(error: InputError) -> str:
    """Return an InputError as one line with its field, shortened value, problem and remedy."""
    value = make_printable(clean_text(str(error.value), longest=200))
    return f"{error.field}={value}: {error.problem.rstrip('.')}. {error.remedy}"


def list_runs(index: Index, filters: Filters) -> dict[str, Any]:
    """Return one page of the runs that match the filters, with its position and the nearby page numbers, as template
    values.

    Raises:
        InputError: A condition is invalid.
    """
    where = list(parse_conditions(filters.where))
    where += [(key, f"={value}") for key, value in (("stage", filters.stage), ("status", filters.status)) if value]
    if filters.text:
        where.append(("run", f"=*{filters.text}*"))
    first = A_PAGE * (filters.page - 1)
    records, count = find_runs(index, where, [filters.sort], A_PAGE, offset=first)
    position = f"{first + 1:,} to {first + len(records):,} of" if records else "None is on this page, of"
    pages = -(-count // A_PAGE)
    return {
        "records": records,
        "count": count,
        "position": f"{position} {pluralize(count, 'run')}",
        "pages": pages,
        "near_pages": [page for page in range(1, pages + 1) if page in (1, pages) or abs(page - filters.page) <= 2],
    }


class ColumnHead(NamedTuple):
    """The name, sort link and present order of a sortable column.

    Attributes:
        url: address of the table sorted by this column.
        direction: present order of the column: `ascending`, `descending` or "".
    """

    name: str
    url: str
    direction: str


def list_sortable_columns(filters: Filters) -> list[ColumnHead]:
    """Return a ColumnHead for each column of the table of runs that can be sorted, with the link that sorts by it."""
    key = filters.sort.removeprefix("-")
    falls = filters.sort.startswith("-")
    columns = []
    for name, sort_key in SORTED.items():
        is_sorted = key == sort_key
        falls_next = not falls if is_sorted else name in FALLING
        is_inverted = name == "age"  # the newest run is the youngest
        direction = ("descending" if falls != is_inverted else "ascending") if is_sorted else ""
        url = filters.url(sort=f"{'-' if falls_next else ''}{sort_key}", page=1)
        columns.append(ColumnHead(name, url, direction))
    return columns


def split_score(record: Record) -> dict[str, Any] | None:
    """Return the name, value and bounds of a run's score, for a template that draws scores between 0 and 1 as bars.

    A bar is 60 pixels wide.

    Returns None if the run has no score.
    """
    score = record.get("score")
    if not score:
        return None
    value, _, bounds = format_value(score if is_interval(score) else score["value"]).partition(" ")
    ends = {key: score.get(key) for key in ("value", "low", "high")}
    is_share = all(isinstance(end, int | float) and 0 <= end <= 1 for end in ends.values())
    return {
        "name": clean_text(score["name"]).replace("_", " "),
        "value": value,
        "bounds": bounds,
        "interval": {key: end * 60 for key, end in ends.items()} if is_share else None,
    }


log = logging.getLogger("align")

KEPT = 64
"""Number of drawn reports that are cached."""
READ = (FILE, "metrics.jsonl", "samples.jsonl", "trained_on.jsonl")
"""Files of a run whose size or time changes when its report has to be drawn again."""
BESIDE = re.compile(r'href="\.\./\.\./([a-z]+)/([^/"]+)/report\.html"')
"""Link of one report to another, relative to their folders."""


def render_run(index: Index, run: str, vote_reader: VoteReader, now: datetime) -> Markup:
    """Render one run as HTML: alerts, the picture of its lineage, the values of its record, and a placeholder for its
    report.

    Raises:
        MissingArtifact: There is no such run.
    """
    record = get_record(index, run)
    folder = index.root / record["folder"]
    alerts = []
    if stale := read_stale_mark(folder):
        command = f" Made again by: {stale.again}" if stale.again else ""
        alerts.append(f"Stale since {stale.since[:10]}: {stale.because}.{command}")
    if problem := describe_alteration(record):
        alerts.append(f"Altered: {problem}.")
    is_readable = record["status"] != UNREADABLE
    if not is_readable:
        alerts.append(str(record["error"]))
    stage, _, name = run.partition(":")
    values = {key: value for key, value in iter_leaves(record) if value not in (None, "", [])}
    return render(
        "run.html",
        record=record,
        running=record["status"] == "running",
        every_s=LIVE_S,
        now=now,
        minutes=(record.get("cost") or {}).get("minutes"),
        report_url=f"runs/{stage}/{quote(name, safe='')}/report.html" if (folder / "report.html").is_file() else "",
        alerts=alerts,
        lineage=draw_lineage(build_lineage(index, Tracer(index, vote_reader).run(run))) if is_readable else None,
        leaves=[(key, format_cell(value, longest=400)) for key, value in sorted(values.items())],
    )


def get_record(index: Index, run: str) -> Record:
    """Return the record of the run `stage:name` from the index, or raise MissingArtifact if there is no such run."""
    record = index.record(run)
    if record is None:
        raise MissingArtifact(
            "run", run, f"is no run under {index.root}", "The list of runs shows every run that exists."
        )
    return record


def render_report_blocks(root: Path, record: Record, command: Callable[[Manifest], str]) -> str:
    """Return the HTML blocks of a run's report, from a cache if its files are unchanged.

    Drawing takes about a second.

    It must not be called by two threads at once: matplotlib's settings belong to the process.

    Args:
        command: returns the command line that repeats a manifest's run.
    """
    folder = root / record["folder"]
    stamps = tuple(read_stamp(folder / name) for name in READ)
    return draw_report(folder, record["status"], record.get("error") or "", stamps, command)


@lru_cache(KEPT)
def draw_report(
    folder: Path, status: str, error: str, stamps: tuple[str, ...], command: Callable[[Manifest], str]
) -> str:
    """Draw a run's report and return its HTML blocks, with links to other reports turned into links to their views.

    Returns an alert instead if the report cannot be drawn.

    Args:
        status, error: those of the run.
        stamps: stamps of the files that it is drawn from, as a cache key.
        command: see `render_report_blocks`.
    """
    try:
        manifest = read_manifest(folder)
        view = RunView(folder, manifest, command(manifest))
        blocks = build_page_blocks(view, status, error)
    except Exception as problem:  # the folder was edited, or written by an early version of align
        log.debug("the report of %s could not be drawn", folder, exc_info=True)
        text = f"Its folder lacks content that a report of this version needs ({type(problem).__name__}: {problem})."
        return render_alert(f"{text} Its own report.html may have it.")
    return BESIDE.sub(link_to_view, "".join(blocks))


def link_to_view(link: re.Match[str]) -> str:
    """Return the `href` attribute of the view of a run, for a matched link to that run's `report.html`."""
    return f'href="{escape(build_view_url("run", run=f"{link[1]}:{unquote(link[2])}"))}"'


MOST = 60
"""Largest number of runs in one comparison; the command line has no limit."""


def render_comparison(index: Index, root: Path, runs: Sequence[str]) -> Markup:
    """Render a side-by-side comparison of runs as HTML: the table, scores against costs, and learning curves.

    Raises:
        InputError: There are too few or too many runs, or one is unknown or cannot be read.
    """
    from align.registry.comparison_page import build_page  # matplotlib takes a second

    runs = list(dict.fromkeys(runs))
    require(len(runs) > 1, "runs", runs, "are fewer than two", "Choose two or more in the list of runs.")
    remedy = "Choose fewer, or use stage.action=compare."
    require(len(runs) <= MOST, "runs", f"{len(runs)} runs", f"are more than {MOST}", remedy)
    report = build_page(compare(root, [get_record(index, run) for run in runs]), root)
    return render("compare.html", report=report, runs=runs)


def render_aliases(index: Index, alias: str) -> Markup:
    """Render the targets and all changes of one alias as HTML, newest first; of all aliases if `alias` is empty."""
    try:
        log = read_alias_log(index.root)
    except InputError as error:
        return render("aliases.html", alias=alias, alerts=[f"{error.problem}. {error.remedy}"], changes=None)
    lost = index.find_lost_changes(log)
    by_number = {change.seq: change for change in log.changes}
    return render(
        "aliases.html",
        alias=alias,
        alerts=[f"{lost.value} {lost.problem}. {lost.remedy}"] if lost else [],
        changes=[change for change in reversed(log.changes) if alias in ("", change.alias)],
        standing=[change for name, change in log.get_current_changes().items() if alias in ("", name)],
        previous=lambda change: by_number.get(change.replaces),
        arms_of=partial(list_arms, index),
        gate_lines=describe_gates,
        minute=lambda time: time[:16].replace("T", " "),
    )


def list_arms(index: Index, change: Change) -> list[dict[str, Any]]:
    """Return one mapping per target of an alias change, with its run, the run's record and its share of requests.

    Runs are found by digest, as they may have been renamed.
    """
    total = sum(arm.weight for arm in change.arms) or 1.0
    arms = []
    for arm in change.arms:
        run = index.maker(arm.digest, arm.ref)
        arms.append(
            {
                "ref": arm.ref,
                "digest": arm.digest,
                "run": run,
                "record": (index.record(run) or {}) if run else {},
                "share": f"{arm.weight / total:.0%}" if len(change.arms) > 1 else "",
            }
        )
    return arms


def describe_gates(change: Change) -> list[str]:
    """Return one line per gate that an alias change was checked by, such as `safety: 2 of 3 met`."""
    lines = []
    for gate in change.gates:
        passed = [bool(finding.get("passed")) for finding in gate.get("findings", ()) if isinstance(finding, Mapping)]
        lines.append(escape_unprintable(f"{gate.get('gate')}: {sum(passed)} of {len(passed)} met"))
    return lines
