"""Adapters on one base: immutable snapshots that their digest names, each row answered by the one that it chooses.

What trains stays outside. It enters as a snapshot of how it stood, which further training does not touch.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any

from peft import PeftModel

from align.errors import CorruptFile, require
from align.models.actor import Actor, ModelActor
from align.models.adapters import attach
from align.run import Base
from align.run.weights import adapter_digest


def snapshot(actor: Actor, base: Base, into: Path) -> Path:
    """An adapter as it stands now, written to a folder under `into` that its digest names; the one that is there
    already where it has not changed. The folder appears whole or not at all."""
    into.mkdir(parents=True, exist_ok=True)
    part = Path(mkdtemp(prefix=".snapshot-", dir=into))
    try:
        actor.save(part, base)
        folder = into / adapter_digest(part)
        if not folder.is_dir():
            part.chmod(0o755)  # mkdtemp leaves it to its owner alone
            os.rename(part, folder)
        return folder
    finally:
        rmtree(part, ignore_errors=True)


class AdapterPool:
    """Adapters on one base.

    An adapter is known by the digest of its files and by nothing else: one that is trained again under the same name is
    another one here, and never answered for by what the name meant before.

    Args:
        base: a causal language model; nothing of it trains.
        alone: one adapter will be asked, and never the base by itself. It may then be of a kind that changes the base
            (see `align.models.adapters.adapter_config`).

    Attributes:
        model: the base with the adapters on it.
    """

    def __init__(self, base: Any, alone: bool = False) -> None:
        self.model, self.alone = base, alone
        self._digests: set[str] = set()

    def add(self, folder: Path) -> str:
        """Take in the adapter of a folder; nothing is read twice. Returns its digest.

        Raises:
            CorruptFile, InputError: see `align.models.adapters.attach`; or the files changed while they were read.
        """
        digest = adapter_digest(folder)
        if digest in self._digests:
            return digest
        require(
            not (self.alone and self._digests), "adapter", str(folder), "this base was promised to one adapter alone",
            "Make the pool without alone=True.",
        )  # fmt: skip
        self.model = attach(self.model, folder, digest, alone=self.alone)
        self._digests.add(digest)
        if adapter_digest(folder) != digest:
            self.remove(digest)
            raise CorruptFile("adapter", str(folder), "changed while it was read", "Wait until it is written whole.")
        return digest

    def remove(self, digest: str) -> None:
        """Let go of an adapter and its memory.

        Raises:
            InputError: it is not in the pool.
        """
        self.require(digest)
        assert isinstance(self.model, PeftModel)
        self.model.delete_adapter(digest)
        self._digests.remove(digest)
        if not self._digests:
            self.model = self.model.unload()  # PEFT cannot do without one
        elif self.model.active_adapter == digest:  # nor with the name of what is gone, which it leaves there
            self.model.active_adapter = next(iter(self._digests))

    def actor(self, digest: str | None = None) -> Actor:
        """The adapter of this digest; the base by itself without one.

        Raises:
            InputError: it is not in the pool, or the base by itself is asked for and was to be changed.
        """
        self.require(digest)
        return PoolActor(self, digest)

    def require(self, digest: str | None) -> None:
        """Raises: InputError: see `actor`."""
        if digest is None:
            changed = self.alone and bool(self._digests)
            problem = "the base by itself is not asked beside an adapter that may have changed it"
            require(not changed, "adapter", None, problem, "Make the pool without alone=True.")
        else:
            problem = f"is not in the pool of {len(self._digests)} adapters"
            require(digest in self._digests, "adapter", digest, problem, "Add it first.")


@dataclass(frozen=True)
class PoolActor:
    """See `align.models.actor.Actor`."""

    pool: AdapterPool
    digest: str | None

    @property
    def base_alone(self) -> bool:
        return self.digest is None

    def use(self) -> AbstractContextManager[Any]:
        self.pool.require(self.digest)
        return ModelActor(self.pool.model, self.digest).use()

    def save(self, folder: Path, base: Base) -> None:
        self.pool.require(self.digest)
        ModelActor(self.pool.model, self.digest).save(folder, base)
