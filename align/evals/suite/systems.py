"""Who is evaluated: systems by name, as `stage.systems` writes them. Imports no torch.

A system is an artifact of a run, the base by itself, a model behind somebody's server, or a file of answers that
anybody made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.aliases import NAME, NAME_REMEDY
from align.core.errors import InputError, require
from align.data.read.rows import iter_valid_rows
from align.data.sources import build_files_input
from align.evals.endpoint import Endpoint, parsed_endpoint
from align.evals.suite.tasks import Item
from align.models.base import BASE, as_artifact, base_of, choose_method, find_artifact
from align.report.figure_text import counted
from align.run import Artifact, Base, Input

FIELD = "stage.systems"
FILE = "file"
HELP = (
    'Write "stage.systems={new: ppo:latest, old: sft:latest}"; {theirs: {file: answers.jsonl}} for answers in a file, '
    "{theirs: {url: http://127.0.0.1:8000/v1, model: NAME}} for a server."
)
MOST = 64


@dataclass(frozen=True, slots=True)
class System:
    """Somebody who answers.

    Attributes:
        name: that the user gave it.
        ref: a reference to an artifact, the path of a file, or the title of an endpoint.
        artifact: what the reference found; None for a file or an endpoint.
        base: that it answers on; None for a file or an endpoint.
        method: how that is kept: `qlora`, or `lora` for weights in the compute dtype.
        record: as an input of the run.
        endpoint: the model behind a server; None for all others.
        tokenized_as: the system with whose tokenizer and chat template it is asked. None: its own.
        label: what error messages call it; empty for its place in `stage.systems`.
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


def parsed_systems(given: Any) -> Mapping[str, str | Mapping[str, Any]]:
    """Name → reference, `{file: PATH}` or `{url: URL, model: NAME}`, in the order in which they were written.

    Raises:
        InputError: it is no such mapping, or names fewer than two.
    """
    require(isinstance(given, Mapping), FIELD, given, "is no mapping from names to systems", HELP)
    found: dict[str, str | Mapping[str, Any]] = {}
    for name, system in given.items():
        require(
            isinstance(name, str) and NAME.fullmatch(name) is not None, FIELD, name, "cannot be a name", NAME_REMEDY
        )
        if isinstance(system, Mapping) and "url" in system:
            right = parsed_endpoint(system, f"{FIELD}.{name}").url != ""  # it says itself what is wrong
        elif isinstance(system, Mapping):
            right = {*system} == {FILE} and isinstance(system[FILE], str) and bool(system[FILE])
        else:
            right = isinstance(system, str) and bool(system)
        require(right, f"{FIELD}.{name}", system, "names no system", HELP)
        found[name] = system
    require(2 <= len(found) <= MOST, FIELD, ", ".join(found) or "(empty)", f"are not two to {MOST} systems", HELP)
    return found


def opened_systems(
    given: Any,
    root: Path,
    *,
    first: str = "",
    path: str | None = None,
    revision: str | None = None,
    method: str = "auto",
) -> Sequence[System]:
    """The systems, found. `base` alone is the base of `model=`, or else of the first artifact that has one.

    Args:
        given: see `parsed_systems`.
        root: the folder of runs.
        first: who comes first; the others keep their order.
        path, revision, method: of `model=` and `method=`, where they are given.

    Raises:
        InputError: two of them are the same, or none is an artifact and no model is named.
        MissingArtifact: one is not there.
    """
    systems = parsed_systems(given)
    found = {
        name: of_mapping(name, system)
        if isinstance(system, Mapping)
        else of_reference(name, system, root, method, path, revision)
        for name, system in systems.items()
        if system != BASE
    }
    for name in systems.keys() - found.keys():
        found[name] = base_alone(name, [*found.values()], path, revision, method)
    by_digest: dict[tuple[str, str], str] = {}
    for name in systems:
        key = found[name].record.digest, found[name].method
        same = by_digest.setdefault(key, name)
        problem = f"is the same as {same} ({key[0][:12]})"
        require(same == name, f"{FIELD}.{name}", found[name].ref, problem, "Leave one of the two out.")
    return [found[name] for name in sorted(systems, key=lambda name: name != first)]


def of_reference(name: str, ref: str, root: Path, method: str, path: str | None, revision: str | None) -> System:
    field = f"{FIELD}.{name}"
    artifact = find_artifact(ref, root, None, None, field)
    stage = artifact.manifest.stage if artifact.manifest else ""
    require(stage != "reward", field, ref, "is a reward model, which answers nothing", "Name a policy.")
    kept = "lora" if artifact.whole else choose_method(artifact, method, field)
    said = (path, revision) if artifact.base is None else (None, None)  # a bare folder may name no base
    return System(name, ref, artifact, base_of(artifact, field, *said), kept, artifact.as_input())


def base_alone(name: str, others: Sequence[System], path: str | None, revision: str | None, method: str) -> System:
    """The base without an adapter, kept as the adapters on it are: in one load with them."""
    like = next((s for s in others if s.artifact and not s.artifact.whole), None)
    if path is None and (like is None or like.base is None):
        raise InputError(f"{FIELD}.{name}", BASE, "is the base of no adapter here", "Add model=.")
    if path is not None:
        artifact = find_artifact(BASE, Path(), path, revision, f"{FIELD}.{name}")
    else:
        assert like is not None  # so that there is one
        assert like.base is not None
        artifact = as_artifact(like.base)
    kept = method if method in ("qlora", "lora") else like.method if like else "qlora"
    base = base_of(artifact, f"{FIELD}.{name}")
    return System(name, BASE, artifact, base, kept, Input(base.digest, ref=BASE, path=base.path, whole=True))


def of_mapping(name: str, given: Mapping[str, Any]) -> System:
    """A file of answers, or a model behind a server."""
    if FILE in given:
        return System(name, given[FILE], None, None, "", build_files_input(given[FILE], f"{FIELD}.{name}.{FILE}"))
    endpoint = parsed_endpoint(given, f"{FIELD}.{name}")
    return System(name, endpoint.title, None, None, "", endpoint.record(endpoint.digest), endpoint)


def answers_in(system: System) -> Mapping[tuple[str, str], Sequence[str]]:
    """The answers of a file: task (empty where a row names none) and id of an item → its texts, one a turn.

    Raises:
        InputError: a row has no `id` or no `answer`, or an id stands there twice.
    """
    field, found = f"{system.field}.{FILE}", dict[tuple[str, str], Sequence[str]]()
    for row in iter_valid_rows(system.ref, field):
        id, answer, task = (row.data.get(key) for key in ("id", "answer", "task"))
        answer = "" if answer is None and row.texts else answer  # an empty cell of a table
        answers = answer if isinstance(answer, list) else [answer]  # one a turn
        named = isinstance(id, str | int) and not isinstance(id, bool)
        written = bool(answers) and all(isinstance(one, str) for one in answers)
        for key, value, right in (("id", id, named), ("answer", answer, written)):
            require(right, f"{row.where}, {key}", value, "is no text", 'Write rows like {"id": "7", "answer": "…"}.')
        require(task is None or isinstance(task, str), f"{row.where}, task", task, "is no name of a task", "Name one.")
        key = (str(task or ""), str(id))
        require(key not in found, f"{row.where}, id", id, "stands there twice", "Give one answer to each item.")
        found[key] = [str(one) for one in answers]
    return found


def matched(system: System, items: Sequence[tuple[str, Item]]) -> Mapping[tuple[str, str], Sequence[str]]:
    """The answers of a file to items: task and id → texts, one a turn.

    Args:
        items: each with the name of its task.

    Raises:
        InputError: it lacks one, has not one a turn, or one row would answer different prompts of several tasks.
    """
    found, asked = answers_in(system), dict[str, Any]()
    lacks = [(task, item.id) for task, item in items if not {(task, item.id), ("", item.id)} & found.keys()]
    if lacks:
        task, id = lacks[0]
        problem = f"lacks {len(lacks):,} of {len(items):,} answers, such as to item {id} of task {task}"
        raise InputError(system.field, system.ref, problem, "Answer every item, by its id.")
    matches = dict[tuple[str, str], Sequence[str]]()
    for task, item in items:
        if (task, item.id) not in found:
            prompt = item.prompt.messages, item.then
            same, problem = (
                asked.setdefault(item.id, prompt) == prompt,
                "is an id in several tasks, whose prompts differ",
            )
            require(same, system.field, item.id, problem, "Name the task in each row: task.")
        answers, turns = found.get((task, item.id)) or found["", item.id], 1 + len(item.then)
        problem = f"has {counted(len(answers), 'answer')} to item {item.id} of task {task}, in {counted(turns, 'turn')}"
        require(len(answers) == turns, system.field, system.ref, problem, "Give a list with one answer a turn.")
        matches[task, item.id] = answers
    return matches


def describe_self_judging(judge: Endpoint, systems: Sequence[System]) -> list[str]:
    """Return a sentence about each system that is the judge itself.

    Args:
        judge: the language model that judges.
    """
    own = (judge.url, judge.model)
    same = [s.name for s in systems if s.endpoint is not None and (s.endpoint.url, s.endpoint.model) == own]
    return [f"{judge.title} judges itself: it is the system {name}" for name in same]
