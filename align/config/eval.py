"""`stage=eval`: an artifact against what it started from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from align.config.settings import Settings, setting


@dataclass
class EvalConfig(Settings):
    """Compares an artifact's answers with those of the model it started from. The judge is `reward=`, by default
    VADER's sentiment. A judge that has a part in common with the reward that the policy was optimised against is
    refused."""

    AT: ClassVar[str] = "stage"

    name: str = "eval"
    prompts: int = setting(256, "Number of held-out prompts that both models answer.", above=0)
    seen: str = setting(
        "drop",
        "What to do with prompts that the artifact was trained on: leave them out, or ask them too and report the "
        "figures of the others beside those of all.",
        choices=("drop", "report"),
    )
    shown: int = setting(12, "Number of answer pairs in the report.", above=0)
    allow_proxy: bool = setting(
        False, "Accept a judge that the policy was optimised against. Its score is then called a proxy."
    )
