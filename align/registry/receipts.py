"""Receipts of what was forgotten: `forgotten/NAME.json` beside the runs, which hold nothing of it.

A receipt says when, who, by what kind of selector, how many rows went where, which files are others now, and which runs
are stale. It has no text, no name and no id of a row, and no digest of a file as it was before: whoever has the rest of
that file could try short texts against it. The digests after the act are there.

Until all is done a receipt has the HMAC of its selector under a salt, so that the same command knows it again and goes
on. Then both go: an HMAC whose salt lies beside it is as good as a plain hash to whoever guesses.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align.core.chain import canonical
from align.core.errors import InputError, RunBusy, StorageError
from align.run.files import json_object, write_json
from align.run.folder import locked

FOLDER = "forgotten"
SCHEMA = 1
RUN = re.compile(r"[a-z]+:(?!\.{1,2}$)[^/\0]+")
"""`stage:name`."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Attributes:
    name: of its file, without the ending.
    kind: of the selector.
    ended: when all was done; empty before.
    salt, check: by which the same command knows it again until then.
    store: rows that went out of the annotation store, by what they are.
    data: data set → `{by, rows, root}` of the one that took its place; without `rows` and `root` before it did.
    files: file of a run → `{lines, became, sha256}`; without `became` before it was changed.
    runs: run → `{because, again, command}`.
    """

    name: str
    at: str
    who: str
    kind: str
    ended: str = ""
    salt: str = ""
    check: str = ""
    store: dict[str, int] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[str, dict[str, str]] = field(default_factory=dict)

    def write(self, root: Path) -> Receipt:
        values = {"schema_version": SCHEMA, **asdict(self)}
        if self.ended:
            del values["salt"], values["check"]
        write_json(root / FOLDER / f"{self.name}.json", values)
        return self

    @property
    def is_sound(self) -> bool:
        """Whether it names runs, and files in their folders, as it was written to."""
        read = all(isinstance(text, str) and text.isascii() for text in (self.salt, self.check))
        runs = [*self.runs, *self.data, *(file.replace("/", ":", 1).partition("/")[0] for file in self.files)]
        return read and all(map(RUN.fullmatch, runs)) and not any(".." in Path(file).parts for file in self.files)

    def is_of(self, asked: tuple[str, ...]) -> bool:
        return not self.ended and hmac.compare_digest(self.check, checked(self.salt, asked))

    def end(self, root: Path) -> Receipt:
        """Close it: what was needed to go on is dropped. Commands stand in the marks of the runs."""
        runs = {run: {key: said[key] for key in ("because", "again")} for run, said in self.runs.items()}
        return replace(self, ended=now(), salt="", check="", runs=runs).write(root)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def checked(salt: str, asked: tuple[str, ...]) -> str:
    return hmac.digest(salt.encode(), canonical(list(asked)).encode(), "sha256").hex()


def new_receipt(kind: str, who: str, asked: tuple[str, ...]) -> Receipt:
    """Args:
    asked: all that tells this command from others.
    """
    at, salt = now(), secrets.token_hex(16)
    name = f"{at[:19].replace(':', '').replace('T', '-')}-{secrets.token_hex(3)}"
    return Receipt(name, at, who, kind, salt=salt, check=checked(salt, asked))


def unfinished(root: Path) -> list[Receipt]:
    """The receipts of commands that were cut off. What is none is passed over."""
    found = []
    for path in sorted((root / FOLDER).glob("*.json")):
        with suppress(InputError, TypeError, ValueError, AttributeError):
            if not path.is_file():
                continue
            values = json_object(path, "receipt", "Remove the file.")
            if values.pop("schema_version", None) == SCHEMA and not values.get("ended"):
                known: dict[str, Any] = values | {"name": path.stem}
                one = Receipt(**known)
                if one.is_sound:
                    found.append(one)
    return found


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Holds a folder of runs against other commands that forget something there.

    Raises:
        RunBusy: another one does.
        StorageError: the folder cannot be written.
    """
    folder = root / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        descriptor = locked(folder)
    except RunBusy as error:
        problem = "another command is forgetting something there"
        raise RunBusy("run.root", str(root), problem, "Wait for it, then ask again.") from error
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error}), so nothing can be erased there"
        raise StorageError("run.root", str(root), problem, "Change its rights.") from error
    try:
        yield
    finally:
        os.close(descriptor)
