"""The base model of an export: its public name, its weights without the adapter, and the link to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from align.core.errors import InputError
from align.export.trained_model import TrainedModel
from align.models.base import to_public_base
from align.models.dequantised import (
    DEQUANTISED,
    build_dequantised_name,
    dequantise_in_place,
    get_or_write_dequantised_base,
)
from align.run.weights import build_local_base_name


def require_findable_base(base: Mapping[str, str]) -> None:
    """Raise InputError unless a base model's `id` is a name that another machine can find, such as a hub id, and not a
    path.

    Args:
        base: `id` (a hub id or a built-in model's name), `revision` and `digest`; the last two may be empty.

    Raises:
        InputError: The id is empty or a path, or a key is unknown.
    """
    if unknown_keys := base.keys() - {"id", "revision", "digest"}:
        raise InputError("base", sorted(unknown_keys)[0], "is not one of id, revision and digest", "Leave it out.")
    name = base.get("id") or ""
    if not name or Path(name).is_absolute() or name.startswith((".", "~")) or "\\" in name:
        problem = "names no model that other machines can load"
        raise InputError("base.id", name or "(empty)", problem, "Give ORG/NAME or a model's name.")


def load_plain_base(trained: TrainedModel, base_weights: str) -> PreTrainedModel:
    """Load the base of a trained model without its adapter, in fp32, with dequantised NF4 or original weights.

    Args:
        base_weights: `nf4-dequantised`, or `original` as it was published.
    """
    if base_weights == DEQUANTISED:
        return dequantise_in_place(trained.load(trained.method), torch.float32)
    return trained.load("lora")


def get_dequantised_folder(trained: TrainedModel, root: Path, dtype: torch.dtype) -> Path | None:
    """Return the path in `root` of the base's dequantised NF4 weights, or None if the adapter was trained on plain
    weights.

    The folder may not exist yet.
    """
    if trained.kind != "nf4":
        return None
    return root / build_dequantised_name(trained.base, to_public_base(trained.base), trained.dtype, dtype)


def find_or_write_dequantised_base(
    trained: TrainedModel, root: Path, dtype: torch.dtype, write_if_missing: bool
) -> Path | None:
    """Return the folder in `root` with the base's dequantised NF4 weights, writing it first if it is missing and may be
    written.

    Returns None if the adapter was trained on plain weights, or if the base is missing and `write_if_missing` is False.
    """
    folder = get_dequantised_folder(trained, root, dtype)
    if folder is None or not (write_if_missing or folder.is_dir()):
        return None
    name = to_public_base(trained.base)
    return get_or_write_dequantised_base(
        root, trained.base, name, trained.dtype, dtype, trained.device, trained.tokenizer
    )


def link_base_unless_on_hub(
    trained: TrainedModel, dequantised_folder: Path | None, folder: Path, final_folder: Path
) -> bool:
    """Create a symbolic link to the base in an adapter's export, unless the base is on a hub, and return whether it was
    created.

    The link has the name that the adapter's configuration gives the base. PEFT looks for that name below the working
    folder, and then on a hub.

    Args:
        dequantised_folder: folder of the dequantised base; None to link the original one.
        final_folder: final path of `folder`.

    Returns:
        Whether a link was made: a file of the export may have that name.
    """
    base = to_public_base(trained.base)
    link = folder / build_local_base_name(base)
    if base["revision"] or os.path.lexists(link):
        return False
    # Runs and their bases are moved together, so that a relative link works; the user's own model stays.
    target = (
        Path(trained.base.path)
        if dequantised_folder is None
        else Path(os.path.relpath(dequantised_folder, final_folder))
    )
    link.symlink_to(target, target_is_directory=True)
    return True
