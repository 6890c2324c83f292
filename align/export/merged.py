"""An adapter merged into the very base it was trained on, and how far the result lies from what was trained.

"Merged" is not one thing. QLoRA trains against NF4 weights; merged into the *original* weights the same adapter is
another model (worst case KL 0.29, a quarter of the top tokens kept), while merged into the *dequantised* NF4 weights it
is the trained one (exact in fp32, KL 1e-4 to 2e-3 once cast to bf16).
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
from align.export.bases import check_base
from align.export.engines import set_pad
from align.export.trained import Trained
from align.models.adapters import WEIGHTS_FILE, Adapter, adapter_state_dict, files_of_adapter, read_adapter
from align.models.dequantised import (
    DEQUANTISED,
    cast_weights,
    check_plain_weights,
    forget_quantisation,
    refuse_repacked,
)
from align.models.load import save_tokenizer, skeleton
from align.models.plain_lora import check_initial, check_plain
from align.run import Base, model_files, write_json
from align.run.digests import same_bytes
from align.run.weights import header


def merge(model: PreTrainedModel, adapter: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Merge an adapter into a freshly loaded base, and drop every trace of quantisation.

    A 4-bit base is dequantised first (each NF4 weight becomes the number it stood for). Each sum W + B·A·scale is taken
    in fp32, one layer at a time, and rounded once, so that the peak is the model in `dtype` and one layer in fp32.

    Args:
        model: the base as it was trained on, NF4 or plain. It is consumed: use the return value.
        adapter: a PEFT adapter's folder.
        dtype: of the merged weights; the base's own without it.

    Returns:
        A plain model, in eval mode and without adapters, that `save_pretrained` writes as ordinary safetensors.

    Raises:
        CorruptFile, MissingArtifact: see `read_adapter`.
        InputError: the adapter is of a kind that cannot be merged, or does not fit this base.
        RuntimeError: bitsandbytes has repacked the base's weights, which dequantise to garbage.
    """
    found = read_adapter(adapter)
    check_plain(found, will_merge=True)
    check_initial(getattr(model, "is_loaded_in_4bit", False), found.config)
    _check_mergeable(model, found)
    dtype = dtype or model.dtype
    if getattr(model, "is_loaded_in_4bit", False):
        model = model.dequantize(dtype=model.dtype)  # without it, in what the checkpoint was saved in
    with same_bytes(files_of_adapter(adapter), "adapter", adapter.name):
        wrapped = _attach(model, adapter, found)
    for layer in (m for m in wrapped.modules() if isinstance(m, LoraLayer)):
        module: Any = layer
        module.to(torch.float32)
        try:
            module.merge(safe_merge=True)
        except ValueError as error:  # its word for a sum that is not finite
            problem = f"added to the base it makes nan or infinity ({error})"
            raise InputError("adapter", adapter.name, problem, "Train it again with a lower stage.lr.") from error
        module.get_base_layer().to(dtype)
    with warnings.catch_warnings():
        # It still swaps the layers out and unwraps saved modules; the sums themselves are done.
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        merged: Any = wrapped.merge_and_unload()  # pyright: ignore[reportCallIssue]
    cast_weights(merged, dtype)
    forget_quantisation(merged)
    merged.config.dtype = dtype
    return merged.eval()


def merged_model(trained: Trained, into: str) -> PreTrainedModel:
    """What was trained as one model, in fp32; of a whole model itself. Raises: see `merge`.

    Args:
        into: `nf4-dequantised`, or `original`: the base as it was published.
    """
    base = trained.load(trained.method if into == DEQUANTISED else "lora")
    model = base if trained.adapter is None else merge(base, trained.adapter, torch.float32)
    if trained.asked.scores:
        set_pad(model, trained.asked.pad)
    return model


def write_merged(
    folder: Path,
    model: PreTrainedModel,
    base: Mapping[str, str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    beside: Path | None = None,
    shard_size: str = "5GB",
) -> None:
    """Write a model so that plain `AutoModelForCausalLM.from_pretrained` loads it.

    Args:
        folder: an empty one, of `align.run.atomic.publish`.
        model: what `merge` returned.
        base: `id`, `revision` and `digest` of the model it grew from, kept in `base.json`.
        beside: the base's folder, see `align.models.load.save_tokenizer`.
        shard_size: the most one safetensors file holds.
    """
    check_base(base)
    model.save_pretrained(folder, max_shard_size=shard_size)
    check_plain_weights(folder, model.dtype)
    write_json(folder / "base.json", dict(base))
    save_tokenizer(tokenizer, folder, beside)


def _check_mergeable(model: PreTrainedModel, adapter: Adapter) -> None:
    if getattr(model, "peft_config", None):
        raise ValueError("the base already carries adapters: merge into a fresh load")
    refuse_repacked(model)
    _check_untied(tied_in(model), adapter)


def check_untied(base: Base, adapter: Adapter) -> None:
    """What `merge` refuses of a tied base, before its weights are loaded.

    A checkpoint that holds embedding and head both is left to `merge`: they are tied where they are equal.

    Raises:
        InputError: the adapter changes the embedding or the head, and the base ties them.
    """
    model = skeleton(base)
    tied = set() if model is None else tied_in(model)
    stored = [name for path in model_files(Path(base.path), displayed=base.id) for name in header(path)]
    if not all(any(key.endswith(f"{name.rpartition('.')[2]}.weight") for key in stored) for name in tied):
        _check_untied(tied, adapter)


def tied_in(model: PreTrainedModel) -> set[str]:
    """The names of embedding and head where they share one weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or getattr(embedding, "weight", None) is not getattr(head, "weight", object()):
        return set()
    return {name for name, module in model.named_modules() if module is embedding or module is head}


def _check_untied(tied: set[str], adapter: Adapter) -> None:
    if touched := sorted(tied & adapter.ranks.keys()):
        raise InputError(
            "target_modules", touched[0], "the base ties its embedding to its head, so a merge would change both",
            "Export the adapter: export=adapter.",
        )  # fmt: skip


def _attach(model: PreTrainedModel, adapter: Path, found: Adapter) -> PeftModel:
    """PEFT passes over keys that it finds no place for, such as a reward model's `score`: here that is an error."""
    remedy = "Merge it into the base it was trained on; its adapter_config.json or manifest names that."
    try:
        wrapped = PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError) as error:
        raise InputError("adapter", adapter.name, f"does not fit this base ({error})", remedy) from error
    placed = adapter_state_dict(wrapped, "default").keys()
    if strangers := sorted(found.tensors.keys() ^ placed):
        raise InputError(WEIGHTS_FILE, strangers[0], f"does not fit this base ({len(strangers)} such keys)", remedy)
    return wrapped
