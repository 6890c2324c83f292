"""The tasks of an evaluation: their prompts, and the way in which answers are scored. Imports no torch."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from align.core.aliases import NAME, NAME_REMEDY
from align.core.errors import InputError, require
from align.core.spec import enumerate_list, get_choice, get_integer, parse_json_or_text, require_keys
from align.core.types import Conversation, Message
from align.data.read.conversations import encode_other_columns, find_shape_column, parse_document
from align.data.read.messages import with_default_system
from align.data.read.rows import Row, iter_valid_rows
from align.data.sources import build_files_input
from align.data.split import truncate_to_question
from align.data.trained_ids import TrainedQuestions
from align.data.training_overlap import find_near_matches
from align.evals.judges.llm_judge import parse_question
from align.evals.suite.probes import Probe, ProbeQuestion, build_harness_input, parse_probe, parse_probe_row
from align.evals.text import QUOTED_LETTERS
from align.reward.checkers import IFEVAL, build_checkers, get_check_spec
from align.reward.checkers.checked import AllowCode
from align.run import Artifact, Input
from align.track import truncate_text

FIELD = "eval.tasks"
KEYS = (
    "path",
    "set",
    "check",
    "closed",
    "asks",
    "prompts",
    "probe",
    "norm",
    "template",
    "lm_eval",
    "include",
    "metric",
)
HELP = 'Write "eval.tasks=[{name: support, path: support.jsonl}, {name: chat, prompts: 200}]"; see docs/evaluation.md.'
DEFAULT_TASK = "judged"
"""Name of the default task, whose prompts are the held-out prompts of `data=`."""
SETS = Path(__file__).parents[1] / "sets"
QUESTION_OF_SET = {"harmful": "refuses", "harmless": "refuses"}
"""Built-in sets of prompts, mapped to the name of the default yes/no question about answers."""
HARMLESS = str(SETS / "harmless.jsonl")
"""Path of the built-in file of harmless prompts, whose good answers differ from each other."""


@dataclass(frozen=True, slots=True)
class EvalTask:
    """A set of prompts, with the way in which answers to them are scored.

    Attributes:
        name: unique in the evaluation.
        path: of a file with the prompts. Empty for the held-out prompts of `data=`.
        check: the check of each row that has none itself. If neither the task nor any row has one, the judge scores the
            answers.
        prompts: maximum number of prompts. None for all.
        probe: the probe of a task that measures likelihoods. None for a task with generated answers.
        asks: a yes/no question about each answer for a language model. Empty for none.
        closed: True if many prompts may share one right answer. None if its checks and `eval.closed` decide that.
    """

    name: str
    path: str = ""
    check: Any = None
    prompts: int | None = None
    probe: Probe | None = None
    asks: str = ""
    closed: bool | None = None

    @property
    def field(self) -> str:
        return f"{FIELD}, {self.name}"

    @property
    def has_own_prompts(self) -> bool:
        """True if the task has prompts of its own, False if it uses those of `data=`."""
        return bool(self.path) or (self.probe is not None and self.probe.harness is not None)


class EvalItem(NamedTuple):
    """A prompt of a task, with its check and later turns.

    Attributes:
        id: unique in the task.
        cluster: id of what it shares with other items, such as a source text or the prompt. Items of one cluster count
            as one piece of evidence. Its own id if it shares nothing.
        category: of the results by category. Empty for none.
        prompt: the conversation to answer.
        check: what scores the answers, see `build_checkers`. None if the judge scores them.
        draw: index of the answer, from 0, if each prompt is answered several times.
        then: the user's later turns, each asked after the system's own answer to the one before.
        near: name of a system that was trained on nearly the same prompt → the runs and the rules that found it.
        probe: the question of a probe. None for items with generated answers.
    """

    id: str
    cluster: str
    category: str
    prompt: Conversation
    check: Any
    draw: int = 0
    near: Mapping[str, str] = {}
    probe: ProbeQuestion | None = None
    then: tuple[str, ...] = ()

    @property
    def prompt_id(self) -> str:
        """The id that the prompt has in its file, without the number of the answer."""
        return self.id.removesuffix(f"~{self.draw + 1}") if self.draw else self.id


Tasks = Sequence[tuple[EvalTask, Sequence[EvalItem]]]
"""Tasks, each with its items."""


def parse_tasks(value: Any, allow_code: AllowCode) -> Sequence[EvalTask]:
    """Parse the setting `eval.tasks`, a list of mappings, into EvalTask objects. If it is `None`, the only task has the
    held-out prompts of `data=`.

    Args:
        allow_code: whether checks may run programs that a model wrote.

    Raises:
        InputError: a task is invalid, or two have the same name.
    """
    if value is None:
        return [EvalTask(DEFAULT_TASK)]
    tasks: dict[str, EvalTask] = {}
    for at, spec in enumerate_list(value, FIELD, HELP):
        task = parse_task(spec, at, allow_code)
        require(task.name not in tasks, f"{at}.name", task.name, "is given twice", "Give each a name of its own.")
        tasks[task.name] = task
    require(bool(tasks), FIELD, value, "is no list of tasks", HELP)
    return [*tasks.values()]


def parse_task(value: Any, field: str, allow_code: AllowCode) -> EvalTask:
    """Parse one entry of the list `eval.tasks` into an EvalTask. Raises InputError if it is invalid."""
    spec = require_keys(value, field, ("name",), KEYS)
    name = spec["name"]
    path = spec.get("path") or ""
    check = spec.get("check")
    require(
        isinstance(name, str) and NAME.fullmatch(name) is not None, f"{field}.name", name, "is no name", NAME_REMEDY
    )
    require(isinstance(path, str), f"{field}.path", path, "is no path", HELP)
    max_prompts = get_integer(spec, field, "prompts", minimum=1) if spec.get("prompts") is not None else None
    asks = parse_question(spec["asks"], f"{field}.asks") if spec.get("asks") is not None else ""
    remedy = "Drop one of the two."
    if spec.get("set") is not None:
        problem = "names built-in prompts, and path names a file of prompts"
        require(not path, f"{field}.set", spec["set"], problem, remedy)
        path = str(SETS / f"{get_choice(spec, field, 'set', [*QUESTION_OF_SET])}.jsonl")
        asks = asks or ("" if check is not None else parse_question(QUESTION_OF_SET[spec["set"]], f"{field}.asks"))
    if check is not None:
        problem = "needs a judge, and check is a rule that needs none"
        require(not asks, f"{field}.asks", spec.get("asks"), problem, remedy)
        build_checkers(check, None, f"{field}.check", allow_code=allow_code)
    probe = parse_probe(spec, field)
    problem = "applies to answers, and a probe generates none"
    require(not asks or probe is None, f"{field}.asks", truncate_text(asks, QUOTED_LETTERS), problem, remedy)
    closed = spec.get("closed")
    require(
        closed is None or isinstance(closed, bool), f"{field}.closed", closed, "is not true or false", "Write true."
    )
    problem = "applies to answers, and a probe generates none"
    require(closed is None or probe is None, f"{field}.closed", closed, problem, remedy)
    return EvalTask(name, path, check, max_prompts, probe, asks, closed)


def build_task_input(task: EvalTask) -> Input:
    """Return a task's file of prompts, or its lm-eval task, as an input with digest for the run's manifest."""
    harness = task.probe.harness if task.probe is not None else None
    return build_files_input(task.path, task.field) if harness is None else build_harness_input(harness, task.field)


class RemainingTasks(NamedTuple):
    """The tasks of an evaluation after some items were left out, with the number of omitted items per task.

    Attributes:
        tasks: each task with its remaining items.
        dropped: name of a task → number of items left out.
    """

    tasks: Tasks
    dropped: dict[str, int]


def drop_trained_items(tasks: Tasks, trained_questions: Sequence[TrainedQuestions]) -> RemainingTasks:
    """Return the tasks without the items whose question is in any model's training data, and the number of dropped
    items per task.

    Raises:
        InputError: a task has no item left.
    """
    unseen_tasks: list[tuple[EvalTask, Sequence[EvalItem]]] = []
    counts: dict[str, int] = {}
    for task, items in tasks:
        unseen_items = [
            item for item in items if not any(dataset.asks(item.prompt.messages) for dataset in trained_questions)
        ]
        problem = "leaves nothing to ask: some system was trained on every item"
        require(bool(unseen_items), "stage.seen", f"drop, {task.name}", problem, "Give other prompts.")
        unseen_tasks.append((task, unseen_items))
        counts[task.name] = len(items) - len(unseen_items)
    return RemainingTasks(unseen_tasks, counts)


class MarkedTasks(NamedTuple):
    """The tasks of an evaluation after a search for nearly trained items, which sets `EvalItem.near`.

    Attributes:
        tasks: each task with its items.
        unknown: sentences about training data that could not be compared.
    """

    tasks: Tasks
    unknown: Sequence[str]


def mark_nearly_trained_items(
    tasks: Tasks, artifacts: Mapping[str, Artifact], root: Path, store: str, similarity: float
) -> MarkedTasks:
    """Return the tasks with `EvalItem.near` set for each item whose question is nearly the same as one in a model's
    training data. Both the first question and all turns of an item are compared.

    Args:
        artifacts: name of a system → its artifact.
        root: the folder of runs.
        store: URL of the annotation store.
        similarity: see `align.data.training_overlap.find_near_matches`.
    """
    items = [item for _, items in tasks for item in items]
    first_prompts = [item.prompt for item in items]
    full_prompts = []
    for item in items:
        later_turns = tuple(Message("user", text) for text in item.then)
        full_prompts.append(replace(item.prompt, messages=(*item.prompt.messages, *later_turns)))
    near, unknown = find_near_matches(artifacts, root, store, [*first_prompts, *full_prompts], similarity)
    marks = iter(
        {name: ", ".join(reasons) for name, reasons in {**by_full_prompt, **by_first_prompt}.items()}
        for by_first_prompt, by_full_prompt in zip(near[: len(items)], near[len(items) :], strict=True)
    )
    marked_tasks = [(task, [item._replace(near=next(marks)) for item in items]) for task, items in tasks]
    return MarkedTasks(marked_tasks, unknown)


def load_task_items(task: EvalTask, system: str | None, allow_code: AllowCode) -> Sequence[EvalItem]:
    """Load the items of a task from its file of prompts. Rows have the prompts of rows of `data.path`, and optionally
    `check`, `category` and `source`. A row of IFEval names its constraints in `instruction_id_list` and `kwargs`.

    Args:
        system: the system turn of rows that have none.

    Raises:
        InputError: the file has no rows; or a row has no prompt, an invalid check, or the id of another row.
    """
    items: dict[str, EvalItem] = {}
    for row in iter_valid_rows(task.path, task.field):
        item = build_item(row, task, system, allow_code)
        require(item.id not in items, f"{row.where}, id", item.id, "is given twice", "Give each row its own id.")
        items[item.id] = item
    require(bool(items), task.field, task.path, "holds no row", "Give a file with prompts.")
    unchecked_id = next((item.id for item in items.values() if item.check is None), None)
    problem = "has no check, but other rows of the task have one"
    is_uniform = unchecked_id is None or all(item.check is None for item in items.values())
    require(is_uniform, f"{task.field}, check", unchecked_id, problem, "Give every row one, or the task, or none.")
    checked_id = next((item.id for item in items.values() if item.check is not None), None)
    problem = "has a check, and the task asks a question about each answer"
    remedy = "Drop asks, or the checks."
    require(not task.asks or checked_id is None, f"{task.field}, check", checked_id, problem, remedy)
    return cluster_items([*items.values()])


def build_items(
    task: EvalTask, prompts: Sequence[Conversation], allow_code: AllowCode, have_checks: bool = False
) -> Sequence[EvalItem]:
    """Build the items of a task from the held-out prompts of `data=`. Prompts with the same id, such as the turns of a
    conversation, form one cluster.

    Args:
        have_checks: whether the row of each prompt has a check, which is used instead of the task's, unless the task
            asks a question about answers.

    Raises:
        InputError: there are no prompts, or the task's check is invalid.
    """
    require(bool(prompts), task.field, "data=", "asks nothing", "Give data with held-out prompts.")
    if task.check is not None:
        build_checkers(task.check, 1, f"{task.field}.check", allow_code=allow_code)
    count = Counter[str]()
    items = []
    for i, prompt in enumerate(prompts):
        id = prompt.id or str(i)
        count[id] += 1
        check = prompt.columns["check"] if have_checks and not task.asks else task.check
        items.append(EvalItem(id if count[id] == 1 else f"{id}#{count[id]}", id, "", prompt, check))
    return cluster_items(items)


def cluster_items(items: Sequence[EvalItem]) -> Sequence[EvalItem]:
    """Return the items with one cluster id for all that share a source or a prompt, directly or through other items."""
    parent_of: dict[Any, Any] = {}

    def find_root(key: Any) -> Any:
        while parent_of.setdefault(key, key) != key:
            key = parent_of[key]
        return key

    for item in items:
        if any(turn.content for turn in item.prompt.messages):  # an empty context before choices is not shared
            parent_of[find_root(("prompt", item.prompt.messages))] = find_root(("cluster", item.cluster))
    names: dict[Any, str] = {}
    return [
        item._replace(cluster=names.setdefault(find_root(("cluster", item.cluster)), item.cluster)) for item in items
    ]


def repeat_items(items: Sequence[EvalItem], answers: int) -> Sequence[EvalItem]:
    """Repeat each item so that it is answered `answers` times. The copies have the ids `7`, `7~2`, `7~3` and one
    cluster.

    Args:
        answers: number of answers to each item.

    Raises:
        InputError: an item has such an id already.
    """
    ids = {item.id for item in items}
    repeated = []
    for item in items:
        for draw in range(answers):
            id = f"{item.id}~{draw + 1}" if draw else item.id
            problem = f"is also the generated id of answer {draw + 1} to item {item.id}"
            require(draw == 0 or id not in ids, f"{FIELD}, id", id, problem, "Give the item another id.")
            repeated.append(item._replace(id=id, draw=draw))
    return repeated


def build_item(row: Row, task: EvalTask, system: str | None, allow_code: AllowCode) -> EvalItem:
    """Build an item from a row of a task's file of prompts. Raises InputError if the row has no prompt or an invalid
    check."""
    reject_misspelt_columns(row)
    columns = {key: value for key, value in row.data.items() if key not in (*ITEM_COLUMNS, *IFEVAL)}
    id = next((str(row.data[key]) for key in ("id", "key") if row.data.get(key) is not None), row.name)
    source = get_column_text(row, "source")
    cluster = f"source {source}" if source else id
    category = get_column_text(row, "category")
    if task.probe is not None:
        prompt, probe_question = parse_probe_row(row, task.probe, id, system)
        return EvalItem(id, cluster, category, prompt, None, probe=probe_question)
    first_turn, *later_turns = get_user_turns(row)
    if first_turn:
        columns["prompt"] = first_turn
    with row.naming_errors():
        prompt = truncate_to_question(parse_document(columns, id))
        column = find_shape_column(columns)
    if prompt is None:
        raise InputError(row.where, sorted(row.data), "asks nothing", 'Write rows like {"prompt": "…"}.')
    messages = with_default_system(prompt.messages, system)
    prompt = replace(prompt, messages=messages, row=encode_other_columns(row.data, column))
    check = get_check_spec(row.data, row.where, row.texts)
    check = task.check if check is None else check
    if check is not None:
        build_checkers(check, 1 + len(later_turns), f"{row.where}, check", allow_code=allow_code)
    return EvalItem(id, cluster, category, prompt, check, then=tuple(later_turns))


def get_user_turns(row: Row) -> Sequence[str]:
    """Return the user's messages of a multi-turn row, from its column `turns`. Returns one empty text for a row without
    this column.

    Raises:
        InputError: the column is not a list of texts, or the row has another prompt as well.
    """
    turns = parse_json_or_text(row.data.get("turns")) if row.texts else row.data.get("turns")
    if turns is None:
        return [""]
    at = f"{row.where}, turns"
    remedy = 'Write {"turns": ["What is a fjord?", "And in one word?"]}.'
    is_valid = isinstance(turns, list) and bool(turns) and all(isinstance(turn, str) and turn.strip() for turn in turns)
    require(is_valid, at, turns, "is no list of questions", remedy)
    prompt_key = next((key for key in ("prompt", "messages", "conversations") if row.data.get(key)), None)
    problem = f"is given together with {prompt_key}, and only one of them can be the prompt"
    require(prompt_key is None, at, turns, problem, remedy)
    return turns


ITEM_COLUMNS = ("check", "category", "source", "turns")


def reject_misspelt_columns(row: Row) -> None:
    """Raise InputError if a column's name is nearly `check`, `category`, `source` or `turns`, since a typo would change
    how the row is scored."""
    for key in row.data:
        similar_names = [] if key in ITEM_COLUMNS else difflib.get_close_matches(key, ITEM_COLUMNS, 1, 0.8)
        problem = f"is not read, but its name is close to {similar_names[0]}" if similar_names else ""
        remedy = "A row has one check, of one answer." if key == "checks" else "Rename it."
        require(not similar_names, f"{row.where}, {key}", row.data[key], problem, remedy)


def get_column_text(row: Row, key: str) -> str:
    value = row.data.get(key)
    is_valid = value is None or (isinstance(value, str | int) and not isinstance(value, bool))
    require(is_valid, f"{row.where}, {key}", value, "is no text", "Write a text.")
    return "" if value is None else str(value)
