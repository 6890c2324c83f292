"""A user's Python function as a scorer."""

from __future__ import annotations

import inspect
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from align import ranks
from align.core.errors import InputError
from align.core.functions import convert_user_errors
from align.core.types import Conversation, Rollout

if TYPE_CHECKING:
    from torch import Tensor

FIELD = "reward.fn"
LARGEST = (2 - 2**-23) * 2.0**127
"""The largest finite number of fp32."""


class TimedOut(BaseException):
    """The exception that interrupts a user's function when its time is over.

    It is no `Exception`, so that the function does not catch it by accident.
    """


@contextmanager
def limit_time(seconds: float | None, name: str) -> Iterator[None]:
    """Interrupt a `with` block by SIGALRM after some seconds, and raise InputError for the setting `reward.timeout`.

    The block is interrupted again each second after that. There is no limit if `seconds` is `None`, outside the main
    thread, or inside a call of a C library.

    Raises:
        InputError: the block took longer.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    armed = True
    timed_out = False

    def interrupt(signum: int, frame: object) -> None:
        nonlocal timed_out
        if armed:
            timed_out = True
            raise TimedOut

    previous_handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
        yield
    except (TimedOut, InputError):
        if not timed_out:
            raise
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)
    if timed_out:  # even if the function returned: a bare `except` in it may have caught the interrupt
        problem = f"{name} did not return within this number of seconds"
        raise InputError("reward.timeout", seconds, problem, "Make it faster, or raise the limit.")


class MissingColumn(KeyError):
    """The error for a user's function that reads a column that a row does not have."""

    def __init__(self, row_name: str, column: object, columns: Sequence[str]) -> None:
        super().__init__(column)
        self.row_name = row_name
        self.column = column
        self.columns = tuple(columns)


class Row(dict[str, Any]):
    """A dict of a prompt's other data set columns, such as `answer`, which raises MissingColumn for a missing one.

    It is empty if the columns are not known.

    Args:
        name: of the row, for errors.
    """

    def __init__(self, name: str, columns: Mapping[str, Any]) -> None:
        super().__init__(columns)
        self.name = name

    def __missing__(self, column: object) -> Any:
        raise MissingColumn(self.name, column, [*self])


def takes_rows(function: Callable[..., Any]) -> bool:
    """Return whether a user's function takes the prompts' rows: its second parameter is required, or called `rows`."""
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):  # a built-in without a signature
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 and (positional[1].default is inspect.Parameter.empty or positional[1].name == "rows")


class FunctionReward:
    """A scorer that calls a user's Python function with conversations and, if it takes them, their data set rows.

    Args:
        function: takes a list of conversations, each a list of `{role, content}` that ends with the answer, and, if it
            has a second parameter, a list of their rows, each a dict of columns. Returns a finite number for each.
        timeout: seconds of a call at most. None for no limit.
    """

    def __init__(self, function: Callable[..., Any], name: str, timeout: float | None = None) -> None:
        self.function = function
        self.name = name
        self.timeout = timeout
        self.takes_rows = takes_rows(function)

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        """Return the user's function's scores of all conversations, [B] fp32. Each rank calls it for its share.

        Raises:
            InputError: the function raises, or returns anything but a finite number for each conversation.
        """
        import torch

        share = ranks.select_own_share(conversations)  # empty on some ranks if there are more ranks than conversations
        scores = ranks.gather_shares(self.call_checked(share) if share else [], len(conversations))
        return torch.tensor(scores, dtype=torch.float32)

    def call_checked(self, conversations: Sequence[Conversation]) -> list[float]:
        """Call the user's function, and return its scores or raise InputError unless each answer has a finite number.

        It also raises InputError if the function raises or takes longer than `timeout`.
        """
        with limit_time(self.timeout, self.name):
            returned = self.call_or_locate_error(conversations)
            problem = f"returned {type(returned).__name__}, not a number for each conversation ({{error}})"
            with convert_user_errors(FIELD, self.name, problem, "Return a list of numbers.", TimedOut):
                scores = [float(score) for score in returned]
        if len(scores) != len(conversations):
            problem = f"returned {len(scores)} numbers for {len(conversations)} conversations"
            raise InputError(FIELD, self.name, problem, "Return one for each, in their order.")
        for score, conversation in zip(scores, conversations, strict=True):
            if not abs(score) <= LARGEST:
                problem = f"returned {score} for {describe_answer(conversation)}"
                raise InputError(FIELD, self.name, problem, "Return finite numbers that fp32 can hold.")
        return scores

    def call_or_locate_error(self, conversations: Sequence[Conversation]) -> Any:
        """Return the user's function's result, or raise InputError with the answer for which it fails.

        If it raises for several answers, it is called again with each alone, to find the one at fault.

        Raises:
            InputError: names the answer and its row if the function raises for that one alone too.
        """
        try:
            return self.call_function(conversations)
        except (KeyboardInterrupt, TimedOut):
            raise
        except BaseException as error:
            if len(conversations) > 1:
                for conversation in conversations:
                    self.call_or_locate_error([conversation])
                raise build_error(self.name, error, f"{len(conversations)} answers together") from error
            raise build_error(self.name, error, describe_answer(conversations[0])) from error

    def call_function(self, conversations: Sequence[Conversation]) -> Any:
        arguments: list[Any] = [[conversation.as_dicts() for conversation in conversations]]
        if self.takes_rows:
            arguments.append([Row(describe_row(conversation), conversation.columns) for conversation in conversations])
        returned = self.function(*arguments)
        return [*returned] if isinstance(returned, Iterator) else returned  # a generator runs here


def describe_row(conversation: Conversation) -> str:
    return conversation.id or "a prompt without an id"


def describe_answer(conversation: Conversation) -> str:
    """Return a phrase for an error with the first 60 characters of a conversation's answer and the name of its row."""
    return f"the answer {conversation.messages[-1].content[:60]!r} to {describe_row(conversation)}"


def build_error(name: str, error: BaseException, answers: str) -> InputError:
    """Build the InputError for an exception that a user's function raised, or for a column that it did not find.

    `SystemExit` counts too: it would end the run as if it were done.

    Args:
        answers: the answers that the function was called with, in words.
    """
    if isinstance(error, MissingColumn):
        columns = f"It has {', '.join(error.columns)}." if error.columns else "It has no columns besides its prompt."
        return InputError(
            f"{error.row_name}, {error.column}", "(missing)", f"{name} asks for this column", f"{columns} Add it."
        )
    problem = f"raised {type(error).__name__}: {error} for {answers}"
    return InputError(FIELD, name, problem, "Correct the function, or the row.")
