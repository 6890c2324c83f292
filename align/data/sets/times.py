"""Times as rows write them."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime

from align.errors import InputError

EARLIEST, LATEST = 1e8, 1e10


def seconds(given: str | None, field: str) -> float:
    """Seconds since 1970 of an ISO 8601 time (without a zone, UTC), or of a number of seconds or milliseconds since.

    Raises:
        InputError: it is none of them. A number is one only if it lies between 1973 and 2286, so that no year or day
            passes for one.
    """
    text = (given or "").strip()
    with suppress(ValueError, OverflowError):
        when = datetime.fromisoformat(text)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    with suppress(ValueError):
        number = float(text)
        for unit in (1, 1000):
            if EARLIEST <= number / unit <= LATEST:
                return number / unit
    remedy = "Write times as 2026-11-26 or 2026-11-26T12:00:00Z, in every row."
    raise InputError(field, given, "is no time", remedy)
