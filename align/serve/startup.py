"""Resolution of the model names on a server's command line to adapters, which must share a base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from align.core.aliases import Arm as ArmReference
from align.core.errors import InputError, require
from align.models.base import BASE, BUILT_IN, find_base, find_base_of_artifact
from align.run import Artifact, Base, read_json_object, resolve
from align.run.alias_log import SIGN
from align.run.artifacts import find_alias_change, load_alias_target
from align.run.signing import PublicKey
from align.run.weights import ABOUT
from align.serve.adapter_folders import (
    Origin,
    Version,
    read_origin,
    read_version,
    require_lora_adapter,
    require_signature,
)
from align.serve.model_names import Arm, Portfolio

FIELD = "stage.adapters"


@dataclass(frozen=True, slots=True)
class ResolvedNames:
    """The model names that a server starts with, and the adapters that they refer to.

    Attributes:
        artifacts: reference → artifact.
        following: the names that follow aliases, as written on the command line.
    """

    portfolio: Portfolio
    artifacts: Mapping[str, Artifact]
    following: Mapping[str, Sequence[ArmReference]]


def open_portfolio(
    arm_references: Mapping[str, Sequence[ArmReference]],
    root: Path,
    *,
    path: str | None = None,
    revision: str | None = None,
    method: str = "auto",
    roots: Sequence[Path] = (),
    signer: PublicKey | None = None,
) -> ResolvedNames:
    """Resolve the model names on a command line to adapters, and check that all were trained on one base model.

    An adapter that does not record its base is accepted for the served base: the operator is trusted.

    Args:
        arm_references: name → its arms: another name, `base`, or a reference for `align.run.resolve`. An
            alias is replaced by all its targets.
        root: the folder of runs.
        path, revision: of `model=`; without a path, the base is that of the adapters.
        method: `qlora` or `lora`; `auto` for the method of the adapters, or `lora` without adapters.
        roots: the folders from which adapters may be loaded later.
        signer: the key that must have signed every adapter, or the base if there are no adapters; None if nothing
            needs a signature.

    Raises:
        MissingArtifact: an artifact does not exist; the message names the command that creates it.
        InputError: an adapter was trained on another base or with another method than the others, `model=` or
            `method=`; is not an adapter or not signed; the base or method is unknown; or a name follows a name that
            follows others.
    """
    following = {name: arms for name, arms in arm_references.items() if any(map(is_alias, arms))}
    alias_targets: dict[str, Artifact] = {}
    expanded = {
        name: expand_aliases(arms, root, f"{FIELD}.{name}", alias_targets) for name, arms in arm_references.items()
    }
    refs = {arm.ref: name for name, arms in expanded.items() for arm in arms if not is_other_name(arm, name, expanded)}
    refs.pop(BASE, None)
    base = find_base(path, revision) if path or not refs else None
    if base is not None and not refs:  # adapters record the digest of their base, which is checked below
        require_signature(Path(base.path), signer, "model", base.id)
    artifacts: dict[str, Artifact] = {}
    # `:latest` means the newest artifact on the base of the others, so that it is resolved last.
    for ref in sorted(refs, key=lambda ref: ref.endswith(":latest")):
        field = f"{FIELD}.{refs[ref]}"
        digest = base.digest if base and ref.endswith(":latest") else None
        artifacts[ref] = alias_targets[ref] if ref in alias_targets else resolve(ref, root, digest, field)
        require_signature(artifacts[ref].path, signer, field, ref)
        require_lora_adapter(artifacts[ref].path, field, ref)
        base = base or find_named_base(artifacts[ref], field)
    if base is None:
        ref = next(iter(artifacts))
        id, _ = read_exported_base(artifacts[ref].path)
        problem = f"was trained on {id}, which is on no hub" if id else "does not say which base it was trained on"
        raise InputError(f"{FIELD}.{refs[ref]}", ref, problem, "Add model=hub model.path=FOLDER of that base.")
    origins = {ref: read_origin(artifact) for ref, artifact in artifacts.items()}
    method = find_shared_method(origins, refs, method)
    for ref, origin in origins.items():
        remedy = "Start a separate server for it, or drop model=." if path else "Start a separate server for it."
        require_same_base(origin, base, f"{FIELD}.{refs[ref]}", ref, remedy)
    versions = {ref: read_version(artifact) for ref, artifact in artifacts.items()}
    names = {
        name: [build_arm(arm, name, expanded, versions, artifacts) for arm in arms] for name, arms in expanded.items()
    }
    return ResolvedNames(Portfolio(base, method, names, roots, signer), artifacts, following)


def is_alias(arm: ArmReference) -> bool:
    """Return whether a reference on the command line is an alias, such as `@production`."""
    return arm.ref.startswith(SIGN)


def expand_aliases(
    arms: Sequence[ArmReference], root: Path, field: str, loaded_targets: dict[str, Artifact]
) -> tuple[ArmReference, ...]:
    """Replace each alias among a name's references by its targets, and add the targets' artifacts to `loaded_targets`.

    The targets of an alias share its weight.

    Args:
        root: the folder of runs, which holds the log of the aliases.
        field: name of the served name in error messages.
        loaded_targets: the artifact of each target is added, by the arm's reference.
    """
    expanded: list[ArmReference] = []
    for arm in arms:
        if not is_alias(arm):
            expanded.append(arm)
            continue
        change = find_alias_change(arm.ref, root, field)
        total = sum(target.weight for target in change.arms)
        for target in change.arms:
            ref = f"{arm.ref} {target.ref}"  # a stable reference: users keep their arm when weights change
            loaded_targets[ref] = load_alias_target(target, change, arm.ref, root, field)
            expanded.append(ArmReference(ref, arm.weight * target.weight / total))
    return tuple(expanded)


def require_same_base(origin: Origin, base: Base, field: str, ref: str, remedy: str) -> None:
    """Raise InputError if an adapter records that it was trained on another base than the served one."""
    problem = f"was trained on another base ({(origin.base or '')[:12]}) than {base.id} ({base.digest[:12]})"
    require(origin.base in (None, base.digest), field, ref, problem, remedy)


def find_named_base(artifact: Artifact, field: str) -> Base | None:
    """Return the base model that an adapter's run or export records, or None if neither says where to find it.

    An export that names a local folder does not.
    """
    if artifact.base is not None:
        return find_base_of_artifact(artifact, field)
    id, revision = read_exported_base(artifact.path)
    return find_base(id, revision or None) if revision or id in BUILT_IN else None


class ExportedBase(NamedTuple):
    """Id and revision of the base model that an exported adapter's files name; empty if they are not recorded."""

    id: str
    revision: str


def read_exported_base(folder: Path) -> ExportedBase:
    """Read the id and revision of an exported adapter's base model, empty strings if they are not recorded."""
    path = folder / ABOUT
    content = read_json_object(path, ABOUT, "Export it again.") if path.is_file() else {}
    return ExportedBase(str(content.get("id") or ""), str(content.get("revision") or ""))


def is_other_name(arm: ArmReference, name: str, arm_references: Mapping[str, Sequence[ArmReference]]) -> bool:
    """Return whether a reference of `name` is another served name; raise InputError if that refers to others itself.

    Raises:
        InputError: that name refers to other names itself.
    """
    if arm.ref == name or arm.ref not in arm_references:
        return False
    target_arms = arm_references[arm.ref]
    is_plain = len(target_arms) == 1 and (target_arms[0].ref == arm.ref or target_arms[0].ref not in arm_references)
    problem = f"{arm.ref} refers to other names itself"
    require(is_plain, f"{FIELD}.{name}", arm.ref, problem, "Write the names or references that it refers to.")
    return True


def find_shared_method(origins: Mapping[str, Origin], names: Mapping[str, str], requested: str) -> str:
    """Return the method that all adapters were trained with, `lora` or `qlora`, or raise InputError if they differ.

    The method decides the precision of the base.

    Args:
        names: reference → its name, for error messages.
        requested: value of `method=`; `auto` for the method that the adapters record.

    Raises:
        InputError: two adapters differ, one contradicts `method=`, or none records its method.
    """
    require(
        requested != "full" or not origins,
        "method",
        requested,
        "adapters have method=qlora or method=lora",
        "Drop it.",
    )
    if not origins:
        return "qlora" if requested == "qlora" else "lora"
    recording_ref = next((ref for ref, origin in origins.items() if origin.method), None)
    if requested == "auto" and recording_ref is None:
        problem = f"it is not recorded how {next(iter(origins))} was trained"
        raise InputError("method", requested, problem, "Say method=qlora (on an NF4 base) or method=lora.")
    shared = str(origins[recording_ref].method) if requested == "auto" and recording_ref is not None else requested
    reason = f"{recording_ref} with method={shared}" if requested == "auto" else f"method={requested} was asked for"
    for ref, origin in origins.items():
        problem = f"was trained with method={origin.method}, and {reason}: they share a base in one precision"
        remedy = "Start a separate server for it." if requested == "auto" else "Drop method=."
        require(origin.method in (None, shared), f"{FIELD}.{names[ref]}", ref, problem, remedy)
    return shared


def build_arm(
    arm: ArmReference,
    name: str,
    arm_references: Mapping[str, Sequence[ArmReference]],
    versions: Mapping[str, Version],
    artifacts: Mapping[str, Artifact],
) -> Arm:
    """Convert a reference of a served name to an Arm: another served name, the base, or an adapter.

    The arm's label shows no path.

    Args:
        arm_references: all names of the command line, with their arms.
        versions, artifacts: reference → loaded adapter.
    """
    if is_other_name(arm, name, arm_references):
        return Arm(arm.ref, arm.ref, None, arm.weight, follows=arm.ref)
    if arm.ref == BASE:
        return Arm(BASE, BASE, None, arm.weight)
    artifact = artifacts[arm.ref]
    label = artifact.manifest.ref if artifact.manifest else artifact.path.absolute().name
    return Arm(arm.ref, label, versions[arm.ref], arm.weight)
