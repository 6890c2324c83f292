"""A run's folder: identity, lock, manifest and atomic publication."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from align.config.root import SCHEMA_VERSION
from align.errors import AlignError, MissingArtifact, RunBusy, RunConflict, StorageError, readable
from align.redaction import masked_tree, redacted, unmarked
from align.run.artifacts import Base, read_manifest
from align.run.files import file_digest, json_digest, write_json, write_text

PACKAGES = ("align", "torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate")
DIFF_LIMIT = 1_000_000
IDENTITY_LESS = ("run", "resume", "track")
OF_A_START = ("manifest.json", "config.yaml", "log.txt")
"""Files that a run has before its stage has done anything."""


def identity_of(config: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run this run: its configuration without `run`, `resume` and `track`, and its inputs' digests. A
    store is its URL without the password."""
    kept = {k: v for k, v in config.items() if k not in IDENTITY_LESS}
    return {"config": unmarked(masked_tree(kept)), "inputs": {k: v.get("digest") for k, v in inputs.items()}}


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first key where two trees differ, with both values; None where they are equal."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            if found := first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key):
                return found
        return None
    return None if old == new else (path, old, new)


class Run:
    """One run's folder, held under a lock. Made by `Run.open`, used as a context manager.

    Attributes:
        folder: `<root>/<stage>/<name>`.
        inputs: name → record of every resolved input (`digest` always among its keys).
        done: True where this very run was published before.
        resumed: True where an unfinished folder is continued.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], lock: int, done: bool, resumed: bool) -> None:
        self.folder, self.manifest, self._lock = folder, manifest, lock
        self.done, self.resumed = done, resumed

    @property
    def inputs(self) -> Mapping[str, Any]:
        return self.manifest["inputs"]

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
        inputs: Mapping[str, Mapping[str, Any]],
        base: Base | None,
        label: str,
        resume: str = "auto",
    ) -> Run:
        """Find or make the folder of this run and lock it.

        Args:
            config: the resolved configuration as plain values.
            inputs: every resolved input, each with its `digest`.
            base: the base weights the stage works on.
            label: the readable part of a derived name.
            resume: `auto` continues what is unfinished, `never` makes a new folder, `must` refuses to start afresh.

        Raises:
            RunBusy: another process holds it.
            RunConflict: the name is taken by another configuration.
            StorageError: the folder cannot be written.
        """
        stage, root = config["stage"]["name"], Path(config["run"]["root"]).expanduser()
        identity = identity_of(config, inputs)
        name = config["run"]["name"] or f"{label}-{json_digest(identity)[:8]}"
        try:
            if resume == "never":
                name = unused(root / stage, name)
            folder = root / stage / name
            if resume == "must" and not (folder / "manifest.json").is_file():
                raise MissingArtifact("resume", "must", f"there is no run to continue in {folder}", "Drop resume=must.")
            folder.mkdir(parents=True, exist_ok=True)
            lock = locked(folder)
        except AlignError:
            raise
        except OSError as error:
            raise StorageError(
                "run.root", str(root), f"cannot be written ({error.strerror or error})",
                "Choose another run.root or run.name.",
            ) from error  # fmt: skip
        try:
            manifest = new_manifest(stage, name, identity, inputs, base, config["seed"])
            known, done = (folder / "manifest.json").is_file(), False  # under the lock: nobody finishes it meanwhile
            if known:
                old = read_manifest(folder)
                known_as = unmarked(masked_tree(old.get("identity")))  # one of an older align may have the password
                if known_as != identity and came_to_nothing(folder, old):
                    for path in folder.iterdir():
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                    known, old = False, {}
                elif known_as != identity:
                    key, was, now = first_difference(known_as, identity) or ("identity", None, None)
                    raise RunConflict(
                        key.removeprefix("config."), now, f"the run in {folder} has {was}",
                        "Use another run.name, or resume=never for a fresh folder.",
                    )  # fmt: skip
                done = old.get("status") == "done"
                if done:  # it may have been killed between saying so and this
                    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                manifest = old if done else manifest | {"times": {**manifest["times"], "first_started": started(old)}}
        except BaseException:
            os.close(lock)
            raise
        return cls(folder, manifest, lock, done, resumed=known and not done)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not self.done:
            self.fail(error)
        os.close(self._lock)

    def _write_manifest(self) -> None:
        write_json(self.folder / "manifest.json", masked_tree(self.manifest))

    def fail(self, error: BaseException) -> None:
        """Write down why this run ended before it was published; `resume=auto` continues it."""
        self.manifest["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        self.manifest["error"] = readable(f"{type(error).__name__}: {error}")
        with suppress(OSError):  # a full disk must not hide the error that it caused
            self._write_manifest()

    def begin(self, config_yaml: str) -> None:
        """Write down what is about to run."""
        write_text(self.folder / "config.yaml", config_yaml)
        self.manifest["status"] = "running"
        self._write_manifest()

    def publish(self, metrics: Mapping[str, Any]) -> None:
        """Hash every output and only then say `done`."""
        outputs = [self.folder / "report.html", *sorted(p for p in self.artifact.rglob("*") if p.is_file())]
        self.manifest["outputs"] = {str(p.relative_to(self.folder)): file_digest(p) for p in outputs if p.is_file()}
        self.manifest["metrics"] = dict(metrics)
        self.manifest["times"]["finished"] = now()
        self.manifest["published"] = 1 + last_published(self.folder.parent.parent)
        self.manifest["status"] = "done"
        self.manifest.pop("error", None)
        self._write_manifest()
        self.done = True
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)


def came_to_nothing(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a run failed before it made anything: on bad input, say. Its name is free for another one."""
    made = (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    return manifest["status"] == "failed" and all(path.name in OF_A_START for path in made)


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
    except BlockingIOError as error:
        os.close(descriptor)
        raise RunBusy(
            "run", str(folder), "another process is working on it", "Wait for it, or use another run.name."
        ) from error
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


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
            number = read_manifest(path.parent).get("published")
            numbers.append(number if isinstance(number, int) else 0)
    return max(numbers)


def started(manifest: Mapping[str, Any]) -> str:
    times = manifest.get("times", {})
    return times.get("first_started") or times.get("started", "")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def new_manifest(
    stage: str, name: str, identity: Any, inputs: Mapping[str, Any], base: Base | None, seed: int
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "new",
        "stage": stage,
        "name": name,
        "seed": seed,
        "identity": identity,
        "inputs": {k: dict(v) for k, v in inputs.items()},
        "base": asdict(base) if base else None,
        "outputs": {},
        "metrics": {},
        "times": {"started": now()},
        "git": git_state(),
        "packages": package_versions(),
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "system": platform.platform()},
    }


def package_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def git_state() -> dict[str, Any] | None:
    """Commit and uncommitted difference of the folder the command runs in; None where that is no git checkout."""

    def git(*arguments: str) -> str:
        ran = subprocess.run(("git", *arguments), capture_output=True, check=True, timeout=20)
        return ran.stdout.decode(errors="replace")

    try:
        commit, diff = git("rev-parse", "HEAD").strip(), git("diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    kept = diff if len(diff) <= DIFF_LIMIT else f"(left out: {len(diff)} characters, sha256 {json_digest(diff)})"
    return {"commit": commit, "diff": redacted(kept)} if diff else {"commit": commit}
