"""What each alias means, and who changed it when and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from align.errors import InputError
from align.registry.index import Index
from align.registry.page.markup import HTML, address, alert, link, run_link, stale_mark, table
from align.registry.shown import clean
from align.report.page import escape
from align.run.alias_log import AliasLog, Change, Meant, read_log


def aliases_view(index: Index, alias: str) -> HTML:
    """All aliases, or one of them, with their changes, the newest first."""
    parts = ["<section>", f"<h1>{escape(f'@{alias}') if alias else 'Aliases'}</h1>"]
    try:
        log = read_log(index.root)
    except InputError as error:
        return "".join([*parts, alert(f"{error.problem}. {error.remedy}"), "</section>"])
    if lost := index.lost_changes(log):
        parts.append(alert(f"{lost.value} {lost.problem}. {lost.remedy}"))
    if alias:
        parts.append(f'<p class="told">{link("all aliases", address("aliases"))}</p>')
    changes = [change for change in reversed(log.changes) if alias in ("", change.alias)]
    if not changes:
        parts.append(f"<p>{'No such alias.' if alias else 'No aliases yet. stage.action=promote makes one.'}</p>")
        return "".join([*parts, "</section>"])
    standing = [change for name, change in log.standing().items() if alias in ("", name)]
    parts.append("<h2>Now</h2>")
    if standing:
        rows = [[named(change), arms(index, change.arms), when(change), *reason(change)] for change in standing]
        parts.append(table("What aliases mean now", ["alias", "means", "since", "who", "why"], rows))
    else:
        parts.append("<p>Nothing: it is retired.</p>" if alias else "<p>No alias means anything.</p>")
    rows = [[str(change.seq), when(change), named(change), *moved(index, log, change), *reason(change), gates(change)]
            for change in changes]  # fmt: skip
    heads = ["change", "when", "alias", "from", "to", "who", "why", "gates"]
    parts += ["<h2>History</h2>", table("History", heads, rows)]
    return "".join([*parts, "</section>"])


def named(change: Change) -> HTML:
    return link(f"@{change.alias}", address("aliases", alias=change.alias), class_="alias")


def when(change: Change) -> HTML:
    return escape(change.at[:16].replace("T", " "))


def reason(change: Change) -> list[HTML]:
    over = f'<div class="why">overridden: {escape(clean(change.override, None))}</div>' if change.override else ""
    return [escape(clean(change.who, None)), f"{escape(clean(change.why, None))}{over}"]


def moved(index: Index, log: AliasLog, change: Change) -> list[HTML]:
    """From what to what."""
    before = next((one for one in log.changes if one.seq == change.replaces), None)
    return [arms(index, before.arms) if before else "–", arms(index, change.arms)]


def arms(index: Index, meant: Sequence[Meant]) -> HTML:
    """The artifacts, by their weights where there are several. They are known by digests: a run may be renamed."""
    total = sum(arm.weight for arm in meant) or 1.0
    shown = []
    for arm in meant:
        made = index.maker(arm.digest, arm.ref)
        share = f" {arm.weight / total:.0%}" if len(meant) > 1 else ""
        run = run_link(made) if made else f"{escape(clean(arm.ref, None))} (gone)"
        run += stale_mark(index.record(made) or {}) if made else ""
        shown.append(f'{run}{share} <code title="{escape(arm.digest)}">{escape(arm.digest[:8])}</code>')
    return "<br>".join(shown) or "nothing"


def gates(change: Change) -> HTML:
    """What each gate said then, as the log has it."""
    said = []
    for gate in change.gates:
        passed = [bool(finding.get("passed")) for finding in gate.get("findings", ()) if isinstance(finding, Mapping)]
        said.append(escape(clean(f"{gate.get('gate')}: {sum(passed)} of {len(passed)} met", None)))
    return "<br>".join(said) or "none"
