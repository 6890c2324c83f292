"""The base of an export: by which name another machine knows it, and its weights without the adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from align.core.errors import InputError
from align.export.trained import Trained
from align.models.base import named_base
from align.models.dequantised import DEQUANTISED, dequantise, dequantised_beside, dequantised_name
from align.run.weights import local_base_name


def check_base(base: Mapping[str, str]) -> None:
    """Make sure that a base is named so that another machine finds it.

    Args:
        base: `id` (a hub id or a built-in model's name), `revision` and `digest`, the last two may be empty.

    Raises:
        InputError: the id is empty or a path, or a key is unknown.
    """
    if unknown := base.keys() - {"id", "revision", "digest"}:
        raise InputError("base", sorted(unknown)[0], "is not one of id, revision and digest", "Leave it out.")
    name = base.get("id") or ""
    if not name or Path(name).is_absolute() or name.startswith((".", "~")) or "\\" in name:
        problem = "names no model that another machine could find"
        raise InputError("base.id", name or "(empty)", problem, "Give ORG/NAME or a model's name.")


def plain_base(trained: Trained, into: str) -> PreTrainedModel:
    """The base without its adapter, in fp32.

    Args:
        into: `nf4-dequantised`, or `original`: as it was published.
    """
    if into == DEQUANTISED:
        return dequantise(trained.load(trained.method), torch.float32)
    return trained.load("lora")


def base_folder(trained: Trained, root: Path, dtype: torch.dtype) -> Path | None:
    """Where in `root` the dequantised base lies, or is to lie; None where the adapter was trained on plain weights."""
    if trained.kind != "nf4":
        return None
    return root / dequantised_name(trained.base, named_base(trained.base), trained.dtype, dtype)


def base_beside(trained: Trained, root: Path, dtype: torch.dtype, write: bool) -> Path | None:
    """The dequantised base in `root`, written where it is not there if `write`; None where there is none."""
    folder = base_folder(trained, root, dtype)
    if folder is None or not (write or folder.is_dir()):
        return None
    named = named_base(trained.base)
    return dequantised_beside(root, trained.base, named, trained.dtype, dtype, trained.device, trained.tokenizer)


def link_base(trained: Trained, beside: Path | None, folder: Path, home: Path) -> bool:
    """A link in an adapter's export, by the name that its configuration gives the base, to where that lies: PEFT looks
    for it below the working folder, and then on a hub. A base of a hub's needs none.

    Args:
        beside: the dequantised base; None where the adapter shall have the base itself.
        home: where `folder` will lie in the end.

    Returns:
        whether there is one: a file of the export may have that name.
    """
    named = named_base(trained.base)
    link = folder / local_base_name(named)
    if named["revision"] or os.path.lexists(link):
        return False
    # Runs and their bases are moved together; a model of the user's stays where it is.
    target = Path(trained.base.path) if beside is None else Path(os.path.relpath(beside, home))
    link.symlink_to(target, target_is_directory=True)
    return True
