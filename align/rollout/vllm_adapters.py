"""Which adapters vLLM serves, and the rank that it makes room for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from align.core.errors import InputError, require
from align.models.adapter_files import adaptable, adapter_config, check_targets, read_adapter
from align.models.load import skeleton
from align.models.lowering import check_plain
from align.run import Base

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


def adaptable_layers(base: Base) -> list[str]:
    """The linear layers of a base but its head: vLLM makes room for adapters on these.

    Raises:
        InputError: its modules cannot be built.
    """
    model = skeleton(base)
    require(model is not None, "model", base.id, "its modules cannot be built without its weights", "Serve it merged.")
    left_out = {model.get_input_embeddings(), model.get_output_embeddings()}
    return [name for name in adaptable(model) if model.get_submodule(name) not in left_out]


def layer_names(layers: Collection[str]) -> list[str]:
    """How adapters' settings name them: the last part of each."""
    return sorted({layer.rpartition(".")[2] for layer in layers})


def servable_rank(folder: Path, most: int | None, layers: Collection[str]) -> int:
    """The rank of an adapter that vLLM can serve.

    Args:
        layers: see `adaptable_layers`.
        most: that there is room for; None for what vLLM has room for at all.

    Raises:
        CorruptFile, InputError: it is none.
    """
    config, adapter = adapter_config(folder), read_adapter(folder)
    check_plain(adapter)
    require(not adapter.scores, "adapter", folder.name, "is a reward model", "Serve it without serve=vllm.")
    other = next((name for name in adapter.ranks if name not in layers), None)
    problem = "is no linear layer of the base but its head, and vLLM makes room for adapters on these"
    require(other is None, "target_modules", other, problem, "Serve it merged: export=merged.")
    check_targets(config, adapter.ranks, layers)
    rank = max(adapter.ranks.values())
    room = vllm_rank(rank) if most is None else most
    problem = f"is over {most}, the rank that vLLM made room for"
    require(rank <= room, "r", rank, problem, "Start the server with a higher stage.max_rank.")
    return rank


def room_for(folders: Sequence[Path], most: int | None, layers: Collection[str]) -> int:
    """The rank that vLLM makes room for: `most`, or the highest there is.

    Raises:
        CorruptFile, InputError: see `servable_rank`.
    """
    room = None if most is None else vllm_rank(most)
    ranks = [servable_rank(folder, room, layers) for folder in folders]
    return room or vllm_rank(max([LOWEST, *ranks]))
