"""What an export says when it is loaded back: the next-token logits of an engine, prompt by prompt.

Each function loads as a stranger would, by the engine's own means and none of ours.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from align.models.fastpath import without_fast_path
from align.models.load import in_fp32, keep_unpacked, nf4

Rows = Sequence[Sequence[int]]
"""Token ids, a prompt each."""

VERSION = f"{transformers.__version__}, peft {peft.__version__}"


@torch.no_grad()
def logits_of(model: Any, rows: Rows) -> list[Tensor]:
    """fp32 logits on the CPU, [S, V] for each row; one row at a time, so that no padding has a say, and by the forwards
    that the engine came with."""
    device = next(model.parameters()).device
    with without_fast_path(model):
        return [model(input_ids=torch.tensor([list(row)], device=device)).logits[0].float().cpu() for row in rows]


def whole_model(folder: Path, rows: Rows, device: torch.device) -> list[Tensor]:
    """transformers on a folder with a model, its weights as they lie there and fp32 sums."""
    model = as_published(folder, device)
    logits = logits_of(model, rows)
    del model
    free_memory()
    return logits


def adapter_on(
    base: Path,
    adapter: Path,
    rows: Rows,
    device: torch.device,
    dtype: torch.dtype | None = None,
    quantised: bool = False,
) -> list[Tensor]:
    """transformers and PEFT on a base and an adapter, with fp32 sums.

    Args:
        dtype: what the base's weights are read in; None is how they lie there.
        quantised: to NF4, out of `dtype`.
    """
    model = as_published(base, device, dtype, quantised)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    logits = logits_of(model, rows)
    del model
    free_memory()
    return logits


def free_memory() -> None:
    """Models that nothing refers to any more give their memory back now: the short forwards are bound to modules, in
    circles, and the next model is as large."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def as_published(folder: Path, device: torch.device, dtype: torch.dtype | None = None, quantised: bool = False) -> Any:
    options: dict[str, Any] = {"quantization_config": nf4(torch.float32)} if quantised else {}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", device_map={"": device}, trust_remote_code=False, **options
    )
    keep_unpacked(model)
    return in_fp32(model).eval()
