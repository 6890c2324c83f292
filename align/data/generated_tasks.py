"""Prompts of the tasks that the package `reasoning-gym` generates, with their right answers: data=reasoning_gym.

The same settings give the same prompts as long as the version of the package is the same. A task is offered if its
answer is right, is the only right one, and can be compared by our check `exact`. The package's own scores are not used:
in version 0.1.25 some evaluate an answer as Python, some do not end on an answer with a huge number, and some give
wrong answers the full score.
"""

from __future__ import annotations

import dataclasses
import decimal
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from io import StringIO
from typing import Any, NamedTuple

from align.core.distribution import require_extra
from align.core.errors import InputError, require
from align.core.spec import enumerate_list, get_choice, get_integer
from align.core.types import Conversation, Message
from align.run import Input, json_digest

SOURCE = "reasoning_gym"
"""Choice of `data`."""
FIELD = "data.tasks"
TASKS = "tasks"
"""Key in the details of an input for the parsed tasks."""
TASKS_VERSION = "tasks_version"
"""Key in the details of an input for the version of reasoning-gym."""
SEED_DISTANCE = 1_000_000
"""Largest number of prompts of one task. Most tasks draw entry i of seed s by the seed s + i. Our seed is multiplied by
this number, so that the prompts of two seeds are not the same ones in another order."""
READS = ("whole", "first_line", "last_line", "last_number", "answer_tag")
"""What the check `exact` can read of an answer."""
HELP = 'Write "data.tasks=[{name: chain_sum, size: 2000, max_terms: 3}]".'

NUMBER_TASKS = frozenset(
    [
        "aiw",
        "basic_arithmetic",
        "binary_alternation",
        "chain_sum",
        "count_bits",
        "count_primes",
        "decimal_chain_sum",
        "gcd",
        "gsm_symbolic",
        "largest_island",
        "lcm",
        "leg_counting",
        "letter_counting",
        "maze",
        "number_format",
        "number_sequence",
        "products",
        "rectangle_count",
        "rotten_oranges",
        "self_reference",
        "simple_equations",
        "simple_geometry",
    ]
)
"""Tasks whose right answer is a decimal number, so that `1,000.0` is as good as `1000`."""
TEXT_TASKS = frozenset(
    [
        "acre",
        "arc_1d",
        "arc_agi",
        "base_conversion",
        "bf",
        "binary_matrix",
        "bitwise_arithmetic",
        "caesar_cipher",
        "calendar_arithmetic",
        "circuit_logic",
        "color_cube_rotation",
        "course_schedule",
        "dice",
        "emoji_mystery",
        "family_relationships",
        "figlet_font",
        "mahjong_puzzle",
        "manipulate_matrix",
        "modulo_grid",
        "needle_haystack",
        "number_filtering",
        "number_sorting",
        "path_star",
        "rearc",
        "rotate_matrix",
        "spell_backward",
        "spiral_matrix",
        "string_insertion",
        "string_manipulation",
        "string_splitting",
        "string_synthesis",
        "word_sequence_reversal",
        "word_sorting",
        "zebra_puzzles",
    ]
)
"""Other tasks with a single right answer."""

TaskSpec = dict[str, Any]
"""The `name` of a task, its `size` and `seed`, what its checks `read`, and the settings that differ from its
defaults."""


class Entry(NamedTuple):
    """A generated prompt, its right answer, and the check that compares answers with it."""

    id: str
    question: str
    answer: str
    check: dict[str, Any]


def parse_task(value: Any, field: str) -> TaskSpec:
    """Parse a task, which is a name or a mapping with a `name` and settings of that task.

    Raises:
        InputError: `reasoning-gym` is not installed, or the name, a setting or a value is wrong.
    """
    require_extra("reasoning", "data", SOURCE)
    from reasoning_gym.factory import DATASETS

    spec = {"name": value} if isinstance(value, str) else value
    require(isinstance(spec, Mapping), field, value, "is no task", HELP)
    name = get_choice(spec, field, "name", sorted(NUMBER_TASKS | TEXT_TASKS))
    settings: dict[str, Any] = {setting.name: setting.default for setting in dataclasses.fields(DATASETS[name][1])}
    for key in spec:
        remedy = f"Its settings are {', '.join(['read', *settings])}."
        require(key in ("name", "read", *settings), f"{field}.{key}", spec[key], f"is no setting of {name}", remedy)
    size = get_integer(spec, field, "size", settings["size"], minimum=1, maximum=SEED_DISTANCE)
    read = get_choice(spec, field, "read", READS, "answer_tag")
    problem = f"reads numbers, and the answers of {name} are texts"
    require(read != "last_number" or name in NUMBER_TASKS, f"{field}.read", read, problem, "Use read: last_line.")
    return {"name": name, **spec, "size": size, "seed": get_integer(spec, field, "seed", 0), "read": read}


def parse_tasks(values: Any) -> list[TaskSpec]:
    """Parse the setting `data.tasks`. See `parse_task`."""
    require(bool(values), FIELD, values, f"data={SOURCE} generates tasks, and none is named", HELP)
    return [parse_task(value, field) for field, value in enumerate_list(values, FIELD, HELP)]


@contextmanager
def convert_task_errors(task: TaskSpec, field: str) -> Iterator[None]:
    """Raise any exception of reasoning-gym as an InputError, suppress what it prints, and undo its decimal precision.

    Tasks check their settings by assertions or not at all.
    """
    try:
        with redirect_stdout(StringIO()), decimal.localcontext(decimal.Context()):
            yield
    except Exception as error:
        reason = str(error).strip() or type(error).__name__
        raise InputError(field, task, f"is refused by reasoning-gym: {reason}", "Change its settings.") from error


def generate_entries(task: TaskSpec, position: int) -> list[Entry]:
    """Generate the prompts of a parsed task, which has this position in the list of tasks."""
    from reasoning_gym.factory import create_dataset

    settings = {key: value for key, value in task.items() if key not in ("name", "read", "seed")}
    with convert_task_errors(task, f"{FIELD}[{position}]"):
        dataset = create_dataset(task["name"], seed=task["seed"] * SEED_DISTANCE, **settings)
        generated = [dataset[index] for index in range(task["size"])]
    ignored = ["case", "number_format"] if task["name"] in NUMBER_TASKS else ["case"]
    return [
        Entry(
            f"{position}-{task['name']}-{index}",
            entry["question"],
            entry["answer"],
            {"kind": "exact", "answer": entry["answer"], "read": task["read"], "ignore": ignored},
        )
        for index, entry in enumerate(generated)
    ]


def iter_entries(tasks: list[TaskSpec]) -> Iterator[Entry]:
    """Yield the prompts of parsed tasks, task by task."""
    for position, task in enumerate(tasks):
        yield from generate_entries(task, position)


def generate_conversations(values: Any) -> Iterator[Conversation]:
    """Yield the prompts of tasks with their right answers, and with the checks of answers in their rows.

    Args:
        values: the setting `data.tasks`.

    Raises:
        InputError: the setting is wrong.
    """
    for entry in iter_entries(parse_tasks(values)):
        messages = (Message("user", entry.question), Message("assistant", entry.answer))
        yield Conversation(messages, entry.id, row=json.dumps({"check": entry.check}))


def compute_tasks_digest(values: Any) -> str:
    """Return the digest of what the tasks of `data.tasks` generate."""
    return json_digest([*map(list, iter_entries(parse_tasks(values)))])


def build_tasks_input(values: Any) -> Input:
    """Return the digest of what the tasks of `data.tasks` generate as an input for a run's manifest, with the tasks and
    the version of reasoning-gym."""
    tasks = parse_tasks(values)
    names = "+".join(task["name"] for task in tasks)
    details = {TASKS: tasks, TASKS_VERSION: version("reasoning-gym")}
    return Input(compute_tasks_digest(tasks), path=f"{SOURCE}:{names}", details=details)
