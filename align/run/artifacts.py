"""What runs publish, and how a later run refers to it: a path, `sft:latest`, `sft:NAME`, `@ALIAS`, `hub:org/name`."""

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
from align.core.files import user_path
from align.run.alias_log import SIGN, Change, Meant, describe_arms, read_log
from align.run.digests import known_digest
from align.run.files import json_object
from align.run.hub import HUB, hub_snapshot
from align.run.manifest import FILE, Base, Input, Manifest, read_manifest
from align.run.weights import adapter_digest, model_digest, tokenizer_digest

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "config.json", "generation_config.json")
SERVES_AS_SFT = ("sft", "full")
REPLACED = "replaced.json"
"""In an artifact whose files are gone: `by` whom and the `reason`; where others took their place, `by` is the run that
made them, and `folder` its own."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """Something an earlier run published.

    Attributes:
        ref: the reference it was found by.
        path: the folder with the adapter or the model.
        digest: sha256 over its weights and configuration.
        base: the weights it belongs to; for a whole model, the model itself.
        whole: True for a whole model (`stage=full`), False for an adapter.
        manifest: its run's manifest; None for a bare folder.
        alias: of one that was found by an alias: its name, and the link of the log that says what it means.
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
        """The dtype that its run computed in; None where nobody wrote it down."""
        if self.manifest is None:
            return None
        given = self.manifest.config.get("dtype", "auto")
        return self.manifest.hardware.get("dtype") if given == "auto" else given

    def as_input(self) -> Input:
        """What a later run's manifest says of it."""
        path = str(self.path.absolute())  # a later run may be asked from elsewhere
        if self.manifest is None:  # its digest covers the tokenizer too
            return Input(self.digest, self.ref, path, whole=self.whole)
        tokenizer = "" if self.whole else tokenizer_digest(self.path)
        made, details = self.manifest, {"alias": dict(self.alias)} if self.alias else {}
        return Input(self.digest, self.ref, path, made.stage, made.name, self.whole, tokenizer, details=details)


def artifact_in(folder: Path, ref: str, verify: bool = True) -> Artifact:
    """The artifact of a done run's folder, or a bare folder with an adapter or a model in it.

    Raises:
        MissingArtifact: the run is not done, or the folder holds neither.
        CorruptFile: a published file is not what its manifest says.
        InputError: it is a model that is not read, see `align.run.weights`.
    """
    manifest: Manifest | None = None
    bare = any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))  # whatever else lies there
    if (folder / "manifest.json").is_file() and not bare:
        manifest = read_manifest(folder)
        if not manifest.done:
            raise MissingArtifact(
                "reference", ref, f"the run in {folder} is {manifest.status}, not done",
                "Run the same command again to finish it.",
            )  # fmt: skip
        if verify:
            verify_outputs(folder, manifest.outputs)
        folder = folder / "artifact"
    elif folder.name == "artifact" and (folder.parent / "manifest.json").is_file():
        return artifact_in(folder.parent, ref, verify)
    adapter = (folder / "adapter_config.json").is_file()
    whole = (folder / "config.json").is_file() and not adapter
    if not (whole or adapter or manifest):
        raise MissingArtifact(
            "reference", ref, f"{folder} holds neither an adapter nor a model",
            "Give a run's folder, or one with adapter_config.json or config.json in it.",
        )  # fmt: skip
    try:
        digest = model_digest(folder, "reference", ref) if whole else adapter_digest(folder, bare=not manifest)
    except InputError:
        if verify:
            raise
        digest = ""  # of an ancestor whose weights were removed: nothing equals it
    base = manifest.base if manifest else None
    if whole:  # a model of the hub's is called by its id and revision
        revision = folder.name if ref.startswith(HUB) else None
        base = Base(ref.removeprefix(HUB), str(folder.absolute()), revision, digest)
    return Artifact(ref, folder, digest, base, whole, manifest)


def replacement(artifact: Path, field: str) -> dict[str, Any] | None:
    """What took the place of an artifact, see `REPLACED`; None of one that is there itself.

    Raises:
        CorruptFile: nobody can say what.
    """
    return json_object(artifact / REPLACED, field, "Remove the folder.") if (artifact / REPLACED).is_file() else None


def check_not_replaced(artifact: Path, field: str) -> None:
    """Raises: MissingArtifact: what lay here was taken away on purpose; the message names what took its place."""
    if (said := replacement(artifact, field)) is not None:
        if "folder" not in said:  # nothing took its place
            problem = f"was removed by {said.get('by')} at {said.get('at')}: {said.get('reason')}"
            raise MissingArtifact(
                field, str(artifact), problem, "Make it again: its manifest has the command's settings."
            )
        problem = f"was replaced by {said.get('by')}: {said.get('reason')}"
        raise MissingArtifact(field, str(artifact), problem, f"Name {said.get('by')}; it lies in {said.get('folder')}.")


def verify_outputs(folder: Path, outputs: Mapping[str, str]) -> None:
    """Raise `CorruptFile` unless every published file is there and hashes to what the manifest says; `MissingArtifact`
    where they were replaced."""
    check_not_replaced(folder / "artifact", "run")
    for name, digest in outputs.items():
        path = folder / name
        if not path.is_file() or known_digest(path) != digest:
            problem = "is missing" if not path.is_file() else "is not the file that was published (its sha256 differs)"
            raise CorruptFile("file", str(path), problem, "Restore it, or make it again with resume=never.")


def resolve(ref: str, root: Path, base_digest: str | None = None, field_name: str = "reference") -> Artifact:
    """Find what a reference names: a path, `stage:latest`, `stage:NAME`, `@ALIAS`, or `hub:org/name`.

    `latest` is the done run that was published last, on the base `base_digest` where that is given; `sft:` also finds
    `full` runs.

    Raises:
        MissingArtifact: nothing is there; the message says which command produces it.
    """
    if ref.startswith(SIGN):
        return aliased(ref, root, field_name)
    if ref.startswith(HUB):
        return artifact_in(hub_snapshot(ref.removeprefix(HUB), None, field_name), ref)
    path = user_path(ref, field_name)
    if path.is_dir():
        return artifact_in(path, ref)
    stage, colon, name = ref.partition(":")
    if not colon or stage not in WITH_RUNS:
        raise MissingArtifact(
            field_name, ref, "is neither a folder nor a reference",
            f"Write a path, base, hub:ID, @ALIAS, STAGE:latest or STAGE:NAME, with one of the stages "
            f"{', '.join(WITH_RUNS)}.",
        )  # fmt: skip
    stages = SERVES_AS_SFT if stage == "sft" else (stage,)
    elsewhere = "" if root == Path(DEFAULT_ROOT) else f" run.root={shlex.quote(str(root))}"
    produce = f"python -m align stage={stage}{elsewhere}"
    if name != "latest":
        return artifact_in(named_run(stages, name, root, ref, field_name, produce), ref)
    done = done_runs(stages, root)
    for folder in done:
        artifact = artifact_in(folder, f"{folder.parent.name}:{folder.name}", verify=False)
        if base_digest is None or (artifact.base is not None and artifact.base.digest == base_digest):
            verify_outputs(folder, artifact.manifest.outputs if artifact.manifest else {})
            return artifact
    on_base = " on this base" if done else ""
    raise MissingArtifact(field_name, ref, f"no finished {stage} run{on_base} under {root}", f"Make it with: {produce}")


def aliased(ref: str, root: Path, field_name: str) -> Artifact:
    """What an alias means now.

    Raises:
        MissingArtifact: there is no such alias, or what it means is gone.
        InputError: it means several artifacts.
        CorruptFile: the log of the aliases, or a file of the artifact, is not what was written.
    """
    change = meaning(ref, root, field_name)
    first, *others = change.arms
    if others:
        problem = f"means several artifacts: {describe_arms(change.arms)}"
        raise InputError(field_name, ref, problem, f"Name one of them: {field_name}={first.ref}.")
    return artifact_of(first, change, ref, root, field_name)


def meaning(ref: str, root: Path, field_name: str) -> Change:
    """The change that says what `@ALIAS` means now.

    Raises:
        MissingArtifact: there is no such alias; the message has the nearest one.
    """
    log, alias = read_log(root), ref.removeprefix(SIGN)
    known = log.standing()
    if (change := known.get(alias)) is not None:
        return change
    close = difflib.get_close_matches(alias, known, n=1)
    meant = f"Did you mean {SIGN}{close[0]}? " if close else ""
    action = f"stage.action=promote stage.alias={shlex.quote(alias)}"
    make = f"python -m align stage=registry {action} artifact=STAGE:NAME stage.why=REASON"
    last = log.last(alias)
    why = f"was retired by {last.who} at {last.at[:19]}: {last.why}" if last else f"is no alias under {root}"
    raise MissingArtifact(field_name, ref, why, f"{meant}Make it with: {make}")


def artifact_of(meant: Meant, change: Change, ref: str, root: Path, field_name: str) -> Artifact:
    """One artifact of an alias: under the name of its run, or wherever in this root that very artifact lies by now.

    Raises:
        MissingArtifact: it is gone.
    """
    stage, _, name = meant.ref.partition(":")
    named = root / stage / name
    there = readable(named)
    alike = there is not None and publishes(named, there, meant.digest)
    folder = named if alike else with_digest(meant.digest, root)
    if folder is None:
        problem = f"means {meant.ref} ({meant.digest[:12]}), which is gone, or was made again"
        remedy = f"Restore the run, or promote another: stage=registry stage.action=promote stage.alias={change.alias}."
        raise MissingArtifact(field_name, ref, problem, remedy)
    noted = {"name": change.alias, "seq": change.seq, "hash": change.hash}
    return replace(artifact_in(folder, ref), alias=noted)


def publishes(folder: Path, manifest: Manifest, digest: str) -> bool:
    """Return whether a run is done and published an artifact with this digest."""
    return manifest.done and digest == (manifest.digest or artifact_in(folder, str(folder), verify=False).digest)


def readable(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where there is none that this version reads."""
    with suppress(InputError):
        return read_manifest(folder)
    return None


def with_digest(digest: str, root: Path, stage: str = "*") -> Path | None:
    """The folder of a done run that published this digest; whatever cannot be read is passed over."""
    for path in sorted(root.glob(f"{stage}/*/{FILE}")):
        manifest = readable(path.parent)
        if manifest and manifest.done and manifest.digest == digest != "":
            return path.parent
    return None


def named_run(stages: Sequence[str], name: str, root: Path, ref: str, field_name: str, produce: str) -> Path:
    """The folder of the run of this name, done or not.

    Raises:
        MissingArtifact: there is none; the message has the nearest name, and the command that makes one.
    """
    for candidate in stages:
        if os.path.lexists(root / candidate / name / "manifest.json"):
            return root / candidate / name
    named = [path.parent.name for stage in stages for path in (root / stage).glob("*/manifest.json")]
    close = difflib.get_close_matches(name, named, n=1)
    meant = f"Did you mean {stages[0]}:{close[0]}? Or make it" if close else "Make it"
    problem = f"there is no such run under {root}"
    raise MissingArtifact(field_name, ref, problem, f"{meant} with: {produce} run.name={name}")


def done_runs(stages: Sequence[str], root: Path) -> list[Path]:
    """The folders of the done runs of some stages that published something, the newest first."""
    done = []
    for stage in stages:
        for path in (root / stage).glob("*/manifest.json"):
            manifest = read_manifest(path.parent)
            checks = manifest.config.get("export", {}).get("name") == "check"  # which publish nothing
            if manifest.done and not (stage == "export" and checks):
                done.append((manifest.publication, path.parent))
    return [folder for _, folder in sorted(done, reverse=True)]
