"""Expansion of a command line with sweeps (`-m`) into jobs, in the grammar and the order of Hydra."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from align.config.compose import Composer, build_config
from align.config.group_files import EXPERIMENT
from align.config.root import Config
from align.config.settings import replace_values
from align.config.values import is_sweep, parse_plain_value, parse_value, quote_for_hydra
from align.core.errors import InputError, require
from align.core.redaction import NAME_FIELDS, mask_argument

MOST_JOBS = 10_000
"""Maximum number of jobs of a sweep. More are taken for a mistake, such as a range with a zero too many."""
LONGEST_NAME = 200
"""Maximum length in bytes of a run's name in a sweep. File systems take 255, and a stage may append something."""
CALL = re.compile(r"\s*(choice|range|interval|glob|shuffle|sort|tag)\s*\(")


@dataclass(frozen=True, slots=True)
class Job:
    """One job of a sweep: its swept values and its validated configuration.

    Attributes:
        fixed: the words that all jobs of the sweep have.
        swept: swept key → this job's value, as it was typed.
        config: its configuration, checked.
        name: its `run.name` if the sweep changed it to make it unique, else empty.
    """

    fixed: tuple[str, ...]
    swept: Mapping[str, str]
    config: Config
    name: str = ""

    @property
    def own(self) -> list[str]:
        """The `key=value` words that only this job has: its swept values, and `run.name` if the sweep changed it."""
        return [f"{k}={v}" for k, v in self.swept.items()] + (
            [f"run.name={quote_for_hydra(self.name)}"] if self.name else []
        )

    @property
    def words(self) -> tuple[str, ...]:
        """The `key=value` words of the job's command line, without options such as `--config-dir`."""
        return drop_overridden_words([*self.fixed, *self.own])


class Choices:
    """A stand-in for Hydra's config loader that lists the choices of a group, for sweeps such as `glob(*)`."""

    def __init__(self, composer: Composer) -> None:
        self.composer = composer

    def get_group_options(self, group: str, results_filter: Any = None) -> list[str]:
        return self.composer.list_choices(group)


def build_jobs(words: Sequence[str], composer: Composer) -> list[Job]:
    """Expand a command line with sweeps (`-m`, as in Hydra) into jobs with a validated configuration each.

    The swept values are appended to a `run.name` that several jobs would share.

    Raises:
        InputError: a sweep cannot be parsed or is empty, a job is invalid, or names are not unique.
    """
    fixed, combinations = split_sweeps(words, composer)
    variants = composer.compose_variants(fixed, ([f"{k}={v}" for k, v in swept.items()] for swept in combinations))
    jobs = list[Job]()
    for number, swept in enumerate(combinations, 1):
        try:
            jobs.append(Job(tuple(fixed), swept, build_config(next(variants).tree)))
        except InputError as error:
            if len(combinations) == 1:
                raise
            problem = f"{error.problem} (job {number} of {len(combinations)}; nothing was run)"
            raise type(error)(error.field, error.value, problem, error.remedy) from error
    shared = {
        location for location, count in Counter(map(get_run_location, jobs)).items() if count > 1 and location.name
    }
    jobs = [rename_job(job, n) if get_run_location(job) in shared else job for n, job in enumerate(jobs, start=1)]
    require_distinct_run_folders(jobs)
    return jobs


def rename_job(job: Job, number: int) -> Job:
    """Return a copy of a job with its swept values appended to its `run.name`, such as `mine-lr=1e-4-seed=0`.

    A value with names of people is replaced by the number of the job.
    """
    parts = [str(job.config.run.name)]
    for key, value in job.swept.items():
        if key != "run.name":
            text = mask_argument(f"{key}={parse_plain_value(value)}").partition("=")[2]
            text = str(number) if key.lstrip("+") in NAME_FIELDS else text
            parts.append(f"{key.lstrip('+').rpartition('.')[2]}={text}")
    name = re.sub(r"[/\x00-\x1f\x7f]", "_", "-".join(parts))
    return replace(job, name=name, config=replace_values(job.config, run=replace_values(job.config.run, name=name)))


def drop_overridden_words(words: Sequence[str]) -> tuple[str, ...]:
    """Return the `key=value` words with one word per key: the last one, in the position of the first."""
    return tuple({word.partition("=")[0].lstrip("+"): word for word in words}.values())


def split_sweeps(words: Sequence[str], composer: Composer) -> tuple[list[str], list[dict[str, str]]]:
    """Split the words of a command line into the fixed words, and one mapping from swept key to value for each job.

    Sweeps of group files (`hydra.sweeper.params`) come before those of the command line.
    """
    typed = drop_overridden_words(words)
    choices = [(key, value) for key, _, value in (word.partition("=") for word in typed) if composer.is_group(key)]
    fixed_choices = [f"{key}={value}" for key, value in choices if not is_swept(key, value)]
    # The first value of a swept stage is composed, for the stage's keys in an experiment. Sweeps inside of swept
    # experiments are not read.
    first_choices = [
        f"{k}={expand_sweep(k, v, composer)[0][0]}" for k, v in choices if is_swept(k, v) and not k.endswith(EXPERIMENT)
    ]
    merged = drop_overridden_words([*composer.compose([*fixed_choices, *first_choices]).sweeps, *typed])
    swept = {word: is_swept(*word.partition("=")[::2]) for word in merged}
    fixed = [word for word in merged if not swept[word]]
    return fixed, combine_sweeps([word for word in merged if swept[word]], composer)


def is_swept(key: str, value: str) -> bool:
    """Return whether a command-line value is a sweep, such as `1,2`, or raise InputError if it is a malformed one.

    Raises:
        InputError: it looks like a sweep, and Hydra's grammar refuses it.
    """
    if parse_value(value) is None and ("," in value or CALL.match(value)):
        remedy = (
            f"Write {key}=choice(A,B), texts in quotes: \"{key}='é.txt','b'\". In quotes as a whole it is one value."
        )
        raise InputError(key, value, "cannot be read as a sweep", remedy)
    return is_sweep(value)


def expand_sweep(key: str, value: str, composer: Composer) -> list[tuple[str, str]]:
    """Return the values of a sweep such as `range(0,3)`, each as (text that was typed, text as Hydra formats it)."""
    override = parse_sweep(key, value, composer)
    try:
        formatted = list(islice(override.sweep_string_iterator(), MOST_JOBS + 1))
    except (HydraException, ArithmeticError, ValueError, TypeError) as error:
        remedy = "Write range(FIRST,LAST,STEP) with a step that leads from the first to the last, or list the values."
        raise InputError(key, value, f"cannot be swept over ({error})", remedy) from error
    require(bool(formatted), key, value, "is a sweep over nothing", "Give values that there are.")
    # Hydra formats 1e-4 as 0.0001, and the commit 12e4567 as inf. The typed values are the pieces between commas, if
    # each of them alone is formatted as in the sweep.
    typed = [piece.strip() for piece in value.split(",")]
    overrides = [parse_value(piece) for piece in typed]
    alone = [item.get_value_element_as_str() for item in overrides if item and not item.is_sweep_override()]
    return list(zip(typed if alone == formatted else formatted, formatted, strict=True))


def parse_sweep(key: str, value: str, composer: Composer) -> Override:
    """Parse a `key=value` sweep into Hydra's Override, or raise InputError.

    Raises:
        InputError: the grammar refuses the key, or the sweep is an interval.
    """
    loader = cast(Any, Choices(composer))
    try:
        (override,) = OverridesParser.create(config_loader=loader).parse_overrides([f"{key}={value}"])
    except HydraException as error:
        raise InputError(key, value, "is not a key", "`python -m align --cfg job` shows every key.") from error
    remedy = "List them, or write range(FIRST,LAST,STEP): nothing here searches an interval."
    require(override.is_discrete_sweep(), key, value, "has no end of values", remedy)
    return override


def combine_sweeps(words: Sequence[str], composer: Composer) -> list[dict[str, str]]:
    """Return one mapping from key to value for every combination of swept values. The last key changes fastest."""
    swept = [word.partition("=")[::2] for word in words]
    values = {key: expand_sweep(key, value, composer) for key, value in swept}
    count = prod(map(len, values.values()))
    key, _, value = " ".join(words).partition("=")
    require(count <= MOST_JOBS, key, value, f"makes more than {MOST_JOBS} jobs", "Sweep over fewer values.")
    typed = {f"{key}={formatted}": as_typed for key, pairs in values.items() for as_typed, formatted in pairs}
    overrides = [parse_sweep(key, value, composer) for key, value in swept]
    jobs = BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]
    return [{word.partition("=")[0]: typed[word] for word in job} for job in jobs]


class RunLocation(NamedTuple):
    """The parts of the path of the run folder that a job will have.

    Attributes:
        stage: name of the stage.
        root: the folder of all runs.
        name: `run.name`; None for a derived name.
    """

    stage: str
    root: Path
    name: str | None


def get_run_location(job: Job) -> RunLocation:
    """Return the stage, root and name that make up the path of a job's run folder."""
    return RunLocation(getattr(job.config.stage, "name", ""), Path(job.config.run.root), job.config.run.name)


def require_distinct_run_folders(jobs: Sequence[Job]) -> None:
    """Raise InputError if two different jobs of a sweep have the same run folder, or a run's name is too long."""
    job_by_location: dict[RunLocation, Job] = {}
    for job in jobs:
        name = job.config.run.name
        if name is None:
            continue
        remedy = "Leave run.name out, or write into it what differs: 'run.name=mine-${seed}'."
        require(len(name.encode()) <= LONGEST_NAME or len(jobs) == 1, "run.name", name, "is too long", remedy)
        owner = job_by_location.setdefault(get_run_location(job), job)
        require(owner.swept == job.swept, "run.name", name, "would be the name of two jobs", remedy)
