"""Load a user's own function, named as `package.module:name`, and turn exceptions of user code into input errors."""

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
"""Folders of the standard library and of installed packages, whose functions do not identify a user's function."""
REMEDY = "Put it into the working folder or install it, and check that it imports."


@contextmanager
def convert_user_errors(
    field: str, name: str, problem: str, remedy: str, *passed_on: type[BaseException]
) -> Iterator[None]:
    """Convert an exception of the `with` block, which runs a user's code, to an `InputError`.

    That includes SystemExit, which would end the run as if it were done. KeyboardInterrupt and the exceptions in
    `passed_on` are not converted.

    Args:
        problem: the clause of the error, with `{error}` in it.
        passed_on: exceptions that are not the user's fault.
    """
    try:
        yield
    except (KeyboardInterrupt, *passed_on):
        raise
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(field, name, problem.replace("{error}", reason), remedy) from error


def load_function(spec: str, field: str) -> Callable[..., Any]:
    """Import and return the function that `spec` names as `package.module:name`.

    The working folder is on the search path.

    Args:
        field: the setting that names it, for errors.

    Raises:
        InputError: there is no such module or no such function, or importing it fails.
    """
    module_name, _, name = spec.partition(":")
    module = import_module_of(spec, field)
    with convert_user_errors(field, spec, f"{name} of {module_name} cannot be read ({{error}})", REMEDY):
        function = getattr(module, name, None)  # a module may compute it
    if not callable(function):
        names = sorted(n for n, f in vars(module).items() if inspect.isfunction(f) and not n.startswith("_"))
        problem = f"{module_name} has no function {name}"
        raise InputError(field, spec, problem, f"It has: {', '.join(names) or 'no functions'}.")
    return function


def import_module_of(spec: str, field: str) -> ModuleType:
    module_name = spec.partition(":")[0]
    with convert_user_errors(field, spec, f"{module_name} cannot be imported ({{error}})", REMEDY):
        return importlib.import_module(module_name)


def find_definitions(function: Callable[..., Any]) -> list[tuple[Path, str]]:
    """Return the (file, qualified name) of a function and of each function that it wraps, binds or closes over.

    Binding is by `partial`. Functions of libraries are left out.
    """
    definitions: dict[tuple[Path, str], None] = {}
    queue: list[Any] = [function]
    visited = set[int]()
    while queue:
        target = queue.pop(0)
        if id(target) in visited:
            continue
        visited.add(id(target))
        if isinstance(target, partial):
            queue += [target.func, *filter(callable, (*target.args, *target.keywords.values()))]
            continue
        definition: Any = target if hasattr(target, "__qualname__") else type(target)  # an object that can be called
        if (file := find_source_file(definition)) and (target is function or not LIBRARIES & set(file.parents)):
            definitions[file, definition.__qualname__] = None
        bound = [getattr(target, "__wrapped__", None), getattr(target, "__func__", None)]
        with suppress(ValueError):  # a cell that is still empty
            bound += [cell.cell_contents for cell in getattr(target, "__closure__", None) or ()]
        queue += filter(callable, bound)
    # All functions that one decorator returns have the same name, `decorator.<locals>.wrapper`.
    named = [definition for definition in definitions if "<locals>" not in definition[1]]
    return named or list(definitions)


def find_source_file(function: Any) -> Path | None:
    """Return the source file of a function or a class, or None for a built-in."""
    try:
        file = inspect.getsourcefile(function)
    except TypeError:
        return None
    return Path(file).resolve() if file and Path(file).is_file() else None


def find_module_file(spec: str, field: str) -> Path | None:
    """Import the module of `spec`, which is `package.module:name`, and return its file, or None for a built-in module.

    Raises:
        InputError: importing it fails.
    """
    path = getattr(import_module_of(spec, field), "__file__", None)
    return Path(path) if path else None
