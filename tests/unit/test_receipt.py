"""A receipt states how far an export is from the trained model, fails beyond a bound, and covers its files alone."""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path

import pytest
import torch
from export_models import BASE, export_adapter, export_merged, load_base_model, make_adapter, make_base, randomise
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from align.core.errors import CorruptFile, InputError, MissingArtifact
from align.data.chat.fixed_prompts import encode_fixed_prompts
from align.export.checks import compare_adapter, compare_merged
from align.export.engines import compute_logits
from align.export.merged import merge_adapter
from align.export.receipt_rows import (
    ReceiptCheck,
    format_checks,
    mark_accepted,
    require_engines,
    require_passed,
    require_same_measurements,
)
from align.export.trained_model import TrainedModel, load_trained_model
from align.models.adapters import WEIGHTS_FILE
from align.models.dequantised import DEQUANTISED, dequantise_in_place, get_or_write_dequantised_base
from align.models.load import cast_to_fp32, load_base, refuse_added_tokens
from align.ops.divergence import Divergence, compute_divergence
from align.run import Base, model_digest
from align.run.receipt import RECEIPT, read_verified_receipt, write_receipt

CPU = torch.device("cpu")
NOBODY = {"llama.cpp": "none", "vLLM": "none"}
NEAR = Divergence(1e-9, 1.0, 1e-6, 10)
FAR = Divergence(0.3, 0.7, 4.2, 10)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    folder = make_base(tmp_path_factory.mktemp("models") / "tiny")
    return Base("tiny", str(folder), None, model_digest(folder))


@pytest.fixture(scope="module")
def adapter(base: Base, tmp_path_factory) -> Path:
    return make_adapter(Path(base.path), tmp_path_factory.mktemp("adapters") / "policy")


@pytest.fixture(scope="module")
def trained(base: Base, adapter: Path) -> TrainedModel:
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    return load_trained_model(base, adapter, "qlora", CPU, torch.float32, tokenizer)


def collect_verdicts(rows: list[ReceiptCheck]) -> dict[str, str]:
    return {row.name: row.verdict for row in rows}


# --- Verdicts of rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (ReceiptCheck("a", found=NEAR, bound=("kl", 1e-5)), "pass"),
        (ReceiptCheck("a", found=FAR, bound=("kl", 1e-5)), "fail"),
        (ReceiptCheck("a", found=FAR, bound=("max_logprob", 4.2)), "pass"),
        (ReceiptCheck("a", found=FAR, bound=("kl", 1e-5), accepted=True), "accepted"),
        (ReceiptCheck("a", found=Divergence(float("nan"), 1.0, 0.0, 1), bound=("kl", 1e-5)), "fail"),
        (ReceiptCheck("a", found=Divergence(float("nan"), 1.0, 0.0, 1), bound=("max_logprob", 1e-4)), "fail"),
        (ReceiptCheck("a", found=FAR), "reported"),
        (ReceiptCheck("a", bound=("kl", 1e-5)), "not checked"),
        (ReceiptCheck("a", bound=("kl", 1e-5), accepted=True), "not checked"),
    ],
)
def test_a_verdict_is_a_bound_kept_and_nothing_else(row: ReceiptCheck, verdict: str):
    assert row.verdict == verdict
    assert verdict in format_checks([row])


def test_a_missed_bound_and_an_engine_that_was_not_asked_are_errors():
    passing = ReceiptCheck("t", "adapter", "nf4", found=NEAR, bound=("kl", 1))
    missed = ReceiptCheck("t", found=FAR, bound=("kl", 0.01))
    unasked = ReceiptCheck("llama.cpp", note="it is not there")
    require_passed([passing, unasked])
    require_engines([passing, unasked], [], ["t"])
    with pytest.raises(
        InputError,
        match=r"1 of the receipt.s bounds missed: t: kl is 0\.3, and at most 0\.01 is allowed.*export\.accept=\[t\]",
    ):
        require_passed([passing, missed])
    require_passed(mark_accepted([passing, missed], ["t"]))
    with pytest.raises(InputError, match=r"export\.require=llama\.cpp: it was not checked: it is not there"):
        require_engines([passing, unasked], [], ["llama.cpp"])
    for name in ("nobody", "llama.cpp"):  # only rows with a bound can be accepted
        with pytest.raises(InputError, match=rf"export\.accept={name}.*t/adapter/nf4"):
            require_engines([passing, missed, unasked], [name], [])
    with pytest.raises(InputError, match=r"export\.require=t"):  # the base alone is not an export
        require_engines([ReceiptCheck("t", "base alone", found=NEAR)], [], ["t"])


def test_the_prompts_are_the_same_whatever_the_data(base: Base):
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    rows = encode_fixed_prompts(tokenizer)
    assert len(rows) == 13
    assert len(set(rows[-1])) == 64
    assert not set(rows[-1]) & set(tokenizer.all_special_ids)
    assert rows == encode_fixed_prompts(tokenizer)


def test_every_position_of_every_prompt_counts():
    a = [torch.zeros(3, 5), torch.zeros(4, 5)]
    b = [torch.zeros(3, 5), torch.zeros(4, 5)]
    b[1][3, 2] = 1.0  # log(5) - log(4 + e) off for the others, 1 more for that one
    divergence = compute_divergence(a, b)
    assert divergence.tokens == 7
    assert divergence.max_logprob == pytest.approx(
        1 - (torch.tensor(4 + torch.e).log() - torch.tensor(5.0).log()).item()
    )


def test_what_is_no_number_is_near_to_nothing():
    a = torch.zeros(3, 5)
    nan = torch.full((3, 5), torch.nan)
    for pair in (([a, a], [a, nan]), ([a, nan], [a, a]), ([a, a], [nan, a])):
        divergence = compute_divergence(*pair)
        assert ReceiptCheck("t", found=divergence, bound=("max_logprob", 1e9)).verdict == "fail"
        assert isnan(divergence.max_logprob)


def test_a_template_that_refuses_words_leaves_the_tokens(base: Base):
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    rows = encode_fixed_prompts(tokenizer)
    assert [len(row) for row in rows] == [64]


# --- Loaded back ------------------------------------------------------------------------------------------------------


def test_an_adapter_is_what_was_trained_on_nf4_and_not_on_the_original(
    trained: TrainedModel, base: Base, tmp_path: Path
):
    target = export_adapter(trained.adapter, tmp_path / "out", tokenizer=trained.tokenizer)
    dequantised_base = get_or_write_dequantised_base(
        tmp_path, base, BASE, torch.float32, torch.float32, CPU, trained.tokenizer
    )
    rows = compare_adapter(trained, target, dequantised_base, "float32", NOBODY)
    assert collect_verdicts(rows) == {
        "transformers/adapter/nf4/float32": "pass",
        "transformers/adapter/nf4-dequantised/float32": "pass",
        "transformers/adapter/original/float32": "reported",
        "transformers/base alone/nf4/float32": "reported",
        "llama.cpp": "not checked",
        "vLLM": "not checked",
    }
    assert rows[1].found is not None
    assert rows[1].bound == ("max_logprob", 1e-4)
    assert rows[2].found is not None
    assert rows[2].found.kl > 1e-3  # the original base gives another model
    assert trained.base_divergence.kl > 1e-3  # the adapter changes the answers to the prompts
    require_passed(rows)
    require_engines(rows, [], ["transformers"])


def test_without_a_base_beside_it_the_dequantised_one_was_not_checked(trained: TrainedModel, tmp_path: Path):
    target = export_adapter(trained.adapter, tmp_path / "out", tokenizer=trained.tokenizer)
    assert (
        collect_verdicts(compare_adapter(trained, target, None, "bfloat16", NOBODY))[
            "transformers/adapter/nf4-dequantised/bfloat16"
        ]
        == "not checked"
    )


@pytest.mark.parametrize("factor", [1.5, 0.99])
def test_a_scale_that_is_off_by_little_fails(trained: TrainedModel, tmp_path: Path, factor: float):
    target = export_adapter(trained.adapter, tmp_path / "out", tokenizer=trained.tokenizer)
    tensors = load_file(target / WEIGHTS_FILE)
    save_file(
        {k: v * factor if "lora_B" in k else v for k, v in tensors.items()}, target / WEIGHTS_FILE, {"format": "pt"}
    )
    rows = compare_adapter(trained, target, None, "float32", NOBODY)
    assert rows[0].verdict == "fail"
    with pytest.raises(InputError, match="It differs from the trained model"):
        require_passed(rows)


@pytest.mark.parametrize(
    ("into", "kept"), [(DEQUANTISED, "bfloat16"), (DEQUANTISED, "float32"), ("original", "bfloat16")]
)
def test_a_merge_is_compared_before_and_after_it_is_saved(trained: TrainedModel, tmp_path: Path, into: str, kept: str):
    nf4 = into == DEQUANTISED
    model = merge_adapter(cast_to_fp32(load_base_model(Path(trained.base.path), nf4)), trained.adapter, torch.float32)
    with torch.no_grad():
        merged_logits = [model(input_ids=torch.tensor([row])).logits[0] for row in trained.rows]
    target = export_merged(model.to(getattr(torch, kept)), tmp_path / "out", tokenizer=trained.tokenizer)
    rows = compare_merged(trained, target, into, kept, merged_logits, NOBODY)
    assert [row.verdict for row in rows[:3]] == ["pass", "pass", "reported"]  # each on its own base
    assert rows[0].found is not None
    assert rows[0].found.kl < 1e-8
    assert rows[1].name == f"transformers/merged/{into}/{kept}"
    if not nf4:
        assert rows[2].name == "transformers/gap/original/bfloat16"
        assert rows[2].found is not None
        assert rows[2].found.kl > 1e-3
    tensors = load_file(target / "model.safetensors")
    save_file({k: v * 1.5 for k, v in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    assert compare_merged(trained, target, into, kept, None, NOBODY)[0].verdict == "fail"


def test_a_merge_keeps_all_bits_of_a_base_that_was_saved_in_few(base: Base, tmp_path: Path):
    """`dequantize` returns the dtype of the checkpoint by default, and bfloat16 would lose half of the bits."""
    folder = tmp_path / "model"
    load_base_model(Path(base.path), nf4=False, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    tokenizer.save_pretrained(folder)
    source = make_adapter(folder, tmp_path / "source")
    bf16_base = Base("few", str(folder), None, model_digest(folder))
    trained_model = load_trained_model(bf16_base, source, "qlora", CPU, torch.bfloat16, tokenizer)
    model = merge_adapter(cast_to_fp32(load_base(bf16_base, "qlora", CPU, torch.bfloat16)), source, torch.float32)
    divergence = compute_divergence(trained_model.logits, compute_logits(model, trained_model.rows))
    assert divergence.max_logprob < 1e-4


def test_an_adapter_of_a_plain_base_is_held_to_that(base: Base, tmp_path: Path):
    source = make_adapter(Path(base.path), tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    plain = load_trained_model(base, source, "lora", CPU, torch.bfloat16, tokenizer)
    rows = compare_adapter(
        plain, export_adapter(source, tmp_path / "out", tokenizer=tokenizer), None, "bfloat16", NOBODY
    )
    assert collect_verdicts(rows) == {
        "transformers/adapter/original/bfloat16": "pass",
        "transformers/base alone/original/bfloat16": "reported",
        "llama.cpp": "not checked",
        "vLLM": "not checked",
    }


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Gemma2", "Phi3"])
def test_other_architectures_leave_as_they_were_trained(base: Base, tmp_path: Path, architecture: str):
    """Random weights with every linear layer adapted, rsLoRA and two ranks, exported as an adapter and merged."""
    import transformers

    tokenizer = AutoTokenizer.from_pretrained(base.path)
    torch.manual_seed(0)
    shape = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "head_dim": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    config = getattr(transformers, f"{architecture}Config")(**shape)
    folder = tmp_path / "model"
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lora_options = {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"o_proj": 6}}
    source = make_adapter(folder, tmp_path / "source", **lora_options)
    model = Base(architecture, str(folder), None, model_digest(folder))
    trained_model = load_trained_model(model, source, "qlora", CPU, torch.float32, tokenizer)
    target = export_adapter(source, tmp_path / "out", tokenizer=tokenizer)
    dequantised_base = get_or_write_dequantised_base(
        tmp_path, model, BASE, torch.float32, torch.float32, CPU, tokenizer
    )
    rows = compare_adapter(trained_model, target, dequantised_base, "float32", NOBODY)
    assert [row.verdict for row in rows[:2]] == ["pass", "pass"]
    merged_folder = export_merged(
        merge_adapter(cast_to_fp32(load_base_model(folder)), source, torch.float32),
        tmp_path / "merged",
        tokenizer=tokenizer,
    )
    assert compare_merged(trained_model, merged_folder, DEQUANTISED, "float32", None, NOBODY)[0].verdict == "pass"
    assert trained_model.base_divergence.max_logprob > 0.1


def test_a_model_of_few_positions_and_transposed_weights(base: Base, tmp_path: Path):
    """GPT-2 has Conv1D layers with transposed weights, and here 48 positions, fewer than most prompts have."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(base.path)
    torch.manual_seed(0)
    shape = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 48, "initializer_range": 0.2}
    folder = tmp_path / "model"
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = get_peft_model(
        load_base_model(folder, nf4=False),
        LoraConfig(r=4, lora_alpha=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
    )
    randomise(model)
    model.save_pretrained(tmp_path / "source")
    gpt2 = Base("gpt2", str(folder), None, model_digest(folder))
    trained_model = load_trained_model(gpt2, tmp_path / "source", "lora", CPU, torch.float32, tokenizer)
    assert max(map(len, trained_model.rows)) <= 48
    rows = compare_adapter(
        trained_model,
        export_adapter(tmp_path / "source", tmp_path / "out", tokenizer=tokenizer),
        None,
        "float32",
        NOBODY,
    )
    assert rows[0].verdict == "pass"
    assert trained_model.base_divergence.max_logprob > 0.1
    merged_model = merge_adapter(load_base_model(folder, nf4=False), tmp_path / "source", torch.float32)
    merged_folder = export_merged(merged_model, tmp_path / "merged", tokenizer=tokenizer)
    assert compare_merged(trained_model, merged_folder, "original", "float32", None, NOBODY)[0].verdict == "pass"


# --- The base beside it -----------------------------------------------------------------------------------------------


def test_a_dequantised_base_is_written_once_and_trusted_by_its_digest(
    trained: TrainedModel, base: Base, tmp_path: Path
):
    def prepare_base() -> Path:
        return get_or_write_dequantised_base(
            tmp_path, base, BASE, torch.float32, torch.bfloat16, CPU, trained.tokenizer
        )

    folder = prepare_base()
    weights = folder / "model.safetensors"
    first_mtime = weights.stat().st_mtime_ns
    assert prepare_base() == folder
    assert weights.stat().st_mtime_ns == first_mtime
    assert json.loads((folder / "base.json").read_text())["kind"] == "nf4-dequantised"
    assert weights.stat().st_mode & 0o777 == 0o644
    saved_weights = load_file(weights)
    expected_weights = dict(dequantise_in_place(load_base_model(Path(base.path)), torch.bfloat16).named_parameters())
    assert all(torch.equal(saved_weights[name], expected_weights[name]) for name in saved_weights)
    save_file({n: t + 1 for n, t in saved_weights.items()}, weights, {"format": "pt"})
    with pytest.raises(CorruptFile, match="not those that were written"):
        prepare_base()


def test_tokens_that_the_base_does_not_have_are_refused(base: Base):
    tokenizer, base_tokenizer = (AutoTokenizer.from_pretrained(base.path) for _ in range(2))
    refuse_added_tokens(tokenizer, base_tokenizer)
    tokenizer.add_tokens(["<tool>"])
    with pytest.raises(InputError, match=r"tokenizer=<tool>: 1 tokens were added"):
        refuse_added_tokens(tokenizer, base_tokenizer)


def test_ids_without_an_embedding_are_refused_whatever_is_exported(trained: TrainedModel):
    tokenizer = AutoTokenizer.from_pretrained(trained.base.path)
    tokenizer.add_tokens([f"<tool {n}>" for n in range(9)])
    with pytest.raises(InputError, match="beyond the 128 rows"):
        load_trained_model(trained.base, trained.adapter, "qlora", CPU, torch.float32, tokenizer)


# --- On disk ----------------------------------------------------------------------------------------------------------


def test_a_receipt_speaks_of_its_files_and_no_others(trained: TrainedModel, tmp_path: Path):
    target = export_adapter(trained.adapter, tmp_path / "out", tokenizer=trained.tokenizer)
    rows = [ReceiptCheck("t", found=NEAR, bound=("kl", 1.0)), ReceiptCheck("vLLM", note="why")]
    write_receipt(target, [row.as_dict() for row in rows], trained.rows, {"base": BASE})
    receipt = read_verified_receipt(target)
    assert [(row["name"], row["verdict"]) for row in receipt["rows"]] == [("t", "pass"), ("vLLM", "not checked")]
    assert set(receipt["files"]) == {path.name for path in target.iterdir()} - {RECEIPT}
    assert receipt["prompts"]["number"] == len(trained.rows)
    require_same_measurements(receipt, rows)
    for forged in (
        {"rows": [{**receipt["rows"][0], "found": {"kl": 0.5, "top1": 1.0, "max_logprob": 1e-6}}]},
        {"rows": [{"name": "vLLM", "verdict": "pass", "found": {"kl": 0.0, "top1": 1.0, "max_logprob": 0.0}}]},
        {"rows": [{"name": "vLLM", "verdict": "pass", "found": None}]},
        {"rows": [{}]},
    ):
        with pytest.raises(CorruptFile, match="the receipt"):
            require_same_measurements(forged, rows)
    (target / "more").write_text("x")
    with pytest.raises(CorruptFile, match="more: is not of this export"):
        read_verified_receipt(target)
    (target / "more").unlink()
    tensors = load_file(target / WEIGHTS_FILE)
    save_file({k: v * 1.5 if "lora_B" in k else v for k, v in tensors.items()}, target / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(CorruptFile, match=f"file={WEIGHTS_FILE}.*sha256 differs"):
        read_verified_receipt(target)
    (target / WEIGHTS_FILE).unlink()
    with pytest.raises(CorruptFile, match=f"{WEIGHTS_FILE}: is missing"):
        read_verified_receipt(target)
    (target / RECEIPT).write_text("{}")
    with pytest.raises(InputError, match="schema_version None, and this version of align reads 1"):
        read_verified_receipt(target)
    (target / RECEIPT).unlink()
    with pytest.raises(MissingArtifact, match=r"receipt\.json"):
        read_verified_receipt(target)
