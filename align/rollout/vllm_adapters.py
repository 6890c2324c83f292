"""Which adapters vLLM serves, and the rank that it makes room for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from align.errors import InputError, require
from align.models.adapter_files import adapter_config, read_adapter
from align.models.lowering import check_plain

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's `max_lora_rank` is one of these (0.32)."""
LOWEST = 16
"""Room is made for adapters of this rank at least: they are the most common."""


def vllm_rank(rank: int) -> int:
    """The smallest that holds the adapter. Raises: InputError: none does."""
    for most in RANKS:
        if rank <= most:
            return most
    raise InputError("r", rank, f"vLLM serves adapters of rank {RANKS[-1]} at most", "Train one of a lower rank.")


def servable_rank(folder: Path, most: int | None) -> int:
    """The rank of an adapter that vLLM can serve.

    Args:
        most: that there is room for; None for what vLLM has room for at all.

    Raises:
        CorruptFile, InputError: it is none.
    """
    adapter_config(folder)
    adapter = read_adapter(folder)
    check_plain(adapter)
    require(not adapter.scores, "adapter", folder.name, "is a reward model", "Serve it without serve=vllm.")
    rank = max(adapter.ranks.values())
    room = vllm_rank(rank) if most is None else most
    problem = f"is over {most}, the rank that vLLM made room for"
    require(rank <= room, "r", rank, problem, "Start the server with a higher stage.max_rank.")
    return rank


def room_for(folders: Sequence[Path], most: int | None) -> int:
    """The rank that vLLM makes room for: `most`, or the highest there is.

    Raises:
        CorruptFile, InputError: see `servable_rank`.
    """
    return vllm_rank(most or max([LOWEST, *(servable_rank(folder, None) for folder in folders)]))
