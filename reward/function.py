"""A user's own function as a scorer."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from align.errors import InputError
from align.types import Conversation, Rollout

FIELD = "reward.fn"
REMEDY = "Put it into the working folder or install it, and check that it imports."
LARGEST = torch.finfo(torch.float32).max


@contextmanager
def theirs(name: str, problem: str, remedy: str) -> Iterator[None]:
    """Code of the user's: whatever it raises is its fault, `sys.exit` among it, which would end the run as if it were
    done. Ctrl-C alone is the user's wish.

    Args:
        problem: with `{error}` in it.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        told = f"{type(error).__name__}: {error}"
        raise InputError(FIELD, name, problem.replace("{error}", told), remedy) from error


class Function:
    """Calls `function` with a list of conversations, each a list of `{role, content}` that ends with the answer; it
    returns one finite number each."""

    def __init__(self, function: Callable[[list[list[dict[str, str]]]], Any], name: str) -> None:
        self.function, self.name = function, name

    def score(self, conversations: Sequence[Conversation], rollout: Rollout | None = None) -> Tensor:
        """Raises:
        InputError: the function raises, or returns something else than a finite number for each conversation.
        """
        with theirs(self.name, "raised {error}", "Correct the function."):
            given = self.function([c.as_dicts() for c in conversations])
        problem = f"returned {type(given).__name__}, not a number for each conversation ({{error}})"
        with theirs(self.name, problem, "Return a list of numbers."):  # a generator runs here, and so may a `__float__`
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


def defined(function: Callable[..., Any]) -> tuple[Path | None, str]:
    """The file that a function is defined in, whichever module names it, and its name there; no file of a built-in."""
    inner = inspect.unwrap(function)
    inner = inner if hasattr(inner, "__qualname__") else type(inner)  # an object that can be called
    try:
        file = inspect.getsourcefile(inner)
    except TypeError:
        file = None
    return (Path(file).resolve() if file and Path(file).is_file() else None), inner.__qualname__


def source_of(spec: str) -> Path | None:
    """The file of the module that `package.module:name` names; None where there is none, as for a built-in.

    Raises:
        InputError: importing it fails.
    """
    path = getattr(imported(spec), "__file__", None)
    return Path(path) if path else None
