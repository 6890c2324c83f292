"""A command line's options apart from what it says of the configuration. They are spelled as Hydra's are; those of
Hydra's that have no place here are refused by name, with what to write instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from align.config.group_files import groups
from align.config.synonyms import absent, keys_for
from align.core.errors import InputError, require
from align.core.files import user_path

OWN_FOLDER = Path("conf")
"""Where a user's own group files are, in the working folder, unless `--config-dir` names another."""

OPENED = "ALIGN_OPENED_BY"
"""In the environment of a process that runs one line of several: the descriptor that its run's folder is written to."""

SHORT = {
    "-c": "--cfg", "-m": "--multirun", "-cd": "--config-dir", "-cn": "--config-name", "-cp": "--config-path",
    "-p": "--package", "-i": "--info", "-r": "--run", "-sc": "--shell-completion",
}  # fmt: skip
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
    "--run": ("is what happens without it", "Leave it out."),
    "--shell-completion": ("is not an option here", "See python -m align --help."),
    "--hydra-help": ("is not an option here", "See python -m align --help."),
    "--experimental-rerun": ("is not an option here", "Run the same command again: it continues its run."),
}
"""Hydra's other options: what is wrong with each, and what to do."""


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What follows `python -m align`.

    Attributes:
        words: `group=choice`, `key=value` and `+experiment=NAME`, in their order.
        multirun: `-m`: one job for each combination of the values that are swept.
        print_job: `--cfg job`: the configuration is printed, and nothing runs.
        resolve: `--resolve`: printed with what its interpolations come to.
        config_dir: the folder that `--config-dir` names; None where it was not given.
    """

    words: tuple[str, ...]
    multirun: bool = False
    print_job: bool = False
    resolve: bool = False
    config_dir: Path | None = None

    @property
    def search(self) -> Path:
        """The folder of the user's own group files."""
        return self.config_dir or OWN_FOLDER

    @property
    def options(self) -> tuple[str, ...]:
        """The options that every job of a sweep is given."""
        return ("--config-dir", str(self.config_dir)) if self.config_dir else ()


def parse(arguments: Sequence[str]) -> CommandLine:
    """A command line, its options apart.

    Raises:
        InputError: an option that is not one here, or that lacks its value; a folder that is not there.
    """
    words: list[str] = []
    given: dict[str, str] = {}
    left = iter(arguments)
    for argument in left:
        require(
            argument != "-", "argument", argument, "stands alone: it reads command lines from the standard input",
            "Write options into those lines.",
        )  # fmt: skip
        if not argument.startswith("-"):
            words.append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = SHORT.get(name, name)
        if name in NOT_HERE:
            raise InputError("option", argument, *NOT_HERE[name])
        known = name in TAKES_VALUE or (name in ALONE and not equals)
        if not known and (why := absent(name.lstrip("-"))):
            raise InputError("argument", argument, *why)
        meant = keys_for(name.lstrip("-"))  # other programs have options for settings
        remedy = f"Write {' or '.join(meant)}, without dashes." if meant else "See python -m align --help."
        require(known, "argument", argument, "is not an option", remedy)
        given[name] = next(left, "") if name in TAKES_VALUE and not equals else value
    job = given.get("--cfg", "job")
    require(job == "job", "--cfg", job or "(nothing)", "prints only the job's configuration", "Write: --cfg job")
    require(
        "--cfg" in given or "--resolve" not in given,
        "option",
        "--resolve",
        "says how --cfg job prints",
        "Add --cfg job.",
    )
    folder = existing(given["--config-dir"]) if "--config-dir" in given else None
    return CommandLine(tuple(words), "--multirun" in given, "--cfg" in given, "--resolve" in given, folder)


def existing(given: str) -> Path:
    """The folder that `--config-dir` names."""
    folder = user_path(given, "--config-dir")
    problem = "there is no such folder" if not folder.exists() else "is no folder"
    require(bool(given), "--config-dir", "(nothing)", "names a folder", "Write: --config-dir DIR")
    remedy = f"Name the folder that holds one of {', '.join(f'{group}/' for group in groups())}."
    require(folder.is_dir(), "--config-dir", given, problem, remedy)
    holds = any((folder / group).is_dir() for group in groups())
    require(holds, "--config-dir", given, "holds no folder of group files", remedy)
    return folder
