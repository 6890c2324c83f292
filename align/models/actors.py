"""Models with an active adapter, which rollout engines sample from, and a pool of adapters on one base."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, Protocol

from peft import PeftModel

from align.core.errors import CorruptFile, InputError
from align.models.adapters import attach_adapter, detach_adapter, save_adapter
from align.models.fastpath.linear import require_known_adapters
from align.run import Base
from align.run.atomic import convert_os_errors, replace_folder, scratch_folder
from align.run.weights import adapter_digest, compute_published_digest


class Actor(Protocol):
    """A model that rollout engines sample from: an adapter on a base, a role of PPO, or a whole model."""

    @property
    def is_bare_base(self) -> bool:
        """True for a base without an adapter, which has no weights of its own to save."""
        ...

    def use(self) -> AbstractContextManager[Any]:
        """Return a context manager that activates the adapter or role and yields the model.

        Raises:
            InputError: the model has no such adapter.
        """
        ...

    def save(self, folder: Path, base: Base) -> None:
        """Save the adapter in PEFT's format, or the whole model, to `folder` for an engine in another process.

        Must not be called for a base alone. If the weights are sharded over ranks, every rank must call it.
        """
        ...


@dataclass(frozen=True)
class ModelActor:
    """A model with the name of the adapter to activate, or None for the base alone."""

    model: Any
    adapter: str | None = None

    @property
    def is_bare_base(self) -> bool:
        return self.adapter is None

    @contextmanager
    def use(self) -> Iterator[Any]:
        """Activate the adapter, or disable all for None, and yield the model for sampling and logprobs, without
        gradients for adapters.

        Raises:
            InputError: the model has no such adapter.
        """
        if self.adapter is not None:
            require_known_adapters([self.adapter], getattr(self.model, "peft_config", ()))
            self.model.set_adapter(self.adapter, inference_mode=True)
        if self.adapter is not None or not isinstance(self.model, PeftModel):
            yield self.model
            return
        try:
            with self.model.disable_adapter():
                yield self.model
        finally:  # PEFT lets the active adapter train after this block
            self.model.set_requires_grad(self.model.active_adapters, False)

    def save(self, folder: Path, base: Base) -> None:
        assert self.adapter is not None, "a base without an adapter has no trained weights"
        save_adapter(self.model, folder, base, self.adapter)


def save_snapshot(actor: Actor, base: Base, snapshots_folder: Path) -> Path:
    """Save an actor's current weights to a folder under `snapshots_folder` that is named by their digest, and return
    the folder.

    Weights that were saved before are not written again. The folder appears complete or not at all, even if several
    processes write it at once.

    Raises:
        StorageError: the folder cannot be written.
    """
    with scratch_folder(snapshots_folder / "snapshot") as part, convert_os_errors(snapshots_folder):
        actor.save(part, base)
        digest = compute_published_digest(part)
        assert digest, "no saved weights exist to load again"
        handle = os.open(snapshots_folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if compute_published_digest(snapshots_folder / digest) != digest:  # it is missing, or a crash cut its files
                replace_folder(part, snapshots_folder / digest)
        finally:
            os.close(handle)  # also releases the lock
    return snapshots_folder / digest


class AdapterPool:
    """A set of immutable adapters on one base model, addressed by the digest of their two files. Safe to share between
    threads.

    Only one actor is in use at a time: another thread waits in `use` until the actor is released.

    Args:
        base: a frozen causal language model.
        is_only_adapter: whether only one adapter will be used, and never the base without it. The adapter may then be
            of a kind that changes the base (see `align.models.adapters.read_adapter_config`).

    Attributes:
        model: the base with the adapters on it.
    """

    def __init__(self, base: Any, is_only_adapter: bool = False) -> None:
        self.model = base
        self.is_only_adapter = is_only_adapter
        self.lock = RLock()
        self._digests: set[str] = set()

    def add(self, folder: Path) -> str:
        """Load the adapter in a folder onto the base, unless it is loaded already, and return its digest.

        Raises:
            CorruptFile, InputError: see `align.models.adapters.attach_adapter`; or the files changed while they were
                read. The pool is then unchanged.
            ValueError: the pool was created with `is_only_adapter`, and has an adapter already.
        """
        with self.lock:
            digest = adapter_digest(folder)
            if digest in self._digests:
                return digest
            if self.is_only_adapter and self._digests:
                raise ValueError("this base was loaded for one adapter only")
            self.model = attach_adapter(self.model, folder, digest, is_only_adapter=self.is_only_adapter)
            self._digests.add(digest)
            if adapter_digest(folder) != digest:
                self.remove(digest)
                problem = "changed while it was read"
                raise CorruptFile("adapter", str(folder), problem, "Wait until it is written whole.")
            return digest

    def remove(self, digest: str) -> None:
        """Unload the adapter with this digest, after waiting until it is not in use.

        Raises:
            InputError: it is not loaded.
        """
        with self.lock:
            self.require_loaded(digest)
            assert isinstance(self.model, PeftModel)
            self._digests.remove(digest)
            if self._digests:
                detach_adapter(self.model, digest)
            else:
                self.model = self.model.unload()  # a PeftModel without adapters fails

    def actor(self, digest: str | None = None) -> Actor:
        """Return the adapter with this digest as an Actor, or the base alone without a digest.

        Raises:
            InputError: the adapter is not loaded.
            ValueError: the base is requested, but an adapter may have changed it.
        """
        self.require_loaded(digest)
        return PoolActor(self, digest)

    def require_loaded(self, digest: str | None) -> None:
        """Raise InputError if no adapter with this digest is loaded. Without a digest, raise ValueError if the base
        alone may not be used."""
        if digest is None:
            if self.is_only_adapter and self._digests:
                raise ValueError("the base cannot be used beside an adapter that may have changed its weights")
        elif digest not in self._digests:
            loaded = ", ".join(sorted(loaded_digest[:12] for loaded_digest in self._digests)) or "none"
            raise InputError("adapter", digest, "is not loaded", f"Name one that is: {loaded}.")


@dataclass(frozen=True)
class PoolActor:
    """An adapter of a pool, or the pool's base, which locks the pool while it is used."""

    pool: AdapterPool
    digest: str | None

    @property
    def is_bare_base(self) -> bool:
        return self.digest is None

    @contextmanager
    def use(self) -> Iterator[Any]:
        with self.pool.lock:
            self.pool.require_loaded(self.digest)
            with ModelActor(self.pool.model, self.digest).use() as model:
                yield model

    def save(self, folder: Path, base: Base) -> None:
        with self.pool.lock:
            self.pool.require_loaded(self.digest)
            ModelActor(self.pool.model, self.digest).save(folder, base)
