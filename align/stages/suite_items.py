"""The items that the tasks of a suite ask: read from their files, those that training saw left out, those that it
nearly saw marked. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from align.config.root import Config, store_url
from align.data.near_training import nearly_trained_on
from align.data.sources import files_record, prompts
from align.data.trained_ids import seen_by
from align.evals.harness import harness_record
from align.evals.suite import Tasks, unseen
from align.evals.systems import System
from align.evals.tasks import Item, Task, answered_often, items_of_file, items_of_prompts
from align.report.words import counted
from align.reward.checkers.code import code_permission
from align.run import Artifact, Input
from align.stages.rows import key_of, source_of
from align.types import Conversation, Message


class ToAsk(NamedTuple):
    """
    Attributes:
        tasks: each with its items.
        seen: task → items that were left out, because some system was trained on them.
        unknown: what is not known of the systems' training, a sentence each.
    """

    tasks: Tasks
    seen: Mapping[str, int]
    unknown: Sequence[str]


def items_to_ask(config: Config, tasks: Sequence[Task], systems: Sequence[System]) -> ToAsk:
    """
    Raises:
        InputError: a task has no item, or none that is left.
    """
    root, system_turn = config.run.folder, config.data.system or None
    artifacts = {system.name: system.artifact for system in systems if system.artifact is not None}
    seen = [seen_by(artifact, root, partial(key_of, config), system_turn) for artifact in artifacts.values()]
    left, counts = unseen([(task, items_of(config, task)) for task in tasks], seen)
    for name, count in counts.items():
        if count:
            print(f"{name}: {counted(count, 'item')} left out: training saw them")
    left, near_unknown = with_near(config, left, artifacts)
    drawn_of = [(task, drawn(config, task, items[: most_of(config, task)])) for task, items in left]
    unknown = [*dict.fromkeys([*(sentence for one in seen for sentence in one.unknown), *near_unknown])]
    return ToAsk(drawn_of, counts, unknown)


def with_near(config: Config, tasks: Tasks, artifacts: Mapping[str, Artifact]) -> tuple[Tasks, Sequence[str]]:
    """The items, with who was nearly trained on each, its first question or all that is asked; and what is not known
    of that."""
    if config.stage.near is None:
        return tasks, []
    root, every = config.run.folder, [item for _, items in tasks for item in items]
    asked = [*(item.prompt for item in every), *(all_asked(item) for item in every)]
    near, unknown = nearly_trained_on(artifacts, root, store_url(config), asked, config.stage.near)
    both = ({**whole, **first} for first, whole in zip(near[: len(every)], near[len(every) :], strict=True))
    told = iter({name: ", ".join(one) for name, one in of.items()} for of in both)
    return [(task, [item._replace(near=next(told)) for item in items]) for task, items in tasks], unknown


def all_asked(item: Item) -> Conversation:
    """An item's prompt with what the user says afterwards."""
    return replace(item.prompt, messages=(*item.prompt.messages, *(Message("user", text) for text in item.then)))


def record_of(task: Task) -> Input:
    """What a task reads, as an input of the run."""
    harness = task.probe.harness if task.probe is not None else None
    return files_record(task.path, task.field) if harness is None else harness_record(harness, task.field)


def items_of(config: Config, task: Task) -> Sequence[Item]:
    """All items of a task."""
    if task.probe is not None and task.probe.harness is not None:
        from align.evals.lm_eval_tasks import items_of_harness  # lm-eval is an extra

        return items_of_harness(task, task.probe.harness)
    allow_code = code_permission(config.stage.allow_code, config.stage.unsafe_code)
    if task.path:
        return items_of_file(task, config.data.system or None, allow_code)
    asked = prompts(replace(source_of(config), limit=None), "test", config.seed)
    return items_of_prompts(task, asked, allow_code)


def drawn(config: Config, task: Task, items: Sequence[Item]) -> Sequence[Item]:
    """Each item as often as it is answered. A probe draws nothing."""
    return items if task.probe is not None else answered_often(items, config.stage.answers)


def most_of(config: Config, task: Task) -> int | None:
    """How many of them are asked at most; None for all."""
    return task.prompts or (None if task.own else min(config.stage.prompts, config.data.limit or config.stage.prompts))
