"""Merging of a LoRA adapter into its base model, and writing of merged models.

There are two merges. QLoRA trains against NF4 weights. Merged into the *original* weights, the same adapter is another
model (worst case KL 0.29, a quarter of the top tokens kept). Merged into the *dequantised* NF4 weights, it is the
trained one (exact in fp32, KL 1e-4 to 2e-3 after the cast to bf16).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.core.errors import InputError
from align.export.bases import require_findable_base
from align.export.engines import set_pad_token
from align.export.trained_model import TrainedModel
from align.models.adapters import WEIGHTS_FILE, Adapter, get_adapter_state_dict, list_adapter_files, read_adapter
from align.models.dequantised import (
    DEQUANTISED,
    cast_weights_in_place,
    refuse_repacked,
    remove_loading_settings,
    require_plain_weights,
)
from align.models.load import build_skeleton, save_tokenizer
from align.models.plain_lora import refuse_unknown_residual, refuse_unsupported_adapter
from align.run import Base, model_files, write_json
from align.run.digests import require_same_bytes
from align.run.weights import read_header


def merge_adapter(model: PreTrainedModel, adapter: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Merge a LoRA adapter into a freshly loaded base model, dequantising a 4-bit base first, and return a plain model.

    A 4-bit base is dequantised first. Each sum W + B·A·scale is computed in fp32, one layer at a time, and rounded
    once, so that the peak is the model in `dtype` and one layer in fp32.

    Args:
        model: the base as it was trained on, NF4 or plain. It is consumed: use the return value.
        adapter: folder of a PEFT adapter.
        dtype: dtype of the merged weights; by default the base's.

    Returns:
        A plain model in eval mode and without adapters, which `save_pretrained` writes as ordinary safetensors.

    Raises:
        CorruptFile, MissingArtifact: As `read_adapter`.
        InputError: The adapter cannot be merged, or does not fit this base.
        RuntimeError: bitsandbytes has repacked the base's weights, which dequantise to garbage.
    """
    settings = read_adapter(adapter)
    refuse_unsupported_adapter(settings, will_merge=True)
    refuse_unknown_residual(getattr(model, "is_loaded_in_4bit", False), settings.config)
    _require_mergeable(model, settings)
    dtype = dtype or model.dtype
    if getattr(model, "is_loaded_in_4bit", False):
        model = model.dequantize(dtype=model.dtype)  # its default is the dtype of the checkpoint
    with require_same_bytes(list_adapter_files(adapter), "adapter", adapter.name):
        wrapped = _attach_whole_adapter(model, adapter, settings)
    for layer in (m for m in wrapped.modules() if isinstance(m, LoraLayer)):
        module: Any = layer
        module.to(torch.float32)
        try:
            module.merge(safe_merge=True)
        except ValueError as error:  # PEFT's error for a sum that is not finite
            problem = f"added to the base it makes nan or infinity ({error})"
            raise InputError("adapter", adapter.name, problem, "Train it again with a lower stage.lr.") from error
        module.get_base_layer().to(dtype)
    with warnings.catch_warnings():
        # The sums are done; this removes the LoRA layers and unwraps saved modules.
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        merged: Any = wrapped.merge_and_unload()  # pyright: ignore[reportCallIssue]
    cast_weights_in_place(merged, dtype)
    remove_loading_settings(merged)
    merged.config.dtype = dtype
    return merged.eval()


def load_merged_model(trained: TrainedModel, base_weights: str) -> PreTrainedModel:
    """Load a trained adapter merged into its base, or a fully trained model as it is, in fp32.

    Args:
        base_weights: base weights: `nf4-dequantised`, or `original` as published.

    Raises:
        As `merge_adapter`.
    """
    base = trained.load(trained.method if base_weights == DEQUANTISED else "lora")
    model = base if trained.adapter is None else merge_adapter(base, trained.adapter, torch.float32)
    if trained.prompts.is_reward_model:
        set_pad_token(model, trained.prompts.pad_id)
    return model


def write_merged_model(
    folder: Path,
    model: PreTrainedModel,
    base: Mapping[str, str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    base_folder: Path | None = None,
    shard_size: str = "5GB",
) -> None:
    """Write a model's safetensors, tokenizer and `base.json` so that plain `AutoModelForCausalLM.from_pretrained` loads
    them.

    Args:
        folder: an empty folder, from `align.run.atomic.publish_folder`.
        model: result of `merge_adapter`.
        base: `id`, `revision` and `digest` of the model it grew from, written to `base.json`.
        base_folder: the base's folder, see `align.models.load.save_tokenizer`.
        shard_size: largest size of a safetensors file.
    """
    require_findable_base(base)
    model.save_pretrained(folder, max_shard_size=shard_size)
    require_plain_weights(folder, model.dtype)
    write_json(folder / "base.json", dict(base))
    save_tokenizer(tokenizer, folder, base_folder)


def _require_mergeable(model: PreTrainedModel, adapter: Adapter) -> None:
    if getattr(model, "peft_config", None):
        raise ValueError("the base already carries adapters: merge into a fresh load")
    refuse_repacked(model)
    _require_untied(find_tied_weights(model), adapter)


def require_untied_base(base: Base, adapter: Adapter) -> None:
    """Raise InputError if the adapter changes the embedding or the output head while the base ties their weights.

    The base's weights are not loaded. A checkpoint that stores embedding and head separately is left to
    `merge_adapter`, which compares them.
    """
    model = build_skeleton(base)
    tied = set() if model is None else find_tied_weights(model)
    stored = [name for path in model_files(Path(base.path), displayed=base.id) for name in read_header(path)]
    if not all(any(key.endswith(f"{name.rpartition('.')[2]}.weight") for key in stored) for name in tied):
        _require_untied(tied, adapter)


def find_tied_weights(model: PreTrainedModel) -> set[str]:
    """Return the module names of the input embedding and the output head if they share one weight, else an empty
    set."""
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if head is None or getattr(embedding, "weight", None) is not getattr(head, "weight", object()):
        return set()
    return {name for name, module in model.named_modules() if module is embedding or module is head}


def _require_untied(tied: set[str], adapter: Adapter) -> None:
    if changed := sorted(tied & adapter.ranks.keys()):
        problem = "the base ties its embedding to its head, so a merge would change both"
        raise InputError("target_modules", changed[0], problem, "Export the adapter: export=adapter.")


def _attach_whole_adapter(model: PreTrainedModel, adapter: Path, settings: Adapter) -> PeftModel:
    """Load an adapter onto a base model with PEFT, or raise InputError if any of its keys does not fit.

    PEFT itself ignores such keys.
    """
    remedy = "Merge it into the base it was trained on; its adapter_config.json or manifest names that."
    try:
        wrapped = PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError) as error:
        raise InputError("adapter", adapter.name, f"does not fit this base ({error})", remedy) from error
    placed = get_adapter_state_dict(wrapped, "default").keys()
    if unknown_keys := sorted(settings.tensors.keys() ^ placed):
        raise InputError(
            WEIGHTS_FILE, unknown_keys[0], f"does not fit this base ({len(unknown_keys)} such keys)", remedy
        )
    return wrapped
