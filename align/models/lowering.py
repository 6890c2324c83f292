"""An adapter as plain LoRA: one rank, no scale, nothing to know beside the two matrices of each module.

Engines pass over in silence what they do not read. Measured on a small Llama, as the largest logprob difference from
PEFT in nats: llama.cpp's converter takes rsLoRA's scale for alpha / r (5.94) and reads no rank and alpha patterns
(4.18); SGLang's source does the same of both. So the scale goes into `lora_B`, every rank is filled up with zeros to
the largest, and alpha is the rank: whichever rule an engine has, it multiplies by one. What plain LoRA cannot say is
refused by name, instead of being served wrong there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor

from align.core.errors import InputError
from align.models.adapter_files import CHANGES_BASE, KEY, SCORE_KEY, WEIGHTS_FILE, Adapter, Factors

REPEATABLE = ("pissa", "olora")
"""Initialisations that take a share out of the base's weights which a factorisation of these gives again."""
MERGE = "Export it merged: export=merged."
# What says which function the adapter computes, and so what an engine needs to read.
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
# What only said how it was trained, or is rewritten by who writes it again.
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
SCORE_MODULES = ("classifier", "score")
"""By these names PEFT saves the head of a sequence classifier."""
MERGEABLE = ("modules_to_save", "use_dora", "bias", "target_parameters")
"""Keys of what no engine serves as an adapter, and a merge can take."""


def check_plain(adapter: Adapter, allow: tuple[str, ...] = ()) -> None:
    """Refuse what engines would read wrongly or not at all. The head of a reward model may travel with its adapter.

    Args:
        adapter: what `read_adapter` found.
        allow: config keys to let pass for whoever can handle them, with tensors other than `lora_A` and `lora_B`.

    Raises:
        InputError: naming the key, its value and why.
    """
    config = adapter.config
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(CHANGES_BASE) and init not in REPEATABLE:
        problem = "it changed the base's own weights by what nobody can find again: on the base it is another model"
        remedy = (
            "Convert it with PEFT's path_initial_model_for_weight_conversion, or train with init_lora_weights=true."
        )
        raise InputError("init_lora_weights", init, problem, remedy)
    reasons = {
        "modules_to_save": "whole modules travel with it: vLLM refuses them, llama.cpp's converter stops at them",
        "use_dora": "vLLM and SGLang refuse DoRA, llama.cpp's converter stops at its magnitudes",
        "bias": "vLLM refuses biases, and llama.cpp's converter stops at them",
    }
    harmless = {*READ_BY_ENGINES, *TRAINING_ONLY} - reasons.keys()
    for key in sorted(config.keys() - harmless - set(allow)):
        head = key == "modules_to_save" and adapter.scores and set(config[key] or ()) <= set(SCORE_MODULES)
        if config[key] not in (None, False, "none", [], {}) and not head:
            if key in reasons:
                raise InputError(key, config[key], reasons[key], MERGE)
            reason = "no engine is known to read it, and without it the adapter is another model"
            raise InputError(key, config[key], reason, "Train it as plain LoRA.")
    if allow:
        return
    for key in adapter.shapes:
        if not KEY.fullmatch(key) and key != SCORE_KEY:
            raise InputError(WEIGHTS_FILE, key, "is no lora_A or lora_B weight", MERGE)


def lower(
    config: Mapping[str, Any], factors: Mapping[str, Factors], initial: Mapping[str, Factors] | None = None
) -> tuple[dict[str, Any], dict[str, Factors]]:
    """The same function of the same base, as plain LoRA in fp32.

    Args:
        config: `adapter_config.json` as PEFT wrote it.
        factors: by module.
        initial: what the initialisation took out of the base's weights, by module, from `initial_factors`: it is put
            back, at the cost of as many ranks again.

    Returns:
        What differs of the config, and the factors: all of one rank, to be multiplied by nothing.
    """
    scaled = {}
    for module, (a, b) in factors.items():
        a, b = a.float(), b.float() * scale(config, module, a.shape[0])
        if initial is not None:  # W - s·B₀A₀ + s·BA, as W + [s·B, -s·B₀][A; A₀]
            a0, b0 = (side.float().to(a.device) for side in initial[module])
            a, b = torch.cat((a, a0)), torch.cat((b, -scale(config, module, a0.shape[0]) * b0), dim=1)
        scaled[module] = a, b
    rank = max(a.shape[0] for a, _ in scaled.values())
    plain: dict[str, Any] = {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0}
    plain |= {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    if isinstance(config.get("target_modules"), str):  # an expression, which engines take for a list or a name
        plain |= {"target_modules": sorted(factors), "exclude_modules": None}
        plain |= {"layers_to_transform": None, "layers_pattern": None}
    return plain, {module: with_rank(a, b, rank) for module, (a, b) in scaled.items()}


def scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies B·A of a module by: alpha / r, or alpha / √r (rsLoRA: Kalajdzievski, 2023)."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def with_rank(a: Tensor, b: Tensor, rank: int) -> Factors:
    """The same product with more ranks, the further ones zero."""
    more = rank - a.shape[0]
    return (
        torch.cat((a, a.new_zeros(more, a.shape[1]))).contiguous(),
        torch.cat((b, b.new_zeros(b.shape[0], more)), dim=1).contiguous(),
    )


def initial_factors(model: Any, config: Mapping[str, Any]) -> dict[str, Factors] | None:
    """What the adapter's initialisation took out of the base's weights; None where it took nothing.

    PiSSA (Meng et al., 2024) and OLoRA (Büyükakyüz, 2024) start from a factorisation of each weight and leave the rest
    in the base: PEFT does so again whenever such an adapter is loaded.

    Args:
        model: the base, freshly loaded. It is consumed.

    Raises:
        InputError: the base is quantised, so that what is left of each weight was quantised anew.
    """
    if config.get("init_lora_weights") not in REPEATABLE:
        return None
    check_initial(getattr(model, "is_loaded_in_4bit", False), config)
    known = {
        key: value for key, value in config.items() if value is not None and key in LoraConfig.__dataclass_fields__
    }
    wrapped = get_peft_model(model, LoraConfig(**known))
    found = {}
    for name, layer in wrapped.named_modules():
        if isinstance(layer, LoraLayer) and layer.lora_A:
            lora: Any = layer
            sides = (side["default"].weight.detach() for side in (lora.lora_A, lora.lora_B))
            found[name.removeprefix("base_model.model.")] = tuple(sides)
    return found


def check_initial(quantised: bool, config: Mapping[str, Any]) -> None:
    """Raises: InputError: the adapter took a share out of a quantised base, of which nobody can say what was left."""
    init = config.get("init_lora_weights")
    if init in REPEATABLE and quantised:
        problem = "it took a share out of a quantised base, whose rest was quantised anew: nothing undoes that"
        raise InputError("init_lora_weights", init, problem, "Train with init_lora_weights=true, or with method=lora.")
