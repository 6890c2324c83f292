"""A user's own function as a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from align.data.clean.outcome import Drop, said, sequences
from align.data.read.content import PARTS, content_of
from align.data.read.messages import check_calls, displayed, messages_of
from align.errors import InputError, half_character
from align.functions import theirs
from align.types import Record

SHAPE = "Return the row, None to leave it out, or a text that says why it is left out."
REASON = 60
"""Characters of a function's reason that are counted by."""


@dataclass(frozen=True, slots=True)
class Function:
    """Calls a function with a row: `{"messages": [{"role": …, "content": …}, …]}`, `{"text": …}`, or a pair's `prompt`,
    `chosen` and `rejected`. It returns the row, changed or as it is; None to leave the row out; or a text, which leaves
    it out and is the reason that is counted.

    Args:
        function: importable by its name, where workers in other processes are to find it.
        name: `package.module:name`.
        field: where the user named it.
    """

    function: Callable[[dict[str, Any]], Any]
    name: str
    field: str = "fn"

    def __call__(self, record: Record) -> Record | Drop:
        """Raises:
        InputError: the function raises, or returns something else; names the row.
        """
        where = place(record)
        with theirs(self.field, self.name, f"raised {{error}} for {where}", "Correct the function."):
            given = self.function(content_of(record))
        if given is None:
            return Drop("fn", self.name)
        if isinstance(given, str):
            return Drop(f"fn: {given.strip()[:REASON] or self.name}", self.name)
        if not isinstance(given, Mapping):
            problem = f"returned {type(given).__name__} for {where}"
            raise InputError(self.field, self.name, problem, SHAPE)
        made = self._read(record, given, where)
        return record if made == record else made

    def _read(self, record: Record, row: Mapping[str, Any], where: str) -> Record:
        """The record that a returned row stands for, with all that the row does not say from `record`."""
        given = content_of(record)
        parts = ("text",) if isinstance(record, str) else PARTS[type(record)]
        if missing := [part for part in parts if part not in row]:
            raise InputError(self.field, self.name, f"returned a row without {missing[0]} for {where}", SHAPE)
        changed = {name for name in row.keys() | given.keys() if row.get(name) != given.get(name)}
        if other := sorted(changed - {*parts}):
            problem = f"returned a row with another {other[0]} for {where}"
            raise InputError(self.field, self.name, problem, f"Change {' or '.join(parts)} alone.")
        try:
            if isinstance(record, str):
                made = row["text"]
            else:
                made = replace(record, **{part: messages_of(row[part], self.field, part) for part in sorted(changed)})
                for conversation in sequences(made):
                    check_calls([(f"turn {i}", m) for i, m in enumerate(conversation.messages)], made.tools, self.field)
            if not isinstance(made, Record) or half_character(said(made)):
                raise ValueError("what is no text, or half a character")
        except ValueError as error:
            problem = f"returned a row that cannot be read for {where} ({error})"
            raise InputError(self.field, self.name, problem, SHAPE) from error
        return made


def place(record: Record) -> str:
    """A record as an error names it: by its place, or by how it begins."""
    id = "" if isinstance(record, str) else record.id
    return id or displayed(record if isinstance(record, str) else str(content_of(record)))
