"""An adapter as every engine reads it: PEFT's own two files, lowered to plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from align.core.errors import InputError
from align.models.adapter_files import CONFIG_FILE, SCORE_KEY, WEIGHTS_FILE, Factors, factors_in, read_adapter
from align.models.lowering import READ_BY_ENGINES, check_plain, lower
from align.run import write_json
from align.run.weights import local_base_name


def engine_config(config: Mapping[str, Any], base: Mapping[str, str]) -> dict[str, Any]:
    """`adapter_config.json` for an engine: only what it reads, the base by name and revision, in a fixed order."""
    kept = {key: config[key] for key in READ_BY_ENGINES if key in config}
    targets = kept.get("target_modules")
    return kept | {
        "base_model_name_or_path": local_base_name(base),
        "revision": base.get("revision") or None,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
    }


def write_plain(
    folder: Path, source: Path, base: Mapping[str, str], initial: Mapping[str, Factors] | None = None
) -> int:
    """Write an adapter as plain LoRA in fp32, a reward model's head beside it, with the config that engines read.

    Args:
        folder: an empty one, of `align.run.atomic.publish`.
        source: a PEFT adapter's folder.
        base: `id`, `revision` and `digest` of the model the adapter was trained on.
        initial: see `align.models.lowering`; needed where `init_lora_weights` is one of `REPEATABLE`.

    Returns:
        its rank.

    Raises:
        CorruptFile, MissingArtifact, InputError, StorageError: see `read_adapter`, `check_plain` and `publish`.
    """
    adapter = read_adapter(source)
    check_plain(adapter)
    plain, factors = lower(adapter.config, factors_in(source), initial)
    for module, pair in factors.items():
        if not all(bool(side.isfinite().all()) for side in pair):
            raise InputError(
                WEIGHTS_FILE, module, "its scale makes nan or infinity of it", "Train with a smaller lora_alpha."
            )
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": tensor.cpu()
        for module, pair in factors.items()
        for side, tensor in zip("AB", pair, strict=True)
    }
    if adapter.scores:
        tensors[SCORE_KEY] = load_file(source / WEIGHTS_FILE)[SCORE_KEY].float()
        plain["modules_to_save"] = ["score"]
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    write_json(folder / CONFIG_FILE, engine_config({**adapter.config, **plain}, base))
    return int(plain["r"])
