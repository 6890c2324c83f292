"""Which part of a configuration decides what a run makes: what its stage reads, less the names of its inputs, which a
run knows by their digests."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from align.config.root import PARTS, Config
from align.config.scorers import CHOICES
from align.config.settings import Setting, declared_in, defaults_of, parts_in
from align.config.stages import ALWAYS, STAGES, schema_of


@cache
def input_names() -> Mapping[str, str]:
    """Key → the input that it names, such as `data.path` → `data`."""
    return {key: declared.names for key, (declared, _) in declared_keys().items() if declared.names}


@cache
def declared_keys() -> Mapping[str, tuple[Setting, Any]]:
    """Key → what is declared of it, and its default: of the groups and of what stands beside them."""
    return {
        f"{schema.AT}.{name}" if schema.AT else name: (declared, defaults_of(schema)[name])
        for schema in (Config, *PARTS.values(), *CHOICES.values())
        for name, declared in declared_in(schema).items()
    }


@cache
def defaults(stage: str, reward: str) -> Mapping[str, Any]:
    """Return dotted key → default, of every key that a configuration of a stage has.

    Args:
        reward: the choice of the group `reward`; empty for none.
    """
    chosen = [CHOICES[reward]] if reward in CHOICES else []
    schemas = (Config, schema_of(stage), *parts_in(schema_of(stage)), *PARTS.values(), *chosen)
    return {
        f"{schema.AT}.{name}" if schema.AT else name: value
        for schema in schemas
        for name, value in defaults_of(schema).items()
        if not str(value).startswith("${")
    }


def without_refs(parts: Any) -> Any:
    """The parts of a sum of rewards without the names of their reward models."""
    if isinstance(parts, Mapping):
        return {key: without_refs(value) for key, value in parts.items() if key not in ("ref", "refs")}
    return [without_refs(part) for part in parts] if isinstance(parts, list) else parts


def identifying(stage: str, config: Mapping[str, Any], inputs: Collection[str]) -> dict[str, Any]:
    """The part of a configuration that belongs to a run's identity.

    Args:
        config: as nested plain values.
        inputs: the inputs that the run knows by digest, `base` for its base weights among them.
    """
    reads = (*ALWAYS, *STAGES[stage].reads_with(config.get("stage")))
    kept = {key: dict(part) if isinstance(part, Mapping) else part for key, part in config.items() if key in reads}
    for key, name in input_names().items():
        part, _, leaf = key.rpartition(".")
        inside = kept.get(part, {}) if part else kept
        if name in inputs and isinstance(inside, dict):
            inside.pop(leaf, None)
    own = schema_of(stage)
    ours = {f"{own.AT}.{name}": declared for name, declared in declared_in(own).items()}
    groups = {key: declared for key, (declared, _) in declared_keys().items()}
    for key, declared in (groups | ours).items():
        part, _, leaf = key.rpartition(".")
        if not declared.identity and isinstance(inside := kept.get(part), dict):
            inside.pop(leaf, None)
    if "reward" in inputs and isinstance(reward := kept.get("reward"), dict) and "parts" in reward:
        reward["parts"] = without_refs(reward["parts"])
    return kept
