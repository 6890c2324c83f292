"""The rows that a stage reads: where its configuration says that they are, and which of them it takes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from align.annotate.store import Store
from align.config.root import Config, store_url
from align.config.scorers import reward_spec
from align.core.errors import InputError, require
from align.core.types import Record
from align.data.read.drops import tally
from align.data.sets.ids import SHA256, IdKind, kind_under, kinds_in
from align.data.sets.published import DataSet, data_set
from align.data.sources import MANIFEST, DataSource, divided_prompts, prompts
from align.data.trained_ids import Naming, questions_of, seen_by
from align.report.figure_text import counted
from align.reward.inputs import check_rows
from align.run import Artifact

SEEN = "dropped_seen"
"""Counts the prompts that are not asked because training saw them."""


def source_of(config: Config) -> DataSource:
    """Where the rows of `data=` come from."""
    data = config.data
    return DataSource(
        data.name, data.path, part=data.part, held_out=data.held_out, limit=data.limit, eval_path=data.eval_path,
        system=data.system or None, hide_reasoning=data.reasoning == "hide",
        skips=data.on_bad_row == "skip", columns=data.columns or {}, metadata=tuple(data.metadata or ()),
    )  # fmt: skip


def prompts_of(config: Config, side: str, most: int | None = None) -> tuple[Any, ...]:
    """The prompts of one side of the data, `train` or `test`, whose rows say what the reward needs to know."""
    found = prompts(source_of(config), side, config.seed)[:most]
    check_rows(reward_spec(config.reward), found)
    return (found,)


def prompts_of_both(config: Config) -> tuple[Any, ...]:
    """The prompts to train on, and those to measure on, of two files, see `prompts_of`."""
    both = divided_prompts(source_of(config), config.seed)
    for side in both:
        check_rows(reward_spec(config.reward), side)
    return both


def unseen_prompts(config: Config, artifact: Artifact, root: Path) -> tuple[Any, ...]:
    """Return the prompts to measure an artifact on, what it was trained on, and how many prompts were left out because
    training saw them.

    Raises:
        InputError: it was trained on all of them, and what it saw is to be left out.
    """
    found = prompts(replace(source_of(config), limit=None), "test", config.seed)  # of which some may be left out
    seen = seen_by(artifact, root, partial(key_of, config), config.data.system or None)
    left_out = 0
    if config.stage.seen == "drop":
        unseen = [prompt for prompt in found if not seen.asks(prompt.messages)]
        problem = f"leaves nothing to measure on: {artifact.ref} was trained on all {counted(len(found), 'prompt')}"
        remedy = "Give a file of its own to measure on (data.eval_path=FILE), or write stage.seen=report."
        require(bool(unseen), "stage.seen", "drop", problem, remedy)
        left_out = len(found) - len(unseen)
        tally(SEEN, left_out)
        if left_out:
            print(f"{left_out} of {counted(len(found), 'prompt')} left out: training saw them")
        found = unseen
    found = found[: config.data.limit][: config.stage.prompts]
    check_rows(reward_spec(config.reward), found)
    return found, seen, left_out


def naming_of(config: Config) -> Naming:
    """How the rows that are trained on get their ids: votes under their project's key, also those that a data set was
    made of, and all others without one."""
    key = partial(key_of, config)
    if config.data.name == "annotations":
        with open_store(config, create=False) as store:
            under = store.key(config.project)
        kind = kind_under(config.project, under) if under else IdKind(config.project)  # erased a moment ago
        return Naming(lambda record: kind, key)
    if config.data.name != MANIFEST:
        return Naming()
    kinds, system = voted(data_set(Path(config.data.path or ""))), config.data.system or None
    if not kinds:
        return Naming()
    return Naming(lambda record: kinds.get(first_question(record, system), SHA256), key)


def first_question(record: Record, system: str | None = None) -> bytes:
    """The id of the first question that a record answers or asks; empty where it is plain text."""
    return next(iter(questions_of(record, system)), b"")


def voted(found: DataSet) -> dict[bytes, IdKind]:
    """The first question of each row of a data set that was a vote → the kind of its ids. Neither `data.system`
    nor reasoning that is hidden changes that question."""
    kinds = kinds_in(found.data)
    if {*kinds.values()} <= {SHA256}:
        return {}
    both = zip(found.sources("train"), found.records("train"), strict=False)  # rows seen again come behind all others
    return {first_question(record): kinds[source] for source, record in both if kinds[source] != SHA256}


def key_of(config: Config, kind: IdKind) -> bytes | None:
    """Return the key of a kind of ids. Returns None if there is no such store or project any more, or another project
    has its name."""
    with suppress(InputError), Store.open(store_url(config), create=False) as store:
        key = store.key(kind.project)
        if key is not None and kind_under(kind.project, key) == kind:
            return key
    return None


def open_store(config: Config, create: bool = True) -> Store:
    """The annotation store. A reader never makes an empty one."""
    if create and config.store.url is None:
        config.run.folder.mkdir(parents=True, exist_ok=True)
    return Store.open(store_url(config), create=create)
