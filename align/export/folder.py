"""The export's folder: it appears whole or not at all, and names no path of the machine that wrote it."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname
from typing import Any
from uuid import uuid4

from transformers import PreTrainedTokenizerBase

from align.errors import CorruptFile, InputError, MissingArtifact, StorageError
from align.models.load import LOCAL_KEYS
from align.run import write_json

BESIDE_TOKENIZER = ("tokenizer.model", "generation_config.json")
"""What no tokenizer writes: SentencePiece's own file, which llama.cpp's converter reads, and the sampling defaults."""

# An absolute path: at the start or after a blank, quote or bracket, so that https://… and org/name are none.
ABSOLUTE = re.compile(r"""(?:^|(?<=[\s"'`(=\[]))(?:/[\w.@+-]+/[\w./@+-]+|~/\S+|[A-Za-z]:\\\S+)|file://\S+""")


@contextmanager
def publish(target: Path, replace: bool = False) -> Iterator[Path]:
    """A new folder beside `target` that takes its name once the block ends without an error, and is removed otherwise.

    Args:
        target: where the export shall be; an empty folder there is taken over.
        replace: True to put the new export in the place of an older one, which stays until the new one is complete.

    Raises:
        InputError: `target` holds files and `replace` is False, or is a file.
        StorageError: the folder cannot be written.
    """
    if target.exists() and not target.is_dir():
        raise InputError("target", target.name, "is a file", "Choose a folder that does not exist yet.")
    if target.is_dir() and any(target.iterdir()) and not replace:
        raise InputError("target", target.name, "already holds files", "Choose another folder or remove it first.")
    with workroom(target) as part:
        yield part
        with unwritable(target):
            moved(part, target)


@contextmanager
def workroom(beside: Path) -> Iterator[Path]:
    """A folder to work in, beside a target and on its disk, that is removed in the end; and with it what a process that
    was killed left for the same target.

    Raises:
        StorageError: the folder cannot be written.
    """
    here = f".{beside.name}.{gethostname()}-"
    for left in beside.parent.glob(f"{glob.escape(here)}*.part"):
        owner = left.name.removeprefix(here).partition("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(left, ignore_errors=True)
    part = beside.with_name(f"{here}{os.getpid()}-{uuid4().hex[:8]}.part")
    try:
        with unwritable(beside):
            part.mkdir(parents=True)
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def moved(part: Path, target: Path) -> None:
    """Gives a finished folder its name, in the place of what had it."""
    _sync(part)
    if target.is_dir() and any(target.iterdir()):
        old = part.with_suffix(".old")
        os.replace(target, old)
        os.replace(part, target)
        shutil.rmtree(old)
    else:
        os.replace(part, target)  # POSIX renames over an empty folder


@contextmanager
def unwritable(target: Path) -> Iterator[None]:
    """What the disk says against a folder, as the user's own error."""
    try:
        yield
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        remedy = "Free space, make it writable, or choose another folder."
        raise StorageError("target", str(target), problem, remedy) from error


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        MissingArtifact: there is no such file.
        CorruptFile: it holds no JSON object.
    """
    if not path.is_file():
        raise MissingArtifact(path.name, str(path.parent), "the file is not there", remedy)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFile(path.name, str(path.parent), f"is not JSON ({error})", remedy) from error
    if not isinstance(content, dict):
        raise CorruptFile(path.name, str(path.parent), "holds no JSON object", remedy)
    return content


def check_base(base: Mapping[str, str]) -> None:
    """A base must be named so that another machine finds it.

    Args:
        base: `id` (a hub id or a built-in model's name), `revision` and `digest`, the last two may be empty.

    Raises:
        InputError: the id is empty or a path, or a key is unknown.
    """
    if unknown := base.keys() - {"id", "revision", "digest"}:
        raise InputError("base", sorted(unknown)[0], "is not one of id, revision and digest", "Leave it out.")
    name = base.get("id") or ""
    if not name or Path(name).is_absolute() or name.startswith((".", "~")) or "\\" in name:
        raise InputError(
            "base.id",
            name or "(empty)",
            "names no model that another machine could find",
            "Give ORG/NAME or a model's name.",
        )


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, base: Path | None = None) -> None:
    """Tokenizer, chat template and generation config, without a trace of where they were read from.

    Args:
        folder: where to write.
        base: the folder of the base, which has what the tokenizer does not write.
    """
    tokenizer.save_pretrained(folder)
    config = read_json(folder / "tokenizer_config.json", "Point at a folder with an intact tokenizer.")
    write_json(folder / "tokenizer_config.json", {k: v for k, v in config.items() if k not in LOCAL_KEYS})
    for name in BESIDE_TOKENIZER:
        if base is not None and (base / name).is_file() and not (folder / name).exists():
            shutil.copyfile(base / name, folder / name)


def _sync(folder: Path) -> None:
    """Bytes on disk before the name that promises them; for others to read, which safetensors leaves to the owner."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644 if path.stat().st_nlink == 1 else 0o444)  # what others share is changed by none
            with path.open("rb") as file:
                os.fsync(file.fileno())
