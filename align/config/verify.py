"""`stage=verify`: is PPO right on this base, method and precision?"""

from __future__ import annotations

from dataclasses import dataclass

from align.config.root import one_of, positive
from align.errors import require


@dataclass
class VerifyConfig:
    """Needs nothing that was trained: it works on `model=` with fresh adapters, moved a little so that they say
    something."""

    name: str = "verify"
    rows: int = 8
    micro_batch: int = 4
    value_trunk: str = "own"

    def __post_init__(self) -> None:
        for key in ("rows", "micro_batch"):
            positive(f"stage.{key}", getattr(self, key))
        require(self.rows > 1, "stage.rows", self.rows, "leaves nothing to compare", "Give 2 or more.")
        one_of("stage.value_trunk", self.value_trunk, ("own", "policy", "frozen"))
