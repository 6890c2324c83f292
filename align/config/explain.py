"""Errors for command lines and group files that cannot be composed, with field, value, problem and remedy.

`compose` and `values` detect the errors, this module words them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from align.config.group_files import EXPERIMENT
from align.config.options import OWN_FOLDER
from align.config.settings import A_RUN_EACH
from align.config.synonyms import explain_absence, find_settings_by_synonym
from align.core.errors import InputError

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}
BY_PATH = {"model": "model=hub model.path={}", "data": "data=files data.path={}"}
"""Group → the settings to suggest if a file or a hub id was given as the group's choice."""

SUCCESSORS = {"value_trunk": "stage.value_backbone"}
"""Old name of a key → its present name."""


def build_assignment_error(argument: str, groups: Collection[str]) -> InputError:
    """Build the InputError for a command-line word that is not `key=value`, or that begins with Hydra's `+` or `~`."""
    key, _, value = argument.lstrip("+").partition("=")
    if argument[:1] == "+" and key in groups:
        problem = "cannot be added: it is there already"
        return InputError("argument", argument, problem, f"Write {'+' * (key == EXPERIMENT)}{key}={value}.")
    if argument[:1] in ("+", "~"):
        problem = "nothing can be added to the configuration or taken out of it"
        return InputError("argument", argument, problem, "Write key=value, with a key that is there already.")
    return InputError("argument", argument, "is not of the form key=value", "Write for example stage=sft, or seed=1.")


def build_unknown_key_error(
    key: str, value: str, known: Sequence[str], stage: str | None, owners: Sequence[str]
) -> InputError:
    """Build the InputError for a configuration key that does not exist, with suggestions of similar keys.

    Args:
        known: all keys and groups.
        stage: the stage that runs; None if the command line names none.
        owners: the stages that have this key.
    """
    if re.match(r"hydra[./]", key):
        problem = "is not a key: align keeps its own folders, logs and order of jobs"
        remedy = "Write run.root= and run.name= for folders, --config-dir for group files, -m for sweeps."
        return InputError(key, value, problem, remedy)
    if key.startswith("stage.") and stage is None:
        return InputError("stage", "(missing)", f"{key}={value} is a setting of a stage", "Add stage=NAME.")
    leaf = key.rpartition(".")[2]
    # `stage.max_length` of stage=sft is `data.max_length`, although stage=serve has a key of that name.
    in_other_part = any(k in known and k.endswith(f".{leaf}") for k in find_settings_by_synonym(leaf))
    if owners and not in_other_part:
        problem = f"is not a key of stage={stage}, but of {' and '.join(f'stage={o}' for o in owners)}"
        return InputError(key, value, problem, "Drop it, or run that stage.")
    if (successor := SUCCESSORS.get(leaf)) in known:
        return InputError(key, value, f"is called {successor} now", f"Write {successor}={value}.")
    if explanation := explain_absence(leaf):
        return InputError(key, value, *explanation)
    close = find_close_keys(key, value, known)
    command = f"python -m align{f' stage={stage}' if stage else ''} --cfg job"
    remedy = f"Did you mean {' or '.join(close)}?" if close else f"`{command}` shows every key."
    return InputError(key, value, "is not a key", remedy)


def find_close_keys(key: str, value: str, known: Sequence[str]) -> list[str]:
    """Return the keys to suggest for an unknown key: the ones with this name in other libraries, or the most similar.

    Only the last part of a key is compared, because all keys of a group share the others.
    """
    group, _, name = key.rpartition(".")
    off = value.lower() in ("false", "no", "none", "null", "0", "")
    if synonyms := [
        k.partition("=")[0] if off else k for k in find_settings_by_synonym(name) if k.partition("=")[0] in known
    ]:
        return synonyms
    by_name: dict[str, list[str]] = {}
    for k in known:
        by_name.setdefault(k.rpartition(".")[2], []).append(k)
    for similar in difflib.get_close_matches(name, by_name, n=1, cutoff=0.8):
        if not group:
            return sorted(by_name[similar], key=lambda k: not k.startswith("stage."))[:2]
        return [
            max(
                by_name[similar],
                key=lambda k: difflib.SequenceMatcher(None, group, k.rpartition(".")[0]).ratio(),
            )
        ]
    return []


def build_unknown_choice_error(
    group: str, name: str, names: Sequence[str], user_config_dir: Path | None, sweep: bool = False, key: str = ""
) -> InputError:
    """Build the InputError for a choice of a group that does not exist, with the names of the existing choices.

    Args:
        names: the choices that exist.
        user_config_dir: the folder of the user's own group files, if it exists.
        sweep: whether the value lists several choices.
        key: the key that chooses it, if that is not the group's name.
    """
    field = key or (f"+{group}" if group == EXPERIMENT else group)
    remedy = f"Choose one of: {', '.join(names)}."
    if sweep:
        remedy = A_RUN_EACH
    elif not names:
        remedy = f"None is there yet: write {user_config_dir or OWN_FOLDER}/{group}/{name or 'NAME'}.yaml."
    elif group in BY_PATH and re.search(r"[/.]", name):
        remedy = f"Did you mean {BY_PATH[group].format(name)}? {remedy}"
    elif synonyms := [k.partition("=")[2] for k in find_settings_by_synonym(name) if k.partition("=")[0] == group]:
        remedy = f"Did you mean {key or group}={synonyms[0]}? {remedy}" if not key or synonyms[0] in names else remedy
    elif close := difflib.get_close_matches(name, names, n=1):
        remedy = f"Did you mean {field}={close[0]}? {remedy}"
    return InputError(field, name or "(empty)", "is not a choice here", remedy)


def build_invalid_value_error(
    key: str, value: str, kind: type | None, below: Sequence[str], sweep: bool = False
) -> InputError:
    """Build the InputError for a command-line value that has the wrong type for its key.

    Args:
        kind: the type of the key's values; None if it is no plain type.
        below: the keys under `key`.
        sweep: whether the value is a sweep of `-m`.
    """
    if below:
        return InputError(key, value, "holds several keys", f"Set one of them: {', '.join(below)}.")
    expected = KINDS.get(kind) if kind else None
    if expected is None:
        return InputError(key, value or "(empty)", "cannot be read", "Quote it as \"key='value'\".")
    remedy = f"Write {key}=[{value}]." if kind is list else f"Give {expected}."
    return InputError(key, value or "(empty)", f"is not {expected}", f"{remedy} {A_RUN_EACH}" if sweep else remedy)


def build_missing_key_error(key: str) -> InputError:
    """Build the InputError for a mandatory configuration key that is not set."""
    return InputError(key, "(missing)", "has no default", f"Add {key}=VALUE.")


def build_invalid_file_error(
    error: Exception, files: Mapping[str, Path], own_files: Sequence[Path], known: Sequence[str]
) -> InputError:
    """Build the InputError for a YAML group file that cannot be parsed or merged, with the file, line or key.

    Args:
        error: the exception of Hydra, OmegaConf or PyYAML.
        files: `group/choice` → its file, for every choice.
        own_files: the user's files on the command line, which are named if the error names no file.
        known: the keys that the file may have meant.
    """
    text = str(error).strip()
    remedy = "Correct that file, or move it away."
    match = re.search(r"[Ii]n '([^']+)'", text)
    path = (files.get(match[1]) if match else None) or " or ".join(map(str, own_files))
    if mark := getattr(error, "problem_mark", None):  # a syntax error with its position, from PyYAML
        path = Path(str(mark.name).removeprefix("file://"))
        problem = f"line {mark.line + 1}: {getattr(error, 'problem', 'is not YAML')}"
        return InputError("configuration", str(path), problem.rstrip(".:"), remedy)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    problem = next((line for line in lines if "while composing" not in line), type(error).__name__)
    problem = re.sub(r"^In '[^']+': ", "", problem)
    if isinstance(error, RecursionError):
        problem = "includes itself, or holds an alias (&NAME, *NAME) that leads back to itself"
    key_match = re.search(r"full_key: (\S+)", text)
    key = key_match[1] if key_match else ""
    if missing_file := re.match("Could not find '(.+)/(.+)'", problem):
        choices = [name.partition("/")[2] for name in files if name.startswith(f"{missing_file[1]}/")]
        remedy = f"Choose one of: {', '.join(sorted(choices))}." if choices else remedy
    elif key == EXPERIMENT or re.match(rf"Could not override '[^']*@{EXPERIMENT}[.']", problem):
        problem = "does not say where its keys belong"
        remedy = "Make `# @package _global_` its first line."
    elif duplicate := re.match(r"Multiple values for (\w+)|Could not override '[^']+/(\w+)@", problem):
        group = duplicate[1] or duplicate[2]
        problem = f"chooses {group} in another way than an override does"
        remedy = f"Write `- override /{group}: NAME` in its `defaults`."
    elif re.match("Key '.+' not in", problem):
        successor = SUCCESSORS.get(key.rpartition(".")[2])
        close = find_close_keys(key, "", known)
        problem = f"{key} is called {successor} now" if successor else f"{key} is not a key"
        remedy = f"Did you mean {' or '.join(close)}? {remedy}" if close else remedy
    elif key:
        problem = f"{key}: {problem}"
    return InputError("configuration", str(path or OWN_FOLDER), problem.rstrip(".:"), remedy)
