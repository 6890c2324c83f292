"""The maths of PPO, compared with numbers worked out by hand and with plain definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn, tensor
from torch.testing import assert_close

from align.ops.gae import compute_token_rewards, gae
from align.ops.kl import kl_k1, kl_k3, update_kl_coef
from align.ops.logprobs import linear_logprobs, token_logprobs
from align.ops.losses import compute_explained_variance, kl_loss, policy_loss, value_loss
from align.ops.masking import masked_mean, masked_sum, masked_whiten

NAN = math.nan
MASK = tensor([[True, True, True], [True, False, False]])


def draw_ragged(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
    """Draw rewards and values of responses with 1 to `width` tokens. Returns also their mask and the generator."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=generator)
    rewards, values = (torch.randn(rows, width, generator=generator, dtype=torch.double) for _ in range(2))
    return rewards, values, mask, generator


# Masks: True marks a token that counts.


def test_masked_statistics_by_hand():
    x = tensor([[1.0, 2.0, 3.0], [6.0, NAN, NAN]])
    assert masked_sum(x, MASK) == 12
    assert masked_mean(x, MASK) == 3
    with pytest.raises(ValueError, match="over nothing"):
        masked_mean(x, torch.zeros_like(MASK))


def test_whitened_advantages_are_centred_and_scaled():
    x = tensor([[1.0, 2.0, 3.0], [6.0, NAN, NAN]])
    unit = 1 / math.sqrt(3.5)  # the variance is (4 + 1 + 0 + 9) / 4
    assert_close(masked_whiten(x, MASK), tensor([[-2 * unit, -unit, 0.0], [3 * unit, 0.0, 0.0]]))


def test_whitened_rewards_keep_their_mean():
    x = tensor([[1.0, 2.0, 3.0], [6.0, NAN, NAN]])
    unit = 1 / math.sqrt(3.5)
    white = masked_whiten(x, MASK, shift_mean=False)
    assert_close(white, tensor([[3 - 2 * unit, 3 - unit, 3.0], [3 + 3 * unit, 0.0, 0.0]]))


def test_whitening_what_does_not_vary_gives_zeros():
    assert_close(masked_whiten(torch.full((2, 3), 5.0), MASK), torch.zeros(2, 3))


# KL estimators and their coefficient.


def test_kl_estimators_by_hand():
    logprobs = tensor([-1.0, -2.0, -0.5])
    ref = tensor([-2.0, -1.0, -0.5])
    assert_close(kl_k1(logprobs, ref), tensor([1.0, -1.0, 0.0]))
    assert_close(kl_k3(logprobs, ref), tensor([math.exp(-1), math.e - 2, 0.0]))


def test_k3_is_never_negative_and_has_the_mean_of_k1():
    g = torch.Generator().manual_seed(0)
    log_p, log_q = (torch.randn(32, generator=g, dtype=torch.double).log_softmax(-1) for _ in range(2))
    assert (kl_k3(log_p, log_q) >= 0).all()
    assert (kl_k3(tensor([-1.0, -1.0]), tensor([-1.0 - 1e-6, -1.0 + 1e-6])) >= 0).all()  # where cancellation bites
    true_kl = (log_p.exp() * (log_p - log_q)).sum()
    assert_close((log_p.exp() * kl_k1(log_p, log_q)).sum(), true_kl)
    assert_close((log_p.exp() * kl_k3(log_p, log_q)).sum(), true_kl)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 64 / 10_000)),
        (5.4, 0.1 * (1 - 0.1 * 64 / 10_000)),
        (600.0, 0.1 * (1 + 0.2 * 64 / 10_000)),  # the error is clipped to 0.2
        (0.0, 0.1 * (1 - 0.2 * 64 / 10_000)),
        (-5.0, 0.1 * (1 - 0.2 * 64 / 10_000)),
    ],
)
def test_adaptive_coefficient_by_hand(kl: float, expected: float):
    assert update_kl_coef(0.1, kl, target=6.0, horizon=10_000.0, samples=64) == pytest.approx(expected, rel=1e-12)


# Rewards and advantages.


def test_token_rewards_by_hand():
    kl = tensor([[1.0, -2.0, 3.0], [4.0, NAN, NAN]])
    rewards = compute_token_rewards(tensor([10.0, 20.0]), kl, MASK, kl_coef=0.5)
    assert_close(rewards, tensor([[-0.5, 1.0, 8.5], [18.0, 0.0, 0.0]]))


def test_a_score_needs_a_token():
    with pytest.raises(ValueError, match="without tokens"):
        compute_token_rewards(tensor([1.0]), torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool), 0.1)


def test_gae_by_hand():
    rewards = tensor([[1.0, 2.0, NAN]])
    values = tensor([[0.5, 1.0, NAN]])
    mask = tensor([[True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    # δ1 = 2 − 1 = 1;  δ0 = 1 + 0.5·1 − 0.5 = 1;  A0 = 1 + 0.25·1
    assert_close(advantages, tensor([[1.25, 1.0, 0.0]]))
    assert_close(returns, tensor([[1.75, 2.0, 0.0]]))
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5, bootstrap_B=tensor([4.0]))
    # δ1 = 2 + 0.5·4 − 1 = 3;  A0 = 1 + 0.25·3
    assert_close(advantages, tensor([[1.75, 3.0, 0.0]]))
    assert_close(returns, tensor([[2.25, 4.0, 0.0]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.99, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("bootstrapped", [False, True])
def test_gae_is_its_definition(gamma: float, lam: float, bootstrapped: bool):
    rewards, values, mask, g = draw_ragged(rows=9, width=7, seed=1)
    bootstrap = torch.randn(9, generator=g, dtype=torch.double) if bootstrapped else torch.zeros(9, dtype=torch.double)
    expected = torch.zeros_like(values)
    for b in range(9):
        length = int(mask[b].sum())
        v = [*values[b, :length].tolist(), bootstrap[b].item()]
        delta = [rewards[b, t].item() + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected[b, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
    advantages, returns = gae(rewards, values, mask, gamma, lam, bootstrap if bootstrapped else None)
    assert_close(advantages, expected)
    assert_close(returns[mask], (expected + values)[mask])
    assert (returns[~mask] == 0).all()


@pytest.mark.parametrize("bootstrapped", [False, True])
def test_garbage_behind_a_response_changes_nothing(bootstrapped: bool):
    rewards, values, mask, g = draw_ragged(rows=6, width=5, seed=3)
    bootstrap = torch.randn(6, generator=g, dtype=torch.double) if bootstrapped else None
    clean = gae(rewards, values, mask, 0.9, 0.8, bootstrap)
    dirty = gae(rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN), mask, 0.9, 0.8, bootstrap)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert (a[~mask] == 0).all()


# Losses.


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside: d(−ρA)/d log π = −ρA
        (1.5, 2.0, -2.4, 0.0),  # above, and good: clipped, no gradient
        (1.5, -2.0, 3.0, 3.0),  # above, and bad: free to come back
        (0.5, 2.0, -1.0, -1.0),  # below, and good: free to come back
        (0.5, -2.0, 1.6, 0.0),  # below, and bad: clipped
    ],
)
def test_policy_loss_by_hand(ratio: float, advantage: float, loss: float, slope: float):
    logprobs = tensor([[-1.0 + math.log(ratio)]], requires_grad=True)
    output = policy_loss(logprobs, tensor([[-1.0]]), tensor([[advantage]]), tensor([[True]]), 0.2, divisor=1.0)
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    assert_close(output.loss, tensor(loss))
    assert_close(gradient, tensor([[slope]]))
    assert output.sums["clip_fraction"] == float(slope == 0)
    assert_close(output.sums["ratio"], tensor(ratio))
    assert_close(output.sums["approx_kl"], tensor(ratio - 1 - math.log(ratio)))


def test_losses_are_sums_over_the_mask_divided_by_the_count_given():
    old = torch.zeros(2, 3)
    advantages = tensor([[1.0, 2.0, 3.0], [4.0, NAN, NAN]])
    output = policy_loss(torch.zeros(2, 3), old, advantages, MASK, 0.2, divisor=8.0)
    assert output.loss == -10 / 8
    assert output.sums["ratio"] == 4
    output = value_loss(tensor([[2.0, 2.0, 2.0], [2.0, NAN, NAN]]), old, advantages, MASK, count=8.0)
    assert output.loss == 0.5 * (1 + 0 + 1 + 4) / 8
    assert output.sums["value_error"] == 6
    assert kl_loss(tensor([[1.0, 2.0, 3.0], [4.0, NAN, NAN]]), MASK, divisor=8.0) == 10 / 8


def test_garbage_outside_the_mask_reaches_no_gradient():
    dirty = torch.zeros(2, 3).masked_fill(~MASK, NAN)
    logprobs = dirty.clone().requires_grad_()
    values = dirty.clone().requires_grad_()
    policy_loss(logprobs, dirty, dirty + 1, MASK, 0.2, 4.0).loss.backward()
    value_loss(values, dirty, dirty + 1, MASK, 4.0, clip_range=0.1).loss.backward()
    assert_close(logprobs.grad, torch.where(MASK, -0.25, 0.0))
    assert_close(values.grad, torch.where(MASK, -0.25, 0.0))


@pytest.mark.parametrize("clip_range", [None, 0.2, 2.0])  # 0.2: the bounded 1.2 errs less, and the larger error counts
def test_value_loss_by_hand(clip_range: float | None):
    values = tensor([[1.5]], requires_grad=True)
    output = value_loss(values, tensor([[1.0]]), tensor([[1.0]]), tensor([[True]]), 1.0, clip_range)
    (gradient,) = torch.autograd.grad(output.loss, values)
    assert_close(output.loss, tensor(0.125))
    assert_close(gradient, tensor([[0.5]]))
    assert output.sums["value_clip_fraction"] == 0


def test_values_that_moved_too_far_earn_no_more():
    values = tensor([[1.5]], requires_grad=True)  # towards R = 2, but from 1 only 1.2 may count
    output = value_loss(values, tensor([[1.0]]), tensor([[2.0]]), tensor([[True]]), 1.0, clip_range=0.2)
    (gradient,) = torch.autograd.grad(output.loss, values)
    assert_close(output.loss, tensor(0.5 * 0.8**2))
    assert gradient == 0
    assert output.sums["value_clip_fraction"] == 1
    assert_close(output.sums["value_error"], tensor(0.25))


def test_explained_variance_by_hand():
    returns = tensor([[0.0, 2.0, 4.0], [6.0, NAN, NAN]])  # variance 5
    assert compute_explained_variance(returns + 7, returns, MASK) == 1  # a constant offset is not variance
    assert compute_explained_variance(torch.zeros(2, 3), returns, MASK) == 0
    values = tensor([[1.0, 1.0, 5.0], [5.0, NAN, NAN]])  # residuals −1, 1, −1, 1
    assert_close(compute_explained_variance(values, returns, MASK), tensor(0.8))
    assert compute_explained_variance(values, torch.ones(2, 3), MASK) == 0  # returns that do not vary


# Logprobs from hidden states.


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [4, 64])  # 11 rows: several chunks with a ragged last one, or one
def test_token_logprobs_are_those_of_log_softmax(temperature: float, chunk: int):
    torch.manual_seed(0)
    head = nn.Linear(8, 21, bias=False)
    hidden = torch.randn(11, 8)
    targets = torch.randint(21, (11,))
    weights = torch.randn(11)

    def compute_gradients(logprobs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((logprobs * weights).sum(), (h, head.weight))

    h = hidden.clone().requires_grad_()
    chunked_logprobs, entropy = token_logprobs(h, targets, head, temperature, chunk)
    chunked_gradients = compute_gradients(chunked_logprobs)
    log_p = (head(h) / temperature).log_softmax(-1)
    expected = log_p[torch.arange(11), targets]
    assert_close(chunked_logprobs, expected)
    assert_close(entropy, torch.distributions.Categorical(logits=log_p).entropy())
    assert not entropy.requires_grad
    assert_close(chunked_gradients, compute_gradients(expected))
    with torch.no_grad():
        inference_logprobs, _ = token_logprobs(hidden, targets, head, temperature, chunk)
    assert torch.equal(inference_logprobs, chunked_logprobs)


def test_token_logprobs_of_half_precision_are_fp32():
    torch.manual_seed(0)
    head = nn.Linear(8, 21, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(3, 8, dtype=torch.bfloat16)
    logprobs, entropy = token_logprobs(hidden, tensor([0, 5, 20]), head)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert_close(logprobs, head(hidden).float().log_softmax(-1)[torch.arange(3), tensor([0, 5, 20])])


# Logprobs of a head that is a matrix.


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_linear_logprobs_are_token_logprobs(temperature: float, chunk: int | None):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(23, 7, generator=g, dtype=torch.double)
    targets = torch.randint(0, 23, (11,), generator=g)
    hidden = torch.randn(11, 7, generator=g, dtype=torch.double).float()
    weight = weight.float()
    upstream = torch.randn(11, generator=g)
    linear_results = []
    token_results = []
    for results, function in (
        (linear_results, lambda h: linear_logprobs(h, targets, weight, temperature, chunk)),
        (token_results, lambda h: token_logprobs(h, targets, lambda x: x @ weight.T, temperature, chunk)),
    ):
        h = hidden.clone().requires_grad_()
        logprobs, entropy = function(h)
        (logprobs * upstream).sum().backward()
        assert not entropy.requires_grad
        results += [logprobs.detach(), entropy.detach(), h.grad]
    for a, b in zip(linear_results, token_results, strict=True):
        assert_close(a, b, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert_close(
            linear_logprobs(hidden, targets, weight, temperature, chunk)[0], token_results[0], atol=1e-5, rtol=1e-5
        )


def make_hidden_states(p: float, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Make a hidden state per target under which the target has probability `p` in fp64, in the dtype of `weight`."""
    wide = weight.double()
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(len(targets), wide.shape[1], generator=generator, dtype=torch.double) / wide.shape[1] ** 0.5
    low = torch.full((len(targets), 1), -5.0, dtype=torch.double)
    high = -low
    for _ in range(60):
        middle = (low + high) / 2
        logits = (start + middle * wide[targets]) @ wide.T / temperature
        too_high = logits.softmax(-1).gather(1, targets[:, None]) > p
        high = torch.where(too_high, middle, high)
        low = torch.where(too_high, low, middle)
    return (start + low * wide[targets]).to(weight.dtype)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_errs_no_more_than_autograds(dtype: torch.dtype, temperature: float, p: float):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 64, generator=generator).to(dtype)
    targets = torch.randint(512, (256,), generator=generator)
    hidden = make_hidden_states(p, weight, targets, temperature)
    upstream = torch.rand(256, generator=generator) + 0.1

    def compute_gradient(h: Tensor, weight: Tensor, factor: Tensor, ours: bool) -> Tensor:
        h = h.clone().requires_grad_()
        if ours:
            logprobs = linear_logprobs(h, targets, weight, temperature)[0]
        else:
            logits = nn.functional.linear(h, weight)
            logits = logits if logits.dtype == torch.double else logits.float()
            logprobs = (logits / temperature).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        (logprobs * factor).sum().backward()
        assert h.grad is not None
        return h.grad.double()

    # A weight of its own for each token costs ours one more rounding to `dtype`: a quarter of its epsilon on average.
    # The order of fp32 sums is the library's.
    order = 4 * torch.finfo(torch.float32).eps
    for factor, rounding in ((torch.ones(256), order), (upstream, order + torch.finfo(dtype).eps / 4)):
        exact = compute_gradient(hidden.double(), weight.double(), factor.double(), ours=False)
        errors = [
            float(((compute_gradient(hidden, weight, factor, ours) - exact).norm(dim=1) / exact.norm(dim=1)).mean())
            for ours in (True, False)
        ]
        assert errors[0] <= 1.05 * errors[1] + rounding, (errors, rounding)
