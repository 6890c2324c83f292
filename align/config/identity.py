"""The settings that identify a run, so that a repeated command resumes it, and the defaults of all keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from align.config.groups import KEYS_LEFT_OUT_IF_UNSET
from align.config.root import PARTS, Config
from align.config.scorers import CHOICES
from align.config.settings import Setting, get_declarations, get_defaults, get_parts
from align.config.stages import ALWAYS, STAGES, load_schema


@cache
def list_input_names() -> Mapping[str, str]:
    """Return the configuration keys that name a run's inputs: key → name of the input, such as `data.path` → `data`."""
    return {key: declared.names for key, (declared, _) in list_declared_keys().items() if declared.names}


@cache
def list_declared_keys() -> Mapping[str, tuple[Setting, Any]]:
    """Return a mapping from every dotted configuration key, except `stage.` keys, to its declaration and default."""
    return {
        schema.key_of(name): (declared, get_defaults(schema)[name])
        for schema in (Config, *PARTS.values(), *CHOICES.values())
        for name, declared in get_declarations(schema).items()
    }


@cache
def collect_defaults(stage: str, reward: str) -> Mapping[str, Any]:
    """Return a mapping from dotted key to default for the configuration of a stage with a reward.

    Defaults that refer to another key are left out.

    Args:
        reward: the choice of the group `reward`; empty for none.
    """
    rewards = [CHOICES[reward]] if reward in CHOICES else []
    schemas = (Config, load_schema(stage), *get_parts(load_schema(stage)), *PARTS.values(), *rewards)
    return {
        schema.key_of(name): value
        for schema in schemas
        for name, value in get_defaults(schema).items()
        if not str(value).startswith("${")
    }


def drop_reward_model_refs(parts: Any) -> Any:
    """Return a copy of the nested `reward.parts` without the keys `ref` and `refs`, which name reward models."""
    if isinstance(parts, Mapping):
        return {key: drop_reward_model_refs(value) for key, value in parts.items() if key not in ("ref", "refs")}
    return [drop_reward_model_refs(part) for part in parts] if isinstance(parts, list) else parts


def select_identity(stage: str, config: Mapping[str, Any], inputs: Collection[str]) -> dict[str, Any]:
    """Return the nested settings that identify a run: all that its stage reads and that can change the result.

    So the same command line resumes the run. Keys of inputs that the run knows by digest are left out, and so are the
    settings that select votes if they select all, and soft labels if there are none.

    Args:
        config: as nested plain values.
        inputs: names of the inputs that the run knows by digest, such as `base` for its base weights.
    """
    reads = (*ALWAYS, *STAGES[stage].reads_with(config.get("stage")))
    identity = {key: dict(part) if isinstance(part, Mapping) else part for key, part in config.items() if key in reads}
    schema = load_schema(stage)
    declarations = {key: declared for key, (declared, _) in list_declared_keys().items()}
    declarations |= {schema.key_of(name): declared for name, declared in get_declarations(schema).items()}
    left_out = [key for key, name in list_input_names().items() if name in inputs]
    left_out += [key for key, declared in declarations.items() if not declared.identity]
    for key in left_out:
        part, _, leaf = key.rpartition(".")
        values = identity.get(part) if part else identity
        if isinstance(values, dict):
            values.pop(leaf, None)
    if isinstance(data := identity.get("data"), dict):
        identity["data"] = {key: value for key, value in data.items() if value or key not in KEYS_LEFT_OUT_IF_UNSET}
    if "reward" in inputs and isinstance(reward := identity.get("reward"), dict) and "parts" in reward:
        reward["parts"] = drop_reward_model_refs(reward["parts"])
    return identity
