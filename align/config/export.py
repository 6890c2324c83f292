"""`stage=export`: an adapter, or a model with it merged in, that others load. The group `export` says which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from align.config.settings import Settings


@dataclass
class ExportStageConfig(Settings):
    """An export with its receipt. Its settings are those of the group `export`."""

    AT: ClassVar[str] = "stage"

    name: str = "export"
