"""The base class `Settings` of all settings classes, whose keys are declared once by `setting`.

A declaration has the key's default, meaning, unit and allowed values. Validation, `--help` and docs/settings.md all
read it. Checks that concern several keys are a schema's own `check_together`.

Hydra refuses overrides of a frozen structured config. The schemas are therefore no frozen dataclasses: `freeze` closes
them once OmegaConf has filled them in.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import MISSING, FrozenInstanceError, dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

from align.config.synonyms import find_settings_by_synonym
from align.core.errors import InputError, require

T = TypeVar("T", bound="Settings")
SETTING = "setting"
A_RUN_EACH = "Add -m for a run of each."

MOST = 1e37
"""Largest number that a key may hold. Adam's first step is ten times its rate, and has to be finite in fp32."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The declaration of a configuration key: its meaning, unit and allowed values. An empty value (null) is not
    checked.

    Attributes:
        meaning: one sentence, for `--help` and docs/settings.md.
        unit: the unit of its number, such as `nats` or `tokens`.
        above, at_least, below, at_most: the bounds of a number.
        choices: the allowed texts; of a list, those of its elements.
        follows: another key whose value is the default.
        names: the input that the key names, such as `data`. A run's identity includes that input's digest, so that
            another spelling of the name is the same run.
        identity: whether a run's identity includes the key. It does not if the key changes how the work is done and
            not its result.
    """

    meaning: str
    unit: str = ""
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()
    follows: str = ""
    names: str = ""
    identity: bool = True

    @property
    def range(self) -> str:
        """A phrase for the bounds of the key's number, such as `above 0 and below 1`; empty without bounds."""
        low = f"above {self.above:.12g}" if self.above is not None else ""
        low = f"{self.at_least:.12g} or more" if self.at_least is not None else low
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least:.12g} to {self.at_most:.12g}"
        high = f"below {self.below:.12g}" if self.below is not None else ""
        high = f"at most {self.at_most:.12g}" if self.at_most is not None else high
        return " and ".join(filter(None, (low, high)))

    def holds(self, number: float) -> bool:
        """Return whether a number is within the declared bounds."""
        return (
            (self.above is None or number > self.above)
            and (self.at_least is None or number >= self.at_least)
            and (self.below is None or number < self.below)
            and number <= (MOST if self.at_most is None else self.at_most)
        )

    def check(self, key: str, value: Any) -> None:
        """Raise InputError if a value is not within the declared bounds or not among the choices; None passes."""
        if value is None:
            return
        for choice in (value if isinstance(value, list) else [value]) if self.choices else ():
            if choice not in self.choices:
                similar = [
                    allowed for allowed in self.choices if f"{key}={allowed}" in find_settings_by_synonym(str(choice))
                ]
                similar = similar or difflib.get_close_matches(str(choice), self.choices, n=1)
                remedy = f"Did you mean {similar[0]}? " if similar else ""
                remedy += f"Choose one of: {', '.join(self.choices)}."
                if isinstance(choice, str) and "," in choice and {*choice.split(",")} <= {*self.choices}:
                    remedy += f" {A_RUN_EACH}"
                raise InputError(key, choice, "is not a choice here", remedy)
        if self.range:
            remedy = f"Give a number {self.range}."
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise InputError(key, value, "is not a number", remedy)
            problem = f"is not {self.range}" if abs(value) <= MOST else f"is no number up to {MOST:g}"
            problem += f"; where it is not given, {self.follows} counts" if self.follows else ""
            require(self.holds(value), key, value, problem, remedy)


def setting(
    default: Any,
    meaning: str,
    *,
    unit: str = "",
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] = (),
    names: str = "",
    identity: bool = True,
) -> Any:
    """Return a dataclass field for a configuration key, with its default and a `Setting` in its metadata."""
    follows = default[2:-1] if isinstance(default, str) and re.fullmatch(r"\$\{[\w.]+\}", default) else ""
    declared = {SETTING: Setting(meaning, unit, above, at_least, below, at_most, choices, follows, names, identity)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=declared)
    return field(default=default, metadata=declared)


@dataclass
class Settings:
    """Base class of all settings classes, which validates values on creation and is immutable after `freeze`.

    `replace_values` returns a copy with other values.

    Attributes:
        AT: path of the part in the configuration, such as `stage.tripwires`; empty for the root.
    """

    AT: ClassVar[str] = ""

    def __post_init__(self) -> None:
        defaults = get_defaults(type(self))
        for name, declared in get_declarations(type(self)).items():
            value = getattr(self, name)
            if not (isinstance(value, str) and value.startswith("${") and value == defaults[name]):  # not composed yet
                declared.check(self.key_of(name), value)
        self.check_together()

    @classmethod
    def key_of(cls, name: str) -> str:
        """Return the dotted command-line key of a field, such as `stage.lr`."""
        return f"{cls.AT}.{name}" if cls.AT else name

    def check_together(self) -> None:
        """Raise InputError if several values contradict each other, although each alone is allowed."""

    def __setattr__(self, name: str, value: Any) -> None:
        if vars(self).get("_frozen", False):
            raise FrozenInstanceError(
                f"{type(self).__name__}.{name} is settled: `replace_values` makes another configuration"
            )
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"{type(self).__name__}.{name} is a setting, which cannot be taken away")


def get_declarations(schema: type[Settings]) -> Mapping[str, Setting]:
    """Return a mapping from field name to declaration for the fields of a settings class that `setting` declares.

    It does not include parts that are settings classes themselves.
    """
    return {f.name: f.metadata[SETTING] for f in fields(schema) if SETTING in f.metadata}


def get_defaults(schema: type[Settings]) -> Mapping[str, Any]:
    """Return a mapping from field name to default for the fields of a settings class that `setting` declares."""
    return {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(schema)
        if SETTING in f.metadata
    }


def get_parts(schema: type[Settings]) -> list[type[Settings]]:
    """Return the settings classes of the nested parts of a settings class, such as that of `stage.tripwires`."""
    factories = (field.default_factory for field in fields(schema))
    return [part for part in factories if isinstance(part, type) and issubclass(part, Settings)]


def freeze(settings: T) -> T:
    """Make a settings object and all its parts immutable, in place, and return it."""
    for each in fields(settings):
        if isinstance(part := getattr(settings, each.name), Settings):
            freeze(part)
    object.__setattr__(settings, "_frozen", True)
    return settings


def replace_values(settings: T, **values: Any) -> T:
    """Return a copy of a settings object with some values replaced, validated and immutable.

    Raises:
        InputError: the values are not allowed, or contradict each other.
    """
    return freeze(replace(settings, **values))
