"""Every schema of the configuration by kind and name, for Hydra and for whoever asks what keys there are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from hydra.core.config_store import ConfigStore

from align.config import scorers
from align.config.root import GROUPS, PARTS, Config
from align.config.settings import Settings, declared_in
from align.config.stages import STAGES, schema_of


@cache
def all_schemas() -> Mapping[str, Mapping[str, type[Settings]]]:
    """Return kind → name → schema. This imports the schemas of all stages."""
    stages = {name: schema_of(name) for name in STAGES if name != "full"}  # which is sft with another method
    return {"stage": stages, "group": GROUPS, "reward": scorers.CHOICES}


def register(stage: str | None) -> None:
    """Put the schemas into Hydra's store under `schema/`.

    Args:
        stage: the only stage that is composed; None for any, which takes a tenth of a second longer.
    """
    register_parts()
    for name in all_schemas()["stage"] if stage is None else ("sft" if stage == "full" else stage,):
        register_stage(name)


@cache
def register_stage(name: str) -> None:
    ConfigStore.instance().store(group="schema/stage", name=name, node=schema_of(name))


@cache
def register_parts() -> None:
    """Put the schemas that no stage owns into Hydra's store."""
    store = ConfigStore.instance()
    store.store(group="schema", name="root", node=Config)
    for kind, schemas in (("group", GROUPS), ("reward", scorers.CHOICES)):
        for name, node in schemas.items():
            store.store(group=f"schema/{kind}", name=name, node=node)


def keys_beside(error: Exception) -> list[str]:
    """The keys that a group file may have meant, in the schema that an error of OmegaConf's speaks of."""
    of_type = re.search(r"object_type=(\w+)", str(error))
    every = [schema for kind in all_schemas().values() for schema in kind.values()]
    spoken_of = [schema for schema in every if of_type and schema.__name__ == of_type[1]]
    return [
        f"{schema.AT}.{name}" if schema.AT else name
        for schema in dict.fromkeys([*PARTS.values(), Config, *spoken_of])
        for name in declared_in(schema)
    ]
