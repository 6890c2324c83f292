"""A user's own function, named as `package.module:name`: found, and asked for with its errors told as theirs."""

from __future__ import annotations

import importlib
import inspect
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from align.core.errors import InputError

LIBRARIES = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
"""What many functions are made of, and tells none from another."""
REMEDY = "Put it into the working folder or install it, and check that it imports."


@contextmanager
def theirs(field: str, name: str, problem: str, remedy: str, *through: type[BaseException]) -> Iterator[None]:
    """Code of the user's: whatever it raises is its fault, `sys.exit` among it, which would end the run as if it were
    done. Ctrl-C alone is the user's wish.

    Args:
        problem: with `{error}` in it.
        through: errors that are none of theirs, and go on as they are.
    """
    try:
        yield
    except (KeyboardInterrupt, *through):
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(field, name, problem.replace("{error}", reason), remedy) from error


def load_function(spec: str, field: str) -> Callable[..., Any]:
    """The function that `package.module:name` names, found as Python finds modules, the working folder included.

    Args:
        field: where the user named it, for errors.

    Raises:
        InputError: there is no such module or no such function, or importing it fails.
    """
    module_name, _, name = spec.partition(":")
    module = imported(spec, field)
    with theirs(field, spec, f"{module_name} cannot be asked for {name} ({{error}})", REMEDY):
        function = getattr(module, name, None)  # which a module may compute
    if not callable(function):
        found = sorted(n for n, f in vars(module).items() if inspect.isfunction(f) and not n.startswith("_"))
        raise InputError(
            field, spec, f"{module_name} has no function {name}", f"It has: {', '.join(found) or 'no functions'}."
        )
    return function


def imported(spec: str, field: str) -> ModuleType:
    """The module that `package.module:name` names.

    Raises:
        InputError: importing it fails.
    """
    module_name = spec.partition(":")[0]
    with theirs(field, spec, f"{module_name} cannot be imported ({{error}})", REMEDY):
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


def source_of(spec: str, field: str) -> Path | None:
    """The file of the module that `package.module:name` names; None where there is none, as for a built-in.

    Raises:
        InputError: importing it fails.
    """
    path = getattr(imported(spec, field), "__file__", None)
    return Path(path) if path else None
