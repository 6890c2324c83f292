"""Aliases changed: what one shall mean, whether its gates allow it, and the line in the log."""

from __future__ import annotations

import getpass
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from align.core.aliases import Arm
from align.core.errors import InputError, require
from align.core.redaction import redacted
from align.registry.gates import Finding, Gate, Subject
from align.registry.index import Index, asked
from align.registry.record import Record, forgets
from align.registry.shown import clean
from align.run import Artifact, resolve
from align.run.alias_log import AliasLog, Change, Meant, append, in_words, read_log
from align.run.manifest import HeldManifest, hold_manifest, read_manifest
from align.run.weights import ADAPTER_CONFIG, brings_scores

FIELD = "artifact"


@dataclass(frozen=True, slots=True)
class Promoted:
    """Attributes:
    before: what the alias meant; None of a new one.
    checked: each gate that binds it, with what its conditions say.
    stale: the runs that are stale, of those that it means and that these were made from.
    """

    change: Change
    before: Change | None
    checked: tuple[tuple[Gate, list[Finding]], ...]
    stale: tuple[str, ...] = ()


def promote(
    root: Path, alias: str, arms: Sequence[Arm], gates: Sequence[Gate], *, who: str | None, why: str,
    override: str | None = None,
) -> Promoted:  # fmt: skip
    """Let an alias mean one artifact, or several by weight.

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
    require(alike, "stage.arms", in_words(meant), "are a reward model and a policy", remedy)
    now, digests = in_words(meant), [one.digest for one in meant]
    require(len({*digests}) == len(digests), "stage.arms", now, "names one artifact twice", "Add the weights up.")
    same = before is not None and [*before.arms] == meant
    problem = f"means that already: {now}"
    require(not same, "stage.alias", alias, problem, "stage.action=history shows since when.")
    subjects = asked(root, lambda index: subjects_in(index, log, meant))
    binding = [gate for gate in gates if gate.binds(alias)]
    checked = tuple((gate, [found for one in subjects for found in gate.findings(one)]) for gate in binding)
    closed = [(gate, found) for gate, findings in checked for found in findings if not found.passed]
    if override is not None:
        problem, remedy = "overrides nothing: no gate is closed", "Drop it."
        require(bool(closed), "stage.override", override, problem, remedy)
    elif closed:
        lines = "".join(f"\n  gate {gate.name}, {said(found)}" for gate, found in closed)
        remedy = f'Not met:{lines}\nMend that, or add stage.override="REASON", which stays in the log.'
        raise InputError("stage.alias", alias, f"may not mean {now}", remedy)
    meant = [replace(one, manifests=manifests_of(root, subject)) for one, subject in zip(meant, subjects, strict=True)]
    written = [gate.as_json(findings) for gate, findings in checked]
    change = append(
        root, alias, meant, who=redacted(who or user()), why=redacted(why), replaces=before.seq if before else 0,
        override=redacted(override or ""), gates=written,
    )  # fmt: skip
    stale = (one["run"] for subject in subjects for one in subject.upstream if one.get("stale"))
    return Promoted(change, before, checked, tuple(dict.fromkeys(stale)))


def retire(root: Path, alias: str, *, who: str | None, why: str) -> Promoted:
    """Let an alias mean nothing any more.

    Raises:
        InputError: it means nothing now.
    """
    log = read_log(root)
    asked(root, lambda index: check_not_cut(index, log))
    before = log.last(alias)
    if before is None or not before.arms:
        raise InputError("stage.alias", alias, "means nothing now", "stage.action=history lists the aliases.")
    change = append(root, alias, [], who=redacted(who or user()), why=redacted(why), replaces=before.seq)
    return Promoted(change, before, ())


def meant_by(artifact: Artifact, arm: Arm, root: Path) -> Meant:
    """An artifact as the log has it.

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
    """What is known of artifacts, for their gates, once the log is found to be whole.

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
    """What is known of an artifact, for its gates."""
    record = index.record(meant.ref)
    if record is None or record.get("digest") not in (None, meant.digest):
        raise InputError(FIELD, meant.ref, "was changed while it was looked at", "Ask again.")
    evaluation = index.record(record["evaluation"]) if record["evaluation"] else None
    exports = [one for ref in record["exports"] if (one := index.record(ref)) is not None]
    return Subject(root, record, meant.digest, evaluation, exports, *upstream_of(index, record))


def upstream_of(index: Index, record: Record) -> tuple[list[Record], list[str]]:
    """A run and all that it was made from, and the runs among these that are gone. Where rows of a data set were
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
    """Who runs this process, as the system calls them."""
    with suppress(OSError, KeyError, ImportError):
        return getpass.getuser()
    return "unknown"


def said(found: Finding) -> str:
    return f"{found.run}: {found.condition}: {found.said}"


def as_lines(promoted: Promoted) -> Iterator[str]:
    """What was done, for eyes."""
    change, before = promoted.change, promoted.before
    yield f"@{change.alias}: {in_words(before.arms) if before else ''}{' → ' if before else ''}{arms_in_words(change)}"
    if not promoted.checked and change.arms:
        yield f"no gate binds @{change.alias}"
    for gate, findings in promoted.checked:
        for found in findings:
            yield f"gate {gate.name}, {'met' if found.passed else 'NOT MET'}: {whole(said(found))}"
    if promoted.stale:
        yield f"warning: stale, made from what was forgotten since: {whole(', '.join(promoted.stale))}"
    if change.override:
        yield f"overridden: {whole(change.override)}"
    yield f"change {change.seq} by {whole(change.who)}: {whole(change.why)}"


def whole(text: str) -> str:
    """A text from the log on one line, all of it."""
    return clean(text, longest=None)


def arms_in_words(change: Change) -> str:
    return in_words(change.arms) or "nothing"


def as_history(log: AliasLog, alias: str | None) -> Iterator[str]:
    """Every change, the newest first."""
    by_seq = {change.seq: change for change in log.changes}
    for change in reversed(log.changes):
        if alias is None or change.alias == alias:
            before = by_seq.get(change.replaces)
            came = f"{arms_in_words(before)} → " if before else ""
            overridden = f" (overridden: {whole(change.override)})" if change.override else ""
            yield f"{change.seq}  {change.at[:19]}  @{change.alias}  {came}{arms_in_words(change)}"
            yield f"   {whole(change.who)}: {whole(change.why)}{overridden}"


def as_meanings(standing: Mapping[str, Change]) -> Iterator[str]:
    """What each alias means at one time."""
    for alias, change in standing.items():
        yield f"@{alias}  {in_words(change.arms)}  since {change.at[:19]}, {whole(change.who)}: {whole(change.why)}"


def check_not_cut(index: Index, log: AliasLog) -> None:
    """Raises CorruptFile where a run noted a change that the log does not have: its end was cut off, which its chain
    cannot show."""
    if lost := index.lost_changes(log):
        raise lost
