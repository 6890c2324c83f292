"""Which part of a configuration decides what a run makes: what its stage reads, less the names of its inputs, which a
run knows by their digests."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from align.config.reference import PARTS
from align.config.root import Config
from align.config.scorers import CHOICES
from align.config.settings import declared_in
from align.config.stages import ALWAYS, STAGES


@cache
def input_names() -> Mapping[str, str]:
    """Key → the input that it names, such as `data.path` → `data`."""
    schemas = (Config, *PARTS.values(), *CHOICES.values())
    return {
        f"{schema.AT}.{name}" if schema.AT else name: declared.names
        for schema in schemas
        for name, declared in declared_in(schema).items()
        if declared.names
    }


def identifying(stage: str, config: Mapping[str, Any], inputs: Collection[str]) -> dict[str, Any]:
    """The part of a configuration that belongs to a run's identity.

    Args:
        config: as nested plain values.
        inputs: the inputs that the run knows by digest, `base` for its base weights among them.
    """
    reads = (*ALWAYS, *STAGES[stage].reads)
    kept = {key: dict(part) if isinstance(part, Mapping) else part for key, part in config.items() if key in reads}
    for key, name in input_names().items():
        part, _, leaf = key.rpartition(".")
        inside = kept.get(part, {}) if part else kept
        if name in inputs and isinstance(inside, dict):
            inside.pop(leaf, None)
    return kept
