"""What every schema is: open while OmegaConf fills it in, constant from `freeze` on.

Hydra refuses overrides of a frozen structured config, so that the schemas cannot be frozen dataclasses.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import Any, TypeVar

T = TypeVar("T", bound="Settings")


class Settings:
    """A part of the configuration. Another value makes another one: `changed`. A list or a mapping in it
    (`reward.parts`, `stage.settings`) is as it was read, and nobody's to change."""

    def __setattr__(self, name: str, value: Any) -> None:
        if vars(self).get("_frozen", False):
            raise FrozenInstanceError(f"{type(self).__name__}.{name} is settled: `changed` makes another configuration")
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"{type(self).__name__}.{name} is a setting, which cannot be taken away")


def freeze(settings: T) -> T:
    """Close it and all its parts. Returns the same object."""
    assert is_dataclass(settings)
    for field in fields(settings):
        if isinstance(part := getattr(settings, field.name), Settings):
            freeze(part)
    object.__setattr__(settings, "_frozen", True)
    return settings


def changed(settings: T, **values: Any) -> T:
    """The same settings but for these values, checked anew and frozen.

    Raises:
        InputError: they do not go together.
    """
    return freeze(replace(settings, **values))  # pyright: ignore[reportArgumentType, reportUnknownVariableType]
