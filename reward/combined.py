"""Scorers made of scorers: an ensemble, a weighted sum, and the scale that members are compared on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from align.core.errors import InputError
from align.core.types import Conversation, Rollout
from align.ops.moments import Moments
from align.reward.check import Checks
from align.reward.scorer import Scorer

COMBINE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "mean": lambda scores_BE, k: scores_BE.mean(1),
    "min": lambda scores_BE, k: scores_BE.min(1).values,
    "mean_minus_std": lambda scores_BE, k: scores_BE.mean(1) - k * scores_BE.std(1, unbiased=False),
}


@dataclass(frozen=True)
class Standardised:
    """A scorer's scores less `shift`, divided by `scale`."""

    scorer: Scorer
    shift: float
    scale: float

    @property
    def name(self) -> str:
        return self.scorer.name

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        return (self.scorer.score(conversations, rollout) - self.shift) / self.scale


@dataclass(frozen=True)
class Ensemble:
    """Several scorers as one (Coste et al., 2023).

    Attributes:
        members: E of them, two or more.
        combine: `mean`, `min`, or `mean_minus_std`, the mean less `deviations` times the standard deviation.
    """

    members: tuple[Scorer, ...]
    combine: str = "mean"
    deviations: float = 1.0
    name: str = "ensemble"

    def member_scores(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        """[B, E]: where they differ much, nobody should be believed."""
        return torch.stack([m.score(conversations, rollout) for m in self.members], dim=1)

    def combined(self, scores_BE: Tensor) -> Tensor:
        """One score of the members' [B, E]."""
        return COMBINE[self.combine](scores_BE, self.deviations)

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        return self.combined(self.member_scores(conversations, rollout))


@dataclass(frozen=True)
class Sum:
    """Σ weight · score over parts."""

    parts: tuple[tuple[float, Scorer], ...]
    name: str = "sum"

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        return torch.stack([w * s.score(conversations, rollout) for w, s in self.parts]).sum(0)


def scored(
    scorer: Scorer, conversations: Sequence[Conversation], rollout: Rollout | None = None
) -> tuple[Tensor, dict[str, float]]:
    """The scores [B]; of an ensemble also `disagreement`, the mean over answers of its members' standard deviation; of
    checks also `check_errors`, the share of answers that a check could not decide about."""
    if isinstance(scorer, Checks):
        checked = scorer.checked(conversations)
        return scorer.scores(checked), {"check_errors": sum(bool(one.error) for one in checked) / len(checked)}
    if not isinstance(scorer, Ensemble):
        return scorer.score(conversations, rollout), {}
    scores_BE = scorer.member_scores(conversations, rollout)
    return scorer.combined(scores_BE), {"disagreement": float(scores_BE.std(1, unbiased=False).mean())}


def standardised(scorer: Scorer, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Standardised:
    """The scorer on a scale where these answers have mean 0 and variance 1.

    Raises:
        InputError: they all have one score.
    """
    moments = Moments.from_values(scorer.score(conversations, rollout))  # in fp64: of one number it is 0 to the bit
    if moments.deviations == 0:
        raise InputError(
            "reward", scorer.name, "gives every answer of the reference the same score, so that nothing can be learned",
            "Train it for longer, or leave it out.",
        )  # fmt: skip
    return Standardised(scorer, moments.mean, moments.std)


def comparable(scorer: Scorer, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Scorer:
    """The same scorer with the *learned* members of ensembles and sums standardised on these answers: the scale of a
    reward model is an accident of its training, and a mean or a minimum over accidents says nothing."""

    def scaled(member: Scorer) -> Scorer:
        inner = comparable(member, conversations, rollout)
        return standardised(inner, conversations, rollout) if member.name in ("learned", "ensemble") else inner

    if isinstance(scorer, Ensemble):
        return replace(scorer, members=tuple(map(scaled, scorer.members)))
    if isinstance(scorer, Sum):
        return replace(scorer, parts=tuple((w, scaled(s)) for w, s in scorer.parts))
    return scorer
