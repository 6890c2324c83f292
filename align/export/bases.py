"""The base of an export: by which name another machine knows it, and its weights without the adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from align.export.trained import Trained
from align.models.base import BUILT_IN
from align.models.dequantised import DEQUANTISED, dequantised, dequantised_beside, dequantised_name
from align.models.load import in_fp32, load_base
from align.run import Base


def named_base(base: Base) -> dict[str, str]:
    """The base as another machine may know it: `id`, `revision`, `digest`. What came from no hub has no revision, and
    is called by its folder's name: a path is nobody's business, and `models/mine` would pass for a repository."""
    known = base.revision or base.id in BUILT_IN
    return {
        "id": base.id if known else Path(base.id).name, "revision": base.revision or "", "digest": base.digest,
    }  # fmt: skip


def plain_base(trained: Trained, into: str) -> PreTrainedModel:
    """The base without its adapter, in fp32.

    Args:
        into: `nf4-dequantised`, or `original`: as it was published.
    """
    if into == DEQUANTISED:
        return dequantised(load_base(trained.base, trained.method, trained.device, trained.dtype), torch.float32)
    return in_fp32(load_base(trained.base, "lora", trained.device, trained.dtype))


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
