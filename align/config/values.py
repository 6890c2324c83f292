"""Parsing of command-line values in Hydra's grammar, and setting them one by one, so that an error names its key."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from align.config import explain
from align.config.rates import RATED
from align.config.schemas import import_all_schemas
from align.config.training import require_consistent_batch_size
from align.core.errors import InputError, find_lone_surrogate

BOTH = {"stage.batch_size", "stage.gradient_accumulation"}
"""The two keys that both set the batch size, and so may contradict each other."""


def quote_for_hydra(text: str) -> str:
    """Put a text in single quotes and escape it, as a string of Hydra's command-line grammar."""
    return "'" + re.sub(r"(\\*)'", lambda m: m.group(1) * 2 + r"\'", re.sub(r"(\\+)$", r"\1\1", text)) + "'"


@cache
def parse_value(text: str) -> Override | None:
    """Parse the value of a `key=value` word in Hydra's grammar, or return None if the grammar refuses it.

    It refuses unquoted spaces, parentheses, `~` and accents.
    """
    try:
        return OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        return None


def is_sweep(text: str) -> bool:
    """Return whether a command-line value is a sweep over several values in Hydra's grammar, such as `1,2`."""
    return (override := parse_value(text)) is not None and override.is_sweep_override()


def parse_plain_value(text: str) -> Any:
    """Convert the text after `key=` to a Python value by Hydra's grammar, such as a number, a list or a string.

    A text that the grammar refuses, and a sweep, are returned as they are.
    """
    override = parse_value(text)
    return text if override is None or override.is_sweep_override() else override.value()


def set_value(tree: DictConfig, key: str, text: str, groups: set[str], stage: str | None) -> None:
    """Parse a command-line value and set it in the configuration tree, in place, or raise InputError.

    Raises:
        InputError: there is no such key, or it cannot have this value.
    """
    stage_name = OmegaConf.select(tree, "stage.name", default=None) if stage else None  # `stage` may be a user's file
    reads_rate = stage_name in (None, *RATED)
    if key == "method.lr" and not reads_rate:
        remedy = f"Write stage.lr={text}." if is_key(tree, "stage.lr") else "Drop it."
        raise InputError(key, text, f"is the rate of stage=sft and stage=full; stage={stage} does not read it", remedy)
    group_names = {f"{group}.name": group for group in groups}
    if group := group_names.get(key):
        problem = f"is what {group}= chooses, and decides nothing by itself"
        raise InputError(key, text, problem, f"Write {group}={text}.")
    if not is_key(tree, key):
        keys = set(iter_dotted_keys(cast(dict[Any, Any], OmegaConf.to_container(tree)))) - group_names.keys()
        keys -= set() if reads_rate else {"method.lr"}
        leaf = key.removeprefix("stage.")
        owners = [n for n, schema in import_all_schemas()["stage"].items() if leaf in {f.name for f in fields(schema)}]
        raise explain.build_unknown_key_error(key, text, sorted(keys | groups), stage, owners if leaf != key else ())
    kind = find_declared_type(tree, key)
    value = parse_plain_value(text)
    if kind is str and not isinstance(value, str) and value is not None:
        value = text  # a revision such as 12e4567 or a name such as 007 is no number
    require_64_bit_integers(value, key)
    try:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{value} is not finite")
        OmegaConf.update(tree, key, value, merge=True)
    except (OmegaConfBaseException, ValueError) as error:
        node = OmegaConf.select(tree, key)
        below = [f"{key}.{k}" for k in iter_dotted_keys(node)] if isinstance(node, DictConfig) else []
        raise explain.build_invalid_value_error(key, text, kind, below, is_sweep(text)) from error


def require_64_bit_integers(value: Any, key: str) -> None:
    """Raise InputError if an integer in a value, also one nested in lists or mappings, does not fit into 64 bits."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            require_64_bit_integers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            require_64_bit_integers(inner, f"{key}[{i}]")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise InputError(key, value, "is no whole number below 2^63", "Give a smaller number.")


def require_consistent_batch(tree: DictConfig, keys: Collection[str]) -> None:
    """Raise InputError if a command line sets both `batch_size` and `gradient_accumulation` and they contradict each
    other.

    The schema cannot check that: it does not know whether a batch size that is the default was set.
    """
    if {*keys} >= BOTH:
        batch, passes, micro = (OmegaConf.select(tree, key) for key in (*sorted(BOTH), "stage.micro_batch"))
        if passes is not None:
            require_consistent_batch_size(batch, passes, micro)


def is_key(tree: DictConfig, key: str) -> bool:
    """Return whether a dotted key exists in a configuration tree."""
    parent, _, leaf = key.rpartition(".")
    plain = re.fullmatch(r"\w+(\.\w+)*", key) is not None
    if not plain or (parent and not is_key(tree, parent)):
        return False
    node = OmegaConf.select(tree, parent) if parent else tree
    return isinstance(node, DictConfig) and leaf in node.keys()  # noqa: SIM118  (a `???` is "not in" it)


def find_declared_type(tree: DictConfig, key: str) -> type | None:
    """Return the type of a key's values by its settings class, without `| None`, or None if it is no single type."""
    parent, _, leaf = key.rpartition(".")
    schema = OmegaConf.get_type(OmegaConf.select(tree, parent) if parent else tree)
    hint = type_hints(schema).get(leaf) if is_dataclass(schema) else None
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    plain_types = [t for t in (get_origin(t) or t for t in choices) if isinstance(t, type) and t is not type(None)]
    return plain_types[0] if len(plain_types) == 1 else None


type_hints = cache(get_type_hints)  # takes some milliseconds for a schema


def iter_dotted_keys(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of nested mappings, including the keys whose values are mappings."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from iter_dotted_keys(value, f"{prefix}{key}.")


def require_encodable_text(value: Any, key: str = "") -> None:
    """Raise InputError if a text in a value, also a nested one, cannot be encoded as UTF-8 because of a lone surrogate.

    It comes from bytes of a command line that are no UTF-8, or from an escape in a group file.
    """
    if isinstance(value, str) and (surrogate := find_lone_surrogate(value)):
        raise InputError(key, value, f"is no text in UTF-8 ({surrogate} is half a character)", "Write it in UTF-8.")
    if isinstance(value, dict):
        for name, inner in value.items():
            require_encodable_text(str(name), key or "configuration")
            require_encodable_text(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            require_encodable_text(inner, f"{key}[{i}]")
