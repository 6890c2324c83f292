"""`stage=export`: an adapter, or a model with the adapter merged in, that others load."""

from __future__ import annotations

from dataclasses import dataclass

from align.config.root import positive


@dataclass
class ExportStageConfig:
    """`prompts` is how many held-out prompts the merged model is compared on with the model that was trained."""

    name: str = "export"
    prompts: int = 32

    def __post_init__(self) -> None:
        positive("stage.prompts", self.prompts)
