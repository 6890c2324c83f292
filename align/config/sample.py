"""Settings of `stage=sample`, which samples several answers to each prompt, for annotators or for best-of-n."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from align.config.scorers import RewardConfig, parse_reward_part
from align.config.settings import Settings, setting
from align.core.errors import require


@dataclass
class SampleConfig(Settings):
    """Samples answers for people to rank, or ranks them by a reward."""

    AT: ClassVar[str] = "stage"

    name: str = "sample"
    prompts: int = setting(1200, "Number of prompts that are answered.", above=0)
    candidates: int = setting(4, "Number of answers to each prompt, for people to compare.", at_least=2, at_most=9)
    best_of: int | None = setting(
        None,
        "Number of answers to each prompt, ranked by `reward=`. The best ones become rows for stage=sft, the best and "
        "the worst ones pairs. Nothing goes to annotators. Empty: off.",
        at_least=2,
        at_most=4096,
    )
    gold: Any = setting(
        None,
        "Second reward of `best_of`, as a mapping: {name: sentiment}. It is only measured, on the answers that "
        "`reward=` ranks first, and does not change the ranking.",
    )

    min_score: float | None = setting(
        None,
        "Lowest score of a winner of `best_of`. A prompt whose best complete answer scores less gives no row and no "
        "pair. With reward=check, 1 keeps right answers alone. Empty: no limit.",
    )

    def check_together(self) -> None:
        require(
            self.best_of is None or self.candidates == type(self).candidates,
            "stage.candidates",
            self.candidates,
            f"is the number of answers for people, and stage.best_of={self.best_of} hands out none",
            "Drop it.",
        )
        require(
            self.gold is None or self.best_of is not None,
            "stage.gold",
            self.gold,
            "measures best-of-n alone",
            "Add stage.best_of=N, or drop it.",
        )
        require(
            self.min_score is None or self.best_of is not None,
            "stage.min_score",
            self.min_score,
            "applies to the winners of best-of-n alone",
            "Add stage.best_of=N, or drop it.",
        )
        if self.gold is not None:
            self.parse_gold()

    def parse_gold(self) -> RewardConfig:
        """Parse `stage.gold`, a mapping with the name and settings of a reward, into that reward's settings object.

        Raises:
            InputError: it describes no reward.
        """
        remedy = 'Write "stage.gold={name: sentiment}", with the settings of that reward behind its name.'
        require(isinstance(self.gold, Mapping), "stage.gold", self.gold, "is no mapping", remedy)
        return parse_reward_part("stage.gold", self.gold)
