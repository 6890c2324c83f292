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

SCHEMAS: Mapping[str, Mapping[str, type[Settings]]] = {
    "stage": {name: schema_of(name) for name in STAGES if name != "full"},  # which is sft with another method
    "group": GROUPS,
    "reward": scorers.CHOICES,
}


@cache
def register() -> None:
    """Put every schema into Hydra's store under `schema/`."""
    store = ConfigStore.instance()
    store.store(group="schema", name="root", node=Config)
    for kind, schemas in SCHEMAS.items():
        for name, node in schemas.items():
            store.store(group=f"schema/{kind}", name=name, node=node)


def keys_beside(error: Exception) -> list[str]:
    """The keys that a group file may have meant, in the schema that an error of OmegaConf's speaks of."""
    of_type = re.search(r"object_type=(\w+)", str(error))
    spoken_of = [
        schema for kind in SCHEMAS.values() for schema in kind.values() if of_type and schema.__name__ == of_type[1]
    ]
    return [
        f"{schema.AT}.{name}" if schema.AT else name
        for schema in dict.fromkeys([*PARTS.values(), Config, *spoken_of])
        for name in declared_in(schema)
    ]
