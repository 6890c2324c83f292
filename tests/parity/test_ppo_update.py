"""A PPO update equals the published formulas, written out token by token in fp64 without our operations.

Schulman et al. (2016) eq. 11–16 for advantages; Schulman et al. (2017) eq. 7 for the policy; Ziegler et al. (2019)
section 2.2 for the rewards; Huang et al. (2024) for whitening and the clipped value loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from align.core.types import Rollout
from align.models.roles import ForwardOutput
from align.ppo.experience import Estimator, assemble_experience
from align.ppo.update import Losses, accumulate_gradients

VOCABULARY = 11
PROMPT = 3
WIDTH = 6
ROWS = 8
CLOSE = {"atol": 1e-6, "rtol": 0}


class Bigram:
    """The smallest policy and value function: a row of logits and a value for each previous token."""

    trainable = ("policy", "value")

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=g, dtype=torch.double))
        self.value = nn.Parameter(torch.randn(VOCABULARY, generator=g, dtype=torch.double))

    def logprobs(self, role: str, rollout: Rollout, temperature: float, train: bool = False) -> ForwardOutput:
        previous_tokens = rollout.tokens_BS[:, rollout.prompt_width - 1 : -1]
        log_p = (self.logits[previous_tokens] / temperature).log_softmax(-1)
        token_log_p = log_p.gather(-1, rollout.response_BT[..., None]).squeeze(-1)
        return ForwardOutput(token_log_p, -(log_p.exp() * log_p).sum(-1).detach(), torch.empty(0))

    def values(self, rollout: Rollout, train: bool = False, policy_states_BTD: Tensor | None = None) -> Tensor:
        return self.value[rollout.tokens_BS[:, rollout.prompt_width - 1 : -1]]

    def require_gradients(self, role: str) -> None:
        """Do nothing, as both models always have gradients."""


def build_rollout(seed: int) -> Rollout:
    g = torch.Generator().manual_seed(seed)
    mask = torch.cat(
        [
            torch.arange(PROMPT).flip(0) < torch.randint(1, PROMPT + 1, (ROWS, 1), generator=g),
            torch.arange(WIDTH) < torch.randint(1, WIDTH + 1, (ROWS, 1), generator=g),
        ],
        dim=1,
    )
    tokens = torch.randint(1, VOCABULARY, mask.shape, generator=g)
    return Rollout(tokens * mask, mask, PROMPT, torch.rand(ROWS, generator=g) < 0.5)


def iter_response_tokens(rollout: Rollout) -> Iterator[tuple[int, int, int, int]]:
    """Yield row, time, previous token and token for every response token."""
    for b in range(ROWS):
        for t in range(int(rollout.mask_BS[b, PROMPT:].sum())):
            yield b, t, int(rollout.tokens_BS[b, PROMPT + t - 1]), int(rollout.tokens_BS[b, PROMPT + t])


def get_last_tokens(rollout: Rollout) -> Tensor:
    return torch.stack([tokens[mask][-1] for tokens, mask in zip(rollout.tokens_BS, rollout.mask_BS, strict=True)])


def compute_published_advantages(
    rollout: Rollout, scores: Tensor, old: Tensor, ref: Tensor, values: Tensor, next_value: Any, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    mask = rollout.mask_BS[:, PROMPT:]
    lengths = mask.sum(1).tolist()
    rewards = torch.zeros_like(values)
    for b, t, _, _ in iter_response_tokens(rollout):
        d = old[b, t] - ref[b, t]
        kl = d if options["kl_estimator"] == "k1" else torch.exp(-d) - 1 + d
        rewards[b, t] = -options["kl_coef"] * kl if options["kl_in_reward"] else 0.0
        if t == lengths[b] - 1:
            rewards[b, t] += scores[b]
    if options["whiten_rewards"]:
        real = rewards[mask]
        rewards[mask] = (real - real.mean()) / real.std(unbiased=False) + real.mean()
    raw = torch.zeros_like(values)
    returns = torch.zeros_like(values)
    for b, t, _, _ in iter_response_tokens(rollout):
        is_truncated = next_value is not None and not rollout.ended_B[b]
        next_values = [*values[b, : lengths[b]].tolist(), float(next_value[b]) if is_truncated else 0.0]
        for k in range(t, lengths[b]):
            delta = rewards[b, k] + options["gamma"] * next_values[k + 1] - next_values[k]
            raw[b, t] += (options["gamma"] * options["lam"]) ** (k - t) * delta
        returns[b, t] = raw[b, t] + values[b, t]
    whitened = torch.zeros_like(raw)
    whitened[mask] = (raw[mask] - raw[mask].mean()) / raw[mask].std(unbiased=False)
    return whitened, returns


def compute_published_losses(
    model: Bigram,
    rollout: Rollout,
    old: Tensor,
    ref: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    policy = torch.zeros(()).double()
    value = torch.zeros(()).double()
    count = 0
    for b, t, previous_token, token in iter_response_tokens(rollout):
        log_p = torch.log(torch.softmax(model.logits[previous_token] / options["temperature"], 0)[token])
        ratio = torch.exp(log_p - old[b, t])
        advantage = advantages[b, t]
        low = 1 - options["clip_range"]
        high = 1 + options["clip_range"]
        policy = policy - min(ratio * advantage, torch.clip(ratio, low, high) * advantage)
        d = log_p - ref[b, t]
        policy = policy + options["kl_loss_coef"] * (torch.exp(-d) - 1 + d)
        v = model.value[previous_token]
        v_old = old_values[b, t]
        target = returns[b, t]
        reach = 0.2
        error = (v - target) ** 2
        if options["value_clip_range"] is not None:
            error = max(error, (torch.clip(v, v_old - reach, v_old + reach) - target) ** 2)
        value = value + 0.5 * error
        count += 1
    return policy / count, value / count


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("estimate", "loss"),
    [
        ({}, {}),
        ({"kl_estimator": "k3", "whiten_rewards": True, "gamma": 0.9}, {"value_clip_range": None}),
        ({"kl_in_reward": False, "bootstrap": True, "lam": 1.0}, {"kl_loss_coef": 0.3, "temperature": 1.0}),
    ],
)
def test_an_update_is_the_published_one(seed: int, estimate: dict[str, Any], loss: dict[str, Any]):
    estimate = {
        "kl_coef": 0.1,
        "kl_estimator": "k1",
        "kl_in_reward": True,
        "gamma": 1.0,
        "lam": 0.95,
        "whiten_rewards": False,
        "bootstrap": False,
    } | estimate
    loss = {
        "temperature": 0.7,
        "clip_range": 0.2,
        "value_clip_range": 0.2,
        "kl_loss_coef": 0.0,
    } | loss
    rollout = build_rollout(seed)
    sampler = Bigram(seed)
    reference = Bigram(seed + 10)
    learner = Bigram(seed)
    scores = torch.randn(ROWS, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    with torch.no_grad():
        old, ref = (m.logprobs("", rollout, loss["temperature"])[0] for m in (sampler, reference))
        values = sampler.values(rollout)
        bootstrap_values = sampler.value[get_last_tokens(rollout)] if estimate.pop("bootstrap") else None
        shift = Bigram(seed + 20)  # the learner has taken steps, so that ratios and values differ
        learner.logits.add_(0.3 * shift.logits)
        learner.value.add_(0.3 * shift.value)

    estimator = Estimator(gamma=estimate["gamma"], lam=estimate["lam"])
    options = {name: value for name, value in estimate.items() if name not in ("gamma", "lam")}
    experience, _ = assemble_experience(
        rollout, scores, old, ref, values, bootstrap_values, estimator=estimator, **options
    )
    advantages, returns = compute_published_advantages(rollout, scores, old, ref, values, bootstrap_values, estimate)
    assert_close(experience.advantages_BT, advantages, **CLOSE)
    assert_close(experience.returns_BT, returns, **CLOSE)

    losses = Losses(0.2, value_clip_range=loss["value_clip_range"], kl_coef=loss["kl_loss_coef"], kl_estimator="k3")
    figures = accumulate_gradients(learner, experience, micro_batch=3, temperature=loss["temperature"], losses=losses)
    policy, value = compute_published_losses(learner, rollout, old, ref, values, advantages, returns, loss)
    expected = torch.autograd.grad(policy + value, (learner.logits, learner.value))
    assert 0 < figures["clip_fraction"] < 1
    if not loss["kl_loss_coef"]:
        assert_close(torch.tensor(figures["policy_loss"]).double(), policy.detach(), **CLOSE)
    assert_close(learner.logits.grad, expected[0], **CLOSE)
    assert_close(learner.value.grad, expected[1], **CLOSE)
