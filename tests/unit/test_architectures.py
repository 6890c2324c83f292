"""The table of architectures matches measurements, and a type outside it is never treated as proven."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close

from align.core.errors import InputError
from align.core.types import Rollout
from align.models import architectures, forward
from align.models.actors import ModelActor
from align.models.architectures import FAST, Route, find_route, read_proven_types, select_deciding_settings
from align.models.base import read_base
from align.models.forward import (
    compute_hidden_states,
    compute_picked_logprobs,
    compute_response_logprobs,
    rollout_from_answers,
)
from align.models.load import load_base
from align.rollout.hf import HfEngine
from align.run import Base, model_digest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from architectures import DOC, format_page, measure_type_in_fork  # noqa: E402
from measure_architecture import (  # noqa: E402
    collect_oracle_outputs,
    compute_oracle_logprobs,
    is_greedy,
    load_oracle,
    measure_gap,
    sample_greedily,
)
from small_models import TYPES, build_small_config, save_small_model  # noqa: E402

CPU = torch.device("cpu")
FP32 = torch.float32
ALONE = Route(False, False, False)
PADDED = Route(False, True, False)
SOME = ("gemma2", "falcon_h1", "hyperclovax", "qwen3_5_text", "bert")
"""A cap after the head; a multiplier after it and a state; a scale that multiplies; a hybrid; an encoder."""
MORE = (
    "llama",
    "gpt2",
    "mixtral",
    "granite",
    "recurrent_gemma",
    "xlstm",
    "inkling_text",
    "mamba",
    "jamba",
    "minimax",
    "deepseek_v3",
    "deepseek_v32",
    "bamba",
    "nemotron_h",
    "opt",
    "bloom",
    "gpt_oss",
    "roberta",
)


def load_table() -> dict[str, Any]:
    return json.loads(architectures.TABLE.read_text(encoding="utf-8"))


def save_base(folder: Path, model_type: str, **changes: Any) -> Base:
    save_small_model(build_small_config(model_type, **changes), folder)
    return Base("small", str(folder), None, model_digest(folder))


def build_rollout(rows: list[list[int]], prompts: list[list[int]]) -> Rollout:
    return rollout_from_answers(prompts, [r[len(p) :] for r, p in zip(rows, prompts, strict=True)], 0, CPU)


def test_the_document_is_the_table():
    assert DOC.read_text(encoding="utf-8") == format_page(load_table())


def test_every_causal_type_has_a_row():
    if load_table()["transformers"] != transformers.__version__:
        pytest.skip("the table was made with another version of transformers")
    assert read_proven_types().keys() == set(TYPES)
    assert all(row["cause"] for row in read_proven_types().values() if row["path"] != "fast")


@pytest.mark.parametrize("model_type", sorted(t for t, row in read_proven_types().items() if row["path"] == "refused"))
def test_what_cannot_be_right_is_refused_by_name_before_weights_are_looked_for(model_type: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))  # and no weights at all
    with pytest.raises(InputError, match=rf"model\.path=mine: its type {model_type} cannot be trained here"):
        read_base(tmp_path, "mine")


@pytest.mark.parametrize("model_type", SOME)
def test_a_row_is_what_a_measurement_gives(model_type: str):
    row = measure_type_in_fork(model_type)
    assert row | {"off": None} == read_proven_types()[model_type] | {"off": None}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MORE)
def test_further_rows_are_what_a_measurement_gives(model_type: str):
    test_a_row_is_what_a_measurement_gives(model_type)


def test_the_plain_path_is_the_fast_one_on_a_model_that_both_fit(tmp_path: Path):
    """Logprobs, entropies, states and gradients are equal, with rows alone and with padding."""
    save_base(tmp_path, "llama")
    rollout = build_rollout(
        [list(range(5, 26)), list(range(9, 18)), list(range(30, 44))], [[5, 6, 7, 8, 9], [9], [30, 31, 32]]
    )
    outputs: list[tuple[Tensor, ...]] = []
    for route in (FAST, PADDED, ALONE):
        model = load_oracle(tmp_path)
        model.align_route = route
        logprobs, entropies = compute_response_logprobs(model, rollout, 0.7)
        states = compute_hidden_states(model, rollout.tokens_BS, rollout.mask_BS) * rollout.mask_BS[..., None]
        (logprobs.sum() + states.square().mean()).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        outputs.append((logprobs.detach(), entropies, states.detach(), gradient))
    for route_outputs in outputs[1:]:
        for actual, expected in zip(route_outputs, outputs[0], strict=True):
            assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "dtype"), [("xlstm", FP32), ("bamba", torch.bfloat16), ("jamba", torch.bfloat16)]
)
def test_models_with_states_sample(model_type: str, dtype: torch.dtype, tmp_path: Path):
    model = load_base(save_base(tmp_path, model_type), "lora", CPU, dtype)
    engine = HfEngine(stop_ids=(), pad_id=0, max_new_tokens=4)
    rollout = engine.generate([[5, 6, 7, 8, 9, 10, 11, 12, 13], [9], [30, 31]], ModelActor(model, None), range(3))
    assert rollout.lengths_B.tolist() == [4, 4, 4]
    assert rollout.logprobs_BT is not None
    assert rollout.logprobs_BT.isfinite().all()


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_type_that_fails_in_half_precision_is_refused_before_weights_are_read(method: str, tmp_path: Path):
    base = save_base(tmp_path, "xlstm")
    (tmp_path / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(InputError, match=r"its type xlstm computes in float32 alone.*Add dtype=float32"):
        load_base(base, method, CPU, torch.bfloat16)


UNPROVEN = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    "hidden_act": "gelu",
}


@pytest.mark.parametrize("key", UNPROVEN)
def test_a_configuration_that_nobody_measured_takes_the_plain_path_and_is_probed(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    base = save_base(tmp_path, "llama", **{key: UNPROVEN[key]})
    model = load_base(base, "lora", CPU, FP32)
    assert not forward.get_route(model).has_fast_path
    assert "the plain path" in capsys.readouterr().out
    oracle_outputs = collect_oracle_outputs(load_oracle(tmp_path))
    assert measure_gap(model, oracle_outputs) < 1e-3
    assert is_greedy(load_oracle(tmp_path), sample_greedily(model, oracle_outputs), oracle_outputs)


@pytest.mark.parametrize("model_type", ["llama", "mamba2", "bart", "xlstm"])
def test_a_type_that_nobody_measured_is_right(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Types that ignore positions and types with states that padding would change are among them."""
    monkeypatch.setattr(architectures, "read_proven_types", dict)
    base = save_base(tmp_path, model_type)
    model = load_base(base, "lora", CPU, FP32)
    assert forward.get_route(model)[:3] == (False, False, False)
    oracle_outputs = collect_oracle_outputs(load_oracle(tmp_path))
    assert measure_gap(model, oracle_outputs) < 1e-3
    assert is_greedy(load_oracle(tmp_path), sample_greedily(model, oracle_outputs), oracle_outputs)


def test_a_type_that_nobody_measured_and_that_reads_ahead_is_refused_by_its_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(architectures, "read_proven_types", dict)
    with pytest.raises(InputError, match=r"its type bert cannot be used here: it reads ahead"):
        load_base(save_base(tmp_path, "bert"), "lora", CPU, FP32)


def test_a_probe_sees_a_path_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A type is put on the fast path by mistake: its head does more than one matrix product."""
    base = save_base(tmp_path, "falcon_h1")
    wrong = FAST._replace(is_measured=False)
    monkeypatch.setattr(forward, "find_route", lambda config: wrong)
    with pytest.raises(InputError, match="rows in a batch give other logits than each row"):
        load_base(base, "lora", CPU, FP32)


def test_what_is_proven_is_probed_too_for_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The table does not compare numbers: a scale that the fast path reads wrongly is detected when the model loads."""
    base = save_base(tmp_path, "granite", logits_scaling=3.0)
    assert forward.get_route(load_base(base, "lora", CPU, FP32)) == FAST
    get_original_head = forward.get_lm_head
    monkeypatch.setattr(forward, "get_lm_head", lambda model: lambda hidden: 0.5 * get_original_head(model)(hidden))
    with pytest.raises(InputError, match="rows in a batch give other logits than each row"):
        load_base(base, "lora", CPU, FP32)


def test_sizes_decide_nothing_and_flags_do():
    first = build_small_config("llama")
    larger = build_small_config(
        "llama",
        hidden_size=128,
        head_dim=32,
        num_hidden_layers=2,
        vocab_size=640,
        rms_norm_eps=1e-5,
        pad_token_id=7,
        initializer_range=0.1,
        attention_dropout=0.1,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    assert select_deciding_settings(first) == select_deciding_settings(larger)
    assert find_route(larger) == FAST
    for change in (UNPROVEN, {"hidden_act": "relu"}, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}):
        assert select_deciding_settings(build_small_config("llama", **change)) != select_deciding_settings(first)


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi3"]
)
def test_what_people_train_takes_the_fast_path(model_type: str):
    for tied in (True, False):
        config = build_small_config(model_type, tie_word_embeddings=tied)
        assert find_route(config)[:2] == (True, True)


def test_of_layers_of_each_kind_the_number_does_not_matter():
    assert select_deciding_settings(build_small_config("gemma3_text")) == select_deciding_settings(
        build_small_config(
            "gemma3_text", num_hidden_layers=6, layer_types=["sliding_attention"] * 5 + ["full_attention"]
        )
    )


def test_picked_tokens_keep_their_places_where_rows_go_alone(tmp_path: Path):
    """Rows are computed group by group, and each logprob is returned at the place of its own token."""
    save_base(tmp_path, "llama")
    model = load_oracle(tmp_path)
    model.align_route = ALONE
    rows = [list(range(5, 17)), [40, 41, 42, 43], list(range(60, 68)), [80, 81, 82, 83]]
    rollout = build_rollout(rows, [r[:2] for r in rows])
    picked_BS = rollout.mask_BS & (rollout.mask_BS.cumsum(1) > 1)
    logprobs, _, _ = compute_picked_logprobs(model, rollout.tokens_BS, rollout.mask_BS, picked_BS)
    expected = [compute_oracle_logprobs(model, r)[:-1].gather(1, torch.tensor(r)[1:, None])[:, 0] for r in rows]
    assert_close(logprobs, torch.cat(expected), rtol=0, atol=1e-4)
