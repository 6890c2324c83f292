"""`python -m align stage=…`: compose, validate, run one stage."""

from __future__ import annotations

import gc
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from align import ranks
from align.config.options import OPENED, OWN_FOLDER, CommandLine, parse
from align.config.stages import STAGES
from align.core.distribution import DISTRIBUTION, describe_foreign_distribution
from align.core.errors import AlignError, require
from align.core.files import SIZE_LIMIT
from align.core.redaction import excepthook, masked_argument

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


def usage() -> str:
    return USAGE.format(stages="\n".join(f"  {name:<12}{stage.summary}" for name, stage in STAGES.items()))


def help_on(arguments: Sequence[str]) -> str:
    """`--help`: the keys of the stage that the other arguments name; the stages where they name none."""
    named = [a.partition("=")[2] for a in arguments if a.startswith("stage=")]
    if not named or named[-1] not in STAGES:
        return usage()
    from align.config.reference import help_text

    chosen = dict(a.split("=", 1) for a in arguments if "=" in a)
    return help_text(named[-1], chosen.get("reward"), chosen.get("stage.of"))


def main(argv: Sequence[str] | None = None, opened: Callable[[Path], object] = lambda folder: None) -> int:
    """Run one command line; returns the exit status of the contract: 0, 1, 2, 3 or 130.

    Args:
        argv: its words; those of this process where it is None.
        opened: is told the run's folder once it is open.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or {"--help", "-h"} & set(arguments):
        print(help_on(arguments), end="")
        return 0
    if "--version" in arguments:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"align {version(DISTRIBUTION)}")
        except PackageNotFoundError:  # run from a checkout that was not installed
            print("align (not installed)")
        return 0
    try:
        return lines_of(sys.stdin) if arguments == ["-"] else command(parse(arguments), opened)
    except AlignError as error:
        if ranks.speaks(error):
            print(f"align: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt as interrupted:
        if ranks.speaks(interrupted):
            print("align: interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def command(line: CommandLine, opened: Callable[[Path], object]) -> int:
    ranks.meet()
    if line.print_job:
        gc.disable()  # nothing that is printed is garbage
        print_job(line)
        return 0
    if line.multirun:
        alone("argument", "--multirun")
        from align.cli.batch import sweep

        jobs = jobs_in(line)
        stages = dict.fromkeys(job.config.stage.name for job in jobs)
        return sweep([((*line.options, *job.words), job.swept) for job in jobs], stages, main)
    if not ranks.is_main():  # the first rank composes for all
        from align.stages.worker_rank import follow_first_rank

        return left(follow_first_rank())
    config = composed(line.words, line.search)
    SIZE_LIMIT.megabytes = config.run.max_file_mb
    stage, action = question_of(config)
    if action in STAGES[stage].prints:
        alone("stage", config.stage.name)
        return answer_question(config, stage, action)
    from align.cli.launch import launch, ranks_wanted

    if ranks_wanted(config):
        return launch((*line.options, *line.words), config.devices or 1)
    from align.stages.runner import execute

    return left(execute(config, opened))


def question_of(config: Config) -> tuple[str, str | None]:
    """Return the stage and its action. A plan is asked with the configuration of the stage that is planned."""
    from align.config.plan import PlanKeys

    if isinstance(config.stage, PlanKeys):
        return "plan", "plan"
    return config.stage.name, getattr(config.stage, "action", None)


def answer_question(config: Config, stage: str, action: str) -> int:
    """Print the lines of an action that is no run and leaves no folder.

    Returns:
        the exit status: 0, or what the generator of the lines returned.

    Raises:
        AlignError: the user's input, a full disk or an unwritable folder among it.
    """
    from align.run.files import storage_error
    from align.stages import load_stage

    try:
        return print_lines(load_stage(stage).PRINTS[action](config))
    except Exception as error:
        if user_error := storage_error(error, config.run.root):
            raise user_error from error
        raise


def print_lines(lines: Iterable[str]) -> int:
    iterator = iter(lines)
    while True:
        try:
            line = next(iterator)
        except StopIteration as end:
            return end.value or 0
        print(line, flush=True)


def left(status: int) -> int:
    """The status of a run, from which this rank lets go of the others."""
    if status == 0:
        ranks.leave()
    return status


def print_job(line: CommandLine) -> None:
    """`--cfg job`: print the configuration that the line makes, where a run would take it; with `-m` that of each job,
    one YAML document a job. `--resolve`: as the run's config.yaml would have it."""
    from align.config.compose import composing

    with composing(line.words):
        print_composed(line)


def print_composed(line: CommandLine) -> None:
    from align.config.compose import Composer, as_yaml, check
    from align.config.rates import explain_empty_rate
    from align.config.root import resolved
    from align.config.sweep import jobs_of

    composer = Composer(line.search)
    jobs = jobs_of(line.words, composer) if line.multirun else []
    for number, job in enumerate(jobs, 1):
        print(f"---\n# [{number} of {len(jobs)}] {' '.join(map(masked_argument, job.own))}")
        print(resolved(job.config) if line.resolve else as_yaml(composer.composed(job.fixed, job.own).tree), end="")
        print(explain_empty_rate(job.config.stage, job.config.method.name), end="")
    if not line.multirun:
        tree = composer.composed(line.words).tree
        config = check(tree)
        print(resolved(config) if line.resolve else as_yaml(tree), end="")
        print(explain_empty_rate(config.stage, config.method.name), end="")


def jobs_in(line: CommandLine) -> list[Job]:
    """The jobs of a line with `-m`, each checked; of any other line the one that it is."""
    from align.config.compose import Composer, composing
    from align.config.sweep import jobs_of

    with composing(line.words):
        jobs = jobs_of(line.words, Composer(line.search))
    for job in jobs:
        require_stage(job.config)
    return jobs


def composed(words: Sequence[str], search: Path = OWN_FOLDER) -> Config:
    """The checked configuration of one command line that runs a stage.

    Args:
        words: its `group=choice`, `key=value` and `+experiment=NAME`.
        search: the folder of the user's own group files.
    """
    from align.config.compose import check, compose_raw, composing

    with composing(words):
        config = check(compose_raw(words, search))
    require_stage(config)
    return config


def require_stage(config: Config) -> None:
    from align.config.extras import require_stage_extras

    listed = ", ".join(STAGES)
    require(
        config.stage is not None, "stage", "(missing)", "nothing says what to run", f"Add stage= with one of: {listed}."
    )
    require_stage_extras(config.stage)


def stages_in(words: Sequence[str]) -> list[str]:
    """The stages that one command line of several runs, checked as if it were alone."""
    line = parse(words)
    require(not line.print_job, "option", "--cfg", "prints, and a line here runs", "Leave it out.")
    configs = [job.config for job in jobs_in(line)] if line.multirun else [composed(line.words, line.search)]
    return [config.stage.name for config in configs]


def alone(field: str, value: str) -> None:
    """Raises InputError where a launcher has started this process as one rank of several: it prints, or runs several
    lines, each of which starts its own ranks."""
    world = ranks.launched()
    problem = f"works in one process, and a launcher has started {world} ranks"
    require(world == 1, field, value, problem, "Start it without the launcher.")


def lines_of(stream: TextIO) -> int:
    """`python -m align -`: a command line a line."""
    ranks.meet()
    alone("argument", "-")
    from align.cli.batch import batch

    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")  # as arguments are: the wrong one is then named
    return batch(stream, stages_in, main)


def shadow_free_path() -> None:
    """Move the working folder, which `python -m` puts first, behind the installed libraries, so that a user's
    `datasets.py` shadows none of them. A checkout's own folder goes last, so that its folder `reward` does not shadow a
    user's `reward.py`."""
    here, root = os.getcwd(), Path(__file__).resolve().parents[1]
    checkout = [str(root)] if (root / "pyproject.toml").is_file() else []
    sys.path[:] = [place for place in sys.path if (place or here) not in (here, *checkout)]
    sys.path += [here, *(place for place in checkout if place != here)]


def open_standard_streams() -> None:
    """Open the standard streams that this process was started without (`>&-`) on /dev/null. A file that is opened
    later would take the place of one, and get what is printed."""
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))


def terminate(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def opened_by() -> Callable[[Path], object]:
    """Tells the folder of the run to whoever started this process for one line of several; else to nobody."""
    if OPENED not in os.environ:
        return lambda folder: None
    from align.cli.batch import note_in

    return note_in(int(os.environ.pop(OPENED)))


def warn_of_foreign_distribution() -> None:
    """Print a warning to stderr if the other distribution called `align` is installed beside ours."""
    warning = describe_foreign_distribution()
    if warning is not None:
        print(f"align: warning: {warning}", file=sys.stderr)


def entry() -> int:
    open_standard_streams()
    shadow_free_path()
    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, terminate)
    if ranks.told():
        signal.signal(signal.SIGINT, terminate)  # its launcher may have been started in the background
    logging.captureWarnings(True)  # warnings go to the run's log.txt, each of them
    warnings.simplefilter("default")
    sys.excepthook = excepthook
    given = sys.argv[1:]
    sys.argv[1:] = map(masked_argument, given)  # wandb writes it down, and who knows who else
    logging.raiseExceptions = False  # a full disk is reported once, not at every line that the log cannot take
    if not ranks.told() and OPENED not in os.environ:  # the process that started this one has warned already
        warn_of_foreign_distribution()
    try:
        status = main(given, opened_by())
        sys.stdout.flush()
        if status and ranks.told():  # the interpreter would take seconds to end, and the launcher waits few
            sys.stderr.flush()
            ranks.until_heard()
            os._exit(status)
    except BrokenPipeError:  # whoever read our output is gone (`| head`): nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(entry())
