"""One run: its lineage, and its report as its folder has it now."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from urllib.parse import quote, unquote

from markupsafe import Markup, escape

from align.core.errors import MissingArtifact
from align.registry.index import Index
from align.registry.page.lineage import lineage_of, picture
from align.registry.page.templating import render, render_alert, view_url
from align.registry.record import UNREADABLE, Record, altered_in
from align.registry.shown import cell, leaves
from align.registry.trace import Tracer, Voters
from align.report.live import as_it_lies
from align.report.seen import Seen
from align.run.manifest import FILE, Manifest, read_manifest
from align.run.stale import stale_in

log = logging.getLogger("align")

LIVE_S = 10
"""Seconds after which the report of a run that is at work is looked at anew."""
KEPT = 64
"""Reports that are kept as they were drawn."""
READ = (FILE, "metrics.jsonl", "samples.jsonl", "trained_on.jsonl")
"""The files of a run that tell whether its report is another by now."""
BESIDE = re.compile(r'href="\.\./\.\./([a-z]+)/([^/"]+)/report\.html"')
"""A link of one report to another, from folder to folder."""


def run_view(index: Index, run: str, voters: Voters, now: datetime) -> Markup:
    """Return a run's figures, its lineage, and a place that its report is loaded into.

    Raises:
        MissingArtifact: there is no such run.
    """
    record = record_in(index, run)
    folder = index.root / record["folder"]
    alerts = []
    if stale := stale_in(folder):
        again = f" Made again by: {stale.again}" if stale.again else ""
        alerts.append(f"Stale since {stale.since[:10]}: {stale.because}.{again}")
    if problem := altered_in(record):
        alerts.append(f"Altered: {problem}.")
    is_readable = record["status"] != UNREADABLE
    if not is_readable:
        alerts.append(str(record["error"]))
    stage, _, name = run.partition(":")
    values = {key: value for key, value in leaves(record) if value not in (None, "", [])}
    return render(
        "run.html",
        record=record,
        running=record["status"] == "running",
        every_s=LIVE_S,
        now=now,
        minutes=(record.get("cost") or {}).get("minutes"),
        report_url=f"runs/{stage}/{quote(name, safe='')}/report.html" if (folder / "report.html").is_file() else "",
        alerts=alerts,
        lineage=picture(lineage_of(index, Tracer(index, voters).run(run))) if is_readable else None,
        leaves=[(key, cell(value, longest=400)) for key, value in sorted(values.items())],
    )


def record_in(index: Index, run: str) -> Record:
    record = index.record(run)
    if record is None:
        raise MissingArtifact("run", run, f"is no run under {index.root}", "The list of runs has those that are there.")
    return record


class Reports:
    """The reports of runs as their folders have them now. Between two looks at a run that has not changed, nothing is
    drawn: drawing takes about a second. One thread asks at a time: matplotlib's settings are the process's.

    Args:
        command: of a manifest, the line that makes the run again.
    """

    def __init__(self, root: Path, command: Callable[[Manifest], str]) -> None:
        self.root, self.command = root, command
        self._kept: OrderedDict[str, tuple[list[str], str]] = OrderedDict()

    def of(self, record: Record) -> str:
        """The blocks of one run's report."""
        run, folder = record["run"], self.root / record["folder"]
        stamps = [record["status"], *(stamp(folder / name) for name in READ)]
        before = self._kept.pop(run, None)
        if before is None or before[0] != stamps:
            before = stamps, self._drawn(folder, record)
        self._kept[run] = before
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return before[1]

    def _drawn(self, folder: Path, record: Record) -> str:
        try:
            manifest = read_manifest(folder)
            seen = Seen(folder, manifest, self.command(manifest))
            blocks = as_it_lies(seen, record["status"], record.get("error") or "")
        except Exception as error:  # a folder that somebody edited, or that an early version of align wrote
            log.debug("the report of %s could not be drawn", record["run"], exc_info=True)
            told = f"Its folder lacks what a report of this version shows ({type(error).__name__}: {error})."
            return render_alert(f"{told} Its own report.html may have it.")
        return BESIDE.sub(beside, "".join(blocks))


def beside(found: re.Match[str]) -> str:
    """What leads from one report to another leads to the view of that run."""
    return f'href="{escape(view_url("run", run=f"{found[1]}:{unquote(found[2])}"))}"'


def stamp(path: Path) -> str:
    """What tells whether a file has changed; empty where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_mtime_ns}-{found.st_size}-{found.st_ino}"
