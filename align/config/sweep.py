"""`-m`: one command line as several jobs, in Hydra's own grammar and in the order of its basic sweeper."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from align.config.compose import Composer, check
from align.config.group_files import EXPERIMENT
from align.config.root import Config
from align.config.settings import changed
from align.config.values import is_sweep, parsed, quote, read_value
from align.core.errors import InputError, require
from align.core.redaction import masked_argument

MOST_JOBS = 10_000
"""More are taken for a slip: a range with a nought too many."""
LONGEST_NAME = 200
"""Bytes of a run's name. File systems take 255, and a stage or `resume=never` may put something behind it."""
CALL = re.compile(r"\s*(choice|range|interval|glob|shuffle|sort|tag)\s*\(")


@dataclass(frozen=True, slots=True)
class Job:
    """One job of a sweep.

    Attributes:
        fixed: the words that all jobs of the sweep have.
        swept: key → value, as they were typed, of what each has of its own.
        config: its configuration, checked.
        name: its `run.name`, where a sweep had to make it distinct; empty elsewhere.
    """

    fixed: tuple[str, ...]
    swept: Mapping[str, str]
    config: Config
    name: str = ""

    @property
    def own(self) -> list[str]:
        """The words that it does not share."""
        return [f"{k}={v}" for k, v in self.swept.items()] + ([f"run.name={quote(self.name)}"] if self.name else [])

    @property
    def words(self) -> tuple[str, ...]:
        """Its command line, but for the options."""
        return last_of_each([*self.fixed, *self.own])


class Choices:
    """What Hydra's `glob(…)` asks for the choices of a group."""

    def __init__(self, composer: Composer) -> None:
        self.composer = composer

    def get_group_options(self, group: str, results_filter: Any = None) -> list[str]:
        return self.composer.choices_of(group)


def jobs_of(words: Sequence[str], composer: Composer) -> list[Job]:
    """The jobs of a command line, each composed and checked. A `run.name` that several of them would have gets what was
    swept behind it.

    Raises:
        InputError: a sweep that cannot be read or is empty, a job that would be refused, names that are not distinct.
    """
    fixed, combinations = divided(words, composer)
    variants = composer.variants(fixed, ([f"{k}={v}" for k, v in swept.items()] for swept in combinations))
    jobs = list[Job]()
    for number, swept in enumerate(combinations, 1):
        try:
            jobs.append(Job(tuple(fixed), swept, check(next(variants).tree)))
        except InputError as error:
            if len(combinations) == 1:
                raise
            problem = f"{error.problem} (job {number} of {len(combinations)}; nothing was run)"
            raise type(error)(error.field, error.value, problem, error.remedy) from error
    several = {place for place, count in Counter(map(place_of, jobs)).items() if count > 1 and place[-1]}
    jobs = [renamed(job) if place_of(job) in several else job for job in jobs]
    check_places(jobs)
    return jobs


def renamed(job: Job) -> Job:
    """The same with what was swept behind its name: `mine-lr=1e-4-seed=0`."""
    parts = [str(job.config.run.name)]
    for key, value in job.swept.items():
        if key != "run.name":
            text = masked_argument(f"{key}={read_value(value)}").partition("=")[2]
            parts.append(f"{key.lstrip('+').rpartition('.')[2]}={text}")
    name = re.sub(r"[/\x00-\x1f\x7f]", "_", "-".join(parts))
    return replace(job, name=name, config=changed(job.config, run=changed(job.config.run, name=name)))


def last_of_each(words: Sequence[str]) -> tuple[str, ...]:
    """The words that count: of two with one key the later, in the place of the first."""
    return tuple({word.partition("=")[0].lstrip("+"): word for word in words}.values())


def divided(words: Sequence[str], composer: Composer) -> tuple[list[str], list[dict[str, str]]]:
    """The words that all jobs have, and key → value of what each has of its own. Sweeps that group files ask for
    (`hydra.sweeper.params`) come before those of the command line."""
    given = last_of_each(words)
    choices = [(key, value) for key, _, value in (word.partition("=") for word in given) if composer.is_group(key)]
    alike = [f"{key}={value}" for key, value in choices if not sweeps(key, value)]
    # A swept stage stands in by its first value: an experiment's keys belong to it. Swept experiments ask for nothing.
    first = [
        f"{k}={values_of(k, v, composer)[0][0]}" for k, v in choices if sweeps(k, v) and not k.endswith(EXPERIMENT)
    ]
    merged = last_of_each([*composer.composed([*alike, *first]).sweeps, *given])
    apart = {word: sweeps(*word.partition("=")[::2]) for word in merged}
    return [word for word in merged if not apart[word]], combined([word for word in merged if apart[word]], composer)


def sweeps(key: str, value: str) -> bool:
    """Whether Hydra sweeps over a value.

    Raises:
        InputError: it looks like a sweep, and Hydra's grammar refuses it.
    """
    unread = parsed(value) is None and ("," in value or CALL.match(value))
    require(
        not unread, key, value, "cannot be read as a sweep",
        f"Write {key}=choice(A,B), texts in quotes: \"{key}='é.txt','b'\". In quotes as a whole it is one value.",
    )  # fmt: skip
    return is_sweep(value)


def values_of(key: str, value: str, composer: Composer) -> list[tuple[str, str]]:
    """(as it was typed, as Hydra writes it) of each value of a sweep."""
    override = override_of(key, value, composer)
    try:
        written = list(islice(override.sweep_string_iterator(), MOST_JOBS + 1))
    except (HydraException, ArithmeticError, ValueError, TypeError) as error:
        remedy = "Write range(FIRST,LAST,STEP) with a step that leads from the first to the last, or list the values."
        raise InputError(key, value, f"cannot be swept over ({error})", remedy) from error
    require(bool(written), key, value, "is a sweep over nothing", "Give values that there are.")
    # Hydra writes 1e-4 as 0.0001, and the commit 12e4567 as inf. The pieces between commas are what was typed, where
    # each of them is read as Hydra has it.
    typed = [piece.strip() for piece in value.split(",")]
    read = [found.get_value_element_as_str() for p in typed if (found := parsed(p)) and not found.is_sweep_override()]
    return list(zip(typed if read == written else written, written, strict=True))


def override_of(key: str, value: str, composer: Composer) -> Override:
    """One sweep as Hydra reads it.

    Raises:
        InputError: its grammar refuses the key, or there is no end to the values.
    """
    loader = cast(Any, Choices(composer))
    try:
        (override,) = OverridesParser.create(config_loader=loader).parse_overrides([f"{key}={value}"])
    except HydraException as error:
        raise InputError(key, value, "is not a key", "`python -m align --cfg job` shows every key.") from error
    require(
        override.is_discrete_sweep(), key, value, "has no end of values",
        "List them, or write range(FIRST,LAST,STEP): nothing here searches an interval.",
    )  # fmt: skip
    return override


def combined(words: Sequence[str], composer: Composer) -> list[dict[str, str]]:
    """Every combination of what is swept, in the order of Hydra's basic sweeper: the last key changes first."""
    swept = [word.partition("=")[::2] for word in words]
    values = {key: values_of(key, value, composer) for key, value in swept}
    count = prod(map(len, values.values()))
    key, _, value = " ".join(words).partition("=")
    require(count <= MOST_JOBS, key, value, f"makes more than {MOST_JOBS} jobs", "Sweep over fewer values.")
    typed = {f"{key}={written}": as_typed for key, found in values.items() for as_typed, written in found}
    overrides = [override_of(key, value, composer) for key, value in swept]
    jobs = BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]
    return [{word.partition("=")[0]: typed[word] for word in job} for job in jobs]


def place_of(job: Job) -> tuple[str, Path, str | None]:
    """Stage, folder of runs, and name, where it has one that is not derived from what goes in."""
    return getattr(job.config.stage, "name", ""), Path(job.config.run.root), job.config.run.name


def check_places(jobs: Sequence[Job]) -> None:
    """Raises InputError where two jobs would have one folder, or the name of one is too long for a folder."""
    taken: dict[tuple[str, Path, str | None], Job] = {}
    for job in jobs:
        name = job.config.run.name
        if name is None:
            continue
        remedy = "Leave run.name out, or write into it what differs: 'run.name=mine-${seed}'."
        require(len(name.encode()) <= LONGEST_NAME or len(jobs) == 1, "run.name", name, "is too long", remedy)
        other = taken.setdefault(place_of(job), job)
        require(other.swept == job.swept, "run.name", name, "would be the name of two jobs", remedy)
