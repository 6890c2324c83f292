"""The learner: a step's gradient follows the paper's formula for any split of the batch, and depends on no history."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_roles import World, build_ragged_rollout
from torch import Tensor, tensor
from torch.nn.functional import pad
from torch.testing import assert_close

from align.core.errors import InputError
from align.core.types import Rollout
from align.models.forward import compute_in_chunks, split_by_length
from align.models.roles import Roles
from align.ppo.experience import Estimator, Experience, assemble_experience, compute_estimates, pearson_r
from align.ppo.rollouts import choose_prompt_indices
from align.ppo.update import (
    Losses,
    accumulate_gradients,
    compute_lr_factor,
    split_minibatches,
    take_gradient_step,
    take_gradient_steps,
)
from align.rollout.engine import build_generator

CPU = torch.device("cpu")
TEMPERATURE = 0.8
LOSS: dict[str, Any] = {
    "micro_batch": 6,
    "temperature": TEMPERATURE,
    "losses": Losses(value_clip_range=0.3, kl_estimator="k3"),
}
ESTIMATE: dict[str, Any] = {
    "kl_coef": 0.2,
    "kl_estimator": "k1",
    "kl_in_reward": True,
    "estimator": Estimator(lam=1.0),
    "whiten_rewards": False,
}


@pytest.fixture(scope="module")
def shared(world: World) -> Roles:
    """Roles whose weights no test changes."""
    return world.roles()


def collect_experience(roles: Roles, rollout: Rollout, size: int = 6) -> Experience:
    def compute_logprobs(role: Any) -> Tensor:
        return compute_in_chunks(lambda part: roles.logprobs(role, part, TEMPERATURE)[0], rollout, size)

    scores = torch.randn(len(rollout.ended_B), generator=torch.Generator().manual_seed(3))
    values = compute_in_chunks(roles.values, rollout, size)
    return assemble_experience(
        rollout, scores, compute_logprobs("policy"), compute_logprobs("reference"), values, **ESTIMATE
    )[0]


@pytest.fixture(scope="module")
def fresh(shared: Roles) -> Experience:
    """Experience of the policy as it is, with prompts and responses of every length."""
    return collect_experience(shared, build_ragged_rollout())


@pytest.fixture(scope="module")
def stale(fresh: Experience) -> Experience:
    """Experience of another policy: ratios on both sides of the clip, values that have moved."""
    g = torch.Generator().manual_seed(4)
    mask = fresh.rollout.response_mask_BT
    changes = {n: torch.randn(mask.shape, generator=g) * 0.3 * mask for n in ("old_logprobs_BT", "values_BT")}
    return replace(fresh, **{n: getattr(fresh, n) + m for n, m in changes.items()})


def compute_gradients(
    roles: Roles, experience: Experience, **changes: Any
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Compute the gradients of one minibatch as a vector per role, and its metrics."""
    for role in ("policy", "value"):
        for parameter in roles.parameters_of(role):
            parameter.grad = None
    figures = accumulate_gradients(roles, experience, **(LOSS | changes))
    vectors = {
        role: torch.cat([p.grad.flatten() for p in roles.parameters_of(role) if p.grad is not None])
        for role in ("policy", "value")
    }
    return vectors, figures


def assert_same(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for role, vector in expected.items():
        assert vector.norm() > 1e-4
        assert (gradients[role] - vector).norm() / vector.norm() < 1e-5, role


# The first step.


def test_the_first_ratio_is_exactly_1_on_the_same_shapes(shared: Roles, fresh: Experience):
    _, figures = compute_gradients(shared, fresh)
    assert figures["ratio"] == 1
    assert figures["approx_kl"] == 0
    assert figures["clip_fraction"] == 0


def test_the_first_ratio_is_nearly_1_on_others(world: World):
    roles = world.roles()
    experience = collect_experience(roles, build_ragged_rollout(), size=4)
    optimiser = torch.optim.AdamW(roles.parameters_of("policy"), lr=1e-2)
    figures = take_gradient_steps(
        roles,
        optimiser,
        experience,
        epochs=2,
        minibatch_count=3,
        max_grad_norm=1.0,
        generator=torch.Generator().manual_seed(0),
        **(LOSS | {"micro_batch": 1}),
    )
    assert abs(figures["first_ratio"] - 1) < 1e-5
    assert figures["ratio"] != figures["first_ratio"]


@pytest.mark.parametrize("backbone", ["own", "policy", "frozen"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_the_pass_that_estimates_is_the_one_that_is_learned_from(world: World, backbone: str, epochs: int):
    """The graph is kept if the whole batch is one micro-batch, also when other roles run. Else it is built again."""
    rollout = build_ragged_rollout()
    changes = []
    passes = []
    for cached in (True, False):
        roles = world.roles(backbone=backbone)
        original_logprobs = roles.logprobs
        roles.logprobs = lambda *a, original_logprobs=original_logprobs, **k: (
            passes.append(a[0]) or original_logprobs(*a, **k)
        )
        rows = {"micro_batch": 6 if cached else 4, "minibatches": 1}
        estimates, kept_pass = compute_estimates(roles, rollout, temperature=TEMPERATURE, **rows)
        assert (kept_pass is not None) == cached
        assert estimates.last_values_B is None
        assert not any(t.requires_grad for t in estimates[:3])
        roles.scores(rollout)  # the reward model runs in between
        scores = torch.randn(6, generator=torch.Generator().manual_seed(3))
        experience, _ = assemble_experience(rollout, scores, *estimates, **ESTIMATE)
        optimiser = torch.optim.SGD([*roles.parameters_of("policy"), *roles.parameters_of("value")], lr=0.1)
        before = [p.detach().clone() for p in optimiser.param_groups[0]["params"]]
        figures = take_gradient_steps(
            roles,
            optimiser,
            experience,
            kept_pass,
            epochs=epochs,
            minibatch_count=1,
            max_grad_norm=1e9,
            generator=torch.Generator().manual_seed(0),
            **LOSS,
        )
        assert figures["first_ratio"] == pytest.approx(1, abs=1e-6)
        changes.append(
            torch.cat([(p - b).flatten() for p, b in zip(optimiser.param_groups[0]["params"], before, strict=True)])
        )
    assert passes.count("policy") == epochs + 2 + epochs  # kept: one an epoch; else two to estimate, and one an epoch
    assert (changes[0] - changes[1]).norm() < 1e-5 * changes[1].norm()


def test_the_first_gradient_is_reinforce_with_a_baseline(world: World, shared: Roles, fresh: Experience):
    """−Σ A · ∇ log π / tokens, on a policy loaded by itself and read one unpadded row at a time."""
    model = PeftModel.from_pretrained(world.load(), str(world.init), is_trainable=True).eval()
    rollout = fresh.rollout
    count = int(fresh.rollout.response_mask_BT.sum())
    for tokens, mask, length, advantages in zip(
        rollout.tokens_BS, rollout.mask_BS, rollout.lengths_B.tolist(), fresh.advantages_BT, strict=True
    ):
        ids = tokens[mask]
        log_p = (model(ids[None]).logits[0] / TEMPERATURE).log_softmax(-1)[-length - 1 : -1]
        picked = log_p[torch.arange(length), ids[-length:]]
        (-(advantages[:length] * picked).sum() / count).backward()
    expected = torch.cat([p.grad.flatten() for n, p in model.named_parameters() if p.requires_grad])
    gradients, _ = compute_gradients(shared, fresh)
    assert_same({"policy": gradients["policy"]}, {"policy": expected})


# Splits of the batch.


@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_do_not_change_the_gradient(shared: Roles, stale: Experience, micro_batch: int, kl_coef: float):
    losses = LOSS["losses"]._replace(kl_coef=kl_coef)
    expected, whole_figures = compute_gradients(shared, stale, losses=losses)
    gradients, figures = compute_gradients(shared, stale, losses=losses, micro_batch=micro_batch)
    assert 0 < whole_figures["clip_fraction"] < 1
    assert 0 < whole_figures["value_clip_fraction"] < 1
    assert_same(gradients, expected)
    assert figures == pytest.approx(whole_figures, rel=1e-4, abs=1e-6)


def test_padding_does_not_change_the_gradient(shared: Roles, stale: Experience, monkeypatch: pytest.MonkeyPatch):
    expected, _ = compute_gradients(shared, stale)
    rollout = stale.rollout
    wide = Rollout(
        pad(rollout.tokens_BS, (4, 3), value=9),
        pad(rollout.mask_BS, (4, 3), value=False),
        rollout.prompt_width + 4,
        rollout.ended_B,
    )
    tensors = {
        n: tensor for n in Experience.__slots__ if n.endswith("_BT") and (tensor := getattr(stale, n)) is not None
    }
    padded = Experience(wide, **{n: pad(tensor, (0, 3)) for n, tensor in tensors.items()})
    gradients, _ = compute_gradients(shared, padded)
    assert_same(gradients, expected)
    monkeypatch.setattr(Experience, "rows", lambda self, index: self)  # the same if no column is dropped
    gradients, _ = compute_gradients(shared, padded)
    assert_same(gradients, expected)


def test_each_role_is_clipped_by_its_own_norm(world: World, fresh: Experience):
    roles = world.roles()
    vectors, _ = compute_gradients(roles, fresh)
    norms = {role: float(v.norm()) for role, v in vectors.items()}
    limit = min(norms.values()) / 2
    parameters = {role: roles.parameters_of(role) for role in ("policy", "value")}
    before = {role: [p.detach().clone() for p in role_parameters] for role, role_parameters in parameters.items()}
    optimiser = torch.optim.SGD([p for role_parameters in parameters.values() for p in role_parameters], lr=1.0)
    figures = take_gradient_step(roles, optimiser, limit)
    for role, role_parameters in parameters.items():
        assert figures[f"{role}_grad_norm"] == pytest.approx(norms[role], rel=1e-5)
        moved = torch.cat(
            [(a - b.detach()).flatten() for a, b in zip(before[role], role_parameters, strict=True)]
        ).norm()
        assert float(moved) == pytest.approx(limit, rel=1e-3)
        assert all(p.grad is None for p in role_parameters)


def test_minibatches_divide_the_rows():
    parts = split_minibatches(12, 3, torch.Generator().manual_seed(0))
    assert [len(p) for p in parts] == [4, 4, 4]
    assert sorted(torch.cat(parts).tolist()) == list(range(12))
    assert torch.cat(parts).tolist() != list(range(12))


# Order and schedule.


def test_each_pass_sees_every_prompt_once():
    indices = [i for number in range(7) for i in choose_prompt_indices(number, 3, 7, seed=5)]
    passes = [indices[i : i + 7] for i in range(0, 21, 7)]
    assert all(sorted(p) == list(range(7)) for p in passes)
    assert len({tuple(p) for p in passes}) == 3  # each pass has its own order
    assert choose_prompt_indices(0, 21, 7, seed=5) == indices  # a batch of several passes
    assert [i for n in range(7) for i in choose_prompt_indices(n, 3, 7, seed=6)] != indices


def test_a_generator_is_a_function_of_its_place():
    def draw_number(*place: str | int, seed: int = 0) -> float:
        return torch.rand((), generator=build_generator(CPU, seed, *place)).item()

    first = draw_number("rollout", 3)
    torch.rand(5)
    other_numbers = [
        draw_number("rollout", 4),
        draw_number("minibatches", 3),
        draw_number("rollout", 3, seed=1),
        draw_number("rollout", "3"),
    ]
    assert draw_number("rollout", 3) == first
    assert len({first, *other_numbers}) == 5


def test_warmup_by_hand():
    assert [compute_lr_factor(n, 60, 0.05, "constant") for n in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert compute_lr_factor(0, 60, 0.0, "constant") == 1
    assert compute_lr_factor(0, 3, 0.05, "constant") == 1
    assert [compute_lr_factor(n, 6, 0.34, "linear") for n in range(6)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]
    )
    cosine = [1 / 2, 1, 0.5 + 3**0.5 / 4, 0.75, 0.5, 0.25, 0.5 - 3**0.5 / 4]
    assert [compute_lr_factor(n, 7, 0.15, "cosine") for n in range(7)] == pytest.approx(cosine)


def test_a_gradient_that_is_not_finite_is_no_step(world: World):
    roles = world.roles()
    optimiser = torch.optim.AdamW(roles.parameters_of("policy"), lr=0.1)
    before = [p.detach().clone() for p in roles.parameters_of("policy")]
    for parameter in roles.parameters_of("policy"):
        parameter.grad = torch.full_like(parameter, float("nan"))
    with pytest.raises(InputError, match="has diverged"):
        take_gradient_step(roles, optimiser, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, roles.parameters_of("policy"), strict=True))


# Experience by hand: two responses, of two tokens and of one; the second was cut.

BATCH = Rollout(tensor([[1, 5, 2], [1, 6, 0]]), tensor([[1, 1, 1], [1, 1, 0]]).bool(), 1, tensor([True, False]))
OLD = tensor([[-1.0, -2.0], [-3.0, 0.0]])
REF = tensor([[-1.5, -2.5], [-4.0, 0.0]])
VALUES = tensor([[1.0, 0.5], [1.0, float("nan")]])
SCORES = tensor([2.0, 4.0])


def assemble_by_hand(bootstrap: Tensor | None = None, **changes: Any) -> tuple[Experience, dict[str, float]]:
    return assemble_experience(BATCH, SCORES, OLD, REF, VALUES, bootstrap, **(ESTIMATE | changes))


def test_experience_by_hand():
    # KL .5 .5 | 1: rewards −.1 1.9 | 3.8, to go 1.8 1.9 | 3.8, advantages .8 1.4 | 2.8
    experience, figures = assemble_by_hand()
    assert_close(experience.returns_BT, tensor([[1.8, 1.9], [3.8, 0.0]]))
    spread = 0.7022222**0.5
    assert_close(
        experience.advantages_BT,
        tensor([[(0.8 - 5 / 3) / spread, (1.4 - 5 / 3) / spread], [(2.8 - 5 / 3) / spread, 0.0]]),
    )
    assert_close(experience.values_BT, tensor([[1.0, 0.5], [1.0, 0.0]]))
    assert figures == pytest.approx(
        {
            "kl": 1.0,
            "score": 3.0,
            "score_std": 1.0,
            "reward": 2.8,
            "length": 1.5,
            "eos_rate": 0.5,
            "score_length_correlation": -1.0,
            "value": 2.5 / 3,
            "explained_variance": 1 - 0.7022222 / 0.8466667,
        },
        abs=1e-5,
    )


def test_the_distance_of_sampler_and_learner_by_hand():
    """The mean of k3 over response tokens, without padding: exp(−d) − 1 + d for d = 0.5, 0 and −1."""
    sampler = OLD + tensor([[0.5, 0.0], [-1.0, 7.0]])
    _, figures = assemble_experience(replace(BATCH, logprobs_BT=sampler), SCORES, OLD, REF, VALUES, **ESTIMATE)
    assert figures["sampler_kl"] == pytest.approx((0.1065307 + 0.0 + 0.7182818) / 3, abs=1e-6)


def test_kl_in_the_loss_is_not_in_the_reward():
    experience, figures = assemble_by_hand(kl_in_reward=False)
    assert_close(experience.returns_BT, tensor([[2.0, 2.0], [4.0, 0.0]]))
    assert figures["reward"] == 3
    assert figures["kl"] == 1


def test_the_estimator_changes_the_reward_and_not_the_figure():
    experience, figures = assemble_by_hand(kl_estimator="k3")
    # exp(−d) − 1 + d
    k3_half = 0.1065307
    k3_one = 0.3678794
    assert_close(
        experience.returns_BT,
        tensor([[2 - 0.4 * k3_half, 2 - 0.2 * k3_half], [4 - 0.2 * k3_one, 0.0]]),
        atol=1e-5,
        rtol=0,
    )
    assert figures["kl"] == 1


def test_a_response_that_was_cut_may_be_bootstrapped():
    experience, _ = assemble_by_hand(tensor([9.0, 0.25]))
    # The second return is 3.8 plus the bootstrap value; the first response ended.
    assert_close(experience.returns_BT, tensor([[1.8, 1.9], [4.05, 0.0]]))


def test_whitened_rewards_keep_their_mean():
    # A gamma of 0 makes a return the reward itself.
    experience, figures = assemble_by_hand(whiten_rewards=True, estimator=Estimator(gamma=0.0, lam=1.0))
    returns = experience.returns_BT[BATCH.response_mask_BT]
    assert_close(returns.mean(), tensor(5.6 / 3))
    assert_close(returns.var(unbiased=False), tensor(1.0))
    assert figures["reward"] == pytest.approx(2.8)  # before whitening


def test_correlation_by_hand():
    assert_close(pearson_r(tensor([1.0, 2.0, 3.0]), tensor([2.0, 1.0, 3.0])), tensor(0.5))
    assert pearson_r(tensor([1.0, 1.0]), tensor([1.0, 2.0])) == 0


def test_chunks_come_back_in_order():
    rollout = build_ragged_rollout(rows=9, seed=8)
    shapes = []

    def get_masked_tokens(part: Rollout) -> Tensor:
        shapes.append(tuple(part.tokens_BS.shape))
        return part.response_BT * part.response_mask_BT

    assert torch.equal(compute_in_chunks(get_masked_tokens, rollout, 2), rollout.response_BT * rollout.response_mask_BT)
    assert [s[0] for s in shapes] == [2, 2, 2, 2, 1]
    assert shapes[0][1] < rollout.tokens_BS.shape[1]  # short rows are read without the padding of long ones
    assert torch.equal(compute_in_chunks(lambda part: part.lengths_B, rollout, 4), rollout.lengths_B)
    sizes = rollout.mask_BS.sum(-1)[torch.cat(list(split_by_length(rollout, 2)))]
    assert sizes.tolist() == sorted(sizes.tolist())
