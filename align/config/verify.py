"""`stage=verify`: is PPO right on this base, method and precision?"""

from __future__ import annotations

from dataclasses import dataclass

from align.config.ppo import PpoConfig
from align.config.settings import setting
from align.errors import require


@dataclass
class VerifyConfig(PpoConfig):
    """Checks that PPO computes correctly with your model and settings. Write it in place of `stage=ppo` in a line that
    you want to run. It takes every setting of that stage and measures one batch of `rows` answers. It needs no earlier
    run: by default (`init=base`) it makes new adapters, and moves them a little so that they have an effect."""

    name: str = "verify"
    rows: int = setting(8, "Number of answers in the measured batch.", at_least=2)

    def check_groups(self) -> None:
        super().check_groups()
        require(
            self.rows % self.per_prompt == 0, "stage.rows", self.rows,
            f"is not a multiple of stage.group_size={self.per_prompt}", "Make it one.",
        )  # fmt: skip
