"""Fixtures that are made once for all workers of a test run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


class MadeOnce:
    """Folders that are made once for all processes of one test run. Their content is shared: nobody changes it.

    Args:
        root: of all these folders.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return a folder by its name: whoever comes first makes it, and the others wait meanwhile."""
        folder, done = self.root / name, self.root / f"{name}.done"
        with FileLock(self.root / f"{name}.lock"):
            if not done.exists():
                folder.mkdir()
                make(folder)
                done.touch()
        return folder
