"""A run's folder: identity, lock, manifest, atomic publication, and references to what earlier runs published.

A run's identity is its resolved configuration (less where it is written and how it is watched) plus the digest of
every input. The same identity lands in the same folder: unfinished, it is continued; finished, it is returned.
The folder's own file descriptor is the lock, so no lock file is left behind.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from align.config.root import SCHEMA_VERSION
from align.errors import CorruptFile, InputError, MissingArtifact, RunBusy, RunConflict, StorageError

PACKAGES = ("align", "torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "config.json", "generation_config.json")
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template*", "added_tokens.json", "vocab*", "merges.txt")
ADAPTER = ("adapter_config.json", "*.safetensors")
SERVES_AS_SFT = ("sft", "full")
DIFF_LIMIT = 1_000_000


def file_digest(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form, hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def folder_digest(folder: Path, patterns: Iterable[str] = ("*",)) -> str:
    """sha256 over the names and contents of the files in `folder` that match `patterns`, hex."""
    files = sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()})
    return json_digest([[p.name, file_digest(p)] for p in files])


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, so that a reader or a crash sees the old file or the new one, never half."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically and durably."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@dataclass(frozen=True, slots=True)
class Base:
    """Base weights, found on disk.

    Attributes:
        id: what the user called them: `pocket`, a hub id, or a folder.
        path: the folder (or snapshot) that holds them.
        revision: the hub's commit, where there is one.
        digest: sha256 over weights, configuration and tokenizer; what `latest` compares.
    """

    id: str
    path: str
    revision: str | None
    digest: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """Something an earlier run published.

    Attributes:
        ref: the reference it was found by.
        path: the folder with the adapter or the model.
        digest: sha256 over its weights and configuration.
        base: the weights it belongs to; for a whole model, the model itself.
        whole: True for a whole model (`stage=full`), False for an adapter.
        manifest: its run's manifest, empty for a bare folder.
    """

    ref: str
    path: Path
    digest: str
    base: Base | None
    whole: bool
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """What a later run's manifest says of it as a parent."""
        run = {k: self.manifest[k] for k in ("stage", "name") if k in self.manifest}
        return {"ref": self.ref, "path": str(self.path), "digest": self.digest, "whole": self.whole, **run}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run's folder.

    Raises:
        CorruptFile: it is no JSON object.
        InputError: another schema version wrote it.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile("manifest", str(path), "is not a run's manifest", "Move the folder away.") from error
    if found != SCHEMA_VERSION:
        raise InputError(
            "schema_version", found, f"{path} was written by another version", "Read it with that version of align."
        )
    return manifest


def artifact_in(folder: Path, ref: str, verify: bool = True) -> Artifact:
    """The artifact of a done run's folder, or a bare folder with an adapter or a model in it.

    Raises:
        MissingArtifact: the run is not done, or the folder holds neither.
        CorruptFile: a published file is not what its manifest says.
    """
    manifest: dict[str, Any] = {}
    if (folder / "manifest.json").is_file():
        manifest = read_manifest(folder)
        if manifest["status"] != "done":
            raise MissingArtifact(
                "reference", ref, f"the run in {folder} is {manifest['status']}, not done",
                "Run the same command again to finish it.",
            )  # fmt: skip
        if verify:
            verify_outputs(folder, manifest)
        folder = folder / "artifact"
    elif folder.name == "artifact" and (folder.parent / "manifest.json").is_file():
        return artifact_in(folder.parent, ref, verify)
    whole = (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
    digest = folder_digest(folder, (*WEIGHTS, *TOKENIZER) if whole else ADAPTER)
    if whole:
        base = Base(ref, str(folder), None, digest)
    else:
        base = Base(**manifest["base"]) if manifest.get("base") else None
    return Artifact(ref, folder, digest, base, whole, manifest)


def verify_outputs(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise `CorruptFile` unless every published file is there and hashes to what the manifest says."""
    for name, digest in manifest.get("outputs", {}).items():
        path = folder / name
        if not path.is_file() or file_digest(path) != digest:
            problem = "is missing" if not path.is_file() else "is not the file that was published (its sha256 differs)"
            raise CorruptFile("file", str(path), problem, "Restore it, or make it again with resume=never.")


def resolve(ref: str, root: Path, base_digest: str | None = None, field_name: str = "reference") -> Artifact:
    """Find what a reference names: a path, `stage:latest`, `stage:NAME`, or `hub:org/name`.

    `latest` is the newest done run, on the base `base_digest` where that is given; `sft:` also finds `full` runs.

    Raises:
        MissingArtifact: nothing is there; the message says which command produces it.
    """
    if ref.startswith("hub:"):
        return artifact_in(hub_snapshot(ref[4:], None, field_name), ref)
    path = Path(ref).expanduser()
    if path.is_dir():
        return artifact_in(path, ref)
    stage, colon, name = ref.partition(":")
    if not colon or not re.fullmatch(r"[a-z]+", stage):
        raise MissingArtifact(
            field_name, ref, "is neither a folder nor a reference", "Write a path, stage:latest, stage:NAME or hub:ID."
        )
    stages = SERVES_AS_SFT if stage == "sft" else (stage,)
    produce = f"Make it with: python -m align stage={stage}"
    if name != "latest":
        for candidate in stages:
            if (root / candidate / name / "manifest.json").is_file():
                return artifact_in(root / candidate / name, ref)
        raise MissingArtifact(field_name, ref, f"there is no such run under {root}", produce + f" run.name={name}")
    done = []
    for candidate in stages:
        for manifest_path in (root / candidate).glob("*/manifest.json"):
            manifest = read_manifest(manifest_path.parent)
            if manifest["status"] == "done":
                done.append((manifest["times"]["finished"], manifest_path.parent))
    for _, folder in sorted(done, reverse=True):
        artifact = artifact_in(folder, f"{folder.parent.name}:{folder.name}", verify=False)
        if base_digest is None or (artifact.base is not None and artifact.base.digest == base_digest):
            verify_outputs(folder, artifact.manifest)
            return artifact
    on_base = " on this base" if done else ""
    raise MissingArtifact(field_name, ref, f"no finished {stage} run{on_base} under {root}", produce)


def hub_snapshot(repo: str, revision: str | None, field_name: str) -> Path:
    """The local snapshot of a hub repository, downloaded where need be: safetensors and text files only.

    Raises:
        InputError: offline, missing or gated, each with its remedy.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise InputError(
            field_name, repo, "the hub gates this repository", "Accept its terms on the hub, then run `hf auth login`."
        ) from error
    except HFValidationError as error:
        raise InputError(
            field_name, repo, "is neither a folder here nor a hub id", "Give a folder, or an id like ORG/NAME."
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            field_name,
            repo,
            "the hub has no such repository, or it is private",
            "Check the id, or run `hf auth login`.",
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            field_name, repo, "the hub cannot be reached and no copy is cached",
            "Download it where there is a network and give the folder as the path.",
        ) from error  # fmt: skip


IDENTITY_LESS = ("run", "resume", "track")


def identity_of(config: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run this run: its configuration without `run`, `resume` and `track`, and its inputs' digests."""
    kept = {k: v for k, v in config.items() if k not in IDENTITY_LESS}
    return {"config": kept, "inputs": {k: v.get("digest") for k, v in inputs.items()}}


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
        if resume == "never":
            name = unused(root / stage, name)
        folder = root / stage / name
        known = (folder / "manifest.json").is_file()
        if resume == "must" and not known:
            raise MissingArtifact("resume", "must", f"there is no run to continue in {folder}", "Drop resume=must.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder, os.O_RDONLY)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"{folder} is not writable")
        except OSError as error:
            raise StorageError(
                "run.root", str(root), f"cannot be written ({error.strerror or error})", "Choose another run.root."
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise RunBusy(
                "run", str(folder), "another process is working on it", "Wait for it, or use another run.name."
            ) from error
        manifest = new_manifest(stage, name, identity, inputs, base, config["seed"])
        done = False
        try:
            if known:
                old = read_manifest(folder)
                if old.get("identity") != identity:
                    key, was, now = first_difference(old.get("identity"), identity) or ("identity", None, None)
                    raise RunConflict(
                        key.removeprefix("config."), now, f"the run in {folder} has {was}",
                        "Use another run.name, or resume=never for a fresh folder.",
                    )  # fmt: skip
                done = old["status"] == "done"
                manifest = old if done else manifest | {"times": {**manifest["times"], "first_started": started(old)}}
        except BaseException:
            os.close(lock)
            raise
        return cls(folder, manifest, lock, done, resumed=known and not done)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and not self.done:
            self.manifest["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self.manifest["error"] = f"{type(error).__name__}: {error}"
            with suppress(OSError):  # a full disk must not hide the error that it caused
                write_json(self.folder / "manifest.json", self.manifest)
        os.close(self._lock)

    def begin(self, config_yaml: str) -> None:
        """Write down what is about to run."""
        write_text(self.folder / "config.yaml", config_yaml)
        self.manifest["status"] = "running"
        write_json(self.folder / "manifest.json", self.manifest)

    def publish(self, metrics: Mapping[str, Any]) -> None:
        """Hash every output and only then say `done`."""
        outputs = [self.folder / "report.html", *sorted(p for p in self.artifact.rglob("*") if p.is_file())]
        self.manifest["outputs"] = {str(p.relative_to(self.folder)): file_digest(p) for p in outputs if p.is_file()}
        self.manifest["metrics"] = dict(metrics)
        self.manifest["times"]["finished"] = now()
        self.manifest["status"] = "done"
        self.manifest.pop("error", None)
        write_json(self.folder / "manifest.json", self.manifest)
        self.done = True
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)


def unused(parent: Path, name: str) -> str:
    """`name`, or the first of `name-2`, `name-3`, … that no folder has."""
    candidate, n = name, 1
    while (parent / candidate).exists():
        n += 1
        candidate = f"{name}-{n}"
    return candidate


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
        return subprocess.run(("git", *arguments), capture_output=True, text=True, check=True, timeout=20).stdout

    try:
        commit, diff = git("rev-parse", "HEAD").strip(), git("diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    kept = diff if len(diff) <= DIFF_LIMIT else f"(left out: {len(diff)} characters, sha256 {json_digest(diff)})"
    return {"commit": commit, "diff": kept} if diff else {"commit": commit}
