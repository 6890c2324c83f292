"""Start commands on several ranks, with variables of torch's launcher, in forks that need not import torch again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from free_ports import pick_free_port
from processes import DEADLINE_S, Child, FinishedCommand, Forks

NO_CODE: Mapping[int, str] = MappingProxyType({})


def build_rank_environments(world: int, local: int | None = None) -> list[dict[str, str]]:
    """Return the environment variables that the launcher sets for each rank.

    Args:
        local: ranks per machine; by default, all ranks run on one machine.
    """
    local = local or world
    port = str(pick_free_port())
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank % local)} for rank in range(world)]


def start_ranks(
    forks: Forks,
    cwd: Path,
    *words: str,
    world: int = 2,
    local: int | None = None,
    more: Mapping[int, str] = NO_CODE,
) -> list[Child]:
    """Start the ranks of `python -m align WORDS`.

    Args:
        more: rank → Python code that it runs first.
    """
    if world == 1:
        return [forks.start(cwd, *words)]
    rank_variables = build_rank_environments(world, local)
    before = [
        f"import os\nos.environ |= {variables!r}\n{more.get(rank, '')}" for rank, variables in enumerate(rank_variables)
    ]
    return [forks.start(cwd, *words, before=code) for code in before]


def run_on_ranks(
    forks: Forks, cwd: Path, *words: str, timeout_s: float = DEADLINE_S, **more: object
) -> list[FinishedCommand]:
    """Run a command on several ranks and wait for their end."""
    children = start_ranks(forks, cwd, *words, **more)  # pyright: ignore[reportArgumentType]
    return [child.wait(timeout_s) for child in children]
