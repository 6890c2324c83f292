"""How a rank ends that is not the first to fail."""

from __future__ import annotations

from typing import NamedTuple

from align.errors import AlignError


class RankFailed(AlignError):
    """Another rank failed first, and has said why.

    Attributes:
        trace: its traceback, where that was a fault of ours.
    """

    def __init__(self, message: str, status: int, trace: str = "") -> None:
        super().__init__(message)
        self.exit_status, self.trace = status, trace


class RankLost(AlignError):
    """Another rank is gone without a word, or does not answer.

    Attributes:
        late: it does not answer.
    """

    def __init__(self, message: str, late: bool) -> None:
        super().__init__(message)
        self.late = late


class Failure(NamedTuple):
    """The first rank that failed: its number, its exit status and why; the traceback of a fault of ours."""

    rank: int
    status: int
    said: str
    trace: str = ""
