"""Exports: whole or not at all, readable by plain loaders, and the same model as the one that was trained."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from align.errors import CorruptFile, InputError, MissingArtifact, StorageError
from align.export import folder
from align.export.adapter import CONFIG, WEIGHTS, export_adapter, read_adapter
from align.export.card import loading_code, render_card
from align.export.merged import Divergence, export_merged, kl_between, merge

BASE = {"id": "org/tiny", "revision": "abc123", "digest": "sha256:00ff"}
TOKENS = torch.arange(3, 67).reshape(4, 16)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A random Llama whose linear layers are all multiples of 64 (NF4's block), with a tokenizer beside it."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,  # wide enough that quantisation and merging have something to get wrong
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 128)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


def load(path: Path, nf4: bool = True, dtype: torch.dtype = torch.float32):
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    kwargs = {"quantization_config": quantised, "device_map": {"": "cpu"}} if nf4 else {}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **kwargs)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def randomise(model: torch.nn.Module) -> None:
    """A fresh `lora_B` is zero, and an adapter that does nothing merges right by any method."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def make_adapter(base: Path, path: Path, **options) -> Path:
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(load(base), LoraConfig(**(defaults | options)))
    randomise(model)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "policy")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def trained(base: Path, adapter: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(load(base), adapter).eval())


def everywhere(a: torch.Tensor, b: torch.Tensor) -> Divergence:
    return kl_between(a, b, torch.ones(a.shape[:-1], dtype=torch.bool))


# --- The adapter ------------------------------------------------------------------------------------------------------


def test_exported_adapter_is_the_same_model_and_names_no_path(base: Path, adapter: Path, tmp_path: Path):
    target = export_adapter(adapter, tmp_path / "out", BASE, tokenizer=base, card="# Card\n")
    assert sorted(p.name for p in target.iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "base.json", "chat_template.jinja"),
        *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    ]
    assert (target / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    assert torch.equal(trained(base, adapter), trained(base, target))
    assert json.loads((target / "base.json").read_text()) == BASE

    config = json.loads((target / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    assert config["revision"] == "abc123"
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert config.keys().isdisjoint({"loftq_config", "peft_version", "megatron_core", "eva_config"})
    assert json.loads((adapter / CONFIG).read_text())["base_model_name_or_path"] == str(base)  # what was to be removed
    for path in target.iterdir():
        assert str(base.parent).encode() not in path.read_bytes(), path.name
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_exported_tokenizer_chats_alike_from_a_folder_or_an_object(base: Path, adapter: Path, tmp_path: Path):
    first = export_adapter(adapter, tmp_path / "a", BASE, tokenizer=base)
    generation = GenerationConfig(do_sample=True, temperature=0.7)
    tokenizer = AutoTokenizer.from_pretrained(base)
    second = export_adapter(adapter, tmp_path / "b", BASE, tokenizer=tokenizer, generation=generation)
    for target in (first, second):
        loaded = AutoTokenizer.from_pretrained(target)
        assert loaded.apply_chat_template([{"role": "user", "content": "w5 w7"}])["input_ids"] == [5, 7]
        assert "is_local" not in json.loads((target / "tokenizer_config.json").read_text())
    assert GenerationConfig.from_pretrained(second).temperature == 0.7
    with pytest.raises(MissingArtifact, match="tokenizer"):
        export_adapter(adapter, tmp_path / "c", BASE, tokenizer=adapter)
    assert not (tmp_path / "c").exists()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def header_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def header_lies(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def side_missing(path: Path) -> None:
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path)


def not_finite(path: Path) -> None:
    tensors = load_file(path)
    tensors[sorted(tensors)[0]][0, 0] = torch.nan
    save_file(tensors, path)


def other_rank(path: Path) -> None:
    save_file({k: v[:2] if "lora_A" in k else v[:, :2].contiguous() for k, v in load_file(path).items()}, path)


@pytest.mark.parametrize("damage", [truncated, header_cut, header_lies, side_missing, not_finite, other_rank])
def test_damaged_weights_are_refused_and_leave_nothing(base: Path, adapter: Path, tmp_path: Path, damage):
    source = tmp_path / "source"
    folder.shutil.copytree(adapter, source)
    damage(source / WEIGHTS)
    with pytest.raises(CorruptFile, match=r"adapter_model\.safetensors.*resume=never") as error:
        export_adapter(source, tmp_path / "out", BASE, tokenizer=base)
    assert error.value.exit_status == 2
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_missing_and_broken_config(adapter: Path, tmp_path: Path):
    with pytest.raises(MissingArtifact, match="adapter_config"):
        read_adapter(tmp_path)
    (tmp_path / CONFIG).write_text('{"r": 4')
    with pytest.raises(CorruptFile, match="is not JSON"):
        read_adapter(tmp_path)
    (tmp_path / CONFIG).write_text('{"peft_type": "IA3"}')
    with pytest.raises(InputError, match="only LoRA"):
        read_adapter(tmp_path)
    (tmp_path / CONFIG).write_text((adapter / CONFIG).read_text())
    with pytest.raises(MissingArtifact, match="adapter_model"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_what_engines_would_read_wrongly_is_refused_by_name(base: Path, tmp_path: Path, options, named):
    source = make_adapter(base, tmp_path / "source", **options)
    with pytest.raises(InputError, match=f"^{named}="):
        export_adapter(source, tmp_path / "out", BASE, tokenizer=base)
    assert not (tmp_path / "out").exists()


def test_rank_patterns_survive_and_pissa_does_not(base: Path, tmp_path: Path):
    pattern = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 32}, "use_rslora": True}
    source = make_adapter(base, tmp_path / "source", **pattern)
    target = export_adapter(source, tmp_path / "out", BASE, tokenizer=base)
    assert torch.equal(trained(base, source), trained(base, target))
    config = json.loads((source / CONFIG).read_text())
    (source / CONFIG).write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(InputError, match="init_lora_weights=pissa_niter_4"):
        export_adapter(source, tmp_path / "other", BASE, tokenizer=base)


@pytest.mark.parametrize("name", ["/home/me/model", "./model", "~/model", "", "C:\\model"])
def test_a_base_must_be_findable_elsewhere(base: Path, adapter: Path, tmp_path: Path, name: str):
    with pytest.raises(InputError, match=r"base\.id"):
        export_adapter(adapter, tmp_path / "out", BASE | {"id": name}, tokenizer=base)


# --- The folder -------------------------------------------------------------------------------------------------------


def test_publish_is_all_or_nothing(tmp_path: Path):
    target = tmp_path / "out"

    def half_written(replace: bool = False) -> None:
        with folder.publish(target, replace) as part:
            (part / "half").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        half_written()
    assert not list(tmp_path.iterdir())

    target.mkdir()  # a run's empty artifact folder
    with folder.publish(target) as part:
        (part / "a").write_text("1")
        assert not list(target.iterdir())
    assert (target / "a").read_text() == "1"

    with pytest.raises(InputError, match="already holds files"), folder.publish(target):
        pass
    with pytest.raises(KeyError):
        half_written(replace=True)
    assert [p.name for p in target.iterdir()] == ["a"]
    with folder.publish(target, replace=True) as part:
        (part / "b").write_text("2")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_publish_under_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written"), folder.publish(tmp_path / "file" / "out"):
        pass
    with pytest.raises(InputError, match="is a file"), folder.publish(tmp_path / "file"):
        pass


# --- The merge --------------------------------------------------------------------------------------------------------


def test_merge_into_nf4_is_the_trained_model_and_loads_plainly(base: Path, adapter: Path, tmp_path: Path):
    truth = trained(base, adapter)
    merged = merge(load(base), adapter)
    assert everywhere(truth, logits(merged)).kl < 1e-6
    target = export_merged(merged, tmp_path / "out", BASE, tokenizer=base, shard_size="100KB")
    config = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert len(list(target.glob("model-*.safetensors"))) > 1
    assert (target / "model.safetensors.index.json").is_file()
    for path in target.iterdir():
        assert str(base.parent).encode() not in path.read_bytes(), path.name

    plain = AutoModelForCausalLM.from_pretrained(target, dtype="auto").eval()
    found = everywhere(truth, logits(plain))
    assert found.kl < 1e-6
    assert found.top1 == 1
    assert found.max_logprob < 1e-3
    # What must not pass for it: the same adapter merged into the original weights, and the base alone.
    assert everywhere(truth, logits(merge(load(base, nf4=False), adapter))).kl > 1e-3
    assert everywhere(truth, logits(load(base))).kl > 1e-3


def test_merge_in_bf16_rounds_once(base: Path, adapter: Path, tmp_path: Path):
    truth = trained(base, adapter)
    merged = merge(load(base), adapter, torch.bfloat16)
    exact = merge(load(base), adapter, torch.float32)
    for (name, rounded), (_, full) in zip(merged.named_parameters(), exact.named_parameters(), strict=True):
        assert torch.equal(rounded, full.bfloat16()), name
    # Rotary frequencies are kept in fp32, as loading keeps them.
    assert torch.equal(merged.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)
    target = export_merged(merged, tmp_path / "out", BASE, tokenizer=base)
    plain = AutoModelForCausalLM.from_pretrained(target, dtype="auto").eval()
    assert plain.dtype == torch.bfloat16
    assert torch.equal(logits(plain), logits(merged))
    assert 0 < everywhere(truth, logits(plain)).kl < 0.05


def test_merge_leaves_no_trace_of_quantisation(base: Path, adapter: Path, tmp_path: Path):
    merged = merge(load(base), adapter)
    assert merged.is_loaded_in_4bit is False
    assert not hasattr(merged, "peft_config")
    # What a model read from GGUF carries although its weights are plain, and what a device map makes of saving.
    plain = load(base, nf4=False)
    plain.config.quantization_config = plain.hf_quantizer = BitsAndBytesConfig(load_in_4bit=True)
    plain.hf_device_map = {"": "cpu"}
    merged = merge(plain, adapter)
    assert not hasattr(merged, "hf_quantizer")
    assert not hasattr(merged, "hf_device_map")
    export_merged(merged, tmp_path / "out", BASE, tokenizer=base)


def test_merge_into_a_plain_base(base: Path, adapter: Path):
    truth = logits(PeftModel.from_pretrained(load(base, nf4=False), adapter).eval())
    assert everywhere(truth, logits(merge(load(base, nf4=False), adapter))).kl < 1e-6


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["norm"]}, {"use_rslora": True}])
def test_merge_handles_what_an_adapter_export_cannot(base: Path, tmp_path: Path, options):
    source = make_adapter(base, tmp_path / "source", **options)
    if "modules_to_save" in options:
        tensors = load_file(source / WEIGHTS)
        save_file({k: v * 3 if k.endswith("norm.weight") else v for k, v in tensors.items()}, source / WEIGHTS)
    truth = trained(base, source)
    assert everywhere(truth, logits(merge(load(base), source))).kl < 1e-6


def test_merge_refuses_what_does_not_fit(base: Path, adapter: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="fresh load"):
        merge(PeftModel.from_pretrained(load(base), adapter).base_model.model, adapter)
    # PEFT would drop a reward model's head without a word.
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    reward = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"))
    reward.save_pretrained(tmp_path / "reward")
    with pytest.raises(InputError, match="does not fit this base"):
        merge(load(base), tmp_path / "reward")
    # An adapter of a wider model.
    other = tmp_path / "other"
    folder.shutil.copytree(adapter, other)
    save_file(
        {k: torch.cat([v, v], -1) if "lora_A" in k else v for k, v in load_file(other / WEIGHTS).items()},
        other / WEIGHTS,
    )
    with pytest.raises(InputError, match="does not fit this base"):
        merge(load(base), other)
    # A head that is also the embedding.
    tied = make_adapter(base, tmp_path / "tied", target_modules=["lm_head"])
    with pytest.raises(InputError, match="target_modules=lm_head"):
        merge(load(base), tied)


def test_merge_refuses_repacked_weights(base: Path, adapter: Path):
    model = load(base)
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.up_proj was repacked"):
        merge(model, adapter)


def test_a_failed_merged_export_leaves_nothing(base: Path, adapter: Path, tmp_path: Path):
    merged = merge(load(base), adapter)
    merged.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(RuntimeError, match="quantisation"):
        export_merged(merged, tmp_path / "out", BASE, tokenizer=base)
    assert not list(tmp_path.iterdir())


# --- The card ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_code_on_the_card_runs(base: Path, adapter: Path, tmp_path: Path, monkeypatch, kind: str):
    facts = {"name": "support", "kind": kind, "base": {"id": "tiny"}, "method": "qlora"}
    support = tmp_path / "support"
    if kind == "adapter":
        export_adapter(adapter, support, facts["base"], tokenizer=base)
    else:
        export_merged(merge(load(base), adapter), support, facts["base"], tokenizer=base)
    monkeypatch.chdir(support)
    Path("tiny").symlink_to(base)
    code = loading_code(facts)
    assert code in render_card(facts)
    names: dict = {}
    exec(code, names)
    for module in names["model"].modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    assert everywhere(trained(base, adapter), logits(names["model"].eval())).kl < 0.05
    assert names["tokenizer"].eos_token == "</s>"
