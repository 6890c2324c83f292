"""The mean of several LoRA adapters' weights, exact, as one adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def average(policies: Sequence[Path], out: Path) -> None:
    """Write the adapter whose every B·A is the mean of those of the policies: its rank is the sum of theirs.

    Args:
        policies: folders of adapters on one base, with the same layers.
    """
    configs = [json.loads((folder / CONFIG).read_text(encoding="utf-8")) for folder in policies]
    weights = [load_file(folder / WEIGHTS) for folder in policies]
    scales = [config["lora_alpha"] / config["r"] / len(policies) for config in configs]
    rank = sum(config["r"] for config in configs)
    made = {}
    for name in weights[0]:
        parts = [each[name].float() for each in weights]
        if ".lora_B." in name:
            made[name] = torch.cat([scale * part for scale, part in zip(scales, parts, strict=True)], 1)
        else:
            assert ".lora_A." in name, f"{name} is no part of a LoRA"
            made[name] = torch.cat(parts, 0)
    out.mkdir(parents=True, exist_ok=True)
    save_file(made, out / WEIGHTS, {"format": "pt"})
    (out / CONFIG).write_text(json.dumps(configs[0] | {"r": rank, "lora_alpha": rank}), encoding="utf-8")
