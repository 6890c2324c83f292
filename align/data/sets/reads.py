"""The records of a source in parts. A part is made of a fixed range of the source's rows, so that it is the same
whoever makes it, and whatever was made before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from align.data.read.drops import BadRows, Drop
from align.data.read.records import Read
from align.data.sets.source import Source

PART = 50_000
"""Rows of a source that one part is made of; of a record that stands in several, the first one counts."""
UNDECIDED, SKIPPED = "dropped_undecided", "skipped_rows"
"""What counts pairs of which no answer is preferred, and rows that were refused, as for plain files."""


class Reads:
    """The records of a source from the beginning of a part on.

    Args:
        part: the number of that part, from 0.
        size: rows of a part.
        counts: rows of the source's files, where they are known.

    Attributes:
        last: whether nothing is behind the part that was read last.
    """

    def __init__(self, source: Source, part: int, size: int, counts: Sequence[int] = ()) -> None:
        self.last, self._size = False, size
        self._bad_rows, self._drops, self._at = BadRows(skips=True), Counter[Drop](), part
        self._ended: dict[int, dict[str, Any]] = {}
        self._reads = source.reads(self._bad_rows, part * size, self._drops, self._reached, counts)
        self._advance()

    def part(self, number: int) -> Iterator[Read]:
        """Its records, in order. Parts are read one after another, each to its end."""
        while self._next is not None and self._at == number:
            yield self._next
            self._advance()

    def left_out(self, number: int) -> dict[str, Any]:
        """What gave no record in the part that was read last: the refused rows (`BadRows.as_json`), and counts."""
        found = self._ended.pop(number)
        self.last = self._next is None and not self._ended
        return found

    def _advance(self) -> None:
        self._next: Read | None = next(self._reads, None)
        if self._next is None:
            self._end()

    def _reached(self, row: int) -> None:
        while row > (self._at + 1) * self._size:
            self._end()

    def _end(self) -> None:
        counts = {UNDECIDED: self._drops.total(), SKIPPED: self._bad_rows.count}
        self._ended[self._at] = {"bad_rows": self._bad_rows.as_json(), "counts": counts}
        self._bad_rows.clear()
        self._drops.clear()
        self._at += 1
