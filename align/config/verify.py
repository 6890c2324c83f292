"""Settings of `stage=verify`, which checks that PPO computes correctly on a base model, method and precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from align.config.ppo import PpoConfig
from align.config.settings import setting

if TYPE_CHECKING:
    from align.config.root import Config


@dataclass
class VerifyConfig(PpoConfig):
    """Checks that PPO computes correctly with your model and settings. Write it in place of `stage=ppo` in a line that
    you want to run. It takes every setting of that stage and measures one batch of `rows` answers. It needs no earlier
    run: by default (`init=base`) it makes new adapters, and moves them a little so that they have an effect."""

    name: str = "verify"
    rows: int = setting(
        8, "Number of answers in the measured batch. It is rounded up to whole groups of stage.group_size.", at_least=2
    )

    def with_derived_values(self, config: Config) -> VerifyConfig:
        """Return a copy with PPO's derived defaults filled in, and `rows` rounded up to whole groups of answers."""
        settings = super().with_derived_values(config)
        assert isinstance(settings, VerifyConfig)
        return replace(settings, rows=-(-self.rows // self.per_prompt) * self.per_prompt)
