"""A run's `manifest.json`: its content as dataclasses, and its reading, validation and writing.

A path below the folder of all runs is written as `<root>/…`, so that the folder can be moved. Paths are hints: an input
is identified by its digest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from align.config.identity import select_identity
from align.config.stages import STAGES
from align.core.errors import CorruptFile, require_schema_version
from align.core.redaction import drop_masks, mask_tree
from align.run.digests import file_digest
from align.run.files import read_json_object, write_json

SCHEMA_VERSION = 2
FILE = "manifest.json"
ROOT = "<root>/"


@dataclass(frozen=True, slots=True)
class Base:
    """The record of a model's base weights: name, folder, hub revision and digest.

    Attributes:
        id: the user's name for them: `pocket`, a hub id, or a folder.
        path: folder (or snapshot) that holds them.
        revision: commit on the hub, if they are from there.
        digest: SHA-256 over weights, configuration and tokenizer; `latest` compares it.
    """

    id: str
    path: str
    revision: str | None
    digest: str


@dataclass(frozen=True, slots=True)
class Input:
    """The record of a file, an artifact or an annotation project that a run read.

    Attributes:
        digest: its identity: SHA-256 of a file or of weights, or the hash at the head of a ledger.
        ref: the user's reference to it; empty if it was not named.
        path: where it was; empty if it is not a file. A hint: it may have moved.
        stage, name: the run that made it; empty if none did.
        whole: True for a whole model, False for an adapter, None for anything else.
        tokenizer: SHA-256 of the tokenizer and chat template beside a run's adapter, which its own digest leaves out;
            empty otherwise.
        project, seq: of votes: the annotation project, and the number of its ledger's last row.
        details: further values that the stage needs later, as JSON.
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
        """`stage:name` of the run that made the input, or the user's reference to it if no run did."""
        return f"{self.stage}:{self.name}" if self.stage else self.ref

    def as_json(self, root: Path) -> dict[str, Any]:
        """Return the input as a JSON object for the manifest, without default values and with `details` merged in.

        A path below `root` is stored relative to it.
        """
        values = {
            field.name: value
            for field in dataclasses.fields(self)
            if field.name != "details" and (value := getattr(self, field.name)) != field.default
        }
        if self.path:
            values["path"] = to_relative_path(self.path, root)
        return values | dict(self.details)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of a run's `manifest.json`: its configuration, inputs, outputs, metrics and environment.

    Attributes:
        stage, name: the run; its folder is `<root>/<stage>/<name>`.
        status: `new`, `running`, `failed`, `interrupted` or `done`.
        seed: seed of all random draws.
        config: the whole resolved configuration, without secrets.
        inputs: name → input.
        base: base weights that it worked on; None if it needed none.
        outputs: published file, relative to the run's folder → SHA-256.
        digest: digest of its adapter or model, as in `Artifact.digest`; empty if it made neither.
        metrics: the stage's headline metrics.
        times: `started`, `first_started` and `finished`, ISO 8601 in UTC.
        published: number of its publication within the root, by which `latest` is chosen; 0 before it is published.
        error: why it failed.
        code: digest of the code that ran, see `align.run.environment`.
        git, packages, hardware: environment that it ran in.
        commit: commit of align's own checkout, see `align.run.environment.read_own_commit`.
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
        """The reference to the run as `stage:name`, such as `sft:first`."""
        return f"{self.stage}:{self.name}"

    @property
    def refs(self) -> dict[str, str]:
        """Input name → reference, such as `sft:first`, of each input that a user can pass on the command line."""
        return {name: input.run for name, input in self.inputs.items() if input.stage or (name == "data" and input.ref)}

    @property
    def identity(self) -> dict[str, Any]:
        """The configuration and input digests that two runs must share to be the same run, see `compute_identity`."""
        return compute_identity(self.stage, self.config, self.inputs, self.base)

    @property
    def done(self) -> bool:
        return self.status == "done"

    @property
    def publication(self) -> tuple[int, str]:
        """Sort key of finished runs by the order in which they were published, and for equal numbers the time."""
        return self.published, self.times["finished"]

    def as_json(self, root: Path) -> dict[str, Any]:
        """Return the manifest as a JSON object for its file, with secrets masked and paths relative to `root`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["identity"] = self.identity
        values["inputs"] = {name: input.as_json(root) for name, input in self.inputs.items()}
        if self.base is not None:
            values["base"] = dataclasses.asdict(self.base) | {"path": to_relative_path(self.base.path, root)}
        if not self.error:
            del values["error"]
        return mask_tree({"schema_version": SCHEMA_VERSION, **values})


def to_relative_path(path: str, root: Path) -> str:
    """Return a path below the folder of runs as `<root>/…`, for the manifest's file, and any other path unchanged."""
    full_path = Path(path)
    if full_path.is_relative_to(root):  # the root itself may be relative
        full_path = full_path.absolute()
    # Any other relative path is a name, such as `hub:ORG/NAME/FILE`, or relative to the command's working folder.
    if not full_path.is_absolute() or not full_path.is_relative_to(root.absolute()):
        return path
    return ROOT + full_path.relative_to(root.absolute()).as_posix()


def to_absolute_path(path: str, root: Path) -> str:
    """Replace a leading `<root>/` of a manifest's path by the folder of runs. Returns any other path unchanged."""
    return str(root / path.removeprefix(ROOT)) if path.startswith(ROOT) else path


def compute_identity(
    stage: str, config: Mapping[str, Any], inputs: Mapping[str, Input], base: Base | None
) -> dict[str, Any]:
    """Return the mapping of configuration and input digests by which a repeated command finds its earlier run.

    These are `config`, the part of the configuration that the stage reads; `inputs`, name → digest; `tokenizers`, name
    → digest of the tokenizer beside an input; and `base`, the digest of the base weights. A store is identified by its
    URL without the password.
    """
    names = {*inputs, "base"} if base else {*inputs}
    return {
        "config": drop_masks(mask_tree(select_identity(stage, config, names))),
        "inputs": {name: input.digest for name, input in inputs.items()},
        "tokenizers": {name: input.tokenizer for name, input in inputs.items() if input.tokenizer},
        "base": base.digest if base else None,
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into a run's folder, `<root>/<stage>/<name>`, replacing an older one atomically."""
    write_json(folder / FILE, manifest.as_json(folder.parent.parent))


def read_manifest(folder: Path) -> Manifest:
    """Read and validate `manifest.json` in a run's folder.

    Raises:
        CorruptFile: The file is not a run's manifest.
        InputError: Another schema version wrote it.
    """
    path = folder / FILE
    values = read_json_object(path, "manifest", "Move the folder away.")
    version = values.get("schema_version")
    if version is None or not isinstance(values.get("status"), str):
        raise CorruptFile("manifest", str(path), "is not a run's manifest", "Move the folder away.")
    remedy = "Move the folder away and run its command again, or use the version of align that wrote it."
    require_schema_version(version, SCHEMA_VERSION, "manifest", str(path), remedy)
    if key := first_invalid_key(values):
        problem = f"is not a run's manifest: {key} is missing, or of another kind than runs write it"
        raise CorruptFile("manifest", str(path), problem, "Move the folder away.")
    return parse_manifest(values, folder.parent.parent)


def parse_manifest(values: Mapping[str, Any], root: Path) -> Manifest:
    """Build a Manifest from a validated JSON object, with paths below `root` made absolute.

    Unknown keys are ignored.
    """
    inputs = {name: parse_input(input, root) for name, input in values["inputs"].items()}
    base = Base(**values["base"]) if values.get("base") else None
    if base is not None:
        base = dataclasses.replace(base, path=to_absolute_path(base.path, root))
    names = {field.name for field in dataclasses.fields(Manifest)}
    fields = {key: value for key, value in values.items() if key in names and value is not None}
    return Manifest(**{"seed": 0, **fields, "inputs": inputs, "base": base})


def parse_input(values: Mapping[str, Any], root: Path) -> Input:
    names = {field.name for field in dataclasses.fields(Input)}
    fields: dict[str, Any] = {"digest": "", **{key: value for key, value in values.items() if key in names}}
    fields["path"] = to_absolute_path(fields.get("path", ""), root)
    return Input(**fields, details={key: value for key, value in values.items() if key not in names})


SHAPE = {
    "stage": str,
    "name": str,
    "config": dict,
    "config.data": dict,
    "config.method": dict,
    "identity": dict,
    "identity.config": dict,
    "identity.inputs": dict,
    "inputs": dict,
    "inputs.*": dict,
    "outputs": dict,
    "outputs.*": str,
    "metrics": dict,
    "times": dict,
    "times.*": str,
    "hardware": dict,
}
"""Dotted key → type of each manifest value that later runs read, parents first. `*` is every key."""

OF_AN_INPUT = {
    "ref": str,
    "path": str,
    "digest": str,
    "stage": str,
    "name": str,
    "tokenizer": str,
    "project": str,
    "seq": int,
}
"""Key → Python type of the values that the manifest records for an input."""


def first_invalid_key(values: Mapping[str, Any]) -> str | None:
    """Return the dotted key of the first manifest value that is missing or invalid, or None if all are valid."""
    for key, kind in SHAPE.items():
        *parents, last = key.split(".")
        parent: Any = values
        for name in parents:
            parent = parent[name]
        children = parent.values() if last == "*" else [parent.get(last)]
        if not all(isinstance(child, kind) for child in children):
            return key
    if values["stage"] not in STAGES:
        return "stage"
    for name, input in values["inputs"].items():
        if not all(isinstance(input[key], kind) for key, kind in OF_AN_INPUT.items() if key in input):
            return f"inputs.{name}"
        if "whole" in input and not {"ref", "path", "digest"} <= input.keys():
            return f"inputs.{name}"
        if ("stage" in input) != ("name" in input) or not isinstance(input.get("whole", False), bool):
            return f"inputs.{name}"
    base = values.get("base")
    if base is not None:
        if not (isinstance(base, dict) and set(base) == {"id", "path", "revision", "digest"}):
            return "base"
        if not all(isinstance(value, str) or (key, value) == ("revision", None) for key, value in base.items()):
            return "base"
    for name in ("stage", "reward", "rollout", "model", "run", "store", "track"):
        if not isinstance(values["config"].get(name, {}), dict):
            return f"config.{name}"
    kinds = {"published": int, "seed": int, "digest": str, "error": str, "code": str, "commit": str}
    for key, kind in kinds.items():
        if not isinstance(values.get(key, kind()), kind):
            return key
    if not isinstance(values["config"].get("export", {}), dict):
        return "config.export"
    return "times.finished" if values["status"] == "done" and "finished" not in values["times"] else None


@dataclass(frozen=True, slots=True)
class ManifestDigests:
    """The digests of a run's manifest file and weights at one time, to detect a later change of its metrics.

    Attributes:
        content: digest of the weights that the run published or evaluated. A run that was repeated with other weights
            is not compared.
        sha256: SHA-256 of the file `manifest.json`.
    """

    content: str
    sha256: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def get_weights_digest(manifest: Manifest) -> str:
    """Return the digest of the weights that a run published, or that an evaluation measured; empty if none."""
    evaluated = manifest.inputs.get("artifact") if manifest.stage == "eval" else None
    return manifest.digest or (evaluated.digest if evaluated else "")


def compute_manifest_digests(folder: Path, manifest: Manifest) -> ManifestDigests:
    """Hash `manifest.json` in a run's folder, and return the hash with the digest of the run's weights."""
    return ManifestDigests(get_weights_digest(manifest), file_digest(folder / FILE))


def parse_manifest_digests(value: Any) -> dict[str, ManifestDigests] | None:
    """Parse a JSON mapping from `stage:name` to manifest digests, or return None if the value is invalid."""
    if not isinstance(value, Mapping):
        return None
    manifests: dict[str, ManifestDigests] = {}
    for run, digests in value.items():
        if not isinstance(digests, Mapping) or {*digests} != {"content", "sha256"}:
            return None
        if not all(isinstance(text, str) for text in digests.values()):
            return None
        manifests[str(run)] = ManifestDigests(**digests)
    return manifests
