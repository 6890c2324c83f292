"""The command line that makes a run again, from the configuration that it had and the inputs that it read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from align.config.identity import declared_keys, defaults, input_names
from align.config.rates import RATED
from align.config.root import PARTS, Config
from align.config.scorers import CHOICES
from align.config.settings import declared_in, parts_in
from align.config.stages import ALWAYS, STAGES, schema_of
from align.core.redaction import MASK

PLAIN = re.compile(r"[\w./:@+\-]+")
"""Texts that Hydra's grammar reads as themselves, wherever they stand."""
SILENT = ("schema_version", "stage.name")
"""Keys that no line sets."""


def command_line(config: Mapping[str, Any], refs: Mapping[str, str]) -> str:
    """`python -m align stage=… …` with every key that is not at its default; inputs by the run that made them.

    Args:
        config: resolved, as nested plain values without secrets.
        refs: name of an input → `stage:name` of the run that made it, which says more than `stage:latest` did.
    """
    return shlex.join(["python", "-m", "align", *words(config, refs)])


def words(config: Mapping[str, Any], refs: Mapping[str, str]) -> Iterator[str]:
    stage = config["stage"]["name"]
    yield f"stage={stage}"
    reads = {*ALWAYS, "run", *STAGES[stage].reads, *STAGES[stage].uses}
    reward = str(config.get("reward", {}).get("name", ""))
    given, names, usual = dict(flat(config, STOPS)), input_names(), defaults(stage, reward)
    for key, value in given.items():
        part, _, leaf = key.partition(".")
        if part not in reads or key in SILENT or (key == "method.lr" and stage not in RATED):
            continue
        if leaf == "name" and part != "run":  # what a group's choice is called
            if value != usual.get(key) and not (part == "reward" and unread(value, given, refs)):
                yield f"{part}={value}"
            continue
        if ref := refs.get(names.get(key, "")):
            yield f"{key}={ref}"
        elif value != (usual[key] if key in usual else given.get(followed(stage, key))) and MASK not in str(value):
            if key == "model.path":
                yield "model=hub"  # as the docs write it; the path alone would do
            yield f"{key}={written(value)}"


def unread(reward: str, given: Mapping[str, Any], refs: Mapping[str, str]) -> bool:
    """Whether a reward is the one that stands there where nobody names one, and no reward model was read."""
    ref = "reward.ref"
    return reward == "learned" and given.get(ref) == declared_keys()[ref][1] and input_names()[ref] not in refs


def flat(tree: Mapping[str, Any], stops: frozenset[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key → value; a setting that is itself a mapping is one value."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in stops:
            yield from flat(value, stops, f"{key}.")
        else:
            yield key, value


SCHEMAS = {schema_of(stage) for stage in STAGES}
STOPS = frozenset(
    f"{schema.AT}.{name}" if schema.AT else name
    for schema in (Config, *SCHEMAS, *(p for s in SCHEMAS for p in parts_in(s)), *PARTS.values(), *CHOICES.values())
    for name in declared_in(schema)
)
"""Keys that hold a value, be it a mapping."""


def followed(stage: str, key: str) -> str:
    """The key whose value this one has where nobody gives one; empty for none."""
    schema = schema_of(stage)
    setting = declared_in(schema).get(key.removeprefix("stage.")) if key.startswith("stage.") else None
    return setting.follows if setting else ""


def written(value: Any) -> str:
    """A value as Hydra's grammar reads it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{escaped(str(key))}: {inside(of)}" for key, of in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inside, value)) + "]"
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "null"
    return str(value)


def escaped(key: str) -> str:
    """A key of a mapping, which the grammar reads without quotes."""
    return re.sub(r"[\\()\[\]{}:=, \t]", r"\\\g<0>", key)


def inside(value: Any) -> str:
    """The same within a list or a mapping, where a text may need quotes."""
    if isinstance(value, str) and (not PLAIN.fullmatch(value) or value.lower() in ("null", "true", "false")):
        return "'" + value.replace("'", r"\'") + "'"
    return written(value)
