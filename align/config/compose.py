"""From a command line to one checked `Config`: Hydra composes, the dataclasses validate, nothing is run.

Hydra's compose API is used rather than `hydra.main`, which ends with status 1 on a mistyped key and leaves an
`outputs/` folder behind. Hydra is given the group choices alone; the values are set one by one afterwards, so that
whatever is wrong with one is said of that one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from align.config import explain, scorers
from align.config.root import GROUPS, Config
from align.config.settings import Settings, changed, freeze
from align.config.stages import STAGES, schema_of
from align.errors import InputError, half_character, require
from align.redaction import masked_tree

SCHEMAS: Mapping[str, Mapping[str, type[Settings]]] = {
    "stage": {name: schema_of(name) for name in STAGES if name != "full"},  # which is sft with another method
    "group": GROUPS,
    "reward": scorers.CHOICES,
}


RATED = ("sft", "full")
"""Stages that `method.lr` is read by."""


def conf_dir() -> Path:
    """The shipped configuration: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent.parent
    inside, beside = package / "conf", package.parent / "conf"
    return inside if inside.is_dir() else beside


@cache
def register() -> None:
    """Put every schema into Hydra's store under `schema/`."""
    store = ConfigStore.instance()
    store.store(group="schema", name="root", node=Config)
    for kind, schemas in SCHEMAS.items():
        for name, node in schemas.items():
            store.store(group=f"schema/{kind}", name=name, node=node)


def files_of(search: Path | None) -> dict[str, Path]:
    """`group/choice` → its file, of every choice of our groups: ours, and those that the user adds."""
    groups = [folder.name for folder in conf_dir().iterdir() if folder.is_dir()]
    found: dict[str, Path] = {}
    for folder in filter(None, (search, conf_dir())):  # ours last: a user's file adds a choice, it replaces none
        for path in (path for group in groups for path in sorted((folder / group).rglob("*.yaml"))):
            found[path.relative_to(folder).with_suffix("").as_posix()] = path
    return found


def quote(text: str) -> str:
    """`text` as a quoted string of Hydra's grammar."""
    return "'" + re.sub(r"(\\*)'", lambda m: m.group(1) * 2 + r"\'", re.sub(r"(\\+)$", r"\1\1", text)) + "'"


def read_value(text: str) -> Any:
    """The value that `text` writes: a number, a list, a quoted string, … What Hydra's lexer refuses (spaces,
    parentheses, `~`, accents) or takes for a sweep (commas) is the text itself."""
    try:
        override = OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        return text
    return text if override.is_sweep_override() else override.value()


def compose_raw(overrides: Sequence[str], search: Path | None = None) -> DictConfig:
    """The composed but unchecked tree. Of two arguments with one key the later counts.

    Args:
        overrides: `group=choice` and `key=value`, such as `stage=sft` or `seed=3`.
        search: a folder of the user's own group files, tried after ours.

    Raises:
        InputError: an unknown group, key or choice, a wrong type, or a broken group file.
    """
    if search is not None and (not search.is_dir() or search.resolve() == conf_dir()):
        search = None
    files = files_of(search)
    groups = {name.partition("/")[0] for name in files}
    choices: dict[str, str] = {}
    values: dict[str, str] = {}
    for argument in overrides:
        key, equals, value = argument.partition("=")
        if not equals or not key or key[0] in "+~":
            raise explain.not_an_assignment(argument)
        (choices if key in groups else values)[key] = value
    for group, name in choices.items():
        if f"{group}/{name}" not in files:
            names = sorted(f.partition("/")[2] for f in files if f.startswith(f"{group}/"))
            raise explain.not_a_choice(group, name, names)
    chosen = {group: files[f"{group}/{name}"] for group, name in choices.items()}
    try:
        tree = compose_groups(choices, search)
        restore_mandatory(tree, chosen)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise explain.broken_file(error, files, [p for p in chosen.values() if conf_dir() not in p.parents]) from error
    for key, value in values.items():
        set_value(tree, key, value, groups, choices.get("stage"))
    check_characters(OmegaConf.to_container(tree))
    return tree


def check_characters(value: Any, key: str = "") -> None:
    """Raises where a text of the tree holds half a character: bytes of a command line that are no UTF-8, an escape in a
    group file."""
    if isinstance(value, str) and (half := half_character(value)):
        raise InputError(key, value, f"is no text in UTF-8 ({half} is half a character)", "Write it in UTF-8.")
    for inner, of in value.items() if isinstance(value, dict) else ():
        check_characters(str(inner), key or "configuration")
        check_characters(of, f"{key}.{inner}" if key else str(inner))
    for i, of in enumerate(value) if isinstance(value, list) else ():
        check_characters(of, f"{key}[{i}]")


def compose_groups(choices: dict[str, str], search: Path | None) -> DictConfig:
    """The tree of these choices, every value as its group file has it."""
    arguments = [f"{group}={quote(name)}" for group, name in choices.items()]
    if search is None:
        return deepcopy(shipped(*arguments))
    return composed(*arguments, f"hydra.searchpath=[{quote(f'file://{search.resolve()}')}]")


def composed(*arguments: str) -> DictConfig:
    """Hydra's own composition, which takes a tenth of a second."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return compose(config_name="config", overrides=list(arguments))


shipped = cache(composed)  # of our own files, which stay as they are while a process lasts


def restore_mandatory(tree: DictConfig, chosen: dict[str, Path]) -> None:
    """Put back each `???` of a chosen group file: OmegaConf drops it where the schema has a default."""
    for group, path in chosen.items():
        written = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        for key in (k for k, v in written.items() if v == "???"):
            OmegaConf.update(tree, f"{group}.{key}", "???")


def set_value(tree: DictConfig, key: str, text: str, groups: set[str], stage: str | None) -> None:
    """Set one existing key.

    Raises:
        InputError: there is no such key, or it does not hold such a value.
    """
    if key == "method.lr" and stage not in (None, *RATED):
        remedy = "Write stage.lr=." if stage and hasattr(schema_of(stage), "lr") else "Drop it."
        raise InputError(key, text, f"is the rate of stage=sft and stage=full; stage={stage} does not read it", remedy)
    chosen = {f"{group}.name": group for group in groups}  # of runs alone the name is a setting
    if group := chosen.get(key):
        problem = f"is what {group}= chooses, and decides nothing by itself"
        raise InputError(key, text, problem, f"Write {group}={text}.")
    known = [k for k in keys_of(cast(dict[Any, Any], OmegaConf.to_container(tree))) if k not in chosen]
    if key not in known:
        leaf = key.removeprefix("stage.")
        owners = [n for n, schema in SCHEMAS["stage"].items() if leaf in {f.name for f in fields(schema)}]
        raise explain.not_a_key(key, text, sorted({*known, *groups}), stage, owners if leaf != key else ())
    kind, value = type_of(tree, key), read_value(text)
    if kind is str and not isinstance(value, str) and value is not None:
        value = text  # a revision such as 12e4567 or a name such as 007 is no number
    try:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{value} is not finite")
        OmegaConf.update(tree, key, value, merge=True)
    except (OmegaConfBaseException, ValueError) as error:
        below = [k for k in known if k.startswith(f"{key}.")]
        raise explain.not_a_value(key, text, kind, below) from error


def type_of(tree: DictConfig, key: str) -> type | None:
    """The type that the schema declares for a key, without its `| None`; None where that is no single type."""
    parent, _, leaf = key.rpartition(".")
    schema = OmegaConf.get_type(OmegaConf.select(tree, parent) if parent else tree)
    hint = get_type_hints(schema).get(leaf) if is_dataclass(schema) else None
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    plain_types = [t for t in choices if isinstance(t, type) and t is not type(None)]
    return plain_types[0] if len(plain_types) == 1 else None


def keys_of(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Every dotted key of nested mappings, those that hold others included."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from keys_of(value, f"{prefix}{key}.")


def check(raw: DictConfig) -> Config:
    """The typed configuration, every check made; from here on nothing in it changes.

    Raises:
        InputError: a value is missing, of the wrong type, or impossible.
    """
    try:
        config = cast(Config, OmegaConf.to_object(raw))
    except MissingMandatoryValue as error:
        raise explain.missing(str(error.full_key)) from error
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from None
            cause = cause.__cause__
        problem = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(
            str(getattr(error, "full_key", None) or "configuration"), "(given)", problem, "Write the value itself."
        ) from error
    chosen = getattr(config.reward, "name", None)
    named = next((f.default for f in fields(config.reward) if f.name == "name"), chosen)  # pyright: ignore[reportArgumentType]
    require(
        chosen == named, "reward.name", chosen, f"is not the name of what is chosen ({named})",
        f"Take it out of your group file: its `defaults: [{named}, _self_]` say what it is.",
    )  # fmt: skip
    if config.stage is not None and not is_dataclass(config.stage):
        raise InputError(
            "stage", "(your own file)", "does not say which stage it sets", "Begin it with `defaults: [sft, _self_]`."
        )
    filled = getattr(config.stage, "filled", None)
    return changed(config, stage=filled(config)) if filled else freeze(config)


def plain(config: Config) -> dict[str, Any]:
    """`config` as nested dicts of plain values, for `config.yaml`, digests and mirrors: no secret is in it."""
    return masked_tree(OmegaConf.to_container(OmegaConf.structured(config)))


def as_yaml(raw: DictConfig) -> str:
    """A composed tree as YAML, for people to read."""
    return OmegaConf.to_yaml(OmegaConf.create(masked_tree(OmegaConf.to_container(raw))))
