"""A user's own function as a scorer."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from align import ranks
from align.errors import InputError
from align.functions import theirs
from align.types import Conversation, Rollout

if TYPE_CHECKING:
    from torch import Tensor

FIELD = "reward.fn"
LARGEST = (2 - 2**-23) * 2.0**127
"""That fp32 holds."""


class Late(BaseException):
    """A function has not answered in time. No `except Exception` of its own holds it back."""


@contextmanager
def within(seconds: float | None, name: str) -> Iterator[None]:
    """Interrupts what the user's code does after so many seconds, by the process's alarm, and again each second after
    that. Outside the main thread there is no alarm, and no limit; nor is there one inside a call of a C library.

    Raises:
        InputError: it took longer.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    armed, rang = True, False

    def late(signum: int, frame: object) -> None:
        nonlocal rang
        if armed:
            rang = True
            raise Late

    before = signal.signal(signal.SIGALRM, late)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
        yield
    except (Late, InputError):
        if not rang:
            raise
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if rang:  # whatever the function made of it: a bare `except` gives wrong scores for late ones
        problem = f"{name} has not answered after so many seconds"
        raise InputError("reward.timeout", seconds, problem, "Make it faster, or raise the limit.")


class Function:
    """Calls `function` with a list of conversations, each a list of `{role, content}` that ends with the answer; it
    returns one finite number each.

    Args:
        timeout: seconds that a call may take; None for as long as it takes.
    """

    def __init__(
        self, function: Callable[[list[list[dict[str, str]]]], Any], name: str, timeout: float | None = None
    ) -> None:
        self.function, self.name, self.timeout = function, name, timeout

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        """On several ranks each asks for its share.

        Raises:
            InputError: the function raises, or returns something else than a finite number for each conversation.
        """
        import torch

        mine = ranks.dealt(conversations)  # there may be fewer than ranks
        scores = ranks.gathered(self.asked(mine) if mine else [], len(conversations))
        return torch.tensor(scores, dtype=torch.float32)

    def asked(self, conversations: Sequence[Conversation]) -> list[float]:
        """What the function says of some of them, checked."""
        with within(self.timeout, self.name):
            with theirs(FIELD, self.name, "raised {error}", "Correct the function.", Late):
                given = self.function([c.as_dicts() for c in conversations])
            problem = f"returned {type(given).__name__}, not a number for each conversation ({{error}})"
            # A generator runs here, as may a `__float__`.
            with theirs(FIELD, self.name, problem, "Return a list of numbers.", Late):
                scores = [float(score) for score in given]
        if len(scores) != len(conversations):
            raise InputError(
                FIELD, self.name, f"returned {len(scores)} numbers for {len(conversations)} conversations",
                "Return one for each, in their order.",
            )  # fmt: skip
        for score, conversation in zip(scores, conversations, strict=True):
            if not abs(score) <= LARGEST:
                answer = conversation.messages[-1].content
                raise InputError(
                    FIELD,
                    self.name,
                    f"returned {score} for the answer {answer[:60]!r}",
                    "Return finite numbers that fp32 can hold.",
                )
        return scores
