"""Something forgotten over everything: what it is and where, what is to be made again, and the act itself.

The order of the act makes it safe to be cut off at any moment. First the receipt says which runs will be stale and
which files will be others. Then the files of runs go, while the store and the data sets still say what to look for;
then runs are marked, data sets replaced, and the store erased, each by the code that does it elsewhere too. The same
command goes on with the receipt that it finds.

Receipts lie in `forgotten/NAME.json` beside the runs. A receipt says when, who, by what kind of selector, how many rows
went where, which files are others now, and which runs are stale. It has no text, no name and no id of a row, and no
digest of a file as it was before: whoever has the rest of that file could try short texts against it. The digests after
the act are there. Until all is done a receipt has the HMAC of its selector under a salt, so that the same command knows
it again and goes on. Then both go: an HMAC whose salt lies beside it is as good as a plain hash to whoever guesses.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from align.annotate.store import Store
from align.annotate.store.erasure import erase
from align.config.root import DEFAULT_ROOT
from align.core.chain import canonical
from align.core.errors import AlignError, InputError, RunBusy, StorageError
from align.core.outputs import refuse_foreign_database, replace_file
from align.core.redaction import redacted
from align.registry.comparison import SWEEPS
from align.registry.forget_selection import MAY_HAVE, Selection, Selector, selected
from align.registry.forgotten_texts import Shown, Texts, shown_in, without
from align.registry.formatting import clean
from align.registry.index import Index, asked
from align.registry.record import UNREADABLE, Record, forgets
from align.report.figure_text import counted, one_line
from align.report.live import finished_page
from align.report.run_view import RunView
from align.rollout.answer_cache import FILE as ANSWERS
from align.rollout.answer_cache import REMEDY as MOVE_ANSWERS
from align.rollout.answer_cache import TABLES as ANSWER_TABLES
from align.run.alias_log import Change, append, read_log
from align.run.artifacts import REPLACED, replacement
from align.run.digests import file_digest
from align.run.files import json_object, json_text, write_json
from align.run.folder import hold_lock, locked, unused
from align.run.manifest import FILE as MANIFEST
from align.run.manifest import read_manifest
from align.run.stale import mark, stale_in

FOLDER = "forgotten"
SCHEMA = 1
RUN = re.compile(r"[a-z]+:(?!\.{1,2}$)[^/\0]+")
"""`stage:name`."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Attributes:
    name: of its file, without the ending.
    kind: of the selector.
    ended: when all was done; empty before.
    salt, check: by which the same command knows it again until then.
    store: rows that went out of the annotation store, by what they are.
    data: data set → `{by, rows, root}` of the one that took its place; without `rows` and `root` before it did.
    files: file of a run → `{lines, became, sha256}`; without `became` before it was changed.
    runs: run → `{because, again, command}`.
    """

    name: str
    at: str
    who: str
    kind: str
    ended: str = ""
    salt: str = ""
    check: str = ""
    store: dict[str, int] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[str, dict[str, str]] = field(default_factory=dict)

    def write(self, root: Path) -> Receipt:
        values = {"schema_version": SCHEMA, **asdict(self)}
        if self.ended:
            del values["salt"], values["check"]
        write_json(root / FOLDER / f"{self.name}.json", values)
        return self

    @property
    def is_sound(self) -> bool:
        """True if it names runs, and files in their folders, as it was written to."""
        read = all(isinstance(text, str) and text.isascii() for text in (self.salt, self.check))
        runs = [*self.runs, *self.data, *(file.replace("/", ":", 1).partition("/")[0] for file in self.files)]
        return read and all(map(RUN.fullmatch, runs)) and not any(".." in Path(file).parts for file in self.files)

    def is_of(self, selector: tuple[str, ...]) -> bool:
        return not self.ended and hmac.compare_digest(self.check, keyed_hash(self.salt, selector))

    def end(self, root: Path) -> Receipt:
        """Close it: what was needed to go on is dropped. Commands stand in the marks of the runs."""
        runs = {run: {key: said[key] for key in ("because", "again")} for run, said in self.runs.items()}
        return replace(self, ended=now(), salt="", check="", runs=runs).write(root)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def keyed_hash(salt: str, selector: tuple[str, ...]) -> str:
    return hmac.digest(salt.encode(), canonical(list(selector)).encode(), "sha256").hex()


def new_receipt(kind: str, who: str, selector: tuple[str, ...]) -> Receipt:
    """Return a receipt of a command that begins.

    Args:
        selector: all that tells this command from others.
    """
    at = now()
    salt = secrets.token_hex(16)
    name = f"{at[:19].replace(':', '').replace('T', '-')}-{secrets.token_hex(3)}"
    return Receipt(name, at, who, kind, salt=salt, check=keyed_hash(salt, selector))


def unfinished(root: Path) -> list[Receipt]:
    """Return the receipts of commands that were cut off. Files that are none are passed over."""
    found = []
    for path in sorted((root / FOLDER).glob("*.json")):
        with suppress(InputError, TypeError, ValueError, AttributeError):
            if not path.is_file():
                continue
            values = json_object(path, "receipt", "Remove the file.")
            if values.pop("schema_version", None) == SCHEMA and not values.get("ended"):
                known: dict[str, Any] = values | {"name": path.stem}
                one = Receipt(**known)
                if one.is_sound:
                    found.append(one)
    return found


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Hold a folder of runs against other commands that forget something there.

    Raises:
        RunBusy: another one does.
        StorageError: the folder cannot be written.
    """
    folder = root / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        descriptor = locked(folder)
    except RunBusy as error:
        problem = "another command is forgetting something there"
        raise RunBusy("run.root", str(root), problem, "Wait for it, then ask again.") from error
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error}), so nothing can be erased there"
        raise StorageError("run.root", str(root), problem, "Change its rights.") from error
    try:
        yield
    finally:
        os.close(descriptor)


Words = Callable[[Mapping[str, Any], Mapping[str, str]], Iterable[str]]
"""The words of a command line, out of a configuration and of where its inputs lie."""
WITHOUT = ("run.", "store.url")


@dataclass(frozen=True, slots=True)
class Made:
    """A run that is to be made again.

    Attributes:
        because: why it is stale.
        again: the run that takes its place, `stage:name`; empty where nobody can say how it is made.
        command: that makes it again; of a data set whose rows go none, for it is made as they go.
        problem: why there is no command.
    """

    run: str
    because: str
    again: str = ""
    command: str = ""
    problem: str = ""


def downstream(index: Index, read: Mapping[str, str], sets: Iterable[str], words: Words, store: str) -> list[Made]:
    """Return the runs that read what is to be forgotten, and those that were made from them, each behind what it is
    made from.

    Args:
        read: run → why it is stale.
        sets: the data sets whose rows go.
        store: the words that name the annotation store.
    """
    records, because = reached(index, read)
    ordered = in_order(records)
    again, taken = dict[str, str](), set[Path]()
    found = []
    for run in ordered:
        stage, _, name = run.partition(":")
        by = replaced_by(index.root / records[run]["folder"]) if stage == "data" else ""
        again[run] = by or f"{stage}:{free_name(index.root / stage, name, taken)}"
        if by or run in sets:
            found.append(Made(run, because[run], again[run]))
            continue
        line, problem = command(index, records[run], again, words, store)
        found.append(Made(run, because[run], again[run] if line else "", line, problem))
    return found


def reached(index: Index, read: Mapping[str, str]) -> tuple[dict[str, Record], dict[str, str]]:
    """Return the records of these runs and of all that was made from them, and why each is stale: what is certain
    counts before what may be."""
    records, because = dict[str, Record](), dict[str, str]()

    def uncertain(run: str) -> bool:
        return read.get(run, MAY_HAVE).startswith(MAY_HAVE)

    for first in sorted(read, key=uncertain):
        if first in because:
            continue
        because[first] = read[first]
        for run in (waiting := [first]):  # grows while we walk it
            if (record := index.record(run)) is None:
                continue
            records[run] = record
            for child in record.get("children", ()):
                known = index.record(child)
                if child not in because and uncertain(child) and known is not None:
                    if forgets(known) and run == first:  # which has nothing of the rows that went
                        continue
                    because[child] = f"made from {run}"
                    waiting.append(child)
    return records, because


def free_name(parent: Path, name: str, taken: set[Path]) -> str:
    """Return a name that no run has, nor one of this plan."""
    free = unused(parent, name)
    while parent / free in taken:
        free += "-2"
    taken.add(parent / free)
    return free


def in_order(records: Mapping[str, Record]) -> list[str]:
    """Return the runs, each behind those that it was made from; a circle is entered where it is met."""
    ordered: dict[str, None] = {}
    seen = set[str]()

    def visit(run: str) -> None:
        if run in records and run not in seen:
            seen.add(run)
            for parent in sorted(records[run].get("parents", ())):
                visit(parent)
            ordered[run] = None

    for run in sorted(records, key=lambda run: (str(records[run].get("started")), run)):
        visit(run)
    return [*ordered]


def replaced_by(folder: Path) -> str:
    """Return the data set that took a data set's place; empty if none did."""
    try:
        said = replacement(folder / "artifact", "data.path")
    except InputError:
        return ""
    return str(said["by"]) if said and said.get("by", "").startswith("data:") else ""


def command(index: Index, record: Record, again: Mapping[str, str], words: Words, store: str) -> tuple[str, str]:
    """Return the command that makes a run again under its new name, from what is made again before it; and why there
    is none.

    Args:
        again: run → the one that takes its place.
    """
    if record["status"] == UNREADABLE:
        return "", "its manifest cannot be read"
    manifest = read_manifest(index.root / record["folder"])
    if record["stage"] == "export" and manifest.config["export"].get("name") == "check":
        return "", "it measured another export: measure the one that takes its place (export=check)"
    refs, votes = dict[str, str](), False
    for name, given in record["inputs"].items():
        made = index.maker(str(given.get("root") or given["digest"]), given.get("run", "")) or given.get("run", "")
        if made:
            refs[name] = again.get(made, made)
        votes |= bool(given.get("project"))
    if not refs.get("data", "data:").startswith("data:"):
        del refs["data"]  # a file of a run: it is named by its path
    try:
        line = [word for word in words(manifest.config, refs) if not word.startswith(WITHOUT)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return "", f"its settings say something that this version does not read ({type(error).__name__})"
    for run, by in again.items():  # what is read by its path
        old, new = (f"{index.root.absolute() / one.replace(':', '/', 1)}/" for one in (run, by))
        line = [word.replace(old, new) for word in line]
    if base := record.get("base"):
        made = index.maker(base["digest"], "")
        if made in again:
            folder = index.root.absolute() / again[made].replace(":", "/", 1) / "artifact"
            line = [word for word in line if not word.startswith("model.path=")] + [f"model.path={folder}"]
    name = again[record["run"]].partition(":")[2]
    root = [] if index.root == Path(DEFAULT_ROOT) else [f"run.root={index.root}"]
    votes = votes or record["stage"] in ("sample", "annotate")
    return shlex.join(
        ["python", "-m", "align", *line, *([store] if votes and store else []), *root, f"run.name={name}"]
    ), ""


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
        root: the folder of all runs.
        url: of the annotation store.
        words: of the command of a run.
        store: the words that name the store in a command; empty if it is not named.
        shown: run → its files that show some of it.
        made: what is to be made again, in that order.
        before: the receipt of the same command that was cut off; None if there is none.
    """

    root: Path
    wanted: Selector
    url: str
    words: Words
    store: str
    selection: Selection
    shown: dict[str, list[Shown]]
    made: list[Made]
    before: Receipt | None = None


def in_root(run: str, *file: str) -> str:
    """Return the folder of `stage:name` in the folder of all runs, or a file in it."""
    return "/".join((run.replace(":", "/", 1), *file))


def identity(wanted: Selector, url: str) -> tuple[str, ...]:
    return (wanted.kind, wanted.value, wanted.project, url)


def make_plan(root: Path, wanted: Selector, url: str, words: Words, store: str) -> Plan:
    """Return what a selector means, where it is seen, and what was made from it.

    Args:
        url: of the annotation store.
        words, store: see `Plan`.

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
        shown = {
            run: files
            for run in index.names()
            if run not in found.sets and (files := [*shown_in(root / in_root(run), found.texts_of(run))])
        }
        found = replace(found, notes=(*found.notes, *elsewhere(root, found.texts)))
        read = dict(found.read)
        for run, files in shown.items():
            for reader, file in readers(index, run, files):
                read.setdefault(reader, f"{MAY_HAVE}: it read {file} of {run}, which shows them")
        made = downstream(index, read, found.sets, words, store)
        return Plan(root, wanted, url, words, store, found, shown, made, before)

    return asked(root, question)


def elsewhere(root: Path, texts: Texts) -> Iterator[str]:
    """Yield a note on each file that shows some of it and is no run's: nobody changes these."""
    folders = [path.parent for path in root.glob(f"*/*/{MANIFEST}")]
    for top in (root, root / SWEEPS, *(path for path in root.glob("*/*") if path.is_dir() and path not in folders)):
        deep = top.parent.parent == root
        for one in shown_in(top, texts, deep) if top.is_dir() and top.parent.name != BASES else ():
            yield f"{(top / one.file).relative_to(root)} shows it too, and is not changed"


def readers(index: Index, run: str, files: Sequence[Shown]) -> Iterator[tuple[str, str]]:
    """Yield (run, file) of the runs that read a file which another one published."""
    record = index.record(run)
    if record is None or record["status"] != "done":
        return
    outputs = read_manifest(index.root / record["folder"]).outputs
    for one in files:
        for reader in index.readers(outputs[one.file]) if one.file in outputs else ():
            yield reader, one.file


def apply(plan: Plan, who: str) -> Iterator[str]:
    """Forget it, or go on where the same command was cut off. Yields what was done, a line each, once it is done.

    Raises:
        RunBusy: a process works in a run whose files are to be changed; the same command goes on later.
        InputError: a data set, the store or a file cannot be changed.
    """
    root = plan.root
    if forgotten_already(plan):
        yield "nothing is left to erase, and all of these runs are marked"
        return
    receipt = begin_receipt(plan, who)
    for run, files in by_run(receipt).items():
        yield from clear_files(run, files, plan, receipt)
    if (root / ANSWERS).is_file():
        refuse_foreign_database(root / ANSWERS, "run.root", ANSWER_TABLES, MOVE_ANSWERS)
        (root / ANSWERS).unlink()
        yield f"{ANSWERS}: removed; evaluations make their answers again"
    mark_runs(root, receipt)
    yield f"{counted(len(receipt.runs), 'run')} marked stale"
    for run, said in receipt.data.items():
        ids = plan.selection.sets.get(run, frozenset())
        yield from replace_data_set(root, run, said, ids)
    receipt = mark_late_readers(plan, receipt)
    if plan.selection.stored is not None:
        with Store.open(plan.url, create=False) as store:
            erase(store, plan.selection.stored)
            if not store.emptied:
                yield "the store's own log is held by a reader: what was erased leaves it with the next write"
        yield f"store: {describe_counts(plan.selection.stored.rows)}; erased"
    receipt.end(root)
    yield f"receipt: {root / 'forgotten' / receipt.name}.json"


def mark_runs(root: Path, receipt: Receipt) -> None:
    for run, said in receipt.runs.items():
        if (root / in_root(run) / MANIFEST).is_file():
            mark(root / in_root(run), said["because"], said["command"], receipt.name, receipt.at)


def mark_late_readers(plan: Plan, receipt: Receipt) -> Receipt:
    """Mark what began to read it while it was being erased, as long as the store can say so."""
    try:
        made = make_plan(plan.root, plan.wanted, plan.url, plan.words, plan.store).made
    except InputError:  # nothing is known of it any more
        return receipt
    if new := [one for one in made if one.run not in receipt.runs]:
        receipt = replace(receipt, runs={**receipt.runs, **stale_runs(new)}).write(plan.root)
        mark_runs(plan.root, receipt)
    return receipt


def stale_runs(made: Sequence[Made]) -> dict[str, dict[str, str]]:
    return {one.run: {"because": one.because, "again": one.again, "command": one.command} for one in made}


def forgotten_already(plan: Plan) -> bool:
    """Return whether the same was forgotten before, and nothing came since."""
    stored = plan.selection.stored
    left = plan.before is not None or bool(plan.selection.sets) or (stored is not None and any(stored.rows.values()))
    left |= any(not one.stays for files in plan.shown.values() for one in files)
    return not left and all(stale_in(plan.root / in_root(one.run)) for one in plan.made)


def begin_receipt(plan: Plan, who: str) -> Receipt:
    """Write the receipt with all that is going to be done."""
    receipt = plan.before or new_receipt(plan.wanted.kind, redacted(who), identity(plan.wanted, plan.url))
    files = {
        in_root(run, one.file): {"lines": one.lines}
        for run, shown in plan.shown.items()
        for one in shown
        if not one.stays
    }
    pages = {in_root(run, PAGE): {"lines": 0} for run in plan.shown if (plan.root / in_root(run) / PAGE).is_file()}
    store = plan.selection.stored.rows if plan.selection.stored else {}
    data = {one.run: {"by": one.again} for one in plan.made if one.run in plan.selection.sets}
    return replace(
        receipt,
        store={**store, **receipt.store},
        files={**pages, **files, **receipt.files},
        runs={**stale_runs(plan.made), **receipt.runs},
        data={**data, **receipt.data},
    ).write(plan.root)


def by_run(receipt: Receipt) -> dict[str, list[str]]:
    """Return the files of each run that are to be changed, its page last: it is made from the others."""
    found: dict[str, list[str]] = {}
    for file in sorted(receipt.files, key=lambda file: file.endswith(f"/{PAGE}")):
        stage, name, inside = file.split("/", 2)
        found.setdefault(f"{stage}:{name}", []).append(inside)
    return found


def clear_files(run: str, files: Sequence[str], plan: Plan, receipt: Receipt) -> Iterator[str]:
    """Take texts out of the files of a run, and have its manifest answer for what they are now."""
    folder = plan.root / in_root(run)
    if not (folder / MANIFEST).is_file():
        yield f"{run}: is gone meanwhile"
        return
    notes: list[str] = []
    try:
        with hold_lock(folder):
            texts = plan.selection.texts_of(run)
            for file in files:
                path = folder / file
                said = receipt.files[in_root(run, file)]
                if path.is_file():
                    said["became"] = rewrite_file(folder, file, texts, plan.words) or said.get("became", REWRITTEN)
                else:
                    said.setdefault("became", REMOVED)
                said["sha256"] = file_digest(path) if path.is_file() else None
            with suppress(InputError):  # a manifest that nobody can read answers for nothing
                notes = answer_for(plan.root, run, files, receipt)
    except RunBusy as error:
        remedy = "End it, or wait for it, and run the same command again: it goes on."
        raise RunBusy("run", run, "a process works in it, so its files cannot be changed", remedy) from error
    became = (f"{file} {receipt.files[in_root(run, file)]['became']}" for file in files)
    yield f"{run}: {', '.join(became)}"
    yield from notes


def rewrite_file(folder: Path, file: str, texts: Texts, words: Words) -> str:
    """Take texts out of one file. Returns what became of it; empty if there were none."""
    path = folder / file
    if file == PAGE:
        return redraw_page(folder, texts, words)
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


def redraw_page(folder: Path, texts: Texts, words: Words) -> str:
    """Make a run's page anew from its files. If that cannot be done, or it shows the texts still, it goes."""
    page = folder / PAGE
    with suppress(AlignError, KeyError, TypeError, ValueError, OSError, IndexError):
        if (manifest := read_manifest(folder)).done:
            line = shlex.join(["python", "-m", "align", *words(manifest.config, manifest.refs)])
            finished_page(RunView(folder, manifest, line)).write(page)
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


def replace_data_set(root: Path, run: str, said: dict[str, object], ids: frozenset[str]) -> Iterator[str]:
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


def describe_counts(rows: Mapping[str, int]) -> str:
    return ", ".join(counted(count, what) for what, count in rows.items() if count) or "nothing is left"


def as_lines(plan: Plan) -> Iterator[str]:
    """Yield the plan as text."""
    found = plan.selection
    if found.stored is not None:
        yield f"store, project {clean(found.stored.project)}: {describe_counts(found.stored.rows)}"
    for run, ids in found.sets.items():
        by = next((one.again for one in plan.made if one.run == run), "")
        yield f"{clean(run)}: {counted(len(ids), 'row')}; {clean(by)} takes its place"
    for run, files in plan.shown.items():
        said = (f"{one.file} ({'it stays' if one.stays else counted(one.lines, 'place')})" for one in files)
        yield f"{clean(run)}: {one_line(', '.join(said))}"
    yield from (f"note: {one_line(note)}" for note in found.notes)
    yield NOT_LOOKED_AT
    yield "to be made again, in this order:" if plan.made else "nothing was made from it"
    for one in plan.made:
        yield f"{clean(one.run)}: {one_line(one.because)}"
        yield f"   {one.command or one.problem or f'{one.again} takes its place'}"
    if plan.made:
        yield "Weights stay until stage.action=gc, or you, remove them."


def as_object(plan: Plan, done: Sequence[str] | None) -> dict[str, Any]:
    """Return the plan as JSON.

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
