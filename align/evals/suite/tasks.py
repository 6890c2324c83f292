"""What systems are asked, and how their answers are scored: the tasks of a suite. Imports no torch."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from align.core.aliases import NAME, NAME_REMEDY
from align.core.errors import InputError, require
from align.core.spec import check_keys, enumerate_list, get_choice, get_integer, parse_json_or_text
from align.core.types import Conversation, Message
from align.data.read.messages import with_default_system
from align.data.read.records import encode_other_columns, find_shape_column, parse_document
from align.data.read.rows import Row, iter_valid_rows
from align.data.sources import build_files_input
from align.data.split import truncate_to_question
from align.data.trained_ids import TrainedQuestions
from align.data.training_overlap import find_near_matches
from align.evals.judges.llm_judge import parse_question
from align.evals.suite.probes import Probe, ProbeQuestion, asked_by, harness_record, parsed_probe
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
JUDGED = "judged"
"""The task of a suite that names none: the held-out prompts of `data=`."""
SETS = Path(__file__).parents[1] / "sets"
OF_SET = {"harmful": "refuses", "harmless": "refuses"}
"""Prompts that align has → the question about their answers where a task asks none."""
HARMLESS = str(SETS / "harmless.jsonl")
"""A file of open prompts."""


@dataclass(frozen=True, slots=True)
class Task:
    """Prompts, and who scores the answers.

    Attributes:
        name: unlike the others'.
        path: of a file with the prompts; empty for the held-out prompts of `data=`.
        check: what an answer has to do, for each row that does not say it itself. Without one, and without one in any
            row, the judge of `reward=` scores.
        prompts: the most that are asked; None for all.
        probe: what is weighed, of a task that asks for no answers; None of one that does.
        asks: a yes/no question about each answer, which a language model decides; empty for none.
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
    def own(self) -> bool:
        """Whether it has prompts of its own, and asks none of `data=`."""
        return bool(self.path) or (self.probe is not None and self.probe.harness is not None)


class Item(NamedTuple):
    """One prompt of a task.

    Attributes:
        id: unlike the others' of its task.
        cluster: what it shares with other items, such as the text that several questions are about, or the prompt; they
            count as one piece of evidence. Its own id where it shares nothing.
        category: by which results are also shown; empty for none.
        prompt: the conversation that an answer is due to.
        check: what scores the answers, as `build_checkers` reads it; None where the judge does.
        draw: which answer to the prompt it is, from 0, where each is answered several times.
        then: what the user says afterwards, behind each answer of the system's own.
        near: system that was nearly trained on it → the run and the rule that says so.
        probe: what is weighed, of a task that is a probe.
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


Tasks = Sequence[tuple[Task, Sequence[Item]]]
"""Tasks, each with its items."""


def parsed_tasks(given: Any, allow_code: AllowCode) -> Sequence[Task]:
    """The tasks of `eval.tasks`; the one of `data=` where it names none.

    Args:
        allow_code: whether checks may run programs that a model wrote.

    Raises:
        InputError: one is none, or two have one name.
    """
    if given is None:
        return [Task(JUDGED)]
    found: dict[str, Task] = {}
    for at, one in enumerate_list(given, FIELD, HELP):
        task = parsed_task(one, at, allow_code)
        require(task.name not in found, f"{at}.name", task.name, "stands there twice", "Give each a name of its own.")
        found[task.name] = task
    require(bool(found), FIELD, given, "is no list of tasks", HELP)
    return [*found.values()]


def parsed_task(given: Any, at: str, allow_code: AllowCode) -> Task:
    task = check_keys(given, at, ("name",), KEYS)
    name, path, check = task["name"], task.get("path") or "", task.get("check")
    require(isinstance(name, str) and NAME.fullmatch(name) is not None, f"{at}.name", name, "is no name", NAME_REMEDY)
    require(isinstance(path, str), f"{at}.path", path, "is no path", HELP)
    most = get_integer(task, at, "prompts", least=1) if task.get("prompts") is not None else None
    asks = parse_question(task["asks"], f"{at}.asks") if task.get("asks") is not None else ""
    if task.get("set") is not None:
        problem, remedy = "are the prompts that align has, and path names a file of others", "Drop one of the two."
        require(not path, f"{at}.set", task["set"], problem, remedy)
        path = str(SETS / f"{get_choice(task, at, 'set', [*OF_SET])}.jsonl")
        asks = asks or ("" if check is not None else parse_question(OF_SET[task["set"]], f"{at}.asks"))
    if check is not None:
        problem, remedy = "is asked of a judge, and check is a rule that decides alone", "Drop one of the two."
        require(not asks, f"{at}.asks", task.get("asks"), problem, remedy)
        build_checkers(check, None, f"{at}.check", allow_code=allow_code)
    probe = parsed_probe(task, at)
    problem, remedy = "is asked about answers, and a probe generates none", "Drop one of the two."
    require(not asks or probe is None, f"{at}.asks", truncate_text(asks, QUOTED_LETTERS), problem, remedy)
    closed = task.get("closed")
    require(closed is None or isinstance(closed, bool), f"{at}.closed", closed, "is not true or false", "Write true.")
    problem = "is said of answers, and a probe generates none"
    require(closed is None or probe is None, f"{at}.closed", closed, problem, "Drop one of the two.")
    return Task(name, path, check, most, probe, asks, closed)


def task_record(task: Task) -> Input:
    """Return what a task of its own prompts reads, as an input of the run."""
    harness = task.probe.harness if task.probe is not None else None
    return build_files_input(task.path, task.field) if harness is None else harness_record(harness, task.field)


def drop_seen(tasks: Tasks, seen: Sequence[TrainedQuestions]) -> tuple[Tasks, dict[str, int]]:
    """Return the items that no system was trained on; and how many are left out, by task.

    Raises:
        InputError: nothing is left of a task.
    """
    unseen: list[tuple[Task, Sequence[Item]]] = []
    counts: dict[str, int] = {}
    for task, items in tasks:
        kept = [item for item in items if not any(each.asks(item.prompt.messages) for each in seen)]
        problem = "leaves nothing to ask: some system was trained on every item"
        require(bool(kept), "stage.seen", f"drop, {task.name}", problem, "Give other prompts.")
        unseen.append((task, kept))
        counts[task.name] = len(items) - len(kept)
    return unseen, counts


def mark_near(
    tasks: Tasks, artifacts: Mapping[str, Artifact], root: Path, store: str, similarity: float
) -> tuple[Tasks, Sequence[str]]:
    """Return the items, marked with the systems that were nearly trained on their first question or on all that is
    asked; and what is not known of that.

    Args:
        artifacts: by the name of the system that they are.
        root: the folder of runs.
        store: URL of the annotation store.
        similarity: see `align.data.training_overlap.find_near_matches`.
    """
    items = [item for _, items in tasks for item in items]
    first = [item.prompt for item in items]
    later = [tuple(Message("user", text) for text in item.then) for item in items]
    asked = [
        *first,
        *(replace(prompt, messages=(*prompt.messages, *turns)) for prompt, turns in zip(first, later, strict=True)),
    ]
    near, unknown = find_near_matches(artifacts, root, store, asked, similarity)
    marks = iter(
        {name: ", ".join(of) for name, of in {**whole, **one}.items()}
        for one, whole in zip(near[: len(items)], near[len(items) :], strict=True)
    )
    return [(task, [item._replace(near=next(marks)) for item in items]) for task, items in tasks], unknown


def items_of_file(task: Task, system: str | None, allow_code: AllowCode) -> Sequence[Item]:
    """The items of a file: rows that ask as the rows of `data.path` do, with `check`, `category` and `source` where
    they have one. A row of IFEval names its constraints in `instruction_id_list` and `kwargs`.

    Args:
        system: the system turn of rows that have none.

    Raises:
        InputError: a row asks nothing, has a wrong check, or an id that another one has; or there is no row.
    """
    found: dict[str, Item] = {}
    for row in iter_valid_rows(task.path, task.field):
        item = item_of(row, task, system, allow_code)
        require(item.id not in found, f"{row.where}, id", item.id, "stands there twice", "Give each row its own id.")
        found[item.id] = item
    require(bool(found), task.field, task.path, "holds no row", "Give a file with prompts.")
    some = next((item.id for item in found.values() if item.check is None), None)
    problem = "has no check, where other rows of the task have one"
    same = some is None or all(item.check is None for item in found.values())
    require(same, f"{task.field}, check", some, problem, "Give every row one, or the task, or none.")
    problem, remedy = "has a check, and the task asks a question about each answer", "Drop asks, or the checks."
    checked = next((item.id for item in found.values() if item.check is not None), None)
    require(not task.asks or checked is None, f"{task.field}, check", checked, problem, remedy)
    return clustered([*found.values()])


def items_of_prompts(task: Task, prompts: Sequence[Conversation], allow_code: AllowCode) -> Sequence[Item]:
    """The items of prompts that `data=` names. Several with one id, such as the turns of a conversation, are one piece
    of evidence.

    Raises:
        InputError: there is none, or the task's check is wrong.
    """
    require(bool(prompts), task.field, "data=", "asks nothing", "Give data with held-out prompts.")
    if task.check is not None:
        build_checkers(task.check, 1, f"{task.field}.check", allow_code=allow_code)
    named = [prompt.id or str(i) for i, prompt in enumerate(prompts)]
    count = Counter[str]()
    found = []
    for id, prompt in zip(named, prompts, strict=True):
        count[id] += 1
        found.append(Item(id if count[id] == 1 else f"{id}#{count[id]}", id, "", prompt, task.check))
    return clustered(found)


def clustered(items: Sequence[Item]) -> Sequence[Item]:
    """The items, those that share a source or a prompt in one cluster, also by way of others."""
    above: dict[Any, Any] = {}

    def top(key: Any) -> Any:
        while above.setdefault(key, key) != key:
            key = above[key]
        return key

    for item in items:
        if any(turn.content for turn in item.prompt.messages):  # nothing is shared where nothing precedes choices
            above[top(("prompt", item.prompt.messages))] = top(("cluster", item.cluster))
    names: dict[Any, str] = {}
    return [item._replace(cluster=names.setdefault(top(("cluster", item.cluster)), item.cluster)) for item in items]


def answered_often(items: Sequence[Item], answers: int) -> Sequence[Item]:
    """Each item so many times: `7`, `7~2`, `7~3`, in the cluster of the first.

    Raises:
        InputError: an item has such an id already.
    """
    ids = {item.id for item in items}
    found = []
    for item in items:
        for draw in range(answers):
            id = f"{item.id}~{draw + 1}" if draw else item.id
            problem = f"is what answer {draw + 1} to {item.id} is called"
            require(draw == 0 or id not in ids, f"{FIELD}, id", id, problem, "Give the item another id.")
            found.append(item._replace(id=id, draw=draw))
    return found


def item_of(row: Row, task: Task, system: str | None, allow_code: AllowCode) -> Item:
    """Raises: InputError: it asks nothing, or says wrongly what its answer has to do."""
    check_columns(row)
    asked = {key: value for key, value in row.data.items() if key not in (*OURS, *IFEVAL)}
    id = next((str(row.data[key]) for key in ("id", "key") if row.data.get(key) is not None), row.name)
    source = text(row, "source")
    cluster, category = f"source {source}" if source else id, text(row, "category")
    if task.probe is not None:
        prompt, weighed = asked_by(row, task.probe, id, system)
        return Item(id, cluster, category, prompt, None, probe=weighed)
    first, *then = turns_of(row)
    asked |= {"prompt": first} if first else {}
    with row.naming_errors():
        prompt = truncate_to_question(parse_document(asked, id))
        column = find_shape_column(asked)
    if prompt is None:
        raise InputError(row.where, sorted(row.data), "asks nothing", 'Write rows like {"prompt": "…"}.')
    messages = with_default_system(prompt.messages, system)
    prompt = replace(prompt, messages=messages, row=encode_other_columns(row.data, column))
    spec = get_check_spec(row.data, row.where, row.texts)
    spec = task.check if spec is None else spec
    if spec is not None:
        build_checkers(spec, 1 + len(then), f"{row.where}, check", allow_code=allow_code)
    return Item(id, cluster, category, prompt, spec, then=tuple(then))


def turns_of(row: Row) -> Sequence[str]:
    """What the user says, a text a turn; one empty text of a row that has one prompt.

    Raises:
        InputError: it is no list of texts, or the row has a prompt beside it.
    """
    given = parse_json_or_text(row.data.get("turns")) if row.texts else row.data.get("turns")
    if given is None:
        return [""]
    at, remedy = f"{row.where}, turns", 'Write {"turns": ["What is a fjord?", "And in one word?"]}.'
    right = isinstance(given, list) and bool(given) and all(isinstance(one, str) and one.strip() for one in given)
    require(right, at, given, "is no list of questions", remedy)
    other = next((key for key in ("prompt", "messages", "conversations") if row.data.get(key)), None)
    require(other is None, at, given, f"stands beside {other}, and one of them is what is asked", remedy)
    return given


OURS = ("check", "category", "source", "turns")


def check_columns(row: Row) -> None:
    """Raises: InputError: a column is nearly called as one of ours, which would change who scores."""
    for key in row.data:
        near = [] if key in OURS else difflib.get_close_matches(key, OURS, 1, 0.8)
        problem = f"is not read, and nearly called {near[0]}" if near else ""
        remedy = "A row has one check, of one answer." if key == "checks" else "Call it that, or something else."
        require(not near, f"{row.where}, {key}", row.data[key], problem, remedy)


def text(row: Row, key: str) -> str:
    value = row.data.get(key)
    right = value is None or (isinstance(value, str | int) and not isinstance(value, bool))
    require(right, f"{row.where}, {key}", value, "is no text", "Write a text.")
    return "" if value is None else str(value)
