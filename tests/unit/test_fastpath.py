"""The fast path gives the values of transformers' and PEFT's own code: LoRA layers, whole decoders, one token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_configs import build_llama_like_configs
from peft import LoraConfig, get_peft_model
from tiny_roles import PAD, PROMPTS, STOPS, UnchangedModelActor, World, add_noise, build_ragged_rollout
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedConfig,
)

from align.core.types import Rollout
from align.models.adapters import add_new_adapter
from align.models.fastpath import decoder, install_fast_path, linear, llama
from align.models.fastpath.decoder import ReservedCache
from align.models.forward import compute_hidden_states, compute_response_logprobs, unwrap_model
from align.models.lora import Lora
from align.rollout.hf import HfEngine, compute_next_states


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the fast path's passes, in order."""
    calls: list[str] = []
    for name in ("compute_rows", "decode_one_token"):
        original = getattr(llama, name)
        monkeypatch.setattr(llama, name, lambda *a, original=original, name=name: calls.append(name) or original(*a))
    return calls


@pytest.fixture
def by_row(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each call of attention by row."""
    calls: list[int] = []
    original = llama.causal_attention_by_row

    def count_rows(*arguments: Any) -> Tensor:
        calls.append(len(arguments[3].mask_BW))
        return original(*arguments)

    monkeypatch.setattr(llama, "causal_attention_by_row", count_rows)
    return calls


def fat(model: Any) -> Any:
    """Restore transformers' and PEFT's own forwards."""
    for module in model.modules():
        vars(module).pop("forward", None)
    return model


def outcome(model: Any, rollout: Rollout | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logprobs under the adapter, and the gradients of their sum."""
    model.zero_grad()
    logprobs, _ = compute_response_logprobs(model, rollout or build_ragged_rollout(), 1.0)
    logprobs.sum().backward()
    return logprobs.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model: Any, rollout: Rollout | None = None) -> None:
    """Assert that both paths give the same logprobs and gradients, in fp32 up to rounding."""
    install_fast_path(model)
    short, gradients = outcome(model, rollout)
    long, expected = outcome(fat(model), rollout)
    assert_close(short, long, atol=2e-5, rtol=1e-5)
    assert gradients.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    install_fast_path(model)
    with torch.no_grad():
        inference_logprobs = compute_response_logprobs(model, rollout or build_ragged_rollout(), 1.0)[0]
    assert torch.equal(inference_logprobs, short)  # the first ratio of PPO is 1 to the bit


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_fastpath_lora_is_lora(world: World, method: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llama, "is_supported_call", lambda *a: False)  # use fast layers, and no fast decoder
    model = add_new_adapter(world.load(method), Lora(4, 8))
    add_noise(model)
    assert all("lora_" in name for name in outcome(model)[1])
    assert_same(model)


@pytest.mark.parametrize("special", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}])
def test_what_is_more_than_lora_goes_the_long_way(tiny_model: Path, special: dict[str, Any], passes: list[str]):
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **special))
    add_noise(model)
    ids = torch.arange(6, 26)[None]
    model.train("lora_dropout" in special)
    torch.manual_seed(0)
    expected = model(input_ids=ids).logits
    install_fast_path(model)
    torch.manual_seed(0)
    assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert not passes


def test_adapters_are_switched_off_and_summed(tiny_model: Path):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(8, 8))
    model: Any = get_peft_model(layer, LoraConfig(r=2, target_modules=["0"]))  # pyright: ignore[reportArgumentType]
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    add_noise(model)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    install_fast_path(model)
    target = model.base_model.model[0]
    x = torch.randn(3, 8)
    assert target.forward.__func__ is linear.lora_forward
    low_rank = {
        n: x @ target.lora_A[n].weight.T @ target.lora_B[n].weight.T * target.scaling[n] for n in ("default", "other")
    }
    plain = target.base_layer(x)
    with torch.no_grad():
        assert_close(model(x), plain + low_rank["default"])
        with model.disable_adapter():
            assert_close(model(x), plain)
        model.base_model.set_adapter(["default", "other"])
        assert_close(model(x), plain + low_rank["default"] + low_rank["other"])


# Whole decoders.

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
LAYERS = SIZES["num_hidden_layers"]
FAMILIES = build_llama_like_configs(SIZES)


def build_noisy_model(config: PreTrainedConfig, targets: str | list[str] = "all-linear") -> Any:
    """Build a random model and an adapter, both with weights large enough to change the logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.data = 4 * weight if weight.dim() == 2 else weight + 0.1 * torch.randn_like(weight)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    add_noise(model)
    install_fast_path(model)
    return model


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return build_noisy_model(FAMILIES[request.param])


def test_a_decoder_is_that_of_transformers(model: Any, passes: list[str]):
    assert_same(model)
    assert passes == ["compute_rows"] * 2
    with torch.no_grad(), model.disable_adapter():
        short = compute_response_logprobs(model, build_ragged_rollout(), 1.0)[0]
        assert_close(short, compute_response_logprobs(fat(model), build_ragged_rollout(), 1.0)[0], atol=2e-5, rtol=1e-5)


def test_rows_without_padding_and_layers_without_adapters(passes: list[str]):
    padded = build_ragged_rollout()
    full = Rollout(padded.tokens_BS.clamp_min(6), torch.ones_like(padded.mask_BS), padded.prompt_width, padded.ended_B)
    assert_same(build_noisy_model(FAMILIES["qwen2"], ["q_proj", "v_proj", "down_proj"]), full)
    assert passes == ["compute_rows"] * 2


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_decoder_under_each_method(world: World, method: str, passes: list[str]):
    model = add_new_adapter(world.load(method), Lora(4, 8))
    add_noise(model)
    passes.clear()  # of the load's own probe
    assert_same(model)
    assert passes == ["compute_rows"] * 2


def test_recomputing_layers_changes_nothing(passes: list[str], monkeypatch: pytest.MonkeyPatch):
    model = build_noisy_model(FAMILIES["llama, grouped keys"])
    attention_calls = []
    original = llama.causal_attention
    monkeypatch.setattr(llama, "causal_attention", lambda *arguments: attention_calls.append(1) or original(*arguments))
    expected_logprobs, expected_gradients = outcome(model)
    assert len(attention_calls) == 2
    for layer in unwrap_model(model).get_decoder().layers:
        layer.gradient_checkpointing = True
    logprobs, gradients = outcome(model)
    assert len(attention_calls) == 2 + 4  # forward, and once more in the backward pass
    assert torch.equal(logprobs, expected_logprobs)
    assert all(torch.equal(expected_gradients[name], gradients[name]) for name in expected_gradients)
    assert passes == ["compute_rows"] * 2


def test_in_bf16_it_is_as_near_to_fp32_as_transformers_is():
    model = build_noisy_model(FAMILIES["qwen3"])
    exact_logprobs, exact_gradients = outcome(model)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if not weight.requires_grad:
                setattr(module, name, nn.Parameter(weight.bfloat16(), requires_grad=False))
    errors = []
    for prepare in (install_fast_path, fat):
        prepare(model)
        logprobs, gradients = outcome(model)
        assert {g.dtype for g in gradients.values()} == {torch.float32}
        errors.append(
            (
                float((logprobs - exact_logprobs).norm()),
                sum(float((gradients[n] - g).square().sum()) for n, g in exact_gradients.items()),
            )
        )
    (short, short_gradient), (long, long_gradient) = errors
    assert 0 < short < 1.2 * long
    assert 0 < short_gradient < 1.5 * long_gradient


def test_under_autocast_it_does_not_round_the_scores():
    model = build_noisy_model(FAMILIES["llama, grouped keys"])
    model.get_base_model().bfloat16()
    with torch.no_grad():
        plain = compute_response_logprobs(model, build_ragged_rollout(), 1.0)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rollout = build_ragged_rollout()
            inside = compute_hidden_states(model, rollout.tokens_BS, rollout.mask_BS)
        outside = compute_hidden_states(model, rollout.tokens_BS, rollout.mask_BS)
    assert plain.isfinite().all()
    assert torch.equal(inside, outside)


def test_under_autocast_a_frozen_head_rounds_as_one_that_trains():
    """PPO compares logprobs of a policy that trains with logprobs that it had while its weights were frozen."""
    model = build_noisy_model(FAMILIES["llama, grouped keys"])
    head = unwrap_model(model).get_output_embeddings()
    logprobs = []
    for trains in (False, True):
        head.weight.requires_grad_(trains)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            logprobs.append(compute_response_logprobs(model, build_ragged_rollout(), 1.0))
    for frozen, trained in zip(*logprobs, strict=True):
        assert torch.equal(frozen, trained)


LONG_WAYS: dict[str, Any] = {
    "a sliding window": (MistralConfig(num_key_value_heads=2, sliding_window=4, **SIZES), {}),
    "another unit": (LlamaConfig(hidden_act="gelu", **SIZES), {}),
    "packed rows": (FAMILIES["mistral"], {"attention_mask": None, "position_ids": torch.arange(20)[None] % 10}),
    "its inside asked for": (FAMILIES["mistral"], {"output_hidden_states": True}),
    "a cache of its own": (FAMILIES["mistral"], {"use_cache": True}),
    "a mask of four dimensions": (FAMILIES["mistral"], {"attention_mask": torch.zeros(1, 1, 20, 20)}),
}


@pytest.mark.parametrize("why", LONG_WAYS)
def test_what_is_not_plain_goes_the_long_way(why: str, passes: list[str]):
    config, options = LONG_WAYS[why]
    model = build_noisy_model(config)
    ids = options.get("input_ids", torch.arange(6, 26)[None])
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False, **options}
    with torch.no_grad():
        short = unwrap_model(model).get_decoder()(**call).last_hidden_state
        long = unwrap_model(fat(model)).get_decoder()(**call).last_hidden_state
    assert not passes
    assert_close(short, long, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama, every bias", "qwen3"])
def test_every_weight_may_train(family: str, passes: list[str]):
    model = build_noisy_model(FAMILIES[family]).unload().requires_grad_()
    assert_same(model)
    assert passes == ["compute_rows"] * 2
    assert {n for n, p in model.named_parameters() if p.grad is None} == set()


# One token.


@pytest.fixture(params=["copied", "as they are"])
def copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are copied for a rollout, and weights that are too many to copy."""
    monkeypatch.setattr(decoder, "MAX_COPY", 1 << 30 if request.param == "copied" else 0)


def test_rollouts_are_the_same_either_way(model: Any, passes: list[str], copies: None):
    fast = HfEngine(STOPS, PAD, 12).generate(PROMPTS, UnchangedModelActor(model), range(len(PROMPTS)))
    assert passes[0] == "compute_rows"
    assert set(passes[1:]) == {"decode_one_token"}
    slow = HfEngine(STOPS, PAD, 12).generate(PROMPTS, UnchangedModelActor(fat(model)), range(len(PROMPTS)))
    assert torch.equal(fast.tokens_BS, slow.tokens_BS)
    assert torch.equal(fast.mask_BS, slow.mask_BS)
    assert len(set(fast.lengths_B.tolist())) > 1  # rows left the batch


def test_rollouts_on_four_bits_and_with_some_adapters(world: World, passes: list[str], copies: None):
    model = get_peft_model(world.load(), LoraConfig(r=4, target_modules=["k_proj", "up_proj"], task_type="CAUSAL_LM"))
    add_noise(model)
    install_fast_path(model)
    fast = HfEngine(STOPS, PAD, 12).generate(PROMPTS, UnchangedModelActor(model), range(len(PROMPTS)))
    assert "decode_one_token" in passes
    slow = HfEngine(STOPS, PAD, 12).generate(PROMPTS, UnchangedModelActor(fat(model)), range(len(PROMPTS)))
    assert torch.equal(fast.tokens_BS, slow.tokens_BS)


def test_one_token_in_bf16_is_as_near_to_fp32_as_the_whole_rows_are(copies: None):
    """Rows are read up to their last token, and then that token alone."""
    exact, bf16 = (build_noisy_model(FAMILIES["qwen3"]) for _ in range(2))
    for module in bf16.modules():
        for name, weight in module.named_parameters(recurse=False):
            if not weight.requires_grad:
                setattr(module, name, nn.Parameter(weight.bfloat16(), requires_grad=False))
    ids = torch.randint(6, 320, (5, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    positions = torch.arange(9).expand(5, 9)
    expected = compute_hidden_states(exact, ids, mask.bool())[:, -1]

    def compute_last_state(model: Any) -> Tensor:
        cache = ReservedCache(9)
        compute_next_states(model, ids[:, :8], mask[:, :8], positions[:, :8], cache)
        return compute_next_states(model, ids[:, 8:], mask, positions[:, 8:], cache)

    with torch.no_grad():
        assert_close(compute_last_state(exact), expected, atol=1e-4, rtol=1e-4)
        token_error = float((compute_last_state(bf16).float() - expected).norm())
        row_error = float((compute_hidden_states(bf16, ids, mask.bool())[:, -1].float() - expected).norm())
    assert 0 < token_error < 1.5 * row_error


def test_a_row_too_long_to_keep_its_attention_is_read_by_row(passes: list[str], by_row: list[int]):
    model = build_noisy_model(FAMILIES["mistral"])
    ids = torch.arange(6, 306).repeat(2)[None]
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with torch.no_grad():
        short = unwrap_model(model).get_decoder()(**call).last_hidden_state
        assert passes == ["compute_rows"]
        assert len(by_row) == LAYERS
        long = unwrap_model(fat(model)).get_decoder()(**call).last_hidden_state
    assert_close(short, long, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reason", ["long", "many", "ragged"])
def test_attention_by_row_gives_the_logprobs_and_gradients_of_the_long_way(
    family: str, reason: str, monkeypatch: pytest.MonkeyPatch, by_row: list[int]
):
    settings = {"long": {"LONGEST": 4}, "many": {"KEPT": 0}, "ragged": {"RAGGED": 0.5, "RAGGED_COLUMNS": 4}}
    for name, value in settings[reason].items():
        monkeypatch.setattr(llama, name, value)
    assert_same(build_noisy_model(FAMILIES[family]))
    assert len(by_row) == 2 * LAYERS  # with a gradient and without one


def test_the_way_of_attention_is_chosen_by_what_is_kept_and_by_padding(
    monkeypatch: pytest.MonkeyPatch, by_row: list[int]
):
    """The attention weights of all layers together do not fit. With checkpointing, those of one layer may."""
    model = build_noisy_model(FAMILIES["mistral"])
    rollout = build_ragged_rollout()
    lengths = rollout.mask_BS.sum(1)
    cells = len(lengths) * int(lengths.max()) ** 2
    monkeypatch.setattr(llama, "KEPT", cells * 4 * 4)  # one layer in fp32
    outcome(model)
    assert len(by_row) == LAYERS
    for layer in unwrap_model(model).get_decoder().layers:
        layer.gradient_checkpointing = True
    outcome(model)
    assert len(by_row) == LAYERS
    share = cells / float((lengths**2).sum())
    monkeypatch.setattr(llama, "RAGGED_COLUMNS", 4)
    monkeypatch.setattr(llama, "RAGGED", share + 0.01)
    outcome(model)
    assert len(by_row) == LAYERS
    monkeypatch.setattr(llama, "RAGGED", share - 0.01)
    outcome(model)
    assert len(by_row) > LAYERS


def test_in_fp16_only_passes_without_a_gradient_are_short(passes: list[str]):
    """The adapter's gradients would be too small for fp16."""
    model = build_noisy_model(FAMILIES["mistral"]).half()
    outcome(model)
    assert not passes
    with torch.no_grad():
        compute_response_logprobs(model, build_ragged_rollout(), 1.0)
    assert passes == ["compute_rows"]


def test_a_prompt_that_goes_the_long_way_is_answered_by_it(monkeypatch: pytest.MonkeyPatch, passes: list[str]):
    model = build_noisy_model(FAMILIES["qwen3"])
    slow = HfEngine(STOPS, PAD, 8).generate(PROMPTS, UnchangedModelActor(fat(model)), range(len(PROMPTS)))
    install_fast_path(model)
    monkeypatch.setattr(llama, "LONGEST", 4)
    mixed = HfEngine(STOPS, PAD, 8).generate(PROMPTS, UnchangedModelActor(model), range(len(PROMPTS)))
    assert not passes
    assert torch.equal(mixed.tokens_BS, slow.tokens_BS)


def test_a_model_on_another_device_keeps_its_own_forwards():
    """The fast path has not been measured on other devices."""
    model = fat(build_noisy_model(FAMILIES["qwen3"])).to("meta")
    install_fast_path(model)
    assert not any("forward" in vars(module) for module in model.modules())
