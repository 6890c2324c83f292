"""Facts that hold of a correct PPO, measured on the user's own model, settings and precision.

What a run computes is compared with the same on a plain route (logits of one row at a time without padding, sums over
tokens written out), with itself cut another way, and with identities that the first step must satisfy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.core.types import Rollout
from align.models.backbone import base_model
from align.models.chunks import by_length
from align.models.fastpath import without_fast_path
from align.models.plain_path import decoder_of
from align.models.roles import CachedForward, Roles
from align.ops.advantages import EPSILON
from align.ops.losses import value_loss
from align.ppo.advantages import Estimator
from align.ppo.experience import Experience, estimated, experience
from align.ppo.update import Losses, accumulate, gradient_step
from align.ppo.verify.anchors import Anchor


@dataclass(frozen=True)
class Setting:
    """The user's own model in its roles, a batch that its policy sampled, and how they learn from it.

    Attributes:
        micro_batch: fewer rows than the batch has.
        loose: True where it computes in less than fp32: identities then hold to its rounding alone.
        experience_arguments: what `experience` takes.
        losses: what is minimised.
        bootstrap: whether responses that were cut are worth the value behind them.
    """

    roles: Roles
    rollout: Rollout
    temperature: float
    micro_batch: int
    loose: bool
    experience_arguments: dict[str, Any]
    losses: Losses
    bootstrap: bool = False

    @property
    def scores_B(self) -> Tensor:
        """Drawn at random: what the answers earn is of no account here."""
        drawn = torch.randn(len(self.rollout.ended_B), generator=torch.Generator().manual_seed(0))
        return drawn.to(self.rollout.tokens_BS.device)

    def experience(self, micro_batch: int | None = None) -> tuple[Experience, CachedForward | None]:
        """The batch as the learner reads it; and the passes behind it, where they are kept."""
        estimates, cached = estimated(
            self.roles, self.rollout, temperature=self.temperature, micro_batch=micro_batch or self.micro_batch,
            minibatches=1, bootstrap=self.bootstrap,
        )  # fmt: skip
        return experience(self.rollout, self.scores_B, *estimates, **self.experience_arguments)[0], cached

    def gradients(
        self, made: Experience, micro_batch: int, cached: CachedForward | None = None
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """What one minibatch adds to each role, as one vector a role; and its figures. Nothing is left behind."""
        figures = accumulate(
            self.roles, made, cached, micro_batch=micro_batch, temperature=self.temperature, losses=self.losses
        )
        return {role: taken(self.roles, role) for role in self.roles.trainable}, figures

    def without_fast_path(self) -> AbstractContextManager[None]:
        """With transformers' and PEFT's own forwards, backward passes too: these may make layers again."""
        return without_fast_path(self.roles.model, self.roles.policy)

    def within(self, exact: float, rounded: float) -> float:
        """A tolerance."""
        return rounded if self.loose else exact


def on_model(setting: Setting, draw: Callable[[], Rollout]) -> Iterator[Anchor]:
    """The anchors on the user's own model; without a critic, those of the policy alone."""
    yield first_ratio(setting)
    yield by_definition(setting)
    yield first_gradient(setting)
    if "value" in setting.roles.trainable:
        yield value_gradient(setting)
    yield invariance(setting)
    yield isolation(setting)
    yield sampling(setting, draw)


def taken(roles: Roles, role: str) -> Tensor:
    """A role's gradient as one vector; it is cleared."""
    parameters = roles.parameters_of(role)
    vector = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return vector


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; NaN where nothing was expected, which no tolerance admits."""
    return float((found - expected).norm() / expected.norm()) if expected.norm() > 0 else math.nan


# The plain route: transformers' own forward of one row, no padding, every logit.


def plain_logprobs(setting: Setting, role: str, row: int, train: bool = False) -> Tensor:
    """log p of a row's response tokens [T]."""
    ids, length = tokens_of(setting.rollout, row)
    with setting.roles.use(role, train) as model, torch.set_grad_enabled(train):
        logits = base_model(model)(input_ids=ids).logits[0, -length - 1 : -1].float()
        log_p = (logits / setting.temperature).log_softmax(-1)
        return log_p.gather(-1, ids[0, -length:, None]).squeeze(-1)


def plain_values(setting: Setting, row: int, train: bool = False) -> Tensor:
    """V of the state before each of a row's response tokens, and of the one behind the last [T + 1]."""
    ids, length = tokens_of(setting.rollout, row)
    roles = setting.roles
    trained = train and roles.value_backbone == "value"
    assert roles.value_head is not None
    with roles.use(roles.value_backbone, trained) as model, torch.set_grad_enabled(trained):
        states = decoder_of(model)(input_ids=ids).last_hidden_state[0, -length - 1 :].float()
    roles.value_head.requires_grad_(train)
    with torch.set_grad_enabled(train):
        return roles.value_head(states).squeeze(-1)


def tokens_of(rollout: Rollout, row: int) -> tuple[Tensor, int]:
    """A row's real tokens [1, S], and how many of them are its response."""
    return rollout.tokens_BS[row][rollout.mask_BS[row]][None], int(rollout.response_mask_BT[row].sum())


class Targets(NamedTuple):
    """What the batch teaches, token by token, all rows one after another [N]; returns where a critic learns them."""

    old: Tensor
    advantages: Tensor
    returns: Tensor | None = None


def targets(setting: Setting) -> Targets:
    """From logprobs and values to advantages and returns, by their definitions, in fp64."""
    rollout, given = setting.rollout, setting.experience_arguments
    rows = range(len(rollout.ended_B))
    old = [plain_logprobs(setting, "policy", b).double() for b in rows]
    gaps = [a - plain_logprobs(setting, "reference", b).double() for b, a in enumerate(old)]
    kl = [d if given["kl_estimator"] == "k1" else (-d).exp() - 1 + d for d in gaps]
    rewards = [(-given["kl_coef"] if given["kl_in_reward"] else 0.0) * k for k in kl]
    for row, score in zip(rewards, setting.scores_B.double(), strict=True):
        row[-1] += score
    if given["whiten_rewards"]:
        every = torch.cat(rewards)
        rewards = [(r - every.mean()) / every.std(unbiased=False) + every.mean() for r in rewards]
    estimator: Estimator = given["estimator"]
    if not estimator.has_critic:
        return Targets(torch.cat(old), torch.cat(without_critic(estimator, rewards)))
    advantages, returns = [], []
    for b, paid in enumerate(rewards):
        values = plain_values(setting, b).double()
        values[-1] *= setting.bootstrap and not bool(rollout.ended_B[b])
        surprise = paid + estimator.gamma * values[1:] - values[:-1]
        advantages.append(faded(surprise, estimator.gamma * estimator.lam))
        returns.append(advantages[-1] + values[:-1])
    return Targets(torch.cat(old), whitened(torch.cat(advantages)), torch.cat(returns))


def without_critic(estimator: Estimator, rewards: Sequence[Tensor]) -> list[Tensor]:
    """The advantages of each row's tokens, an answer compared with the others of its group one by one.

    Args:
        rewards: of each row's tokens.
    """
    size = estimator.group_size
    earned = [float(paid.sum()) for paid in rewards]
    groups = [earned[first : first + size] for first in range(0, len(earned), size)]
    if estimator.name == "reinforce_pp":
        ahead = [faded(paid, estimator.gamma) for paid in rewards]
        if size > 1:
            ahead = [row - sum(groups[b // size]) / size for b, row in enumerate(ahead)]
        return list(whitened(torch.cat(ahead)).split([len(row) for row in rewards]))
    told = []
    for b, reward in enumerate(earned):
        group = groups[b // size]
        if estimator.name == "rloo":
            others = [other for k, other in enumerate(group) if k != b % size]
            told.append(reward - sum(others) / len(others))
            continue
        spreads = {"group": group, "batch": earned}
        spread = statistics.stdev(spreads[estimator.scale]) + EPSILON if estimator.scale in spreads else 1.0
        told.append((reward - sum(group) / size) / spread)
    return [torch.full_like(paid, one) for paid, one in zip(rewards, told, strict=True)]


def faded(row: Tensor, factor: float) -> Tensor:
    """Σ_k factor^(k−t) row_k from each t on [T]."""
    gained = [sum(factor ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))]
    return torch.stack([torch.as_tensor(each) for each in gained])


def whitened(every: Tensor) -> Tensor:
    return (every - every.mean()) / every.std(unbiased=False)


# The anchors.


def first_ratio(setting: Setting) -> Anchor:
    """Before the first step the policy is the one that sampled: no single token's logprob has moved."""
    made, _ = setting.experience()
    farthest = 0.0
    for index in by_length(setting.rollout, setting.micro_batch):
        part = made.rows(index)
        output = setting.roles.logprobs("policy", part.rollout, setting.temperature, train=True)
        farthest = max(farthest, float((output.logprobs_BT - part.old_logprobs_BT).detach().abs().max()))
    _, figures = setting.gradients(made, setting.micro_batch)
    off = max(farthest, abs(figures["ratio"] - 1), figures["clip_fraction"])
    return Anchor("first ratio", "π/π_old is 1 at every token before the first step", off, setting.within(1e-5, 1e-3))


def by_definition(setting: Setting) -> Anchor:
    """What the learner reads is what the definitions give on plain logits: a swapped role, a wrong mask, position,
    shift, sign or whitening shows."""
    (made, _), mask = setting.experience(), setting.rollout.response_mask_BT
    with setting.without_fast_path():
        expected = targets(setting)
    pairs = [(made.old_logprobs_BT, expected.old), (made.advantages_BT, expected.advantages)]
    if made.returns_BT is not None and expected.returns is not None:
        pairs.append((made.returns_BT, expected.returns))
    off = max(relative(found[mask].double(), right) for found, right in pairs)
    claim = "logprobs, advantages and returns are those of plain logits and of their definitions"
    return Anchor("experience", claim, off, setting.within(1e-4, 0.1))


def first_gradient(setting: Setting) -> Anchor:
    """Before the first step PPO's gradient is REINFORCE's with a baseline, −Σ w A ∇ log π, and that of the price of
    KL where it is in the loss; w is 1 / tokens, or what `loss_mean` has in its place."""
    roles, rollout, (made, _) = setting.roles, setting.rollout, setting.experience()
    found = setting.gradients(made, setting.micro_batch)[0]["policy"]
    losses, lengths = setting.losses, rollout.lengths_B.tolist()
    with setting.without_fast_path():
        for b, length in enumerate(lengths):
            reference = plain_logprobs(setting, "reference", b)
            log_p = plain_logprobs(setting, "policy", b, train=True)
            gap = log_p - reference
            price = losses.kl_coef * (gap.square() / 2 if losses.kl_estimator == "k2" else (-gap).exp() - 1 + gap)
            whole = {
                "token": sum(lengths), "sequence": len(lengths) * length, "constant": len(lengths) * losses.longest
            }[losses.loss_mean]  # fmt: skip
            roles.trains("policy")
            ((price - made.advantages_BT[b, : len(log_p)] * log_p).sum() / whole).backward()
    expected = taken(roles, "policy")
    claim = "the policy's first gradient is REINFORCE's with a baseline"
    return Anchor("first gradient", claim, relative(found, expected), setting.within(1e-4, 0.2))


def value_gradient(setting: Setting) -> Anchor:
    """Before the first step no value has moved, so none is clipped: its gradient is Σ (V − R) ∇V / n."""
    roles, rollout, (made, _) = setting.roles, setting.rollout, setting.experience()
    assert made.returns_BT is not None
    found = setting.gradients(made, setting.micro_batch)[0]["value"]
    count = float(rollout.response_mask_BT.sum())
    with setting.without_fast_path():
        for b in range(len(rollout.ended_B)):
            values = plain_values(setting, b, train=True)[:-1]
            roles.trains("value")
            (0.5 * (values - made.returns_BT[b, : len(values)]).square().sum() / count).backward()
    expected = taken(roles, "value")
    claim = "the value's first gradient is that of half the squared error"
    return Anchor("value gradient", claim, relative(found, expected), setting.within(1e-4, 0.2))


def invariance(setting: Setting) -> Anchor:
    """The gradient does not depend on how a minibatch is cut, padded or ordered, nor on whose passes are kept."""
    made, _ = setting.experience()
    whole = setting.gradients(made, setting.micro_batch)[0]
    rows = len(setting.rollout.ended_B)
    others = [setting.gradients(made.rows(torch.arange(rows - 1, -1, -1)), 1)[0]]  # alone, no row has any padding
    kept, cached = setting.experience(rows)
    others.append(setting.gradients(kept, rows, cached)[0])
    worst = max(relative(other[role], whole[role]) for other in others for role in whole if whole[role].norm() > 0)
    claim = "micro-batch, padding, order of rows and passes that are kept change no gradient"
    return Anchor("invariance", claim, worst, setting.within(1e-5, 0.2))


def isolation(setting: Setting) -> Anchor:
    """The value loss reaches no weight of the policy, and two steps of all that trains leave the reference alone."""
    roles, rollout = setting.roles, setting.rollout
    mask = rollout.response_mask_BT
    leaked, unmoved = 0.0, False
    if "value" in roles.trainable:
        output = roles.logprobs("policy", rollout, setting.temperature, train=True)
        values = roles.values(rollout, train=True, policy_states_BTD=output.states_BTD)
        value_loss(values, values.detach(), torch.ones_like(values), mask, float(mask.sum())).loss.backward()
        leaked = float(taken(roles, "policy").abs().sum())
        unmoved = bool(taken(roles, "value").norm() == 0)  # then the value loss reached nothing at all
    before = roles.logprobs("reference", rollout, setting.temperature).logprobs_BT
    kept = [p.detach().clone() for p in all_parameters(roles)]
    optimiser = torch.optim.AdamW(all_parameters(roles), lr=1e-3)
    made, _ = setting.experience()
    for _ in range(2):
        accumulate(roles, made, micro_batch=setting.micro_batch, temperature=setting.temperature, losses=setting.losses)
        gradient_step(roles, optimiser, 1.0)
    after = roles.logprobs("reference", rollout, setting.temperature).logprobs_BT
    put_back(roles, kept)
    off = leaked + float((before - after).abs().max()) + float(unmoved)
    claim = "the value loss reaches no policy weight, the reference never moves"
    return Anchor("isolation", claim if "value" in roles.trainable else "the reference never moves", off, 0.0)


def sampling(setting: Setting, draw: Callable[[], Rollout]) -> Anchor:
    """Samples come from the distribution whose logprobs are used: over many tokens the mean of −log π is the mean
    entropy. A hidden top-k, top-p, penalty or another temperature makes them likelier than that.

    Args:
        draw: one more batch of the policy's.
    """
    gaps: list[Tensor] = []
    for _ in range(4):
        rollout = draw()
        output, mask = setting.roles.logprobs("policy", rollout, setting.temperature), rollout.response_mask_BT
        gaps.append((-output.logprobs_BT - output.entropy_BT)[mask])
    gap = torch.cat(gaps).double()
    z = float(gap.mean().abs() / (gap.std() / math.sqrt(len(gap))))
    return Anchor("sampling", "samples come from the π whose logprobs are used (standard errors)", z, 4.5)


def all_parameters(roles: Roles) -> list[Any]:
    return [parameter for role in roles.trainable for parameter in roles.parameters_of(role)]


@torch.no_grad()
def put_back(roles: Roles, kept: Sequence[Tensor]) -> None:
    for parameter, value in zip(all_parameters(roles), kept, strict=True):
        parameter.copy_(value)
