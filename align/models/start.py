"""Find the artifact that a stage starts from, its base and its method. Imports no torch."""

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
    """The start of a stage.

    Attributes:
        method: the method of the stage, never `auto`.
    """

    artifact: Artifact
    base: Base
    method: str


def start_from(
    ref: str,
    root: Path,
    *,
    path: str | None = None,
    revision: str | None = None,
    method: str = "auto",
    field: str = "init",
) -> Start:
    """Find the artifact that a stage starts from, its base, and the method.

    With a model given, `latest` is the newest artifact on those weights; else the newest of all, whose base is used.

    Args:
        ref: `base`, or a reference that `align.run.resolve` reads.
        root: the folder of runs.
        path, revision: of `model=`, if one is given.
        method: `auto` for the artifact's own.
        field: the setting that holds `ref`, for errors.

    Raises:
        MissingArtifact: there is no such artifact; the message names the command that makes it.
        InputError: `model=` or `method=` contradicts the artifact.
    """
    wanted = find_base(path, revision).digest if path else None
    artifact = find(ref, root, path, revision, field, wanted if ref.endswith(":latest") else None)
    return Start(artifact, base_of(artifact, field, path, revision), method_of(artifact, method, field))


def find(
    ref: str, root: Path, path: str | None, revision: str | None, field: str, base_digest: str | None = None
) -> Artifact:
    """Return the artifact of a reference: for `base`, the model of `path` and `revision`.

    Raises:
        MissingArtifact: there is no such artifact; the message names the command that makes it.
    """
    return as_artifact(find_base(path, revision)) if ref == BASE else resolve(ref, root, base_digest, field)


def as_artifact(base: Base) -> Artifact:
    """Return a base model as an artifact."""
    return Artifact(BASE, Path(base.path), base.digest, base, whole=True)


def base_itself(artifact: Artifact) -> Artifact:
    """Return the base that an adapter was trained on as an artifact, from where it lies now."""
    return as_artifact(base_of(artifact, "init"))


def started_from(artifact: Artifact, named: Artifact | None, root: Path) -> Artifact | None:
    """Return what an artifact's run started from, which is its reference; None if that is the base.

    Args:
        named: the reference by `init=` or its default. It is taken for a folder without a manifest.
        root: the folder of runs.

    Raises:
        MissingArtifact: the start is gone or was changed.
        InputError: the artifact started from something else than `named`, or has no reference.
    """
    manifest = artifact.manifest
    if manifest is None:
        return named
    recorded = manifest.inputs.get("init")
    if recorded is None:
        require(
            not artifact.whole,
            "artifact",
            artifact.ref,
            "was trained to imitate, not to be preferred to anything",
            "Its held-out loss before and after is in its own report.",
        )
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
    """Return a recorded input as an artifact, from where it lies now.

    Raises:
        MissingArtifact: it is gone or was changed.
    """
    folder = made_in(recorded, root) if recorded.stage else Path(recorded.path)
    if folder is not None and folder.is_dir():
        found = artifact_in(folder, recorded.ref)
        if found.digest == recorded.digest:
            return found
    raise MissingArtifact(
        "init",
        recorded.ref,
        f"what the artifact started from ({recorded.digest[:12]}) is gone, or was changed",
        "Restore it, or evaluate an artifact whose start is there.",
    )


def method_of(artifact: Artifact, given: str, field: str) -> str:
    """Return the method of a stage, which is the one of its adapter: an adapter belongs to the precision of its base.

    Args:
        given: the setting; `auto` for the artifact's own.

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
    """Return the method that an adapter was trained with; None for a whole model, and if no run recorded it."""
    config = artifact.manifest.config if artifact.manifest else {}
    return None if artifact.whole else config.get("method", {}).get("name")


def same_method(reward: Artifact, field: str, policy: Artifact, method: str) -> None:
    """Check that a reward model was trained on the base in the precision of the policy, because they share it.

    Args:
        field: the setting that names `reward`.
        policy: the start of the policy.
        method: of the policy's training.

    Raises:
        InputError: the precision is another one.
    """
    trained = trained_with(reward)
    start = f"init={policy.ref}"
    if trained in (None, frozen_as(method)):
        return
    problem = f"was trained with method={trained}, and the policy, from {start}, has method={method}: they share a base"
    fits = {"lora": "method=lora (an adapter) or method=full (every weight)", "qlora": "method=qlora"}
    anew = f"train the reward model with stage=reward {start}"
    remedy = f"Write {fits[trained]}, or {anew} method={frozen_as(method)}." if policy.whole and trained in fits else ""
    raise InputError(field, reward.ref, problem, remedy or f"{anew[0].upper()}{anew[1:]}.")


def frozen_as(method: str) -> str:
    """Return the method by which a frozen base is loaded: that of its adapters; beside a full policy, `lora`."""
    return "lora" if method == "full" else method


def adapter_folder(artifact: Artifact) -> Path | None:
    """Return the folder of an artifact's adapter; None for a whole model, which is the base itself."""
    return None if artifact.whole else artifact.path


def label(base: Base, method: str) -> str:
    """Return the readable part of a run's name: model and method."""
    name = Path(base.path).parent.name if Path(base.path).name == "artifact" else base.id.rstrip("/").rpartition("/")[2]
    return name if name.endswith(method) else f"{name}-{method}"
