"""Merged models equal the trained model, and plain transformers loads their files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from export_models import (
    compute_adapter_logits,
    compute_logits,
    export_merged,
    load_base_model,
    load_tokenizer_options,
    make_adapter,
    make_base,
    measure_divergence,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

from align.core.errors import InputError
from align.export.merged import find_tied_weights, merge_adapter, require_untied_base
from align.models.adapters import WEIGHTS_FILE, read_adapter
from align.run import Base


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "policy")


def test_merge_into_nf4_is_the_trained_model_and_loads_plainly(base: Path, adapter: Path, tmp_path: Path):
    truth = compute_adapter_logits(base, adapter)
    merged = merge_adapter(load_base_model(base), adapter)
    assert measure_divergence(truth, compute_logits(merged)).kl < 1e-6
    target = export_merged(merged, tmp_path / "out", **load_tokenizer_options(base), shard_size="100KB")
    config = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert len(list(target.glob("model-*.safetensors"))) > 1
    assert (target / "model.safetensors.index.json").is_file()
    for path in target.iterdir():
        assert str(base.parent).encode() not in path.read_bytes(), path.name

    plain = AutoModelForCausalLM.from_pretrained(target, dtype="auto").eval()
    difference = measure_divergence(truth, compute_logits(plain))
    assert difference.kl < 1e-6
    assert difference.top1 == 1
    assert difference.max_logprob < 1e-3
    # Neither the adapter merged into the original weights nor the base alone passes the comparison.
    assert measure_divergence(truth, compute_logits(merge_adapter(load_base_model(base, nf4=False), adapter))).kl > 1e-3
    assert measure_divergence(truth, compute_logits(load_base_model(base))).kl > 1e-3


def test_merge_in_bf16_rounds_once(base: Path, adapter: Path, tmp_path: Path):
    truth = compute_adapter_logits(base, adapter)
    merged = merge_adapter(load_base_model(base), adapter, torch.bfloat16)
    exact = merge_adapter(load_base_model(base), adapter, torch.float32)
    for (name, rounded), (_, full) in zip(merged.named_parameters(), exact.named_parameters(), strict=True):
        assert torch.equal(rounded, full.bfloat16()), name
    # Rotary frequencies are kept in fp32, as loading keeps them.
    assert torch.equal(merged.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)
    target = export_merged(merged, tmp_path / "out", **load_tokenizer_options(base))
    plain = AutoModelForCausalLM.from_pretrained(target, dtype="auto").eval()
    assert plain.dtype == torch.bfloat16
    assert torch.equal(compute_logits(plain), compute_logits(merged))
    assert 0 < measure_divergence(truth, compute_logits(plain)).kl < 0.05


def test_merge_leaves_no_trace_of_quantisation(base: Path, adapter: Path, tmp_path: Path):
    merged = merge_adapter(load_base_model(base), adapter)
    assert merged.is_loaded_in_4bit is False
    assert not hasattr(merged, "peft_config")
    # A model read from GGUF has a quantisation config though its weights are plain, and a device map changes saving.
    plain = load_base_model(base, nf4=False)
    plain.config.quantization_config = plain.hf_quantizer = BitsAndBytesConfig(load_in_4bit=True)
    plain.hf_device_map = {"": "cpu"}
    merged = merge_adapter(plain, adapter)
    assert not hasattr(merged, "hf_quantizer")
    assert not hasattr(merged, "hf_device_map")
    export_merged(merged, tmp_path / "out", **load_tokenizer_options(base))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["norm"]}, {"use_rslora": True}])
def test_merge_handles_what_an_adapter_export_cannot(base: Path, tmp_path: Path, options):
    source = make_adapter(base, tmp_path / "source", **options)
    if "modules_to_save" in options:
        tensors = load_file(source / WEIGHTS_FILE)
        save_file({k: v * 3 if k.endswith("norm.weight") else v for k, v in tensors.items()}, source / WEIGHTS_FILE)
    truth = compute_adapter_logits(base, source)
    assert measure_divergence(truth, compute_logits(merge_adapter(load_base_model(base), source))).kl < 1e-6


def test_merge_refuses_what_does_not_fit(base: Path, adapter: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="fresh load"):
        merge_adapter(PeftModel.from_pretrained(load_base_model(base), adapter).base_model.model, adapter)
    # PEFT would drop a reward model's head without an error.
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    reward = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"))
    reward.save_pretrained(tmp_path / "reward")
    with pytest.raises(InputError, match="does not fit this base"):
        merge_adapter(load_base_model(base), tmp_path / "reward")
    # An adapter of a wider model.
    wide_adapter = tmp_path / "other"
    shutil.copytree(adapter, wide_adapter)
    save_file(
        {k: torch.cat([v, v], -1) if "lora_A" in k else v for k, v in load_file(wide_adapter / WEIGHTS_FILE).items()},
        wide_adapter / WEIGHTS_FILE,
    )
    with pytest.raises(InputError, match="does not fit this base"):
        merge_adapter(load_base_model(base), wide_adapter)
    # A head that is also the embedding.
    tied = make_adapter(base, tmp_path / "tied", target_modules=["lm_head"])
    with pytest.raises(InputError, match="target_modules=lm_head"):
        merge_adapter(load_base_model(base), tied)


def test_a_tied_base_is_known_by_its_configuration(base: Path, adapter: Path, tmp_path: Path):
    head = read_adapter(make_adapter(base, tmp_path / "head", target_modules=["lm_head"]))
    require_untied_base(Base("tiny", str(base), None, "00"), read_adapter(adapter))
    with pytest.raises(InputError, match=r"target_modules=lm_head.*export=adapter"):
        require_untied_base(Base("tiny", str(base), None, "00"), head)
    untied_base = Path(shutil.copytree(base, tmp_path / "other"))
    tensors = load_file(base / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding + 1}, untied_base / "model.safetensors", {"format": "pt"})
    require_untied_base(Base("both", str(untied_base), None, "00"), head)
    assert find_tied_weights(load_base_model(untied_base)) == set()  # only the weights show it
    assert find_tied_weights(load_base_model(base)) == {"model.embed_tokens", "lm_head"}
    config = json.loads((base / "config.json").read_text())
    (untied_base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    require_untied_base(Base("untied", str(untied_base), None, "00"), head)


def test_merge_refuses_repacked_weights(base: Path, adapter: Path):
    model = load_base_model(base)
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.up_proj was repacked"):
        merge_adapter(model, adapter)


def test_a_failed_merged_export_leaves_nothing(base: Path, adapter: Path, tmp_path: Path):
    merged = merge_adapter(load_base_model(base), adapter)
    merged.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(RuntimeError, match="quantisation"):
        export_merged(merged, tmp_path / "out", **load_tokenizer_options(base))
    assert not list(tmp_path.iterdir())
