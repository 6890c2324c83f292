"""Adapters on one base: immutable snapshots that their digest names, each row answered by the one that it chooses.

What trains stays outside. It enters as a snapshot of how it stood, which further training does not touch.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

from peft import PeftModel

from align.core.errors import CorruptFile, InputError
from align.models.actor import Actor, ModelActor
from align.models.adapters import attach, detach
from align.run import Base
from align.run.atomic import moved, scratch_folder, unwritable
from align.run.weights import adapter_digest, published_digest


def snapshot(actor: Actor, base: Base, into: Path) -> Path:
    """An actor's weights as they stand now, in a folder under `into` that their digest names; the one that is there
    already where they have not changed. The folder appears whole or not at all, also where several write it at once.

    Raises:
        StorageError: the folder cannot be written.
    """
    with scratch_folder(into / "snapshot") as part, unwritable(into):
        actor.save(part, base)
        digest = published_digest(part)
        assert digest, "nothing was saved that could be loaded again"
        with locked(into):
            if published_digest(into / digest) != digest:  # it is not there, or a crash cut its files
                moved(part, into / digest)
    return into / digest


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One at a time, threads and processes of this machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # which also lets go of it


class AdapterPool:
    """Adapters on one base.

    An adapter is known by the digest of its two files and by nothing else: one that is trained again under the same
    name is another one here, and never answered for by what the name meant before. One actor speaks at a time: a thread
    waits in `use` until the other has left it.

    Args:
        base: a causal language model; nothing of it trains.
        alone: one adapter will be asked, and never the base by itself. It may then be of a kind that changes the base
            (see `align.models.adapter_files.adapter_config`).

    Attributes:
        model: the base with the adapters on it.
    """

    def __init__(self, base: Any, alone: bool = False) -> None:
        self.model, self.alone, self.lock = base, alone, RLock()
        self._digests: set[str] = set()

    def add(self, folder: Path) -> str:
        """Load the adapter in a folder; one that is loaded already is not loaded again. Returns its digest.

        Raises:
            CorruptFile, InputError: see `align.models.adapters.attach`; or the files changed while they were read. The
                pool is as it was then.
            ValueError: this base was promised to another adapter alone.
        """
        with self.lock:
            digest = adapter_digest(folder)
            if digest in self._digests:
                return digest
            if self.alone and self._digests:
                raise ValueError("this base was promised to one adapter alone")
            self.model = attach(self.model, folder, digest, alone=self.alone)
            self._digests.add(digest)
            if adapter_digest(folder) != digest:
                self.remove(digest)
                problem = "changed while it was read"
                raise CorruptFile("adapter", str(folder), problem, "Wait until it is written whole.")
            return digest

    def remove(self, digest: str) -> None:
        """Let go of an adapter and its memory. Whoever speaks by it ends first.

        Raises:
            InputError: it is not loaded.
        """
        with self.lock:
            self.require(digest)
            assert isinstance(self.model, PeftModel)
            self._digests.remove(digest)
            if self._digests:
                detach(self.model, digest)
            else:
                self.model = self.model.unload()  # PEFT cannot do without an adapter

    def actor(self, digest: str | None = None) -> Actor:
        """The adapter of this digest; the base by itself without one.

        Raises:
            InputError: it is not loaded.
            ValueError: the base by itself is asked for beside an adapter that may have changed it.
        """
        self.require(digest)
        return PoolActor(self, digest)

    def require(self, digest: str | None) -> None:
        """Raises: InputError, ValueError: see `actor`."""
        if digest is None:
            if self.alone and self._digests:
                raise ValueError("the base by itself is not asked beside an adapter that may have changed it")
        elif digest not in self._digests:
            loaded = ", ".join(sorted(known[:12] for known in self._digests)) or "none"
            raise InputError("adapter", digest, "is not loaded", f"Name one that is: {loaded}.")


@dataclass(frozen=True)
class PoolActor:
    """See `align.models.actor.Actor`."""

    pool: AdapterPool
    digest: str | None

    @property
    def base_alone(self) -> bool:
        return self.digest is None

    @contextmanager
    def use(self) -> Iterator[Any]:
        with self.pool.lock:
            self.pool.require(self.digest)
            with ModelActor(self.pool.model, self.digest).use() as model:
                yield model

    def save(self, folder: Path, base: Base) -> None:
        with self.pool.lock:
            self.pool.require(self.digest)
            ModelActor(self.pool.model, self.digest).save(folder, base)
