"""The portfolio: which weights a name stands for, for whom, and how that changes while requests are answered.

A request names its weights by `model=`: a name, `NAME@sha256:HEX` for one state of its weights, or the id of the base.
A name may divide its users over several adapters. Nobody else answers for a name that is not there."""

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

from align.core.aliases import NAME, NAMED
from align.core.errors import InputError, require
from align.models.base import BUILT_IN
from align.models.start import BASE
from align.run import Base
from align.run.alias_log import SIGN
from align.run.signing import PublicKey
from align.serve.adapter_folders import Version, loadable_version

PINNED = re.compile(r"(?P<name>[^@]+)@sha256:(?P<digest>[0-9a-f]{12,64})")


FIELD = "lora_name"
"""What a request to load calls the name, in vLLM's words."""
Hook = Callable[[Version], object]


def ignored(_: Version) -> None:
    pass


def unheard(_: Mapping[str, Sequence[Arm]]) -> None:
    pass


class UnknownModel(InputError):
    """No such name, or none that this tenant may ask for: one message for both, so that nobody learns of others'
    names. Status 404."""

    def __init__(self, model: str) -> None:
        super().__init__(
            "model", model, "does not exist, or you have no access to it", "GET /v1/models lists what you may ask for."
        )


@dataclass(frozen=True, slots=True)
class Allowed:
    """The names that a tenant may ask for.

    Attributes:
        names: None for all.
    """

    names: frozenset[str] | None = None

    def __contains__(self, name: object) -> bool:
        return self.names is None or name in self.names


@dataclass(frozen=True, slots=True)
class Arm:
    """One of the things that a name stands for.

    Attributes:
        ref: how it was written: its users stay with it whatever stands beside it.
        label: what others are told.
        version: the weights; None for the base without an adapter.
        weight: its share of the users, relative to those of the other arms.
        follows: the name whose weights these are, whatever that name stands for later; empty for weights of its own.
    """

    ref: str
    label: str
    version: Version | None
    weight: float = 1.0
    follows: str = ""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What answers a request.

    Attributes:
        name: that was asked for, without a digest.
        version: the weights; None for the base without an adapter.
        arm: the label of the arm that was chosen; empty where the name stands for one thing.
    """

    name: str
    version: Version | None
    arm: str = ""


@dataclass(frozen=True, slots=True)
class Named:
    """A name that may be asked for, as a list of models has it.

    Attributes:
        arms: what it stands for.
        parent: the id of the base; None for the base itself.
    """

    name: str
    arms: tuple[Arm, ...]
    parent: str | None


class Portfolio:
    """The names that one server answers to. Safe to share between threads: a choice reads one state of all names, and
    changes follow one another.

    Args:
        base: the served base.
        method: `qlora` where it is the dequantised NF4 base, `lora` where it is the plain one.
        names: name → what it stands for, from the command line.
        roots: the folders from which adapters may be loaded.
        signer: has to have signed every adapter; None where nobody has to.

    Raises:
        InputError: a name is that of the base.
    """

    def __init__(
        self, base: Base, method: str, names: Mapping[str, Sequence[Arm]] | None = None, roots: Sequence[Path] = (),
        signer: PublicKey | None = None,
    ) -> None:  # fmt: skip
        self.base, self.method, self.roots, self.signer = base, method, tuple(roots), signer
        self.base_id = public_id(base)
        self._names: Mapping[str, tuple[Arm, ...]] = {name: tuple(arms) for name, arms in (names or {}).items()}
        self._changes, self._told = Lock(), unheard
        for name in self._names:
            self._require_free(name, "stage.adapters")

    def choose(self, model: str, tenant: str, allowed: Allowed, user: str | None) -> Chosen:
        """What answers a request.

        Args:
            model: NAME, NAME@sha256:HEX with 12 digits or more, or the id of the base.
            tenant, user: who asks; where a name stands for several things, the same user gets the same one. Without a
                user the tenant is one user.
            allowed: the names that the tenant may ask for.

        Raises:
            UnknownModel: there is no such name or no such state of its weights, or the tenant may not ask for it.
        """
        pinned = PINNED.fullmatch(model)
        name, digest = (pinned["name"], pinned["digest"]) if pinned else (model, "")
        arms = self.arms(name) if name in allowed else ()
        meant = [arm for arm in arms if self.digest_of(arm.version).startswith(digest)]
        if not meant or (pinned and len({arm.version for arm in meant}) > 1):  # two states that begin alike
            raise UnknownModel(model)
        arm = meant[0] if pinned else sticky(meant, name, tenant, user)
        return Chosen(name, arm.version, arm.label if len(arms) > 1 else "")

    def arms(self, name: str) -> tuple[Arm, ...]:
        """What a name stands for now; nothing for a name that is not there."""
        names = self._names  # one state of all of them
        return (Arm("base", "base", None),) if name == self.base_id else followed(names, name)

    def digest_of(self, version: Version | None) -> str:
        """The digest that a choice is known by: of the base where there is no adapter."""
        return self.base.digest if version is None else version.digest

    def describe(self, name: str) -> str:
        """Return what a name stands for, with shares if that is several things."""
        arms = self.arms(name)
        parts = [f"{arm.label} ({self.digest_of(arm.version)[:12]})" for arm in arms]
        if len(arms) > 1:
            parts = [f"{arm.weight:.3g} of {part}" for arm, part in zip(arms, parts, strict=True)]
        return ", ".join(parts) or "nothing"

    def names(self, allowed: Allowed) -> list[Named]:
        """What may be asked for, the base first."""
        names = self._names
        found = [Named(self.base_id, self.arms(self.base_id), None)] if self.base_id in allowed else []
        return found + [Named(name, followed(names, name), self.base_id) for name in names if name in allowed]

    def load(self, name: str, folder: str, ready: Hook = ignored, gone: Hook = ignored) -> Version:
        """Let a name stand for the adapter in a folder, in place of what it stood for. Requests that were resolved
        keep their version.

        Args:
            folder: below one of the roots, see `align.serve.adapter_folders.loadable_version`.
            ready: is told the version before the name stands for it: reads its tensors, say. If it raises, the name
                stands for what it stood for.
            gone: is told the version before it, if no name stands for that any more.

        Raises:
            NotLoadable: see `loadable_version`.
            InputError: the name cannot be one, is that of the base, or stands for other names.
        """
        require(NAME.fullmatch(name) is not None, FIELD, name, "cannot be a name", NAMED)
        version = loadable_version(folder, self.roots, self.base.digest, self.method, self.signer)
        with self._changes:
            self._require_free(name, FIELD)
            arms = self._names.get(name, ())
            divided = len(arms) > 1 or any(arm.follows or arm.ref.startswith(SIGN) for arm in arms)
            problem = "stands for other names or an alias, as the command line says"
            require(not divided, FIELD, name, problem, "Load it under another name.")
            ready(version)
            self._change({**self._names, name: (Arm(name, name, version),)}, gone)
        return version

    def stand_for(self, name: str, arms: Sequence[Arm], ready: Hook = ignored, gone: Hook = ignored) -> None:
        """Let a name stand for other things, all at once; one that was taken away stays away. Requests that were
        resolved keep their version.

        Args:
            ready: is told each version that is new, before the name stands for it. If it raises, the name stands for
                what it stood for.
            gone: is told each version that no name stands for any more, those that `ready` was told of in vain among
                them.
        """
        with self._changes:
            if name not in self._names:
                return
            known, told = versions_in(self._names), dict[str, Version]()
            try:
                for digest, version in versions_in({name: arms}).items():
                    if digest not in known:
                        ready(version)
                        told[digest] = version
            except BaseException:
                for version in told.values():
                    gone(version)
                raise
            self._change({**self._names, name: tuple(arms)}, gone)

    def unload(self, name: str, gone: Hook = ignored) -> None:
        """Take a name away. Requests that were resolved keep their version.

        Args:
            gone: is told each version that no name stands for any more.

        Raises:
            UnknownModel: there is no such name.
            InputError: other names stand for what it stands for.
        """
        with self._changes:
            if name not in self._names:
                raise UnknownModel(name)
            followers = [other for other, arms in self._names.items() if any(arm.follows == name for arm in arms)]
            problem, remedy = f"is what {', '.join(followers)} stands for", f"Unload {', '.join(followers)} first."
            require(not followers, FIELD, name, problem, remedy)
            self._change({other: arms for other, arms in self._names.items() if other != name}, gone)

    def versions(self) -> dict[str, Version]:
        """Digest → version, of all adapters that a name stands for."""
        return versions_in(self._names)

    def tell(self, told: Callable[[Mapping[str, Sequence[Arm]]], None]) -> None:
        """Tell what every name stands for, now and after each change."""
        with self._changes:
            self._told = told
            told({name: followed(self._names, name) for name in self._names})

    def _change(self, names: Mapping[str, tuple[Arm, ...]], gone: Hook) -> None:
        before, self._names = self._names, MappingProxyType(names)
        self._told({name: followed(names, name) for name in names})
        left = versions_in(names)
        for digest, version in versions_in(before).items():
            if digest not in left:
                gone(version)

    def _require_free(self, name: str, field: str) -> None:
        require(name not in (self.base_id, BASE), field, name, "is the name of the base", "Choose another name.")


def versions_in(names: Mapping[str, Sequence[Arm]]) -> dict[str, Version]:
    """Digest → version, of all arms."""
    versions = (arm.version for arms in names.values() for arm in arms)
    return {version.digest: version for version in versions if version is not None}


def followed(names: Mapping[str, tuple[Arm, ...]], name: str) -> tuple[Arm, ...]:
    """The arms of a name, those that follow another name with the weights of that one."""
    return tuple(
        replace(arm, version=names[arm.follows][0].version) if arm.follows else arm for arm in names.get(name, ())
    )


def sticky(arms: Sequence[Arm], name: str, tenant: str, user: str | None) -> Arm:
    """The arm of a user: the same one each time, on every machine; over many users each arm has its share.

    Weighted rendezvous hashing (Thaler and Ravishankar, 1998): of arm i with weight w_i and a hash u_i in (0, 1) of
    name, arm and user, the largest w_i / −ln u_i. −ln(u_i) / w_i is exponential with rate w_i, and the smallest of
    these is that of arm i with probability w_i / Σ w. If an arm is added or its weight changes, users move only to or
    from that arm.
    """

    def score(arm: Arm) -> float:
        text = json.dumps([name, arm.ref, tenant, user]).encode()
        hashed = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 11  # the 53 bits that a float holds
        return arm.weight / -math.log((hashed + 0.5) / 2**53)

    return max(arms, key=score)


def public_id(base: Base) -> str:
    """What the base is called to others: a hub's id, or the name of its folder; never a path of this machine."""
    if base.revision or base.id in BUILT_IN:
        return base.id
    folder = Path(base.path)
    return folder.parent.name if folder.name == "artifact" else folder.name
