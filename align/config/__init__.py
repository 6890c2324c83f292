"""Schemas: one dataclass file a stage, no torch anywhere."""

from align.config.root import Config

__all__ = ["Config"]
