"""The content ids of the records that a data set gave. Who needs such an id takes it from here, and does not compute it
again.

An id belongs to the object that was read. A record that a stage changes, by a system prompt that it adds or reasoning
that it hides, is a new object: its id is computed. All ids here are SHA-256. Those of votes are not kept here: they are
computed under the project's key each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from align.types import Record


class Known:
    """Records and their content ids."""

    def __init__(self) -> None:
        self._ids: dict[int, bytes] = {}
        self._held: list[Sequence[Record]] = []  # no other object gets their addresses

    def add(self, records: Sequence[Record], ids: Sequence[bytes]) -> None:
        """Records as they were read, and the id of each (32 bytes)."""
        self._ids.update(zip(map(id, records), ids, strict=True))
        self._held.append(records)

    def content_id(self, record: Record) -> bytes | None:
        """The id with which this very record was read; None for any other."""
        return self._ids.get(id(record))


KNOWN: ContextVar[Known | None] = ContextVar("KNOWN", default=None)


@contextmanager
def remembered() -> Iterator[Known]:
    """What `remember` is told of inside the block."""
    known = Known()
    token = KNOWN.set(known)
    try:
        yield known
    finally:
        KNOWN.reset(token)


def remember(records: Sequence[Record], ids: Sequence[bytes]) -> None:
    """Tell whoever keeps them of records of a data set."""
    if (known := KNOWN.get()) is not None:
        known.add(records, ids)
