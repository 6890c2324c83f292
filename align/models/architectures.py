"""Which way each architecture goes: the fast path, the plain path, or none. Imports no torch.

`architectures.json` is what `benchmarks/architectures.py` measured on a small model of every causal type that
transformers builds. A type or a configuration that is not in it is never taken for proven: it goes the plain way and is
asked at load (`align.models.probe`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from align.core.errors import InputError

TABLE = Path(__file__).resolve().parent / "architectures.json"
SIZES = re.compile(r"(^|\.)(head_dim|n_inner|num_key_value_heads|unpadded_vocab_size|n_group|topk_group)$")
"""Sizes that may be left to be derived from others; every other size is a number, and no number is looked at."""
UNTOLD = re.compile(
    r"(^|\.)(.*_token_ids?|.*_token_index|vocabulary_map|.*dropout.*|.*_pdrop|dropout_p|.*layerdrop|initializer.*|init_.*"
    r"|architectures|dtype|torch_dtype|transformers_version|_name_or_path|name_or_path|id2label|label2id|num_labels"
    r"|output_router_logits|output_hidden_states|output_attentions|return_dict|problem_type|use_cache|_attn_implementation.*|auto_map"
    r"|quantization_config|gradient_checkpointing|hidden_size|vision_config|audio_config|classifier_.*|summary_.*"
    r"|task_specific_params|finetuning_task|_commit_hash)$"
)
"""Vocabulary, token ids, dropout, initialisation, what classifiers and other senses have, and records of how a model
was saved: what text it makes of text does not hang on them."""


class Route(NamedTuple):
    """How a model is computed.

    Attributes:
        fast: hidden states and head apart, a cache that is reserved once, short forwards on a CPU. Otherwise logits are
            those of the model's own forward, and samples come through transformers' own cache.
        padding: rows of different lengths may stand in one rectangle. Otherwise rows of one length are computed
            together, without padding or positions.
        packing: several rows may be packed into one, told apart by their positions.
        why: what keeps a model from the fast path; empty where nothing does.
        proven: this very configuration was measured.
    """

    fast: bool
    padding: bool
    packing: bool
    why: str = ""
    proven: bool = True

    @property
    def halves(self) -> bool:
        """Whether hidden states and head apart make the logits: then a cache alone keeps a model from the fast path."""
        return self.fast or (self.proven and self.why.startswith("the reserved cache"))


FAST = Route(True, True, True)


@cache
def proven_types() -> dict[str, Any]:
    """What was measured: model type → path, cause, and the settings it was proven with."""
    return json.loads(TABLE.read_text(encoding="utf-8"))["types"]


FP32_ALONE = ("xlstm",)
"""Types whose own forward mixes dtypes in half precision, and fails."""


def refuse_half(config: Mapping[str, Any], dtype: str, id: str) -> None:
    """Raise `InputError` for a type that computes in fp32 alone and is to compute in half precision.

    Args:
        config: the `config.json`.
        dtype: of the computation, such as `bfloat16`.
        id: the model as the user named it.
    """
    model_type = str(config.get("model_type", ""))
    if model_type in FP32_ALONE and dtype != "float32":
        problem = f"its type {model_type} computes in float32 alone, and the computation is in {dtype}"
        raise InputError("model.path", id, problem, "Add dtype=float32.")


@cache
def proven_checkpoints() -> dict[str, list[dict[str, Any]]]:
    """Return model type → rows of measured configurations of published checkpoints (`benchmarks/checkpoints.py`)."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    found: dict[str, list[dict[str, Any]]] = {}
    for row in table.get("checkpoints", {}).values():
        if row["path"] in ("fast", "plain"):
            found.setdefault(row["type"], []).append(row)
    return found


def refuse(config: Mapping[str, Any], id: str) -> None:
    """Raise `InputError` for a type that cannot be right here.

    Args:
        config: the `config.json`.
        id: the model as the user named it.
    """
    model_type = str(config.get("model_type", ""))
    if cause := refusal_of(model_type):
        raise InputError(
            "model.path", id, f"its type {model_type} cannot be trained here: {cause}",
            "Use a causal language model of another type; docs/architectures.md lists them.",
        )  # fmt: skip


def refusal_of(model_type: str) -> str:
    """Return why models of a type are refused. Returns an empty text for a type that is not."""
    row = proven_types().get(model_type)
    return row["cause"] if row is not None and row["path"] == "refused" else ""


def route(config: Any) -> Route:
    """Return how a model with this configuration is computed: as its type or a published checkpoint was measured.

    Args:
        config: transformers' configuration of the whole model, not of its text part.
    """
    row = proven_types().get(config.model_type)
    if row is None or row["path"] == "refused":
        return Route(False, False, False, f"type {config.model_type} is not among those that were proven", False)
    given = deciding_settings(config)
    for measured in proven_checkpoints().get(config.model_type, ()):
        if measured["settings"] == given:
            return Route(measured["path"] == "fast", measured["padding"], measured["packing"], measured["cause"])
    if row["path"] == "unbuilt":
        return Route(False, False, False, f"type {config.model_type} was not measured ({row['cause']})", False)
    base = row["settings"]
    differs = {k: given.get(k, "a number") for k in base.keys() | given.keys() if given.get(k) != base.get(k)}
    for change in ({}, *row.get("variants", ())):
        if change == differs:
            return Route(row["path"] == "fast", row["padding"], row["packing"], row["cause"])
    listed = ", ".join(f"{k}={v}" for k, v in sorted(differs.items())[:3])
    return Route(False, False, False, f"type {config.model_type} was not proven with {listed}", False)


def deciding_settings(config: Any) -> dict[str, Any]:
    """What of a configuration decides how a model computes: flags, names, and what is left out, but no number.

    Of a list of names, which of them occur: layers of each kind were proven, whatever their number and order.
    """
    return dict(sorted(flat(config.to_dict(), known(config)).items()))


def known(config: Any) -> frozenset[str]:
    """The settings that a configuration's class has: others in a `config.json` are read by nobody."""
    if is_dataclass(config):
        return frozenset(f.name for f in fields(config)) | {"rope_parameters"}
    return frozenset(type(config)().to_dict())


def flat(values: Mapping[str, Any], names: frozenset[str] | None, above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{above}{name}"
        if (names is not None and name not in names) or UNTOLD.search(path) or SIZES.search(path):
            continue
        if isinstance(value, Mapping):
            found |= flat(value, None, f"{path}.")
        elif isinstance(value, list | tuple):
            kinds = sorted({v for v in value if isinstance(v, str)})
            if kinds:
                found[path] = "+".join(kinds)
        elif value is None or isinstance(value, bool | str):
            found[path] = value
    return found
