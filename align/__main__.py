"""Entry point of `python -m align`: compose and check a configuration, and run its stage."""

from __future__ import annotations

import gc
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from align import ranks
from align.config.options import OPENED, OWN_FOLDER, CommandLine, parse_arguments
from align.config.stages import STAGES
from align.core.distribution import DISTRIBUTION, describe_foreign_distribution
from align.core.errors import AlignError, require
from align.core.files import SIZE_LIMIT
from align.core.redaction import mask_argument, print_redacted_traceback

if TYPE_CHECKING:
    from align.config.root import Config
    from align.config.sweep import Job

USAGE = """usage: python -m align stage=STAGE [group=choice] [key=value]
       python -m align - < LINES    several such lines in one go, until one fails

  -m, --multirun         a run for each combination of values: stage.lr=1e-4,2e-4 seed=range(0,3) method=lora,qlora
  +experiment=NAME       the settings of your file conf/experiment/NAME.yaml
  -cd, --config-dir DIR  your own group files are in DIR, not in ./conf
  -c, --cfg job          print the configuration that would run, and stop; with --resolve what interpolations come to
  -h, --help             this page; with stage=STAGE every key that the stage reads
  --version              the version

stages
{stages}

groups        model method data reward rollout track export serve
often used    init=sft:latest artifact=ppo:latest seed=0 run.name=NAME run.root=runs resume=auto|never|must
"""


def format_usage() -> str:
    return USAGE.format(stages="\n".join(f"  {name:<12}{stage.summary}" for name, stage in STAGES.items()))


def format_help(arguments: Sequence[str]) -> str:
    """Return the text of `--help`: the keys of the stage if an argument is `stage=NAME`, otherwise the usage with all
    stages."""
    values = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    stage = values.get("stage", "")
    if stage not in STAGES:
        return format_usage()
    from align.config.reference import format_stage_help

    return format_stage_help(stage, values.get("reward"), values.get("stage.of"))


def main(argv: Sequence[str] | None = None, opened: Callable[[Path], object] = lambda folder: None) -> int:
    """Run one command line of `python -m align` and return its exit status: 0, 1, 2, 3 or 130 (interrupted).

    Args:
        argv: its words; None for those of this process.
        opened: called with the run's folder when it is opened.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or {"--help", "-h"} & set(arguments):
        print(format_help(arguments), end="")
        return 0
    if "--version" in arguments:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"align {version(DISTRIBUTION)}")
        except PackageNotFoundError:  # run from a checkout that was not installed
            print("align (not installed)")
        return 0
    try:
        return run_lines(sys.stdin) if arguments == ["-"] else run_command(parse_arguments(arguments), opened)
    except AlignError as error:
        if ranks.should_print_error(error):
            print(f"align: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt as interrupted:
        if ranks.should_print_error(interrupted):
            print("align: interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def run_command(line: CommandLine, opened: Callable[[Path], object]) -> int:
    ranks.connect()
    if line.print_job:
        gc.disable()  # collections take a part of the time, and the process ends after this
        print_job(line)
        return 0
    if line.multirun:
        require_single_process("argument", "--multirun")
        from align.cli.batch import run_sweep

        jobs = compose_jobs(line)
        stages = dict.fromkeys(job.config.stage.name for job in jobs)
        return run_sweep([((*line.options, *job.words), job.swept) for job in jobs], stages, main)
    if not ranks.is_main():  # the first rank composes for all
        from align.stages.worker_rank import follow_first_rank

        return finish(follow_first_rank())
    config = compose_config(line.words, line.search)
    SIZE_LIMIT.megabytes = config.run.max_file_mb
    stage, action = find_action(config)
    if action in STAGES[stage].prints:
        require_single_process("stage", config.stage.name)
        return answer_question(config, stage, action)
    from align.cli.launch import launch_ranks, needs_ranks

    if needs_ranks(config):
        return launch_ranks((*line.options, *line.words), config.devices or 1)
    from align.stages.runner import execute_run

    return finish(execute_run(config, opened))


def find_action(config: Config) -> tuple[str, str | None]:
    """Return the name of the configured stage, and its action or None. For a configuration of the stage `plan`, both
    are `plan`."""
    from align.config.plan import PlanKeys

    if isinstance(config.stage, PlanKeys):
        return "plan", "plan"
    return config.stage.name, getattr(config.stage, "action", None)


def answer_question(config: Config, stage: str, action: str) -> int:
    """Print the lines that a stage's printing action yields, such as a search of the registry, which creates no run
    folder.

    Returns:
        the exit status: 0, or what the generator of the lines returned.

    Raises:
        AlignError: the user's input, a full disk or an unwritable folder among it.
    """
    from align.run.files import as_storage_error
    from align.stages import load_stage

    try:
        lines = iter(load_stage(stage).PRINTS[action](config))
        while True:
            print(next(lines), flush=True)
    except StopIteration as end:
        return end.value or 0
    except Exception as error:
        if user_error := as_storage_error(error, config.run.root):
            raise user_error from error
        raise


def finish(status: int) -> int:
    """Return the exit status unchanged, and destroy torch's process group if it is 0."""
    if status == 0:
        ranks.destroy_group()
    return status


def print_job(line: CommandLine) -> None:
    """Print the composed configuration as YAML for `--cfg job`, and with `-m` one YAML document for each job.

    `--resolve` prints it as it would stand in the run's config.yaml.
    """
    from align.config.compose import explain_compose_errors

    with explain_compose_errors(line.words):
        print_composed(line)


def print_composed(line: CommandLine) -> None:
    from align.config.compose import Composer, build_config, format_tree
    from align.config.rates import explain_empty_rate
    from align.config.root import format_config
    from align.config.sweep import build_jobs

    composer = Composer(line.search)
    jobs = build_jobs(line.words, composer) if line.multirun else []
    for number, job in enumerate(jobs, 1):
        print(f"---\n# [{number} of {len(jobs)}] {' '.join(map(mask_argument, job.own))}")
        print(
            format_config(job.config) if line.resolve else format_tree(composer.compose(job.fixed, job.own).tree),
            end="",
        )
        print(explain_empty_rate(job.config.stage, job.config.method.name), end="")
    if not line.multirun:
        tree = composer.compose(line.words).tree
        config = build_config(tree)
        print(format_config(config) if line.resolve else format_tree(tree), end="")
        print(explain_empty_rate(config.stage, config.method.name), end="")


def compose_jobs(line: CommandLine) -> list[Job]:
    """Return the validated jobs of a command line with `-m`, one for each combination of the swept values."""
    from align.config.compose import Composer, explain_compose_errors
    from align.config.sweep import build_jobs

    with explain_compose_errors(line.words):
        jobs = build_jobs(line.words, Composer(line.search))
    for job in jobs:
        require_stage(job.config)
    return jobs


def compose_config(words: Sequence[str], search: Path = OWN_FOLDER) -> Config:
    """Compose the configuration of a command line from the group files and return it validated.

    Args:
        words: its `group=choice`, `key=value` and `+experiment=NAME`.
        search: the folder of the user's own group files.
    """
    from align.config.compose import build_config, compose_tree, explain_compose_errors

    with explain_compose_errors(words):
        config = build_config(compose_tree(words, search))
    require_stage(config)
    return config


def require_stage(config: Config) -> None:
    from align.config.extras import require_stage_extras

    listed = ", ".join(STAGES)
    require(
        config.stage is not None, "stage", "(missing)", "no stage is named to run", f"Add stage= with one of: {listed}."
    )
    require_stage_extras(config.stage)


def find_stages(words: Sequence[str]) -> list[str]:
    """Validate one of several command lines and return the names of the stages that it runs, or raise InputError."""
    line = parse_arguments(words)
    require(
        not line.print_job,
        "option",
        "--cfg",
        "only prints, but a command line read from standard input must run something",
        "Leave it out.",
    )
    configs = [job.config for job in compose_jobs(line)] if line.multirun else [compose_config(line.words, line.search)]
    return [config.stage.name for config in configs]


def require_single_process(field: str, value: str) -> None:
    """Raise InputError if a launcher such as torchrun started this process as one of several ranks.

    Args:
        field, value: the part of the command line that needs a single process: it prints, or starts ranks of its own.
    """
    world = ranks.read_launched_world_size()
    problem = f"works in one process, and a launcher has started {world} ranks"
    require(world == 1, field, value, problem, "Start it without the launcher.")


def run_lines(stream: TextIO) -> int:
    """Run the command lines that standard input holds for `python -m align -`, until one fails, and return the exit
    status."""
    ranks.connect()
    require_single_process("argument", "-")
    from align.cli.batch import run_batch

    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")  # like arguments, so that errors can name them
    return run_batch(stream, find_stages, main)


def order_import_path() -> None:
    """Move the working directory, which `python -m` puts first in `sys.path`, behind the installed libraries.

    A user's `datasets.py` then shadows no library. A checkout's own folder goes last, so that its folder `reward` does
    not shadow a user's `reward.py`.
    """
    working_folder = os.getcwd()
    root = Path(__file__).resolve().parents[1]
    checkout = [str(root)] if (root / "pyproject.toml").is_file() else []
    sys.path[:] = [path for path in sys.path if (path or working_folder) not in (working_folder, *checkout)]
    sys.path += [working_folder, *(path for path in checkout if path != working_folder)]


def open_standard_streams() -> None:
    """Open each of stdin, stdout and stderr that the caller closed (`>&-`) on /dev/null.

    Otherwise a file that is opened later takes the descriptor of one, and gets the output.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))


def raise_interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def folder_callback() -> Callable[[Path], object]:
    """Return a function that sends the run's folder through a pipe to the parent process that started this command line
    as one of several.

    Without such a process the function does nothing.
    """
    if OPENED not in os.environ:
        return lambda folder: None
    from align.cli.batch import build_folder_writer

    return build_folder_writer(int(os.environ.pop(OPENED)))


def entry() -> int:
    open_standard_streams()
    order_import_path()
    signal.signal(signal.SIGTERM, raise_interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, raise_interrupt)
    if ranks.is_launched():
        signal.signal(signal.SIGINT, raise_interrupt)  # its launcher may have been started in the background
    logging.captureWarnings(True)  # warnings go to the run's log.txt, each of them
    warnings.simplefilter("default")
    sys.excepthook = print_redacted_traceback
    arguments = sys.argv[1:]
    sys.argv[1:] = map(mask_argument, arguments)  # wandb records it
    logging.raiseExceptions = False  # a full disk is reported once, not at every line that the log cannot take
    started_by_align = ranks.is_launched() or OPENED in os.environ
    if not started_by_align and (warning := describe_foreign_distribution()):
        print(f"align: warning: {warning}", file=sys.stderr)
    try:
        status = main(arguments, folder_callback())
        sys.stdout.flush()
        if status and ranks.is_launched():  # the interpreter takes seconds to end, longer than the launcher waits
            sys.stderr.flush()
            ranks.wait_until_read()
            os._exit(status)
    except BrokenPipeError:  # the reader of the output has ended (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(entry())
