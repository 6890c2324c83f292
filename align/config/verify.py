"""`stage=verify`: is PPO right on this base, method and precision?"""

from __future__ import annotations

from dataclasses import dataclass

from align.config.ppo import PpoConfig
from align.config.settings import setting


@dataclass
class VerifyConfig(PpoConfig):
    """A line of `stage=ppo` with another stage: it takes every setting of that, and measures one batch of `rows`
    answers under those that a batch depends on. By default (`init=base`) it needs nothing that was trained: adapters
    are fresh, and moved a little so that they say something."""

    name: str = "verify"
    rows: int = setting(8, "Answers of the batch.", at_least=2)
