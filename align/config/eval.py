"""`stage=eval`: an artifact against what it started from."""

from __future__ import annotations

from dataclasses import dataclass

from align.config.root import positive
from align.config.settings import Settings


@dataclass
class EvalConfig(Settings):
    """The judge is `reward=`, VADER's sentiment unless told. One that the policy was optimised against, or that has a
    part in common with its reward, is refused, unless `allow_proxy` asks for it: its score is then called a proxy."""

    name: str = "eval"
    prompts: int = 256
    shown: int = 12
    allow_proxy: bool = False

    def __post_init__(self) -> None:
        positive("stage.prompts", self.prompts)
        positive("stage.shown", self.shown)
