"""What a stage starts from: an artifact, its base, and the method to go on with. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from align.errors import InputError
from align.models.base import base_of, find_base
from align.run import Artifact, Base, resolve

BASE = "base"
"""The reference to the model that `model=` names, as it is."""


class Start(NamedTuple):
    """What a stage starts from.

    Attributes:
        method: that this artifact goes on with, never `auto`.
    """

    artifact: Artifact
    base: Base
    method: str


def start_from(
    ref: str, root: Path, *, path: str | None = None, revision: str | None = None, method: str = "auto",
    field: str = "init",
) -> Start:  # fmt: skip
    """The artifact a stage starts from, its base, and the method to go on with.

    With a model given, `latest` means the newest on those weights; without, the newest of all, whose base is used.

    Args:
        ref: `base`, or what `align.run.resolve` reads.
        root: the folder of runs.
        path, revision: of `model=`, where one is given.
        method: `auto` for the artifact's own.
        field: what the user calls `ref`.

    Raises:
        MissingArtifact: nothing is there yet; the message names the command that makes it.
        InputError: `model=` or `method=` contradicts the artifact.
    """
    wanted = find_base(path, revision).digest if path else None
    artifact = find(ref, root, path, revision, field, wanted if ref.endswith(":latest") else None)
    return Start(artifact, base_of(artifact, field, path, revision), method_of(artifact, method, field))


def find(
    ref: str, root: Path, path: str | None, revision: str | None, field: str, base_digest: str | None = None
) -> Artifact:
    """What a reference names: `base`, the model of `path` and `revision`; or what `align.run.resolve` finds.

    Raises:
        MissingArtifact: nothing is there yet; the message names the command that makes it.
    """
    return as_artifact(find_base(path, revision)) if ref == BASE else resolve(ref, root, base_digest, field)


def as_artifact(base: Base) -> Artifact:
    """A model as it is, as something to start from."""
    return Artifact(BASE, Path(base.path), base.digest, base, whole=True)


def base_itself(artifact: Artifact) -> Artifact:
    """The base that an adapter was trained on, found anew where it lies by now, as what the adapter started from."""
    return as_artifact(base_of(artifact, "init"))


def method_of(artifact: Artifact, given: str, field: str) -> str:
    """The method to go on with: an adapter belongs to the precision of the base that it was trained on.

    Raises:
        InputError: `method=` contradicts the artifact.
    """
    config = artifact.manifest.config if artifact.manifest else {}
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


def adapter_folder(artifact: Artifact) -> Path | None:
    """The artifact's adapter; None where it is a whole model, which is then the base itself."""
    return None if artifact.whole else artifact.path


def label(base: Base, method: str) -> str:
    """The readable part of a run's name: model and method."""
    name = Path(base.path).parent.name if Path(base.path).name == "artifact" else base.id.rstrip("/").rpartition("/")[2]
    return name if name.endswith(method) else f"{name}-{method}"
