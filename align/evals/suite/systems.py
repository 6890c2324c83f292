"""The evaluated models (systems) by name, as `stage.systems` configures them. Imports no torch.

A system is an artifact of a run, a base without an adapter, a model behind a server, or a file of answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.aliases import NAME, NAME_REMEDY
from align.core.errors import InputError, require
from align.data.read.rows import iter_valid_rows
from align.data.sources import build_files_input
from align.evals.endpoint import Endpoint, parse_endpoint
from align.evals.suite.tasks import EvalItem
from align.models.base import BASE, choose_method, find_artifact, find_base_of_artifact, to_artifact
from align.report.figure_text import pluralize
from align.run import Artifact, Base, Input

FIELD = "stage.systems"
FILE = "file"
HELP = (
    'Write "stage.systems={new: ppo:latest, old: sft:latest}"; {theirs: {file: answers.jsonl}} for answers in a file, '
    "{theirs: {url: http://127.0.0.1:8000/v1, model: NAME}} for a server."
)
MAX_SYSTEMS = 64


@dataclass(frozen=True, slots=True)
class System:
    """An evaluated model: an artifact of a run, a base without an adapter, a model behind a server, or a file of
    answers.

    Attributes:
        name: given by the user.
        ref: a reference to an artifact, the path of a file, or the title of an endpoint.
        artifact: the artifact of the reference. None for a file or an endpoint.
        base: the base model. None for a file or an endpoint.
        method: `qlora` if the base is loaded quantised, `lora` if it is loaded in the compute dtype.
        record: the system as an input of the run.
        endpoint: the model behind a server. None for other systems.
        tokenized_as: the system whose tokenizer and chat template are used. None for its own.
        label: its name in error messages. Empty for its key in `stage.systems`.
    """

    name: str
    ref: str
    artifact: Artifact | None
    base: Base | None
    method: str
    record: Input
    endpoint: Endpoint | None = None
    tokenized_as: System | None = None
    label: str = ""

    @property
    def field(self) -> str:
        return self.label or f"{FIELD}.{self.name}"

    @property
    def is_file(self) -> bool:
        return self.base is None and self.endpoint is None


def parse_systems(value: Any) -> Mapping[str, str | Mapping[str, Any]]:
    """Check the setting `stage.systems`, a mapping from names to evaluated models, and return it.

    Returns:
        name → reference, `{file: PATH}` or `{url: URL, model: NAME}`, in the order in which they were written.

    Raises:
        InputError: the value is not such a mapping, or names no system.
    """
    require(isinstance(value, Mapping), FIELD, value, "is no mapping from names to systems", HELP)
    systems: dict[str, str | Mapping[str, Any]] = {}
    for name, system in value.items():
        require(
            isinstance(name, str) and NAME.fullmatch(name) is not None, FIELD, name, "cannot be a name", NAME_REMEDY
        )
        if isinstance(system, Mapping) and "url" in system:
            is_valid = parse_endpoint(system, f"{FIELD}.{name}").url != ""  # raises a more precise error itself
        elif isinstance(system, Mapping):
            is_valid = {*system} == {FILE} and isinstance(system[FILE], str) and bool(system[FILE])
        else:
            is_valid = isinstance(system, str) and bool(system)
        require(is_valid, f"{FIELD}.{name}", system, "names no system", HELP)
        systems[name] = system
    names = ", ".join(systems) or "(empty)"
    require(1 <= len(systems) <= MAX_SYSTEMS, FIELD, names, f"are not one to {MAX_SYSTEMS} systems", HELP)
    return systems


def get_reference(systems: Iterable[str]) -> str:
    """Return the name of the system that the first one is compared with: the second, or the only one."""
    return [*systems][:2][-1]


def resolve_systems(
    value: Any,
    root: Path,
    *,
    first: str = "",
    path: str | None = None,
    revision: str | None = None,
    method: str = "auto",
) -> Sequence[System]:
    """Resolve each entry of `stage.systems` to an adapter, a full model, a file of answers or an endpoint. Loads no
    weights.

    `base` alone is the base of `model=`, or without it the base of the first artifact that has an adapter.

    Args:
        value: see `parse_systems`.
        root: the folder of runs.
        first: the name of the system that is returned first. The others keep their order.
        path, revision, method: of `model=` and `method=`, if they are set.

    Raises:
        InputError: two systems are the same, or `base` is named without an adapter or `model=`.
        MissingArtifact: an artifact does not exist.
    """
    systems = parse_systems(value)
    resolved = {
        name: build_external_system(name, system)
        if isinstance(system, Mapping)
        else resolve_reference(name, system, root, method, path, revision)
        for name, system in systems.items()
        if system != BASE
    }
    for name in systems.keys() - resolved.keys():
        resolved[name] = build_base_system(name, [*resolved.values()], path, revision, method)
    name_by_weights: dict[tuple[str, str], str] = {}
    for name in systems:
        key = resolved[name].record.digest, resolved[name].method
        same_name = name_by_weights.setdefault(key, name)
        problem = f"is the same as {same_name} ({key[0][:12]})"
        require(same_name == name, f"{FIELD}.{name}", resolved[name].ref, problem, "Leave one of the two out.")
    return [resolved[name] for name in sorted(systems, key=lambda name: name != first)]


def resolve_reference(name: str, ref: str, root: Path, method: str, path: str | None, revision: str | None) -> System:
    """Resolve a reference to an evaluated model: an artifact of a run, a folder or a model of the hub. Raises
    InputError for a reward model."""
    field = f"{FIELD}.{name}"
    artifact = find_artifact(ref, root, None, None, field)
    stage = artifact.manifest.stage if artifact.manifest else ""
    require(stage != "reward", field, ref, "is a reward model, which generates no answers", "Name a policy.")
    system_method = "lora" if artifact.whole else choose_method(artifact, method, field)
    model = (path, revision) if artifact.base is None else (None, None)  # a bare folder may name no base
    return System(
        name, ref, artifact, find_base_of_artifact(artifact, field, *model), system_method, artifact.as_input()
    )


def build_base_system(
    name: str, others: Sequence[System], path: str | None, revision: str | None, method: str
) -> System:
    """Build the evaluated model `base`, a base without an adapter. It uses the quantisation of the adapters on it, so
    that they share one load. Raises InputError if no base is known."""
    adapter = next((system for system in others if system.artifact and not system.artifact.whole), None)
    if path is None and (adapter is None or adapter.base is None):
        raise InputError(f"{FIELD}.{name}", BASE, "is the base of no adapter here", "Add model=.")
    if path is not None:
        artifact = find_artifact(BASE, Path(), path, revision, f"{FIELD}.{name}")
    else:
        assert adapter is not None
        assert adapter.base is not None
        artifact = to_artifact(adapter.base)
    if method not in ("qlora", "lora"):
        method = adapter.method if adapter else "qlora"
    base = find_base_of_artifact(artifact, f"{FIELD}.{name}")
    return System(name, BASE, artifact, base, method, Input(base.digest, ref=BASE, path=base.path, whole=True))


def build_external_system(name: str, spec: Mapping[str, Any]) -> System:
    """Build an evaluated model from a file of answers or a server's endpoint."""
    if FILE in spec:
        return System(name, spec[FILE], None, None, "", build_files_input(spec[FILE], f"{FIELD}.{name}.{FILE}"))
    endpoint = parse_endpoint(spec, f"{FIELD}.{name}")
    return System(name, endpoint.title, None, None, "", endpoint.record(endpoint.digest), endpoint)


def read_answer_file(system: System) -> Mapping[tuple[str, str], Sequence[str]]:
    """Read a file of answers, and return (task, item id) → the answers, one per turn. The task is empty if the row
    names none.

    Returns:
        task (empty if the row names none) and id of an item → its answers, one per turn.

    Raises:
        InputError: a row has no `id` or no `answer`, or an id is repeated.
    """
    field = f"{system.field}.{FILE}"
    answers_by_item: dict[tuple[str, str], Sequence[str]] = {}
    for row in iter_valid_rows(system.ref, field):
        id, answer, task = (row.data.get(key) for key in ("id", "answer", "task"))
        answer = "" if answer is None and row.texts else answer  # an empty cell of a table
        answers = answer if isinstance(answer, list) else [answer]
        has_id = isinstance(id, str | int) and not isinstance(id, bool)
        has_answer = bool(answers) and all(isinstance(text, str) for text in answers)
        for key, value, is_valid in (("id", id, has_id), ("answer", answer, has_answer)):
            remedy = 'Write rows like {"id": "7", "answer": "…"}.'
            require(is_valid, f"{row.where}, {key}", value, "is no text", remedy)
        require(task is None or isinstance(task, str), f"{row.where}, task", task, "is no name of a task", "Name one.")
        item_key = (str(task or ""), str(id))
        remedy = "Give one answer to each item."
        require(item_key not in answers_by_item, f"{row.where}, id", id, "is given twice", remedy)
        answers_by_item[item_key] = [str(text) for text in answers]
    return answers_by_item


def match_answers(system: System, items: Sequence[tuple[str, EvalItem]]) -> Mapping[tuple[str, str], Sequence[str]]:
    """Read a file of answers, and return (task, item id) → the answers for exactly these items, or raise InputError if
    one lacks an answer.

    Args:
        items: each with the name of its task.

    Returns:
        task and id of an item → its answers, one per turn.

    Raises:
        InputError: an item has no answer, or not one per turn; or one row answers different prompts of several tasks.
    """
    answers_by_item = read_answer_file(system)
    missing = [(task, item.id) for task, item in items if not {(task, item.id), ("", item.id)} & answers_by_item.keys()]
    if missing:
        task, id = missing[0]
        problem = f"lacks {len(missing):,} of {len(items):,} answers, such as to item {id} of task {task}"
        raise InputError(system.field, system.ref, problem, "Answer every item, by its id.")
    prompt_by_id: dict[str, Any] = {}
    matches: dict[tuple[str, str], Sequence[str]] = {}
    for task, item in items:
        if (task, item.id) not in answers_by_item:
            prompt = item.prompt.messages, item.then
            is_same = prompt_by_id.setdefault(item.id, prompt) == prompt
            problem = "is an id in several tasks, whose prompts differ"
            require(is_same, system.field, item.id, problem, "Name the task in each row: task.")
        answers = answers_by_item.get((task, item.id)) or answers_by_item["", item.id]
        turns = 1 + len(item.then)
        problem = (
            f"has {pluralize(len(answers), 'answer')} to item {item.id} of task {task}, in {pluralize(turns, 'turn')}"
        )
        require(len(answers) == turns, system.field, system.ref, problem, "Give a list with one answer a turn.")
        matches[task, item.id] = answers
    return matches


def describe_self_judging(judge: Endpoint, systems: Sequence[System]) -> list[str]:
    """Return a warning for each evaluated model that is also the judge, by URL and model name.

    Args:
        judge: the language model that judges.
    """
    judge_model = (judge.url, judge.model)
    names = [
        system.name
        for system in systems
        if system.endpoint is not None and (system.endpoint.url, system.endpoint.model) == judge_model
    ]
    return [f"{judge.title} judges itself: it is the system {name}" for name in names]
