"""Importance weights of tokens that another sampler than the policy drew, by hand; and the gap between the two."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import tensor

from align.config.compose import build_config, compose_tree
from align.core.errors import InputError
from align.core.types import Rollout
from align.ops.losses import compute_importance_weights, policy_loss
from align.ppo.experience import Estimator, assemble_experience
from align.ppo.rollouts import compute_sampler_figures, require_small_gap, run_in_background

OLD = tensor([[-1.0, -2.0, -0.5]])
DRAWN = tensor([[-1.0 - math.log(1.5), -2.0 + math.log(4.0), -0.5 - math.log(8.0)]])
MASK = tensor([[True, True, True]])
ADVANTAGES = tensor([[1.0, -2.0, 3.0]])


def test_weights_by_hand():
    weights = compute_importance_weights(OLD, DRAWN, MASK, 2.0)
    assert weights.tolist() == [[pytest.approx(1.5), pytest.approx(0.25), 2.0]]  # 8 is cut to 2
    assert compute_importance_weights(OLD, DRAWN, MASK, 100.0)[0, 2] == pytest.approx(8.0)


def test_what_is_masked_has_no_say():
    dirty = DRAWN.clone()
    dirty[0, 1] = float("nan")
    weights = compute_importance_weights(OLD, dirty, tensor([[True, False, True]]), 2.0)
    assert weights.tolist() == [[pytest.approx(1.5), 0.0, 2.0]]


def test_the_weighted_loss_and_its_gradient():
    weights = compute_importance_weights(OLD, DRAWN, MASK, 2.0)
    logprobs = OLD.clone().requires_grad_()
    result = policy_loss(logprobs, OLD, ADVANTAGES, MASK, 0.2, 3.0, weights)
    assert float(result.loss.detach()) == pytest.approx(-(1.5 * 1.0 + 0.25 * -2.0 + 2.0 * 3.0) / 3)
    result.loss.backward()  # at ratio 1 the gradient of a token is −w A / count
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([-1.5 / 3, 0.5 / 3, -6.0 / 3])


def test_no_gradient_reaches_the_weights():
    old = OLD.clone().requires_grad_()
    sampled = DRAWN.clone().requires_grad_()
    assert not compute_importance_weights(old, sampled, MASK, 2.0).requires_grad


def test_a_clipped_token_is_weighted_too():
    ratio = math.log(1.5)
    result = policy_loss(OLD + ratio, OLD, tensor([[1.0, 1.0, 1.0]]), MASK, 0.2, 1.0, tensor([[2.0, 1.0, 0.5]]))
    assert float(result.loss.detach()) == pytest.approx(-1.2 * 3.5)


def build_one_row_rollout(sampled: torch.Tensor | None = DRAWN) -> Rollout:
    return Rollout(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4).bool(), 1, tensor([True]), sampled)


def build_weighted_experience(sampled: torch.Tensor | None, cap: float | None) -> Any:
    settings = {"kl_coef": 0.0, "kl_estimator": "k1", "kl_in_reward": True, "estimator": Estimator(lam=1.0)}
    zeros = torch.zeros(1, 3)
    return assemble_experience(
        build_one_row_rollout(sampled),
        tensor([1.0]),
        OLD,
        OLD,
        zeros,
        **settings,
        whiten_rewards=False,
        importance_cap=cap,
    )[0]


def test_experience_has_weights_where_another_drew():
    assert (
        build_weighted_experience(DRAWN, 2.0).weights_BT.tolist()
        == compute_importance_weights(OLD, DRAWN, MASK, 2.0).tolist()
    )
    assert build_weighted_experience(DRAWN, None).weights_BT is None
    assert build_weighted_experience(None, 2.0).weights_BT is None
    assert build_weighted_experience(DRAWN, 2.0).rows(tensor([0])).weights_BT.shape == (1, 3)


def test_the_gap_by_hand_and_its_bound():
    figures = compute_sampler_figures(
        SimpleNamespace(), build_one_row_rollout(), OLD, (), temperature=1.0, micro_batch=4
    )  # pyright: ignore
    assert figures["rollout_gap"] == pytest.approx((math.log(1.5) + math.log(4) + math.log(8)) / 3)
    assert figures["rollout_ratio"] == pytest.approx((1.5 + 0.25 + 8) / 3)
    assert figures["staleness"] == 0
    require_small_gap(figures, 1.3)
    with pytest.raises(InputError, match=r"are 1\.3 nats per token from the policy's"):
        require_small_gap(figures, 1.2)
    with pytest.raises(InputError, match="are nan nats"):
        require_small_gap({**figures, "rollout_gap": float("nan")}, 1.2)


def test_the_gap_of_the_worst_server_counts():
    """The first of two servers samples two tokens as the policy does, the second samples one token differently."""
    sampled = torch.tensor([[-1.0, -1.0, 0.0], [-1.0, 0.0, 0.0]])
    old = torch.tensor([[-1.0, -1.0, 0.0], [-3.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    tokens = torch.ones(2, 4, dtype=torch.long)
    rollout = Rollout(
        tokens, torch.cat([torch.ones(2, 1, dtype=torch.bool), mask], 1), 1, torch.ones(2).bool(), sampled
    )
    sizes = {"temperature": 1.0, "micro_batch": 1}
    assert compute_sampler_figures(SimpleNamespace(), rollout, old, (), **sizes)["rollout_gap"] == pytest.approx(2 / 3)  # pyright: ignore
    figures = compute_sampler_figures(SimpleNamespace(), rollout, old, (), servers=2, **sizes)  # pyright: ignore
    assert figures["rollout_gap"] == pytest.approx(2.0)


def test_what_fails_in_the_background_is_told_to_whoever_waits():
    assert run_in_background(build_one_row_rollout)().prompt_width == 1

    def raise_error() -> Rollout:
        raise InputError("a", 1, "is gone", "Try again.")

    wait = run_in_background(raise_error)
    for _ in range(2):
        with pytest.raises(InputError, match="is gone"):
            wait()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stage.max_staleness=1"], "samples and trains in one process"),
        (["stage.max_staleness=2", "rollout=vllm"], "is not from 0 to 1"),
        (["stage.importance_cap=0.5"], "is not 1 or more"),
        (["rollout.replicas=2"], "is a setting of rollout=vllm"),
        (["rollout=vllm", "rollout.urls=[gpu1:8000]"], "is no address"),
        (["rollout=vllm", "rollout.urls=['http://me:pw@gpu1:8000']"], "is no address"),
        (["rollout=vllm", "rollout.urls=['http://a:1','http://a:1']"], "is given twice"),
        (["rollout=vllm", "rollout.urls=['http://a:1']", "rollout.replicas=2"], "rollout.urls names running servers"),
        (["rollout=vllm", "rollout.args={dtype: float32}"], "is decided by rollout.dtype"),
        (["rollout=vllm", "rollout.args=[a]"], "is no mapping"),
    ],
)
def test_settings_that_do_not_go_together(words: list[str], said: str):
    with pytest.raises(InputError, match=said) as error:
        build_config(compose_tree(["stage=ppo", *words]))
    assert "pw" not in str(error.value)
