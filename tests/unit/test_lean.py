"""Short ways that must arrive where the long ones do: LoRA layers, logprobs of a plain head, attention of one token."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_roles import PAD, PROMPTS, STOPS, World, make_world, ragged_rollout, shake
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from align.models.adapters import with_new_adapter
from align.models.lean import forward, make_lean
from align.models.load import load_base
from align.models.trunk import response_logprobs
from align.ops.logprobs import linear_logprobs, token_logprobs
from align.rollout.attention import attend, for_decoding
from align.rollout.hf import HfEngine


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_tokenizer: Any) -> World:
    return make_world(tmp_path_factory.mktemp("world"), tiny_model, tiny_tokenizer)


def fat(model: Any) -> Any:
    """With PEFT's own forward again."""
    for module in model.modules():
        vars(module).pop("forward", None)
    return model


def outcome(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logprobs under the adapter, and the gradients of their sum."""
    model.zero_grad()
    logprobs, _ = response_logprobs(model, ragged_rollout(), 1.0)
    logprobs.sum().backward()
    return logprobs.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_lean_lora_is_lora(world: World, method: str):
    model = with_new_adapter(world.load(method), 4, 8)
    shake(model)
    assert any(getattr(m, "forward", None) is not None and "forward" in vars(m) for m in model.modules())
    short, gradients = outcome(model)
    long, expected = outcome(fat(model))
    assert_close(short, long, atol=2e-5, rtol=1e-5)
    assert gradients.keys() == expected.keys() != set()
    assert all("lora_" in name for name in gradients)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    make_lean(model)
    with torch.no_grad():
        assert_close(response_logprobs(model, ragged_rollout(), 1.0)[0], long, atol=2e-5, rtol=1e-5)


def test_lean_lora_in_bf16_is_lora_up_to_its_rounding(world: World):
    model = load_base(world.base, "lora", torch.device("cpu"), torch.bfloat16)
    model = with_new_adapter(model, 4, 8)
    shake(model)
    short, gradients = outcome(model)
    long, expected = outcome(fat(model))
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    assert (short - long).norm() < 0.05 * long.norm()
    total, gap = (sum(float(g.square().sum()) for g in gs) for gs in (
        expected.values(), [gradients[n] - g for n, g in expected.items()]
    ))  # fmt: skip
    assert gap < 0.01 * total


@pytest.mark.parametrize("special", [{"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}])
def test_what_is_more_than_lora_goes_the_long_way(tiny_model: Path, special: dict[str, Any]):
    model = LlamaForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **special))
    shake(model)
    ids = torch.arange(6, 26)[None]
    model.train("lora_dropout" in special)
    torch.manual_seed(0)
    expected = model(input_ids=ids).logits
    make_lean(model)
    torch.manual_seed(0)
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_adapters_are_switched_off_and_summed(tiny_model: Path):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(8, 8))
    model: Any = get_peft_model(layer, LoraConfig(r=2, target_modules=["0"]))  # pyright: ignore[reportArgumentType]
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    shake(model)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    make_lean(model)
    target, x = model.base_model.model[0], torch.randn(3, 8)
    assert target.forward.__func__ is forward
    low = {
        n: x @ target.lora_A[n].weight.T @ target.lora_B[n].weight.T * target.scaling[n] for n in ("default", "other")
    }
    plain = target.base_layer(x)
    with torch.no_grad():
        assert_close(model(x), plain + low["default"])
        with model.disable_adapter():
            assert_close(model(x), plain)
        model.base_model.set_adapter(["default", "other"])
        assert_close(model(x), plain + low["default"] + low["other"])


# Logprobs of a head that is a matrix.


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_linear_logprobs_are_token_logprobs(temperature: float, chunk: int | None):
    g = torch.Generator().manual_seed(0)
    weight, targets = torch.randn(23, 7, generator=g, dtype=torch.double), torch.randint(0, 23, (11,), generator=g)
    hidden = torch.randn(11, 7, generator=g, dtype=torch.double).float()
    weight, upstream = weight.float(), torch.randn(11, generator=g)
    found, expected = [], []
    for results, function in (
        (found, lambda h: linear_logprobs(h, targets, weight, temperature, chunk)),
        (expected, lambda h: token_logprobs(h, targets, lambda x: x @ weight.T, temperature, chunk)),
    ):
        h = hidden.clone().requires_grad_()
        logprobs, entropy = function(h)
        (logprobs * upstream).sum().backward()
        assert not entropy.requires_grad
        results += [logprobs.detach(), entropy.detach(), h.grad]
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert_close(linear_logprobs(hidden, targets, weight, temperature, chunk)[0], expected[0], atol=1e-5, rtol=1e-5)


def test_the_gradient_of_linear_logprobs_by_finite_differences():
    g = torch.Generator().manual_seed(0)
    weight, targets = torch.randn(5, 3, generator=g), torch.tensor([0, 4])
    hidden = torch.randn(2, 3, generator=g).requires_grad_()
    linear_logprobs(hidden, targets, weight, 0.8)[0].sum().backward()
    assert hidden.grad is not None
    for n in range(2):
        for d in range(3):
            moved = torch.zeros(2, 3, dtype=torch.double)
            moved[n, d] = 1e-5
            at = [(hidden.detach().double() + sign * moved) @ weight.double().T / 0.8 for sign in (1, -1)]
            up, down = (logits.log_softmax(-1).gather(1, targets[:, None]) for logits in at)
            assert float(hidden.grad[n, d]) == pytest.approx(float((up - down).sum()) / 2e-5, abs=1e-4)


# Attention of one token.


def test_attention_of_one_token_is_that_of_the_fused_kernel():
    g = torch.Generator().manual_seed(0)
    query, (key, value) = torch.randn(3, 6, 1, 8, generator=g), torch.randn(2, 3, 2, 5, 8, generator=g)
    mask = torch.ones(3, 1, 1, 5, dtype=torch.bool)
    mask[0, ..., :3] = mask[1, ..., 0] = False
    repeated = [x.repeat_interleave(3, dim=1) for x in (key, value)]
    for given in (None, mask, torch.where(mask, 0.0, -1e9)):
        expected = nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=given)
        found, _ = attend(nn.Module(), query, key, value, given, scaling=8**-0.5)
        assert_close(found, expected.transpose(1, 2))


@pytest.mark.parametrize("groups", [1, 2])
def test_rollouts_are_the_same_with_either_attention(groups: int, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, num_key_value_heads=groups, **sizes)).eval()
    for weight in model.parameters():
        weight.data *= 3
    used = []
    import align.rollout.attention as attention

    kernel = attention.torch.bmm
    monkeypatch.setattr(attention.torch, "bmm", lambda *a: used.append(1) or kernel(*a))
    fast = HfEngine(model, STOPS, PAD, 8).generate(PROMPTS, torch.Generator().manual_seed(0))
    assert used
    monkeypatch.setattr("align.rollout.hf.for_decoding", nullcontext)
    slow = HfEngine(model, STOPS, PAD, 8).generate(PROMPTS, torch.Generator().manual_seed(0))
    assert torch.equal(fast.tokens_BS, slow.tokens_BS)
    assert torch.equal(fast.mask_BS, slow.mask_BS)


def test_an_architecture_that_looks_at_the_name_of_its_attention(monkeypatch: pytest.MonkeyPatch):
    """Falcon makes other masks for another name."""
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    config = FalconConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=False)
    model = FalconForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data *= 3
    fast = HfEngine(model, STOPS, PAD, 8).generate(PROMPTS, torch.Generator().manual_seed(0))
    monkeypatch.setattr("align.rollout.hf.for_decoding", nullcontext)
    slow = HfEngine(model, STOPS, PAD, 8).generate(PROMPTS, torch.Generator().manual_seed(0))
    assert torch.equal(fast.tokens_BS, slow.tokens_BS)


def test_the_stand_in_leaves_with_its_block():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with for_decoding():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attend
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
