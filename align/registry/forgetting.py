"""Something forgotten over everything: what it is and where, what is to be made again, and the act itself.

The order of the act makes it safe to be cut off at any moment. First the receipt says which runs will be stale and
which files will be others. Then the files of runs go, while the store and the data sets still say what to look for;
then runs are marked, data sets replaced, and the store erased, each by the code that does it elsewhere too. The same
command goes on with the receipt that it finds.
"""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from align.annotate.store import Store
from align.annotate.store.erasure import erase
from align.core.errors import AlignError, InputError, RunBusy
from align.core.outputs import refuse_foreign_database, replace_file
from align.core.redaction import redacted
from align.registry.downstream import Made, Words, downstream
from align.registry.forgotten_texts import Shown, Texts, shown_in, without
from align.registry.index import Index, asked
from align.registry.receipts import Receipt, new_receipt, unfinished
from align.registry.selection import MAY_HAVE, Selection, Selector, selected
from align.registry.shown import clean
from align.registry.sweeps import FOLDER as COMPARED
from align.report.live import finished_page
from align.report.seen import Seen
from align.report.words import counted
from align.rollout.kept import FILE as ANSWERS
from align.rollout.kept import REMEDY as MOVE_ANSWERS
from align.rollout.kept import TABLES as ANSWER_TABLES
from align.run.alias_log import Change, append, read_log
from align.run.artifacts import REPLACED
from align.run.digests import file_digest
from align.run.files import json_object, json_text
from align.run.folder import locked
from align.run.manifest import FILE as MANIFEST
from align.run.manifest import read_manifest
from align.run.stale import mark, stale_in

PAGE, BASES = "report.html", "bases"
NOT_LOOKED_AT = (
    "not looked at: weights, checkpoints, Parquet outside of data sets, other packed files, source files, copies, and "
    "what wandb, MLflow and trackio were shown"
)
REWRITTEN, REMOVED, DRAWN = "rewritten", "removed", "made anew"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be forgotten, and what follows.

    Attributes:
        shown: run → its files that show some of it.
        made: what is to be made again, in that order.
        words, store: see `downstream`.
        before: the receipt of the same command that was cut off; None where there is none.
    """

    selection: Selection
    shown: dict[str, list[Shown]]
    made: list[Made]
    words: Words
    store: str
    before: Receipt | None = None


def in_root(run: str, *file: str) -> str:
    """The folder of `stage:name` in the folder of all runs, or a file in it."""
    return "/".join((run.replace(":", "/", 1), *file))


def identity(wanted: Selector, url: str) -> tuple[str, ...]:
    return (wanted.kind, wanted.value, wanted.project, url)


def planned(root: Path, wanted: Selector, url: str, words: Words, store: str) -> Plan:
    """What a selector means, where it is seen, and what was made from it.

    Args:
        url: of the annotation store.
        words, store: see `downstream`.

    Raises:
        InputError: nothing is known of it.
    """
    before = next((one for one in unfinished(root) if one.is_of(identity(wanted, url))), None)

    def question(index: Index) -> Plan:
        try:
            found = selected(index, wanted, url)
        except InputError as error:
            if before is None or error.field != wanted.field:
                raise
            found = Selection()  # cut off behind its last act
        shown = {run: list(shown_in(index.root / in_root(run), found.texts_of(run)))
                 for run in index.names() if run not in found.sets}  # fmt: skip
        shown = {run: files for run, files in shown.items() if files}
        found = replace(found, notes=(*found.notes, *elsewhere(root, found.texts)))
        read = dict(found.read)
        for run, files in shown.items():
            for reader, file in readers(index, run, files):
                read.setdefault(reader, f"{MAY_HAVE}: it read {file} of {run}, which shows them")
        return Plan(found, shown, downstream(index, read, found.sets, words, store), words, store, before)

    return asked(root, question)


def elsewhere(root: Path, texts: Texts) -> Iterator[str]:
    """What is to be said of files that show some of it and are no run's: nobody changes these."""
    folders = [path.parent for path in root.glob(f"*/*/{MANIFEST}")]
    for top in (root, root / COMPARED, *(path for path in root.glob("*/*") if path.is_dir() and path not in folders)):
        deep = top.parent.parent == root
        for one in shown_in(top, texts, deep) if top.is_dir() and top.parent.name != BASES else ():
            yield f"{(top / one.file).relative_to(root)} shows it too, and is not changed"


def readers(index: Index, run: str, files: Sequence[Shown]) -> Iterator[tuple[str, str]]:
    """(run, file) of the runs that read a file which another one published."""
    record = index.record(run)
    if record is None or record["status"] != "done":
        return
    outputs = read_manifest(index.root / record["folder"]).outputs
    for one in files:
        for reader in index.readers(outputs[one.file]) if one.file in outputs else ():
            yield reader, one.file


def apply(root: Path, wanted: Selector, url: str, plan: Plan, who: str) -> Iterator[str]:
    """Forget it, or go on where the same command was cut off. Yields what was done, a line each, once it is done.

    Raises:
        RunBusy: a process works in a run whose files are to be changed; the same command goes on later.
        InputError: a data set, the store or a file cannot be changed.
    """
    if forgotten_already(root, plan):
        yield "nothing is left to erase, and all of these runs are marked"
        return
    receipt = begun(root, wanted, url, plan, who)
    for run, files in by_run(receipt).items():
        yield from cleared(root, run, files, plan, receipt)
    if (root / ANSWERS).is_file():
        refuse_foreign_database(root / ANSWERS, "run.root", ANSWER_TABLES, MOVE_ANSWERS)
        (root / ANSWERS).unlink()
        yield f"{ANSWERS}: removed; evaluations make their answers again"
    marked(root, receipt)
    yield f"{counted(len(receipt.runs), 'run')} marked stale"
    for run, said in receipt.data.items():
        ids = plan.selection.sets.get(run, frozenset())
        yield from without_rows(root, run, said, ids)
    receipt = late(root, wanted, url, plan, receipt)
    if plan.selection.stored is not None:
        with Store.open(url, create=False) as store:
            erase(store, plan.selection.stored)
            if not store.emptied:
                yield "the store's own log is held by a reader: what was erased leaves it with the next write"
        yield f"store: {in_words(plan.selection.stored.rows)}; erased"
    receipt.end(root)
    yield f"receipt: {root / 'forgotten' / receipt.name}.json"


def marked(root: Path, receipt: Receipt) -> None:
    for run, said in receipt.runs.items():
        if (root / in_root(run) / MANIFEST).is_file():
            mark(root / in_root(run), said["because"], said["command"], receipt.name, receipt.at)


def late(root: Path, wanted: Selector, url: str, plan: Plan, receipt: Receipt) -> Receipt:
    """Mark what began to read it while it was being erased, as long as the store can say so."""
    try:
        found = planned(root, wanted, url, plan.words, plan.store).made
    except InputError:  # nothing is known of it any more
        return receipt
    if new := [one for one in found if one.run not in receipt.runs]:
        runs = {one.run: {"because": one.because, "again": one.again, "command": one.command} for one in new}
        receipt = replace(receipt, runs={**receipt.runs, **runs}).write(root)
        marked(root, receipt)
    return receipt


def forgotten_already(root: Path, plan: Plan) -> bool:
    """Whether the same was forgotten before, and nothing came since."""
    stored = plan.selection.stored
    left = plan.before is not None or bool(plan.selection.sets) or (stored is not None and any(stored.rows.values()))
    left |= any(not one.stays for files in plan.shown.values() for one in files)
    return not left and all(stale_in(root / in_root(one.run)) for one in plan.made)


def begun(root: Path, wanted: Selector, url: str, plan: Plan, who: str) -> Receipt:
    """The receipt with all that is going to be done, on disk."""
    receipt = plan.before or new_receipt(wanted.kind, redacted(who), identity(wanted, url))
    store = plan.selection.stored.rows if plan.selection.stored else {}
    files = {
        in_root(run, one.file): {"lines": one.lines}
        for run, files in plan.shown.items() for one in files if not one.stays
    }  # fmt: skip
    pages = {
        in_root(run, PAGE): {"lines": 0}
        for run in plan.shown if (root / in_root(run) / PAGE).is_file()
    }  # fmt: skip
    runs = {one.run: {"because": one.because, "again": one.again, "command": one.command} for one in plan.made}
    data = {one.run: {"by": one.again} for one in plan.made if one.run in plan.selection.sets}
    return replace(
        receipt, store={**store, **receipt.store}, files={**pages, **files, **receipt.files},
        runs={**runs, **receipt.runs}, data={**data, **receipt.data},
    ).write(root)  # fmt: skip


def by_run(receipt: Receipt) -> dict[str, list[str]]:
    """Run → its files that are to be changed, its page last: it is made from the others."""
    found: dict[str, list[str]] = {}
    for file in sorted(receipt.files, key=lambda file: file.endswith(f"/{PAGE}")):
        stage, name, inside = file.split("/", 2)
        found.setdefault(f"{stage}:{name}", []).append(inside)
    return found


def cleared(root: Path, run: str, files: Sequence[str], plan: Plan, receipt: Receipt) -> Iterator[str]:
    """Take texts out of the files of a run, and have its manifest answer for what they are now."""
    folder = root / in_root(run)
    if not (folder / MANIFEST).is_file():
        yield f"{run}: is gone meanwhile"
        return
    try:
        lock = locked(folder)
    except RunBusy as error:
        remedy = "End it, or wait for it, and run the same command again: it goes on."
        raise RunBusy("run", run, "a process works in it, so its files cannot be changed", remedy) from error
    try:
        texts = plan.selection.texts_of(run)
        for file in files:
            path, said = folder / file, receipt.files[in_root(run, file)]
            if not path.is_file():
                said.update(became=said.get("became", REMOVED))
            else:
                said.update(became=changed(folder, file, texts, plan.words) or said.get("became", REWRITTEN))
            said["sha256"] = file_digest(path) if path.is_file() else None
        notes: list[str] = []
        with suppress(InputError):  # a manifest that nobody can read answers for nothing
            notes = answer_for(root, run, files, receipt)
    finally:
        os.close(lock)
    became = (f"{file} {receipt.files[in_root(run, file)]['became']}" for file in files)
    yield f"{run}: {', '.join(became)}"
    yield from notes


def changed(folder: Path, file: str, texts: Texts, words: Words) -> str:
    """Take texts out of one file; what became of it. Nothing where there were none."""
    path = folder / file
    if file == PAGE:
        return drawn(folder, texts, words)
    rest, count = without(path, texts)
    if not count:
        return ""
    if rest is None:
        path.unlink()
        return REMOVED
    mode = path.stat().st_mode
    replace_file(path, rest)
    path.chmod(mode)
    return REWRITTEN


def drawn(folder: Path, texts: Texts, words: Words) -> str:
    """Make a run's page anew from its files; where that cannot be done, or it shows them still, it goes."""
    page = folder / PAGE
    with suppress(AlignError, KeyError, TypeError, ValueError, OSError, IndexError):
        if (manifest := read_manifest(folder)).done:
            finished_page(
                Seen(folder, manifest, shlex.join(["python", "-m", "align", *words(manifest.config, manifest.refs)]))
            ).write(page)
            if not without(page, texts)[1]:
                return DRAWN
    page.unlink()
    return REMOVED


def answer_for(root: Path, run: str, files: Sequence[str], receipt: Receipt) -> list[str]:
    """Write the digests that a run's files have now into its manifest. Returns lines about the log of the aliases.

    The log comes first: a process that is killed in between finds it in the same state, and writes the manifest.
    """
    folder = root / in_root(run)
    values = json_object(folder / MANIFEST, "manifest", "Restore it.")
    outputs, before = values.get("outputs") or {}, dict(values.get("outputs") or {})
    for file in files:
        if file in outputs:
            if (folder / file).is_file():
                outputs[file] = file_digest(folder / file)
            else:
                del outputs[file]
    if outputs == before:
        return []
    data = json_text(values).encode()
    try:
        changes = hold_rewritten_manifest(root, run, sha256(data).hexdigest(), receipt)
        notes = [f"@{change.alias} (change {change.seq}) holds the new manifest of {run}" for change in changes]
    except InputError as error:
        notes = [f"no alias holds the new manifest of {run}, which is called altered from now on ({error.problem})"]
    replace_file(folder / MANIFEST, data)
    return notes


def hold_rewritten_manifest(root: Path, run: str, new_sha256: str, receipt: Receipt) -> list[Change]:
    """Append to the log of the aliases that a manifest which it holds is rewritten, so that nobody calls it altered.

    A manifest that is not the one that the log holds was altered before, and stays so.

    Raises:
        CorruptFile, RunConflict, InputError: the log cannot be read or appended to.
    """
    old_sha256 = file_digest(root / in_root(run) / MANIFEST)
    changes = []
    for alias, standing in read_log(root).standing().items():
        arms = []
        for arm in standing.arms:
            held = arm.manifests.get(run)
            if held is not None and held.sha256 == old_sha256:
                arm = replace(arm, manifests={**arm.manifests, run: replace(held, sha256=new_sha256)})
            arms.append(arm)
        if all(new is old for new, old in zip(arms, standing.arms, strict=True)):
            continue
        why = f"stage.action=forget rewrote files of {run} (forgotten/{receipt.name}.json)"
        changes.append(
            append(
                root,
                alias,
                arms,
                who=receipt.who,
                why=why,
                replaces=standing.seq,
                override=standing.override,
                gates=standing.gates,
            )
        )
    return changes


def without_rows(root: Path, run: str, said: dict[str, object], ids: frozenset[str]) -> Iterator[str]:
    """Replace a data set by one without some rows, by the command that does it alone."""
    old, new = root / in_root(run), root / in_root(str(said["by"]))
    ended = (old / "artifact" / REPLACED).is_file() and (new / MANIFEST).is_file() and read_manifest(new).done
    if not ended or any((old / "artifact").glob("*.parquet")):
        with NamedTemporaryFile("w", prefix="align-forget-", suffix=".txt", encoding="utf-8") as listed:
            # The file may not be empty. Cut off behind the replacement, there is no id left, and any will do.
            listed.write("\n".join(sorted(ids) or [secrets.token_hex(32)]))
            listed.flush()
            line = [
                "stage=data", "stage.action=forget", f"data.path={run}", f"stage.forget={listed.name}",
                f"run.root={root}", f"run.name={new.name}",
            ]  # fmt: skip
            found = subprocess.run(
                [sys.executable, "-m", "align", *line], stdin=subprocess.DEVNULL, capture_output=True, check=False,
                text=True, errors="replace",
            )  # fmt: skip
        if found.returncode:
            why = (found.stderr or found.stdout).strip().splitlines()
            problem = f"cannot be replaced: {why[-1].removeprefix('align: ') if why else found.returncode}"
            raise InputError("data.path", run, problem, "Mend that, and run the same command again: it goes on.")
    replaces = json_object(new / "artifact" / "data.json", "data.json", "Restore it.")
    said.update(rows=replaces["replaces"]["count"], root=replaces["root"])
    yield f"{run}: {counted(replaces['replaces']['count'], 'row')} forgotten; {said['by']} takes its place"


def in_words(rows: Mapping[str, int]) -> str:
    return ", ".join(counted(count, what) for what, count in rows.items() if count) or "nothing is left"


def as_lines(plan: Plan) -> Iterator[str]:
    """The plan for eyes."""
    found = plan.selection
    if found.stored is not None:
        yield f"store, project {clean(found.stored.project)}: {in_words(found.stored.rows)}"
    for run, ids in found.sets.items():
        by = next((one.again for one in plan.made if one.run == run), "")
        yield f"{clean(run)}: {counted(len(ids), 'row')}; {clean(by)} takes its place"
    for run, files in plan.shown.items():
        said = (f"{one.file} ({'it stays' if one.stays else counted(one.lines, 'place')})" for one in files)
        yield f"{clean(run)}: {clean(', '.join(said), longest=None)}"
    yield from (f"note: {clean(note, longest=None)}" for note in found.notes)
    yield NOT_LOOKED_AT
    yield "to be made again, in this order:" if plan.made else "nothing was made from it"
    for one in plan.made:
        yield f"{clean(one.run)}: {clean(one.because, longest=None)}"
        yield f"   {one.command or one.problem or f'{one.again} takes its place'}"
    if plan.made:
        yield "Weights stay until stage.action=gc, or you, remove them."


def as_object(plan: Plan, done: Sequence[str] | None) -> dict[str, Any]:
    """The plan for programs.

    Args:
        done: what was done; None where nothing was to be.
    """
    stored = plan.selection.stored
    return {
        "store": {"project": stored.project, **stored.rows} if stored else None,
        "data": {run: len(ids) for run, ids in plan.selection.sets.items()},
        "files": {run: [asdict(one) for one in files] for run, files in plan.shown.items()},
        "not_known": list(plan.selection.notes), "runs": [asdict(one) for one in plan.made],
        "done": None if done is None else list(done),
    }  # fmt: skip
