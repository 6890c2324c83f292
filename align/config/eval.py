"""`stage=eval`: an artifact against what it started from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from align.config.settings import Settings, setting


@dataclass
class EvalConfig(Settings):
    """An artifact's answers against those of what it started from. The judge is `reward=`, VADER's sentiment by
    default. One that the policy was optimised against, or that has a part in common with its reward, is refused."""

    AT: ClassVar[str] = "stage"

    name: str = "eval"
    prompts: int = setting(256, "Held-out prompts that both answer.", above=0)
    shown: int = setting(12, "Pairs of answers in the report.", above=0)
    allow_proxy: bool = setting(
        False, "Take a judge that the policy was optimised against; its score is then called a proxy."
    )
