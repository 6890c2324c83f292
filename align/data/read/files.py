"""Files of a data set: the list of files that a path names, and readers of their decompressed bytes."""

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
from align.run.artifacts import require_not_replaced
from align.run.manifest import FILE as RUN

COMPRESSION_MAGIC = {b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
"""First bytes of a compressed file → its compression."""
COMPRESSION_ENDINGS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
UNPACKERS: Mapping[str, Callable[[BinaryIO, str], Any]] = {"gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open}
ROW_FILE_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
"""Endings of files that rows are read from, in lower case."""
PATH_HELP = (
    f"Give a file, a folder or a pattern of {', '.join(ROW_FILE_ENDINGS)}, "
    f"plain or packed ({', '.join(COMPRESSION_ENDINGS)})."
)
DESCRIPTION_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that describe a data set and hold no rows."""
DATA_SET_FILE = "data.json"
"""Name of the file that describes a data set of `stage=data`."""
SHARD_NAME = re.compile(r"(train|test)-\d{5}-of-\d{5}\.parquet")
"""Pattern for the names of a `stage=data` data set's row files, which begin with the split."""
RESTORE_HELP = "Restore it, or make it again with stage=data."
SAVE_AGAIN = "Save it again with Dataset.save_to_disk."
SPLIT_NAME = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)
HEAD_BYTES = 64 * 2**10
"""Bytes at the beginning of a file that tell its format."""
FILES_BEING_READ: dict[Path, Callable[[], int]] = {}
"""Files that this process is reading → function that returns how many bytes on disk have been read. If a file is opened
again while it is read, the first reader counts."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of a data set, with methods that detect its compression and open it decompressed.

    Attributes:
        path: where it is.
        field: the setting that names the data set, for errors.
    """

    path: Path
    field: str = "data.path"

    @property
    def plain_name(self) -> str:
        """File name in lower case, without the ending of its compression, such as `.gz`."""
        name = self.path.name.lower()
        return next((name.removesuffix(ending) for ending in COMPRESSION_ENDINGS if name.endswith(ending)), name)

    def build_input_error(self, problem: str, remedy: str) -> InputError:
        """Return an InputError that names this file, for a file that cannot be read."""
        return InputError(self.field, str(self.path), problem, remedy)

    def build_corrupt_error(self, problem: str, remedy: str = "Fetch or write the file again.") -> CorruptFile:
        """Return a CorruptFile error that names this file, for a file that is cut or damaged."""
        return CorruptFile(self.field, str(self.path), problem, remedy)

    def detect_compression(self) -> str:
        """Return the compression that the file's first bytes show: `gzip`, `zstd`, `xz`, `bzip2`, or an empty string.

        Raises:
            CorruptFile: the name says that the file is compressed, and it is not.
        """
        with open_binary(self.path) as file:
            head = file.read(max(map(len, COMPRESSION_MAGIC)))
        compression = next((name for magic, name in COMPRESSION_MAGIC.items() if head.startswith(magic)), "")
        expected = COMPRESSION_ENDINGS.get(self.path.suffix.lower())
        if expected and compression != expected:
            raise self.build_corrupt_error(
                f"cannot be unpacked after row 0 (it is not packed by {expected}, as its name says)"
            )
        return compression

    @contextmanager
    def open_stream(self) -> Iterator[BinaryIO]:
        """Open the file, decompressed, for reading from start to end. It is listed in `FILES_BEING_READ` until it is
        closed."""
        compression = self.detect_compression()
        with open_binary(self.path) as file:
            is_first_reader = FILES_BEING_READ.setdefault(self.path, file.tell) == file.tell
            try:
                if compression in UNPACKERS:
                    with UNPACKERS[compression](file, "rb") as unpacked:
                        yield unpacked
                elif compression:
                    import pyarrow

                    with pyarrow.CompressedInputStream(file, "zstd") as stream:
                        yield io.BufferedReader(cast(Any, stream), HEAD_BYTES)
                else:
                    yield file
            finally:
                if is_first_reader:
                    del FILES_BEING_READ[self.path]

    @contextmanager
    def open_seekable(self) -> Iterator[BinaryIO]:
        """Open the file, decompressed, for reading at any position. A compressed file is first decompressed into a
        temporary file.

        Raises:
            StorageError: the disk is full.
        """
        with self.open_stream() as file:
            if not self.detect_compression():
                yield file
                return
            with tempfile.TemporaryFile() as unpacked:
                try:
                    shutil.copyfileobj(file, unpacked, 2**20)
                except OSError as error:
                    raise as_storage_error(error, tempfile.gettempdir()) or error from error
                unpacked.seek(0)
                yield unpacked

    def read_head(self) -> bytes:
        with self.open_stream() as file:
            return file.read(HEAD_BYTES)

    @contextmanager
    def naming_errors(self, row: list[int]) -> Iterator[None]:
        """Convert errors of reading and decompression inside the block to an InputError or CorruptFile that names this
        file.

        Args:
            row: one-element list with the number of the last row read.
        """
        try:
            yield
        except InputError:
            raise
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise self.build_input_error(
                    describe_read_error(error), "Check the path, and that you may read it."
                ) from error
            raise self.build_corrupt_error(f"cannot be unpacked after row {row[0]} ({error})") from error


def compute_read_share(files: Sequence[Path]) -> float | None:
    """Return the fraction of the bytes of `files` that this process has read so far, or None if it is reading none of
    them. The files before the one that is being read count as read."""
    current = next((i for i, file in enumerate(files) if file in FILES_BEING_READ), None)
    if current is None:
        return None
    sizes = [file.stat().st_size for file in files]
    return (sum(sizes[:current]) + FILES_BEING_READ[files[current]]()) / max(1, sum(sizes))


def list_data_files(path: str | Path, field: str = "data.path") -> list[Path]:
    """Return the data files that a file path, folder, glob pattern or `hub:` address names, in reading order.

    Args:
        path: a file; a folder, whose files with a known ending are read in the order of their names, subfolders
            included; a folder that `datasets` saved; a pattern such as `shards/*.parquet`; `hub:ORG/NAME/FILE`, or
            `hub:ORG/NAME`, see `align.run.hub_files`.
        field: the setting that holds the path, for errors.

    Raises:
        InputError: the path names no file, a folder has a loop of links or mixes splits, the hub refuses it, or another
            data set replaced it.
    """
    text = str(path)
    if not text:
        raise InputError(field, "(empty)", "names no file", PATH_HELP)
    if text.startswith(HUB):
        return hub_files(text, field)
    place = parse_user_path(text, field)
    if os.path.isdir(place):  # which returns False if a name is too long, as Path.is_dir does not
        return list_saved_files(place, field) or list_published_files(place, field) or list_folder_files(place, field)
    is_single = os.path.exists(place) or not has_magic(text)
    if is_single:
        files = [place]
    else:
        matches = map(Path, sorted(glob(str(place), recursive=True)))
        files = [file for file in matches if is_data_file(file)]
    for folder in {place.parent, *(file.parent for file in files)}:
        check_not_superseded(folder, field)
    for file in files:
        check_reachable(file, text if is_single else str(file), field)
    if not files:
        raise InputError(field, text, "matches no file whose name says that it holds rows", PATH_HELP)
    return files


def is_data_file(path: Path) -> bool:
    """Return whether a path is no folder and has the name of a row file, such as `train.jsonl` or `a.csv.gz`."""
    name = DataFile(path).plain_name
    return (
        name.endswith(ROW_FILE_ENDINGS)
        and name not in DESCRIPTION_FILES
        and not name.startswith(".")
        and not path.is_dir()
    )


def check_reachable(path: Path, shown_path: str, field: str) -> None:
    """Raise InputError if a path does not exist, cannot be reached or is no regular file."""
    try:
        refuse_irregular(path, path.stat().st_mode)
    except (OSError, ValueError) as error:
        value = shown_path if isinstance(error, OSError) else repr(shown_path)
        raise InputError(field, value, describe_read_error(error), PATH_HELP) from error


def check_not_superseded(folder: Path, field: str) -> None:
    """Raise MissingArtifact if the data set of a folder was replaced by another one or removed."""
    if os.path.isfile(folder / DATA_SET_FILE):
        require_not_replaced(folder, field)


def list_folder_files(folder: Path, field: str) -> list[Path]:
    """Return all row files, such as `train.jsonl`, in a folder and its subfolders, sorted by path.

    Raises:
        InputError: there is no such file, a link leads in a circle, or the names mention several splits.
    """
    files: list[Path] = []

    def raise_input_error(error: OSError) -> None:
        raise InputError(field, str(error.filename), f"cannot be read ({error.strerror})", PATH_HELP) from error

    for place, subfolders, names in os.walk(folder, followlinks=True, onerror=raise_input_error):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in subfolders:
            link = Path(place, name)
            if link.is_symlink() and Path(place).resolve().is_relative_to(link.resolve()):
                raise InputError(field, str(link), "is a loop of links", "Remove the link, or name the files.")
        check_not_superseded(Path(place), field)
        row_files = sorted(file for name in names if is_data_file(file := Path(place, name)))
        for file in row_files:
            check_reachable(file, str(file), field)
        files += row_files
    files.sort()
    splits = sorted({name[1].lower() for file in files for name in SPLIT_NAME.finditer(str(file.relative_to(folder)))})
    if len(splits) > 1:
        problem = f"holds files of several splits ({', '.join(splits)})"
        raise InputError(field, str(folder), problem, f"Name one of them: '{folder}/**/*{splits[0]}*'.")
    if not files:
        raise InputError(field, str(folder), "is a folder without a file whose name says that it holds rows", PATH_HELP)
    return files


def list_published_files(folder: Path, field: str) -> list[Path]:
    """Return the Parquet files of a data set that `stage=data` wrote, given its folder or that of its run. Returns an
    empty list for any other folder.

    Raises:
        InputError: the data set has two splits, train and test.
        MissingArtifact: it was removed, or another one replaced it.
        CorruptFile: it is the data set of a run, and all of its files are missing.
    """
    place = folder / "artifact" if (folder / "artifact" / DATA_SET_FILE).is_file() else folder
    if not (place / DATA_SET_FILE).is_file():
        return []
    require_not_replaced(place, field)
    files = sorted(path for path in place.iterdir() if SHARD_NAME.fullmatch(path.name))
    if not files and place.name == "artifact" and (place.parent / RUN).is_file():  # a file of rows has that name too
        raise CorruptFile(field, str(place), "is a data set without a file of rows", RESTORE_HELP)
    if len({path.name.partition("-")[0] for path in files}) > 1:
        remedy = f"Name one: '{place}/train-*.parquet'. To train on it as it is: data=manifest data.path={folder}."
        raise InputError(field, str(folder), "is a data set with two splits, train and test", remedy)
    return files


def list_saved_files(folder: Path, field: str) -> list[Path]:
    """Return the files of a data set that `Dataset.save_to_disk` wrote to a folder, in the order of its rows. Returns
    an empty list for any other folder.

    Raises:
        InputError: the folder holds several splits, as `DatasetDict.save_to_disk` writes them.
        CorruptFile: a file is missing, or the list of files cannot be read.
    """
    if (folder / "dataset_dict.json").is_file():
        parts = sorted(path.parent.name for path in folder.glob("*/state.json"))
        remedy = f"Name one of them: {folder / parts[0]}." if parts else PATH_HELP
        raise InputError(field, str(folder), f"it holds several parts ({', '.join(parts) or 'none'})", remedy)
    listing = folder / "state.json"
    if not listing.is_file() or not (folder / "dataset_info.json").is_file():
        return []
    state = read_json_object(listing, field, SAVE_AGAIN)
    try:
        files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
        if state.get("_indices_data_files"):
            raise ValueError("it lists its rows in a separate index file, a format of datasets before 2.0")
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(field, str(listing), f"lists no files ({error})", SAVE_AGAIN) from error
    for file in files:
        if not file.is_file():
            raise CorruptFile(field, str(file), "is missing from a saved data set", "Fetch or save it again.")
    return files
