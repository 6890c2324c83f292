"""Prompts of the tasks that the package `reasoning-gym` generates: data=reasoning_gym.

The same settings give the same prompts as long as the version of the package is the same.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache
from importlib.metadata import version
from io import StringIO
from typing import TYPE_CHECKING, Any

from align.core.distribution import require_extra
from align.core.errors import InputError, require
from align.core.spec import enumerate_list, get_choice, get_integer
from align.core.types import Conversation, Message
from align.run import Input, json_digest

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

SOURCE = "reasoning_gym"
"""Choice of `data`, and kind of the checks of its answers."""
FIELD = "data.tasks"
TASKS = "tasks"
"""Key in the details of an input for the parsed tasks."""
DEFAULT_SEED = 0
MAX_SIZE = 1_000_000
"""Largest number of prompts of one task."""
COMPOSITE = "composite"
"""reasoning-gym's mixture of tasks, for which there is the list of tasks."""
EVALUATES = "evaluates answers as Python in align's own process, so that a model could run any program"
UNBOUNDED = "may take hours to score an answer with a huge number"
UNREPRODUCIBLE = "generates other prompts in each process, so that a run could neither be resumed nor repeated"
REFUSED_TASKS = {
    "binary_matrix": EVALUATES,
    "codeio": UNBOUNDED,
    "coin_flip": UNBOUNDED,
    "complex_arithmetic": "gives its full score to the answer nan",
    "countdown": EVALUATES,
    "game_of_life_halting": "gives its full score to every answer",
    "intermediate_integration": EVALUATES,
    "isomorphic_strings": UNREPRODUCIBLE,
    "knight_swap": UNREPRODUCIBLE,
    "list_functions": UNREPRODUCIBLE,
    "n_queens": EVALUATES,
    "polynomial_multiplication": EVALUATES,
    "puzzle24": EVALUATES,
    "ransom_note": UNREPRODUCIBLE,
    "simple_integration": EVALUATES,
    "spiral_matrix": EVALUATES,
    "string_insertion": EVALUATES,
    "word_ladder": UNREPRODUCIBLE,
}
"""Task → why it is refused, found with reasoning-gym 0.1.25."""
HELP = 'Write "data.tasks=[{name: chain_sum, size: 2000, max_terms: 3}]".'

TaskSpec = dict[str, Any]
"""The `name` of a task, and the settings that differ from its defaults, among them always the `seed`."""


def parse_task(value: Any, field: str) -> TaskSpec:
    """Parse a task, which is a name or a mapping with a `name` and settings of that task.

    Raises:
        InputError: `reasoning-gym` is not installed, or the name, a setting or a value is wrong.
    """
    require_extra("reasoning", "data", SOURCE)
    from reasoning_gym.factory import DATASETS

    spec = {"name": value} if isinstance(value, str) else value
    require(isinstance(spec, Mapping), field, value, "is no task", HELP)
    name = get_choice(spec, field, "name", sorted(DATASETS.keys() - {COMPOSITE}))
    remedy = (
        "Choose another task, or write its prompts to a file for data=files, with checks or a function of your own."
    )
    require(name not in REFUSED_TASKS, f"{field}.name", name, REFUSED_TASKS.get(name, ""), remedy)
    known_settings = [setting.name for setting in dataclasses.fields(DATASETS[name][1])]
    for key in spec:
        remedy = f"Its settings are {', '.join(known_settings)}."
        require(key in ("name", *known_settings), f"{field}.{key}", spec[key], f"is no setting of {name}", remedy)
    task = {"name": name, **spec, "seed": get_integer(spec, field, "seed", DEFAULT_SEED)}
    get_integer(spec, field, "size", 1, minimum=1, maximum=MAX_SIZE)
    with convert_task_errors(task, field):
        load_task(task)
    return task


@contextmanager
def convert_task_errors(task: TaskSpec, field: str) -> Iterator[None]:
    """Raise any exception of reasoning-gym as an InputError, and suppress what it prints.

    Tasks check their settings by assertions or not at all.
    """
    try:
        with redirect_stdout(StringIO()):
            yield
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise InputError(field, task, f"is refused by reasoning-gym: {reason}", "Change its settings.") from error


def parse_tasks(values: Any) -> list[TaskSpec]:
    """Parse the setting `data.tasks`. See `parse_task`."""
    require(bool(values), FIELD, values, f"data={SOURCE} generates tasks, and none is named", HELP)
    return [parse_task(value, field) for field, value in enumerate_list(values, FIELD, HELP)]


def get_version() -> str:
    """Return the installed version of reasoning-gym."""
    return version("reasoning-gym")


def load_task(task: TaskSpec) -> ProceduralDataset:
    """Return reasoning-gym's data set of a parsed task, which generates an entry each time it is indexed."""
    return _load_task(json.dumps(task, sort_keys=True))


@lru_cache(maxsize=64)
def _load_task(task: str) -> ProceduralDataset:
    from reasoning_gym.factory import create_dataset

    return create_dataset(**json.loads(task))


def iter_entries(tasks: list[TaskSpec]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield the id, the entry and the check of each prompt, task by task."""
    for position, task in enumerate(tasks):
        dataset = load_task(task)
        for index in range(len(dataset)):
            check = {"kind": SOURCE, "version": get_version(), "task": task, "index": index}
            with convert_task_errors(task, f"{FIELD}[{position}]"):
                entry = dataset[index]
            yield f"{position}-{task['name']}-{index}", entry, check


def generate_conversations(values: Any, requires_answer: bool = False) -> list[Conversation]:
    """Generate the prompts of tasks, with the checks of their answers as the other columns of their rows.

    Args:
        values: the setting `data.tasks`.
        requires_answer: whether the right answer follows each prompt.

    Raises:
        InputError: the setting is wrong, or a task has no single right answer and `requires_answer` is set.
    """
    conversations = []
    for prompt_id, entry, check in iter_entries(parse_tasks(values)):
        messages = [Message("user", entry["question"])]
        if requires_answer:
            name = check["task"]["name"]
            problem = f"has no single right answer to train on (prompt {prompt_id})"
            require(isinstance(entry["answer"], str), FIELD, name, problem, "Choose another task, or use stage=ppo.")
            messages.append(Message("assistant", entry["answer"]))
        row = json.dumps({"check": check})
        conversations.append(Conversation(tuple(messages), prompt_id, row=row))
    return conversations


def compute_tasks_digest(values: Any) -> str:
    """Return the digest of the questions and answers that the tasks of `data.tasks` generate."""
    entries = iter_entries(parse_tasks(values))
    return json_digest([[prompt_id, entry["question"], entry["answer"]] for prompt_id, entry, _ in entries])


def build_tasks_input(values: Any) -> Input:
    """Return the digest of what the tasks of `data.tasks` generate as an input for a run's manifest, with the tasks and
    the version of reasoning-gym."""
    tasks = parse_tasks(values)
    names = "+".join(task["name"] for task in tasks)
    details = {TASKS: tasks, "version": get_version()}
    return Input(compute_tasks_digest(tasks), path=f"{SOURCE}:{names}", details=details)
