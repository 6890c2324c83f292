"""`stage=verify`: is PPO right on this base, method and precision?"""

from __future__ import annotations

from dataclasses import dataclass

from align.config.ppo import PpoConfig
from align.config.settings import setting


@dataclass
class VerifyConfig(PpoConfig):
    """Checks that PPO computes what it should, on your model and settings: write it in place of `stage=ppo` in a line
    that you want to run. It takes every setting of that stage and measures one batch of `rows` answers. It needs
    nothing that was trained: by default (`init=base`) adapters are fresh, and moved a little so that they say
    something."""

    name: str = "verify"
    rows: int = setting(8, "Answers of the batch.", at_least=2)
