"""What runs publish, and how a later run refers to it: a path, `sft:latest`, `sft:NAME`, `hub:org/name`."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.root import DEFAULT_ROOT
from align.config.stages import WITH_RUNS
from align.errors import CorruptFile, InputError, MissingArtifact
from align.run.digests import known_digest
from align.run.files import json_object
from align.run.hub import HUB, hub_snapshot
from align.run.manifest import Base, Input, Manifest, read_manifest
from align.run.weights import adapter_digest, model_digest, tokenizer_digest

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "config.json", "generation_config.json")
SERVES_AS_SFT = ("sft", "full")
REPLACED = "replaced.json"
"""In an artifact whose files are gone, because others took their place: `by`, the run that made them, its `folder`, and
the `reason`."""


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
    """

    ref: str
    path: Path
    digest: str
    base: Base | None
    whole: bool
    manifest: Manifest | None = None

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
        made = self.manifest
        return Input(self.digest, self.ref, path, made.stage, made.name, self.whole, tokenizer)


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
    recorded = manifest.base if manifest else None
    base = as_base(folder, ref, digest) if whole else recorded
    return Artifact(ref, folder, digest, base, whole, manifest)


def as_base(folder: Path, ref: str, digest: str) -> Base:
    """A whole model as the base of what is trained on it; one of the hub's by its id and revision."""
    hub = ref.startswith(HUB)
    return Base(ref.removeprefix(HUB), str(folder.absolute()), folder.name if hub else None, digest)


def replacement(artifact: Path, field: str) -> dict[str, Any] | None:
    """What took the place of an artifact, see `REPLACED`; None of one that is there itself.

    Raises:
        CorruptFile: nobody can say what.
    """
    return json_object(artifact / REPLACED, field, "Remove the folder.") if (artifact / REPLACED).is_file() else None


def check_not_replaced(artifact: Path, field: str) -> None:
    """Raises: MissingArtifact: what lay here was taken away on purpose; the message names what took its place."""
    if (said := replacement(artifact, field)) is not None:
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
    """Find what a reference names: a path, `stage:latest`, `stage:NAME`, or `hub:org/name`.

    `latest` is the done run that was published last, on the base `base_digest` where that is given; `sft:` also finds
    `full` runs.

    Raises:
        MissingArtifact: nothing is there; the message says which command produces it.
    """
    if ref.startswith(HUB):
        return artifact_in(hub_snapshot(ref.removeprefix(HUB), None, field_name), ref)
    path = Path(ref).expanduser()
    if path.is_dir():
        return artifact_in(path, ref)
    stage, colon, name = ref.partition(":")
    if not colon or stage not in WITH_RUNS:
        raise MissingArtifact(
            field_name, ref, "is neither a folder nor a reference",
            f"Write a path, base, hub:ID, STAGE:latest or STAGE:NAME, with one of the stages {', '.join(WITH_RUNS)}.",
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


def named_run(stages: Sequence[str], name: str, root: Path, ref: str, field_name: str, produce: str) -> Path:
    """The folder of the run of this name, done or not.

    Raises:
        MissingArtifact: there is none; the message has the nearest name, and the command that makes one.
    """
    for candidate in stages:
        if (root / candidate / name / "manifest.json").is_file():
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
