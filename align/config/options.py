"""Parsing of command-line options such as `--cfg` and `--multirun`, which are spelled as Hydra's.

Hydra's other options are refused by name, with their replacement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from align.config.group_files import list_groups
from align.config.synonyms import explain_absence, find_settings_by_synonym
from align.core.errors import InputError, require
from align.core.files import parse_user_path

OWN_FOLDER = Path("conf")
"""Default folder of the user's own configuration files, relative to the working folder."""

OPENED = "ALIGN_OPENED_BY"
"""Environment variable with the file descriptor to which a job of several writes the path of its run's folder."""

SHORT = {
    "-c": "--cfg",
    "-m": "--multirun",
    "-cd": "--config-dir",
    "-cn": "--config-name",
    "-cp": "--config-path",
    "-p": "--package",
    "-i": "--info",
    "-r": "--run",
    "-sc": "--shell-completion",
}
TAKES_VALUE = ("--cfg", "--config-dir")
ALONE = ("--multirun", "--resolve")

NOT_HERE: Mapping[str, tuple[str, str]] = {
    "--config-name": (
        "the primary configuration is always align's own",
        "Write your settings into conf/experiment/NAME.yaml, and add +experiment=NAME.",
    ),
    "--config-path": (
        "the primary configuration is always align's own",
        "Give the folder of your own group files as --config-dir DIR.",
    ),
    "--package": ("prints a part of the configuration", "Write --cfg job, which prints all of it."),
    "--info": ("is not an option here", "Write --cfg job for the configuration, stage=NAME --help for its keys."),
    "--run": ("is the default already", "Leave it out."),
    "--shell-completion": ("is not an option here", "See python -m align --help."),
    "--hydra-help": ("is not an option here", "See python -m align --help."),
    "--experimental-rerun": ("is not an option here", "Run the same command again: it continues its run."),
}
"""Option of Hydra that align does not have → problem and remedy for the error."""


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The parsed arguments of `python -m align`.

    Attributes:
        words: `group=choice`, `key=value` and `+experiment=NAME`, in their order.
        multirun: `-m`: one job for each combination of the swept values.
        print_job: `--cfg job`: print the configuration and run nothing.
        resolve: `--resolve`: print it with interpolations resolved.
        config_dir: the folder of `--config-dir`; None without it.
    """

    words: tuple[str, ...]
    multirun: bool = False
    print_job: bool = False
    resolve: bool = False
    config_dir: Path | None = None

    @property
    def search(self) -> Path:
        """The folder of the user's own configuration files: that of `--config-dir`, or `conf`."""
        return self.config_dir or OWN_FOLDER

    @property
    def options(self) -> tuple[str, ...]:
        """The words `--config-dir DIR` to pass to every job of a sweep; empty if the option is not set."""
        return ("--config-dir", str(self.config_dir)) if self.config_dir else ()


def parse_arguments(arguments: Sequence[str]) -> CommandLine:
    """Parse the arguments of `python -m align` into options and `key=value` words, or raise InputError.

    Raises:
        InputError: an option does not exist or lacks its value, or its folder does not exist.
    """
    words: list[str] = []
    options: dict[str, str] = {}
    remaining = iter(arguments)
    for argument in remaining:
        problem = "stands alone: it reads command lines from the standard input"
        require(argument != "-", "argument", argument, problem, "Write options into those lines.")
        if not argument.startswith("-"):
            words.append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = SHORT.get(name, name)
        if name in NOT_HERE:
            raise InputError("option", argument, *NOT_HERE[name])
        if name not in TAKES_VALUE and (name not in ALONE or equals):
            word = name.lstrip("-")
            if explanation := explain_absence(word):
                raise InputError("argument", argument, *explanation)
            keys = find_settings_by_synonym(word)  # other programs have options for settings
            remedy = f"Write {' or '.join(keys)}, without dashes." if keys else "See python -m align --help."
            raise InputError("argument", argument, "is not an option", remedy)
        options[name] = next(remaining, "") if name in TAKES_VALUE and not equals else value
    job = options.get("--cfg", "job")
    require(job == "job", "--cfg", job or "(nothing)", "prints only the job's configuration", "Write: --cfg job")
    prints_job = "--cfg" in options
    problem = "says how --cfg job prints"
    require(prints_job or "--resolve" not in options, "option", "--resolve", problem, "Add --cfg job.")
    folder = resolve_config_dir(options["--config-dir"]) if "--config-dir" in options else None
    return CommandLine(tuple(words), "--multirun" in options, prints_job, "--resolve" in options, folder)


def resolve_config_dir(name: str) -> Path:
    """Return the path of the folder `--config-dir`, or raise InputError if it does not contain a group's folder."""
    require(bool(name), "--config-dir", "(nothing)", "names a folder", "Write: --config-dir DIR")
    folder = parse_user_path(name, "--config-dir")
    problem = "there is no such folder" if not folder.exists() else "is no folder"
    remedy = f"Name the folder that holds one of {', '.join(f'{group}/' for group in list_groups())}."
    require(folder.is_dir(), "--config-dir", name, problem, remedy)
    has_groups = any((folder / group).is_dir() for group in list_groups())
    require(has_groups, "--config-dir", name, "holds no folder of group files", remedy)
    return folder
