"""One command on several ranks, as torch's launcher would start them: forks, which need not import torch again."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from processes import DEADLINE_S, Child, Ended, Forks

NOTHING: Mapping[int, str] = MappingProxyType({})


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environments(world: int, local: int | None = None) -> list[dict[str, str]]:
    """What the launcher tells each rank.

    Args:
        local: ranks a machine; all on one where it is not given.
    """
    local, port = local or world, str(free_port())
    shared = {
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port
    }  # fmt: skip
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank % local)} for rank in range(world)]


def started(
    forks: Forks,
    cwd: Path,
    *words: str,
    world: int = 2,
    local: int | None = None,
    more: Mapping[int, str] = NOTHING,
) -> list[Child]:
    """The ranks of `python -m align WORDS`.

    Args:
        more: rank → Python that it runs first.
    """
    if world == 1:
        return [forks.start(cwd, *words)]
    told = environments(world, local)
    before = [f"import os\nos.environ |= {each!r}\n{more.get(rank, '')}" for rank, each in enumerate(told)]
    return [forks.start(cwd, *words, before=code) for code in before]


def ranked(forks: Forks, cwd: Path, *words: str, timeout_s: float = DEADLINE_S, **more: object) -> list[Ended]:
    """Waits for their end."""
    children = started(forks, cwd, *words, **more)  # pyright: ignore[reportArgumentType]
    return [child.ended(timeout_s) for child in children]
