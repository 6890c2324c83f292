"""The table of served model names: the adapters that each refers to, and changes of it while the server runs.

The `model` of a request is a name, `NAME@sha256:HEX` for a certain version of its weights, or the id of the base. A
name may split its users between several adapters. An unknown name is refused."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import NamedTuple

from align.core.aliases import NAME, NAME_REMEDY
from align.core.errors import require
from align.models.base import BASE, BUILT_IN
from align.run import Base
from align.run.alias_log import SIGN
from align.run.signing import PublicKey
from align.serve.adapter_folders import Version, find_loadable_version
from align.serve.errors import Refusal, UnknownModel
from align.serve.tenants import Tenant

PINNED = re.compile(r"(?P<name>[^@]+)@sha256:(?P<digest>[0-9a-f]{12,64})")


FIELD = "lora_name"
"""Field of a request to load an adapter that holds the name to serve it under, as in vLLM."""
Hook = Callable[[Version], object]
Names = Mapping[str, Sequence["Arm"]]
"""Served name → its arms, which are the adapters that its users are split between."""


@dataclass(frozen=True, slots=True)
class Arm:
    """An adapter, or the base model, that a served name refers to, with its share of the name's users.

    Attributes:
        ref: reference as written on the command line. Users are assigned by it, so that they keep their arm when the
            other arms change.
        label: name of the arm that clients see.
        version: the weights; None for the base without an adapter.
        weight: its share of the users, relative to the weights of the other arms.
        follows: another name, whose present weights the arm always uses; empty for weights of its own.
    """

    ref: str
    label: str
    version: Version | None
    weight: float = 1.0
    follows: str = ""


def do_nothing(_: object) -> None:
    pass


class ChosenModel(NamedTuple):
    """The adapter version, or the base model, that is chosen to answer a request.

    Attributes:
        name: the requested name, without a digest.
        version: the weights; None for the base without an adapter.
        arm: label of the chosen arm; empty if the name has one arm.
    """

    name: str
    version: Version | None
    arm: str = ""


class Portfolio:
    """The model names that a server answers to, each with the adapters that its users are split between.

    Threads may share it: a choice reads one snapshot of all names, and changes are serialised by a lock.

    Args:
        base: the served base.
        method: `qlora` if it is the dequantised NF4 base, `lora` if it is the plain one.
        names: name → its arms, from the command line.
        roots: the folders from which adapters may be loaded.
        signer: the key that must have signed every adapter; None if adapters need no signature.

    Attributes:
        on_new_version: called with each new version before a name refers to it, to load its tensors. If it raises, the
            names stay as they were.
        on_unused_version: called with each version that no name refers to any more.
        on_change: called with all names after each change.

    Raises:
        InputError: a name is that of the base.
    """

    on_new_version: Hook
    on_unused_version: Hook
    on_change: Callable[[Names], object]

    def __init__(
        self,
        base: Base,
        method: str,
        names: Names | None = None,
        roots: Sequence[Path] = (),
        signer: PublicKey | None = None,
    ) -> None:
        self.base = base
        self.method = method
        self.roots = tuple(roots)
        self.signer = signer
        self.base_id = build_public_id(base)
        self.on_new_version = do_nothing
        self.on_unused_version = do_nothing
        self.on_change = do_nothing
        self._names: Mapping[str, tuple[Arm, ...]] = {name: tuple(arms) for name, arms in (names or {}).items()}
        self._change_lock = Lock()
        for name in self._names:
            self._require_not_base(name, "stage.adapters")

    def choose(self, model: str, tenant: Tenant, user: str | None) -> ChosenModel:
        """Return the adapter version that answers a request for `model`; a hash of the user decides between several.

        Args:
            model: NAME, NAME@sha256:HEX with 12 digits or more, or the id of the base.
            tenant, user: if a name has several arms, the same user of a tenant always gets the same one. Without a
                user the whole tenant counts as one.

        Raises:
            UnknownModel: there is no such name or no such version of its weights, or the tenant may not use it.
        """
        pinned = PINNED.fullmatch(model)
        name, digest = (pinned["name"], pinned["digest"]) if pinned else (model, "")
        arms = self.arms(name) if is_allowed(tenant, name) else ()
        matching = [arm for arm in arms if self.get_digest(arm.version).startswith(digest)]
        if not matching or (pinned and len({arm.version for arm in matching}) > 1):  # an ambiguous digest
            raise UnknownModel(model)
        arm = matching[0] if pinned else assign_arm(matching, name, tenant.name, user)
        return ChosenModel(name, arm.version, arm.label if len(arms) > 1 else "")

    def arms(self, name: str) -> tuple[Arm, ...]:
        """Return the adapters that a name refers to now, with their shares of users, or () for an unknown name."""
        names = self._names  # one snapshot: another thread may replace it
        return (Arm("base", "base", None),) if name == self.base_id else resolve_arms(names, name)

    def get_digest(self, version: Version | None) -> str:
        """Return the digest of an adapter version, or the digest of the base model for `version=None`."""
        return self.base.digest if version is None else version.digest

    def describe(self, name: str) -> str:
        """Format a name's adapters as text, such as `ppo:first (0a0e4de46d76)`; several have their weights before them.

        Returns `nothing` for an unknown name.
        """
        arms = self.arms(name)
        parts = [f"{arm.label} ({self.get_digest(arm.version)[:12]})" for arm in arms]
        if len(arms) > 1:
            parts = [f"{arm.weight:.3g} of {part}" for arm, part in zip(arms, parts, strict=True)]
        return ", ".join(parts) or "nothing"

    def names(self, tenant: Tenant | None = None) -> dict[str, tuple[Arm, ...]]:
        """Return model name → its adapters, for the names that a tenant may use, or for all names without a tenant.

        The base is the first name.
        """
        names = self._names
        arms_of = {self.base_id: self.arms(self.base_id)} | {name: resolve_arms(names, name) for name in names}
        return {name: arms for name, arms in arms_of.items() if tenant is None or is_allowed(tenant, name)}

    def load(self, name: str, folder: str) -> Version:
        """Serve the adapter in a folder under `name`, in place of the adapter that the name refers to now, if any.

        Requests in progress keep their version.

        Args:
            folder: a folder below one of the roots, see `align.serve.adapter_folders.find_loadable_version`.

        Raises:
            NotLoadable: see `find_loadable_version`.
            InputError: the name is malformed, is that of the base, or has several arms, an alias or another name.
        """
        require(NAME.fullmatch(name) is not None, FIELD, name, "cannot be a name", NAME_REMEDY)
        version = find_loadable_version(folder, self.roots, self.base.digest, self.method, self.signer)
        with self._change_lock:
            self._require_not_base(name, FIELD)
            arms = self._names.get(name, ())
            is_composite = len(arms) > 1 or any(arm.follows or arm.ref.startswith(SIGN) for arm in arms)
            problem = "refers to other names or an alias on the command line"
            require(not is_composite, FIELD, name, problem, "Load it under another name.")
            self.on_new_version(version)
            self._set_names({**self._names, name: (Arm(name, name, version),)})
        return version

    def replace_arms(self, name: str, arms: Sequence[Arm]) -> None:
        """Replace the adapters that a served name refers to, or do nothing if the name was unloaded.

        Requests in progress keep their version. If `on_new_version` raises for a version, `on_unused_version` is
        called for the versions before it.
        """
        with self._change_lock:
            if name not in self._names:
                return
            present_versions = collect_versions(self._names)
            new_versions: list[Version] = []
            try:
                for digest, version in collect_versions({name: arms}).items():
                    if digest not in present_versions:
                        self.on_new_version(version)
                        new_versions.append(version)
            except BaseException:
                for version in new_versions:
                    self.on_unused_version(version)
                raise
            self._set_names({**self._names, name: tuple(arms)})

    def unload(self, name: str) -> None:
        """Stop serving a name, or raise Refusal (404) if it is not served. Requests in progress keep their version.

        Raises:
            Refusal: there is no such name.
            InputError: other names follow it.
        """
        with self._change_lock:
            if name not in self._names:
                message = f"The lora adapter '{name}' cannot be found."
                raise Refusal(404, message, param=FIELD, code="not_found")
            followers = ", ".join(self.find_followers(name))
            require(not followers, FIELD, name, f"is the target of {followers}", f"Unload {followers} first.")
            self._set_names({other: arms for other, arms in self._names.items() if other != name})

    def find_followers(self, name: str) -> list[str]:
        """Return the served names that are defined on the command line to use the present weights of `name`."""
        return [follower for follower, arms in self._names.items() if any(arm.follows == name for arm in arms)]

    def versions(self) -> dict[str, Version]:
        """Return digest → adapter version, for all versions that any served name refers to."""
        return collect_versions(self._names)

    def report_changes(self, on_change: Callable[[Names], object]) -> None:
        """Call `on_change` with the table of all names and their adapters now, and again after each change."""
        with self._change_lock:
            self.on_change = on_change
            on_change({name: resolve_arms(self._names, name) for name in self._names})

    def _set_names(self, names: Mapping[str, tuple[Arm, ...]]) -> None:
        """Replace the table of names, call `on_change`, and `on_unused_version` for each version without a name."""
        old_versions = self.versions()
        self._names = MappingProxyType(names)
        self.on_change({name: resolve_arms(names, name) for name in names})
        new_versions = self.versions()
        for digest, version in old_versions.items():
            if digest not in new_versions:
                self.on_unused_version(version)

    def _require_not_base(self, name: str, field: str) -> None:
        require(name not in (self.base_id, BASE), field, name, "is the name of the base", "Choose another name.")


def is_allowed(tenant: Tenant, name: str) -> bool:
    """Return whether a tenant may use a model name: it has no `allow` list, or the list contains the name."""
    return tenant.allow is None or name in tenant.allow


def collect_versions(names: Names) -> dict[str, Version]:
    """Return digest → adapter version, for all adapters in a table of names; the base is left out."""
    versions = (arm.version for arms in names.values() for arm in arms)
    return {version.digest: version for version in versions if version is not None}


def resolve_arms(names: Mapping[str, tuple[Arm, ...]], name: str) -> tuple[Arm, ...]:
    """Return the adapters of a name; an arm that follows another name gets that name's present adapter version.

    Returns () for an unknown name.
    """
    return tuple(
        replace(arm, version=names[arm.follows][0].version) if arm.follows else arm for arm in names.get(name, ())
    )


def assign_arm(arms: Sequence[Arm], name: str, tenant: str, user: str | None) -> Arm:
    """Choose the arm that answers a user, by a hash of name and user: the same one each time and on every machine.

    Each arm gets its share of users.
    Weighted rendezvous hashing (Thaler and Ravishankar, 1998): of arm i with weight w_i and a hash u_i in (0, 1) of
    name, arm and user, the largest w_i / −ln u_i. −ln(u_i) / w_i is exponential with rate w_i, and the smallest of
    these is that of arm i with probability w_i / Σ w. If an arm is added or its weight changes, users move only to or
    from that arm.
    """

    def compute_priority(arm: Arm) -> float:
        text = json.dumps([name, arm.ref, tenant, user]).encode()
        hashed = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 11  # the 53 bits that a float holds
        return arm.weight / -math.log((hashed + 0.5) / 2**53)

    return max(arms, key=compute_priority)


def build_public_id(base: Base) -> str:
    """Return the base's id for clients: its id on the hub, or the name of its folder without the path."""
    if base.revision or base.id in BUILT_IN:
        return base.id
    folder = Path(base.path)
    return folder.parent.name if folder.name == "artifact" else folder.name
