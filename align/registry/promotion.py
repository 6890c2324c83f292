"""Aliases changed: what one shall mean, whether its gates allow it, and the line in the log."""

from __future__ import annotations

import getpass
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from align.core.aliases import Arm
from align.core.errors import InputError, require
from align.core.redaction import redacted
from align.registry.gates import Gate, Subject
from align.registry.index import Index, asked
from align.registry.record import Record, forgets
from align.report.figure_text import one_line
from align.run import Artifact, resolve
from align.run.alias_log import AliasLog, Change, Meant, append, describe_arms, read_log
from align.run.manifest import HeldManifest, hold_manifest, read_manifest
from align.run.weights import ADAPTER_CONFIG, brings_scores

FIELD = "artifact"


def promote(
    root: Path,
    alias: str,
    arms: Sequence[Arm],
    gates: Sequence[Gate],
    *,
    who: str | None,
    why: str,
    override: str | None = None,
) -> tuple[Change, list[str]]:
    """Let an alias mean one artifact, or several by weight. Returns the change, and lines about it.

    Args:
        root: the folder of all runs.
        arms: the references, as `align.run.resolve` reads them.
        gates: all that there are; those that bind the alias have to be open.
        who: does it; None for whoever runs this process.
        override: why it is done although a gate is closed.

    Raises:
        MissingArtifact: a reference names nothing.
        InputError: it names no weights of a run here; the alias means that already; a gate is closed.
        RunConflict: somebody else changed the alias meanwhile.
    """
    log = read_log(root)
    before = log.last(alias)
    artifacts = [resolve(arm.ref, root, field_name=FIELD) for arm in arms]
    meant = [meant_by(artifact, arm, root) for artifact, arm in zip(artifacts, arms, strict=True)]
    alike = len({brings_scores(artifact.path) for artifact in artifacts}) == 1
    remedy = "Give the reward model an alias of its own."
    require(alike, "stage.arms", describe_arms(meant), "are a reward model and a policy", remedy)
    target = describe_arms(meant)
    distinct = len({arm.digest for arm in meant}) == len(meant)
    require(distinct, "stage.arms", target, "names one artifact twice", "Add the weights up.")
    same = before is not None and [*before.arms] == meant
    remedy = "stage.action=history shows since when."
    require(not same, "stage.alias", alias, f"means that already: {target}", remedy)
    subjects = asked(root, lambda index: subjects_in(index, log, meant))
    checked = [
        (gate, [finding for subject in subjects for finding in gate.findings(subject)])
        for gate in gates
        if gate.binds(alias)
    ]
    closed = [(gate, finding) for gate, findings in checked for finding in findings if not finding.passed]
    if override is not None:
        require(bool(closed), "stage.override", override, "overrides nothing: no gate is closed", "Drop it.")
    elif closed:
        lines = "".join(f"\n  gate {gate.name}, {finding.text}" for gate, finding in closed)
        remedy = f'Not met:{lines}\nMend that, or add stage.override="REASON", which stays in the log.'
        raise InputError("stage.alias", alias, f"may not mean {target}", remedy)
    change = append(
        root,
        alias,
        [replace(arm, manifests=manifests_of(root, one)) for arm, one in zip(meant, subjects, strict=True)],
        who=redacted(who or user()),
        why=redacted(why),
        replaces=before.seq if before else 0,
        override=redacted(override or ""),
        gates=[gate.as_json(findings) for gate, findings in checked],
    )
    lines = [] if checked else [f"no gate binds @{alias}"]
    for gate, findings in checked:
        for finding in findings:
            lines.append(f"gate {gate.name}, {'met' if finding.passed else 'NOT MET'}: {one_line(finding.text)}")
    stale = dict.fromkeys(one["run"] for subject in subjects for one in subject.upstream if one.get("stale"))
    if stale:
        lines.append(f"warning: stale, made from what was forgotten since: {one_line(', '.join(stale))}")
    return change, describe_change(change, before, lines)


def retire(root: Path, alias: str, *, who: str | None, why: str) -> tuple[Change, list[str]]:
    """Let an alias mean nothing any more. Returns the change, and lines about it.

    Raises:
        InputError: it means nothing now.
    """
    log = read_log(root)
    asked(root, lambda index: check_not_cut(index, log))
    before = log.last(alias)
    if before is None or not before.arms:
        raise InputError("stage.alias", alias, "means nothing now", "stage.action=history lists the aliases.")
    change = append(root, alias, [], who=redacted(who or user()), why=redacted(why), replaces=before.seq)
    return change, describe_change(change, before, [])


def describe_change(change: Change, before: Change | None, findings: Sequence[str]) -> list[str]:
    came_from = f"{describe_arms(before.arms)} → " if before else ""
    return [
        f"@{change.alias}: {came_from}{describe_arms(change.arms) or 'nothing'}",
        *findings,
        *([f"overridden: {one_line(change.override)}"] if change.override else []),
        f"change {change.seq} by {one_line(change.who)}: {one_line(change.why)}",
    ]


def meant_by(artifact: Artifact, arm: Arm, root: Path) -> Meant:
    """Return an artifact as the log has it.

    Raises:
        InputError: no run under this root made it, or it holds no weights.
    """
    folder = artifact.path.resolve().parent  # a run goes by its folder, whatever its manifest calls it
    here = artifact.manifest is not None and folder.parent.parent == root.resolve()
    remedy = "Name a run of it: artifact=STAGE:NAME."
    require(here, FIELD, arm.ref, f"was made by no run under {root}, so that nothing is known of it", remedy)
    weights = artifact.whole or (artifact.path / ADAPTER_CONFIG).is_file()
    require(weights, FIELD, arm.ref, "holds no adapter and no model", remedy)
    return Meant(f"{folder.parent.name}:{folder.name}", artifact.digest, arm.weight)


def subjects_in(index: Index, log: AliasLog, meant: Sequence[Meant]) -> list[Subject]:
    """Return what is known of artifacts, for their gates, once the log is found to be whole.

    Raises:
        CorruptFile: as `check_not_cut`.
    """
    check_not_cut(index, log)
    for one in meant:
        index.reread(one.ref)
        if evaluation := (index.record(one.ref) or {}).get("evaluation"):
            index.reread(evaluation)
    return [subject_of(index, index.root, one) for one in meant]


def manifests_of(root: Path, subject: Subject) -> dict[str, HeldManifest]:
    """Return the manifests that say what an artifact is and how good it is: of its run, of the models that it was made
    from, and of its evaluation."""
    records = [*subject.upstream, *([subject.evaluation] if subject.evaluation else [])]
    held: dict[str, HeldManifest] = {}
    for record in records:
        folder = root / record["folder"]
        with suppress(InputError):  # what cannot be read is no manifest that could be held
            one = hold_manifest(folder, read_manifest(folder))
            if one.content:
                held[record["run"]] = one
    return held


def subject_of(index: Index, root: Path, meant: Meant) -> Subject:
    """Return what is known of an artifact, for its gates."""
    record = index.record(meant.ref)
    if record is None or record.get("digest") not in (None, meant.digest):
        raise InputError(FIELD, meant.ref, "was changed while it was looked at", "Ask again.")
    evaluation = index.record(record["evaluation"]) if record["evaluation"] else None
    exports = [one for ref in record["exports"] if (one := index.record(ref)) is not None]
    return Subject(root, record, meant.digest, evaluation, exports, *upstream_of(index, record))


def upstream_of(index: Index, record: Record) -> tuple[list[Record], list[str]]:
    """Return a run and all that it was made from, and the runs among these that are gone. If rows of a data set were
    forgotten, the mark of the one that had them says nothing of the one that took its place; what both were made from
    does."""
    found, gone, replaced = {record["run"]: record}, dict[str, None](), set[str]()
    for one in (waiting := [record]):  # grows while we walk it
        gone |= dict.fromkeys(one.get("gone", ()))
        for parent in one.get("parents", ()):
            if parent not in found and (there := index.record(parent)) is not None:
                found[parent] = there
                waiting.append(there)
                replaced |= {parent} if forgets(one) else set()
    return [one for run, one in found.items() if run not in replaced], [*gone]


def user() -> str:
    """Return who runs this process, as the system calls them."""
    with suppress(OSError, KeyError, ImportError):
        return getpass.getuser()
    return "unknown"


def as_history(log: AliasLog, alias: str | None) -> Iterator[str]:
    """Yield lines about every change, the newest first."""
    by_seq = {change.seq: change for change in log.changes}
    for change in reversed(log.changes):
        if alias is None or change.alias == alias:
            before = by_seq.get(change.replaces)
            came_from = f"{describe_arms(before.arms) or 'nothing'} → " if before else ""
            overridden = f" (overridden: {one_line(change.override)})" if change.override else ""
            target = describe_arms(change.arms) or "nothing"
            yield f"{change.seq}  {change.at[:19]}  @{change.alias}  {came_from}{target}"
            yield f"   {one_line(change.who)}: {one_line(change.why)}{overridden}"


def as_meanings(standing: Mapping[str, Change]) -> Iterator[str]:
    """Yield what each alias means at one time."""
    for alias, change in standing.items():
        about = f"since {change.at[:19]}, {one_line(change.who)}: {one_line(change.why)}"
        yield f"@{alias}  {describe_arms(change.arms)}  {about}"


def check_not_cut(index: Index, log: AliasLog) -> None:
    """Raises CorruptFile where a run noted a change that the log does not have: its end was cut off, which its chain
    cannot show."""
    if lost := index.lost_changes(log):
        raise lost
