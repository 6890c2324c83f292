"""A run's folder: identity, lock, manifest and atomic publication."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align.core.errors import AlignError, InputError, MissingArtifact, RunBusy, RunConflict, StorageError, readable
from align.core.files import has_file, user_path
from align.core.redaction import masked_tree
from align.ranks import NOTES, RUN, tell_launcher
from align.run.digests import file_digest, json_digest
from align.run.environment import code_digest, git_state, machine, own_commit, package_versions
from align.run.figures import write_figures
from align.run.files import write_text
from align.run.manifest import FILE, Base, Input, Manifest, identity_of, read_manifest, write_manifest
from align.run.weights import published_digest

MISSING = "(missing)"
OF_A_START = ("manifest.json", "config.yaml", "log.txt", "report.html", "trained_on.jsonl",
              "trained_ids.parquet", "stale.json")  # fmt: skip
"""Files that a run has before its stage has computed anything."""
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
"""Files beside the artifact that a done run answers for."""


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first key where two trees differ, with both values; None where they are equal."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            was, now = old.get(key, MISSING), new.get(key, MISSING)
            if found := first_difference(was, now, f"{path}.{key}" if path else key):
                return found
        return None
    return None if old == new else (path, old, new)


class Run:
    """One run's folder, held under a lock. Made by `Run.open`, used as a context manager.

    Attributes:
        folder: `<root>/<stage>/<name>`.
        manifest: what is known of it so far.
        done: True where this very run was published before.
        resumed: True where an unfinished folder is continued.
        known_metrics: what a stage knows of its metrics before it ends, such as the rows that it kept, for whoever
            looks at its page meanwhile.
    """

    def __init__(self, folder: Path, manifest: Manifest, lock: int, resumed: bool) -> None:
        self.folder, self.manifest, self._lock = folder, manifest, lock
        self.done, self.resumed = manifest.done, resumed
        self.known_metrics: dict[str, Any] = {}

    @property
    def shared(self) -> Path:
        """The folder that every rank reads what was written from."""
        return self.folder

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def inputs(self) -> Mapping[str, Input]:
        return self.manifest.inputs

    @property
    def base(self) -> Base:
        """The base weights that the stage works on."""
        assert self.manifest.base is not None
        return self.manifest.base

    @property
    def artifact(self) -> Path:
        """Where the stage puts what it produces."""
        return self._made("artifact")

    @property
    def checkpoints(self) -> Path:
        """Where the stage puts what it needs to continue."""
        return self._made("checkpoints")

    def _made(self, name: str) -> Path:
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
        """Find or make the folder of this run and lock it.

        Args:
            config: the resolved configuration as plain values.
            inputs: every resolved input.
            base: the base weights the stage works on.
            label: the readable part of a derived name.
            resume: `auto` continues what is unfinished, `never` makes a new folder, `must` refuses to start afresh.
            again: it is a server, which is started again in its folder, whatever its line says by now.

        Raises:
            RunBusy: another process holds it.
            RunConflict: the name is taken by another configuration.
            StorageError: the folder cannot be written.
        """
        stage, root = config["stage"]["name"], user_path(config["run"]["root"], "run.root")
        identity = identity_of(stage, config, inputs, base)
        name = config["run"]["name"] or derived_name(root / stage, label, json_digest(identity)[:8])
        folder, lock = claimed(root, stage, name, resume)
        try:
            new = Manifest(stage, folder.name, config["seed"], masked_tree(config), inputs, base)
            found = known(folder, new, again)  # under the lock: nobody finishes it meanwhile
            if found is not None and found.done and not again:  # it may have been killed between saying so and this
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                return cls(folder, found, lock, resumed=False)
            times = {"started": now(), **({"first_started": started(found)} if found else {})}
            facts = {
                "code": code_digest(), "commit": own_commit(), "git": git_state(), "packages": package_versions(),
                "hardware": machine(),
            }  # fmt: skip
            return cls(folder, replace(new, times=times, **facts), lock, resumed=found is not None)
        except BaseException:
            os.close(lock)
            raise

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not self.done:
            self.fail(error)
            refused = isinstance(error, InputError) and not isinstance(error, StorageError)
            if refused and not self.resumed and failed_without_output(self.folder, self.manifest):
                shutil.rmtree(self.folder, ignore_errors=True)  # the message said it all
        os.close(self._lock)

    def _write(self, **values: Any) -> None:
        self.manifest = replace(self.manifest, **values)
        write_manifest(self.folder, self.manifest)

    def fail(self, error: BaseException) -> None:
        """Write down why this run ended before it was published; `resume=auto` continues it."""
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with suppress(OSError):  # a full disk must not hide the error that it caused
            self._write(status=status, error=readable(f"{type(error).__name__}: {error}"))

    def begin(self, config_yaml: str) -> None:
        """Write down what is about to run."""
        self._write(status="running", error="")  # first: a folder without it is not a run's
        write_text(self.folder / "config.yaml", config_yaml)

    def note_hardware(self, hardware: Mapping[str, Any]) -> None:
        """Write down what the run computes on, before it computes: a replay that ends early has it too."""
        if hardware:
            self._write(hardware={**self.manifest.hardware, **hardware})

    def publish(self, metrics: Mapping[str, Any], hardware: Mapping[str, Any] | None = None) -> None:
        """Hash every output and only then say `done`.

        Args:
            metrics: the stage's headline figures.
            hardware: what it was computed on, besides the machine.
        """
        write_figures(self.folder, metrics)
        beside = (self.folder / name for name in PUBLISHED if (self.folder / name).is_file())
        files = [*beside, *sorted(p for p in self.artifact.rglob("*") if p.is_file())]
        self._write(
            status="done",
            error="",
            outputs={p.relative_to(self.folder).as_posix(): file_digest(p) for p in files},
            digest=published_digest(self.folder / "artifact"),
            metrics=dict(metrics),
            hardware={**self.manifest.hardware, **(hardware or {})},
            times={**self.manifest.times, "finished": now()},
            published=1 + last_published(self.folder.parent.parent),
        )
        self.done = True
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)


def derived_name(parent: Path, label: str, digest: str) -> str:
    """`label-digest`; the name of the folder that has the digest already, whatever it was labelled."""
    found = sorted(path.name for path in parent.glob(f"*-{digest}"))
    return found[0] if found else f"{label}-{digest}"


def claimed(root: Path, stage: str, name: str, resume: str) -> tuple[Path, int]:
    """The folder of a run, made where it is not there, and its lock.

    Raises:
        MissingArtifact: `resume=must`, and there is none.
        RunBusy, StorageError: as `Run.open`.
    """
    try:
        if resume == "never":
            name = unused(root / stage, name)
        folder = root / stage / name
        if resume == "must" and not (folder / FILE).is_file():
            raise MissingArtifact("resume", "must", f"there is no run to continue in {folder}", "Drop resume=must.")
        folder.mkdir(parents=True, exist_ok=True)
        return folder, locked(folder)
    except AlignError:
        raise
    except OSError as error:
        raise StorageError(
            "run.root", str(root), f"cannot be written ({error.strerror or error})",
            "Choose another run.root or run.name.",
        ) from error  # fmt: skip


def known(folder: Path, new: Manifest, again: bool) -> Manifest | None:
    """The manifest that a run's folder has, of this very run; None where it has none, or where another run of that name
    came to nothing, which is cleared away.

    Args:
        again: a run that was another then is this one all the same.

    Raises:
        RunConflict: the name is taken by another configuration.
    """
    if not has_file(folder / FILE, "manifest", "Move the folder away."):
        refuse_foreign(folder)
        return None
    old = read_manifest(folder)
    was, wanted = old.identity, new.identity
    if was == wanted or again:
        return old
    if failed_without_output(folder, old):
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return None
    key, there, here = first_difference(was, wanted) or ("identity", None, None)
    raise RunConflict(
        key.removeprefix("config."), here, f"the run in {folder} has {there}",
        "Use another run.name, or resume=never for a fresh folder.",
    )  # fmt: skip


def refuse_foreign(folder: Path) -> None:
    """Raise InputError if a folder without a manifest holds files: no run wrote them, and a run would replace some.
    A hidden one may be what a killed process left of a manifest."""
    foreign = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if foreign:
        problem = f"{folder} holds files that no run wrote ({', '.join(foreign[:3])})"
        raise InputError("run.name", folder.name, problem, "Use another run.name or run.root, or move the folder away.")


def failed_without_output(folder: Path, manifest: Manifest) -> bool:
    """Return whether a run failed before it wrote any output, so that its folder may be removed. A link, a pipe and
    the like are not the run's, whatever their size."""
    entries = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    outputs = (path for path in entries if path.is_symlink() or not path.is_file() or path.stat().st_size)
    return manifest.status == "failed" and all(path.name in OF_A_START for path in outputs)


def locked(folder: Path) -> int:
    """A descriptor of `folder` that holds its lock; the system frees it when the process ends, however it ends.

    Raises:
        RunBusy: another process holds it.
        PermissionError: the folder cannot be written (a user's rights, or a disk mounted read-only).
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable")
        if not folder.exists() or os.stat(folder).st_ino != os.fstat(descriptor).st_ino:
            raise BlockingIOError  # whoever held it has taken it away
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
    """Hold the lock of a folder around a block.

    Raises:
        RunBusy, PermissionError: as `locked`.
    """
    lock = locked(folder)
    try:
        yield
    finally:
        os.close(lock)


def ended(folder: Path, why: str) -> None:
    """Write down why a run has ended whose process was killed, and could not.

    Raises:
        RunBusy, PermissionError: as `locked`.
    """
    with hold_lock(folder):
        manifest = read_manifest(folder)
        if not manifest.done:
            write_manifest(folder, replace(manifest, status="failed", error=readable(why)))


def unused(parent: Path, name: str) -> str:
    """`name`, or the first of `name-2`, `name-3`, … that no folder has."""
    candidate, n = name, 1
    while (parent / candidate).exists():
        n += 1
        candidate = f"{name}-{n}"
    return candidate


def last_published(root: Path) -> int:
    """The highest number of publication among the runs of a root: `latest` goes by it, not by a clock that may be set
    back."""
    numbers = [0]
    for path in root.glob("*/*/manifest.json"):
        with suppress(AlignError, OSError):  # a stranger's file, or one of another version, has none
            numbers.append(read_manifest(path.parent).published)
    return max(numbers)


def started(manifest: Manifest) -> str:
    return manifest.times.get("first_started") or manifest.times.get("started", "")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


NO_LOCK = -1


class Following(Run):
    """Attributes:
    folder: a temporary one, removed in the end, so that a stage may write there as the first rank does.
    """

    def __init__(self, shared: Path, manifest: Manifest, resumed: bool) -> None:
        scratch = tempfile.mkdtemp(prefix="align-rank-", dir=os.environ.get(NOTES))
        super().__init__(Path(scratch), manifest, NO_LOCK, resumed)
        self._shared = shared
        tell_launcher(RUN, str(shared))

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
