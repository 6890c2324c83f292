"""Deletion of data from a whole folder of runs: a plan of everything that is affected, and its execution.

Execution may be interrupted at any moment. First the receipt lists which runs will be stale and which files will
change. Then the files of runs are cleared, while the store and the data sets still say what to look for. Then runs are
marked, data sets replaced, and the store erased, each by the code that does it elsewhere. The same command continues
from the receipt that it finds.

Receipts lie in `forgotten/NAME.json` beside the runs. A receipt holds when, who, the kind of selector, how many rows
were removed where, which files changed, and which runs are stale. It holds no text, no name, no id of a row, and no
digest of a file before the change: with the rest of that file, short texts could be guessed from it. The digests
afterwards are there. Until everything is done, a receipt holds an HMAC of its selector with its salt, by which the same
command recognises it. Then both are removed: with the salt beside it, an HMAC can be guessed like a plain hash.
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
from typing import Any, NamedTuple

from align.annotate.store import Store
from align.annotate.store.erasure import erase_target
from align.config.root import DEFAULT_ROOT
from align.core.chain import to_canonical_json
from align.core.errors import AlignError, InputError, RunBusy, StorageError
from align.core.outputs import refuse_foreign_database, replace_file
from align.core.redaction import redact
from align.registry.comparison import SWEEPS
from align.registry.forget_selection import MAY_HAVE, Selection, Selector, select_data
from align.registry.forgotten_texts import FileMatch, ForgottenTexts, iter_matches, read_without_texts
from align.registry.formatting import clean_text
from align.registry.index import Index, query_index
from align.registry.record import UNREADABLE, Record, is_forgetting_run
from align.report.figure_text import escape_unprintable, pluralize
from align.report.live import build_finished_page
from align.report.run_view import RunView
from align.rollout.answer_cache import FILE as ANSWERS
from align.rollout.answer_cache import REMEDY as MOVE_ANSWERS
from align.rollout.answer_cache import TABLES as ANSWER_TABLES
from align.run.alias_log import Change, append_change, read_alias_log
from align.run.artifacts import REPLACED, read_replacement
from align.run.digests import file_digest
from align.run.files import read_json_object, to_json_text, write_json
from align.run.folder import find_unused_name, hold_lock, lock_folder
from align.run.manifest import FILE as MANIFEST
from align.run.manifest import read_manifest
from align.run.stale import mark_stale, read_stale_mark

FOLDER = "forgotten"
SCHEMA = 1
RUN = re.compile(r"[a-z]+:(?!\.{1,2}$)[^/\0]+")
"""Pattern of a run's name, `stage:name`."""


@dataclass(frozen=True, slots=True)
class ForgetReceipt:
    """The receipt of a deletion of data: the rows, files and runs that it changes, without any deleted text.

    Attributes:
        name: name of its file, without the suffix.
        kind: kind of the selector.
        ended: when everything was done; empty before.
        salt, check: values by which the same command recognises it until then.
        store: number of rows removed from the annotation store, by kind.
        data: data set → `{by, rows, root}` of the one that replaces it; before that only `by`.
        files: file of a run → `{lines, became, sha256}`; before the change only `lines`.
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

    def write(self, root: Path) -> ForgetReceipt:
        """Write the receipt to `forgotten/NAME.json` in the folder of all runs, and return it."""
        values = {"schema_version": SCHEMA, **asdict(self)}
        if self.ended:
            del values["salt"], values["check"]
        write_json(root / FOLDER / f"{self.name}.json", values)
        return self

    @property
    def is_sound(self) -> bool:
        """True if all names of runs and files in the receipt are valid and inside the folder of runs."""
        if not all(isinstance(text, str) and text.isascii() for text in (self.salt, self.check)):
            return False
        runs = [*self.runs, *self.data, *(file.replace("/", ":", 1).partition("/")[0] for file in self.files)]
        return all(map(RUN.fullmatch, runs)) and not any(".." in Path(file).parts for file in self.files)

    def is_unfinished_for(self, selector: tuple[str, ...]) -> bool:
        """Return whether the receipt is unfinished and was written by a command with this selector."""
        return not self.ended and hmac.compare_digest(self.check, compute_hmac(self.salt, selector))

    def end(self, root: Path) -> ForgetReceipt:
        """Write the receipt as finished, without its salt, HMAC and commands, and return it.

        The commands remain in the stale marks of the runs.
        """
        runs = {run: {key: mark[key] for key in ("because", "again")} for run, mark in self.runs.items()}
        return replace(self, ended=utc_now(), salt="", check="", runs=runs).write(root)


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def compute_hmac(salt: str, selector: tuple[str, ...]) -> str:
    return hmac.digest(salt.encode(), to_canonical_json(list(selector)).encode(), "sha256").hex()


def make_receipt(kind: str, who: str, selector: tuple[str, ...]) -> ForgetReceipt:
    """Return a new receipt with a unique name, a salt and an HMAC of the selector. It is not written yet.

    Args:
        selector: values that identify the command.
    """
    at = utc_now()
    salt = secrets.token_hex(16)
    name = f"{at[:19].replace(':', '').replace('T', '-')}-{secrets.token_hex(3)}"
    return ForgetReceipt(name, at, who, kind, salt=salt, check=compute_hmac(salt, selector))


def list_unfinished(root: Path) -> list[ForgetReceipt]:
    """Return the receipts in `forgotten/` of commands that were interrupted.

    Files that are not valid receipts are ignored.
    """
    receipts = []
    for path in sorted((root / FOLDER).glob("*.json")):
        with suppress(InputError, TypeError, ValueError, AttributeError):
            if not path.is_file():
                continue
            values = read_json_object(path, "receipt", "Remove the file.")
            if values.pop("schema_version", None) == SCHEMA and not values.get("ended"):
                receipt = ForgetReceipt(**{**values, "name": path.stem})
                if receipt.is_sound:
                    receipts.append(receipt)
    return receipts


@contextmanager
def hold_forget_lock(root: Path) -> Iterator[None]:
    """Lock the folder of runs during the block, so that no other command deletes data there, or raise RunBusy.

    Raises:
        RunBusy: Another command holds the lock.
        StorageError: The folder cannot be written.
    """
    folder = root / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        descriptor = lock_folder(folder)
    except RunBusy as error:
        problem = "another stage.action=forget is running there"
        raise RunBusy("run.root", str(root), problem, "Wait for it, then ask again.") from error
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error}), so nothing can be erased there"
        raise StorageError("run.root", str(root), problem, "Change its rights.") from error
    try:
        yield
    finally:
        os.close(descriptor)


ArgumentBuilder = Callable[[Mapping[str, Any], Mapping[str, str]], Iterable[str]]
"""A function that returns the arguments of an align command for a configuration and the references of its inputs."""
WITHOUT = ("run.", "store.url")


@dataclass(frozen=True, slots=True)
class StaleRun:
    """A run that read data which is deleted, and the command that repeats it without that data.

    Attributes:
        because: why it is stale.
        again: name of the repeated run, `stage:name`; empty if it cannot be repeated.
        command: command that repeats it; empty for a data set whose rows are removed, which is replaced at once.
        problem: why there is no command.
    """

    run: str
    because: str
    again: str = ""
    command: str = ""
    problem: str = ""


class StaleRuns(NamedTuple):
    """The runs that read deleted data, directly or through other runs, with their records and the reasons.

    Attributes:
        records: run → its record.
        reasons: run → why it is stale.
    """

    records: dict[str, Record]
    reasons: dict[str, str]


class RepeatCommand(NamedTuple):
    """The shell command that repeats a run, or the reason why the run cannot be repeated.

    Attributes:
        command: the command; empty if the run cannot be repeated.
        problem: why it cannot be repeated; empty otherwise.
    """

    command: str
    problem: str


def plan_repeats(
    index: Index,
    stale_reasons: Mapping[str, str],
    sets: Iterable[str],
    build_arguments: ArgumentBuilder,
    store_argument: str,
) -> list[StaleRun]:
    """Return the runs that read data to delete and all runs made from them, with commands, in the order of repetition.

    Args:
        stale_reasons: run → why it is stale, of the runs that read the data themselves.
        sets: data sets whose rows are removed.
        build_arguments: returns the arguments of a run's command.
        store_argument: argument that names the annotation store; empty if commands do not name it.
    """
    stale_runs = find_stale_runs(index, stale_reasons)
    records = stale_runs.records
    reasons = stale_runs.reasons
    new_names: dict[str, str] = {}
    taken_paths: set[Path] = set()
    repeats = []
    for run in sort_by_lineage(records):
        stage, _, name = run.partition(":")
        replacement_set = find_replacement_set(index.root / records[run]["folder"]) if stage == "data" else ""
        new_names[run] = replacement_set or f"{stage}:{reserve_unused_name(index.root / stage, name, taken_paths)}"
        if replacement_set or run in sets:
            repeats.append(StaleRun(run, reasons[run], new_names[run]))
            continue
        command, problem = make_repeat_command(index, records[run], new_names, build_arguments, store_argument)
        repeats.append(StaleRun(run, reasons[run], new_names[run] if command else "", command, problem))
    return repeats


def find_stale_runs(index: Index, stale_reasons: Mapping[str, str]) -> StaleRuns:
    """Return the runs that read data to delete and all runs made from them, with their records and reasons.

    A certain reason counts before an uncertain one.

    Args:
        stale_reasons: run → why it is stale, of the runs that read the data themselves.
    """
    records: dict[str, Record] = {}
    reasons: dict[str, str] = {}

    def is_uncertain(run: str) -> bool:
        return stale_reasons.get(run, MAY_HAVE).startswith(MAY_HAVE)

    for reader in sorted(stale_reasons, key=is_uncertain):
        if reader in reasons:
            continue
        reasons[reader] = stale_reasons[reader]
        queue = [reader]
        for run in queue:  # grows during the loop
            if (record := index.record(run)) is None:
                continue
            records[run] = record
            for child in record.get("children", ()):
                if child in reasons or not is_uncertain(child) or (child_record := index.record(child)) is None:
                    continue
                if is_forgetting_run(child_record) and run == reader:  # it holds none of the deleted rows
                    continue
                reasons[child] = f"made from {run}"
                queue.append(child)
    return StaleRuns(records, reasons)


def reserve_unused_name(parent: Path, name: str, taken_paths: set[Path]) -> str:
    """Return `name`, or a variant that is unused in the folder `parent` and in `taken_paths`, and add its path to
    `taken_paths`."""
    name = find_unused_name(parent, name)
    while parent / name in taken_paths:
        name += "-2"
    taken_paths.add(parent / name)
    return name


def sort_by_lineage(records: Mapping[str, Record]) -> list[str]:
    """Return the names of runs sorted so that each one comes after its parents. A cycle is broken at its oldest run.

    Args:
        records: run → its record.
    """

    def iter_parents(run: str) -> Iterator[str]:
        visited.add(run)
        return iter(sorted(records[run].get("parents", ())))

    ordered: list[str] = []
    visited: set[str] = set()
    for start in sorted(records, key=lambda run: (str(records[run].get("started")), run)):
        path = [] if start in visited else [(start, iter_parents(start))]
        while path:
            run, parents = path[-1]
            parent = next((parent for parent in parents if parent in records and parent not in visited), None)
            if parent is not None:
                path.append((parent, iter_parents(parent)))
            else:
                ordered.append(run)
                path.pop()
    return ordered


def find_replacement_set(folder: Path) -> str:
    """Return `data:NAME` of the data set that replaced the one in a run's folder, or an empty text if none did."""
    try:
        note = read_replacement(folder / "artifact", "data.path")
    except InputError:
        return ""
    return str(note["by"]) if note and note.get("by", "").startswith("data:") else ""


def make_repeat_command(
    index: Index, record: Record, new_names: Mapping[str, str], build_arguments: ArgumentBuilder, store_argument: str
) -> RepeatCommand:
    """Return the shell command that repeats a run with a new name and repeated inputs, or why it cannot be repeated.

    Args:
        new_names: run → run that replaces it, of the runs that are repeated before.
    """
    if record["status"] == UNREADABLE:
        return RepeatCommand("", "its manifest cannot be read")
    manifest = read_manifest(index.root / record["folder"])
    if record["stage"] == "export" and manifest.config["export"].get("name") == "check":
        problem = "it measured another export: measure the one that takes its place (export=check)"
        return RepeatCommand("", problem)
    refs: dict[str, str] = {}
    for name, input in record["inputs"].items():
        digest = str(input.get("root") or input["digest"])
        if run := index.maker(digest, input.get("run", "")) or input.get("run", ""):
            refs[name] = new_names.get(run, run)
    if not refs.get("data", "data:").startswith("data:"):
        del refs["data"]  # a file of a run, which is named by its path
    try:
        arguments = [word for word in build_arguments(manifest.config, refs) if not word.startswith(WITHOUT)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problem = f"this version cannot read its settings ({type(error).__name__})"
        return RepeatCommand("", problem)
    root = index.root.absolute()
    for run, new_run in new_names.items():  # inputs that are named by their paths
        old_prefix = f"{root / build_run_path(run)}/"
        arguments = [word.replace(old_prefix, f"{root / build_run_path(new_run)}/") for word in arguments]
    if base := record.get("base"):
        base_run = index.maker(base["digest"], "")
        if base_run in new_names:
            arguments = [word for word in arguments if not word.startswith("model.path=")]
            arguments.append(f"model.path={root / build_run_path(new_names[base_run], 'artifact')}")
    reads_store = any(input.get("project") for input in record["inputs"].values())
    if store_argument and (reads_store or record["stage"] in ("sample", "annotate")):
        arguments.append(store_argument)
    if index.root != Path(DEFAULT_ROOT):
        arguments.append(f"run.root={index.root}")
    arguments.append(f"run.name={new_names[record['run']].partition(':')[2]}")
    return RepeatCommand(shlex.join(["python", "-m", "align", *arguments]), "")


PAGE = "report.html"
BASES = "bases"
NOT_LOOKED_AT = (
    "not looked at: weights, checkpoints, Parquet outside of data sets, other packed files, source files, copies, and "
    "what wandb, MLflow and trackio were shown"
)
REWRITTEN = "rewritten"
REMOVED = "removed"
DRAWN = "made anew"


@dataclass(frozen=True, slots=True)
class ForgetPlan:
    """A plan of a deletion of data: the rows and files to change, and the runs to repeat because they read the data.

    Attributes:
        root: the folder of all runs.
        selector: the selector.
        url: URL of the annotation store.
        build_arguments: returns the arguments of a run's command.
        store_argument: argument that names the store in a command; empty if it is not named.
        selection: rows, texts and runs that match the selector.
        matches: run → its files that contain the texts.
        repeats: stale runs, in order of repetition.
        before: receipt of the same command that was interrupted; None if there is no such receipt.
    """

    root: Path
    selector: Selector
    url: str
    build_arguments: ArgumentBuilder
    store_argument: str
    selection: Selection
    matches: dict[str, list[FileMatch]]
    repeats: list[StaleRun]
    before: ForgetReceipt | None = None


def build_run_path(run: str, *file: str) -> str:
    """Return the relative path of a run's folder, `stage/name`, or of a file in it, for a run named `stage:name`."""
    return "/".join((run.replace(":", "/", 1), *file))


def make_selector_key(selector: Selector, url: str) -> tuple[str, ...]:
    """Return the values of a selector and the store's URL, from which a receipt's HMAC is computed."""
    return (selector.kind, selector.value, selector.project, url)


def make_plan(
    root: Path, selector: Selector, url: str, build_arguments: ArgumentBuilder, store_argument: str
) -> ForgetPlan:
    """Find the data that a selector matches, the files that contain it, and the runs made from it, and return the plan.

    Nothing is changed. A plan continues the receipt of the same command, if that was interrupted.

    Args:
        url: URL of the annotation store.
        build_arguments, store_argument: see `ForgetPlan`.

    Raises:
        InputError: Nothing matches the selector.
    """
    before = next(
        (receipt for receipt in list_unfinished(root) if receipt.is_unfinished_for(make_selector_key(selector, url))),
        None,
    )

    def plan_with(index: Index) -> ForgetPlan:
        try:
            selection = select_data(index, selector, url)
        except InputError as error:
            if before is None or error.field != selector.field:
                raise
            selection = Selection()  # the command was interrupted after its last act
        matches: dict[str, list[FileMatch]] = {}
        for run in index.names():
            if run not in selection.sets and (
                files := [*iter_matches(root / build_run_path(run), selection.get_texts_for_run(run))]
            ):
                matches[run] = files
        selection = replace(selection, notes=(*selection.notes, *iter_other_files(root, selection.texts)))
        stale_reasons = dict(selection.stale_reasons)
        for run, files in matches.items():
            for reader, file in iter_readers(index, run, files):
                stale_reasons.setdefault(reader, f"{MAY_HAVE}: it read {file} of {run}, which shows them")
        stale_runs = plan_repeats(index, stale_reasons, selection.sets, build_arguments, store_argument)
        return ForgetPlan(root, selector, url, build_arguments, store_argument, selection, matches, stale_runs, before)

    return query_index(root, plan_with)


def iter_other_files(root: Path, texts: ForgottenTexts) -> Iterator[str]:
    """Yield a note for each file that contains deleted texts but belongs to no run.

    Such files are not changed.
    """
    run_folders = [path.parent for path in root.glob(f"*/*/{MANIFEST}")]
    other_folders = [path for path in root.glob("*/*") if path.is_dir() and path not in run_folders]
    for folder in (root, root / SWEEPS, *other_folders):
        if not folder.is_dir() or folder.parent.name == BASES:
            continue
        for match in iter_matches(folder, texts, search_subfolders=folder.parent.parent == root):
            yield f"{(folder / match.file).relative_to(root)} contains it too, and is not changed"


def iter_readers(index: Index, run: str, files: Sequence[FileMatch]) -> Iterator[tuple[str, str]]:
    """Yield (reading run, file name) for each of the given files of a finished run that is an input of another run.

    Args:
        run: the run that published the files.
        files: files of that run.
    """
    record = index.record(run)
    if record is None or record["status"] != "done":
        return
    outputs = read_manifest(index.root / record["folder"]).outputs
    for match in files:
        if match.file in outputs:
            for reader in index.find_readers(outputs[match.file]):
                yield reader, match.file


def execute_plan(plan: ForgetPlan, who: str) -> Iterator[str]:
    """Delete a plan's data from files, data sets and the store, mark runs that read it as stale, and yield a text line
    per step.

    A line is yielded when its step is done. An interrupted execution is continued.

    Raises:
        RunBusy: A process works in a run whose files are to be changed. The same command continues later.
        InputError: A data set, the store or a file cannot be changed.
    """
    root = plan.root
    if is_already_forgotten(plan):
        yield "nothing was left to erase: these runs are already marked"
        return
    receipt = write_first_receipt(plan, who)
    for run, files in group_files_by_run(receipt).items():
        yield from remove_texts_from_run(run, files, plan, receipt)
    if (root / ANSWERS).is_file():
        refuse_foreign_database(root / ANSWERS, "run.root", ANSWER_TABLES, MOVE_ANSWERS)
        (root / ANSWERS).unlink()
        yield f"{ANSWERS}: removed; evaluations make their answers again"
    mark_runs_stale(root, receipt)
    yield f"{pluralize(len(receipt.runs), 'run')} marked stale"
    for run, entry in receipt.data.items():
        ids = plan.selection.sets.get(run, frozenset())
        yield from replace_data_set(root, run, entry, ids)
    receipt = mark_late_readers(plan, receipt)
    if plan.selection.stored is not None:
        with Store.open(plan.url, create_if_missing=False) as store:
            erase_target(store, plan.selection.stored)
            if not store.is_erasure_complete:
                yield (
                    "another process reads the store's write-ahead log: the erased content leaves it at the next write"
                )
        yield f"store: {describe_counts(plan.selection.stored.rows)}; erased"
    receipt.end(root)
    yield f"receipt: {root / 'forgotten' / receipt.name}.json"


def mark_runs_stale(root: Path, receipt: ForgetReceipt) -> None:
    """Mark each run of a receipt that still exists as stale, with the reason and the command that repeats it."""
    for run, entry in receipt.runs.items():
        if (root / build_run_path(run) / MANIFEST).is_file():
            mark_stale(root / build_run_path(run), entry["because"], entry["command"], receipt.name, receipt.at)


def mark_late_readers(plan: ForgetPlan, receipt: ForgetReceipt) -> ForgetReceipt:
    """Mark runs as stale that read the data since the plan was made, and return the receipt with them, as it was
    written.

    Must be called before the store's data are erased.
    """
    try:
        repeats = make_plan(plan.root, plan.selector, plan.url, plan.build_arguments, plan.store_argument).repeats
    except InputError:  # nothing matches any more
        return receipt
    if new := [repeat for repeat in repeats if repeat.run not in receipt.runs]:
        receipt = replace(receipt, runs={**receipt.runs, **describe_stale_runs(new)}).write(plan.root)
        mark_runs_stale(plan.root, receipt)
    return receipt


def describe_stale_runs(repeats: Sequence[StaleRun]) -> dict[str, dict[str, str]]:
    return {run.run: {"because": run.because, "again": run.again, "command": run.command} for run in repeats}


def is_already_forgotten(plan: ForgetPlan) -> bool:
    """Return whether a plan has nothing left to delete, and all of its stale runs are already marked."""
    stored = plan.selection.stored
    if plan.before is not None or plan.selection.sets or (stored is not None and any(stored.rows.values())):
        return False
    if any(not file.stays for files in plan.matches.values() for file in files):
        return False
    return all(read_stale_mark(plan.root / build_run_path(run.run)) for run in plan.repeats)


def write_first_receipt(plan: ForgetPlan, who: str) -> ForgetReceipt:
    """Write the receipt with everything that a plan is going to change, before anything is deleted, and return it.

    Args:
        who: name of the person, from which secrets are removed.
    """
    receipt = plan.before or make_receipt(plan.selector.kind, redact(who), make_selector_key(plan.selector, plan.url))
    files = {
        build_run_path(run, file.file): {"lines": file.lines}
        for run, matches in plan.matches.items()
        for file in matches
        if not file.stays
    }
    pages = {
        build_run_path(run, PAGE): {"lines": 0}
        for run in plan.matches
        if (plan.root / build_run_path(run) / PAGE).is_file()
    }
    store = plan.selection.stored.rows if plan.selection.stored else {}
    data = {run.run: {"by": run.again} for run in plan.repeats if run.run in plan.selection.sets}
    return replace(
        receipt,
        store={**store, **receipt.store},
        files={**pages, **files, **receipt.files},
        runs={**describe_stale_runs(plan.repeats), **receipt.runs},
        data={**data, **receipt.data},
    ).write(plan.root)


def group_files_by_run(receipt: ForgetReceipt) -> dict[str, list[str]]:
    """Return run → paths of its files to change, from a receipt, with the run's `report.html` last.

    The report is made from the other files.
    """
    files_by_run: dict[str, list[str]] = {}
    for file in sorted(receipt.files, key=lambda file: file.endswith(f"/{PAGE}")):
        stage, name, path = file.split("/", 2)
        files_by_run.setdefault(f"{stage}:{name}", []).append(path)
    return files_by_run


def remove_texts_from_run(run: str, files: Sequence[str], plan: ForgetPlan, receipt: ForgetReceipt) -> Iterator[str]:
    """Remove deleted texts from a run's files, update the digests in its manifest, and yield lines that describe the
    changes.

    Files are rewritten or deleted. The receipt's entries are completed in place: what became of each file, and its
    digest.

    Raises:
        RunBusy: A process works in the run.
    """
    folder = plan.root / build_run_path(run)
    if not (folder / MANIFEST).is_file():
        yield f"{run}: was removed in the meantime"
        return
    notes: list[str] = []
    try:
        with hold_lock(folder):
            texts = plan.selection.get_texts_for_run(run)
            for file in files:
                path = folder / file
                entry = receipt.files[build_run_path(run, file)]
                if path.is_file():
                    entry["became"] = rewrite_file(folder, file, texts, plan.build_arguments) or entry.get(
                        "became", REWRITTEN
                    )
                else:
                    entry.setdefault("became", REMOVED)
                entry["sha256"] = file_digest(path) if path.is_file() else None
            with suppress(InputError):  # an unreadable manifest is left as it is
                notes = update_manifest_digests(plan.root, run, files, receipt)
    except RunBusy as error:
        remedy = "End it, or wait for it, and run the same command again: it continues."
        raise RunBusy("run", run, "a process works in it, so its files cannot be changed", remedy) from error
    became = (f"{file} {receipt.files[build_run_path(run, file)]['became']}" for file in files)
    yield f"{run}: {', '.join(became)}"
    yield from notes


def rewrite_file(folder: Path, file: str, texts: ForgottenTexts, build_arguments: ArgumentBuilder) -> str:
    """Remove deleted texts from one file of a run, by rewriting or deleting it, and return what was done.

    Returns an empty text if it held none of them.

    Args:
        folder: the run's folder.
        file: path relative to that folder.
    """
    path = folder / file
    if file == PAGE:
        return redraw_page(folder, texts, build_arguments)
    content, count = read_without_texts(path, texts)
    if not count:
        return ""
    if content is None:
        path.unlink()
        return REMOVED
    mode = path.stat().st_mode
    replace_file(path, content)
    path.chmod(mode)
    return REWRITTEN


def redraw_page(folder: Path, texts: ForgottenTexts, build_arguments: ArgumentBuilder) -> str:
    """Build a run's `report.html` again from its cleaned files, and return what was done.

    The page is deleted if that fails, or if it still contains the texts.
    """
    page = folder / PAGE
    with suppress(AlignError, KeyError, TypeError, ValueError, OSError, IndexError):
        if (manifest := read_manifest(folder)).done:
            line = shlex.join(["python", "-m", "align", *build_arguments(manifest.config, manifest.refs)])
            build_finished_page(RunView(folder, manifest, line)).write(page)
            if not read_without_texts(page, texts).match_count:
                return DRAWN
    page.unlink()
    return REMOVED


def update_manifest_digests(root: Path, run: str, files: Sequence[str], receipt: ForgetReceipt) -> list[str]:
    """Write the new digests of a run's rewritten files into its manifest, and return lines about affected aliases.

    The log is written first: if the process is killed in between, the next one finds the old manifest and repeats both.
    """
    folder = root / build_run_path(run)
    values = read_json_object(folder / MANIFEST, "manifest", "Restore it.")
    outputs = values.get("outputs") or {}
    old_outputs = dict(outputs)
    for file in files:
        if file in outputs:
            if (folder / file).is_file():
                outputs[file] = file_digest(folder / file)
            else:
                del outputs[file]
    if outputs == old_outputs:
        return []
    data = to_json_text(values).encode()
    try:
        changes = log_rewritten_manifest(root, run, sha256(data).hexdigest(), receipt)
        notes = [f"@{change.alias} (change {change.seq}) holds the new manifest of {run}" for change in changes]
    except InputError as error:
        notes = [f"no alias holds the new manifest of {run}, which is shown as altered from now on ({error.problem})"]
    replace_file(folder / MANIFEST, data)
    return notes


def log_rewritten_manifest(root: Path, run: str, new_sha256: str, receipt: ForgetReceipt) -> list[Change]:
    """Append the new digest of a rewritten manifest to the log for each alias that recorded the old one, and return the
    changes.

    So the run does not count as altered. A manifest that already differed from the log was altered before, and stays
    so.

    Raises:
        CorruptFile, RunConflict, InputError: The log cannot be read or appended to.
    """
    old_sha256 = file_digest(root / build_run_path(run) / MANIFEST)
    changes = []
    for alias, current in read_alias_log(root).get_current_changes().items():
        arms = []
        for arm in current.arms:
            manifest = arm.manifests.get(run)
            if manifest is not None and manifest.sha256 == old_sha256:
                arm = replace(arm, manifests={**arm.manifests, run: replace(manifest, sha256=new_sha256)})
            arms.append(arm)
        if all(new is old for new, old in zip(arms, current.arms, strict=True)):
            continue
        why = f"stage.action=forget rewrote files of {run} (forgotten/{receipt.name}.json)"
        changes.append(
            append_change(
                root,
                alias,
                arms,
                who=receipt.who,
                why=why,
                replaces=current.seq,
                override=current.override,
                gates=current.gates,
            )
        )
    return changes


def replace_data_set(root: Path, run: str, entry: dict[str, object], ids: frozenset[str]) -> Iterator[str]:
    """Replace a data set by one without the rows `ids`, by running `stage=data stage.action=forget`, and yield one text
    line.

    Args:
        entry: the receipt's entry about the data set, which is completed.
        ids: content ids of the rows to remove.
    """
    old = root / build_run_path(run)
    new = root / build_run_path(str(entry["by"]))
    is_done = (old / "artifact" / REPLACED).is_file() and (new / MANIFEST).is_file() and read_manifest(new).done
    if not is_done or any((old / "artifact").glob("*.parquet")):
        with NamedTemporaryFile("w", prefix="align-forget-", suffix=".txt", encoding="utf-8") as id_file:
            # The file may not be empty. After an interruption behind the replacement no id is left, and any will do.
            id_file.write("\n".join(sorted(ids) or [secrets.token_hex(32)]))
            id_file.flush()
            arguments = [
                "stage=data",
                "stage.action=forget",
                f"data.path={run}",
                f"stage.forget={id_file.name}",
                f"run.root={root}",
                f"run.name={new.name}",
            ]
            result = subprocess.run(
                [sys.executable, "-m", "align", *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                text=True,
                errors="replace",
            )
        if result.returncode:
            lines = (result.stderr or result.stdout).strip().splitlines()
            problem = f"cannot be replaced: {lines[-1].removeprefix('align: ') if lines else result.returncode}"
            raise InputError("data.path", run, problem, "Resolve this, and run the same command again: it continues.")
    new_set = read_json_object(new / "artifact" / "data.json", "data.json", "Restore it.")
    count = new_set["replaces"]["count"]
    entry.update(rows=count, root=new_set["root"])
    yield f"{run}: {pluralize(count, 'row')} forgotten; {entry['by']} takes its place"


def describe_counts(rows: Mapping[str, int]) -> str:
    return ", ".join(pluralize(count, what) for what, count in rows.items() if count) or "nothing is left"


def as_lines(plan: ForgetPlan) -> Iterator[str]:
    """Yield the plan of a deletion as lines of text: rows, files, notes, and the runs to repeat with their commands."""
    selection = plan.selection
    if selection.stored is not None:
        yield f"store, project {clean_text(selection.stored.project)}: {describe_counts(selection.stored.rows)}"
    for run, ids in selection.sets.items():
        new_run = next((repeat.again for repeat in plan.repeats if repeat.run == run), "")
        yield f"{clean_text(run)}: {pluralize(len(ids), 'row')}; {clean_text(new_run)} takes its place"
    for run, files in plan.matches.items():
        texts = (f"{file.file} ({'it stays' if file.stays else pluralize(file.lines, 'place')})" for file in files)
        yield f"{clean_text(run)}: {escape_unprintable(', '.join(texts))}"
    yield from (f"note: {escape_unprintable(note)}" for note in selection.notes)
    yield NOT_LOOKED_AT
    yield "to be made again, in this order:" if plan.repeats else "nothing was made from it"
    for repeat in plan.repeats:
        yield f"{clean_text(repeat.run)}: {escape_unprintable(repeat.because)}"
        yield f"   {repeat.command or repeat.problem or f'{repeat.again} takes its place'}"
    if plan.repeats:
        yield "Weights stay until stage.action=gc, or you, remove them."


def as_object(plan: ForgetPlan, done: Sequence[str] | None) -> dict[str, Any]:
    """Return the plan of a deletion, and the lines about its execution if there are any, as plain JSON.

    Args:
        done: lines about what was done; None if the plan was not executed.
    """
    stored = plan.selection.stored
    return {
        "store": {"project": stored.project, **stored.rows} if stored else None,
        "data": {run: len(ids) for run, ids in plan.selection.sets.items()},
        "files": {run: [asdict(file) for file in files] for run, files in plan.matches.items()},
        "not_known": list(plan.selection.notes),
        "runs": [asdict(run) for run in plan.repeats],
        "done": None if done is None else list(done),
    }
