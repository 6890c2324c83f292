"""The exceptions that this package raises, and checks that raise them.

Every error that a user can cause names the *field*, its *value*, the *problem* and the *remedy*, and carries
the exit status that `python -m align` ends with: 2 for the user's input, 1 for a fault of ours.
"""

from __future__ import annotations

import re
from typing import Any

from align.core.redaction import URL_FIELDS, hide_password, redact

NOT_PASSED = 3
"""The exit status of an evaluation that fails a gate, and of a replay that differs. It is not an error."""

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class AlignError(Exception):
    """Base class of all exceptions that this package raises on purpose."""

    exit_status = 1


class InputError(AlignError, ValueError):
    """An error about a value from the user, with its field, the problem and the remedy in the message.

    Secrets in the message are masked, and lone surrogates are escaped.

    Args:
        field: the configuration key, file or column at fault, as the user would write it.
        value: the value of the field.
        problem: the fact that is wrong with it, as a clause without a full stop.
        remedy: the change to make, as a sentence.
    """

    exit_status = 2

    def __init__(self, field: str, value: Any, problem: str, remedy: str) -> None:
        if isinstance(value, str):
            value = make_printable(hide_password(value) if field in URL_FIELDS else value)
        self.field, self.problem, self.remedy = map(make_printable, (field, problem, remedy))
        self.value = value
        text = value if isinstance(value, str) else make_printable(repr(value))
        super().__init__(f"{self.field}={text}: {self.problem}. {self.remedy}")


def make_printable(text: str) -> str:
    """Return a text with secrets masked and lone surrogates escaped, so that it can be printed or written to a file."""
    return redact(text).encode("utf-8", "backslashreplace").decode()


def find_lone_surrogate(text: str) -> str | None:
    """Return the name of the first lone surrogate in a text, such as `U+D800`, or None if the text has none.

    A lone surrogate is half a character, which no file, database or tokenizer accepts.
    """
    match = LONE_SURROGATE.search(text)
    return f"U+{ord(match[0]):04X}" if match else None


class MissingArtifact(InputError, FileNotFoundError):
    """The error for a file, or an artifact of a reference such as `sft:latest`, that does not exist."""


class CorruptFile(InputError):
    """The error for a file that exists and cannot be trusted: truncated, altered, or of another kind than expected."""


class RunBusy(InputError):
    """The error for a run whose folder another process has locked."""


class RunConflict(InputError):
    """The error for a run whose folder belongs to another configuration."""


class StorageError(InputError, OSError):
    """The error for a folder that cannot be written, or a full disk."""


def require(condition: bool, field: str, value: Any, problem: str, remedy: str) -> None:
    """Raise `InputError(field, value, problem, remedy)` unless `condition` is true."""
    if not condition:
        raise InputError(field, value, problem, remedy)


def require_schema_version(version: Any, expected: int, field: str, value: Any, remedy: str) -> None:
    """Raise `InputError` unless the schema version of a file or a store is the integer `expected`."""
    problem = f"has schema_version {version}, and this version of align reads {expected}"
    require(type(version) is int and version == expected, field, value, problem, remedy)


class NonFiniteLogits(ArithmeticError):
    """The error for logits that are nan or infinite, so that they give no distribution to sample from."""
