"""A user's own function as a scorer."""

from __future__ import annotations

import importlib
import inspect
import signal
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from align.errors import InputError
from align.types import Conversation, Rollout

if TYPE_CHECKING:
    from torch import Tensor

FIELD = "reward.fn"
LIBRARIES = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
"""What many functions are made of, and tells none from another."""
REMEDY = "Put it into the working folder or install it, and check that it imports."
LARGEST = (2 - 2**-23) * 2.0**127
"""That fp32 holds."""


@contextmanager
def theirs(name: str, problem: str, remedy: str) -> Iterator[None]:
    """Code of the user's: whatever it raises is its fault, `sys.exit` among it, which would end the run as if it were
    done. Ctrl-C alone is the user's wish.

    Args:
        problem: with `{error}` in it.
    """
    try:
        yield
    except (KeyboardInterrupt, Late):
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(FIELD, name, problem.replace("{error}", reason), remedy) from error


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
        """Raises:
        InputError: the function raises, or returns something else than a finite number for each conversation.
        """
        with within(self.timeout, self.name):
            with theirs(self.name, "raised {error}", "Correct the function."):
                given = self.function([c.as_dicts() for c in conversations])
            problem = f"returned {type(given).__name__}, not a number for each conversation ({{error}})"
            with theirs(self.name, problem, "Return a list of numbers."):  # a generator runs here, as may a `__float__`
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
        import torch

        return torch.tensor(scores, dtype=torch.float32)


def load_function(spec: str) -> Callable[..., Any]:
    """The function that `package.module:name` names, found as Python finds modules, the working folder included.

    Raises:
        InputError: there is no such module or no such function, or importing it fails.
    """
    module_name, _, name = spec.partition(":")
    module = imported(spec)
    with theirs(spec, f"{module_name} cannot be asked for {name} ({{error}})", REMEDY):
        function = getattr(module, name, None)  # which a module may compute
    if not callable(function):
        found = sorted(n for n, f in vars(module).items() if inspect.isfunction(f) and not n.startswith("_"))
        raise InputError(
            FIELD, spec, f"{module_name} has no function {name}", f"It has: {', '.join(found) or 'no functions'}."
        )
    return function


def imported(spec: str) -> ModuleType:
    """The module that `package.module:name` names.

    Raises:
        InputError: importing it fails.
    """
    module_name = spec.partition(":")[0]
    with theirs(spec, f"{module_name} cannot be imported ({{error}})", REMEDY):
        return importlib.import_module(module_name)


def defined(function: Callable[..., Any]) -> list[tuple[Path, str]]:
    """Where a function is defined, whichever module names it, and where those are that it is made of: what it wraps,
    what a `partial` binds, what it closes over. `(file, name there)` of each that is no library's."""
    found: dict[tuple[Path, str], None] = {}
    todo, seen = [function], set[int]()
    while todo:
        one = todo.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, partial):
            todo += [one.func, *filter(callable, (*one.args, *one.keywords.values()))]
            continue
        inner = one if hasattr(one, "__qualname__") else type(one)  # an object that can be called
        if (file := file_of(inner)) and (one is function or not LIBRARIES & set(file.parents)):
            found[file, inner.__qualname__] = None
        bound = [getattr(one, "__wrapped__", None), getattr(one, "__func__", None)]
        with suppress(ValueError):  # a cell that nothing was put into yet
            bound += [cell.cell_contents for cell in getattr(one, "__closure__", None) or ()]
        todo += filter(callable, bound)
    named = [place for place in found if "<locals>" not in place[1]]
    return named or list(found)  # what a decorator makes has one name for all that it was put on


def file_of(function: Any) -> Path | None:
    """The source file of a function or a class; None of a built-in."""
    try:
        file = inspect.getsourcefile(function)
    except TypeError:
        return None
    return Path(file).resolve() if file and Path(file).is_file() else None


def source_of(spec: str) -> Path | None:
    """The file of the module that `package.module:name` names; None where there is none, as for a built-in.

    Raises:
        InputError: importing it fails.
    """
    path = getattr(imported(spec), "__file__", None)
    return Path(path) if path else None
