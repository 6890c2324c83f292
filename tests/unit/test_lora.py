"""Fresh adapters: their layers and scale, reward models of the same shape, and adapters of every role."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_roles import CPU, FP32, World
from transformers import GPT2Config, GPT2LMHeadModel

from align.core.errors import InputError
from align.models.adapters import add_new_adapter, attach_adapter, read_adapter_config, read_tensors, save_adapter
from align.models.forward import compute_hidden_states, compute_response_logprobs, rollout_from_answers
from align.models.load import load_base, load_classifier
from align.models.lora import Lora, LoraLike
from align.models.roles import Roles
from align.trainers.reward import copy_adapter_weights

OPTIONS = {
    "plain": Lora(4, 8),
    "rslora": Lora(4, 8, rslora=True),
    "dora": Lora(4, 8, dora=True),
    "two layers": Lora(4, 8, targets=("q_proj", "down_proj")),
    "dropout": Lora(4, 8, dropout=0.3),
    "all": Lora(4, 8, dropout=0.1, targets=("v_proj", "up_proj"), rslora=True, dora=True),
}
ROWS = [[1, 40, 41, 42], [1, 50, 51]]


def perturb_adapter(model: Any) -> Any:
    """Add noise to an adapter's tensors: a fresh adapter does not change the model's output."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=OPTIONS)
def lora(request: pytest.FixtureRequest) -> Lora:
    return OPTIONS[request.param]


@pytest.fixture(params=["qlora", "lora"])
def saved(request: pytest.FixtureRequest, world: World, lora: Lora, tmp_path: Path) -> tuple[str, Path, Any]:
    """A method, the folder of an adapter that changes the output, and the model that it was saved from."""
    model = perturb_adapter(add_new_adapter(world.load(request.param), lora))
    save_adapter(model, tmp_path / "adapter", world.base)
    return request.param, tmp_path / "adapter", model


def compute_states(model: Any) -> torch.Tensor:
    tokens = torch.tensor([ROWS[0], [*ROWS[1], 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    with torch.no_grad():
        return compute_hidden_states(model, tokens, mask)[mask]


def test_what_peft_is_told(world: World) -> None:
    config = OPTIONS["all"].config(world.load("lora"))
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.1)
    assert (set(config.target_modules), config.use_rslora, config.use_dora) == ({"v_proj", "up_proj"}, True, True)
    model = add_new_adapter(world.load("lora"), Lora(4, 8))
    adapted = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_modules() if ".lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("target", ["nothing", "lm_head", "score", "embed_tokens", "proj", "model"])
def test_a_layer_that_bears_none_is_refused_by_name(world: World, target: str) -> None:
    with pytest.raises(InputError, match=rf"method\.targets={target}: .* It has: down_proj, gate_proj"):
        add_new_adapter(world.load("lora"), Lora(4, 8, targets=("q_proj", target)))


def test_layers_of_gpt_2_are_named_too() -> None:
    """Linear layers of GPT-2 are transformers' own `Conv1D`."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    adapted = add_new_adapter(model, Lora(4, 8, targets=("c_attn",)))
    names = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in adapted.named_modules() if ".lora_A" in name}
    assert names == {"c_attn"}


def test_it_is_read_back_as_it_was(saved: tuple[str, Path, Any], world: World) -> None:
    """The adapter is loaded by `attach_adapter` and by PEFT, each time on a freshly loaded base."""
    method, folder, model = saved
    torch.testing.assert_close(
        compute_states(attach_adapter(world.load(method), folder, "again").eval()), compute_states(model)
    )
    theirs = PeftModel.from_pretrained(world.load(method), str(folder)).eval()
    torch.testing.assert_close(compute_states(theirs), compute_states(model))
    assert (compute_states(model) - compute_states(world.load(method))).abs().max() > 1e-3


def test_a_reward_model_starts_as_the_adapter_it_comes_from(saved: tuple[str, Path, Any], world: World) -> None:
    """Layers, scale and tensors are the same. Another scale would be another model, without an error."""
    method, folder, model = saved
    scorer = add_new_adapter(
        load_classifier(world.base, method, CPU, FP32), LoraLike(read_adapter_config(folder)), is_reward_model=True
    )
    assert copy_adapter_weights(scorer, folder) == len(read_tensors(folder))
    torch.testing.assert_close(compute_states(scorer.eval()), compute_states(model))


@pytest.mark.parametrize("backbone", ["own", "policy"])
def test_every_role_plays_it(saved: tuple[str, Path, Any], world: World, backbone: str) -> None:
    """Policy and reference compute the adapter's logprobs. A step on the policy changes its tensors and no others."""
    method, folder, model = saved
    roles = Roles(world.load(method), folder, [], Lora(4, 8), backbone)
    rollout = rollout_from_answers(ROWS, [[60, 61, 2], [70, 2]], 0, CPU)
    expected = compute_response_logprobs(model, rollout, 1.0)[0]
    for role in ("policy", "reference"):
        torch.testing.assert_close(roles.logprobs(role, rollout, 1.0).logprobs_BT, expected)
    before = {name: p.detach().clone() for name, p in roles.model.named_parameters() if "lora_" in name}
    optimiser = torch.optim.SGD(roles.parameters_of("policy"), lr=0.1)
    roles.logprobs("policy", rollout, 1.0, train=True).logprobs_BT.sum().backward()
    optimiser.step()
    moved = {name for name, p in roles.model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".policy" in name}
    roles.save("policy", folder.parent / "policy", world.base, FP32)
    assert read_tensors(folder.parent / "policy").keys() == read_tensors(folder).keys()


@pytest.mark.parametrize("kind", ["rslora", "dora", "all"])
def test_roles_that_start_from_nothing(world: World, kind: str) -> None:
    roles = Roles(world.load("qlora"), None, [], OPTIONS[kind])
    assert {name for name in roles.get_named_parameters("policy") if "magnitude" in name} or not OPTIONS[kind].dora
    rollout = rollout_from_answers(ROWS, [[60, 61, 2], [70, 2]], 0, CPU)
    policy, reference = (roles.logprobs(role, rollout, 1.0).logprobs_BT for role in ("policy", "reference"))
    torch.testing.assert_close(policy, reference)  # a fresh adapter changes nothing
    base = load_base(world.base, "qlora", CPU, FP32)
    torch.testing.assert_close(reference, compute_response_logprobs(base, rollout, 1.0)[0])
