"""Changes of aliases: promotion through gates, retirement, and the history of changes."""

from __future__ import annotations

import getpass
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from align.core.aliases import Arm
from align.core.errors import InputError, require
from align.core.redaction import redact
from align.registry.gates import Gate, Subject
from align.registry.index import Index, query_index
from align.registry.record import Record, is_forgetting_run
from align.report.figure_text import escape_unprintable
from align.run import Artifact, resolve
from align.run.alias_log import AliasLog, AliasTarget, Change, append_change, describe_arms, read_alias_log
from align.run.manifest import ManifestDigests, compute_manifest_digests, read_manifest
from align.run.weights import ADAPTER_CONFIG, is_reward_adapter

FIELD = "artifact"


class AliasUpdate(NamedTuple):
    """An alias change that was appended to the log of aliases, with its description as lines of text.

    Attributes:
        lines: the change as text, with the results of its gates.
    """

    change: Change
    lines: list[str]


class Upstream(NamedTuple):
    """The records of an artifact's run and all its ancestors, and the names of ancestors that no longer exist.

    Attributes:
        records: records of the run itself and of its ancestors, as far as they exist.
        gone: `stage:name` of the ancestors that no longer exist.
    """

    records: list[Record]
    gone: list[str]


def promote(
    root: Path,
    alias: str,
    arms: Sequence[Arm],
    gates: Sequence[Gate],
    *,
    who: str | None,
    why: str,
    override: str | None = None,
) -> AliasUpdate:
    """Point an alias at one artifact, or at several with traffic weights, or raise InputError if one of its gates
    fails.

    With `override`, failed gates are logged and do not raise.

    The change is appended to the log of aliases.

    Args:
        root: the folder of all runs.
        arms: references, as `align.run.resolve` reads them.
        gates: all gates; each one that binds the alias has to pass.
        who: name of the person; None for the user of this process.
        override: reason to promote although a gate is closed.

    Raises:
        MissingArtifact: A reference names nothing.
        InputError: It names no weights of a run here, the alias refers to them already, or a gate is closed.
        RunConflict: Another process changed the alias at the same time.
    """
    log = read_alias_log(root)
    previous = log.last(alias)
    artifacts = [resolve(arm.ref, root, field_name=FIELD) for arm in arms]
    new_arms = [make_target(artifact, arm, root) for artifact, arm in zip(artifacts, arms, strict=True)]
    is_one_kind = len({is_reward_adapter(artifact.path) for artifact in artifacts}) == 1
    remedy = "Give the reward model an alias of its own."
    require(is_one_kind, "stage.arms", describe_arms(new_arms), "are a reward model and a policy", remedy)
    target = describe_arms(new_arms)
    are_distinct = len({arm.digest for arm in new_arms}) == len(new_arms)
    require(are_distinct, "stage.arms", target, "names the same artifact twice", "Add the weights up.")
    is_same = previous is not None and [*previous.arms] == new_arms
    remedy = "stage.action=history shows since when."
    require(not is_same, "stage.alias", alias, f"points at {target} already", remedy)
    subjects = query_index(root, lambda index: make_subjects(index, log, new_arms))
    results = [
        (gate, [finding for subject in subjects for finding in gate.check_artifact(subject)])
        for gate in gates
        if gate.binds(alias)
    ]
    closed = [(gate, finding) for gate, findings in results for finding in findings if not finding.passed]
    if override is not None:
        require(bool(closed), "stage.override", override, "overrides nothing: no gate is closed", "Drop it.")
    elif closed:
        lines = "".join(f"\n  gate {gate.name}, {finding.text}" for gate, finding in closed)
        remedy = f'Not met:{lines}\nResolve this, or add stage.override="REASON", which stays in the log.'
        raise InputError("stage.alias", alias, f"may not point at {target}", remedy)
    change = append_change(
        root,
        alias,
        [
            replace(arm, manifests=collect_manifest_digests(root, subject))
            for arm, subject in zip(new_arms, subjects, strict=True)
        ],
        who=redact(who or get_user()),
        why=redact(why),
        replaces=previous.seq if previous else 0,
        override=redact(override or ""),
        gates=[gate.as_json(findings) for gate, findings in results],
    )
    lines = [] if results else [f"no gate binds @{alias}"]
    for gate, findings in results:
        for finding in findings:
            lines.append(
                f"gate {gate.name}, {'met' if finding.passed else 'NOT MET'}: {escape_unprintable(finding.text)}"
            )
    stale = dict.fromkeys(record["run"] for subject in subjects for record in subject.upstream if record.get("stale"))
    if stale:
        lines.append(f"warning: stale, made from what was forgotten since: {escape_unprintable(', '.join(stale))}")
    return AliasUpdate(change, describe_change(change, previous, lines))


def retire(root: Path, alias: str, *, who: str | None, why: str) -> AliasUpdate:
    """Remove all targets of an alias, by a change that is appended to the log of aliases.

    Raises:
        InputError: It refers to nothing now.
    """
    log = read_alias_log(root)
    query_index(root, lambda index: require_complete_log(index, log))
    previous = log.last(alias)
    if previous is None or not previous.arms:
        raise InputError("stage.alias", alias, "is not in use", "stage.action=history lists the aliases.")
    change = append_change(root, alias, [], who=redact(who or get_user()), why=redact(why), replaces=previous.seq)
    return AliasUpdate(change, describe_change(change, previous, []))


def describe_change(change: Change, previous: Change | None, gate_lines: Sequence[str]) -> list[str]:
    """Return lines that describe an alias change: old and new targets, gate results, override, author and reason."""
    old_arms = f"{describe_arms(previous.arms)} → " if previous else ""
    return [
        f"@{change.alias}: {old_arms}{describe_arms(change.arms) or 'nothing'}",
        *gate_lines,
        *([f"overridden: {escape_unprintable(change.override)}"] if change.override else []),
        f"change {change.seq} by {escape_unprintable(change.who)}: {escape_unprintable(change.why)}",
    ]


def make_target(artifact: Artifact, arm: Arm, root: Path) -> AliasTarget:
    """Return an alias target, as the log of aliases stores it, for an artifact that a run under `root` made.

    Raises:
        InputError: No run under this root made it, or it holds no weights.
    """
    folder = artifact.path.resolve().parent  # the run's name is its folder's, even if its manifest has another
    is_in_root = artifact.manifest is not None and folder.parent.parent == root.resolve()
    remedy = "Name a run of it: artifact=STAGE:NAME."
    require(is_in_root, FIELD, arm.ref, f"was made by no run under {root}, so its gates cannot be checked", remedy)
    has_weights = artifact.whole or (artifact.path / ADAPTER_CONFIG).is_file()
    require(has_weights, FIELD, arm.ref, "holds no adapter and no model", remedy)
    return AliasTarget(f"{folder.parent.name}:{folder.name}", artifact.digest, arm.weight)


def make_subjects(index: Index, log: AliasLog, arms: Sequence[AliasTarget]) -> list[Subject]:
    """Read the runs of an alias's targets into the index again, and return the Subject that gates check for each
    target.

    The log is checked to be complete first.

    Raises:
        CorruptFile: As `require_complete_log`.
    """
    require_complete_log(index, log)
    for arm in arms:
        index.reread(arm.ref)
        if evaluation := (index.record(arm.ref) or {}).get("evaluation"):
            index.reread(evaluation)
    return [make_subject(index, index.root, arm) for arm in arms]


def collect_manifest_digests(root: Path, subject: Subject) -> dict[str, ManifestDigests]:
    """Return a mapping from run to its manifest's digests, for an artifact's run, its ancestors and its evaluation."""
    records = [*subject.upstream, *([subject.evaluation] if subject.evaluation else [])]
    manifests: dict[str, ManifestDigests] = {}
    for record in records:
        folder = root / record["folder"]
        with suppress(InputError):  # an unreadable manifest is left out
            digests = compute_manifest_digests(folder, read_manifest(folder))
            if digests.content:
                manifests[record["run"]] = digests
    return manifests


def make_subject(index: Index, root: Path, arm: AliasTarget) -> Subject:
    """Return the Subject that gates check for one alias target, with the records of its run, evaluation and exports.

    Raises:
        InputError: The run is gone, or was made again with other weights.
    """
    record = index.record(arm.ref)
    if record is None or record.get("digest") not in (None, arm.digest):
        raise InputError(FIELD, arm.ref, "was changed while it was read", "Ask again.")
    evaluation = index.record(record["evaluation"]) if record["evaluation"] else None
    exports = [export for ref in record["exports"] if (export := index.record(ref)) is not None]
    return Subject(root, record, arm.digest, evaluation, exports, *collect_upstream(index, record))


def collect_upstream(index: Index, record: Record) -> Upstream:
    """Return the records of a run and of all its ancestors, and the names of ancestors that no longer exist.

    A data set is left out if its rows were deleted in a new one: its stale mark does not concern what was made from the
    new one. The ancestors of both count.
    """
    records = {record["run"]: record}
    gone: dict[str, None] = {}
    replaced: set[str] = set()
    queue = [record]
    for child in queue:  # grows during the loop
        gone |= dict.fromkeys(child.get("gone", ()))
        for run in child.get("parents", ()):
            parent = None if run in records else index.record(run)
            if parent is not None:
                records[run] = parent
                queue.append(parent)
                if is_forgetting_run(child):
                    replaced.add(run)
    return Upstream([record for run, record in records.items() if run not in replaced], [*gone])


def get_user() -> str:
    """Return the login name of the user of this process, or `unknown`."""
    with suppress(OSError, KeyError, ImportError):
        return getpass.getuser()
    return "unknown"


def iter_history_lines(log: AliasLog, alias: str | None) -> Iterator[str]:
    """Yield two lines of text for each change of an alias, newest first; for all aliases if `alias` is `None`."""
    by_seq = {change.seq: change for change in log.changes}
    for change in reversed(log.changes):
        if alias is None or change.alias == alias:
            previous = by_seq.get(change.replaces)
            old_arms = f"{describe_arms(previous.arms) or 'nothing'} → " if previous else ""
            override = f" (overridden: {escape_unprintable(change.override)})" if change.override else ""
            new_arms = describe_arms(change.arms) or "nothing"
            yield f"{change.seq}  {change.at[:19]}  @{change.alias}  {old_arms}{new_arms}"
            yield f"   {escape_unprintable(change.who)}: {escape_unprintable(change.why)}{override}"


def iter_alias_lines(changes: Mapping[str, Change]) -> Iterator[str]:
    """Yield one line of text for each alias, with its targets, and when, by whom and why they were set.

    Args:
        changes: alias → its last change.
    """
    for alias, change in changes.items():
        about = f"since {change.at[:19]}, {escape_unprintable(change.who)}: {escape_unprintable(change.why)}"
        yield f"@{alias}  {describe_arms(change.arms)}  {about}"


def require_complete_log(index: Index, log: AliasLog) -> None:
    """Raise CorruptFile if the log of aliases lacks a change that a run recorded when it found an input by alias.

    Then the end of the log was cut off, which its chain of hashes cannot show.
    """
    if lost := index.find_lost_changes(log):
        raise lost
