"""What torch's launchers say to a process in its environment."""

from __future__ import annotations

import os

from align.errors import require

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torch's launchers tell each rank, in its environment."""


def told() -> bool:
    """Whether torch's launcher has started this process."""
    return all(name in os.environ for name in LAUNCHED)


def launched() -> int:
    """How many ranks torch's launcher has started; 1 where none did.

    Raises:
        InputError: what stands in its place in the environment is nothing that a launcher sets.
    """
    if not told():
        return 1
    world = number_in("WORLD_SIZE", 1)
    number_in("RANK", 0, world - 1)
    number_in("LOCAL_RANK", 0, world - 1)
    number_in("MASTER_PORT", 1, 65_535)
    return world


def number_in(name: str, least: int, most: int | None = None) -> int:
    """A number that a launcher sets in the environment. Raises: InputError: it is another."""
    text = os.environ[name]
    right = text.isdecimal() and int(text) >= least and (most is None or int(text) <= most)
    problem = f"is no number from {least}" + ("" if most is None else f" to {most}")
    require(right, name, text, problem, "Start the command by devices=N or torchrun, which set it, or unset it.")
    return int(text)
