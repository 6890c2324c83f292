"""`stage=export`: an adapter, or a model with it merged in, that others load. The group `export` says which."""

from __future__ import annotations

from dataclasses import dataclass

from align.config.settings import Settings


@dataclass
class ExportStageConfig(Settings):
    name: str = "export"
