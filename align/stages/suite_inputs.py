"""What goes into an evaluation of several systems: found before its run has a name, read before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from align.config.compose import plain
from align.config.root import Config
from align.config.scorers import reward_spec
from align.data.sources import data_records
from align.errors import require
from align.evals import judges
from align.evals.endpoint import Endpoint, api_key
from align.evals.gates import Gate, parsed_gates
from align.evals.judge_identity import identify_judge, identify_llm
from align.evals.judge_report import JudgeReport, find_reports
from align.evals.llm_judge import LLMJudge, parse_judge
from align.evals.questions import shorten_question
from align.evals.suite import Tasks, Work
from align.evals.systems import System, matched, opened_systems
from align.evals.tasks import JUDGED, Task, parsed_tasks
from align.models.start import label
from align.reward.checkers.code import code_permission
from align.reward.inputs import models_of, read_alike, reward_inputs
from align.run import Base, Input, json_digest
from align.stages.rows import source_of
from align.stages.suite_gates import check_gates
from align.stages.suite_items import items_to_ask, record_of
from align.stages.suite_people_inputs import PEOPLE, check_people, people_inputs


def check_one_kind(config: Config) -> None:
    """Raises: InputError: a setting is of an evaluation of several systems where none are named, or of one artifact
    where they are."""
    suite, stage = config.eval, config.stage
    check_people(config)
    problem, remedy = "is of eval=judge, and systems are measured", "Write eval.tasks=[{name: NAME, asks: QUESTION}]."
    require(not suite.asks, "eval.asks", suite.asks, problem, remedy)
    if stage.systems is None:
        for key, value in (("tasks", suite.tasks), ("gates", suite.gates)):
            problem, remedy = "is asked of several systems, and none are named", "Add stage.systems={new: …, old: …}."
            require(value is None, f"eval.{key}", value, problem, remedy)
        require(not stage.allow_code, "stage.allow_code", True, "is of checks, and none are asked", "Drop it.")
        problem = "is of several systems, and none are named"
        require(stage.judge == "reward", "stage.judge", stage.judge, problem, "Add stage.systems={new: …, old: …}.")
        require(stage.answers == 1, "stage.answers", stage.answers, problem, "Add stage.systems={new: …, old: …}.")
        return
    remedy = "Name who answers in stage.systems alone."
    for key, value, default in (("artifact", config.artifact, Config().artifact), ("init", config.init, Config().init)):
        require(value == default, key, value, "is of one artifact, and stage.systems names several", remedy)
    problem = "reports on one artifact; with stage.systems prompts that training saw are left out"
    require(stage.seen == "drop", "stage.seen", stage.seen, problem, "Drop it.")


class Found(NamedTuple):
    """
    Attributes:
        suite: its name.
        records: systems, files of tasks, data, the judge and its card, as inputs of the run.
        judge: of tasks without checks, as `stage.judge` names it.
        cards: of the judge, those that are named.
    """

    systems: Sequence[System]
    tasks: Sequence[Task]
    suite: str
    records: dict[str, Input]
    gates: Sequence[Gate]
    judge: Literal["reward", "people"] | LLMJudge
    cards: Sequence[JudgeReport]

    @property
    def base(self) -> Base | None:
        """Of the first system that has one: a file of answers has none."""
        return next((system.base for system in self.systems if system.base is not None), None)

    @property
    def method(self) -> str:
        """How the first system keeps its base."""
        return next((system.method for system in self.systems if system.base is not None), "auto")

    @property
    def label(self) -> str:
        """The readable part of the run's name."""
        return f"{label(self.base, self.method)}-{self.suite}" if self.base else self.suite


def found_suite(config: Config) -> Found:
    """
    Raises:
        InputError: a system, a task, a gate or the judge is none.
        MissingArtifact: a system or a reward model is not there.
    """
    root, given = config.run.folder, config.model
    systems = opened_systems(
        config.stage.systems, root, first=config.stage.first, path=given.path, revision=given.revision,
        method=config.method.name,
    )  # fmt: skip
    tasks = parsed_tasks(config.eval.tasks, code_permission(config.stage.allow_code, config.stage.unsafe_code))
    gates = parsed_gates(config.eval.gates, tasks, [system.name for system in systems])
    check_weighable(systems, tasks)
    first, problem = systems[0], "is no artifact, and gates are about one"
    require(not gates or first.artifact is not None, first.field, first.ref, problem, "Name the artifact first.")
    records = {f"systems.{system.name}": system.record for system in systems}
    records |= {f"tasks.{task.name}": record_of(task) for task in tasks if task.own}
    if not all(task.own for task in tasks):
        records |= data_records(source_of(config))
    base = next((system.base for system in systems if system.base is not None), None)
    judge = parse_judge(config.stage.judge)
    for task in tasks:
        problem = f"is answered by a language model, and stage.judge={config.stage.judge} is none"
        remedy = "Add stage.judge={url: http://127.0.0.1:8000/v1, model: NAME}."
        asked = shorten_question(task.asks)
        require(not asked or isinstance(judge, LLMJudge), f"{task.field}, asks", asked, problem, remedy)
    records |= judge_inputs(config, judge, records, systems, base, [task.asks for task in tasks if task.asks])
    cards, read = find_reports(config.stage.card, root)
    records |= read
    own = config.eval.tasks is not None and config.eval.name == JUDGED  # tasks of a command line have no suite's name
    return Found(systems, tasks, "tasks" if own else config.eval.name, records, gates, judge, cards)


def judge_inputs(
    config: Config, judge: Literal["reward", "people"] | LLMJudge, records: Mapping[str, Input],
    systems: Sequence[System], base: Base | None, questions: Sequence[str],
) -> dict[str, Input]:  # fmt: skip
    """What the judge is: the scorer of `reward=`, a model behind a server, or the votes of people.

    Args:
        records: the other inputs.
        base: of the first system that has one.
        questions: that tasks ask about each answer.
    """
    if isinstance(judge, LLMJudge):
        graders = [judge.with_question(asks).identity for asks in questions]
        return {"judge": judge.endpoint.record(json_digest([judge.identity, *graders]) if graders else judge.identity)}
    if judge == PEOPLE:
        return people_inputs(config, records, [system.name for system in systems])
    scorers = reward_inputs(reward_spec(config.reward), config.run.folder, base)
    read_alike(models_of(scorers), config.rollout.reasoning)
    return scorers


def work_of(config: Config, found: Found) -> tuple[Work]:
    """The items that systems are asked, once it is known that who scores them may.

    Raises:
        InputError: a task has no item, or none that is left; a judge would score what was optimised against it, or
            decide a gate; an endpoint cannot be asked.
    """
    tasks, seen, unknown = items_to_ask(config, found.tasks, found.systems)
    cards = cards_that_decide(config, found, tasks)
    for system in found.systems:
        if system.endpoint is not None:
            check_askable(system, system.endpoint, tasks)
    items = [(task.name, item) for task, items in tasks for item in items]
    files = {system.name: matched(system, items) for system in found.systems if system.is_file}
    return (Work(found.systems, tasks, files, seen, unknown, found.gates, found.judge, cards),)


def cards_that_decide(config: Config, found: Found, tasks: Tasks) -> Mapping[str, JudgeReport]:
    """The card behind each gate that a judge decides.

    Raises:
        InputError: the judge cannot be asked, was a system's reward, or may not decide a gate; or people have nothing
            to judge.
    """
    judged = [task.name for task, items in tasks if items[0].check is None and task.probe is None]
    problem, remedy = "has no task to judge: all have checks or are probes", "Drop it, or add a task without checks."
    require(bool(judged) or found.judge != PEOPLE, "stage.judge", PEOPLE, problem, remedy)
    proxy = False
    if judged and isinstance(found.judge, LLMJudge):
        api_key(found.judge.endpoint)
    elif judged and found.judge != PEOPLE:
        proxy = any(of.proxy for of in standings_of(config, found))
    judges_of = {name: identify_judge(found.judge, reward_spec(config.reward), found.records) for name in judged}
    if isinstance(found.judge, LLMJudge):
        judges_of |= {task.name: identify_llm(found.judge.with_question(task.asks)) for task, _ in tasks if task.asks}
    return check_gates(config, found.gates, judges_of, found.cards, proxy)


def check_weighable(systems: Sequence[System], tasks: Sequence[Task]) -> None:
    """Raises: InputError: a task is a probe, and a system gives answers alone."""
    probed = next((task.name for task in tasks if task.probe is not None), None)
    for system in systems:
        problem = f"gives answers to chats alone, and task {probed} is a probe, which needs the model itself"
        remedy = "Leave out the system, or the task."
        require(probed is None or system.base is not None, system.field, system.ref, problem, remedy)


def check_askable(system: System, endpoint: Endpoint, tasks: Tasks) -> None:
    """Raises: InputError: a model behind a server lacks its key, or would be offered tools: its calls are no text."""
    api_key(endpoint)
    offered = next((item.id for _, items in tasks for item in items if item.prompt.tools), None)
    problem = f"would call the tools of item {offered}, and its calls are no text that could be scored"
    require(offered is None, system.field, system.ref, problem, "Leave out items with tools, or the system.")


def standings_of(config: Config, found: Found) -> list[judges.Standing]:
    """What the judge is to each system that is an artifact.

    Raises:
        InputError: one was optimised against the judge, and nobody asked for that.
    """
    reward, root = plain(config)["reward"], config.run.folder
    title, identities = judges.title(reward, found.records), judges.identities(reward, found.records)
    standings = list[judges.Standing]()
    for system in found.systems:
        if system.artifact is not None:
            standings.append(judges.standing_of(system.artifact, identities, root))
            judges.independent(standings[-1], title, system.ref, config.stage.allow_proxy)
    return standings
