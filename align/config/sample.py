"""`stage=sample`: several answers a prompt, into the annotation store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from align.config.settings import Settings, setting


@dataclass
class SampleConfig(Settings):
    """Samples answers for people to rank."""

    AT: ClassVar[str] = "stage"

    name: str = "sample"
    prompts: int = setting(1200, "Number of prompts that are answered.", above=0)
    candidates: int = setting(4, "Number of answers to each prompt, for people to compare.", at_least=2, at_most=9)
