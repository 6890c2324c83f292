"""What the stages behind `sft` have in common: where they start from, and on which base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from align.config.groups import ModelConfig
from align.config.root import Config
from align.config.settings import changed
from align.data.chat import use_template
from align.data.sources import data_record
from align.errors import InputError
from align.models.base import base_of, find_base
from align.models.load import load_tokenizer
from align.run import Artifact, Base, artifact_in, publication, read_manifest, resolve

BASE = "base"
"""The reference to the model that `model=` names, as it is."""


class Start(NamedTuple):
    """What a stage starts from, and the configuration with the method that this belongs to."""

    artifact: Artifact
    base: Base
    config: Config


def start(config: Config, ref: str | None = None, field: str = "init") -> Start:
    """The artifact a stage starts from, its base, and the method to go on with.

    With `model=` given, `latest` means the newest on those weights; without, the newest of all, whose base is used.
    `base` is the model that `model=` names, as it is.

    Raises:
        MissingArtifact: nothing is there yet; the message names the command that makes it.
        InputError: `model=` contradicts the artifact.
    """
    ref = ref if ref is not None else str(getattr(config, field))
    wanted = find_base(config.model).digest if config.model.path else None
    artifact = find(ref, config, field, wanted if ref.endswith(":latest") else None)
    base = base_of(artifact, config.model, field)
    method = method_of(artifact, config.method.name, field)
    return Start(artifact, base, changed(config, method=changed(config.method, name=method)))


def find(ref: str, config: Config, field: str, base_digest: str | None = None) -> Artifact:
    """What a reference names: `base`, or what `align.run.resolve` finds.

    Raises:
        MissingArtifact: nothing is there yet; the message names the command that makes it.
    """
    if ref == BASE:
        return as_artifact(find_base(config.model))
    return resolve(ref, Path(config.run.root).expanduser(), base_digest, field)


def as_artifact(base: Base) -> Artifact:
    """A model as it is, as something to start from."""
    return Artifact(BASE, Path(base.path), base.digest, base, whole=True)


def base_itself(artifact: Artifact) -> Artifact:
    """The base that an adapter was trained on, found anew where it lies by now, as what the adapter started from."""
    return as_artifact(base_of(artifact, ModelConfig(), "init"))


def method_of(artifact: Artifact, given: str, field: str) -> str:
    """The method to go on with: an adapter belongs to the precision of the base that it was trained on.

    Raises:
        InputError: `method=` contradicts the artifact.
    """
    config = artifact.manifest.get("identity", {}).get("config", {})
    trained = None if artifact.whole else config.get("method", {}).get("name")
    if given == "auto":
        return trained or "qlora"
    if trained not in (None, given):
        raise InputError(
            "method", given, f"{field}={artifact.ref} was trained with method={trained}",
            "Drop method=, or start from an artifact of that method.",
        )  # fmt: skip
    return given


def frozen_as(method: str) -> str:
    """How a base is kept that nothing trains: as its adapters know it, in the compute dtype beside a full policy."""
    return "lora" if method == "full" else method


def tokenizer_of(artifact: Artifact, base: Base, template: str | None) -> Any:
    """The tokenizer and chat template that an artifact was trained with; the base's where it brings none.

    Raises:
        InputError: there is no chat template and none was asked for.
    """
    tokenizer = own_tokenizer(artifact, base)
    use_template(tokenizer, template)
    return tokenizer


def own_tokenizer(artifact: Artifact, base: Base) -> Any:
    """The same as it stands, with a chat template or without."""
    own = (artifact.path / "tokenizer_config.json").is_file()
    return load_tokenizer(base, artifact.path if own else None)


def adapter_folder(artifact: Artifact) -> Path | None:
    """The artifact's adapter; None where it is a whole model, which is then the base itself."""
    return None if artifact.whole else artifact.path


def same_split(config: Config, artifact: Artifact) -> None:
    """Raise where what is held out of the data now was trained on before: the file is the same, the share is not.

    Raises:
        InputError: names the share that the run before had.
    """
    if config.data.name != "jsonl":
        return  # the corpus has parts of its own
    digest = data_record(config.data)["digest"]
    for manifest in manifests_behind(artifact):
        trained = manifest["identity"]["config"]["data"]
        same = manifest["inputs"].get("data", {}).get("digest") == digest
        if same and trained["held_out"] != config.data.held_out:
            raise InputError(
                "data.held_out", config.data.held_out,
                f"{manifest['stage']}:{manifest['name']} held out {trained['held_out']} of this file, learned the rest",
                f"Write data.held_out={trained['held_out']}, or give a file of its own to measure on.",
            )  # fmt: skip


def manifests_behind(artifact: Artifact) -> Iterator[Mapping[str, Any]]:
    """The manifest of an artifact's run and of the runs that it came through, as far as they are still there."""
    if not artifact.manifest:
        return
    yield artifact.manifest
    for record in artifact.manifest["inputs"].values():
        if "whole" in record and (Path(record["path"]).parent / "manifest.json").is_file():
            yield from manifests_behind(artifact_in(Path(record["path"]), record["ref"], verify=False))


def trained_in(artifact: Artifact) -> str | None:
    """The dtype that an artifact's run computed in; None where nobody wrote it down."""
    told = artifact.manifest.get("identity", {}).get("config", {}).get("dtype", "auto")
    return artifact.manifest.get("hardware", {}).get("dtype") if told == "auto" else told


def data_behind(artifact: Artifact) -> list[str]:
    """The names of the data that an artifact was trained on, each once, as other machines may know them."""
    found = []
    for manifest in manifests_behind(artifact):
        data = manifest["identity"]["config"]["data"]
        record = manifest["inputs"].get("data", {})
        name = record.get("project") or (Path(data["path"]).name if data.get("path") else data["name"])
        found.append(f"annotations {name}" if record.get("project") else name)
    return list(dict.fromkeys(found))


def label(base: Base, config: Config) -> str:
    """The readable part of a run's name: model and method."""
    name = Path(base.path).parent.name if Path(base.path).name == "artifact" else base.id.rstrip("/").rpartition("/")[2]
    return name if name.endswith(config.method.name) else f"{name}-{config.method.name}"


def parents_of(artifact: Artifact, root: Path) -> list[dict[str, str]]:
    """The runs that an artifact came through, in order of training, itself last: `{stage, name, digest}` each."""
    manifest = artifact.manifest
    if not manifest:
        return []
    before: list[dict[str, str]] = []
    for name, recorded in manifest["inputs"].items():
        if name != "init" and not name.startswith("reward"):
            continue
        if "path" not in recorded:  # a function: no run made it
            continue
        if (Path(recorded["path"]).parent / "manifest.json").is_file():
            before += parents_of(artifact_in(Path(recorded["path"]), recorded["ref"], verify=False), root)
        elif "stage" in recorded:
            before.append({k: recorded[k] for k in ("stage", "name", "digest")})
    mine = {"stage": manifest["stage"], "name": manifest["name"], "digest": artifact.digest}
    return [p for i, p in enumerate([*before, mine]) if p not in [*before, mine][:i]]


def evaluation_of(artifact: Artifact, root: Path) -> dict[str, Any] | None:
    """The figures of the newest finished evaluation of exactly this artifact, those of a proxy only where there are no
    others; None where there are none."""
    found = []
    for path in (root / "eval").glob("*/manifest.json"):
        manifest = read_manifest(path.parent)
        if manifest["status"] == "done" and manifest["inputs"]["artifact"]["digest"] == artifact.digest:
            proxy = manifest["metrics"].get("judge_is") == "proxy"
            found.append(((not proxy, publication(manifest)), manifest["metrics"]))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def readers_of(root: Path, project: str, first: int, last: int) -> tuple[list[str], list[str]]:
    """The runs that read an annotation project while rows `first` to `last` of its ledger were its newest, and those
    that were made from them: `stage/name`, each after what it came from. And the manifests that cannot be read."""
    manifests, unread = {}, []
    for path in sorted(root.glob("*/*/manifest.json")):
        try:
            found = read_manifest(path.parent)
            manifests[f"{found['stage']}/{found['name']}"] = found
        except (InputError, KeyError):
            unread.append(str(path))
    used = [
        name
        for name, manifest in manifests.items()
        if any(r.get("project") == project and first <= r.get("seq", -1) < last for r in manifest["inputs"].values())
    ]
    for parent in used:  # grows while we walk it
        files = set(manifests[parent].get("outputs", {}).values())
        for name, manifest in manifests.items():
            inputs = manifest["inputs"].values()
            child = any(f"{r.get('stage')}/{r.get('name')}" == parent or r.get("digest") in files for r in inputs)
            if child and name not in used:
                used.append(name)
    return used, unread
