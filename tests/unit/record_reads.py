"""Read the records of a data set in tests, without `align.data.sets.gather`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from align.core.errors import InputError
from align.data.read.drops import BadRows, Drop
from align.data.read.records import ParsedRecord, iter_outcomes


def read_records(
    path: str, bad_rows: BadRows, drops: Counter[Drop] | None = None, **more: Any
) -> Iterator[ParsedRecord]:
    """Yield the records of a data set. Refused rows and drops are counted."""
    for _, result in iter_outcomes(path, **more):
        if isinstance(result, InputError):
            bad_rows.add(result)
        elif isinstance(result, ParsedRecord):
            yield result
        elif drops is not None:
            drops[result] += 1
