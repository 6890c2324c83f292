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
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from align.errors import InputError
from align.export.adapter import WEIGHTS, Adapter, check_plain, read_adapter
from align.export.folder import check_base, publish, read_json, write_json, write_tokenizer
from align.models.adapters import tensors_of


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
    check_plain(found, allow=("modules_to_save", "use_dora", "bias"))
    _check_mergeable(model, found)
    dtype = dtype or model.dtype
    if getattr(model, "is_loaded_in_4bit", False):
        model = model.dequantize()
    wrapped = _attach(model, adapter, found)
    for layer in (m for m in wrapped.modules() if isinstance(m, LoraLayer)):
        module: Any = layer
        module.to(torch.float32)
        module.merge(safe_merge=True)  # raises on a sum that is not finite
        module.get_base_layer().to(dtype)
    with warnings.catch_warnings():
        # It still swaps the layers out and unwraps saved modules; the sums themselves are done.
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        merged: Any = wrapped.merge_and_unload()  # pyright: ignore[reportCallIssue]
    # Weights only: `.to(dtype)` would round the rotary frequencies too, which loading keeps in fp32.
    for parameter in merged.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    _forget_quantisation(merged)
    merged.config.dtype = dtype
    return merged.eval()


def export_merged(
    model: PreTrainedModel,
    target: Path,
    base: Mapping[str, str],
    *,
    tokenizer: Path | PreTrainedTokenizerBase,
    generation: GenerationConfig | None = None,
    card: str = "",
    shard_size: str = "5GB",
    replace: bool = False,
) -> Path:
    """Write a merged model so that plain `AutoModelForCausalLM.from_pretrained` loads it.

    Args:
        model: what `merge` returned.
        target: the folder to create; it appears complete or not at all.
        base: `id`, `revision` and `digest` of the model it grew from, kept in `base.json`.
        tokenizer: the base's folder (tokenizer, chat template and generation config are copied), or a tokenizer.
        generation: sampling defaults, in the place of the folder's.
        card: the text of `README.md`, from `align.export.card`.
        shard_size: the most one safetensors file holds.
        replace: True to put it in the place of an earlier export.

    Returns:
        `target`.
    """
    check_base(base)
    with publish(target, replace) as folder:
        model.save_pretrained(folder, max_shard_size=shard_size)
        _check_plain_weights(folder, model.dtype)
        write_json(folder / "base.json", dict(base))
        write_tokenizer(folder, tokenizer, generation)
        if card:
            (folder / "README.md").write_text(card, encoding="utf-8")
    return target


def _check_mergeable(model: PreTrainedModel, adapter: Adapter) -> None:
    if getattr(model, "peft_config", None):
        raise ValueError("the base already carries adapters: merge into a fresh load")
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise RuntimeError(
                f"{name} was repacked by bitsandbytes at an evaluation without gradients and dequantises to garbage: "
                "load the base afresh with support_avx512bf16_for_cpu=False on every Linear4bit"
            )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and getattr(embedding, "weight", None) is getattr(head, "weight", object()):
        tied = {name for name, module in model.named_modules() if module is embedding or module is head}
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
    placed = tensors_of(wrapped, "default").keys()
    if strangers := sorted(found.shapes.keys() ^ placed):
        raise InputError(WEIGHTS, strangers[0], f"does not fit this base ({len(strangers)} such keys)", remedy)
    return wrapped


def _forget_quantisation(model: Any) -> None:
    """What `dequantize` and GGUF loading leave behind, each of which changes what `save_pretrained` writes."""
    for owner, names in (
        (model, ("hf_quantizer", "quantization_method", "quantization_config")),
        (model.config, ("quantization_config", "_pre_quantization_dtype", "_is_quantized")),
    ):
        for name in names:
            owner.__dict__.pop(name, None)
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = model.is_quantized = False
    # `device_map={"": "cpu"}` makes saving believe that weights are offloaded.
    if set(model.__dict__.get("hf_device_map", {}).values()) <= {"cpu", torch.device("cpu")}:
        model.__dict__.pop("hf_device_map", None)


def _check_plain_weights(folder: Path, dtype: torch.dtype) -> None:
    """What was written is what was asked for: no quantisation in the config, every weight in `dtype`."""
    if "quantization_config" in read_json(folder / "config.json", "Export again."):
        raise RuntimeError("config.json still speaks of quantisation: a plain loader would refuse the weights")
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                if (written := file.get_tensor(key).dtype) != dtype:
                    raise RuntimeError(f"{key} was written in {written} where {dtype} was asked for")
