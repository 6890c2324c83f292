"""Format the command line that repeats a run, from its configuration and its inputs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from align.config.identity import collect_defaults, list_declared_keys, list_input_names
from align.config.rates import RATED
from align.config.root import PARTS, Config
from align.config.scorers import CHOICES
from align.config.settings import get_declarations, get_parts
from align.config.stages import ALWAYS, STAGES, load_schema
from align.core.redaction import MASK

PLAIN = re.compile(r"[\w./:@+\-]+")
"""Pattern of texts that need no quotes anywhere in Hydra's command-line grammar."""
SILENT = ("schema_version", "stage.name")
"""Configuration keys that are left out of a formatted command line."""


def format_command_line(config: Mapping[str, Any], refs: Mapping[str, str]) -> str:
    """Return the command line `python -m align stage=… …` that repeats a run, with every key that is not at its
    default.

    Inputs are named by the runs that made them.

    Args:
        config: resolved, as nested plain values without secrets.
        refs: name of an input → `stage:name` of the run that made it, which is more exact than `stage:latest`.
    """
    return shlex.join(["python", "-m", "align", *iter_command_words(config, refs)])


def iter_command_words(config: Mapping[str, Any], refs: Mapping[str, str]) -> Iterator[str]:
    stage = config["stage"]["name"]
    yield f"stage={stage}"
    reads = {*ALWAYS, "run", *STAGES[stage].reads, *STAGES[stage].uses}
    reward = str(config.get("reward", {}).get("name", ""))
    values = dict(flatten_settings(config))
    names = list_input_names()
    default_values = collect_defaults(stage, reward)
    for key, value in values.items():
        part, _, leaf = key.partition(".")
        if part not in reads or key in SILENT or (key == "method.lr" and stage not in RATED):
            continue
        if leaf == "name" and part != "run":  # the choice of a group
            if value != default_values.get(key) and not (
                part == "reward" and is_unused_default_reward(value, values, refs)
            ):
                yield f"{part}={value}"
            continue
        if ref := refs.get(names.get(key, "")):
            yield f"{key}={ref}"
            continue
        default = default_values[key] if key in default_values else values.get(find_followed_key(stage, key))
        if value != default and MASK not in str(value):
            if key == "model.path":
                yield "model=hub"  # as in the docs; the path alone would do
            yield f"{key}={format_hydra_value(value)}"


def is_unused_default_reward(reward: str, values: Mapping[str, Any], refs: Mapping[str, str]) -> bool:
    """Return whether `reward` is `learned` with the default reference, although the run read no reward model."""
    ref = "reward.ref"
    return (
        reward == "learned" and values.get(ref) == list_declared_keys()[ref][1] and list_input_names()[ref] not in refs
    )


def flatten_settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every setting in nested mappings.

    A setting whose value is a mapping is one value.
    """
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in STOPS:
            yield from flatten_settings(value, f"{key}.")
        else:
            yield key, value


SCHEMAS = {load_schema(stage) for stage in STAGES}
STOPS = frozenset(
    schema.key_of(name)
    for schema in (Config, *SCHEMAS, *(p for s in SCHEMAS for p in get_parts(s)), *PARTS.values(), *CHOICES.values())
    for name in get_declarations(schema)
)
"""Dotted keys of all settings, at which flattening stops even if the value is a mapping."""


def find_followed_key(stage: str, key: str) -> str:
    """Return the key whose value a setting has by default, such as `method.lr` for `stage.lr`, or an empty text."""
    schema = load_schema(stage)
    setting = get_declarations(schema).get(key.removeprefix("stage.")) if key.startswith("stage.") else None
    return setting.follows if setting else ""


def format_hydra_value(value: Any) -> str:
    """Format a value as text in Hydra's grammar, to write after `key=` on a command line."""
    if isinstance(value, Mapping):
        keys = [re.sub(r"[\\()\[\]{}:=, \t]", r"\\\g<0>", str(key)) for key in value]  # the grammar has no quoted keys
        elements = map(format_hydra_element, value.values())
        return "{" + ", ".join(f"{key}: {element}" for key, element in zip(keys, elements, strict=True)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(format_hydra_element, value)) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def format_hydra_element(value: Any) -> str:
    """Format an element of a list or a mapping in Hydra's grammar, with a text in quotes if it needs them."""
    if isinstance(value, str) and (not PLAIN.fullmatch(value) or value.lower() in ("null", "true", "false")):
        return "'" + value.replace("'", r"\'") + "'"
    return format_hydra_value(value)
