"""The mean of several LoRA adapters' weights, exact, as one adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel

from align.models.base import find_base
from align.models.load import load_base


def average(policies: Sequence[Path], out: Path) -> None:
    """Write the adapter whose every B·A is the mean of those of the policies, adapters of the built-in model: PEFT puts
    them side by side, so its rank is the sum of theirs."""
    base = load_base(find_base(), "lora", torch.device("cpu"), torch.float32)
    # Not the number alone: PEFT would take the numbers of layers for it, and leave these out.
    names = [f"policy{i}" for i in range(len(policies))]
    model = PeftModel.from_pretrained(base, policies[0], names[0])
    for name, folder in zip(names[1:], policies[1:], strict=True):
        model.load_adapter(folder, name)
    model.add_weighted_adapter(names, [1 / len(names)] * len(names), out.name, combination_type="cat")
    model.save_pretrained(out.parent, selected_adapters=[out.name])
