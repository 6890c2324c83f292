"""Average the weights of several LoRA adapters exactly, as one adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel

from align.models.base import find_base
from align.models.load import load_base


def average_adapters(adapter_paths: Sequence[Path], output_path: Path) -> None:
    """Save the adapter whose every product B·A is the mean of the given adapters' products.

    PEFT concatenates the adapters' matrices, so the rank of the mean is the sum of their ranks.

    Args:
        adapter_paths: adapters on the built-in model.
    """
    base = load_base(find_base(), "lora", torch.device("cpu"), torch.float32)
    # A name that is only a number would be taken for a layer's index, and PEFT would leave the adapter out.
    names = [f"policy{i}" for i in range(len(adapter_paths))]
    model = PeftModel.from_pretrained(base, adapter_paths[0], names[0])
    for name, adapter_path in zip(names[1:], adapter_paths[1:], strict=True):
        model.load_adapter(adapter_path, name)
    weights = [1 / len(names)] * len(names)
    model.add_weighted_adapter(names, weights, output_path.name, combination_type="cat")
    model.save_pretrained(output_path.parent, selected_adapters=[output_path.name])
