"""The learner: a step's gradient is what the paper says however the batch is cut, and nothing depends on history."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_roles import World, make_world, ragged_rollout
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
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_tokenizer: Any) -> World:
    return make_world(tmp_path_factory.mktemp("world"), tiny_model, tiny_tokenizer)


@pytest.fixture(scope="module")
def shared(world: World) -> Roles:
    """Roles whose weights no test changes."""
    return world.roles()


def collected(roles: Roles, rollout: Rollout, size: int = 6) -> Experience:
    def logprobs(role: Any) -> Tensor:
        return compute_in_chunks(lambda part: roles.logprobs(role, part, TEMPERATURE)[0], rollout, size)

    scores = torch.randn(len(rollout.ended_B), generator=torch.Generator().manual_seed(3))
    values = compute_in_chunks(roles.values, rollout, size)
    return assemble_experience(rollout, scores, logprobs("policy"), logprobs("reference"), values, **ESTIMATE)[0]


@pytest.fixture(scope="module")
def fresh(shared: Roles) -> Experience:
    """Experience of the policy as it is, with prompts and responses of every length."""
    return collected(shared, ragged_rollout())


@pytest.fixture(scope="module")
def stale(fresh: Experience) -> Experience:
    """Experience of another policy: ratios on both sides of the clip, values that have moved."""
    g = torch.Generator().manual_seed(4)
    mask = fresh.rollout.response_mask_BT
    moved = {n: torch.randn(mask.shape, generator=g) * 0.3 * mask for n in ("old_logprobs_BT", "values_BT")}
    return replace(fresh, **{n: getattr(fresh, n) + m for n, m in moved.items()})


def gradient(roles: Roles, made: Experience, **changes: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What one minibatch adds to each role, as one vector a role; and its figures."""
    for role in ("policy", "value"):
        for parameter in roles.parameters_of(role):
            parameter.grad = None
    figures = accumulate_gradients(roles, made, **(LOSS | changes))
    vectors = {
        role: torch.cat([p.grad.flatten() for p in roles.parameters_of(role) if p.grad is not None])
        for role in ("policy", "value")
    }
    return vectors, figures


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for role, vector in expected.items():
        assert vector.norm() > 1e-4
        assert (found[role] - vector).norm() / vector.norm() < 1e-5, role


# The first step.


def test_the_first_ratio_is_exactly_1_on_the_same_shapes(shared: Roles, fresh: Experience):
    _, figures = gradient(shared, fresh)
    assert figures["ratio"] == 1
    assert figures["approx_kl"] == 0
    assert figures["clip_fraction"] == 0


def test_the_first_ratio_is_nearly_1_on_others(world: World):
    roles = world.roles()
    made = collected(roles, ragged_rollout(), size=4)
    optimiser = torch.optim.AdamW(roles.parameters_of("policy"), lr=1e-2)
    figures = take_gradient_steps(
        roles, optimiser, made, epochs=2, minibatch_count=3, max_grad_norm=1.0,
        generator=torch.Generator().manual_seed(0), **(LOSS | {"micro_batch": 1}),
    )  # fmt: skip
    assert abs(figures["first_ratio"] - 1) < 1e-5
    assert figures["ratio"] != figures["first_ratio"]


@pytest.mark.parametrize("backbone", ["own", "policy", "frozen"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_the_pass_that_estimates_is_the_one_that_is_learned_from(world: World, backbone: str, epochs: int):
    """Where the whole batch is one micro-batch its graph is kept, whoever plays in between; else it is made anew."""
    rollout, moved, passes = ragged_rollout(), [], []
    for cached in (True, False):
        roles = world.roles(backbone=backbone)
        taken = roles.logprobs
        roles.logprobs = lambda *a, taken=taken, **k: passes.append(a[0]) or taken(*a, **k)
        rows = {"micro_batch": 6 if cached else 4, "minibatches": 1}
        estimates, kept = compute_estimates(roles, rollout, temperature=TEMPERATURE, **rows)
        assert (kept is not None) == cached
        assert estimates.last_values_B is None
        assert not any(t.requires_grad for t in estimates[:3])
        roles.scores(rollout)  # the reward model plays
        scores = torch.randn(6, generator=torch.Generator().manual_seed(3))
        made, _ = assemble_experience(rollout, scores, *estimates, **ESTIMATE)
        optimiser = torch.optim.SGD([*roles.parameters_of("policy"), *roles.parameters_of("value")], lr=0.1)
        before = [p.detach().clone() for p in optimiser.param_groups[0]["params"]]
        figures = take_gradient_steps(
            roles, optimiser, made, kept, epochs=epochs, minibatch_count=1, max_grad_norm=1e9,
            generator=torch.Generator().manual_seed(0), **LOSS,
        )  # fmt: skip
        assert figures["first_ratio"] == pytest.approx(1, abs=1e-6)
        moved.append(
            torch.cat([(p - b).flatten() for p, b in zip(optimiser.param_groups[0]["params"], before, strict=True)])
        )
    assert passes.count("policy") == epochs + 2 + epochs  # kept: one an epoch; else two to estimate, and one an epoch
    assert (moved[0] - moved[1]).norm() < 1e-5 * moved[1].norm()


def test_the_first_gradient_is_reinforce_with_a_baseline(world: World, shared: Roles, fresh: Experience):
    """−Σ A · ∇ log π / tokens, on a policy loaded by itself and read one unpadded row at a time."""
    model = PeftModel.from_pretrained(world.load(), str(world.init), is_trainable=True).eval()
    rollout, count = fresh.rollout, int(fresh.rollout.response_mask_BT.sum())
    for tokens, mask, length, advantages in zip(
        rollout.tokens_BS, rollout.mask_BS, rollout.lengths_B.tolist(), fresh.advantages_BT, strict=True
    ):
        ids = tokens[mask]
        log_p = (model(ids[None]).logits[0] / TEMPERATURE).log_softmax(-1)[-length - 1 : -1]
        picked = log_p[torch.arange(length), ids[-length:]]
        (-(advantages[:length] * picked).sum() / count).backward()
    expected = torch.cat([p.grad.flatten() for n, p in model.named_parameters() if p.requires_grad])
    found, _ = gradient(shared, fresh)
    assert_same({"policy": found["policy"]}, {"policy": expected})


# However the batch is cut.


@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_do_not_change_the_gradient(shared: Roles, stale: Experience, micro_batch: int, kl_coef: float):
    losses = LOSS["losses"]._replace(kl_coef=kl_coef)
    expected, whole = gradient(shared, stale, losses=losses)
    found, figures = gradient(shared, stale, losses=losses, micro_batch=micro_batch)
    assert 0 < whole["clip_fraction"] < 1
    assert 0 < whole["value_clip_fraction"] < 1
    assert_same(found, expected)
    assert figures == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_padding_does_not_change_the_gradient(shared: Roles, stale: Experience, monkeypatch: pytest.MonkeyPatch):
    expected, _ = gradient(shared, stale)
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
    found, _ = gradient(shared, padded)
    assert_same(found, expected)
    monkeypatch.setattr(Experience, "rows", lambda self, index: self)  # and where no column is dropped
    found, _ = gradient(shared, padded)
    assert_same(found, expected)


def test_each_role_is_clipped_by_its_own_norm(world: World, fresh: Experience):
    roles = world.roles()
    vectors, _ = gradient(roles, fresh)
    norms = {role: float(v.norm()) for role, v in vectors.items()}
    limit = min(norms.values()) / 2
    everything = {role: roles.parameters_of(role) for role in ("policy", "value")}
    before = {role: [p.detach().clone() for p in ps] for role, ps in everything.items()}
    optimiser = torch.optim.SGD([p for ps in everything.values() for p in ps], lr=1.0)
    figures = take_gradient_step(roles, optimiser, limit)
    for role, ps in everything.items():
        assert figures[f"{role}_grad_norm"] == pytest.approx(norms[role], rel=1e-5)
        moved = torch.cat([(a - b.detach()).flatten() for a, b in zip(before[role], ps, strict=True)]).norm()
        assert float(moved) == pytest.approx(limit, rel=1e-3)
        assert all(p.grad is None for p in ps)


def test_minibatches_divide_the_rows():
    parts = split_minibatches(12, 3, torch.Generator().manual_seed(0))
    assert [len(p) for p in parts] == [4, 4, 4]
    assert sorted(torch.cat(parts).tolist()) == list(range(12))
    assert torch.cat(parts).tolist() != list(range(12))


# What happens when.


def test_each_pass_sees_every_prompt_once():
    seen = [i for number in range(7) for i in choose_prompt_indices(number, 3, 7, seed=5)]
    passes = [seen[i : i + 7] for i in range(0, 21, 7)]
    assert all(sorted(p) == list(range(7)) for p in passes)
    assert len({tuple(p) for p in passes}) == 3  # each in an order of its own
    assert choose_prompt_indices(0, 21, 7, seed=5) == seen  # a batch of several passes
    assert [i for n in range(7) for i in choose_prompt_indices(n, 3, 7, seed=6)] != seen


def test_a_generator_is_a_function_of_its_place():
    def drawn(*where: str | int, seed: int = 0) -> float:
        return torch.rand((), generator=build_generator(CPU, seed, *where)).item()

    first = drawn("rollout", 3)
    torch.rand(5)
    others = [drawn("rollout", 4), drawn("minibatches", 3), drawn("rollout", 3, seed=1), drawn("rollout", "3")]
    assert drawn("rollout", 3) == first
    assert len({first, *others}) == 5


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

BATCH = Rollout(
    tensor([[1, 5, 2], [1, 6, 0]]), tensor([[1, 1, 1], [1, 1, 0]]).bool(), 1, tensor([True, False])
)  # fmt: skip
OLD, REF = tensor([[-1.0, -2.0], [-3.0, 0.0]]), tensor([[-1.5, -2.5], [-4.0, 0.0]])
VALUES, SCORES = tensor([[1.0, 0.5], [1.0, float("nan")]]), tensor([2.0, 4.0])


def by_hand(behind: Tensor | None = None, **changes: Any) -> tuple[Experience, dict[str, float]]:
    return assemble_experience(BATCH, SCORES, OLD, REF, VALUES, behind, **(ESTIMATE | changes))


def test_experience_by_hand():
    made, figures = by_hand()  # KL .5 .5 | 1: rewards −.1 1.9 | 3.8, to go 1.8 1.9 | 3.8, advantages .8 1.4 | 2.8
    assert_close(made.returns_BT, tensor([[1.8, 1.9], [3.8, 0.0]]))
    spread = 0.7022222**0.5
    assert_close(
        made.advantages_BT, tensor([[(0.8 - 5 / 3) / spread, (1.4 - 5 / 3) / spread], [(2.8 - 5 / 3) / spread, 0.0]])
    )
    assert_close(made.values_BT, tensor([[1.0, 0.5], [1.0, 0.0]]))
    assert figures == pytest.approx(
        {
            "kl": 1.0, "score": 3.0, "score_std": 1.0, "reward": 2.8, "length": 1.5, "eos_rate": 0.5,
            "score_length_correlation": -1.0, "value": 2.5 / 3, "explained_variance": 1 - 0.7022222 / 0.8466667,
        },
        abs=1e-5,
    )  # fmt: skip


def test_the_distance_of_sampler_and_learner_by_hand():
    """k3 of each token, and not of what stands behind a response: exp(−d) − 1 + d for d = 0.5, 0 and −1."""
    sampler = OLD + tensor([[0.5, 0.0], [-1.0, 7.0]])
    _, figures = assemble_experience(replace(BATCH, logprobs_BT=sampler), SCORES, OLD, REF, VALUES, **ESTIMATE)
    assert figures["sampler_kl"] == pytest.approx((0.1065307 + 0.0 + 0.7182818) / 3, abs=1e-6)


def test_kl_in_the_loss_is_not_in_the_reward():
    made, figures = by_hand(kl_in_reward=False)
    assert_close(made.returns_BT, tensor([[2.0, 2.0], [4.0, 0.0]]))
    assert figures["reward"] == 3
    assert figures["kl"] == 1


def test_the_estimator_changes_the_reward_and_not_the_figure():
    made, figures = by_hand(kl_estimator="k3")
    k3_half, k3_one = 0.1065307, 0.3678794  # exp(−d) − 1 + d
    assert_close(
        made.returns_BT, tensor([[2 - 0.4 * k3_half, 2 - 0.2 * k3_half], [4 - 0.2 * k3_one, 0.0]]), atol=1e-5, rtol=0
    )
    assert figures["kl"] == 1


def test_a_response_that_was_cut_may_be_bootstrapped():
    made, _ = by_hand(tensor([9.0, 0.25]))
    assert_close(made.returns_BT, tensor([[1.8, 1.9], [4.05, 0.0]]))  # 3.8 and V behind; the first one ended


def test_whitened_rewards_keep_their_mean():
    made, figures = by_hand(
        whiten_rewards=True, estimator=Estimator(gamma=0.0, lam=1.0)
    )  # a return is then the reward itself
    returns = made.returns_BT[BATCH.response_mask_BT]
    assert_close(returns.mean(), tensor(5.6 / 3))
    assert_close(returns.var(unbiased=False), tensor(1.0))
    assert figures["reward"] == pytest.approx(2.8)  # as it was earned


def test_correlation_by_hand():
    assert_close(pearson_r(tensor([1.0, 2.0, 3.0]), tensor([2.0, 1.0, 3.0])), tensor(0.5))
    assert pearson_r(tensor([1.0, 1.0]), tensor([1.0, 2.0])) == 0


def test_chunks_come_back_in_order():
    rollout = ragged_rollout(rows=9, seed=8)
    shapes = []

    def tokens(part: Rollout) -> Tensor:
        shapes.append(tuple(part.tokens_BS.shape))
        return part.response_BT * part.response_mask_BT

    assert torch.equal(compute_in_chunks(tokens, rollout, 2), rollout.response_BT * rollout.response_mask_BT)
    assert [s[0] for s in shapes] == [2, 2, 2, 2, 1]
    assert shapes[0][1] < rollout.tokens_BS.shape[1]  # short rows are read without the padding of long ones
    assert torch.equal(compute_in_chunks(lambda part: part.lengths_B, rollout, 4), rollout.lengths_B)
    sizes = rollout.mask_BS.sum(-1)[torch.cat(list(split_by_length(rollout, 2)))]
    assert sizes.tolist() == sorted(sizes.tolist())
