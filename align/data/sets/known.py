"""The content ids of records that a data set gave, SHA-256 all of them: as long as a record is the very one that was
read, nobody computes its id again.

A record that was changed, by a system prompt that was added or reasoning that was hidden, is another object, and says
something else.
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
