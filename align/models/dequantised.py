"""The base of QLoRA adapters with its NF4 weights dequantised, for engines without NF4.

QLoRA trains on NF4 weights. On the published weights the adapter gives another model; on the dequantised NF4 weights it
gives the trained one in every engine. Engines without NF4 therefore load that base, which is exported with the adapter.
It is written once for each base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.core.errors import CorruptFile, InputError
from align.models.load import cast_to_fp32, get_dtype_name, load_base, save_tokenizer
from align.run import WEIGHTS, Base, folder_digest, json_digest, read_json_object, write_json
from align.run.atomic import publish_folder
from align.run.weights import ABOUT

DEQUANTISED = "nf4-dequantised"


def get_or_write_dequantised_base(
    root: Path,
    base: Base,
    public_base: dict[str, str],
    quantised_from: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
) -> Path:
    """Return the folder of the dequantised NF4 base in `root`, and write it first if it is missing.

    Args:
        public_base: `id`, `revision` and `digest` of the base.
        quantised_from: dtype from which the base was quantised in training.
        dtype: dtype of the weights on disk.

    Raises:
        CorruptFile: the files were changed since they were written.
    """
    folder = root / build_dequantised_name(base, public_base, quantised_from, dtype)
    if not (folder / ABOUT).is_file():
        model = dequantise_in_place(load_base(base, "qlora", device, quantised_from), dtype)
        with publish_folder(folder, replace=ABOUT) as part:
            model.save_pretrained(part)
            require_plain_weights(part, dtype)
            save_tokenizer(tokenizer, part, Path(base.path))
            about = {
                **public_base,
                "kind": DEQUANTISED,
                "dtype": get_dtype_name(dtype),
                "quantised_from": get_dtype_name(quantised_from),
                "weights": folder_digest(part, WEIGHTS),
            }
            write_json(part / ABOUT, about)
    remedy = f"Remove {folder}, and export again with resume=never."
    if read_json_object(folder / ABOUT, ABOUT, remedy).get("weights") != folder_digest(folder, WEIGHTS):
        raise CorruptFile("base", folder.name, "its weights are not those that were written", remedy)
    return folder


def build_dequantised_name(
    base: Base, public_base: dict[str, str], quantised_from: torch.dtype, dtype: torch.dtype
) -> str:
    """Return the folder name of a dequantised base, with the base's name, the dtype and a digest. It depends on the
    dtype from which the base was quantised, because the NF4 codes do, if the base is stored in a wider dtype."""
    digest = json_digest([base.digest, str(quantised_from)])[:12]
    return f"{Path(public_base['id']).name}-{DEQUANTISED}-{get_dtype_name(dtype)}-{digest}"


def read_weights_dtype(folder: Path) -> str:
    """Return the name of the dtype that all safetensors weights in a folder have.

    Raises:
        CorruptFile: the weights have several dtypes, or the folder has no weights.
    """
    dtypes = set()
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            dtypes |= {get_dtype_name(file.get_tensor(key).dtype) for key in file.keys()}  # noqa: SIM118
    if len(dtypes) != 1:
        raise CorruptFile("weights", folder.name, f"their dtypes are {sorted(dtypes)}", "Export it again.")
    return dtypes.pop()


def dequantise_in_place(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Convert an NF4 model to plain weights in `dtype`, in place, and return it.

    Raises:
        RuntimeError: bitsandbytes has repacked the weights, which would dequantise to garbage.
    """
    refuse_repacked(model)
    plain = cast_to_fp32(model).dequantize(dtype=dtype)
    cast_weights_in_place(plain, dtype)
    remove_loading_settings(plain)
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


def cast_weights_in_place(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast all floating-point weights of a model to `dtype` in place, or raise InputError if one overflows.
    `.to(dtype)` would round the rotary frequencies too, which loading keeps in fp32."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
            if not bool(parameter.data.isfinite().all()):
                problem = "cannot hold a weight of this model"
                raise InputError("export.dtype", get_dtype_name(dtype), problem, "Use bfloat16.")


def remove_loading_settings(model: Any) -> None:
    """Remove the quantisation attributes of a model and its configuration that `save_pretrained` would write.
    `dequantize` and GGUF loading leave them behind."""
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


def require_plain_weights(folder: Path, dtype: torch.dtype) -> None:
    """Raise RuntimeError if a saved model's configuration mentions quantisation or a weight is not stored in
    `dtype`."""
    if "quantization_config" in read_json_object(folder / "config.json", "config.json", "Export again."):
        raise RuntimeError("config.json still speaks of quantisation: a plain loader would refuse the weights")
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (the handle is no mapping)
                if (stored_dtype := file.get_tensor(name).dtype) != dtype:
                    raise RuntimeError(f"{name} was written in {stored_dtype} instead of {dtype}")
