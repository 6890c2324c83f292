"""Folders that the first worker of a test run makes and all workers share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


class MadeOnce:
    """Folders that are made once for all processes of one test run. They are shared, so no test may change them.

    Args:
        root: the parent of all these folders.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the folder of a name. The first caller makes it while the other processes wait."""
        folder = self.root / name
        marker = self.root / f"{name}.done"
        with FileLock(self.root / f"{name}.lock"):
            if not marker.exists():
                folder.mkdir()
                make(folder)
                marker.touch()
        return folder
