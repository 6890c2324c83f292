"""Artifacts of runs, and references to them: a path, `sft:latest`, `sft:NAME`, `@ALIAS`, `hub:org/name`."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.config.root import DEFAULT_ROOT
from align.config.stages import WITH_RUNS
from align.core.errors import CorruptFile, InputError, MissingArtifact
from align.core.files import parse_user_path
from align.run.alias_log import SIGN, AliasTarget, Change, describe_arms, read_alias_log
from align.run.digests import lookup_digest
from align.run.files import read_json_object
from align.run.hub import HUB, hub_snapshot
from align.run.manifest import FILE, Base, Input, Manifest, read_manifest
from align.run.weights import adapter_digest, model_digest, tokenizer_digest

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "config.json", "generation_config.json")
SERVES_AS_SFT = ("sft", "full")
REPLACED = "replaced.json"
"""Name of the file that is left in an artifact whose other files were removed. It holds `by` and `reason`; if a run
made a replacement, `by` is that run, and `folder` its folder."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """An adapter or a model that a run published, or a folder with one that no run made.

    Attributes:
        ref: reference that it was found by.
        path: folder with the adapter or the model.
        digest: SHA-256 over its weights and configuration.
        base: base weights it belongs to; a whole model is its own base.
        whole: True for a whole model (`stage=full`), False for an adapter.
        manifest: its run's manifest; None for a bare folder.
        alias: name and log link of the alias that it was found by; empty otherwise.
    """

    ref: str
    path: Path
    digest: str
    base: Base | None
    whole: bool
    manifest: Manifest | None = None
    alias: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> str | None:
        """The dtype in which the artifact's run computed, such as `bfloat16`; None if it was not recorded."""
        if self.manifest is None:
            return None
        dtype = self.manifest.config.get("dtype", "auto")
        return self.manifest.hardware.get("dtype") if dtype == "auto" else dtype

    def as_input(self) -> Input:
        """Return the record of this artifact for the `inputs` of a later run's manifest."""
        path = str(self.path.absolute())  # a later run may start in another folder
        if self.manifest is None:  # its digest covers the tokenizer too
            return Input(self.digest, self.ref, path, whole=self.whole)
        return Input(
            self.digest,
            self.ref,
            path,
            self.manifest.stage,
            self.manifest.name,
            self.whole,
            tokenizer="" if self.whole else tokenizer_digest(self.path),
            details={"alias": dict(self.alias)} if self.alias else {},
        )


def load_artifact(folder: Path, ref: str, verify: bool = True) -> Artifact:
    """Return the artifact in the folder of a finished run, or in a folder with just an adapter or a model.

    Hashes its weights into `digest`. The weights are not loaded.

    Args:
        ref: the user's reference to it.
        verify: compare all published files with the manifest. If False, unreadable weights have an empty digest.

    Raises:
        MissingArtifact: The run is not done, or the folder holds neither.
        CorruptFile: A published file differs from the manifest.
        InputError: The model has a form that is not read, see `align.run.weights`.
    """
    manifest: Manifest | None = None
    is_bare = any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))
    if (folder / "manifest.json").is_file() and not is_bare:
        manifest = read_manifest(folder)
        if not manifest.done:
            problem = f"the run in {folder} is {manifest.status}, not done"
            raise MissingArtifact("reference", ref, problem, "Run the same command again to finish it.")
        if verify:
            verify_outputs(folder, manifest.outputs)
        folder = folder / "artifact"
    elif folder.name == "artifact" and (folder.parent / "manifest.json").is_file():
        return load_artifact(folder.parent, ref, verify)
    has_adapter = (folder / "adapter_config.json").is_file()
    is_whole = (folder / "config.json").is_file() and not has_adapter
    if not (is_whole or has_adapter or manifest):
        problem = f"{folder} holds neither an adapter nor a model"
        remedy = "Give a run's folder, or one with adapter_config.json or config.json in it."
        raise MissingArtifact("reference", ref, problem, remedy)
    try:
        digest = model_digest(folder, "reference", ref) if is_whole else adapter_digest(folder, bare=not manifest)
    except InputError:
        if verify:
            raise
        digest = ""  # an ancestor whose weights were removed: equal to no other
    base = manifest.base if manifest else None
    if is_whole:  # a hub model's base has its id and revision
        revision = folder.name if ref.startswith(HUB) else None
        base = Base(ref.removeprefix(HUB), str(folder.absolute()), revision, digest)
    return Artifact(ref, folder, digest, base, is_whole, manifest)


def read_replacement(artifact: Path, field: str) -> dict[str, Any] | None:
    """Return the content of `replaced.json` in an artifact whose files were removed, or None if there is no such file.

    Raises:
        CorruptFile: The file is not a JSON object.
    """
    return (
        read_json_object(artifact / REPLACED, field, "Remove the folder.") if (artifact / REPLACED).is_file() else None
    )


def require_not_replaced(artifact: Path, field: str) -> None:
    """Raise MissingArtifact if an artifact has a `replaced.json`, because its files were removed on purpose.

    The message names the replacement, if any.
    """
    note = read_replacement(artifact, field)
    if note is None:
        return
    if "folder" not in note:
        problem = f"was removed by {note.get('by')} at {note.get('at')}: {note.get('reason')}"
        remedy = "Make it again: its manifest has the command's settings."
    else:
        problem = f"was replaced by {note.get('by')}: {note.get('reason')}"
        remedy = f"Name {note.get('by')}; it lies in {note.get('folder')}."
    raise MissingArtifact(field, str(artifact), problem, remedy)


def verify_outputs(folder: Path, outputs: Mapping[str, str]) -> None:
    """Raise CorruptFile unless every published file exists and has the SHA-256 in `outputs`, a file name → digest
    mapping.

    Raises:
        MissingArtifact: The files were removed or replaced on purpose.
    """
    require_not_replaced(folder / "artifact", "run")
    for name, digest in outputs.items():
        path = folder / name
        if not path.is_file() or lookup_digest(path) != digest:
            problem = "is missing" if not path.is_file() else "is not the file that was published (its sha256 differs)"
            raise CorruptFile("file", str(path), problem, "Restore it, or make it again with resume=never.")


def resolve(ref: str, root: Path, base_digest: str | None = None, field_name: str = "reference") -> Artifact:
    """Return the artifact for a reference: a path, `stage:latest`, `stage:NAME`, `@ALIAS`, or `hub:org/name`.

    A model on the hub is downloaded.

    `latest` is the done run that was published last, on the base `base_digest` if that is given. `sft:` also finds
    `full` runs.

    Raises:
        MissingArtifact: Nothing matches. The message names the command that produces it.
    """
    if ref.startswith(SIGN):
        return resolve_alias(ref, root, field_name)
    if ref.startswith(HUB):
        return load_artifact(hub_snapshot(ref.removeprefix(HUB), None, field_name), ref)
    path = parse_user_path(ref, field_name)
    if path.is_dir():
        return load_artifact(path, ref)
    stage, colon, name = ref.partition(":")
    if not colon or stage not in WITH_RUNS:
        stage_names = ", ".join(WITH_RUNS)
        remedy = (
            f"Write a path, base, hub:ID, @ALIAS, STAGE:latest or STAGE:NAME, with one of the stages {stage_names}."
        )
        raise MissingArtifact(field_name, ref, "is neither a folder nor a reference", remedy)
    stages = SERVES_AS_SFT if stage == "sft" else (stage,)
    root_option = "" if root == Path(DEFAULT_ROOT) else f" run.root={shlex.quote(str(root))}"
    command = f"python -m align stage={stage}{root_option}"
    if name != "latest":
        return load_artifact(find_run(stages, name, root, ref, field_name, command), ref)
    folders = list_done_runs(stages, root)
    for folder in folders:
        artifact = load_artifact(folder, f"{folder.parent.name}:{folder.name}", verify=False)
        if base_digest is None or (artifact.base is not None and artifact.base.digest == base_digest):
            verify_outputs(folder, artifact.manifest.outputs if artifact.manifest else {})
            return artifact
    on_base = " on this base" if folders else ""
    raise MissingArtifact(field_name, ref, f"no finished {stage} run{on_base} under {root}", f"Make it with: {command}")


def resolve_alias(ref: str, root: Path, field_name: str) -> Artifact:
    """Return the artifact that `@ALIAS` refers to now, or raise InputError if it refers to several.

    Raises:
        MissingArtifact: There is no such alias, or its artifact is gone.
        InputError: It refers to several artifacts.
        CorruptFile: The log of aliases, or a file of the artifact, was altered.
    """
    change = find_alias_change(ref, root, field_name)
    first = change.arms[0]
    if len(change.arms) > 1:
        problem = f"points at several artifacts: {describe_arms(change.arms)}"
        raise InputError(field_name, ref, problem, f"Name one of them: {field_name}={first.ref}.")
    return load_alias_target(first, change, ref, root, field_name)


def find_alias_change(ref: str, root: Path, field_name: str) -> Change:
    """Return the newest log record of `@ALIAS`, which lists its current targets.

    Raises:
        MissingArtifact: There is no such alias. The message names the most similar one.
    """
    log = read_alias_log(root)
    alias = ref.removeprefix(SIGN)
    changes = log.get_current_changes()
    if (change := changes.get(alias)) is not None:
        return change
    similar = difflib.get_close_matches(alias, changes, n=1)
    hint = f"Did you mean {SIGN}{similar[0]}? " if similar else ""
    action = f"stage.action=promote stage.alias={shlex.quote(alias)}"
    command = f"python -m align stage=registry {action} artifact=STAGE:NAME stage.why=REASON"
    last = log.last(alias)
    problem = f"was retired by {last.who} at {last.at[:19]}: {last.why}" if last else f"is no alias under {root}"
    raise MissingArtifact(field_name, ref, problem, f"{hint}Make it with: {command}")


def load_alias_target(arm: AliasTarget, change: Change, ref: str, root: Path, field_name: str) -> Artifact:
    """Return the artifact of an alias target: from the run it names, or else any run under `root` with the same digest.

    Raises:
        MissingArtifact: It is gone.
    """
    stage, _, name = arm.ref.partition(":")
    folder: Path | None = root / stage / name
    manifest = try_read_manifest(folder)
    if manifest is None or not has_published(folder, manifest, arm.digest):
        folder = find_run_by_digest(arm.digest, root)
    if folder is None:
        problem = f"points at {arm.ref} ({arm.digest[:12]}), which was removed or made again"
        remedy = f"Restore the run, or promote another: stage=registry stage.action=promote stage.alias={change.alias}."
        raise MissingArtifact(field_name, ref, problem, remedy)
    alias = {"name": change.alias, "seq": change.seq, "hash": change.hash}
    return replace(load_artifact(folder, ref), alias=alias)


def has_published(folder: Path, manifest: Manifest, digest: str) -> bool:
    """Return whether a run is finished and its artifact has this digest."""
    return manifest.done and digest == (manifest.digest or load_artifact(folder, str(folder), verify=False).digest)


def try_read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest in a run's folder, or None if it is missing or cannot be read."""
    with suppress(InputError):
        return read_manifest(folder)
    return None


def find_run_by_digest(digest: str, root: Path, stage: str = "*") -> Path | None:
    """Return the folder of a finished run that published weights with this digest, or None if no run did.

    Unreadable manifests are skipped.
    """
    for path in sorted(root.glob(f"{stage}/*/{FILE}")):
        manifest = try_read_manifest(path.parent)
        if manifest and manifest.done and manifest.digest == digest != "":
            return path.parent
    return None


def find_run(stages: Sequence[str], name: str, root: Path, ref: str, field_name: str, command: str) -> Path:
    """Return the folder of the run called `name` in the first of `stages` that has one, finished or not.

    Raises:
        MissingArtifact: No run has this name. The message names the most similar run, and the command that makes one.
    """
    for candidate in stages:
        if os.path.lexists(root / candidate / name / "manifest.json"):
            return root / candidate / name
    names = [path.parent.name for stage in stages for path in (root / stage).glob("*/manifest.json")]
    similar = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {stages[0]}:{similar[0]}? Or make it" if similar else "Make it"
    problem = f"there is no such run under {root}"
    raise MissingArtifact(field_name, ref, problem, f"{hint} with: {command} run.name={name}")


def list_done_runs(stages: Sequence[str], root: Path) -> list[Path]:
    """Return the folders of the finished runs of some stages that published something, newest first."""
    publications = []
    for stage in stages:
        for path in (root / stage).glob("*/manifest.json"):
            manifest = read_manifest(path.parent)
            is_check = stage == "export" and manifest.config.get("export", {}).get("name") == "check"
            if manifest.done and not is_check:  # a check publishes nothing
                publications.append((manifest.publication, path.parent))
    return [folder for _, folder in sorted(publications, reverse=True)]
