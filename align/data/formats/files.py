"""The files of a data set: one, a folder of them, those that match a pattern, or those of a data set on the hub."""

from __future__ import annotations

import os
import re
from glob import glob, has_magic
from pathlib import Path

from align.data.formats.source import ENDINGS
from align.errors import CorruptFile, InputError
from align.files import problem_of, refuse_irregular, user_path
from align.run import HUB, hub_files, json_object
from align.run.artifacts import check_not_replaced
from align.run.manifest import FILE as RUN

KNOWN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
"""Endings of files that rows are read from."""
READ = f"Give a file, a folder or a pattern of {', '.join(KNOWN)}, plain or packed ({', '.join(ENDINGS)})."
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that speak of a data set, and hold no row of it."""
DATA_SET, SHARD_NAME = "data.json", re.compile(r"(train|test)-\d{5}-of-\d{5}\.parquet")
"""What describes a data set of `stage=data`, and the names of its files, which begin with their side."""
RESTORE = "Restore it, or make it again with stage=data."
SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)


def files_of(path: str | Path, field: str = "data.path") -> list[Path]:
    """The files that a path names, in the order in which they are read.

    Args:
        path: a file; a folder, of which the files with a known ending are read in the order of their names, those in
            folders within it too, or one that `datasets` saved; a pattern such as `shards/*.parquet`;
            `hub:ORG/NAME/FILE`, or `hub:ORG/NAME`, see `align.run.hub_files`.
        field: what the user calls it.

    Raises:
        InputError: nothing is there, a folder is a loop of links or mixes splits, the hub does not give it, or it is a
            data set that another one replaced.
    """
    given = str(path)
    if not given:
        raise InputError(field, "(empty)", "names no file", READ)
    if given.startswith(HUB):
        return hub_files(given, field)
    place = user_path(given, field)
    if os.path.isdir(place):  # which says no where a name is too long, as Path.is_dir does not
        return saved(place, field) or published(place, field) or shards(place, field)
    if os.path.exists(place) or not has_magic(given):
        check_current(place.parent, field)
        check_file(place, given, field)
        return [place]
    found = [Path(name) for name in sorted(glob(str(place), recursive=True)) if is_data(Path(name))]
    for folder in {place.parent, *(file.parent for file in found)}:
        check_current(folder, field)
    for file in found:
        check_file(file, str(file), field)
    return some(found, given, field, "matches no file whose name says that it holds rows")


def is_data(path: Path) -> bool:
    """Whether a file's name says that it holds rows."""
    name = path.name.lower()
    name = next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)
    hidden = any(part.startswith(".") and part not in (".", "..") for part in path.parts[-1:])
    return name.endswith(KNOWN) and name not in ABOUT and not hidden and not path.is_dir()


def check_file(path: Path, given: str, field: str) -> None:
    """Raises: InputError: there is no such file, or it cannot be reached."""
    try:
        refuse_irregular(path, path.stat().st_mode)
    except (OSError, ValueError) as error:
        raise InputError(
            field, given if isinstance(error, OSError) else repr(given), problem_of(error), READ
        ) from error


def some(found: list[Path], given: str, field: str, problem: str) -> list[Path]:
    if not found:
        raise InputError(field, given, problem, READ)
    return found


def shards(folder: Path, field: str) -> list[Path]:
    """The files of a folder that hold rows.

    Raises:
        InputError: there are none, a link leads in a circle, or their names speak of several splits.
    """
    found: list[Path] = []

    def failed(error: OSError) -> None:
        raise InputError(field, str(error.filename), f"cannot be read ({error.strerror})", READ) from error

    for place, inner, names in os.walk(folder, followlinks=True, onerror=failed):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in inner:
            link = Path(place, name)
            if link.is_symlink() and Path(place).resolve().is_relative_to(link.resolve()):
                raise InputError(field, str(link), "is a loop of links", "Remove the link, or name the files.")
        check_current(Path(place), field)
        here = sorted(Path(place, name) for name in names if is_data(Path(place, name)))
        for file in here:
            check_file(file, str(file), field)
        found += here
    found.sort()
    splits = sorted({name[1].lower() for file in found for name in SPLIT.finditer(str(file.relative_to(folder)))})
    if len(splits) > 1:
        problem = f"holds files of several splits ({', '.join(splits)})"
        raise InputError(field, str(folder), problem, f"Name one of them: '{folder}/**/*{splits[0]}*'.")
    return some(found, str(folder), field, "is a folder without a file whose name says that it holds rows")


def published(folder: Path, field: str) -> list[Path]:
    """The files of a data set that `stage=data` made, or of the folder of its run; none of another folder.

    Raises:
        InputError: it has two sides, or another data set replaced it.
        CorruptFile: it is a run's, and none of its files is there.
    """
    place = folder / "artifact" if (folder / "artifact" / DATA_SET).is_file() else folder
    if not (place / DATA_SET).is_file():
        return []
    check_current(place, field)
    found = sorted(path for path in place.iterdir() if SHARD_NAME.fullmatch(path.name))
    if not found and place.name == "artifact" and (place.parent / RUN).is_file():  # a file of rows has that name too
        raise CorruptFile(field, str(place), "is a data set without a file of rows", RESTORE)
    sides = sorted({path.name.partition("-")[0] for path in found}, reverse=True)
    problem = "is a data set with two sides, train and test"
    remedy = f"Name one: '{place}/train-*.parquet'. To train on it as it is: data=manifest data.path={folder}."
    if len(sides) > 1:
        raise InputError(field, str(folder), problem, remedy)
    return found


def check_current(folder: Path, field: str) -> None:
    """Raises: MissingArtifact: a folder held a data set that another one replaced."""
    if os.path.isfile(folder / DATA_SET):  # which says no where a name is too long, as Path.is_file does not
        check_not_replaced(folder, field)


def saved(folder: Path, field: str) -> list[Path]:
    """The files of a data set that `Dataset.save_to_disk` wrote, as it lists them; none of another folder.

    Raises:
        InputError: it holds several parts, as `DatasetDict.save_to_disk` writes them.
        CorruptFile: a file of it is missing, or what lists them cannot be read.
    """
    if (folder / "dataset_dict.json").is_file():
        parts = sorted(path.parent.name for path in folder.glob("*/state.json"))
        remedy = f"Name one of them: {folder / parts[0]}." if parts else READ
        raise InputError(field, str(folder), f"it holds several parts ({', '.join(parts) or 'none'})", remedy)
    if not (folder / "state.json").is_file() or not (folder / "dataset_info.json").is_file():
        return []
    try:
        state = json_object(folder / "state.json", field, "Save it again with Dataset.save_to_disk.")
        found = [folder / Path(one["filename"]).name for one in state["_data_files"]]
        if state.get("_indices_data_files"):
            raise ValueError("it lists its rows in a file of its own, as datasets before 2.0 did")
    except CorruptFile:
        raise
    except (ValueError, KeyError, TypeError) as error:
        remedy = "Save it again with Dataset.save_to_disk."
        raise CorruptFile(field, str(folder / "state.json"), f"lists no files ({error})", remedy) from error
    for file in found:
        if not file.is_file():
            raise CorruptFile(field, str(file), "is missing from a saved data set", "Fetch or save it again.")
    return found
