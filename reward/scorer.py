"""The one interface of everything that judges a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from align.types import Conversation, Rollout

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
