"""`stage=sample`: several answers a prompt, into the annotation store."""

from __future__ import annotations

from dataclasses import dataclass

from align.config.root import positive
from align.config.settings import Settings
from align.errors import require


@dataclass
class SampleConfig(Settings):
    name: str = "sample"
    prompts: int = 1200
    candidates: int = 4

    def __post_init__(self) -> None:
        positive("stage.prompts", self.prompts)
        require(
            2 <= self.candidates <= 9,
            "stage.candidates",
            self.candidates,
            "people compare 2 to 9 answers",
            "Give a number from 2 to 9.",
        )
