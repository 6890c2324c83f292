"""What to say when a command line does not become a configuration: field, value, problem, remedy.

Messages only: `compose` finds out what is wrong, this module words it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from align.config.synonyms import keys_for
from align.errors import InputError

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
# What people write when they mean a file or a hub id, and the way to say that here.
BY_PATH = {"model": "model=hub model.path={}", "data": "data=jsonl data.path={}"}

SUCCESSORS = {"value_trunk": "stage.value_backbone"}
"""Names of keys in older versions, and what they are called now."""


def not_an_assignment(argument: str) -> InputError:
    if argument[:1] in "+~":
        return InputError(
            "argument", argument, "nothing can be added to the configuration or taken out of it",
            "Write key=value, with a key that is there already.",
        )  # fmt: skip
    return InputError("argument", argument, "is not of the form key=value", "Write for example stage=sft, or seed=1.")


def not_a_key(key: str, value: str, known: Sequence[str], stage: str | None, owners: Sequence[str]) -> InputError:
    """Args:
    known: every key and group there is.
    stage: the stage that runs; None where none was named.
    owners: the stages that do have this key.
    """
    if key.startswith("stage.") and stage is None:
        return InputError("stage", "(missing)", f"{key}={value} is a setting of a stage", "Add stage=NAME.")
    if owners:
        problem = f"is not a key of stage={stage}, but of {' and '.join(f'stage={o}' for o in owners)}"
        return InputError(key, value, problem, "Drop it, or run that stage.")
    if (successor := SUCCESSORS.get(key.rpartition(".")[2])) in known:
        return InputError(key, value, f"is called {successor} now", f"Write {successor}={value}.")
    close = closest(key, known)
    command = f"python -m align{f' stage={stage}' if stage else ''} --cfg job"
    return InputError(
        key, value, "is not a key", f"Did you mean {' or '.join(close)}?" if close else f"`{command}` shows every key."
    )


def closest(key: str, known: Sequence[str]) -> list[str]:
    """The keys that somebody may have meant: what the field's word stands for here, else the likeliest spelling. The
    name counts, not the group in front of it, which any two keys of it have in common."""
    group, _, name = key.rpartition(".")
    if meant := [k for k in keys_for(name) if k in known]:
        return meant
    by_name: dict[str, list[str]] = {}
    for k in known:
        by_name.setdefault(k.rpartition(".")[2], []).append(k)
    for likely in difflib.get_close_matches(name, by_name, n=1, cutoff=0.8):
        if not group:
            return sorted(by_name[likely], key=lambda k: not k.startswith("stage."))[:2]
        alike = partial(difflib.SequenceMatcher, None, group)
        return [max(by_name[likely], key=lambda k: alike(k.rpartition(".")[0]).ratio())]
    return []


def not_a_choice(group: str, name: str, names: Sequence[str]) -> InputError:
    remedy = f"Choose one of: {', '.join(names)}."
    if group in BY_PATH and re.search(r"[/.]", name):
        remedy = f"Did you mean {BY_PATH[group].format(name)}? {remedy}"
    elif close := difflib.get_close_matches(name, names, n=1):
        remedy = f"Did you mean {group}={close[0]}? {remedy}"
    return InputError(group, name or "(empty)", "is not a choice here", remedy)


def not_a_value(key: str, value: str, kind: type | None, below: Sequence[str]) -> InputError:
    """Args:
    kind: the type that is wanted, where it is a plain one.
    below: the keys under `key`, where it holds several.
    """
    if below:
        return InputError(key, value, "holds several keys", f"Set one of them: {', '.join(below)}.")
    wanted = KINDS.get(kind) if kind else None
    if wanted is None:
        return InputError(key, value or "(empty)", "cannot be read", "Quote it as \"key='value'\".")
    return InputError(key, value or "(empty)", f"is not {wanted}", f"Give {wanted}.")


def missing(key: str) -> InputError:
    return InputError(key, "(missing)", "has no default", f"Add {key}=VALUE.")


def broken_file(error: Exception, files: Mapping[str, Path], chosen: Sequence[Path]) -> InputError:
    """A group file that does not read or does not fit.

    Args:
        files: `group/choice` → its file, for every choice there is.
        chosen: the files that were asked for, to name where the error names none.
    """
    text = str(error).strip()
    named = re.search(r"[Ii]n '([^']+)'", text)
    path = (files.get(named.group(1)) if named else None) or " or ".join(map(str, chosen))
    if mark := getattr(error, "problem_mark", None):  # a syntax error, which PyYAML places
        path = Path(str(mark.name).removeprefix("file://"))
        problem = f"line {mark.line + 1}: {getattr(error, 'problem', 'is not YAML')}"
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        problem = next((line for line in lines if "while composing" not in line), type(error).__name__)
        problem = re.sub(r"^In '[^']+': ", "", problem)
        if (old := re.search(r"Key '(\w+)' not in", problem)) and (successor := SUCCESSORS.get(old[1])):
            problem = f"{old[1]} is called {successor} now"
    return InputError("configuration", str(path or "conf"), problem.rstrip(".:"), "Correct that file, or move it away.")
