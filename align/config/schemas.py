"""All schemas of the configuration by kind and name, and their registration with Hydra."""

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
    """Import the settings classes of all groups and stages, and return them: kind → name → class."""
    stages = {name: load_schema(name) for name in STAGES if name != "full"}  # which is sft with another method
    return {"stage": stages, "group": GROUPS, "reward": scorers.CHOICES}


class SchemaNode(ConfigNode):
    """A schema in Hydra's store. It is imported and converted when Hydra loads it, which copies the node, because a
    command line needs few of all schemas."""

    def __init__(self, group: str, name: str, schema: Callable[[], type[Settings]]) -> None:
        self.schema = schema
        super().__init__(f"{name}.yaml", OmegaConf.create(), group, None, None)

    def __copy__(self) -> ConfigNode:
        return ConfigNode(self.name, OmegaConf.structured(self.schema()), self.group, None, None)


@cache
def register_schemas() -> None:
    """Register every settings class in Hydra's store under `schema/`."""
    folder: dict[str, Any] = ConfigStore.instance().repo.setdefault("schema", {})
    folder["root.yaml"] = SchemaNode("schema", "root", lambda: Config)
    stages = {name: partial(load_schema, name) for name in STAGES if name != "full"}
    groups = {name: partial(GROUPS.__getitem__, name) for name in GROUPS}
    rewards = {name: partial(scorers.CHOICES.__getitem__, name) for name in scorers.CHOICES}
    for kind, schemas in (("stage", stages), ("group", groups), ("reward", rewards)):
        folder[kind] = {f"{name}.yaml": SchemaNode(f"schema/{kind}", name, schema) for name, schema in schemas.items()}


def list_schema_keys(error: Exception) -> list[str]:
    """Return the keys that a group file may have meant: those of the groups, and of the schema that an OmegaConf error
    names."""
    match = re.search(r"object_type=(\w+)", str(error))
    schemas = [schema for kind in import_all_schemas().values() for schema in kind.values()]
    named = [schema for schema in schemas if match and schema.__name__ == match[1]]
    return [
        schema.key_of(name)
        for schema in dict.fromkeys([*PARTS.values(), Config, *named])
        for name in get_declarations(schema)
    ]
