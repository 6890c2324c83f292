"""A LoRA adapter's two files, read whole: PEFT's own, whoever wrote them.

Training libraries write more than engines understand, and engines pass over in silence what they do not read. What
plain LoRA can say is said in it (`align.models.lowering`); what it cannot is refused here, by name, instead of being
served wrong there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from align.errors import CorruptFile, InputError, MissingArtifact
from align.models.adapters import CHANGES_BASE, CONFIG_FILE, WEIGHTS_FILE
from align.models.lowering import REPEATABLE, Factors
from align.run import json_object

MERGE = "Export it merged: export=merged."
RETRAIN = "Restore it from a copy, or train again with resume=never."

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
MERGEABLE = ("modules_to_save", "use_dora", "bias", "target_parameters")
"""Keys of what no engine serves as an adapter, and a merge can take."""
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A PEFT adapter on disk, its files read and found whole.

    Attributes:
        config: `adapter_config.json` as it stands.
        shapes: shape of each tensor, by its key in the file.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each adapted module: `lora_A` is [rank, in features], `lora_B` [out features, rank]."""
        found = ((KEY.fullmatch(key), shape) for key, shape in self.shapes.items())
        return {m["module"]: shape[0] for m, shape in found if m and m["side"] == "A"}


def read_adapter(source: Path) -> Adapter:
    """Read an adapter's files whole and check that they hang together.

    Raises:
        MissingArtifact: a file is not there.
        CorruptFile: a file is truncated or not what its name says, a value is not finite, or a `lora_A` lacks its
            `lora_B` or disagrees with it in rank.
        InputError: it is not a LoRA adapter.
    """
    written = "Point at a folder that `save_pretrained` of PEFT wrote."
    if not (source / CONFIG_FILE).is_file():
        raise MissingArtifact(CONFIG_FILE, str(source), "the file is not there", written)
    config = json_object(source / CONFIG_FILE, CONFIG_FILE, written)
    if config.get("peft_type") != "LORA":
        raise InputError(
            "peft_type", config.get("peft_type"), "only LoRA adapters are read", "Train with method=qlora."
        )
    weights = source / WEIGHTS_FILE
    if not weights.is_file():
        raise MissingArtifact(WEIGHTS_FILE, str(source), "the file is not there", RETRAIN)

    def corrupt(problem: str) -> CorruptFile:
        return CorruptFile(WEIGHTS_FILE, str(source), problem, RETRAIN)

    shapes = {}
    try:
        with safe_open(weights, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                tensor = file.get_tensor(key)
                if not torch.isfinite(tensor).all():
                    raise corrupt(f"{key} holds values that are not finite")
                shapes[key] = tuple(tensor.shape)
    except SafetensorError as error:
        raise corrupt(f"is truncated or damaged ({error})") from error
    if not shapes:
        raise corrupt("holds no tensors")

    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        if match := KEY.fullmatch(key):
            sides.setdefault(match["module"], {})[match["side"]] = shape
    for module, pair in sides.items():
        if pair.keys() != {"A", "B"}:
            raise corrupt(f"{module} has lora_{''.join(pair)} alone")
        if pair["A"][0] != pair["B"][1]:
            raise corrupt(f"the two sides of {module} have ranks {pair['A'][0]} and {pair['B'][1]}")
    adapter = Adapter(config, shapes)
    if not config.get("rank_pattern") and set(adapter.ranks.values()) - {config.get("r")}:
        raise corrupt(f"holds ranks {sorted(set(adapter.ranks.values()))} where {CONFIG_FILE} says r={config.get('r')}")
    return adapter


def check_plain(adapter: Adapter, allow: tuple[str, ...] = ()) -> None:
    """Refuse what engines would read wrongly or not at all.

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
        if config[key] not in (None, False, "none", [], {}):
            if key in reasons:
                raise InputError(key, config[key], reasons[key], MERGE)
            reason = "no engine is known to read it, and without it the adapter is another model"
            raise InputError(key, config[key], reason, "Train it as plain LoRA.")
    if allow:
        return
    for key in adapter.shapes:
        if not KEY.fullmatch(key):
            raise InputError(WEIGHTS_FILE, key, "is no lora_A or lora_B weight", MERGE)


def factors_in(source: Path) -> dict[str, Factors]:
    """`lora_A` and `lora_B` of each module of an adapter that was read and found whole."""
    tensors = load_file(source / WEIGHTS_FILE)
    found = {match["module"]: key for key in tensors if (match := KEY.fullmatch(key)) and match["side"] == "A"}
    return {module: (tensors[key], tensors[key.replace(".lora_A.", ".lora_B.")]) for module, key in found.items()}
