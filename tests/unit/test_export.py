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


# --- The divergence ---------------------------------------------------------------------------------------------------


def test_kl_by_hand():
    # Token 0: p = (½, ½), q = (¼, ¾): KL = ½ ln 2 + ½ ln ⅔ = ½ ln 4/3. Token 1: equal. Token 2 is masked.
    a = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]]]).log()
    b = torch.tensor([[[0.25, 0.75], [0.9, 0.1], [0.001, 0.999]]]).log()
    found = kl_between(a, b + 5, torch.tensor([[True, True, False]]))  # logits are free up to a constant
    assert found.kl == pytest.approx(0.5 * torch.log(torch.tensor(4 / 3)).item() / 2, abs=1e-7)
    assert found.max_logprob == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    assert found.top1 == 0.5
    assert found.tokens == 2


def test_kl_with_tokens_ruled_out():
    inf = float("inf")
    a = torch.tensor([[[0.0, -inf, 0.0]]])
    assert kl_between(a, a, torch.ones(1, 1)).kl == 0
    # (½, 0, ½) against (⅔, 0, ⅓): ln ½ − ln ⅓ = ln 3/2 at most; the token that both rule out takes no part.
    tilted = torch.tensor([[[2.0, 0.0, 1.0]]]).log()
    assert kl_between(a, tilted, torch.ones(1, 1)).max_logprob == pytest.approx(0.405465, abs=1e-6)
    both = kl_between(a, torch.zeros(1, 1, 3), torch.ones(1, 1))
    assert both.kl == pytest.approx(torch.log(torch.tensor(1.5)).item(), abs=1e-7)
    assert kl_between(torch.zeros(1, 1, 3), a, torch.ones(1, 1)).kl == inf


def test_kl_does_not_depend_on_chunks_or_on_masked_rows(monkeypatch):
    torch.manual_seed(0)
    a, b, mask = torch.randn(3, 7, 11), torch.randn(3, 7, 11), torch.rand(3, 7) > 0.4
    whole = kl_between(a, b, mask)
    monkeypatch.setattr("align.export.merged.DIVERGENCE_ELEMENTS", 22)
    a[~mask] = torch.nan
    chunked = kl_between(a, b, mask)
    assert chunked.kl == pytest.approx(whole.kl, rel=1e-12)
    assert (chunked.top1, chunked.max_logprob, chunked.tokens) == (whole.top1, whole.max_logprob, int(mask.sum()))
    with pytest.raises(ValueError, match="no token"):
        kl_between(a, b, torch.zeros(3, 7))
    with pytest.raises(ValueError, match="belong together"):
        kl_between(a, b, torch.zeros(3, 6))


# --- The card ---------------------------------------------------------------------------------------------------------

FACTS = {
    "name": "support",
    "kind": "adapter",
    "base": BASE,
    "method": "qlora",
    "parents": [{"stage": "sft", "name": "a", "digest": "11aa"}, {"stage": "ppo", "name": "b"}],
    "seed": 17,
    "data": ["chitchat"],
    "judge": "vader",
    "metrics": {
        "win_rate": {"value": 0.8125, "low": 0.75, "high": 0.875, "n": 256},
        "gold": {"ref": 0.25, "policy": 0.78, "difference": {"value": 0.53, "low": 0.5, "high": 0.56, "n": 256}},
        "kl": 6.7,
        "kl_interval": {"value": 6.7, "low": 6.1, "high": 7.3, "n": 256},
        "length": {"ref": 14.0, "policy": 20.0},
        "distinct1": {"ref": 0.5, "policy": 0.4},
        "distinct2": {"ref": 0.88, "policy": 0.77},
        "eos_rate": {"ref": 0.9, "policy": 0.95},
    },
}


def front_matter(card: str) -> dict:
    yaml = pytest.importorskip("yaml")
    _, matter, _ = card.split("---\n", 2)
    return yaml.safe_load(matter)


def test_card_says_what_it_is_where_from_and_how_good():
    card = render_card(FACTS)
    assert front_matter(card) == {
        "base_model": "org/tiny",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["align", "lora", "sft", "ppo"],
    }
    for text in (
        "# support\n",
        "| base revision | abc123 |",
        "| base digest | sha256:00ff |",
        "| seed | 17 |",
        "1. Supervised fine-tuning: `sft/a`, sha256 `11aa`\n2. PPO against the reward model: `ppo/b`\n",
        "Data: chitchat.",
        "quantised to NF4",
        "on 256 held-out prompts",
        "| win rate | 0.8125 [0.75, 0.875] |",
        "| gold score by vader | 0.78 | 0.25 |",
        "6.7 [6.1, 7.3]",
        "| distinct-2 | 0.77 | 0.88 |",
    ):
        assert text in card, text
    assert "Fidelity" not in card


def test_merged_card_states_its_distance_from_what_was_trained():
    facts = {k: v for k, v in FACTS.items() if k != "metrics"} | {"kind": "merged", "dtype": "bfloat16"}
    card = render_card(facts | {"divergence": Divergence(9.1e-5, 0.995, 0.0625, 4096).as_dict()})
    assert front_matter(card)["library_name"] == "transformers"
    assert "KL 9.1e-05 nats a token, the same top token on 99.5% of 4,096" in card
    assert "Merged into that base dequantised" in card
    assert "| weights | bfloat16 |" in card
    assert "BitsAndBytesConfig" not in card
    assert "Evaluation" not in card


def test_card_of_an_adapter_on_a_plain_base_does_not_quantise():
    card = render_card({"name": "x", "kind": "adapter", "base": BASE, "method": "lora", "precision": "bfloat16"})
    assert "NF4" not in card
    assert "BitsAndBytesConfig" not in card
    assert "in bfloat16, not quantised" in card


@pytest.mark.parametrize(
    "change",
    [
        {"parents": [{"stage": "sft", "name": "/home/me/runs/sft/a"}]},
        {"data": ["read from ~/data/x.jsonl"]},
        {"notes": "see file:///srv/x"},
        {"judge": "C:\\judge"},
    ],
)
def test_card_refuses_paths_of_this_machine(change):
    with pytest.raises(InputError, match="path of this machine"):
        render_card(FACTS | change)


def test_card_takes_urls_and_refuses_unknown_facts():
    assert "https://example.org/a/b" in render_card(FACTS | {"notes": "See https://example.org/a/b and [/INST]."})
    with pytest.raises(ValueError, match="'stages'"):
        render_card(FACTS | {"stages": []})
    with pytest.raises(ValueError, match="neither"):
        render_card(FACTS | {"kind": "gguf"})
    with pytest.raises(ValueError, match="needs 'base'"):
        render_card({"name": "x", "kind": "adapter"})


def test_card_cannot_be_broken_out_of():
    name = 'x"\n---\n| `a` <b>'
    card = render_card(FACTS | {"name": name, "license": 'mit"\nevil: true'})
    assert front_matter(card)["license"] == 'mit"\nevil: true'
    assert "# x\" --- \\| 'a' &lt;b>\n" in card


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_code_on_the_card_runs(base: Path, adapter: Path, tmp_path: Path, monkeypatch, kind: str):
    facts = FACTS | {"kind": kind, "base": {"id": "tiny"}}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(base)
    if kind == "adapter":
        export_adapter(adapter, Path("support"), facts["base"], tokenizer=base)
    else:
        export_merged(merge(load(base), adapter), Path("support"), facts["base"], tokenizer=base)
    code = loading_code(facts)
    assert code in render_card(facts)
    names: dict = {}
    exec(code, names)
    for module in names["model"].modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    assert everywhere(trained(base, adapter), logits(names["model"].eval())).kl < 0.05
    assert names["tokenizer"].eos_token == "</s>"
