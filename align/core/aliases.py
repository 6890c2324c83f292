"""Names for artifacts: the one shape that `stage.adapters` has on a command line, and an alias file has as JSON.

A name stands for one artifact (`{support: ppo:latest}`), or for several that share its requests by weight
(`{chat: {support: 0.9, next: 0.1}}`). What a reference means is for its reader to say.
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
"""What a name may be: it stands in requests, headers, logs and metrics. `@` begins a digest, and `/` a path."""
NAMED = "Use up to 64 letters, digits, dots, dashes and underscores."

WEIGHED = "Give a number above 0, and write the colon of a reference as \\: in a command line."


@dataclass(frozen=True, slots=True)
class Arm:
    """One artifact of a name.

    Attributes:
        ref: the reference to it, as it was written.
        weight: its share of the name's requests, relative to the weights of the other arms; above 0.
    """

    ref: str
    weight: float = 1.0


def parsed_aliases(value: Any, field: str) -> Mapping[str, tuple[Arm, ...]]:
    """The arms of each name, in the order in which they were written.

    Args:
        value: NAME → REF, or NAME → {REF: weight, …}; None for no names.
        field: what the user calls it.

    Raises:
        InputError: it has another shape, or a name or a weight cannot be one.
    """
    if value is None:
        return MappingProxyType({})
    shape = 'Write "{NAME: REF}", or "{NAME: {REF: 0.9, OTHER: 0.1}}" for a name of several artifacts.'
    require(isinstance(value, Mapping), field, value, "is no mapping from names to references", shape)
    found = {}
    for name, given in value.items():
        require(isinstance(name, str) and NAME.fullmatch(name) is not None, field, name, "cannot be a name", NAMED)
        weights = list(given.items()) if isinstance(given, Mapping) else [(given, 1.0)]
        require(bool(weights), f"{field}.{name}", given, "names no artifact", shape)
        for ref, weight in weights:
            if not isinstance(ref, str) or not ref:
                raise InputError(f"{field}.{name}", ref, "is no reference to an artifact", shape)
            number = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight < math.inf
            require(number, f"{field}.{name}.{ref}", weight, "is no weight", WEIGHED)
        summed = sum(float(weight) for _, weight in weights) < math.inf
        require(summed, f"{field}.{name}", given, "has weights whose sum is no number", "Give smaller ones.")
        found[name] = tuple(Arm(ref, float(weight)) for ref, weight in weights)
    return MappingProxyType(found)
