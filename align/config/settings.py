"""What every schema is: keys that are declared once, open while OmegaConf fills them in, constant from `freeze` on.

A key is declared by `setting`: its default, what it means, its unit, and what it may hold. Validation, `--help` and
docs/settings.md all read that declaration. Checks that concern several keys are a schema's own `check_together`.

Hydra refuses overrides of a frozen structured config, so that the schemas cannot be frozen dataclasses.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import MISSING, FrozenInstanceError, dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

from align.config.synonyms import keys_for
from align.core.errors import InputError, require

T = TypeVar("T", bound="Settings")
SETTING = "setting"
A_RUN_EACH = "Add -m for a run of each."

MOST = 1e37
"""The largest number that a key may hold. Adam's first step is ten times its rate, and has to be a number in fp32."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a key means and what it may hold. An empty value (null) is checked by nothing.

    Attributes:
        meaning: one sentence, for `--help` and docs/settings.md.
        unit: what its number counts, such as `nats` or `tokens`.
        above, at_least, below, at_most: the bounds of a number.
        choices: the texts that it may be. Of a list: each of them.
        follows: another key that it has the value of where nobody gives one.
        names: the input that it is the name of, such as `data`. A run's identity holds that input's digest, so that
            another spelling of the name is the same run.
        identity: whether a run's identity has it; not where it says how the work is done, and not what comes of it.
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
        """The bounds in words; empty where there are none."""
        low = f"above {self.above:.12g}" if self.above is not None else ""
        low = f"{self.at_least:.12g} or more" if self.at_least is not None else low
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least:.12g} to {self.at_most:.12g}"
        high = f"below {self.below:.12g}" if self.below is not None else ""
        high = f"at most {self.at_most:.12g}" if self.at_most is not None else high
        return " and ".join(filter(None, (low, high)))

    def holds(self, number: float) -> bool:
        """Whether a number lies inside the bounds."""
        return (
            (self.above is None or number > self.above)
            and (self.at_least is None or number >= self.at_least)
            and (self.below is None or number < self.below)
            and number <= (MOST if self.at_most is None else self.at_most)
        )

    def check(self, key: str, value: Any) -> None:
        """
        Raises:
            InputError: the key may not hold this value.
        """
        if value is None:
            return
        for one in value if isinstance(value, list) else [value]:
            if self.choices:
                several = isinstance(one, str) and "," in one and {*one.split(",")} <= {*self.choices}
                meant = [choice for choice in self.choices if f"{key}={choice}" in keys_for(str(one))]
                meant = meant or difflib.get_close_matches(str(one), self.choices, n=1)
                remedy = f"Did you mean {meant[0]}? " if meant else ""
                remedy += f"Choose one of: {self.listed}." + (f" {A_RUN_EACH}" if several else "")
                require(one in self.choices, key, one, "is not a choice here", remedy)
        if self.range:
            remedy = f"Give a number {self.range}."
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise InputError(key, value, "is not a number", remedy)
            problem = f"is not {self.range}" if abs(value) <= MOST else f"is no number up to {MOST:g}"
            problem += f"; where it is not given, {self.follows} counts" if self.follows else ""
            require(self.holds(value), key, value, problem, remedy)

    @property
    def listed(self) -> str:
        return ", ".join(self.choices)


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
    """A key of a schema: its default, and what `Setting` says of it."""
    follows = default[2:-1] if isinstance(default, str) and re.fullmatch(r"\$\{[\w.]+\}", default) else ""
    declared = {SETTING: Setting(meaning, unit, above, at_least, below, at_most, choices, follows, names, identity)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=declared)
    return field(default=default, metadata=declared)


@dataclass
class Settings:
    """A part of the configuration. Another value makes another one: `changed`. A list or a mapping in it
    (`reward.parts`, `stage.settings`) is as it was read, and nobody's to change.

    Attributes:
        AT: where the part stands in the configuration, such as `stage.tripwires`; empty at the root.
    """

    AT: ClassVar[str] = ""

    def __post_init__(self) -> None:
        defaults = defaults_of(type(self))
        for name, declared in declared_in(type(self)).items():
            value = getattr(self, name)
            if not (isinstance(value, str) and value.startswith("${") and value == defaults[name]):  # not composed yet
                declared.check(f"{self.AT}.{name}" if self.AT else name, value)
        self.check_together()

    def check_together(self) -> None:
        """Raises InputError where values that are possible alone do not go together."""

    def __setattr__(self, name: str, value: Any) -> None:
        if vars(self).get("_frozen", False):
            raise FrozenInstanceError(f"{type(self).__name__}.{name} is settled: `changed` makes another configuration")
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"{type(self).__name__}.{name} is a setting, which cannot be taken away")


def declared_in(schema: type[Settings]) -> Mapping[str, Setting]:
    """The keys of a schema that `setting` declares, in their order. `name`, which the choice of a group decides, and
    parts that are schemas themselves are not among them."""
    return {f.name: f.metadata[SETTING] for f in fields(schema) if SETTING in f.metadata}


def defaults_of(schema: type[Settings]) -> Mapping[str, Any]:
    """The default of each declared key."""
    return {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(schema)
        if SETTING in f.metadata
    }


def parts_in(schema: type[Settings]) -> list[type[Settings]]:
    """The schemas of a schema's parts, such as that of `stage.tripwires`."""
    made = (field.default_factory for field in fields(schema))
    return [part for part in made if isinstance(part, type) and issubclass(part, Settings)]


def freeze(settings: T) -> T:
    """Close it and all its parts. Returns the same object."""
    for each in fields(settings):
        if isinstance(part := getattr(settings, each.name), Settings):
            freeze(part)
    object.__setattr__(settings, "_frozen", True)
    return settings


def changed(settings: T, **values: Any) -> T:
    """The same settings but for these values, checked anew and frozen.

    Raises:
        InputError: they do not go together.
    """
    return freeze(replace(settings, **values))
