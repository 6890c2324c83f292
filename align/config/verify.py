"""`stage=verify`: is PPO right on this base, method and precision?"""

from __future__ import annotations

from dataclasses import dataclass

from align.config.ppo import PpoConfig
from align.config.root import positive
from align.errors import require


@dataclass
class VerifyConfig(PpoConfig):
    """A line of `stage=ppo` with another stage: it takes every setting of that, and measures one batch of `rows`
    answers under those that a batch depends on.

    By default (`init=base`) it needs nothing that was trained: adapters are fresh, and moved a little so that they say
    something.
    """

    name: str = "verify"
    rows: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("stage.rows", self.rows)
        require(self.rows > 1, "stage.rows", self.rows, "leaves nothing to compare", "Give 2 or more.")
