"""Which adapters may be asked for, where their files lie, and who is using them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock

from align.core.errors import CorruptFile, InputError
from align.run.weights import adapter_digest


@dataclass(slots=True)
class Known:
    """Attributes:
    folders: where it lies; in several, if it has several names.
    held: requests that use it.
    registered: whether new requests may.
    """

    folders: list[Path]
    held: int = 0
    registered: bool = True


@dataclass(slots=True)
class KnownAdapters:
    """Adapters by the digest of their two files. One that is unregistered while somebody uses it is forgotten once they
    have finished. Safe to share between threads."""

    by_digest: dict[str, Known] = field(default_factory=dict)
    lock: RLock = field(default_factory=RLock)

    def register(self, folder: Path, expected: str = "") -> str:
        """Make the adapter in a folder known. Returns its digest.

        Args:
            expected: the digest that was read before, where one was.

        Raises:
            CorruptFile: its files have changed since.
        """
        digest = adapter_digest(folder)
        if expected not in ("", digest):
            problem = "its files were changed while it was loaded"
            raise CorruptFile("adapter", expected[:12], problem, "Load it again, once it is written whole.")
        with self.lock:
            known = self.by_digest.setdefault(digest, Known([]))
            known.folders = [*(each for each in known.folders if each != folder), folder]
            known.registered = True
        return digest

    def unregister(self, digest: str) -> None:
        """Let no new request use it.

        Raises:
            InputError: it is not registered.
        """
        with self.lock:
            known = self.by_digest.get(digest)
            if known is None or not known.registered:
                raise unregistered(digest)
            known.registered = False
            self._forget(digest)

    def hold(self, digest: str) -> None:
        """Somebody uses it, until `release`. Whoever holds it may be joined by others, also once it is unregistered.

        Raises:
            InputError: it is not registered, and nobody holds it.
        """
        with self.lock:
            if digest not in self.by_digest:
                raise unregistered(digest)
            self.by_digest[digest].held += 1

    def release(self, digest: str) -> None:
        with self.lock:
            self.by_digest[digest].held -= 1
            self._forget(digest)

    def folder(self, digest: str) -> Path:
        """Where one that is held lies, found unchanged.

        Raises:
            CorruptFile: its files are gone, or not those that were registered.
        """
        for folder in self.by_digest[digest].folders:
            if folder.is_dir() and adapter_digest(folder) == digest:
                return folder
        problem = "its files were changed after it was registered"
        raise CorruptFile("adapter", digest[:12], problem, "Load it again, so that the new weights get their name.")

    def __contains__(self, digest: str) -> bool:
        return digest in self.by_digest

    def _forget(self, digest: str) -> None:
        known = self.by_digest[digest]
        if not known.registered and known.held == 0:
            del self.by_digest[digest]


def unregistered(digest: str) -> InputError:
    return InputError("adapter", digest, "is not registered", "Load it first.")
