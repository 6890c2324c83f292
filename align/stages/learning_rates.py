"""Fills in the learning rates that a command line leaves empty, once the base is known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeGuard

from align.config.rates import default_rate, find_size_class
from align.config.root import Config
from align.config.settings import changed
from align.run import Base
from align.run.weights import header, weight_files


def fill_rates(config: Config, base: Base | None) -> tuple[Config, str]:
    """Return the configuration with every empty learning rate filled in, and a clause that says where `stage.lr` is
    from. The clause is empty where the command line gave the rate or the stage has none.

    Args:
        base: the base weights; None for a stage without a model.
    """
    weights = None if base is None else count_weights(Path(base.path))
    method = config.method.name
    if config.method.lr is None:
        stage = "full" if method == "full" else "sft"
        config = changed(config, method=changed(config.method, lr=default_rate(stage, method, weights)))
    rates = {"lr": default_rate(config.stage.name, method, weights)}
    if config.stage.name in ("ppo", "verify"):
        rates["value_lr"] = default_rate("value", method, weights)
    empty = {key: rate for key, rate in rates.items() if rate is not None and getattr(config.stage, key) is None}
    if not empty:
        return config, ""
    config = changed(config, stage=changed(config.stage, **empty))
    return config, f"default for {find_size_class(weights).title}" if "lr" in empty else ""


def count_weights(folder: Path) -> int:
    """Return the number of weights in a model's safetensors files, by their headers alone."""
    files = [path for path in weight_files(folder) if path.suffix == ".safetensors"]
    tensors = (tensor for path in files for name, tensor in header(path).items() if name != "__metadata__")
    shapes = (tensor.get("shape") for tensor in tensors if isinstance(tensor, dict))
    return sum(math.prod(shape) for shape in shapes if is_shape(shape))  # loading explains what is no shape


def is_shape(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(size, int) and size >= 0 for size in value)
