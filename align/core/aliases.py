"""Parsing of served names and their artifacts, from `stage.adapters` on a command line or from an alias file in JSON.

A name maps to one artifact (`{support: ppo:latest}`), or to several that share its requests by weight
(`{chat: {support: 0.9, next: 0.1}}`). References are not resolved here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from align.core.errors import InputError, require

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Valid names. They appear in requests, headers, logs and metrics. `@` begins a digest, and `/` a path."""
NAME_REMEDY = "Use up to 64 letters, digits, dots, dashes and underscores."

WEIGHT_REMEDY = "Give a number above 0, and write the colon of a reference as \\: in a command line."


@dataclass(frozen=True, slots=True)
class Arm:
    """An artifact reference that a served name stands for, with its relative share of the name's requests.

    Attributes:
        ref: the reference to it, as the user wrote it.
        weight: its share of the name's requests, relative to the weights of the other arms; above 0.
    """

    ref: str
    weight: float = 1.0


def parse_aliases(value: Any, field: str) -> Mapping[str, tuple[Arm, ...]]:
    """Parse a mapping of served names to artifact references, and return each name's artifacts with their weights.

    Args:
        value: NAME → REF, or NAME → {REF: weight, …}; None for no names.
        field: the setting or file, for errors.

    Raises:
        InputError: the value has another shape, or a name or a weight is invalid.
    """
    if value is None:
        return MappingProxyType({})
    shape = 'Write "{NAME: REF}", or "{NAME: {REF: 0.9, OTHER: 0.1}}" for a name of several artifacts.'
    require(isinstance(value, Mapping), field, value, "is no mapping from names to references", shape)
    arms = {}
    for name, refs in value.items():
        require(
            isinstance(name, str) and NAME.fullmatch(name) is not None, field, name, "cannot be a name", NAME_REMEDY
        )
        weights = list(refs.items()) if isinstance(refs, Mapping) else [(refs, 1.0)]
        require(bool(weights), f"{field}.{name}", refs, "names no artifact", shape)
        for ref, weight in weights:
            if not isinstance(ref, str) or not ref:
                raise InputError(f"{field}.{name}", ref, "is no reference to an artifact", shape)
            is_weight = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight < math.inf
            require(is_weight, f"{field}.{name}.{ref}", weight, "is no weight", WEIGHT_REMEDY)
        is_finite = sum(float(weight) for _, weight in weights) < math.inf
        require(is_finite, f"{field}.{name}", refs, "has weights whose sum is no number", "Give smaller ones.")
        arms[name] = tuple(Arm(ref, float(weight)) for ref, weight in weights)
    return MappingProxyType(arms)
