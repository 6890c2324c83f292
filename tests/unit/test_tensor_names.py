"""A base must have exactly the tensors of its configuration: model families and exceptions in published models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import INDEX, SINGLE, copy_model
from safetensors.torch import load_file, save_file

from align.core.errors import CorruptFile
from align.models.base import find_base
from align.models.load import load_base, load_classifier

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from small_models import build_small_config, save_small_model

CPU = torch.device("cpu")
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "olmo2",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "glm4_moe",
)
WITHOUT_CLASSIFIER = ("glm4_moe",)
"""Families that have no classifier in transformers."""
LAYERS = {"gpt2": "n_layer"}
LOADS = [load_base, load_classifier]


def save_family(folder: Path, model_type: str) -> Path:
    save_small_model(build_small_config(model_type), folder)
    return folder


def load_from_folder(folder: Path, method: str = "lora", how: Any = load_base) -> Any:
    return how(find_base(str(folder)), method, CPU, torch.float32)


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(folder: Path, add: dict[str, torch.Tensor] | None = None, drop: str = "\0") -> None:
    tensors = {name: value for name, value in load_file(folder / SINGLE).items() if drop not in name}
    save_file({**tensors, **(add or {})}, folder / SINGLE, {"format": "pt"})


def split_into_shards(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, inside in halves.items():
        save_file({name: tensors[name] for name in inside}, folder / shard, {"format": "pt"})
    where = {name: shard for shard, inside in halves.items() for name in inside}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / SINGLE).unlink()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_loads_whole_and_not_with_fewer_layers(family: str, tmp_path: Path) -> None:
    folder = save_family(tmp_path / "model", family)
    hows = [load_base] if family in WITHOUT_CLASSIFIER else LOADS
    for how in hows:
        load_from_folder(folder, how=how)
    key = LAYERS.get(family, "num_hidden_layers")
    config = json.loads((folder / "config.json").read_text())
    fewer = {"layer_types": config["layer_types"][:1]} if config.get("layer_types") else {}
    edit_config(folder, **{key: 1}, **fewer)
    for how in hows:
        with pytest.raises(CorruptFile, match=r"config\.json does not ask for \(\S+[.]1[.]\S+, .* and \d+ more\)"):
            load_from_folder(folder, how=how)


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_half_of_a_model_is_not_trained(method: str, sharded: bool, how: Any, tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_model(tiny_model, tmp_path)
    if sharded:
        split_into_shards(folder)
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(CorruptFile, match=r"does not ask for \(model\.layers\.1\.input_layernorm\.weight, "):
        load_from_folder(folder, method, how)
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(CorruptFile, match=r"are incomplete \(model\.layers\.2\.input_layernorm\.weight is missing\)"):
        load_from_folder(folder, method, how)


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_tensor_that_is_missing_or_a_strangers(method: str, how: Any, tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_model(tiny_model, tmp_path)
    edit_tensors(folder, add={"model.layers.0.self_attn.q_norm.weight": torch.ones(32)})
    with pytest.raises(CorruptFile, match=r"does not ask for \(model\.layers\.0\.self_attn\.q_norm\.weight\)"):
        load_from_folder(folder, method, how)
    edit_tensors(folder, drop="q_norm")
    edit_tensors(folder, drop="layers.1.mlp.up_proj.weight")
    with pytest.raises(CorruptFile, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        load_from_folder(folder, method, how)


def test_constants_that_older_versions_saved(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_model(tiny_model, tmp_path)
    constants = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
        "model.layers.1.self_attn.rotary_emb.cos_cached": torch.ones(4, 32),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e4),
        "model.position_ids": torch.arange(4.0),
    }
    edit_tensors(folder, add=constants)
    load_from_folder(folder)
    load_from_folder(folder, how=load_classifier)


def test_a_tied_head_may_be_in_the_file(tmp_path: Path) -> None:
    """Tools may save the head as well as the embedding that it is tied to."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    assert "lm_head.weight" not in tensors
    load_from_folder(tmp_path)
    edit_tensors(tmp_path, add={"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    load_from_folder(tmp_path)
    load_from_folder(tmp_path, how=load_classifier)


def test_a_classifier_is_no_language_model(tiny_model: Path, tmp_path: Path) -> None:
    """A model saved with a score head loads as a classifier only."""
    folder = copy_model(tiny_model, tmp_path)
    edit_tensors(folder, add={"score.weight": torch.ones(1, 64)})
    with pytest.raises(CorruptFile, match=r"does not ask for \(score\.weight\)"):
        load_from_folder(folder)
    load_from_folder(folder, how=load_classifier)


@pytest.mark.parametrize(
    ("family", "name", "taken"),
    [
        ("deepseek_v3", "model.layers.61.eh_proj.weight", True),
        ("deepseek_v3", "model.layers.2.eh_proj.weight", False),
        ("glm4_moe", "model.layers.92.eh_proj.weight", True),
        ("glm4_moe", "model.layers.9.eh_proj.weight", False),
        ("gpt2", "transformer.h.0.attn.bias", True),
        ("gpt2", "transformer.h.0.attn.wrong", False),
    ],
)
def test_what_a_class_ignores_by_name(family: str, name: str, taken: bool, tmp_path: Path) -> None:
    """Extra tensors are the multi-token prediction layers of DeepSeek-V3 and GLM-4.5, and the masks of GPT-2."""
    folder = save_family(tmp_path / "model", family)
    edit_tensors(folder, add={name: torch.ones(8, 8)})
    if taken:
        load_from_folder(folder)
        return
    with pytest.raises(CorruptFile, match="does not ask for"):
        load_from_folder(folder)


def test_a_published_model_loads_as_it_is() -> None:
    load_base(find_base("pocket"), "lora", CPU, torch.bfloat16)
