"""The view of aliases: what each means, and who changed it when and why."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from markupsafe import Markup

from align.core.errors import InputError
from align.registry.index import Index
from align.registry.page.templating import render
from align.registry.shown import clean
from align.run.alias_log import Change, read_log


def aliases_view(index: Index, alias: str) -> Markup:
    """Return all aliases, or one of them if it is named, with their changes, newest first."""
    try:
        log = read_log(index.root)
    except InputError as error:
        return render("aliases.html", alias=alias, alerts=[f"{error.problem}. {error.remedy}"], changes=None)
    lost = index.lost_changes(log)
    by_number = {change.seq: change for change in log.changes}
    return render(
        "aliases.html",
        alias=alias,
        alerts=[f"{lost.value} {lost.problem}. {lost.remedy}"] if lost else [],
        changes=[change for change in reversed(log.changes) if alias in ("", change.alias)],
        standing=[change for name, change in log.standing().items() if alias in ("", name)],
        previous=lambda change: by_number.get(change.replaces),
        arms_of=partial(describe_arms, index),
        gate_lines=describe_gates,
        minute=lambda time: time[:16].replace("T", " "),
    )


def describe_arms(index: Index, change: Change) -> list[dict[str, Any]]:
    """Return the artifacts of a change. They are found by digest: a run may have been renamed."""
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
    """Return a line for each gate: what it said when the change was made."""
    lines = []
    for gate in change.gates:
        passed = [bool(finding.get("passed")) for finding in gate.get("findings", ()) if isinstance(finding, Mapping)]
        lines.append(clean(f"{gate.get('gate')}: {sum(passed)} of {len(passed)} met", None))
    return lines
