"""The one interface of everything that judges a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from align.core.errors import require
from align.core.types import Conversation, Rollout

if TYPE_CHECKING:
    from torch import Tensor


class Scorer(Protocol):
    """Judges whole conversations by their last assistant turn.

    PPO optimises one scorer; evaluation measures with another that the optimiser never saw.
    """

    @property
    def name(self) -> str: ...

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        """One number a conversation, higher is better: shape [B], fp32, on the CPU.

        Args:
            rollout: the same answers as they were sampled, row by row, where they were: a scorer on the sampler's own
                tokenizer reads the very tokens, and any scorer may see which answers were cut.
        """
        ...


def check_finite(scores_B: Tensor, name: str, field: str = "reward") -> None:
    """
    Args:
        scores_B: of the scorer of this name.
        field: what the user calls it.

    Raises:
        InputError: a score is nan or infinite.
    """
    from align.ops.finite import count_not_finite  # it imports torch

    require(
        not (count := count_not_finite(scores_B)), field, name,
        f"gives {count} of {len(scores_B)} answers a score that is nan or infinite",
        "Use dtype=float32. If it stays so, train the reward model again with a lower stage.lr.",
    )  # fmt: skip
