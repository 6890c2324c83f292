"""A user's own function as a scorer: of conversations, and, where it takes them, of the rows that they came from."""

from __future__ import annotations

import inspect
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from align import ranks
from align.core.errors import InputError
from align.core.functions import explain_user_errors
from align.core.types import Conversation, Rollout

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


class NoColumn(KeyError):
    """A function asks a row for a column that it has not."""

    def __init__(self, where: str, column: object, there: Sequence[str]) -> None:
        super().__init__(column)
        self.where, self.column, self.there = where, column, tuple(there)


class Row(dict[str, Any]):
    """The columns of a prompt's row, but for those that the prompt is made of; empty where nobody knows them.

    Args:
        where: the row, for errors.
    """

    def __init__(self, where: str, columns: Mapping[str, Any]) -> None:
        super().__init__(columns)
        self.where = where

    def __missing__(self, column: object) -> Any:
        raise NoColumn(self.where, column, [*self])


def takes_rows(function: Callable[..., Any]) -> bool:
    """Whether a function asks for the rows: it has a second parameter that has to be given, or is called `rows`."""
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):  # a built-in does not say
        return False
    given = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return len(given) > 1 and (given[1].default is inspect.Parameter.empty or given[1].name == "rows")


class Function:
    """Calls `function` with a list of conversations, each a list of `{role, content}` that ends with the answer, and,
    where it takes a second argument, with their rows, each a dict of columns; it returns one finite number each.

    Args:
        timeout: seconds that a call may take; None for as long as it takes.
    """

    def __init__(self, function: Callable[..., Any], name: str, timeout: float | None = None) -> None:
        self.function, self.name, self.timeout = function, name, timeout
        self.takes_rows = takes_rows(function)

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        """On several ranks each asks for its share.

        Raises:
            InputError: the function raises, or returns something else than a finite number for each conversation.
        """
        import torch

        mine = ranks.own_share(conversations)  # there may be fewer than ranks
        scores = ranks.gather_shares(self.asked(mine) if mine else [], len(conversations))
        return torch.tensor(scores, dtype=torch.float32)

    def asked(self, conversations: Sequence[Conversation]) -> list[float]:
        """What the function says of some of them, checked."""
        with within(self.timeout, self.name):
            given = self.given(conversations)
            problem = f"returned {type(given).__name__}, not a number for each conversation ({{error}})"
            with explain_user_errors(FIELD, self.name, problem, "Return a list of numbers.", Late):
                scores = [float(score) for score in given]
        if len(scores) != len(conversations):
            raise InputError(
                FIELD, self.name, f"returned {len(scores)} numbers for {len(conversations)} conversations",
                "Return one for each, in their order.",
            )  # fmt: skip
        for score, conversation in zip(scores, conversations, strict=True):
            if not abs(score) <= LARGEST:
                raise InputError(
                    FIELD, self.name, f"returned {score} for {told(conversation)}",
                    "Return finite numbers that fp32 can hold.",
                )  # fmt: skip
        return scores

    def given(self, conversations: Sequence[Conversation]) -> Any:
        """What the function returns. Where it raises, each answer is given to it by itself, to find the one at fault.

        Raises:
            InputError: names the answer and its row, where it raises for one alone too.
        """
        try:
            return self.call(conversations)
        except (KeyboardInterrupt, Late):
            raise
        except BaseException as error:
            if len(conversations) > 1:
                for conversation in conversations:
                    self.given([conversation])
                raise fault(self.name, error, f"{len(conversations)} answers together") from error
            raise fault(self.name, error, told(conversations[0])) from error

    def call(self, conversations: Sequence[Conversation]) -> Any:
        spoken = [conversation.as_dicts() for conversation in conversations]
        rows = [[Row(place(one), one.columns) for one in conversations]] if self.takes_rows else []
        found = self.function(spoken, *rows)
        return [*found] if isinstance(found, Iterator) else found  # a generator runs here


def place(conversation: Conversation) -> str:
    return conversation.id or "a prompt without an id"


def told(conversation: Conversation) -> str:
    """An answer and its row, for errors."""
    return f"the answer {conversation.messages[-1].content[:60]!r} to {place(conversation)}"


def fault(name: str, error: BaseException, what: str) -> InputError:
    """What the user is told of a function that raised; of `sys.exit` too, which would end the run as if it were done.

    Args:
        what: it was asked about.
    """
    if isinstance(error, NoColumn):
        there = f"It has {', '.join(error.there)}." if error.there else "It has no columns besides its prompt."
        return InputError(
            f"{error.where}, {error.column}", "(missing)", f"{name} asks for this column", f"{there} Add it."
        )
    return InputError(
        FIELD, name, f"raised {type(error).__name__}: {error} for {what}",
        "Correct the function, or the row.",
    )  # fmt: skip
