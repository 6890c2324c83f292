"""`stage=eval`: an artifact against what it started from."""

from __future__ import annotations

from dataclasses import dataclass

from align.config.root import positive


@dataclass
class EvalConfig:
    name: str = "eval"
    prompts: int = 256
    shown: int = 12

    def __post_init__(self) -> None:
        positive("stage.prompts", self.prompts)
        positive("stage.shown", self.shown)
