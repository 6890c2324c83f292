"""An adapter that a model lacks is an error on every path; the base never answers in its place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_roles import PROMPTS, STOPS, UnchangedModelActor, World, add_noise, build_ragged_rollout
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from align.core.errors import InputError
from align.models.actors import ModelActor
from align.models.adapters import attach_adapter
from align.models.fastpath import disable_fast_path, install_fast_path
from align.models.forward import compute_response_logprobs, unwrap_model
from align.models.lora import Lora
from align.models.roles import Roles
from align.rollout.hf import HfEngine


@pytest.fixture
def model(world: World) -> Any:
    """A model with adapter `a` on all linear layers, and `b` on one of them."""
    model = attach_adapter(world.load("lora"), world.init, "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["layers.1.mlp.down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B.b" in name:
            parameter.data.normal_(std=0.3)
    install_fast_path(model)
    return model.requires_grad_(False).eval()


def fast(model: Any) -> AbstractContextManager[None]:
    """Use the fast path, which applies adapters within one pass of the decoder."""
    return nullcontext()


def peft_alone(model: Any) -> AbstractContextManager[None]:
    """Use the forward methods of transformers and PEFT, as on a GPU."""
    return disable_fast_path(model)


def on_the_plain_path(model: Any) -> AbstractContextManager[None]:
    """Call the forward method of the model itself, row by row."""
    base = unwrap_model(model)
    base.align_route = base.align_route._replace(has_fast_path=False)
    return disable_fast_path(model)


PATHS = [fast, peft_alone, on_the_plain_path]
UNKNOWN = r"^adapter=c: the model has no adapter of this name, only a, b\. Name one of these, or attach it"


def logprobs(model: Any) -> Tensor:
    return compute_response_logprobs(model, build_ragged_rollout(), 1.0)[0]


def answers(model: Any) -> Tensor:
    return HfEngine(STOPS, 0, 4).generate(PROMPTS, UnchangedModelActor(model), range(len(PROMPTS))).tokens_BS


def activate_adapters(model: Any, names: str | list[str]) -> None:
    """Activate adapters in PEFT directly, which does not check the name."""
    model.base_model.set_adapter(names, inference_mode=True)


@pytest.mark.parametrize("path", PATHS)
def test_known_adapters_and_the_base_alone_answer(model: Any, path: Callable[[Any], AbstractContextManager[None]]):
    with path(model), torch.no_grad():
        with model.disable_adapter():
            base = logprobs(model)
        activate_adapters(model, [])
        torch.testing.assert_close(logprobs(model), base)
        logprobs_by_names = {}
        for names in ("a", "b", ["a", "b"]):
            activate_adapters(model, names)
            logprobs_by_names[str(names)] = logprobs(model)
            assert len(answers(model)) == len(PROMPTS)
        for adapter_logprobs in logprobs_by_names.values():
            assert (adapter_logprobs - base).abs().max() > 1e-3
        assert not torch.equal(logprobs_by_names["a"], logprobs_by_names["b"])


@pytest.mark.parametrize("ask", [logprobs, answers])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("names", ["c", ["c"], ["a", "c"], ["c", "a"]], ids=str)
def test_an_unknown_adapter_is_an_error(
    model: Any,
    path: Callable[[Any], AbstractContextManager[None]],
    names: str | list[str],
    ask: Callable[[Any], Tensor],
):
    activate_adapters(model, names)
    with path(model), pytest.raises(InputError, match=UNKNOWN):
        ask(model)


@pytest.mark.parametrize("path", PATHS)
def test_a_deleted_adapter_is_unknown_and_a_new_one_is_not(
    model: Any, path: Callable[[Any], AbstractContextManager[None]]
):
    activate_adapters(model, "a")
    model.delete_adapter("b")
    with path(model):
        logprobs(model)
        activate_adapters(model, "b")
        with pytest.raises(InputError, match=r"^adapter=b: .*only a\."):
            logprobs(model)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"]))
    with path(model):
        activate_adapters(model, "b")
        logprobs(model)


def test_on_another_device_too():
    """The device is torch's `meta`, which computes only shapes."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        model: Any = get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)), LoraConfig(r=2))
    install_fast_path(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert "forward" not in vars(layer)
    x = torch.zeros(1, 3, 64, device="meta")
    assert layer(x).shape == (1, 3, 64)
    activate_adapters(model, "typo")
    with pytest.raises(InputError, match=r"^adapter=typo: .*only default\."):
        layer(x)


def test_a_policy_that_is_not_there_does_not_speak(world: World, model: Any):
    with ModelActor(model, "a").use():
        policy_logprobs = logprobs(model)
    with ModelActor(model).use():
        assert not torch.equal(logprobs(model), policy_logprobs)
    with pytest.raises(InputError, match=UNKNOWN):
        ModelActor(model, "c").use().__enter__()
    with pytest.raises(InputError, match=r"^adapter=a: .*only its base\."):
        ModelActor(world.load("lora"), "a").use().__enter__()


def test_a_role_that_is_not_there_does_not_play(world: World):
    roles = Roles(world.load("lora"), world.init, [], Lora(4, 8), "policy")
    add_noise(roles.model)
    for role in ("policy", "reference"):
        with roles.use(role) as model:
            logprobs(model)
    with pytest.raises(InputError, match=r"^adapter=reward: .*only policy, reference\."), roles.use("reward"):
        pass
