"""llama.cpp computes the same with the exported GGUF base and adapter as training did, and tokenizes text the same."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_models import load_base_model, make_adapter, make_base
from gguf_tools import BASE, build_gguf_source, export_gguf, make_model
from transformers import AutoTokenizer

from align.core.errors import CorruptFile, InputError
from align.data.chat.fixed_prompts import render_fixed_prompts
from align.data.chat.template import CHATML
from align.export import checks as receipt_checks
from align.export.adapter import write_adapter
from align.export.checks import F32Measurement, compare_gguf_export, run_llama_cpp
from align.export.converters import convert_adapter, convert_model, find_converters, find_mismatched_tensor
from align.export.gguf import (
    ADAPTER,
    LARGEST,
    link_or_copy_file,
    list_special_tokens,
    list_special_tokens_and_prompts,
    require_f16_model,
    require_same_token_ids,
    write_missing_bases,
)
from align.export.receipt_rows import ReceiptCheck, format_checks
from align.export.trained_model import TrainedModel, load_trained_model
from align.models.dequantised import DEQUANTISED
from align.rollout.engine_process import LLAMA_CPP, EngineResponse, find_interpreter, run_engine_script
from align.run import model_digest

pytestmark = [pytest.mark.llama_cpp, pytest.mark.slow]
CPU = torch.device("cpu")
ASKED, NOBODY = ({LLAMA_CPP: where, "vLLM": "none"} for where in ("auto", "none"))
F16_ROW = f"llama.cpp/adapter/{DEQUANTISED}/f16"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> TrainedModel:
    folder = tmp_path_factory.mktemp("gguf")
    model = make_model(folder / "model")
    adapter = make_adapter(Path(model.path), folder / "adapter", target_modules="all-linear", use_rslora=True)
    return load_trained_model(model, adapter, "qlora", CPU, torch.float32, AutoTokenizer.from_pretrained(model.path))


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """The folder of bases that several exports share, as the exports below one `run.root` do."""
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="module")
def exported(trained: TrainedModel, bases: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("export")
    return export_gguf(trained, root, quantised=("q8_0",), python=sys.executable, bases=bases)


@pytest.fixture(scope="module")
def answered(trained: TrainedModel, exported: Path) -> EngineResponse:
    """The response of llama.cpp for `exported`."""
    return ask_llama_cpp(trained, exported)


def ask_llama_cpp(trained: TrainedModel, folder: Path) -> EngineResponse:
    answer = run_llama_cpp(trained, folder / "base-f16.gguf", folder / ADAPTER, ASKED)
    assert answer is not None
    return answer


def measure_export(
    trained: TrainedModel,
    folder: Path,
    answer: EngineResponse,
    into: str = DEQUANTISED,
    in_f32: Callable[[], F32Measurement | None] = lambda: None,
) -> dict[str, ReceiptCheck]:
    return {row.name: row for row in compare_gguf_export(trained, folder, into, ASKED, answer, in_f32)}


def test_llama_cpp_runs_what_was_trained(trained: TrainedModel, exported: Path, answered: EngineResponse):
    assert {path.name for path in exported.glob("*.gguf")} == {"base-f16.gguf", "base-q8_0.gguf", ADAPTER}
    rows = measure_export(trained, exported, answered)
    assert {name: row.verdict for name, row in rows.items()} == {
        F16_ROW: "pass",
        f"llama.cpp/adapter/{DEQUANTISED}/q8_0": "reported",
        "transformers/adapter/original/float32": "reported",
        "transformers/base alone/nf4/float32": "reported",
        "Ollama": "not checked",
        "vLLM": "not checked",
    }
    assert rows[F16_ROW].bound == ("max_logprob", 0.02)
    assert trained.base_divergence.max_logprob > 1  # without the adapter the outputs differ
    assert (exported / "tokenizer.json").is_file()
    assert not (exported / "adapter_config.json").exists()


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Mistral", "Gemma"])
def test_other_architectures_run_there_as_they_were_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
):
    # Qwen's converter requires Qwen's own tokenizer, so only the weights are compared.
    if architecture.startswith("Qwen"):
        monkeypatch.setattr(receipt_checks, "require_same_token_ids", lambda *given: None)
    model = make_model(tmp_path / "model", architecture)
    adapter = make_adapter(Path(model.path), tmp_path / "adapter", target_modules="all-linear")
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    trained = load_trained_model(model, adapter, "qlora", CPU, torch.float32, tokenizer)
    folder = export_gguf(trained, tmp_path / "export")
    assert measure_export(trained, folder, ask_llama_cpp(trained, folder))[F16_ROW].verdict == "pass"


def test_an_adapter_that_was_scaled_is_found_out(trained: TrainedModel, bases: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    weights = trained.adapter / "adapter_model.safetensors"
    scaled = Path(tmp_path / "scaled")
    scaled.mkdir()
    (scaled / "adapter_config.json").write_bytes((trained.adapter / "adapter_config.json").read_bytes())
    tensors = {k: v * 1.5 if "lora_B" in k else v for k, v in load_file(weights).items()}
    save_file(tensors, scaled / weights.name, {"format": "pt"})
    folder = export_gguf(replace(trained, adapter=scaled), tmp_path / "export", bases=bases)
    assert measure_export(trained, folder, ask_llama_cpp(trained, folder))[F16_ROW].verdict == "fail"


def test_the_base_is_the_one_that_was_trained_on(trained: TrainedModel, exported: Path, tmp_path: Path):
    """An export on the original weights is compared with the adapter on these weights, and the gap is reported."""
    [base] = write_missing_bases(tmp_path / "bases", build_gguf_source(trained, "original"), (), None)
    link_or_copy_file(exported / ADAPTER, base.parent / ADAPTER)  # it is the same beside either base
    folder = base.parent
    answer = ask_llama_cpp(trained, folder)
    rows = measure_export(trained, folder, answer, into="original")
    assert rows["llama.cpp/adapter/original/f16"].verdict == "pass"
    gap = rows["llama.cpp/gap/original/f16"]
    assert gap.verdict == "reported"
    assert gap.found is not None
    assert gap.found.kl > 1e-4
    assert (
        measure_export(trained, folder, answer)[F16_ROW].verdict == "fail"
    )  # it does not pass as the dequantised base


def measure_in_f32(trained: TrainedModel, exported: Path, work: Path) -> F32Measurement:
    """Convert and run everything in f32, as the stage does."""
    base = work / "base.gguf"
    adapter = work / "adapter.gguf"
    source = build_gguf_source(trained)
    plain = work / "plain"
    source.convert(base, "f32")
    plain.mkdir()
    write_adapter(plain, trained.adapter, BASE, tokenizer=trained.tokenizer)
    convert_adapter(source.converters, plain, source.folder, adapter, "f32")
    answer = run_llama_cpp(trained, base, adapter, ASKED, use_f32_cache=True)
    assert answer is not None
    pairs = ((base, exported / "base-f16.gguf"), (adapter, exported / ADAPTER))
    return F32Measurement(answer, "".join(find_mismatched_tensor(source.converters, *pair) for pair in pairs))


def test_where_f16_rounds_too_much_the_numbers_are_compared_in_f32(
    trained: TrainedModel, exported: Path, answered: EngineResponse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(receipt_checks, "GGUF", ("max_logprob", 1e-9))
    measurement = measure_in_f32(trained, exported, tmp_path)
    rows = measure_export(trained, exported, answered, in_f32=lambda: measurement)
    exact = rows[f"llama.cpp/adapter/{DEQUANTISED}/f32"]
    rounded = rows[F16_ROW]
    assert (exact.verdict, rounded.verdict) == ("pass", "pass")
    assert exact.found is not None
    assert rounded.found is not None
    assert exact.found.max_logprob < rounded.found.max_logprob / 100
    assert (exact.bound, rounded.bound) == (("max_logprob", 1e-3), ("kl", 1e-3))
    assert "max_logprob misses 1e-09 by llama.cpp's rounding" in format_checks(rows.values())
    # An f16 file of other numbers does not pass with them.
    wrong = Path(shutil.copytree(exported, tmp_path / "wrong"))
    (wrong / "base-f16.gguf").chmod(0o644)
    shutil.copy(exported / "base-q8_0.gguf", wrong / "base-f16.gguf")
    mismatched = replace(
        measurement,
        mismatch=find_mismatched_tensor(
            build_gguf_source(trained).converters, tmp_path / "base.gguf", wrong / "base-f16.gguf"
        ),
    )
    rows = measure_export(trained, wrong, ask_llama_cpp(trained, wrong), in_f32=lambda: mismatched)
    assert f"llama.cpp/adapter/{DEQUANTISED}/f32" not in rows
    assert rows[F16_ROW].verdict == "fail"
    assert "differs from the converted model" in rows[F16_ROW].note
    inexact = replace(measurement, response=answered)
    rows = measure_export(trained, exported, answered, in_f32=lambda: inexact)
    assert rows[f"llama.cpp/adapter/{DEQUANTISED}/f32"].verdict == "fail"


def test_without_llama_cpp_nothing_is_a_pass(trained: TrainedModel, exported: Path):
    assert find_interpreter(LLAMA_CPP, "none", "export.llama_cpp") is None
    assert run_llama_cpp(trained, exported / "base-f16.gguf", exported / ADAPTER, NOBODY) is None
    rows = compare_gguf_export(trained, exported, DEQUANTISED, NOBODY, None, lambda: None)
    assert "pass" not in {row.verdict for row in rows}
    assert {row.name: row.note for row in rows}[LLAMA_CPP] == "switched off by its setting"


def test_a_base_is_written_once_and_known_by_its_files(trained: TrainedModel, tmp_path: Path):
    source = build_gguf_source(trained)
    [first] = write_missing_bases(tmp_path, source, ("q8_0",), None)
    modified_ns = first.stat().st_mtime_ns
    assert write_missing_bases(tmp_path, source, (), None) == [first]
    both = write_missing_bases(tmp_path, source, ("q8_0",), sys.executable)
    assert [path.name for path in both] == ["base-f16.gguf", "base-q8_0.gguf"]
    assert both[0] == first
    assert first.stat().st_mtime_ns == modified_ns
    assert len(list(tmp_path.glob("*/base-f16.gguf"))) == 1
    converters = Path(shutil.copytree(source.converters, tmp_path / "converters"))
    with (converters / "conversion" / "base.py").open("a") as file:
        file.write("# another version")
    tokenizer = AutoTokenizer.from_pretrained(trained.base.path, eos_token="</s>")
    for change in ({"public_base": BASE | {"digest": "another"}}, {"converters": converters}, {"tokenizer": tokenizer}):
        assert replace(source, **change).compute_cache_key() != source.compute_cache_key()
    link_or_copy_file(first, tmp_path / "link.gguf")
    assert first.samefile(tmp_path / "link.gguf")
    with pytest.raises(FileNotFoundError):
        link_or_copy_file(tmp_path / "nowhere", tmp_path / "copy.gguf")
    first.chmod(0o644)
    with first.open("ab") as file:
        file.write(b"x")
    with pytest.raises(CorruptFile, match="is not the file that was written"):
        write_missing_bases(tmp_path, source, (), None)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_what_llama_cpp_does_not_load_is_an_error_with_its_words(trained: TrainedModel, exported: Path, tmp_path: Path):
    broken = tmp_path / "base-f16.gguf"
    broken.write_bytes((exported / "base-f16.gguf").read_bytes()[:5000])
    with pytest.raises(
        InputError, match=r"export\.llama_cpp=.*: llama\.cpp fails on the request.*export\.llama_cpp=none"
    ):
        run_llama_cpp(trained, broken, exported / ADAPTER, ASKED)
    with pytest.raises(InputError, match="cannot make q8_0"):
        run_engine_script(
            LLAMA_CPP, sys.executable, "export.llama_cpp", quantise=[str(broken), str(tmp_path / "to.gguf"), "q8_0"]
        )


def test_a_tokenizer_of_ones_own_is_refused_with_a_reason(tmp_path: Path, tiny_tokenizer):
    """The tokenizer is a byte-level BPE with a pre-tokenizer that llama.cpp's converter does not know."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from align.run import Base

    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny_tokenizer), **shape)).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    adapter = make_adapter(tmp_path / "model", tmp_path / "adapter")
    model = Base("own", str(tmp_path / "model"), None, model_digest(tmp_path / "model"))
    trained = load_trained_model(model, adapter, "qlora", CPU, torch.float32, tiny_tokenizer)
    with pytest.raises(InputError, match=r"tokenizer=.*does not know its pre-tokenizer.*export=merged"):
        write_missing_bases(tmp_path / "bases", build_gguf_source(trained), (), None)
    assert not list((tmp_path / "bases").iterdir())


def test_an_architecture_that_the_converter_does_not_know(tmp_path: Path):
    base = make_base(tmp_path / "model")
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace("LlamaForCausalLM", "NobodysForCausalLM"))
    with pytest.raises(InputError, match=r"model=.*does not know this architecture.*export=merged"):
        convert_model(find_converters(None), base, tmp_path / "x.gguf", "x", "f16")


def test_a_weight_that_f16_cannot_hold_is_refused(tmp_path: Path):
    model = load_base_model(make_base(tmp_path / "model"), nf4=False)
    require_f16_model(model)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 2 * LARGEST
    with pytest.raises(InputError, match=r"up_proj.*has a weight beyond the range of f16"):
        require_f16_model(model)


def test_text_that_is_read_otherwise_is_refused(trained: TrainedModel, answered: EngineResponse):
    tokenizer = trained.tokenizer
    prompts = render_fixed_prompts(tokenizer)
    assert len(answered.output["tokens"]) == len(list_special_tokens_and_prompts(tokenizer, prompts))
    require_same_token_ids(tokenizer, prompts, answered)
    end = dict(list_special_tokens(tokenizer))["<|end|>"]
    count = len(list_special_tokens(tokenizer))

    def with_output(**output) -> EngineResponse:
        return replace(answered, output={**answered.output, **output})

    split = [[id, id] if [id] == [end] else [id] for _, id in list_special_tokens(tokenizer)]
    with pytest.raises(InputError, match=r"tokenizer=<\|end\|>: is token"):
        require_same_token_ids(tokenizer, prompts, with_output(tokens=split + answered.output["tokens"][count:]))
    wrong = [list(row) for row in answered.output["tokens"]]
    wrong[count][4] += 1
    with pytest.raises(InputError, match="cuts it into other tokens, from the 5th on"):
        require_same_token_ids(tokenizer, prompts, with_output(tokens=wrong))
    with pytest.raises(InputError, match="chat_template=x: is another"):
        require_same_token_ids(tokenizer, prompts, with_output(template="x"))
    with pytest.raises(InputError, match=r"eos_token=<\|end\|>: is token \d+, and 2 in llama\.cpp"):
        require_same_token_ids(tokenizer, prompts, with_output(eos=2))


def test_a_prompt_begins_as_it_did_in_training(trained: TrainedModel, exported: Path, tmp_path: Path):
    """The exported prompt has no BOS if the template writes none, although llama.cpp would add one by default."""
    tokenizer = AutoTokenizer.from_pretrained(trained.base.path, chat_template=CHATML)
    trained_model = load_trained_model(trained.base, trained.adapter, "qlora", CPU, torch.float32, tokenizer)
    [base] = write_missing_bases(tmp_path, build_gguf_source(trained_model), (), None)
    answer = run_llama_cpp(trained_model, base, exported / ADAPTER, ASKED)
    assert answer is not None
    assert not answer.output["begins_with_bos"]
    forced = replace(answer, output=answer.output | {"begins_with_bos": True})
    with pytest.raises(InputError, match=r"bos_token=<s>: llama\.cpp puts it in front of every prompt"):
        require_same_token_ids(tokenizer, render_fixed_prompts(tokenizer), forced)
