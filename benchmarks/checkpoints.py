"""Measure configurations of published checkpoints as small models, and write `checkpoints` of architectures.json.

    python benchmarks/checkpoints.py            all of them: the table and docs/architectures.md
    python benchmarks/checkpoints.py ID ...     these: their rows are printed, nothing is written

`published_configs.json` has each checkpoint's `config.json` with the address that it was read from. A small model keeps
what decides how a model computes (names, flags, what is empty, kinds of layers, scaling of positions) and has fewer
layers, narrower ones and a small vocabulary. It has to pass the checks of a variant in `architectures.py`. Further
checks tell whether NF4, shards and batched serving work.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import DOC, format_page, measure_in_fork
from bitsandbytes.nn.modules import Linear4bit
from measure_architecture import (
    TOLERANCE,
    collect_oracle_outputs,
    describe_error,
    load_oracle,
    measure_config,
    measure_gap,
)
from small_models import LAYERS, SMALL, SPECIAL, choose_small_values
from transformers import CONFIG_MAPPING

from align.models.architectures import TABLE, Route, find_refusal_reason, read_proven_types, select_deciding_settings
from align.models.fastpath import install_fast_path
from align.models.fastpath.decoder import NotPlainError
from align.models.fastpath.mixed import MixedDecoder
from align.models.load import load_base
from align.run import Base, model_digest

PUBLISHED = Path(__file__).resolve().parent / "published_configs.json"
CPU = torch.device("cpu")
HEAD_DIM = SMALL["head_dim"]
TEXT_TYPES = {
    "gemma4": "gemma4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "llama4": "llama4_text",
}
"""Type of a checkpoint with images → the type of its text model, which is what align trains."""
DERIVED = ("num_key_value_heads", "head_dim")
"""Sizes whose published relation to other sizes is kept."""


def build_full_config(published: Mapping[str, Any]) -> Any:
    """Return transformers' configuration of a published `config.json`: of its text part, if it has several."""
    values = dict(published)
    model_type = str(values.pop("model_type"))
    if isinstance(text := values.get("text_config"), dict):
        model_type = text.get("model_type") or TEXT_TYPES[model_type]
        values = {**text}
        values.pop("model_type", None)
    return CONFIG_MAPPING[model_type](**values)


def shrink_config(full: Any) -> Any:
    """Return a small configuration with everything that decides how the full one computes."""
    values = full.to_dict()
    small = {key: value for key, value in choose_small_values(values).items() if values.get(key) is not None}
    heads = values.get("num_attention_heads")
    groups = values.get("num_key_value_heads")
    if isinstance(groups, int) and "qk_rope_head_dim" not in values:
        small["num_key_value_heads"] = 4 if groups == heads else 1 if groups == 1 else 2
    small |= {key: value for key, value in SPECIAL.get(full.model_type, {}).items() if key in values}
    if isinstance(indices := values.get("attn_layer_indices"), list) and indices:
        small["attn_layer_indices"] = [1, 3]
    if isinstance(indices := values.get("full_attn_idxs"), list) and indices:
        small["full_attn_idxs"] = [1, 3]
    layers = values.get("num_hidden_layers")
    for key, value in values.items():
        if isinstance(value, list) and len(value) == layers and all(isinstance(v, int | float) for v in value):
            small[key] = value[:LAYERS]
    if isinstance(values.get("rope_parameters"), dict):
        small["rope_parameters"] = shrink_rope(values["rope_parameters"])
    return type(full)(**{**values, **small})


def shrink_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of rotary embeddings for heads of the small width and a context of 256."""
    if any(isinstance(value, Mapping) for value in rope.values()):  # one for each kind of layer
        return {kind: shrink_rope(value) if isinstance(value, Mapping) else value for kind, value in rope.items()}
    small = dict(rope)
    frequencies = int(HEAD_DIM * (rope.get("partial_rotary_factor") or 1.0)) // 2
    for key in ("short_factor", "long_factor"):
        if isinstance(rope.get(key), list):
            small[key] = rope[key][:frequencies]
    if rope.get("original_max_position_embeddings"):
        small["original_max_position_embeddings"] = 64
    if isinstance(rope.get("mrope_section"), list):
        small["mrope_section"] = [frequencies - 2 * (frequencies // 3), frequencies // 3, frequencies // 3]
    return small


def measure_checkpoint(published: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of one published configuration."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    try:
        full = build_full_config(published)
        settings = select_deciding_settings(full)
        small = shrink_config(full)
    except Exception as error:
        return {
            "type": published["model_type"],
            "path": "unbuilt",
            "cause": f"cannot be configured: {describe_error(error)}",
        }
    model_type = full.model_type
    if cause := find_refusal_reason(model_type):
        return {"type": model_type, "path": "refused", "cause": cause}
    with tempfile.TemporaryDirectory() as scratch:
        row = {
            "type": model_type,
            **measure_config(lambda: small, Path(scratch), with_training=model_type not in read_proven_types()),
        }
        if row["path"] not in ("fast", "plain"):
            return row
        small_settings = select_deciding_settings(load_oracle(Path(scratch) / "model").config)
        differences = sorted(
            key for key in settings.keys() | small_settings.keys() if settings.get(key) != small_settings.get(key)
        )
        if differences:
            cause = f"the small model differs in {', '.join(differences[:3])}"
            return {"type": model_type, "path": "unbuilt", "cause": cause}
        route = Route(row["path"] == "fast", row["padding"], row["packing"], row["cause"])
        sharded = "" if route.can_pad else "takes no padding, by which ranks would keep in step"
        uses = {
            "nf4": explain_nf4(Path(scratch) / "model", route),
            "sharded": sharded,
            "batched": explain_batching(Path(scratch) / "model", route),
        }
    return {**row, "settings": settings, **uses}


def explain_nf4(folder: Path, route: Route) -> str:
    """Return why `method=qlora` does not work, or what it leaves unquantised. Returns an empty text if it works."""
    from align.models import forward

    base = Base("small", str(folder), None, model_digest(folder))
    table_lookup = forward.find_route
    forward.find_route = lambda config: route  # the table of this run is not written yet
    try:
        model = load_base(base, "qlora", CPU, torch.float32)
        if (gap := measure_gap(model, collect_oracle_outputs(model))) > TOLERANCE:
            return f"logprobs under NF4 are {gap:.2g} off"
    except Exception as error:
        return describe_error(error)
    finally:
        forward.find_route = table_lookup
    quantised = 0
    unquantised = 0
    embeddings = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for module in model.modules():
        if id(module) in embeddings or any(True for _ in module.children()):
            continue
        for parameter in module.parameters(recurse=False):
            if isinstance(module, Linear4bit):
                quantised += 2 * parameter.numel() if parameter.dim() > 1 else 0
            elif parameter.dim() > 1:
                unquantised += parameter.numel()
    for module in model.modules():
        if any(True for _ in module.children()):
            unquantised += sum(
                parameter.numel() for parameter in module.parameters(recurse=False) if parameter.dim() > 1
            )
    full_share = unquantised / max(1, quantised + unquantised)
    return "" if full_share < 0.2 else f"{full_share:.0%} of the small model's matrices stay in full precision"


def explain_batching(folder: Path, route: Route) -> str:
    """Return why `stage=serve` answers one request at a time. Returns an empty text if it answers in batches."""
    model = load_oracle(folder).requires_grad_(False)
    model.align_route = route
    install_fast_path(model)
    try:
        MixedDecoder(model, 2, 64, 1, 8)
    except NotPlainError as error:
        return str(error) or "its layers are not Llama-like"
    return ""


def measure_all(published: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return id → row. Checkpoints with the same small configuration are measured once."""
    rows: dict[str, dict[str, Any]] = {}
    rows_by_config: dict[str, dict[str, Any]] = {}
    for name, entry in published.items():
        try:
            config_key = json.dumps(
                shrink_config(build_full_config(entry["config"])).to_dict(), sort_keys=True, default=str
            )
        except Exception:
            config_key = name
        if config_key not in rows_by_config:
            rows_by_config[config_key] = measure_in_fork(lambda entry=entry: measure_checkpoint(entry["config"]))
            columns = {k: v for k, v in rows_by_config[config_key].items() if k != "settings"}
            print(f"{name:44} {columns}", flush=True)
        rows[name] = {**rows_by_config[config_key], "source": entry["source"]}
    return rows


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    rows = measure_all({name: published[name] for name in names or published})
    if names:
        return
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    if table["transformers"] != transformers.__version__:
        sys.exit(f"The table is of transformers {table['transformers']}: run benchmarks/architectures.py first.")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    table["checkpoints"] = rows
    table["checkpoint_minutes"] = max(1, round((usage.ru_utime + usage.ru_stime) / 60))
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    DOC.write_text(format_page(table), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
