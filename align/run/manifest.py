"""A run's manifest: one record with one reader and one writer.

A path below the folder of all runs is written as `<root>/…`, so that the folder can be moved. Paths are hints: an input
is known by its digest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from align.config.identity import identifying
from align.config.stages import STAGES
from align.core.errors import CorruptFile, require_schema_version
from align.core.redaction import masked_tree, unmarked
from align.run.digests import file_digest
from align.run.files import json_object, write_json

SCHEMA_VERSION = 2
FILE = "manifest.json"
ROOT = "<root>/"


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
class Input:
    """Something that a run read, resolved once.

    Attributes:
        digest: what it is known by: sha256 of a file or of weights, the hash at the head of a ledger.
        ref: what the user called it; empty where nobody named it.
        path: where it lay; empty where it is no file. A hint: it may have moved.
        stage, name: the run that made it; empty where none did.
        whole: of weights: True for a whole model, False for an adapter.
        tokenizer: of an adapter that a run made: sha256 of the tokenizer and chat template beside it, which its own
            digest leaves out; empty elsewhere.
        project, seq: of votes: the annotation project, and the number of its ledger's last row.
        details: what else the stage wants to know of it later, as JSON.
    """

    digest: str
    ref: str = ""
    path: str = ""
    stage: str = ""
    name: str = ""
    whole: bool | None = None
    tokenizer: str = ""
    project: str = ""
    seq: int = -1
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> str:
        """`stage:name` of the run that made it; its reference where none did."""
        return f"{self.stage}:{self.name}" if self.stage else self.ref

    def as_json(self, root: Path) -> dict[str, Any]:
        """As the manifest has it: what is empty is left out, the details stand beside the rest."""
        kept = {
            f.name: value
            for f in dataclasses.fields(self)
            if f.name != "details" and (value := getattr(self, f.name)) != f.default
        }
        if self.path:
            kept["path"] = relative_path(self.path, root)
        return kept | dict(self.details)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a run was given, what it read, what it made.

    Attributes:
        stage, name: the run: its folder is `<root>/<stage>/<name>`.
        status: `new`, `running`, `failed`, `interrupted` or `done`.
        seed: of everything that was drawn at random.
        config: the whole resolved configuration, without secrets.
        inputs: name → what it read.
        base: the base weights it worked on; None where it needed none.
        outputs: published file, relative to the run's folder → sha256.
        digest: of the adapter or the model that it published, as `Artifact.digest` has it; empty where it made neither.
        metrics: the stage's headline figures.
        times: `started`, `first_started` and `finished`, in ISO 8601, UTC.
        published: counts the publications of a root; what `latest` goes by. 0 before there is one.
        error: why it failed.
        code: digest of the code that ran, see `align.run.environment`.
        git, packages, hardware: where it ran.
        commit: of align's own checkout, see `align.run.environment.own_commit`.
    """

    stage: str
    name: str
    seed: int
    config: Mapping[str, Any]
    inputs: Mapping[str, Input]
    base: Base | None
    status: str = "new"
    outputs: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    times: Mapping[str, str] = field(default_factory=dict)
    published: int = 0
    error: str = ""
    code: str = ""
    git: Mapping[str, Any] | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    commit: str = ""

    @property
    def ref(self) -> str:
        """`stage:name`."""
        return f"{self.stage}:{self.name}"

    @property
    def refs(self) -> dict[str, str]:
        """Name → reference of each input that a command line names by one."""
        return {
            name: read.run for name, read in self.inputs.items() if read.stage or (name == "data" and read.ref)
        }  # fmt: skip

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the run this run, see `identity_of`."""
        return identity_of(self.stage, self.config, self.inputs, self.base)

    @property
    def done(self) -> bool:
        return self.status == "done"

    @property
    def publication(self) -> tuple[int, str]:
        """What done runs are ordered by: their number of publication; of two with one number, the time."""
        return self.published, self.times["finished"]

    def as_json(self, root: Path) -> dict[str, Any]:
        """As the file has it, without secrets."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["identity"] = self.identity
        values["inputs"] = {name: found.as_json(root) for name, found in self.inputs.items()}
        if self.base is not None:
            values["base"] = dataclasses.asdict(self.base) | {"path": relative_path(self.base.path, root)}
        if not self.error:
            del values["error"]
        return masked_tree({"schema_version": SCHEMA_VERSION, **values})


def relative_path(path: str, root: Path) -> str:
    """A path as the file has it: one below the folder of all runs begins with `<root>/`."""
    given, top = Path(path), root.absolute()
    if given.is_relative_to(root):  # below a root that is relative itself
        given = given.absolute()
    # Any other relative one is a name, such as `hub:ORG/NAME/FILE`, or relative to where the command ran.
    return ROOT + given.relative_to(top).as_posix() if given.is_absolute() and given.is_relative_to(top) else path


def absolute_path(path: str, root: Path) -> str:
    """The path that `relative_path` made short."""
    return str(root / path.removeprefix(ROOT)) if path.startswith(ROOT) else path


def identity_of(
    stage: str, config: Mapping[str, Any], inputs: Mapping[str, Input], base: Base | None
) -> dict[str, Any]:
    """What makes a run this run: `config`, the part of the configuration that its stage reads; `inputs`, name → digest;
    `tokenizers`, the same of those beside its inputs; `base`, the digest of its base weights. A store is its URL
    without the password."""
    known = {*inputs, *(["base"] if base else [])}
    return {
        "config": unmarked(masked_tree(identifying(stage, config, known))),
        "inputs": {name: found.digest for name, found in inputs.items()},
        "tokenizers": {name: found.tokenizer for name, found in inputs.items() if found.tokenizer},
        "base": base.digest if base else None,
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest in a run's folder, `<root>/<stage>/<name>`."""
    write_json(folder / FILE, manifest.as_json(folder.parent.parent))


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a run's folder.

    Raises:
        CorruptFile: it is no run's manifest.
        InputError: another schema version wrote it.
    """
    path = folder / FILE
    values = json_object(path, "manifest", "Move the folder away.")
    found = values.get("schema_version")
    if found is None or not isinstance(values.get("status"), str):
        raise CorruptFile("manifest", str(path), "is not a run's manifest", "Move the folder away.")
    remedy = "Move the folder away and run its command again, or use the version of align that wrote it."
    require_schema_version(found, SCHEMA_VERSION, "manifest", str(path), remedy)
    if wrong := first_invalid_key(values):
        problem = f"is not a run's manifest: {wrong} is missing, or of another kind than runs write it"
        raise CorruptFile("manifest", str(path), problem, "Move the folder away.")
    return manifest_from(values, folder.parent.parent)


def manifest_from(values: Mapping[str, Any], root: Path) -> Manifest:
    """The record of a checked JSON object. What this version does not know is left out."""
    inputs = {name: input_from(given, root) for name, given in values["inputs"].items()}
    base = Base(**values["base"]) if values.get("base") else None
    if base is not None:
        base = dataclasses.replace(base, path=absolute_path(base.path, root))
    known = {f.name for f in dataclasses.fields(Manifest)}
    kept = {key: value for key, value in values.items() if key in known and value is not None}
    return Manifest(**{**kept, "inputs": inputs, "base": base, "seed": values.get("seed", 0)})


def input_from(values: Mapping[str, Any], root: Path) -> Input:
    kept: dict[str, Any]
    known = {f.name for f in dataclasses.fields(Input)}
    kept = {"digest": "", **{key: value for key, value in values.items() if key in known}}
    kept["path"] = absolute_path(kept.get("path", ""), root)
    return Input(**kept, details={k: v for k, v in values.items() if k not in known})


SHAPE = {
    "stage": str, "name": str, "config": dict, "config.data": dict, "config.method": dict, "identity": dict,
    "identity.config": dict, "identity.inputs": dict, "inputs": dict, "inputs.*": dict, "outputs": dict,
    "outputs.*": str, "metrics": dict, "times": dict, "times.*": str, "hardware": dict,
}  # fmt: skip
"""What later runs read of a manifest, and its type, each behind what it lies in; `*` is every key."""

OF_AN_INPUT = {
    "ref": str, "path": str, "digest": str, "stage": str, "name": str, "tokenizer": str, "project": str, "seq": int,
}  # fmt: skip


def first_invalid_key(values: Mapping[str, Any]) -> str | None:
    """The first key of a manifest that is missing or of another type than runs write it; None where all is right."""
    for key, kind in SHAPE.items():
        *parents, last = key.split(".")
        inside: Any = values
        for parent in parents:
            inside = inside[parent]
        if not all(isinstance(v, kind) for v in (inside.values() if last == "*" else [inside.get(last)])):
            return key
    if values["stage"] not in STAGES:
        return "stage"
    for name, given in values["inputs"].items():
        typed = all(isinstance(given[key], kind) for key, kind in OF_AN_INPUT.items() if key in given)
        if not typed or ("whole" in given and not {"ref", "path", "digest"} <= given.keys()):
            return f"inputs.{name}"
        if ("stage" in given) != ("name" in given) or not isinstance(given.get("whole", False), bool):
            return f"inputs.{name}"
    base = values.get("base")
    if base is not None and not (isinstance(base, dict) and set(base) == {"id", "path", "revision", "digest"}):
        return "base"
    if base is not None and not all(isinstance(v, str) or (k, v) == ("revision", None) for k, v in base.items()):
        return "base"
    for name in ("stage", "reward", "rollout", "model", "run", "store", "track"):
        if not isinstance(values["config"].get(name, {}), dict):
            return f"config.{name}"
    texts = dict.fromkeys(("digest", "error", "code", "commit"), str)
    for key, kind in {"published": int, "seed": int, **texts}.items():
        if not isinstance(values.get(key, kind()), kind):
            return key
    if not isinstance(values["config"].get("export", {}), dict):
        return "config.export"
    return "times.finished" if values["status"] == "done" and "finished" not in values["times"] else None


@dataclass(frozen=True, slots=True)
class HeldManifest:
    """The manifest of a run, as it was at one time.

    Attributes:
        content: digest of the weights that the run published or evaluated. A run that was made again with other
            weights is not compared.
        sha256: of the file `manifest.json`.
    """

    content: str
    sha256: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def content_of(manifest: Manifest) -> str:
    """Return the digest of the weights that a run published, or that it evaluated; empty if it did neither."""
    evaluated = manifest.inputs.get("artifact") if manifest.stage == "eval" else None
    return manifest.digest or (evaluated.digest if evaluated else "")


def hold_manifest(folder: Path, manifest: Manifest) -> HeldManifest:
    """Return what is to be held of the manifest in a run's folder."""
    return HeldManifest(content_of(manifest), file_digest(folder / FILE))


def parse_held_manifests(value: Any) -> dict[str, HeldManifest] | None:
    """Rebuild `stage:name` → held manifest from its JSON form. Returns None if it is something else."""
    if not isinstance(value, Mapping):
        return None
    held: dict[str, HeldManifest] = {}
    for run, one in value.items():
        if not isinstance(one, Mapping) or {*one} != {"content", "sha256"}:
            return None
        if not all(isinstance(text, str) for text in one.values()):
            return None
        held[str(run)] = HeldManifest(one["content"], one["sha256"])
    return held
