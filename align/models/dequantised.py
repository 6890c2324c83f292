"""The base that an adapter is put on: dequantised NF4 as plain weights, and how a model sheds its quantisation.

QLoRA trains against NF4 weights. On the weights as published the same adapter is another model; on the dequantised NF4
weights it is the trained one, in every engine. So that base is what an engine without NF4 loads, and what leaves with
the adapter; it is written once for each base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.core.errors import CorruptFile, InputError
from align.models.load import in_fp32, load_base, name_of, save_tokenizer
from align.run import WEIGHTS, Base, folder_digest, json_digest, json_object, write_json
from align.run.atomic import publish
from align.run.weights import ABOUT

DEQUANTISED = "nf4-dequantised"


def dequantised_beside(
    root: Path, base: Base, named: dict[str, str], trained: torch.dtype, dtype: torch.dtype,
    device: torch.device, tokenizer: PreTrainedTokenizerBase,
) -> Path:  # fmt: skip
    """The dequantised NF4 base in `root`, written where it is not there yet.

    Args:
        named: `id`, `revision` and `digest` of the base.
        trained: the dtype in which the base was quantised for training.
        dtype: of the weights on disk.

    Raises:
        CorruptFile: what is there is not what was written.
    """
    kept, quantised = name_of(dtype), name_of(trained)
    folder = root / dequantised_name(base, named, trained, dtype)
    if not (folder / ABOUT).is_file():
        model = dequantised(load_base(base, "qlora", device, trained), dtype)
        with publish(folder, replace=ABOUT) as part:
            model.save_pretrained(part)
            check_plain_weights(part, dtype)
            save_tokenizer(tokenizer, part, Path(base.path))
            about = {**named, "kind": DEQUANTISED, "dtype": kept, "quantised_from": quantised}
            about["weights"] = folder_digest(part, WEIGHTS)
            write_json(part / ABOUT, about)
    remedy = f"Remove {folder}, and export again with resume=never."
    if json_object(folder / ABOUT, ABOUT, remedy).get("weights") != folder_digest(folder, WEIGHTS):
        raise CorruptFile("base", folder.name, "its weights are not those that were written", remedy)
    return folder


def dequantised_name(base: Base, named: dict[str, str], trained: torch.dtype, dtype: torch.dtype) -> str:
    """Its folder's. The codes depend on what they were quantised from, where the base is stored in more bits."""
    which = json_digest([base.digest, str(trained)])[:12]
    return f"{Path(named['id']).name}-{DEQUANTISED}-{name_of(dtype)}-{which}"


def weights_dtype(folder: Path) -> str:
    """In which a model's weights lie in a folder. Raises: CorruptFile: in several, or none."""
    kinds = set()
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            kinds |= {name_of(file.get_tensor(key).dtype) for key in file.keys()}  # noqa: SIM118
    if len(kinds) != 1:
        raise CorruptFile("weights", folder.name, f"their dtypes are {sorted(kinds)}", "Export it again.")
    return kinds.pop()


def dequantised(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """An NF4 model as plain weights in `dtype`: each becomes the number it stood for. It is consumed.

    Raises:
        RuntimeError: bitsandbytes has repacked the weights, which dequantise to garbage.
    """
    refuse_repacked(model)
    plain = in_fp32(model).dequantize(dtype=dtype)
    cast_weights(plain, dtype)
    forget_quantisation(plain)
    plain.config.dtype = dtype
    return plain.eval()


def refuse_repacked(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise RuntimeError(
                f"{name} was repacked by bitsandbytes at an evaluation without gradients and dequantises to garbage: "
                "load the base afresh with support_avx512bf16_for_cpu=False on every Linear4bit"
            )


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Weights only: `.to(dtype)` would round the rotary frequencies too, which loading keeps in fp32."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
            if not bool(parameter.data.isfinite().all()):
                problem = "cannot hold a weight of this model"
                raise InputError("export.dtype", name_of(dtype), problem, "Use bfloat16.")


def forget_quantisation(model: Any) -> None:
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


def check_plain_weights(folder: Path, dtype: torch.dtype) -> None:
    """What was written is what was asked for: no quantisation in the config, every weight in `dtype`."""
    if "quantization_config" in json_object(folder / "config.json", "config.json", "Export again."):
        raise RuntimeError("config.json still speaks of quantisation: a plain loader would refuse the weights")
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                if (written := file.get_tensor(key).dtype) != dtype:
                    raise RuntimeError(f"{key} was written in {written} where {dtype} was asked for")
