"""Group files: those of this package, and a user's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from align.core.errors import InputError
from align.core.files import read_text

if TYPE_CHECKING:
    from hydra.core.default_element import ResultDefault

EXPERIMENT = "experiment"
"""The group that a user adds: settings of several groups together, `conf/experiment/NAME.yaml`."""
SWEEPS = "sweeper.params"
"""What is read of Hydra's own settings: the values that `-m` sweeps."""


def conf_dir() -> Path:
    """The shipped configuration: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent.parent
    inside, beside = package / "conf", package.parent / "conf"
    return inside if inside.is_dir() else beside


def groups() -> list[str]:
    return [*sorted(folder.name for folder in conf_dir().iterdir() if folder.is_dir()), EXPERIMENT]


def files_of(search: Path | None) -> dict[str, Path]:
    """`group/choice` → its file, of every choice of our groups: ours, and those that the user adds."""
    found: dict[str, Path] = {}
    for folder in filter(None, (search, conf_dir())):  # ours last: a user's file adds a choice, it replaces none
        for path in (path for group in groups() for path in sorted((folder / group).rglob("*.yaml"))):
            found[path.relative_to(folder).with_suffix("").as_posix()] = path
    return found


def loaded(defaults: Iterable[ResultDefault], search: Path | None) -> Iterator[tuple[Path, str, Mapping[str, Any]]]:
    """(file, its package, what it says) of every file of a defaults list, in the order in which they are merged."""
    for default in defaults:
        for folder in filter(None, (conf_dir(), search)):
            path = folder / f"{default.config_path}.yaml"
            if path.is_file():
                yield path, default.package or "", yaml.safe_load(read_text(path, "configuration")) or {}
                break


def unset_keys(files: Iterable[tuple[Path, str, Mapping[str, Any]]]) -> list[str]:
    """Each key that a file leaves open (`???`), and none behind it sets."""
    left: dict[str, None] = {}
    for _, package, values in files:
        for key, value in leaves(values, package):
            left.pop(key, None)
            if value == "???":
                left[key] = None
    return list(left)


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings that is no mapping."""
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, Mapping):
            yield from leaves(value, key)
        else:
            yield key, value


def refuse_settings_of_hydra(files: Sequence[tuple[Path, str, Mapping[str, Any]]]) -> None:
    """Raises InputError where a user's file sets what would be read by nobody: Hydra's folders, launchers, logs."""
    for path, package, values in files:
        if conf_dir() in path.parents:
            continue
        for key, _ in leaves(values, package):
            if key.startswith("hydra.") and not key.startswith(f"hydra.{SWEEPS}."):
                raise InputError(
                    "configuration", str(path), f"sets {key}, which nothing here reads",
                    "Take it out: run.root= is the folder of runs, -m sweeps, hydra.sweeper.params says what.",
                )  # fmt: skip
