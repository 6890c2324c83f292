"""A run's folder: identity, lock, manifest and atomic publication."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from align.core.errors import (
    AlignError,
    InputError,
    MissingArtifact,
    RunBusy,
    RunConflict,
    StorageError,
    make_printable,
)
from align.core.files import has_file, parse_user_path
from align.core.redaction import mask_tree
from align.ranks import NOTES, RUN, write_launcher_note
from align.run.digests import file_digest, json_digest
from align.run.environment import code_digest, describe_machine, package_versions, read_git_state, read_own_commit
from align.run.figures import write_figures
from align.run.files import write_text
from align.run.manifest import FILE, Base, Input, Manifest, compute_identity, read_manifest, write_manifest
from align.run.weights import compute_published_digest

MISSING = "(missing)"
OF_A_START = (
    "manifest.json",
    "config.yaml",
    "log.txt",
    "report.html",
    "trained_on.jsonl",
    "trained_ids.parquet",
    "stale.json",
)
"""Names of files that a run may write before its stage has computed anything."""
PUBLISHED = (
    "report.html",
    "config.yaml",
    "metrics.json",
    "metrics.jsonl",
    "steps.jsonl",
    "samples.jsonl",
    "held_out.jsonl",
    "trained_on.jsonl",
    "trained_ids.parquet",
    "rows.jsonl",
    "dropped.jsonl",
    "duplicates.jsonl",
    "scores.jsonl",
)
"""Names of files in a run's folder whose digests go into the manifest when the run is published."""


class ChangedValue(NamedTuple):
    """A difference between two nested mappings: a dotted key, its old value and its new value."""

    key: str
    old: Any
    new: Any


def find_first_difference(old: Any, new: Any, path: str = "") -> ChangedValue | None:
    """Return the first dotted key, in sorted order, at which two nested mappings differ, with both values, or None."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            key_path = f"{path}.{key}" if path else key
            if difference := find_first_difference(old.get(key, MISSING), new.get(key, MISSING), key_path):
                return difference
        return None
    return None if old == new else ChangedValue(path, old, new)


class Run:
    """The locked folder of one run and its manifest, used as a context manager that records failures.

    `Run.open` makes it.

    Attributes:
        folder: `<root>/<stage>/<name>`.
        manifest: what is known of the run so far.
        done: True if this run was published before.
        resumed: True if an unfinished folder is continued.
        known_metrics: metrics that the stage knows before it ends, such as the number of rows kept, for its live page.
    """

    def __init__(self, folder: Path, manifest: Manifest, lock: int, resumed: bool) -> None:
        self.folder = folder
        self.manifest = manifest
        self._lock = lock
        self.done = manifest.done
        self.resumed = resumed
        self.known_metrics: dict[str, Any] = {}

    @property
    def shared(self) -> Path:
        """The run's folder on rank 0, from which every rank reads."""
        return self.folder

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def inputs(self) -> Mapping[str, Input]:
        return self.manifest.inputs

    @property
    def base(self) -> Base:
        """The manifest's record of the base weights that the stage works on."""
        assert self.manifest.base is not None
        return self.manifest.base

    @property
    def artifact(self) -> Path:
        """The run's subfolder `artifact` for the stage's result, created if it is missing."""
        return self._make_folder("artifact")

    @property
    def checkpoints(self) -> Path:
        """The run's subfolder `checkpoints` for the state to resume from, created if it is missing."""
        return self._make_folder("checkpoints")

    def _make_folder(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(exist_ok=True)
        return path

    @classmethod
    def open(
        cls,
        config: Mapping[str, Any],
        inputs: Mapping[str, Input],
        base: Base | None,
        label: str,
        resume: str = "auto",
        again: bool = False,
    ) -> Run:
        """Find the folder of the run with this configuration and inputs, or create one, and lock it.

        Args:
            config: the resolved configuration as plain values.
            inputs: every resolved input.
            base: base weights that the stage works on.
            label: readable part of a derived name.
            resume: `auto` continues an unfinished run, `never` makes a new folder, `must` fails if there is nothing to
                resume.
            again: reopen a server's folder, even if it is done or its configuration has changed.

        Raises:
            RunBusy: Another process holds it.
            RunConflict: The name belongs to a run with another configuration.
            StorageError: The folder cannot be written.
        """
        stage = config["stage"]["name"]
        root = parse_user_path(config["run"]["root"], "run.root")
        identity = compute_identity(stage, config, inputs, base)
        name = config["run"]["name"] or derive_name(root / stage, label, json_digest(identity)[:8])
        folder, lock = make_and_lock_folder(root, stage, name, resume)
        try:
            new = Manifest(stage, folder.name, config["seed"], mask_tree(config), inputs, base)
            old = read_same_run_or_empty_folder(folder, new, again)
            if old is not None and old.done and not again:
                # A process killed during `publish` may have left them.
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                return cls(folder, old, lock, resumed=False)
            times = {"started": utc_now()}
            if old is not None:
                times["first_started"] = old.times.get("first_started") or old.times.get("started", "")
            manifest = replace(
                new,
                times=times,
                code=code_digest(),
                commit=read_own_commit(),
                git=read_git_state(),
                packages=package_versions(),
                hardware=describe_machine(),
            )
            return cls(folder, manifest, lock, resumed=old is not None)
        except BaseException:
            os.close(lock)
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not self.done:
            self.fail(error)
            is_input_error = isinstance(error, InputError) and not isinstance(error, StorageError)
            if is_input_error and not self.resumed and has_failed_without_output(self.folder, self.manifest):
                shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)

    def _write(self, **values: Any) -> None:
        self.manifest = replace(self.manifest, **values)
        write_manifest(self.folder, self.manifest)

    def fail(self, error: BaseException) -> None:
        """Write the error and the status `failed`, or `interrupted` after Ctrl-C, into the manifest.

        `resume=auto` continues such a run.
        """
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with suppress(OSError):  # on a full disk, the error that it caused counts
            self._write(status=status, error=make_printable(f"{type(error).__name__}: {error}"))

    def begin(self, config_yaml: str) -> None:
        """Write the manifest with the status `running`, and `config.yaml` with the configuration."""
        self._write(status="running", error="")  # first: without a manifest the folder is not a run's
        write_text(self.folder / "config.yaml", config_yaml)

    def record_hardware(self, hardware: Mapping[str, Any]) -> None:
        """Merge device settings into the manifest's `hardware` and write it, before the run computes.

        A replay that ends early has them too.
        """
        if hardware:
            self._write(hardware={**self.manifest.hardware, **hardware})

    def publish(self, metrics: Mapping[str, Any], hardware: Mapping[str, Any] | None = None) -> None:
        """Write the metrics, record the digests of all outputs with the status `done`, and delete the checkpoints.

        Args:
            metrics: the stage's headline metrics.
            hardware: device settings, besides those of the machine.
        """
        write_figures(self.folder, metrics)
        files_beside = (self.folder / name for name in PUBLISHED if (self.folder / name).is_file())
        files = [*files_beside, *sorted(p for p in self.artifact.rglob("*") if p.is_file())]
        self._write(
            status="done",
            error="",
            outputs={p.relative_to(self.folder).as_posix(): file_digest(p) for p in files},
            digest=compute_published_digest(self.folder / "artifact"),
            metrics=dict(metrics),
            hardware={**self.manifest.hardware, **(hardware or {})},
            times={**self.manifest.times, "finished": utc_now()},
            published=1 + find_last_publication(self.folder.parent.parent),
        )
        self.done = True
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)


def derive_name(parent: Path, label: str, digest: str) -> str:
    """Return the name of an existing run folder `*-DIGEST` in `parent`, or `label-digest` if none exists."""
    return min((path.name for path in parent.glob(f"*-{digest}")), default=f"{label}-{digest}")


def make_and_lock_folder(root: Path, stage: str, name: str, resume: str) -> tuple[Path, int]:
    """Create the folder of a run if it is missing, lock it, and return its path and the lock's file descriptor.

    With `resume=never` the folder is a new one, numbered if `name` is in use.

    Raises:
        MissingArtifact: `resume=must`, and there is no run.
        RunBusy, StorageError: As `Run.open`.
    """
    try:
        if resume == "never":
            name = find_unused_name(root / stage, name)
        folder = root / stage / name
        if resume == "must" and not (folder / FILE).is_file():
            raise MissingArtifact("resume", "must", f"there is no run to continue in {folder}", "Drop resume=must.")
        folder.mkdir(parents=True, exist_ok=True)
        return folder, lock_folder(folder)
    except AlignError:
        raise
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise StorageError("run.root", str(root), problem, "Choose another run.root or run.name.") from error


def read_same_run_or_empty_folder(folder: Path, new: Manifest, allow_other_identity: bool) -> Manifest | None:
    """Return a folder's manifest if it has the identity of `new`, or None after emptying the folder of a failed run.

    Only a run that failed without output is removed. Also returns None if there is no manifest.

    Args:
        allow_other_identity: accept a run with another identity.

    Raises:
        RunConflict: The name belongs to a run with another configuration.
    """
    if not has_file(folder / FILE, "manifest", "Move the folder away."):
        refuse_foreign(folder)
        return None
    old = read_manifest(folder)
    if allow_other_identity or old.identity == new.identity:
        return old
    if has_failed_without_output(folder, old):
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return None
    key, old_value, new_value = find_first_difference(old.identity, new.identity) or ("identity", None, None)
    remedy = "Use another run.name, or resume=never for a fresh folder."
    raise RunConflict(key.removeprefix("config."), new_value, f"the run in {folder} has {old_value}", remedy)


def refuse_foreign(folder: Path) -> None:
    """Raise InputError if a folder holds any visible files, so that a new run does not overwrite them.

    Hidden files are ignored: a killed process may leave them while it writes a manifest.
    """
    foreign_files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if foreign_files:
        problem = f"{folder} holds files that no run wrote ({', '.join(foreign_files[:3])})"
        raise InputError("run.name", folder.name, problem, "Use another run.name or run.root, or move the folder away.")


def has_failed_without_output(folder: Path, manifest: Manifest) -> bool:
    """Return whether a run failed before its stage wrote any output, so that its folder may be deleted.

    Empty files do not count as output. Links, pipes and the like do: no run makes them.
    """
    entries = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    outputs = (path for path in entries if path.is_symlink() or not path.is_file() or path.stat().st_size)
    return manifest.status == "failed" and all(path.name in OF_A_START for path in outputs)


def lock_folder(folder: Path) -> int:
    """Lock a folder for this process, or raise RunBusy, and return the file descriptor that holds the lock.

    The system frees the lock when the process ends.

    Raises:
        RunBusy: Another process holds it.
        PermissionError: The folder cannot be written, by the user's rights or because the disk is read-only.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable")
        if not folder.exists() or os.stat(folder).st_ino != os.fstat(descriptor).st_ino:
            raise BlockingIOError  # another process removed the folder
    except BlockingIOError as error:
        os.close(descriptor)
        raise RunBusy(
            "run", str(folder), "another process is working on it", "Wait for it, or use another run.name."
        ) from error
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def hold_lock(folder: Path) -> Iterator[None]:
    """Lock a folder during the block, or raise RunBusy if another process holds the lock.

    Raises:
        RunBusy, PermissionError: As for the lock itself.
    """
    lock = lock_folder(folder)
    try:
        yield
    finally:
        os.close(lock)


def record_killed_run(folder: Path, why: str) -> None:
    """Write the status `failed` and the reason into the manifest of a run whose process was killed, unless it is done.

    Raises:
        RunBusy, PermissionError: As `hold_lock`.
    """
    with hold_lock(folder):
        manifest = read_manifest(folder)
        if not manifest.done:
            write_manifest(folder, replace(manifest, status="failed", error=make_printable(why)))


def find_unused_name(parent: Path, name: str) -> str:
    """Return the first of `name`, `name-2`, `name-3`, … that does not exist in a folder."""
    candidates = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    return next(candidate for candidate in candidates if not (parent / candidate).exists())


def find_last_publication(root: Path) -> int:
    """Return the highest number in the order in which the runs of a root were published, 0 if none exists.

    Unreadable manifests are skipped. `latest` is decided by this number, because a clock may be set back.
    """
    numbers = [0]
    for path in root.glob("*/*/manifest.json"):
        with suppress(AlignError, OSError):  # an invalid file, or one of another version
            numbers.append(read_manifest(path.parent).published)
    return max(numbers)


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


NO_LOCK = -1


class FollowerRun(Run):
    """The run on ranks other than 0: it writes to a temporary folder, reads from rank 0's, and publishes nothing.

    The temporary folder is removed at the end.
    """

    def __init__(self, shared: Path, manifest: Manifest, resumed: bool) -> None:
        scratch = tempfile.mkdtemp(prefix="align-rank-", dir=os.environ.get(NOTES))
        super().__init__(Path(scratch), manifest, NO_LOCK, resumed)
        self._shared = shared
        write_launcher_note(RUN, str(shared))

    @property
    def shared(self) -> Path:
        return self._shared

    def _write(self, **values: Any) -> None:
        self.manifest = replace(self.manifest, **values)

    def begin(self, config_yaml: str) -> None:
        pass

    def publish(self, metrics: Mapping[str, Any], hardware: Mapping[str, Any] | None = None) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
