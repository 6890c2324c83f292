"""Conversion of an adapter to plain LoRA: one rank, a scale of 1, and only the two matrices of each module.

Engines ignore settings that they do not support. Measured on a small Llama, as the largest logprob difference from PEFT
in nats: llama.cpp's converter applies alpha / r to rsLoRA (5.94) and ignores rank and alpha patterns (4.18); SGLang's
source does the same. The conversion therefore moves the scale into `lora_B`, pads every rank with zeros to the largest,
and sets alpha to the rank: every engine's formula then gives a scale of 1. Settings that plain LoRA cannot express are
refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from align.core.errors import InputError, require
from align.models.adapters import (
    CHANGES_BASE,
    CONFIG_FILE,
    LORA_KEY,
    SCORE_KEY,
    WEIGHTS_FILE,
    Adapter,
    Factors,
    read_adapter,
)
from align.run import write_json
from align.run.weights import build_local_base_name

REPEATABLE = ("pissa", "olora")
"""Initialisations that subtract a part from the base's weights, which can be reproduced by factorising the weights
again."""
MERGE = "Export it merged: export=merged."
READ_BY_ENGINES = (
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "bias",
    "fan_in_fan_out",
    "modules_to_save",
)
"""Configuration keys that decide what an adapter computes."""
TRAINING_ONLY = (
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "megatron_core",
    "parent_library",
    "peft_version",
    "qalora_group_size",
    "revision",
    "velora_config",
)
"""Configuration keys that record how an adapter was trained, or that are always rewritten."""
SCORE_MODULES = ("classifier", "score")
"""Names under which PEFT saves the head of a sequence classifier."""
MERGEABLE = {
    "modules_to_save": "whole modules travel with it: vLLM and llama.cpp's converter reject them",
    "use_dora": "vLLM, SGLang and llama.cpp's converter reject DoRA",
    "bias": "vLLM and llama.cpp's converter reject biases",
    "target_parameters": "no engine is known to support it, and without it the adapter is another model",
}
"""Configuration keys of adapters that can be merged but that no engine serves as an adapter, with the reason."""


def refuse_unsupported_adapter(adapter: Adapter, will_merge: bool = False) -> None:
    """Raise InputError for an adapter that serving engines would read wrongly or not at all. A reward model's head is
    allowed.

    Args:
        will_merge: whether the adapter will be merged into its base, which supports more settings.

    Raises:
        InputError: with the key, its value and the reason.
    """
    config = adapter.config
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(CHANGES_BASE) and init not in REPEATABLE:
        problem = (
            "it subtracted factors from the base's weights that cannot be reproduced: on the base it is another model"
        )
        remedy = (
            "Convert it with PEFT's path_initial_model_for_weight_conversion, or train with init_lora_weights=true."
        )
        raise InputError("init_lora_weights", init, problem, remedy)
    harmless = {*READ_BY_ENGINES, *TRAINING_ONLY} - MERGEABLE.keys()
    for key in sorted(config.keys() - harmless - (MERGEABLE.keys() if will_merge else set())):
        value = config[key]
        is_head = key == "modules_to_save" and adapter.has_score_head and set(value or ()) <= set(SCORE_MODULES)
        if value not in (None, False, "none", [], {}) and not is_head:
            remedy = MERGE if key in READ_BY_ENGINES else "Train it as plain LoRA."
            raise InputError(key, value, MERGEABLE.get(key, MERGEABLE["target_parameters"]), remedy)
    for key in () if will_merge else adapter.tensors:
        require(
            bool(LORA_KEY.fullmatch(key)) or key == SCORE_KEY, WEIGHTS_FILE, key, "is no lora_A or lora_B weight", MERGE
        )


def convert_to_plain_lora(adapter: Adapter, initial_factors: Mapping[str, Factors] | None = None) -> Adapter:
    """Convert an adapter to an equivalent plain LoRA in fp32, with one rank for all modules and a scale of 1.

    Args:
        initial_factors: factors that the initialisation subtracted from the base's weights, by module, from
            `compute_initial_factors`. They are added back, which doubles the rank.
    """
    config = adapter.config
    scaled = {}
    for module, (a, b) in adapter.factors.items():
        factors = (a.float(), b.float() * compute_lora_scale(config, module, len(a)))
        if initial_factors is not None:  # W - s·B₀A₀ + s·BA, as W + [s·B, -s·B₀][A; A₀]
            a0, b0 = (side.float().to(a.device) for side in initial_factors[module])
            b0 = -compute_lora_scale(config, module, len(a0)) * b0
            factors = (torch.cat((factors[0], a0)), torch.cat((factors[1], b0), dim=1))
        scaled[module] = factors
    rank = max(len(a) for a, _ in scaled.values())
    plain: dict[str, Any] = {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0}
    plain |= {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    if isinstance(config.get("target_modules"), str):  # a regular expression, which engines read as a name or a list
        plain |= {"target_modules": sorted(scaled), "exclude_modules": None}
        plain |= {"layers_to_transform": None, "layers_pattern": None}
    tensors = {}
    for module, (a, b) in scaled.items():
        missing = rank - len(a)
        for side, x in (
            ("A", torch.nn.functional.pad(a, (0, 0, 0, missing))),
            ("B", torch.nn.functional.pad(b, (0, missing))),
        ):
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = x.contiguous()
    if adapter.has_score_head:
        tensors[SCORE_KEY] = adapter.tensors[SCORE_KEY].float()
        plain["modules_to_save"] = ["score"]
    return Adapter({**config, **plain}, tensors)


def compute_lora_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the factor by which PEFT multiplies a module's B·A: alpha / r, or alpha / √r (rsLoRA: Kalajdzievski,
    2023)."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def compute_initial_factors(model: Any, config: Mapping[str, Any]) -> dict[str, Factors] | None:
    """Compute the LoRA factors that an adapter's initialisation subtracted from the base's weights, by module. Returns
    None for the usual initialisations, which subtract nothing.

    PiSSA (Meng et al., 2024) and OLoRA (Büyükakyüz, 2024) start from a factorisation of each weight, and leave the
    residual in the base: PEFT does so again whenever such an adapter is loaded.

    Args:
        model: the base, freshly loaded; it is modified.

    Raises:
        InputError: the base is quantised, so that the residual was quantised again.
    """
    if config.get("init_lora_weights") not in REPEATABLE:
        return None
    refuse_unknown_residual(getattr(model, "is_loaded_in_4bit", False), config)
    settings = {
        key: value for key, value in config.items() if value is not None and key in LoraConfig.__dataclass_fields__
    }
    factors = {}
    for name, layer in get_peft_model(model, LoraConfig(**settings)).named_modules():
        if isinstance(layer, LoraLayer) and layer.lora_A:
            lora: Any = layer
            sides = (side["default"].weight.detach() for side in (lora.lora_A, lora.lora_B))
            factors[name.removeprefix("base_model.model.")] = tuple(sides)
    return factors


def refuse_unknown_residual(is_quantised: bool, config: Mapping[str, Any]) -> None:
    """Raise InputError if an adapter's initialisation subtracted factors from a quantised base, whose residual is
    unknown."""
    init = config.get("init_lora_weights")
    if init in REPEATABLE and is_quantised:
        problem = (
            "it subtracted factors from a quantised base, whose residual was quantised anew: this cannot be undone"
        )
        raise InputError("init_lora_weights", init, problem, "Train with init_lora_weights=true, or with method=lora.")


def write_plain_lora(
    folder: Path, source: Path, base: Mapping[str, str], initial_factors: Mapping[str, Factors] | None = None
) -> None:
    """Write a PEFT adapter to `folder` as plain LoRA in fp32, with the configuration that engines read. A reward
    model's head is kept.

    Args:
        folder: an empty folder, from `align.run.atomic.publish_folder`.
        source: folder of a PEFT adapter.
        base: `id`, `revision` and `digest` of the model the adapter was trained on.
        initial_factors: see `convert_to_plain_lora`; needed if `init_lora_weights` is one of `REPEATABLE`.

    Raises:
        CorruptFile, InputError, StorageError: see `read_adapter`, `refuse_unsupported_adapter` and `publish_folder`.
            Also if a scaled factor is not finite.
    """
    adapter = read_adapter(source)
    refuse_unsupported_adapter(adapter)
    plain = convert_to_plain_lora(adapter, initial_factors)
    for key, tensor in plain.tensors.items():
        remedy = "Train with a smaller lora_alpha."
        require(
            bool(tensor.isfinite().all()), WEIGHTS_FILE, key, "its scale turns the weights into nan or infinity", remedy
        )
    save_file({key: tensor.cpu() for key, tensor in plain.tensors.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    config = {key: plain.config[key] for key in READ_BY_ENGINES if key in plain.config}
    targets = config.get("target_modules")
    config |= {
        "base_model_name_or_path": build_local_base_name(base),
        "revision": base.get("revision") or None,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
    }
    write_json(folder / CONFIG_FILE, config)
