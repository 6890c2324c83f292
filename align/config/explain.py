"""What to say when a command line does not become a configuration: field, value, problem, remedy.

Messages only: `compose` finds out what is wrong, this module words it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from align.config.group_files import EXPERIMENT
from align.config.options import OWN_FOLDER
from align.config.settings import A_RUN_EACH
from align.config.synonyms import absent, keys_for
from align.core.errors import InputError

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}
# What people write when they mean a file or a hub id, and the way to say that here.
BY_PATH = {"model": "model=hub model.path={}", "data": "data=files data.path={}"}

SUCCESSORS = {"value_trunk": "stage.value_backbone"}
"""Names of keys in older versions, and what they are called now."""


def not_an_assignment(argument: str, groups: Collection[str]) -> InputError:
    key, _, value = argument.lstrip("+").partition("=")
    if argument[:1] == "+" and key in groups:
        problem = "cannot be added: it is there already"
        return InputError("argument", argument, problem, f"Write {'+' * (key == EXPERIMENT)}{key}={value}.")
    if argument[:1] in ("+", "~"):
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
    if re.match(r"hydra[./]", key):
        return InputError(
            key, value, "is not a key: align keeps its own folders, logs and order of jobs",
            "Write run.root= and run.name= for folders, --config-dir for group files, -m for sweeps.",
        )  # fmt: skip
    if key.startswith("stage.") and stage is None:
        return InputError("stage", "(missing)", f"{key}={value} is a setting of a stage", "Add stage=NAME.")
    leaf = key.rpartition(".")[2]
    elsewhere = [k for k in keys_for(leaf) if k in known and k.endswith(f".{leaf}")]  # stage.max_length of stage=sft
    if owners and not elsewhere:
        problem = f"is not a key of stage={stage}, but of {' and '.join(f'stage={o}' for o in owners)}"
        return InputError(key, value, problem, "Drop it, or run that stage.")
    if (successor := SUCCESSORS.get(leaf)) in known:
        return InputError(key, value, f"is called {successor} now", f"Write {successor}={value}.")
    if why := absent(leaf):
        return InputError(key, value, *why)
    close = closest(key, value, known)
    command = f"python -m align{f' stage={stage}' if stage else ''} --cfg job"
    return InputError(
        key, value, "is not a key", f"Did you mean {' or '.join(close)}?" if close else f"`{command}` shows every key."
    )


def closest(key: str, value: str, known: Sequence[str]) -> list[str]:
    """The keys that somebody may have meant: what the field's word stands for here, else the likeliest spelling. The
    name counts, not the group in front of it, which any two keys of it have in common."""
    group, _, name = key.rpartition(".")
    off = value.lower() in ("false", "no", "none", "null", "0", "")
    if meant := [k.partition("=")[0] if off else k for k in keys_for(name) if k.partition("=")[0] in known]:
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


def not_a_choice(
    group: str, name: str, names: Sequence[str], search: Path | None, sweep: bool = False, key: str = ""
) -> InputError:
    """Args:
    names: the choices that there are.
    search: the folder of the user's own group files; None where there is none.
    sweep: whether several of them are given.
    key: by which it was chosen, if not by the group's name.
    """
    field = key or (f"+{group}" if group == EXPERIMENT else group)
    remedy = f"Choose one of: {', '.join(names)}."
    if sweep:
        remedy = A_RUN_EACH
    elif not names:
        remedy = f"None is there yet: write {search or OWN_FOLDER}/{group}/{name or 'NAME'}.yaml."
    elif group in BY_PATH and re.search(r"[/.]", name):
        remedy = f"Did you mean {BY_PATH[group].format(name)}? {remedy}"
    elif meant := [k.partition("=")[2] for k in keys_for(name) if k.partition("=")[0] == group]:
        remedy = f"Did you mean {key or group}={meant[0]}? {remedy}" if not key or meant[0] in names else remedy
    elif close := difflib.get_close_matches(name, names, n=1):
        remedy = f"Did you mean {field}={close[0]}? {remedy}"
    return InputError(field, name or "(empty)", "is not a choice here", remedy)


def not_a_value(key: str, value: str, kind: type | None, below: Sequence[str], sweep: bool = False) -> InputError:
    """Args:
    kind: the type that is wanted, where it is a plain one.
    below: the keys under `key`, where it holds several.
    sweep: whether the value is what `-m` sweeps over.
    """
    if below:
        return InputError(key, value, "holds several keys", f"Set one of them: {', '.join(below)}.")
    wanted = KINDS.get(kind) if kind else None
    if wanted is None:
        return InputError(key, value or "(empty)", "cannot be read", "Quote it as \"key='value'\".")
    remedy = f"Write {key}=[{value}]." if kind is list else f"Give {wanted}."
    return InputError(key, value or "(empty)", f"is not {wanted}", f"{remedy} {A_RUN_EACH}" if sweep else remedy)


def missing(key: str) -> InputError:
    return InputError(key, "(missing)", "has no default", f"Add {key}=VALUE.")


def broken_file(
    error: Exception, files: Mapping[str, Path], chosen: Sequence[Path], known: Sequence[str]
) -> InputError:
    """A group file that does not read or does not fit.

    Args:
        files: `group/choice` → its file, for every choice there is.
        chosen: the files that were asked for, to name where the error names none.
        known: the keys that it may have meant.
    """
    text, remedy = str(error).strip(), "Correct that file, or move it away."
    found = re.search(r"[Ii]n '([^']+)'", text)
    path = (files.get(found[1]) if found else None) or " or ".join(map(str, chosen))
    if mark := getattr(error, "problem_mark", None):  # a syntax error, which PyYAML places
        path = Path(str(mark.name).removeprefix("file://"))
        problem = f"line {mark.line + 1}: {getattr(error, 'problem', 'is not YAML')}"
        return InputError("configuration", str(path), problem.rstrip(".:"), remedy)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    problem = next((line for line in lines if "while composing" not in line), type(error).__name__)
    problem = re.sub(r"^In '[^']+': ", "", problem)
    if isinstance(error, RecursionError):
        problem = "includes itself, or holds an alias (&NAME, *NAME) that leads back to itself"
    key = key[1] if (key := re.search(r"full_key: (\S+)", text)) else ""
    if sought := re.match("Could not find '(.+)/(.+)'", problem):
        others = [name.partition("/")[2] for name in files if name.startswith(f"{sought[1]}/")]
        remedy = f"Choose one of: {', '.join(sorted(others))}." if others else remedy
    elif key == EXPERIMENT or re.match(rf"Could not override '[^']*@{EXPERIMENT}[.']", problem):
        problem, remedy = "does not say where its keys belong", "Make `# @package _global_` its first line."
    elif twice := re.match(r"Multiple values for (\w+)|Could not override '[^']+/(\w+)@", problem):
        group = twice[1] or twice[2]
        problem, remedy = f"chooses {group} in another way than an override does", (
            f"Write `- override /{group}: NAME` in its `defaults`."
        )  # fmt: skip
    elif re.match("Key '.+' not in", problem):
        successor, close = SUCCESSORS.get(key.rpartition(".")[2]), closest(key, "", known)
        problem = f"{key} is called {successor} now" if successor else f"{key} is not a key"
        remedy = f"Did you mean {' or '.join(close)}? {remedy}" if close else remedy
    elif key:
        problem = f"{key}: {problem}"
    return InputError("configuration", str(path or OWN_FOLDER), problem.rstrip(".:"), remedy)
