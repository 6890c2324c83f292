"""What can go wrong, in a handful of types.

Every error that a user can cause names the *field*, its *value*, the *problem* and the *remedy*, and carries
the exit status that `python -m align` ends with: 2 for the user's input, 1 for a fault of ours.
"""

from __future__ import annotations

import re
from typing import Any

from align.core.redaction import URL_FIELDS, redacted, secret_url

NOT_PASSED = 3
"""The exit status of an evaluation in which a gate is not passed, and of a replay that differs: no error."""

LONE = re.compile("[\ud800-\udfff]")


class AlignError(Exception):
    """Root of everything this package raises on purpose."""

    exit_status = 1


class InputError(AlignError, ValueError):
    """A value that the user gave cannot be used.

    Args:
        field: the configuration key, file or column at fault, as the user would write it.
        value: what was found there.
        problem: what is wrong with it, as a clause without a full stop.
        remedy: what to do about it, as a sentence.

    None of them keeps a secret that it was given, nor half a character that no file can be written with.
    """

    exit_status = 2

    def __init__(self, field: str, value: Any, problem: str, remedy: str) -> None:
        if isinstance(value, str):
            value = readable(secret_url(value) if field in URL_FIELDS else value)
        self.field, self.problem, self.remedy = map(readable, (field, problem, remedy))
        self.value = value
        text = value if isinstance(value, str) else readable(repr(value))
        super().__init__(f"{self.field}={text}: {self.problem}. {self.remedy}")


def readable(text: str) -> str:
    """`text` as people and files can have it: secrets masked, lone surrogates spelled out."""
    return redacted(text).encode("utf-8", "backslashreplace").decode()


def half_character(text: str) -> str | None:
    """The first lone surrogate of a text, as `U+D800`: half a character, which no file, database or tokenizer takes.
    None where there is none."""
    found = LONE.search(text)
    return f"U+{ord(found[0]):04X}" if found else None


class MissingArtifact(InputError, FileNotFoundError):
    """A reference such as `sft:latest` names nothing on disk."""


class CorruptFile(InputError):
    """A file is there but cannot be trusted: truncated, tampered with, or not what its name says."""


class RunBusy(InputError):
    """Another process holds the run's folder."""


class RunConflict(InputError):
    """The run's folder belongs to another configuration."""


class StorageError(InputError, OSError):
    """A folder cannot be written or the disk is full."""


def require(condition: bool, field: str, value: Any, problem: str, remedy: str) -> None:
    """Raise `InputError` unless `condition` holds."""
    if not condition:
        raise InputError(field, value, problem, remedy)


def require_schema_version(version: Any, expected: int, field: str, value: Any, remedy: str) -> None:
    """Raise `InputError` unless a file or a store has the one version that this align reads."""
    problem = f"has schema_version {version}, and this version of align reads {expected}"
    require(type(version) is int and version == expected, field, value, problem, remedy)


class NotFinite(ArithmeticError):
    """The model has no distribution to draw from: its logits are nan or infinite."""
