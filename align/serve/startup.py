"""The names that a server starts with: the references of its command line, resolved and checked to be on one base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from align.core.aliases import Arm as Written
from align.core.errors import InputError, require
from align.models.base import BASE, BUILT_IN, base_of, find_base
from align.run import Artifact, Base, read_json_object, resolve
from align.run.alias_log import SIGN
from align.run.artifacts import find_alias_change, load_alias_target
from align.run.signing import PublicKey
from align.run.weights import ABOUT
from align.serve.adapter_folders import Origin, Version, check_adapter, check_signed, origin_of, version_of
from align.serve.model_names import Arm, Portfolio

FIELD = "stage.adapters"


@dataclass(frozen=True, slots=True)
class Opened:
    """Attributes:
    artifacts: what each reference names.
    following: the names that mean what an alias means, as they were written.
    """

    portfolio: Portfolio
    artifacts: Mapping[str, Artifact]
    following: Mapping[str, Sequence[Written]]


def open_portfolio(
    written: Mapping[str, Sequence[Written]],
    root: Path,
    *,
    path: str | None = None,
    revision: str | None = None,
    method: str = "auto",
    roots: Sequence[Path] = (),
    signer: PublicKey | None = None,
) -> Opened:
    """Resolve what the names of a command line refer to.

    An adapter that does not record its base is taken as one of the served base: the operator vouches for it.

    Args:
        written: name → the references of its arms: another name, `base`, or what `align.run.resolve` reads. An alias
            refers to all that it means.
        root: the folder of runs.
        path, revision: of `model=`, if one is given; otherwise the base is that of the adapters.
        method: `auto` for that of the adapters; the base as it is if there are none.
        roots: the folders from which adapters may be loaded later.
        signer: has to have signed every adapter, or the base if there is none; None if nothing has to be signed.

    Raises:
        MissingArtifact: nothing is there; the message names the command that makes it.
        InputError: an adapter is of another base or precision than the others or than `model=` and `method=` say, or
            is no adapter, or is not signed; nothing says which base or precision; a name follows one that follows
            others.
    """
    following = {name: arms for name, arms in written.items() if any(map(is_alias, arms))}
    meant: dict[str, Artifact] = {}
    written = {name: expand_aliases(arms, root, f"{FIELD}.{name}", meant) for name, arms in written.items()}
    refs = {arm.ref: name for name, arms in written.items() for arm in arms if not follows(arm, name, written)}
    refs.pop(BASE, None)
    base = find_base(path, revision) if path or not refs else None
    if base is not None and not refs:  # the base of adapters is known by the digest that they name
        check_signed(Path(base.path), signer, "model", base.id)
    artifacts: dict[str, Artifact] = {}
    for ref in sorted(refs, key=lambda ref: ref.endswith(":latest")):  # which is the newest on the base of the others
        field = f"{FIELD}.{refs[ref]}"
        digest = base.digest if base and ref.endswith(":latest") else None
        artifacts[ref] = meant[ref] if ref in meant else resolve(ref, root, digest, field)
        check_signed(artifacts[ref].path, signer, field, ref)
        check_adapter(artifacts[ref].path, field, ref)
        base = base or find_named_base(artifacts[ref], field)
    if base is None:
        ref = next(iter(artifacts))
        id, _ = read_exported_base(artifacts[ref].path)
        problem = f"was trained on {id}, which is on no hub" if id else "does not say which base it was trained on"
        raise InputError(f"{FIELD}.{refs[ref]}", ref, problem, "Add model=hub model.path=FOLDER of that base.")
    origins = {ref: origin_of(artifact) for ref, artifact in artifacts.items()}
    method = find_shared_method(origins, refs, method)
    for ref, origin in origins.items():
        remedy = "Serve it by a server of its own, or drop model=." if path else "Serve it by a server of its own."
        check_base(origin, base, f"{FIELD}.{refs[ref]}", ref, remedy)
    versions = {ref: version_of(artifact) for ref, artifact in artifacts.items()}
    names = {
        name: [build_arm(arm, name, written, versions, artifacts) for arm in arms] for name, arms in written.items()
    }
    return Opened(Portfolio(base, method, names, roots, signer), artifacts, following)


def is_alias(arm: Written) -> bool:
    return arm.ref.startswith(SIGN)


def expand_aliases(
    arms: Sequence[Written], root: Path, field: str, artifacts: dict[str, Artifact]
) -> tuple[Written, ...]:
    """Return the arms of a name. In place of an alias stand the arms that it means, with its weight.

    Args:
        artifacts: the artifact of each of those is added.
    """
    expanded: list[Written] = []
    for arm in arms:
        if not is_alias(arm):
            expanded.append(arm)
            continue
        change = find_alias_change(arm.ref, root, field)
        total = sum(meant.weight for meant in change.arms)
        for meant in change.arms:
            ref = f"{arm.ref} {meant.ref}"  # the users of an arm stay with it while the weights change
            artifacts[ref] = load_alias_target(meant, change, arm.ref, root, field)
            expanded.append(Written(ref, arm.weight * meant.weight / total))
    return tuple(expanded)


def check_base(origin: Origin, base: Base, field: str, ref: str, remedy: str) -> None:
    """Raise InputError if an adapter was trained on another base than the served one."""
    problem = f"was trained on another base ({(origin.base or '')[:12]}) than {base.id} ({base.digest[:12]})"
    require(origin.base in (None, base.digest), field, ref, problem, remedy)


def find_named_base(artifact: Artifact, field: str) -> Base | None:
    """Return the base that an adapter's run recorded, or that the folder of its export names. Returns None if neither
    does, or if it is a folder of another machine."""
    if artifact.base is not None:
        return base_of(artifact, field)
    id, revision = read_exported_base(artifact.path)
    return find_base(id, revision or None) if revision or id in BUILT_IN else None


def read_exported_base(folder: Path) -> tuple[str, str]:
    """Return the id and the hub's revision of a base, as stage=export wrote them; empty if it did not."""
    path = folder / ABOUT
    content = read_json_object(path, ABOUT, "Export it again.") if path.is_file() else {}
    return str(content.get("id") or ""), str(content.get("revision") or "")


def follows(arm: Written, name: str, written: Mapping[str, Sequence[Written]]) -> bool:
    """Return whether an arm is another name of the command line.

    Raises:
        InputError: that name follows others itself.
    """
    if arm.ref == name or arm.ref not in written:
        return False
    target_arms = written[arm.ref]
    plain = len(target_arms) == 1 and (target_arms[0].ref == arm.ref or target_arms[0].ref not in written)
    problem = f"{arm.ref} stands for other names itself"
    require(plain, f"{FIELD}.{name}", arm.ref, problem, "Write the names or references that it stands for.")
    return True


def find_shared_method(origins: Mapping[str, Origin], names: Mapping[str, str], given: str) -> str:
    """Return the method that all adapters were trained with, which says how their base is kept.

    Args:
        names: reference → its name, for messages.
        given: by `method=`; `auto` for what the adapters say.

    Raises:
        InputError: two differ, one contradicts `method=`, or there are adapters and none says it.
    """
    require(given != "full" or not origins, "method", given, "adapters are of method=qlora or method=lora", "Drop it.")
    if not origins:
        return "qlora" if given == "qlora" else "lora"
    first = next((ref for ref, origin in origins.items() if origin.method), None)
    if given == "auto" and first is None:
        problem = f"nothing says how {next(iter(origins))} was trained"
        raise InputError("method", given, problem, "Say method=qlora (on an NF4 base) or method=lora.")
    shared = str(origins[first].method) if given == "auto" and first is not None else given
    reason = f"{first} with method={shared}" if given == "auto" else f"method={given} was asked for"
    for ref, origin in origins.items():
        problem = f"was trained with method={origin.method}, and {reason}: they share a base in one precision"
        remedy = "Serve it by a server of its own." if given == "auto" else "Drop method=."
        require(origin.method in (None, shared), f"{FIELD}.{names[ref]}", ref, problem, remedy)
    return shared


def build_arm(
    arm: Written,
    name: str,
    written: Mapping[str, Sequence[Written]],
    versions: Mapping[str, Version],
    artifacts: Mapping[str, Artifact],
) -> Arm:
    """Return what one reference of a name refers to, by a label that shows no path."""
    if follows(arm, name, written):
        return Arm(arm.ref, arm.ref, None, arm.weight, follows=arm.ref)
    if arm.ref == BASE:
        return Arm(BASE, BASE, None, arm.weight)
    artifact = artifacts[arm.ref]
    label = artifact.manifest.ref if artifact.manifest else artifact.path.absolute().name
    return Arm(arm.ref, label, versions[arm.ref], arm.weight)
