"""Adapters converted to plain LoRA compute the same function, in a form that all engines read alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from export_models import (
    compute_adapter_logits,
    compute_logits,
    export_adapter,
    load_base_model,
    load_tokenizer_options,
    make_base,
    randomise,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from align.core.errors import InputError
from align.export.merged import merge_adapter
from align.models.adapters import CONFIG_FILE, WEIGHTS_FILE, Adapter, read_adapter
from align.models.plain_lora import compute_initial_factors, convert_to_plain_lora

PLAIN = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.0, "init_lora_weights": True}
KINDS = [
    {},
    {"r": 8, "lora_alpha": 3},  # a scale that no float holds exactly
    {"use_rslora": True},
    {"use_rslora": True, "rank_pattern": {"q_proj": 8, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    {"rank_pattern": {r"model\.layers\.0\..*": 16}, "alpha_pattern": {r"layers\.\d\.self_attn\.q_proj": 32}},
    {"rank_pattern": {"q_proj": 1}, "lora_dropout": 0.1, "init_lora_weights": "gaussian"},
    {"target_modules": r".*layers\.[01]\.mlp\.(up|down)_proj", "rank_pattern": {"up_proj": 6}},
    {"layers_to_transform": [1], "lora_alpha": 7.5},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "tiny")


def make_random_adapter(base: Path, path: Path, nf4: bool = True, **options) -> Path:
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(load_base_model(base, nf4), LoraConfig(**(defaults | options)))
    if options.get("init_lora_weights") in ("pissa", "olora"):  # trained a little, from its initial values
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02
    else:
        randomise(model)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("nf4", [True, False])
def test_the_same_function_as_plain_lora(base: Path, tmp_path: Path, options: dict, nf4: bool):
    source = make_random_adapter(base, tmp_path / "source", nf4, **options)
    target = export_adapter(source, tmp_path / "out", **load_tokenizer_options(base))
    before, after = (
        compute_logits(PeftModel.from_pretrained(load_base_model(base, nf4), p).eval()) for p in (source, target)
    )
    assert (before.log_softmax(-1) - after.log_softmax(-1)).abs().max() < 1e-5
    assert (
        before - compute_logits(load_base_model(base, nf4))
    ).abs().max() > 0.1  # the adapter does change the base's logits

    config = json.loads((target / CONFIG_FILE).read_text())
    tensors = load_file(target / WEIGHTS_FILE)
    assert {key: config[key] for key in PLAIN} == PLAIN
    assert config["lora_alpha"] == config["r"] == max(read_adapter(source).ranks.values())
    assert isinstance(config["lora_alpha"], int)
    assert {t.shape[0] if "lora_A" in key else t.shape[1] for key, t in tensors.items()} == {config["r"]}
    assert isinstance(config["target_modules"], list)


def test_an_engine_that_reads_two_matrices_and_nothing_else_is_right(base: Path, tmp_path: Path):
    """The engine's sum W + B·A is computed by hand, without the config."""
    source = make_random_adapter(base, tmp_path / "source", **KINDS[3])
    target = export_adapter(source, tmp_path / "out", **load_tokenizer_options(base))
    model = load_base_model(base).dequantize()
    tensors = load_file(target / WEIGHTS_FILE)
    for key in [key for key in tensors if "lora_A" in key]:
        module = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        module.weight.data += tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
    assert (
        compute_adapter_logits(base, source).log_softmax(-1) - compute_logits(model).log_softmax(-1)
    ).abs().max() < 1e-4


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 8}}])
def test_what_the_initialisation_took_out_of_the_base_is_put_back(base: Path, tmp_path: Path, init: str, options: dict):
    source = make_random_adapter(base, tmp_path / "source", nf4=False, init_lora_weights=init, **options)
    before = compute_logits(PeftModel.from_pretrained(load_base_model(base, nf4=False), source).eval())
    initial = compute_initial_factors(load_base_model(base, nf4=False), read_adapter(source).config)
    target = export_adapter(source, tmp_path / "out", **load_tokenizer_options(base), initial_factors=initial)
    after = compute_logits(PeftModel.from_pretrained(load_base_model(base, nf4=False), target).eval())
    # A weight is added to its own parts, which rounds.
    assert (before.log_softmax(-1) - after.log_softmax(-1)).abs().max() < 1e-4
    assert json.loads((target / CONFIG_FILE).read_text())["r"] == 2 * max(read_adapter(source).ranks.values())
    merged = compute_logits(merge_adapter(load_base_model(base, nf4=False), source))
    assert (before.log_softmax(-1) - merged.log_softmax(-1)).abs().max() < 1e-4
    forgotten = export_adapter(source, tmp_path / "wrong", **load_tokenizer_options(base))
    wrong = compute_logits(PeftModel.from_pretrained(load_base_model(base, nf4=False), forgotten).eval())
    assert (before - wrong).abs().max() > 0.1


def test_what_was_taken_out_of_a_quantised_base_is_refused(base: Path, tmp_path: Path):
    source = make_random_adapter(base, tmp_path / "source", nf4=False, init_lora_weights="olora")
    for call in (
        lambda: compute_initial_factors(load_base_model(base), read_adapter(source).config),
        lambda: merge_adapter(load_base_model(base), source),
    ):
        with pytest.raises(InputError, match=r"init_lora_weights=olora.*quantised anew"):
            call()


def test_a_scale_that_is_too_large_is_refused(base: Path, tmp_path: Path):
    source = make_random_adapter(base, tmp_path / "source")
    config = json.loads((source / CONFIG_FILE).read_text())
    (source / CONFIG_FILE).write_text(json.dumps(config | {"lora_alpha": 10**42}))
    with pytest.raises(InputError, match="nan or infinity"):
        export_adapter(source, tmp_path / "out", **load_tokenizer_options(base))


def test_factors_stay_in_fp32_whatever_they_came_in(base: Path, tmp_path: Path):
    """Factors of bf16 are scaled in fp32: a scale of 3/8 would round every weight in bf16."""
    adapter = read_adapter(make_random_adapter(base, tmp_path / "source"))
    tensors = {key: tensor.bfloat16() for key, tensor in adapter.tensors.items()}
    adapter = Adapter({**adapter.config, "lora_alpha": 3, "r": 8}, tensors)
    factors = adapter.factors
    for module, (a, b) in convert_to_plain_lora(adapter).factors.items():
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(b, factors[module][1].float() * (3 / 4))  # the rank is the matrices', not the config's
