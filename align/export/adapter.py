"""A LoRA adapter as every engine reads it: PEFT's own two files at the root of a folder, lowered to plain LoRA.

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
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from align.errors import CorruptFile, InputError, MissingArtifact
from align.export.folder import check_base, read_json, write_tokenizer
from align.models.adapters import CHANGES_BASE
from align.models.lowering import REPEATABLE, Factors, lower
from align.run import write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE = "Export it merged: export=merged."
OWN_TOKENIZER = "Train with the base's own tokenizer."
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
# What only said how it was trained, or is rewritten below.
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
    config = read_json(source / CONFIG, "Point at a folder that `save_pretrained` of PEFT wrote.")
    if config.get("peft_type") != "LORA":
        raise InputError(
            "peft_type", config.get("peft_type"), "only LoRA adapters are read", "Train with method=qlora."
        )
    weights = source / WEIGHTS
    if not weights.is_file():
        raise MissingArtifact(WEIGHTS, str(source), "the file is not there", RETRAIN)

    def corrupt(problem: str) -> CorruptFile:
        return CorruptFile(WEIGHTS, str(source), problem, RETRAIN)

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
        raise corrupt(f"holds ranks {sorted(set(adapter.ranks.values()))} where {CONFIG} says r={config.get('r')}")
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
            raise InputError(WEIGHTS, key, "is no lora_A or lora_B weight", MERGE)


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
    """Write an adapter for deployment: plain LoRA in fp32, the config that engines read, tokenizer and template.

    Args:
        folder: an empty one, of `align.export.folder.publish`.
        source: a PEFT adapter's folder.
        base: `id`, `revision` and `digest` of the model the adapter was trained on. The digest goes into `base.json`,
            since PEFT warns at keys of `adapter_config.json` that it does not know.
        beside: the base's folder, see `align.export.folder.write_tokenizer`.
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
                WEIGHTS, module, "its scale makes nan or infinity of it", "Train with a smaller lora_alpha."
            )
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": tensor.cpu()
        for module, pair in factors.items()
        for side, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    write_json(folder / CONFIG, engine_config({**adapter.config, **plain}, base))
    write_json(folder / "base.json", dict(base))
    write_tokenizer(folder, tokenizer, beside)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase) -> None:
    """Raises: InputError: the adapter was trained with tokens that its base does not have, and can carry none."""
    if added := sorted(tokenizer.get_vocab().keys() - base.get_vocab().keys()):
        problem = f"{len(added)} tokens were added to the base's: vLLM and llama.cpp have no embedding for them"
        raise InputError("tokenizer", added[0], problem, OWN_TOKENIZER)


def factors_in(source: Path) -> dict[str, Factors]:
    """`lora_A` and `lora_B` of each module of an adapter that was read and found whole."""
    tensors = load_file(source / WEIGHTS)
    found = {match["module"]: key for key in tensors if (match := KEY.fullmatch(key)) and match["side"] == "A"}
    return {module: (tensors[key], tensors[key.replace(".lora_A.", ".lora_B.")]) for module, key in found.items()}


def rank_of(folder: Path) -> int:
    """Of an adapter that was lowered."""
    return int(read_json(folder / CONFIG, RETRAIN)["r"])
