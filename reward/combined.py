"""Ensembles and weighted sums of scorers, and the standardisation of their learned members."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from align.core.errors import InputError
from align.core.types import Conversation, Rollout
from align.ops.moments import Moments
from align.reward.check import CheckReward
from align.reward.scorer import Scorer

COMBINE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "mean": lambda scores_BE, k: scores_BE.mean(1),
    "min": lambda scores_BE, k: scores_BE.min(1).values,
    "mean_minus_std": lambda scores_BE, k: scores_BE.mean(1) - k * scores_BE.std(1, unbiased=False),
}


@dataclass(frozen=True)
class StandardisedScorer:
    """A scorer that wraps another and returns `(score - shift) / scale`."""

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
    """A scorer that combines several scorers' scores by mean, minimum, or mean less deviations (Coste et al., 2023).

    Attributes:
        members: E scorers, two or more.
        combine: `mean`, `min`, or `mean_minus_std`, the mean less `deviations` times the standard deviation.
    """

    members: tuple[Scorer, ...]
    combine: str = "mean"
    deviations: float = 1.0
    name: str = "ensemble"

    def member_scores(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        """Return the score of each conversation by each of the E members of the ensemble, [B, E]."""
        return torch.stack([member.score(conversations, rollout) for member in self.members], dim=1)

    def combine_scores(self, scores_BE: Tensor) -> Tensor:
        """Combine the members' scores [B, E] into one score for each answer, [B], as `combine` says."""
        return COMBINE[self.combine](scores_BE, self.deviations)

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        return self.combine_scores(self.member_scores(conversations, rollout))


@dataclass(frozen=True)
class Sum:
    """A scorer that returns the weighted sum of other scorers' scores.

    Attributes:
        parts: (weight, scorer) pairs.
    """

    parts: tuple[tuple[float, Scorer], ...]
    name: str = "sum"

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        return torch.stack([weight * scorer.score(conversations, rollout) for weight, scorer in self.parts]).sum(0)


def score_with_diagnostics(
    scorer: Scorer, conversations: Sequence[Conversation], rollout: Rollout | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Return the scores of conversations, [B], and a mapping of metrics, such as an ensemble's disagreement.

    An ensemble has `disagreement`, the mean over answers of its members' standard deviation. Checks have
    `check_errors`, the share of answers that a check could not decide.
    """
    if isinstance(scorer, CheckReward):
        results = scorer.run_checks(conversations)
        return scorer.compute_scores(results), {
            "check_errors": sum(bool(result.error) for result in results) / len(results)
        }
    if not isinstance(scorer, Ensemble):
        return scorer.score(conversations, rollout), {}
    scores_BE = scorer.member_scores(conversations, rollout)
    return scorer.combine_scores(scores_BE), {"disagreement": float(scores_BE.std(1, unbiased=False).mean())}


def standardise_scorer(
    scorer: Scorer, conversations: Sequence[Conversation], rollout: Rollout | None = None
) -> StandardisedScorer:
    """Wrap a scorer so that its scores have mean 0 and variance 1 on the given conversations.

    Raises:
        InputError: all answers have the same score.
    """
    moments = Moments.from_values(scorer.score(conversations, rollout))  # in fp64: exact for equal scores
    if moments.deviations == 0:
        raise InputError(
            "reward",
            scorer.name,
            "gives every answer of the reference the same score, so it has no training signal",
            "Train it for longer, or leave it out.",
        )
    return StandardisedScorer(scorer, moments.mean, moments.std)


def standardise_members(
    scorer: Scorer, conversations: Sequence[Conversation], rollout: Rollout | None = None
) -> Scorer:
    """Return a scorer in which each reward model in an ensemble or sum is standardised on the given conversations.

    A nested ensemble is standardised too. Any other scorer is returned as it is.

    The scale of a reward model is an accident of its training, so that raw scores of several have no common unit.
    """

    def standardise_learned(member: Scorer) -> Scorer:
        inner = standardise_members(member, conversations, rollout)
        return standardise_scorer(inner, conversations, rollout) if member.name in ("learned", "ensemble") else inner

    if isinstance(scorer, Ensemble):
        return replace(scorer, members=tuple(map(standardise_learned, scorer.members)))
    if isinstance(scorer, Sum):
        return replace(scorer, parts=tuple((weight, standardise_learned(part)) for weight, part in scorer.parts))
    return scorer
