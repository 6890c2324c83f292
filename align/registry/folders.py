"""The run folders as files: which there are, whether they have changed, and whether a process works in one."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from align.config.stages import WITH_RUNS
from align.core.errors import InputError
from align.registry.record import ADAPTERS
from align.run.figures import FILE as METRICS
from align.run.figures import IN_ARTIFACT
from align.run.manifest import FILE
from align.run.stale import FILE as STALE

NO_FILE = ""
"""The stamp of a manifest that is no file."""


def folders(root: Path) -> Iterator[tuple[str, str]]:
    """`stage:name` and a stamp of each folder with a manifest: one that was replaced has another stamp. So has
    that of a run which was marked stale, or whose file of figures was written again.

    Raises:
        InputError: a folder of runs cannot be listed.
    """
    for stage in WITH_RUNS:
        try:
            with os.scandir(root / stage) as entries:
                names = [entry.name for entry in entries]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            problem, remedy = f"cannot be listed ({error.strerror})", "Change its rights, or name another run.root."
            raise InputError("run.root", str(root / stage), problem, remedy) from error
        for name in names:
            with suppress(OSError):  # no folder, or gone meanwhile
                found = os.stat(f"{root}/{stage}/{name}/{FILE}")  # a path of 10,000 each would take as long again
                file = stat.S_ISREG(found.st_mode)
                stamp = f"{found.st_mtime_ns}-{found.st_size}-{found.st_ino}"
                for figures in (METRICS, IN_ARTIFACT) if stage == "eval" else (METRICS,):
                    stamp += written(f"{root}/{stage}/{name}/{figures}")
                if stage == "serve":  # what a server loads later stands in a file of its own
                    stamp += grown(f"{root}/{stage}/{name}/{ADAPTERS}")
                mark = f"{root}/{stage}/{name}/{STALE}"
                if os.access(mark, os.F_OK):  # which most are not: an exception would cost more than all of this
                    stamp += f"-{os.stat(mark).st_mtime_ns}"
                yield f"{stage}:{name}", stamp if file else NO_FILE


def written(path: str) -> str:
    """Return what changes when a file is written or removed; empty if there is none."""
    with suppress(OSError):
        found = os.stat(path)
        return f"-{found.st_mtime_ns}-{found.st_size}"
    return "-"


def grown(path: str) -> str:
    """What tells that a log has grown; empty where there is none."""
    with suppress(OSError):
        return f"-{os.stat(path).st_size}"
    return ""


def locked_inodes() -> set[int] | None:
    """The inodes of files and folders that a process of this machine has locked; None where nobody can tell."""
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
        return {int(line.split()[-3].rpartition(":")[2]) for line in lines if "FLOCK" in line}
    return None
