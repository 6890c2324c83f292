"""What runs publish, and how a later run refers to it: a path, `sft:latest`, `sft:NAME`, `hub:org/name`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.root import SCHEMA_VERSION, RunConfig
from align.config.stages import STAGES
from align.errors import CorruptFile, InputError, MissingArtifact
from align.run.files import file_digest, json_object
from align.run.hub import hub_snapshot
from align.run.weights import adapter_digest, model_digest

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "config.json", "generation_config.json")
SERVES_AS_SFT = ("sft", "full")


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
        CorruptFile: it is no run's manifest.
        InputError: another schema version wrote it.
    """
    path = folder / "manifest.json"
    manifest = json_object(path, "manifest", "Move the folder away.")
    found = manifest.get("schema_version")
    if found is None or not isinstance(manifest.get("status"), str):
        raise CorruptFile("manifest", str(path), "is not a run's manifest", "Move the folder away.")
    if found != SCHEMA_VERSION:
        raise InputError(
            "schema_version", found, f"{path} was written by another version of align, this one reads {SCHEMA_VERSION}",
            "Use the version that wrote it, or move the folder away and run the command again.",
        )  # fmt: skip
    if wrong := misshapen(manifest):
        problem = f"is not a run's manifest: {wrong} is missing, or of another kind than runs write it"
        raise CorruptFile("manifest", str(path), problem, "Move the folder away.")
    return manifest


SHAPE = {
    "stage": str, "name": str, "identity": dict, "identity.config": dict, "identity.config.data": dict,
    "identity.config.method": dict, "identity.inputs": dict, "inputs": dict, "inputs.*": dict, "outputs": dict,
    "outputs.*": str, "metrics": dict, "times": dict, "times.*": str, "hardware": dict,
}  # fmt: skip
"""What later runs read of a manifest, and its type, each behind what it lies in; `*` is every key."""


def misshapen(manifest: Mapping[str, Any]) -> str | None:
    """The first key of a manifest that is missing or of another type than runs write it; None where all is right."""
    for key, kind in SHAPE.items():
        *parents, last = key.split(".")
        inside: Any = manifest
        for parent in parents:
            inside = inside[parent]
        if not all(isinstance(v, kind) for v in (inside.values() if last == "*" else [inside.get(last)])):
            return key
    for name, record in manifest["inputs"].items():
        told = [record.get(key, "") for key in ("ref", "path", "digest", "stage", "name")]
        whole = "whole" not in record or {"ref", "path", "digest"} <= record.keys()
        if not (whole and all(isinstance(text, str) for text in told)):
            return f"inputs.{name}"
    base = manifest.get("base", {})
    if base is not None and not (isinstance(base, dict) and set(base) == {"id", "path", "revision", "digest"}):
        return "base"
    if base is not None and not all(isinstance(v, str) or (k, v) == ("revision", None) for k, v in base.items()):
        return "base"
    if not isinstance(manifest["identity"]["config"].get("export", {}), dict):
        return "identity.config.export"
    if not isinstance(manifest.get("published", 0), int):
        return "published"
    return "times.finished" if manifest["status"] == "done" and "finished" not in manifest["times"] else None


def publication(manifest: Mapping[str, Any]) -> tuple[int, str]:
    """What done runs are ordered by: their number of publication; of runs that carry none, the time."""
    return manifest.get("published", 0), manifest["times"]["finished"]


def artifact_in(folder: Path, ref: str, verify: bool = True) -> Artifact:
    """The artifact of a done run's folder, or a bare folder with an adapter or a model in it.

    Raises:
        MissingArtifact: the run is not done, or the folder holds neither.
        CorruptFile: a published file is not what its manifest says.
        InputError: it is a model that is not read, see `align.run.weights`.
    """
    manifest: dict[str, Any] = {}
    bare = any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))  # whatever else lies there
    if (folder / "manifest.json").is_file() and not bare:
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
    recorded = Base(**manifest["base"]) if manifest.get("base") else None
    base = Base(ref, str(folder), None, digest) if whole else recorded
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

    `latest` is the done run that was published last, on the base `base_digest` where that is given; `sft:` also finds
    `full` runs.

    Raises:
        MissingArtifact: nothing is there; the message says which command produces it.
    """
    if ref.startswith("hub:"):
        return artifact_in(hub_snapshot(ref[4:], None, field_name), ref)
    path = Path(ref).expanduser()
    if path.is_dir():
        return artifact_in(path, ref)
    stage, colon, name = ref.partition(":")
    if not colon or stage not in STAGES:
        raise MissingArtifact(
            field_name, ref, "is neither a folder nor a reference",
            f"Write a path, base, hub:ID, STAGE:latest or STAGE:NAME, with one of the stages {', '.join(STAGES)}.",
        )  # fmt: skip
    stages = SERVES_AS_SFT if stage == "sft" else (stage,)
    elsewhere = "" if root == Path(RunConfig().root) else f" run.root={shlex.quote(str(root))}"
    produce = f"Make it with: python -m align stage={stage}{elsewhere}"
    if name != "latest":
        for candidate in stages:
            if (root / candidate / name / "manifest.json").is_file():
                return artifact_in(root / candidate / name, ref)
        raise MissingArtifact(field_name, ref, f"there is no such run under {root}", produce + f" run.name={name}")
    done = []
    for candidate in stages:
        for manifest_path in (root / candidate).glob("*/manifest.json"):
            manifest = read_manifest(manifest_path.parent)
            checks = manifest["identity"]["config"].get("export", {}).get("name") == "check"  # which publish nothing
            if manifest["status"] == "done" and not (candidate == "export" and checks):
                done.append((publication(manifest), manifest_path.parent))
    for _, folder in sorted(done, reverse=True):
        artifact = artifact_in(folder, f"{folder.parent.name}:{folder.name}", verify=False)
        if base_digest is None or (artifact.base is not None and artifact.base.digest == base_digest):
            verify_outputs(folder, artifact.manifest)
            return artifact
    on_base = " on this base" if done else ""
    raise MissingArtifact(field_name, ref, f"no finished {stage} run{on_base} under {root}", produce)
