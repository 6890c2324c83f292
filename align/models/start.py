"""What a stage starts from: an artifact, its base, and the method to go on with. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from align.core.errors import InputError, MissingArtifact, require
from align.models.base import base_of, find_base
from align.run import Artifact, Base, Input, artifact_in, resolve
from align.run.lineage import made_in

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


def started_from(artifact: Artifact, named: Artifact | None, root: Path) -> Artifact | None:
    """What an artifact is measured against: what its run started from; None for one that started from the base.

    Args:
        named: by the user, or as the default; of a bare folder, which says nothing itself, it is believed.
        root: the folder of runs.

    Raises:
        MissingArtifact: it is gone, or something else lies there.
        InputError: the artifact was trained from something else than what was named, or started from nothing.
    """
    manifest = artifact.manifest
    if manifest is None:
        return named
    recorded = manifest.inputs.get("init")
    if recorded is None:
        require(
            not artifact.whole, "artifact", artifact.ref, "was trained to imitate, not to be preferred to anything",
            "Its held-out loss before and after is in its own report.",
        )  # fmt: skip
        found, ref, digest = None, "the base", artifact.base.digest if artifact.base else ""
    else:
        on_its_base = replace(artifact, base=manifest.base, whole=False)
        found = base_itself(on_its_base) if recorded.ref == BASE else as_recorded(recorded, root)
        ref, digest = recorded.ref, found.digest
    if named is not None and named.digest != digest:
        problem = f"{artifact.ref} was trained from {ref}, and is measured against that"
        raise InputError("init", named.ref, problem, "Drop init=.")
    return found


def as_recorded(recorded: Input, root: Path) -> Artifact:
    """What an artifact started from, wherever it lies by now.

    Raises:
        MissingArtifact: it is gone, or something else lies there.
    """
    folder = made_in(recorded, root) if recorded.stage else Path(recorded.path)
    if folder is not None and folder.is_dir():
        found = artifact_in(folder, recorded.ref)
        if found.digest == recorded.digest:
            return found
    raise MissingArtifact(
        "init", recorded.ref, f"what the artifact started from ({recorded.digest[:12]}) is gone, or was changed",
        "Restore it, or evaluate an artifact whose start is there.",
    )  # fmt: skip


def method_of(artifact: Artifact, given: str, field: str) -> str:
    """The method to go on with: an adapter belongs to the precision of the base that it was trained on.

    Raises:
        InputError: `method=` contradicts the artifact.
    """
    trained = trained_with(artifact)
    if given == "auto":
        return trained or "qlora"
    if trained not in (None, given):
        whole = "Start from a whole model (init=base, full:NAME, a folder or hub:ID): stage=full trains every weight."
        remedy = whole if given == "full" else "Drop method=, or start from an artifact of that method."
        raise InputError("method", given, f"{field}={artifact.ref} was trained with method={trained}", remedy)
    return given


def trained_with(artifact: Artifact) -> str | None:
    """The method that an adapter was trained with; None of a whole model, and where no run says it."""
    config = artifact.manifest.config if artifact.manifest else {}
    return None if artifact.whole else config.get("method", {}).get("name")


def same_method(reward: Artifact, field: str, policy: Artifact, method: str) -> None:
    """A reward model is an adapter on the base of the policy, which is kept in one precision.

    Args:
        reward: named by `field`.
        policy: what the policy starts from.
        method: that the policy is trained with.

    Raises:
        InputError: the reward model was trained on the base in another precision.
    """
    trained, start = trained_with(reward), f"init={policy.ref}"
    if trained in (None, frozen_as(method)):
        return
    problem = f"was trained with method={trained}, and the policy, from {start}, has method={method}: they share a base"
    fits = {"lora": "method=lora (an adapter) or method=full (every weight)", "qlora": "method=qlora"}
    anew = f"train the reward model with stage=reward {start}"
    remedy = f"Write {fits[trained]}, or {anew} method={frozen_as(method)}." if policy.whole and trained in fits else ""
    raise InputError(field, reward.ref, problem, remedy or f"{anew[0].upper()}{anew[1:]}.")


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
