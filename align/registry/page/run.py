"""One run: its lineage, and its report as its folder has it now."""

from __future__ import annotations

import logging
import re
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from urllib.parse import quote, unquote

from align.errors import MissingArtifact
from align.registry.index import Index
from align.registry.page.lineage import lineage_of, picture
from align.registry.page.markup import HTML, address, alert, alias_links, link, status_mark, table
from align.registry.record import UNREADABLE, Record, altered_in
from align.registry.shown import age, cell, clean, leaves
from align.registry.trace import Tracer, Voters
from align.report.live import as_it_lies
from align.report.page import escape
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


def run_view(index: Index, run: str, voters: Voters, now: datetime) -> HTML:
    """What tells the run, its lineage, and a place that its report is loaded into.

    Raises:
        MissingArtifact: there is no such run.
    """
    record = record_in(index, run)
    running = record["status"] == "running"
    parts = [f'<section data-every="{LIVE_S}">' if running else "<section>", heading(record, now, index.root)]
    if stale := stale_in(index.root / record["folder"]):
        again = f" Made again by: {stale.again}" if stale.again else ""
        parts.append(alert(f"Stale since {stale.since[:10]}: {stale.because}.{again}"))
    if problem := altered_in(record):
        parts.append(alert(f"Altered: {problem}."))
    if record["status"] == UNREADABLE:
        parts.append(alert(str(record["error"])))
    else:
        tree = Tracer(index, voters).run(run)
        parts.append(picture(lineage_of(index, tree)))
        every = f' data-every="{LIVE_S}"' if running else ""
        parts.append(f'<div class="blocks" data-src="{escape(address("report", run=run))}"{every}></div>')
        parts.append(everything(record))
    return "".join([*parts, "</section>"])


def record_in(index: Index, run: str) -> Record:
    record = index.record(run)
    if record is None:
        raise MissingArtifact("run", run, f"is no run under {index.root}", "The list of runs has those that are there.")
    return record


def heading(record: Record, now: datetime, root: Path) -> HTML:
    run, page = record["run"], root / record["folder"] / "report.html"
    minutes = (record.get("cost") or {}).get("minutes")
    told = [status_mark(record), f"{escape(age(record, now))} old" if record.get("started") else ""]
    told += [f"took {minutes:,.1f} min"] if minutes is not None else []
    stage, _, name = run.partition(":")
    href = f"runs/{stage}/{quote(name, safe='')}/report.html"
    file = link("report.html", href, target="_blank", rel="noopener") if page.is_file() else ""
    box = f'<label class="choice"><input type="checkbox" name="chosen" value="{escape(run)}"> compare</label>'
    return (
        f"<h1>{escape(clean(run, longest=None))} {alias_links(record.get('aliases', ()))}</h1>"
        f'<p class="told">{" · ".join(part for part in [*told, file, box] if part)}</p>'
    )


def everything(record: Record) -> HTML:
    """All that is known of it, folded."""
    found = {key: value for key, value in leaves(record) if value not in (None, "", [])}
    rows = [
        [escape(clean(key, longest=None)), f"<code>{escape(cell(value, longest=400))}</code>"]
        for key, value in sorted(found.items())
    ]
    return (
        "<details class=everything><summary>Settings, figures and all else that is known</summary>"
        f"{table('All that is known', ['key', 'value'], rows)}</details>"
    )


class Reports:
    """The reports of runs as their folders have them now. Between two looks at a run that has not changed, nothing is
    drawn: drawing takes about a second. One thread asks at a time: matplotlib's settings are the process's.

    Args:
        command: of a manifest, the line that makes the run again.
    """

    def __init__(self, root: Path, command: Callable[[Manifest], str]) -> None:
        self.root, self.command = root, command
        self._kept: OrderedDict[str, tuple[list[str], HTML]] = OrderedDict()

    def of(self, record: Record) -> HTML:
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

    def _drawn(self, folder: Path, record: Record) -> HTML:
        try:
            manifest = read_manifest(folder)
            seen = Seen(folder, manifest, self.command(manifest))
            blocks = as_it_lies(seen, record["status"], record.get("error") or "")
        except Exception as error:  # a folder that somebody edited, or that an early version of align wrote
            log.debug("the report of %s could not be drawn", record["run"], exc_info=True)
            told = f"Its folder lacks what a report of this version shows ({type(error).__name__}: {error})."
            return alert(f"{told} Its own report.html may have it.")
        return BESIDE.sub(beside, "".join(blocks))


def beside(found: re.Match[str]) -> str:
    """What leads from one report to another leads to the view of that run."""
    return f'href="{escape(address("run", run=f"{found[1]}:{unquote(found[2])}"))}"'


def stamp(path: Path) -> str:
    """What tells whether a file has changed; empty where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_mtime_ns}-{found.st_size}-{found.st_ino}"
