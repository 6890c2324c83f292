"""A file that rows are read from: its bytes, unpacked where they are packed, and the errors that name it."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from align.errors import CorruptFile, InputError
from align.files import open_binary, problem_of
from align.run import storage_error

PACKED = {b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
"""What a packed file begins with → by what it is packed."""
ENDINGS = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}
UNPACKERS: Mapping[str, Callable[[BinaryIO, str], Any]] = {"gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open}
HEAD = 64 * 2**10
"""Bytes at the beginning of a file that tell its format."""
READING: dict[Path, Callable[[], int]] = {}
"""The files that this process is reading, and what tells how many of their bytes, packed as they are, were read. Of a
file that is opened again while it is read, the first reader tells."""
AGAIN = "Fetch or write the file again."


@dataclass(frozen=True, slots=True)
class Source:
    """One file of a data set.

    Attributes:
        path: of the file.
        field: what the user calls the data set.
    """

    path: Path
    field: str = "data.path"

    @property
    def plain_name(self) -> str:
        """Its name without the ending of what it is packed by, in lower case."""
        name = self.path.name.lower()
        return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)

    def where(self, row: int) -> str:
        """How errors name a row."""
        return f"{self.path}, row {row}"

    def refused(self, problem: str, remedy: str) -> InputError:
        """The error of a file that is not read."""
        return InputError(self.field, str(self.path), problem, remedy)

    def corrupt(self, problem: str, remedy: str = AGAIN) -> CorruptFile:
        """The error of a file that is not whole."""
        return CorruptFile(self.field, str(self.path), problem, remedy)

    def packed_by(self) -> str:
        """Return `gzip`, `zstd`, `xz`, `bzip2`, or nothing.

        Raises:
            CorruptFile: its name says that it is packed, and it is not.
        """
        with open_binary(self.path) as file:
            begins = file.read(max(map(len, PACKED)))
        found = next((how for mark, how in PACKED.items() if begins.startswith(mark)), "")
        named = ENDINGS.get(self.path.suffix.lower())
        if named and found != named:
            raise self.corrupt(f"cannot be unpacked after row 0 (it is not packed by {named}, as its name says)")
        return found

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Its bytes from the first to the last, unpacked."""
        how = self.packed_by()
        if how in UNPACKERS:
            with open_binary(self.path) as packed, UNPACKERS[how](packed, "rb") as file, self._being_read(packed.tell):
                yield cast(BinaryIO, file)
        elif how == "zstd":
            import pyarrow

            with open_binary(self.path) as file, pyarrow.CompressedInputStream(file, "zstd") as stream:
                with self._being_read(file.tell):
                    yield io.BufferedReader(cast(Any, stream), HEAD)
        else:
            with open_binary(self.path) as file, self._being_read(file.tell):
                yield file

    @contextmanager
    def _being_read(self, tell: Callable[[], int]) -> Iterator[None]:
        first = READING.setdefault(self.path, tell) is tell
        try:
            yield
        finally:
            if first:
                del READING[self.path]

    @contextmanager
    def seekable(self) -> Iterator[BinaryIO]:
        """The same where any place can be read next: a packed file is unpacked into a temporary one.

        Raises:
            StorageError: the disk is full.
        """
        with self.opened() as file:
            if not self.packed_by():
                yield file
                return
            with tempfile.TemporaryFile() as whole:
                copy(file, whole)
                whole.seek(0)
                yield whole

    def head(self) -> bytes:
        """The first bytes."""
        with self.opened() as file:
            return file.read(HEAD)

    @contextmanager
    def told(self, row: list[int]) -> Iterator[None]:
        """What reading raises, as an error that names the file.

        Args:
            row: holds the number of the row that was read last.
        """
        try:
            yield
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise self.corrupt(f"cannot be unpacked after row {row[0]} ({error})") from error
        except InputError:
            raise
        except OSError as error:
            if error.errno is None:  # of gzip and of Arrow, about what the file holds
                raise self.corrupt(f"cannot be unpacked after row {row[0]} ({error})") from error
            remedy = "Check the path, and that you may read it."
            raise self.refused(problem_of(error), remedy) from error


def share_read(files: Sequence[Path]) -> float | None:
    """Which share of the bytes of some files, which are read one after another, this process has read; None where it
    reads none of them."""
    at = next((i for i, file in enumerate(files) if file in READING), None)
    if at is None:
        return None
    sizes = [file.stat().st_size for file in files]
    return (sum(sizes[:at]) + READING[files[at]]()) / max(1, sum(sizes))


def copy(file: BinaryIO, whole: BinaryIO) -> None:
    """Raises: StorageError: the disk is full."""
    try:
        shutil.copyfileobj(file, whole, 2**20)
    except OSError as error:
        raise storage_error(error, tempfile.gettempdir()) or error from error
