"""The way in which each model architecture is computed: the fast path, the plain path, or not at all. Imports no torch.

`architectures.json` holds what `benchmarks/architectures.py` measured on a small model of every causal type that
transformers builds. A type or a configuration that is not in it takes the plain path and is probed at load
(`align.models.probe`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from align.core.errors import require

TABLE = Path(__file__).resolve().parent / "architectures.json"
SIZES = re.compile(r"(^|\.)(head_dim|n_inner|num_key_value_heads|unpadded_vocab_size|n_group|topk_group)$")
"""Pattern of configuration keys of sizes whose absence matters, because they are then derived from others. All other
numbers are ignored."""
IRRELEVANT = re.compile(
    r"(^|\.)(.*_token_ids?|.*_token_index|vocabulary_map|.*dropout.*|.*_pdrop|dropout_p|.*layerdrop|initializer.*|init_.*"
    r"|architectures|dtype|torch_dtype|transformers_version|_name_or_path|name_or_path|id2label|label2id|num_labels"
    r"|output_router_logits|output_hidden_states|output_attentions|return_dict|problem_type|use_cache|_attn_implementation.*|auto_map"
    r"|quantization_config|gradient_checkpointing|hidden_size|vision_config|audio_config|classifier_.*|summary_.*"
    r"|task_specific_params|finetuning_task|_commit_hash)$"
)
"""Pattern of configuration keys that do not change the text a model generates: vocabulary, token ids, dropout,
initialisation, settings of classifiers, vision and audio, and records of how the model was saved."""


class Route(NamedTuple):
    """The properties of a model's forward code: fast path or not, and whether rows can be padded or packed.

    Attributes:
        has_fast_path: whether the fast path applies: hidden states and head are computed separately, the cache is
            reserved once, and forwards on a CPU are short. Otherwise logits come from the model's own forward, and
            samples use transformers' own cache.
        can_pad: whether rows of different lengths may be padded to one batch. Otherwise rows of equal length are
            computed together, without padding or positions.
        can_pack: whether several rows may be packed into one, separated by their positions.
        why: reason why a model is not on the fast path; empty if it is.
        is_measured: whether this configuration was measured.
    """

    has_fast_path: bool
    can_pad: bool
    can_pack: bool
    why: str = ""
    is_measured: bool = True

    @property
    def has_separate_head(self) -> bool:
        """True if the head applied to the hidden states gives the model's logits. Off the fast path, this holds for
        measured models that fail only by their cache."""
        return self.has_fast_path or (self.is_measured and self.why.startswith("the reserved cache"))


FAST = Route(True, True, True)


@cache
def load_architecture_table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def read_proven_types() -> dict[str, Any]:
    """Return the measured path, its cause and the measured settings of each model type, from `architectures.json`."""
    return load_architecture_table()["types"]


FP32_ALONE = ("xlstm",)
"""Model types whose own forward fails in half precision, because it mixes dtypes."""


def refuse_half_precision(config: Mapping[str, Any], dtype: str, id: str) -> None:
    """Raise InputError if half precision is requested for a model type that can only be computed in fp32.

    Args:
        config: content of `config.json`.
        dtype: dtype of the computation, such as `bfloat16`.
        id: the model as the user named it.
    """
    model_type = str(config.get("model_type", ""))
    problem = f"its type {model_type} computes in float32 alone, and the computation is in {dtype}"
    fits = model_type not in FP32_ALONE or dtype == "float32"
    require(fits, "model.path", id, problem, "Add dtype=float32.")


def refuse_unsupported_type(config: Mapping[str, Any], id: str) -> None:
    """Raise InputError for a model type that cannot be trained, with the reason from `architectures.json`.

    Args:
        config: content of `config.json`.
        id: the model as the user named it.
    """
    model_type = str(config.get("model_type", ""))
    cause = find_refusal_reason(model_type)
    problem = f"its type {model_type} cannot be trained here: {cause}"
    remedy = "Use a causal language model of another type; docs/architectures.md lists them."
    require(not cause, "model.path", id, problem, remedy)


def find_refusal_reason(model_type: str) -> str:
    """Return the reason why models of a type are refused, or an empty string for other types."""
    row = read_proven_types().get(model_type)
    return row["cause"] if row is not None and row["path"] == "refused" else ""


def find_route(config: Any) -> Route:
    """Return the Route of a configuration (fast or plain path, padding, packing), as measured for its model type or a
    published checkpoint. A configuration that was not measured gets the plain path.

    Args:
        config: transformers' configuration of the whole model, not of its text part.
    """
    row = read_proven_types().get(config.model_type)
    if row is None or row["path"] == "refused":
        return Route(False, False, False, f"type {config.model_type} is not among those that were proven", False)
    settings = select_deciding_settings(config)
    for measured in load_architecture_table().get("checkpoints", {}).values():
        is_supported = measured["path"] in ("fast", "plain")
        if is_supported and measured["type"] == config.model_type and measured["settings"] == settings:
            return Route(measured["path"] == "fast", measured["padding"], measured["packing"], measured["cause"])
    if row["path"] == "unbuilt":
        return Route(False, False, False, f"type {config.model_type} was not measured ({row['cause']})", False)
    proven = row["settings"]
    differences = {
        key: settings.get(key, "a number")
        for key in proven.keys() | settings.keys()
        if settings.get(key) != proven.get(key)
    }
    if differences in ({}, *row.get("variants", ())):
        return Route(row["path"] == "fast", row["padding"], row["packing"], row["cause"])
    listed = ", ".join(f"{key}={value}" for key, value in sorted(differences.items())[:3])
    return Route(False, False, False, f"type {config.model_type} was not proven with {listed}", False)


def select_deciding_settings(config: Any) -> dict[str, Any]:
    """Return the settings of a configuration that decide how a model computes, as dotted name → value. These are flags,
    names and omitted settings, but no numbers.

    A list of names is reduced to its set: layers of each kind were measured, and their number and order do not matter.
    A setting that the configuration's class does not have is ignored, as in transformers.
    """
    values = config.to_dict()
    if is_dataclass(config):
        names = {field.name for field in fields(config)} | {"rope_parameters"}
    else:
        names = type(config)().to_dict().keys()
    values = {name: value for name, value in values.items() if name in names}
    return dict(sorted(iter_settings(values)))


def iter_settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        path = f"{prefix}{name}"
        if IRRELEVANT.search(path) or SIZES.search(path):
            continue
        if isinstance(value, Mapping):
            yield from iter_settings(value, f"{path}.")
        elif isinstance(value, list | tuple):
            if kinds := sorted({kind for kind in value if isinstance(kind, str)}):
                yield path, "+".join(kinds)
        elif value is None or isinstance(value, bool | str):
            yield path, value
