"""All settings classes by kind and name, and their registration with Hydra."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import OmegaConf

from align.config import scorers
from align.config.root import GROUPS, PARTS, Config
from align.config.settings import Settings, get_declarations
from align.config.stages import STAGES, load_schema


@cache
def import_all_schemas() -> Mapping[str, Mapping[str, type[Settings]]]:
    """Import all settings classes and return them by kind (`stage`, `group`, `reward`) and then by name."""
    stages = {name: load_schema(name) for name in STAGES if name != "full"}  # which is sft with another method
    return {"stage": stages, "group": GROUPS, "reward": scorers.CHOICES}


class SchemaNode(ConfigNode):
    """An entry for a settings class in Hydra's store that imports and converts the class only when it is copied.

    Hydra copies a node to load it, and a command line needs few of all classes.
    """

    def __init__(self, group: str, name: str, schema: Callable[[], type[Settings]]) -> None:
        self.schema = schema
        super().__init__(f"{name}.yaml", OmegaConf.create(), group, None, None)

    def __copy__(self) -> ConfigNode:
        return ConfigNode(self.name, OmegaConf.structured(self.schema()), self.group, None, None)


@cache
def register_schemas() -> None:
    """Register every settings class in Hydra's ConfigStore under `schema/`, to be imported when it is first used."""
    folder: dict[str, Any] = ConfigStore.instance().repo.setdefault("schema", {})
    folder["root.yaml"] = SchemaNode("schema", "root", lambda: Config)
    stages = {name: partial(load_schema, name) for name in STAGES if name != "full"}
    groups = {name: partial(GROUPS.__getitem__, name) for name in GROUPS}
    rewards = {name: partial(scorers.CHOICES.__getitem__, name) for name in scorers.CHOICES}
    for kind, schemas in (("stage", stages), ("group", groups), ("reward", rewards)):
        folder[kind] = {f"{name}.yaml": SchemaNode(f"schema/{kind}", name, schema) for name, schema in schemas.items()}


def list_schema_keys(error: Exception) -> list[str]:
    """Return the dotted keys of all groups, and of the settings class that an OmegaConf error names, as suggestions."""
    match = re.search(r"object_type=(\w+)", str(error))
    schemas = [schema for kind in import_all_schemas().values() for schema in kind.values()]
    named = [schema for schema in schemas if match and schema.__name__ == match[1]]
    return [
        schema.key_of(name)
        for schema in dict.fromkeys([*PARTS.values(), Config, *named])
        for name in get_declarations(schema)
    ]
