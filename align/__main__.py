"""`python -m align stage=…`: compose, validate, run one stage."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from align.config.stages import STAGES
from align.errors import AlignError, InputError
from align.redaction import excepthook, masked_argument

if TYPE_CHECKING:
    from align.config.root import Config

USAGE = """usage: python -m align stage=STAGE [group=choice] [key=value]
       python -m align - < LINES    several such lines in one go, until one fails

  --cfg job     print the configuration that would run, and stop
  --help        this page; with stage=STAGE every key that the stage reads
  --version     the version

stages
{stages}

groups        model method data reward rollout track export
often used    init=sft:latest artifact=ppo:latest seed=0 run.name=NAME run.root=runs resume=auto|never|must
"""


def usage() -> str:
    return USAGE.format(stages="\n".join(f"  {name:<12}{stage.summary}" for name, stage in STAGES.items()))


def help_on(arguments: Sequence[str]) -> str:
    """`--help`: the keys of the stage that the other arguments name; the stages where they name none."""
    named = [a.partition("=")[2] for a in arguments if a.startswith("stage=")]
    if not named or named[-1] not in STAGES:
        return usage()
    from align.config.reference import help_text

    chosen = dict(a.split("=", 1) for a in arguments if "=" in a)
    return help_text(named[-1], chosen.get("reward"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit status of the contract: 0, 1, 2 or 130."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or {"--help", "-h"} & set(arguments):
        print(help_on(arguments), end="")
        return 0
    if "--version" in arguments:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"align {version('align')}")
        except PackageNotFoundError:  # run from a checkout that was not installed
            print("align (not installed)")
        return 0
    try:
        return lines_of(sys.stdin) if arguments == ["-"] else command(arguments)
    except AlignError as error:
        print(f"align: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("align: interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def command(arguments: list[str]) -> int:
    if "--cfg" in arguments:
        show(arguments)
        return 0
    config = composed(arguments)
    from align.stages import execute

    return execute(config)


def show(arguments: list[str]) -> None:
    """`--cfg job`: print the configuration that the other arguments make, where a run would take it."""
    from align.config.compose import as_yaml, check, compose_raw

    at = arguments.index("--cfg")
    given = " ".join(arguments[at + 1 : at + 2])
    if given != "job":
        raise InputError("--cfg", given or "(nothing)", "prints only the job's configuration", "Write: --cfg job")
    rest = arguments[:at] + arguments[at + 2 :]
    refuse_flags(rest)
    raw = compose_raw(rest, search=Path("conf"))
    check(raw)
    print(as_yaml(raw), end="")


def refuse_flags(arguments: Sequence[str]) -> None:
    if flags := [a for a in arguments if a.startswith("-")]:
        raise InputError("argument", flags[0], "is not an option", "See python -m align --help.")


def composed(arguments: Sequence[str]) -> Config:
    """The checked configuration of one command line that runs a stage."""
    from align.config.compose import check, compose_raw

    refuse_flags(arguments)
    config = check(compose_raw(arguments, search=Path("conf")))
    if config.stage is None:
        raise InputError(
            "stage", "(missing)", "nothing says what to run", f"Add stage= with one of: {', '.join(STAGES)}."
        )
    return config


def lines_of(stream: TextIO) -> int:
    """`python -m align -`: a command line a line."""
    from align.batch import batch

    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")  # as arguments are: the wrong one is then named
    return batch(stream, composed, main)


def shadow_free_path() -> None:
    """Move the working folder, which `python -m` puts first, to the end: a user's own `reward.py` is then importable
    as itself by `reward.fn` without replacing our package `reward`."""
    here = os.getcwd()
    if sys.path and sys.path[0] in ("", here):
        sys.path.append(sys.path.pop(0) or here)
    elif here not in sys.path:  # the installed command: a user's module is found as with `python -m align`
        sys.path.append(here)


def terminate(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def entry() -> int:
    shadow_free_path()
    signal.signal(signal.SIGTERM, terminate)
    logging.captureWarnings(True)  # warnings go to the run's log.txt, each of them
    warnings.simplefilter("default")
    sys.excepthook = excepthook
    given = sys.argv[1:]
    sys.argv[1:] = map(masked_argument, given)  # wandb writes it down, and who knows who else
    logging.raiseExceptions = False  # a full disk is reported once, not at every line that the log cannot take
    try:
        status = main(given)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output is gone (`| head`): nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(entry())
