"""The YAML files of Hydra's configuration groups, shipped ones and the user's: search, reading and checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from align.core.errors import InputError
from align.core.files import read_text

if TYPE_CHECKING:
    from hydra.core.default_element import ResultDefault

EXPERIMENT = "experiment"
"""Name of the group of the user's files that set keys of several groups, `conf/experiment/NAME.yaml`."""
SWEEPS = "sweeper.params"
"""The only key below `hydra.` that a user's file may set: the values that `-m` sweeps."""


def find_conf_dir() -> Path:
    """Return the folder of the shipped configuration files: in a wheel inside the package, otherwise beside it."""
    package = Path(__file__).resolve().parent.parent
    in_wheel = package / "conf"
    return in_wheel if in_wheel.is_dir() else package.parent / "conf"


def list_groups() -> list[str]:
    return [*sorted(folder.name for folder in find_conf_dir().iterdir() if folder.is_dir()), EXPERIMENT]


def find_group_files(user_config_dir: Path | None) -> dict[str, Path]:
    """Return a mapping from `group/choice` to its YAML file, for all shipped choices and the user's.

    A shipped file wins over a user's of the same name.
    """
    files: dict[str, Path] = {}
    for folder in filter(
        None, (user_config_dir, find_conf_dir())
    ):  # ours last: a user's file adds a choice and replaces none
        for path in (path for group in list_groups() for path in sorted((folder / group).rglob("*.yaml"))):
            files[path.relative_to(folder).with_suffix("").as_posix()] = path
    return files


class LoadedGroupFile(NamedTuple):
    """A parsed YAML file of Hydra's defaults list, with the key under which it is merged.

    Attributes:
        path: the file.
        package: the dotted key under which Hydra merges it; empty for the root.
        values: its contents.
    """

    path: Path
    package: str
    values: Mapping[str, Any]


def iter_loaded_files(defaults: Iterable[ResultDefault], user_config_dir: Path | None) -> Iterator[LoadedGroupFile]:
    """Parse and yield the YAML file of every entry of a Hydra defaults list, in the order of merging."""
    for default in defaults:
        for folder in filter(None, (find_conf_dir(), user_config_dir)):
            path = folder / f"{default.config_path}.yaml"
            if path.is_file():
                values = yaml.safe_load(read_text(path, "configuration")) or {}
                yield LoadedGroupFile(path, default.package or "", values)
                break


def find_unset_keys(files: Iterable[LoadedGroupFile]) -> list[str]:
    """Return the dotted keys that a file declares as mandatory (`???`) and no later file sets."""
    unset: dict[str, None] = {}
    for _, package, values in files:
        for key, value in iter_nested_values(values, package):
            unset.pop(key, None)
            if value == "???":
                unset[key] = None
    return list(unset)


def iter_nested_values(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every value in nested mappings that is not itself a mapping."""
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping):
            yield from iter_nested_values(value, key)
        else:
            yield key, value


def refuse_settings_of_hydra(files: Sequence[LoadedGroupFile]) -> None:
    """Raise InputError if a user's file sets a key below `hydra.` other than `hydra.sweeper.params`.

    Such a key would have no effect.
    """
    for path, package, values in files:
        if find_conf_dir() in path.parents:
            continue
        for key, _ in iter_nested_values(values, package):
            if key.startswith("hydra.") and not key.startswith(f"hydra.{SWEEPS}."):
                remedy = "Take it out: run.root= is the folder of runs, -m sweeps, hydra.sweeper.params says what."
                raise InputError("configuration", str(path), f"sets {key}, which nothing here reads", remedy)
