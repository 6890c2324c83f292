"""A LoRA adapter as every engine reads it: PEFT's own two files at the root of a folder, lowered to plain LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from align.errors import InputError
from align.export.bases import named_base
from align.export.folder import check_base
from align.export.trained import Trained
from align.models.adapter_files import (
    CONFIG_FILE,
    RETRAIN,
    SCORE_KEY,
    WEIGHTS_FILE,
    Factors,
    adapter_config,
    factors_in,
    read_adapter,
)
from align.models.load import check_added_tokens, load_tokenizer, save_tokenizer
from align.models.lowering import READ_BY_ENGINES, check_plain, initial_factors, lower
from align.run import read_json, write_json


def engine_config(config: Mapping[str, Any], base: Mapping[str, str]) -> dict[str, Any]:
    """`adapter_config.json` for an engine: only what it reads, the base by id and revision, in a fixed order."""
    kept = {key: config[key] for key in READ_BY_ENGINES if key in config}
    targets = kept.get("target_modules")
    return kept | {
        "base_model_name_or_path": base["id"],
        "revision": base.get("revision") or None,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
    }


def write_adapter(
    folder: Path,
    source: Path,
    base: Mapping[str, str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    beside: Path | None = None,
    initial: Mapping[str, Factors] | None = None,
) -> None:
    """Write an adapter for deployment: plain LoRA in fp32, a reward model's head beside it, the config that engines
    read, tokenizer and template.

    Args:
        folder: an empty one, of `align.run.atomic.publish`.
        source: a PEFT adapter's folder.
        base: `id`, `revision` and `digest` of the model the adapter was trained on. The digest goes into `base.json`,
            since PEFT warns at keys of `adapter_config.json` that it does not know.
        beside: the base's folder, see `align.models.load.save_tokenizer`.
        initial: see `align.models.lowering`; needed where `init_lora_weights` is one of `REPEATABLE`.

    Raises:
        CorruptFile, MissingArtifact, InputError, StorageError: see `read_adapter`, `check_plain` and `publish`.
    """
    check_base(base)
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
    write_json(folder / "base.json", dict(base))
    save_tokenizer(tokenizer, folder, beside)


def write_lowered(trained: Trained, folder: Path) -> Path:
    """Write the adapter that was trained as plain LoRA into a folder, which may be there.

    Raises:
        InputError: see `write_adapter`; or the adapter was trained with tokens that the base does not have.
    """
    assert trained.adapter is not None, "a whole model has no adapter"
    folder.mkdir(exist_ok=True)
    check_added_tokens(trained.tokenizer, load_tokenizer(trained.base))
    read, initial = adapter_config(trained.adapter, "artifact", alone=True), None
    if isinstance(read.get("init_lora_weights"), str):
        initial = initial_factors(trained.load(trained.method), read)
    write_adapter(
        folder, trained.adapter, named_base(trained.base), tokenizer=trained.tokenizer,
        beside=Path(trained.base.path), initial=initial,
    )  # fmt: skip
    return folder


def rank_of(folder: Path) -> int:
    """Of an adapter that was lowered."""
    return int(read_json(folder / CONFIG_FILE, RETRAIN)["r"])
