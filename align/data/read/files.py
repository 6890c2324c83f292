"""The files of a data set: which a path names, and their bytes, unpacked where they are packed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO, cast

from align.core.errors import CorruptFile, InputError
from align.core.files import describe_read_error, open_binary, parse_user_path, refuse_irregular
from align.run import HUB, as_storage_error, hub_files, read_json_object
from align.run.artifacts import check_not_replaced
from align.run.manifest import FILE as RUN

PACKED = {b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
"""What a packed file begins with → by what it is packed."""
ENDINGS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
UNPACKERS: Mapping[str, Callable[[BinaryIO, str], Any]] = {"gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open}
KNOWN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
"""Endings of files that rows are read from."""
READ = f"Give a file, a folder or a pattern of {', '.join(KNOWN)}, plain or packed ({', '.join(ENDINGS)})."
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that describe a data set and hold no row of it."""
DATA_SET = "data.json"
"""The file that describes a data set of `stage=data`."""
SHARD_NAME = re.compile(r"(train|test)-\d{5}-of-\d{5}\.parquet")
"""The names of such a data set's files, which begin with their side."""
RESTORE = "Restore it, or make it again with stage=data."
SAVE_AGAIN = "Save it again with Dataset.save_to_disk."
SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)
HEAD = 64 * 2**10
"""Bytes at the beginning of a file that tell its format."""
READING: dict[Path, Callable[[], int]] = {}
"""The files that this process is reading, each with a function that tells how many of its packed bytes were read. If a
file is opened again while it is read, the first reader tells."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of a data set.

    Attributes:
        field: what the user calls the data set.
    """

    path: Path
    field: str = "data.path"

    @property
    def plain_name(self) -> str:
        """Its name in lower case, without the ending of what it is packed by."""
        name = self.path.name.lower()
        return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)

    def refused(self, problem: str, remedy: str) -> InputError:
        """Return the error of a file that is not read."""
        return InputError(self.field, str(self.path), problem, remedy)

    def corrupt(self, problem: str, remedy: str = "Fetch or write the file again.") -> CorruptFile:
        """Return the error of a file that is not whole."""
        return CorruptFile(self.field, str(self.path), problem, remedy)

    def packed_by(self) -> str:
        """Return `gzip`, `zstd`, `xz`, `bzip2`, or an empty text.

        Raises:
            CorruptFile: its name says that it is packed, and it is not.
        """
        with open_binary(self.path) as file:
            begins = file.read(max(map(len, PACKED)))
        packer = next((how for mark, how in PACKED.items() if begins.startswith(mark)), "")
        named = ENDINGS.get(self.path.suffix.lower())
        if named and packer != named:
            raise self.corrupt(f"cannot be unpacked after row 0 (it is not packed by {named}, as its name says)")
        return packer

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Open its bytes from the first to the last, unpacked."""
        packer = self.packed_by()
        with open_binary(self.path) as file:
            first = READING.setdefault(self.path, file.tell) == file.tell
            try:
                if packer in UNPACKERS:
                    with UNPACKERS[packer](file, "rb") as unpacked:
                        yield unpacked
                elif packer:
                    import pyarrow

                    with pyarrow.CompressedInputStream(file, "zstd") as stream:
                        yield io.BufferedReader(cast(Any, stream), HEAD)
                else:
                    yield file
            finally:
                if first:
                    del READING[self.path]

    @contextmanager
    def seekable(self) -> Iterator[BinaryIO]:
        """Open it so that any place can be read next: a packed file is unpacked into a temporary one.

        Raises:
            StorageError: the disk is full.
        """
        with self.opened() as file:
            if not self.packed_by():
                yield file
                return
            with tempfile.TemporaryFile() as whole:
                try:
                    shutil.copyfileobj(file, whole, 2**20)
                except OSError as error:
                    raise as_storage_error(error, tempfile.gettempdir()) or error from error
                whole.seek(0)
                yield whole

    def head(self) -> bytes:
        with self.opened() as file:
            return file.read(HEAD)

    @contextmanager
    def naming_errors(self, row: list[int]) -> Iterator[None]:
        """Turn what reading raises into an error that names the file.

        Args:
            row: holds the number of the row that was read last.
        """
        try:
            yield
        except InputError:
            raise
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise self.refused(describe_read_error(error), "Check the path, and that you may read it.") from error
            raise self.corrupt(f"cannot be unpacked after row {row[0]} ({error})") from error


def share_read(files: Sequence[Path]) -> float | None:
    """Return the share of the bytes of some files, read one after another, that this process has read. Returns None if
    it reads none of them."""
    at = next((i for i, file in enumerate(files) if file in READING), None)
    if at is None:
        return None
    sizes = [file.stat().st_size for file in files]
    return (sum(sizes[:at]) + READING[files[at]]()) / max(1, sum(sizes))


def files_of(path: str | Path, field: str = "data.path") -> list[Path]:
    """Return the files that a path names, in the order in which they are read.

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
    place = parse_user_path(given, field)
    if os.path.isdir(place):  # which returns False if a name is too long, as Path.is_dir does not
        return saved_files(place, field) or published_files(place, field) or files_in(place, field)
    alone = os.path.exists(place) or not has_magic(given)
    files = (
        [place] if alone else [file for file in map(Path, sorted(glob(str(place), recursive=True))) if is_data(file)]
    )
    for folder in {place.parent, *(file.parent for file in files)}:
        check_current(folder, field)
    for file in files:
        check_file(file, given if alone else str(file), field)
    if not files:
        raise InputError(field, given, "matches no file whose name says that it holds rows", READ)
    return files


def is_data(path: Path) -> bool:
    """Return whether a file's name says that it holds rows."""
    name = DataFile(path).plain_name
    return name.endswith(KNOWN) and name not in ABOUT and not name.startswith(".") and not path.is_dir()


def check_file(path: Path, given: str, field: str) -> None:
    """Raise InputError if there is no such file, or it cannot be reached."""
    try:
        refuse_irregular(path, path.stat().st_mode)
    except (OSError, ValueError) as error:
        shown = given if isinstance(error, OSError) else repr(given)
        raise InputError(field, shown, describe_read_error(error), READ) from error


def check_current(folder: Path, field: str) -> None:
    """Raise MissingArtifact if a folder held a data set that another one replaced."""
    if os.path.isfile(folder / DATA_SET):
        check_not_replaced(folder, field)


def files_in(folder: Path, field: str) -> list[Path]:
    """Return the files of a folder that hold rows.

    Raises:
        InputError: there are none, a link leads in a circle, or their names speak of several splits.
    """
    files: list[Path] = []

    def fail(error: OSError) -> None:
        raise InputError(field, str(error.filename), f"cannot be read ({error.strerror})", READ) from error

    for place, inner, names in os.walk(folder, followlinks=True, onerror=fail):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in inner:
            link = Path(place, name)
            if link.is_symlink() and Path(place).resolve().is_relative_to(link.resolve()):
                raise InputError(field, str(link), "is a loop of links", "Remove the link, or name the files.")
        check_current(Path(place), field)
        here = sorted(file for name in names if is_data(file := Path(place, name)))
        for file in here:
            check_file(file, str(file), field)
        files += here
    files.sort()
    splits = sorted({name[1].lower() for file in files for name in SPLIT.finditer(str(file.relative_to(folder)))})
    if len(splits) > 1:
        problem = f"holds files of several splits ({', '.join(splits)})"
        raise InputError(field, str(folder), problem, f"Name one of them: '{folder}/**/*{splits[0]}*'.")
    if not files:
        raise InputError(field, str(folder), "is a folder without a file whose name says that it holds rows", READ)
    return files


def published_files(folder: Path, field: str) -> list[Path]:
    """Return the files of a data set that `stage=data` made, or of the folder of its run; none of another folder.

    Raises:
        InputError: it has two sides, or another data set replaced it.
        CorruptFile: it is a run's, and none of its files is there.
    """
    place = folder / "artifact" if (folder / "artifact" / DATA_SET).is_file() else folder
    if not (place / DATA_SET).is_file():
        return []
    check_not_replaced(place, field)
    files = sorted(path for path in place.iterdir() if SHARD_NAME.fullmatch(path.name))
    if not files and place.name == "artifact" and (place.parent / RUN).is_file():  # a file of rows has that name too
        raise CorruptFile(field, str(place), "is a data set without a file of rows", RESTORE)
    if len({path.name.partition("-")[0] for path in files}) > 1:
        remedy = f"Name one: '{place}/train-*.parquet'. To train on it as it is: data=manifest data.path={folder}."
        raise InputError(field, str(folder), "is a data set with two sides, train and test", remedy)
    return files


def saved_files(folder: Path, field: str) -> list[Path]:
    """Return the files of a data set that `Dataset.save_to_disk` wrote, as it lists them; none of another folder.

    Raises:
        InputError: it holds several parts, as `DatasetDict.save_to_disk` writes them.
        CorruptFile: a file of it is missing, or what lists them cannot be read.
    """
    if (folder / "dataset_dict.json").is_file():
        parts = sorted(path.parent.name for path in folder.glob("*/state.json"))
        remedy = f"Name one of them: {folder / parts[0]}." if parts else READ
        raise InputError(field, str(folder), f"it holds several parts ({', '.join(parts) or 'none'})", remedy)
    listing = folder / "state.json"
    if not listing.is_file() or not (folder / "dataset_info.json").is_file():
        return []
    state = read_json_object(listing, field, SAVE_AGAIN)
    try:
        files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
        if state.get("_indices_data_files"):
            raise ValueError("it lists its rows in a file of its own, as datasets before 2.0 did")
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(field, str(listing), f"lists no files ({error})", SAVE_AGAIN) from error
    for file in files:
        if not file.is_file():
            raise CorruptFile(field, str(file), "is missing from a saved data set", "Fetch or save it again.")
    return files
