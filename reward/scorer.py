"""The interface of everything that scores a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from align.core.errors import require
from align.core.types import Conversation, Rollout

if TYPE_CHECKING:
    from torch import Tensor


class Scorer(Protocol):
    """Protocol of a reward: an object with a name that scores whole conversations by their last assistant turn.

    PPO optimises one scorer; evaluation measures with another that the optimiser never saw.
    """

    @property
    def name(self) -> str: ...

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        """Return one score for each conversation, [B], fp32 on the CPU. Higher is better.

        Args:
            rollout: the sampled tokens of the same answers, row by row. A scorer on the policy's base reads these, and
                any scorer may see which answers were cut. None if the answers were not sampled here.
        """
        ...


def require_finite_scores(scores_B: Tensor, name: str, field: str = "reward") -> None:
    """Raise InputError, with their number, if any of a scorer's scores is nan or infinite.

    Args:
        name: of the scorer.
        field: the setting that the scorer was named by.

    Raises:
        InputError: a score is nan or infinite.
    """
    from align.ops.finite import count_not_finite  # it imports torch

    count = count_not_finite(scores_B)
    require(
        not count,
        field,
        name,
        f"gives {count} of {len(scores_B)} answers a score that is nan or infinite",
        "Use dtype=float32. If it stays so, train the reward model again with a lower stage.lr.",
    )
