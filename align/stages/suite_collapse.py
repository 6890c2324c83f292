"""Collapse of the systems of a suite: systems that give nearly the same answer to every prompt.

Each system is compared with the second one, the reference; the reference itself is judged by its commonest answer
alone. First answers count: of several turns the first, of several answers to a prompt the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from align import ranks
from align.evals.collapse import (
    MIN_PROMPTS,
    NOT_MEASURED,
    Collapse,
    Measurement,
    SystemAnswers,
    combine_verdicts,
    first_of_each_prompt,
    judge_closed_task,
    measure_collapse,
)
from align.evals.comparison import prompt_text
from align.evals.questions import REFUSES
from align.evals.tasks import HARMLESS, Item, Task
from align.reward.checkers import checks_of, exact, json_schema, pattern
from align.reward.checkers.code import AllowCode
from align.reward.scorer import Scorer
from align.stages.suite_scores import asked_alone
from align.stages.suite_turns import Heard

CLOSED_KINDS = (exact.KIND, pattern.KIND, json_schema.KIND)
"""Checks that one answer may pass for many prompts."""
SEVERAL = "tasks with few prompts"
"""The name of the group of open tasks that have too few prompts to be measured one by one."""

Score = Callable[[Sequence[str]], Sequence[float]]


class TaskAnswers(NamedTuple):
    """The answers of all systems to the distinct prompts of a task."""

    items: Sequence[Item]
    prompts: Sequence[str]
    systems: Mapping[str, SystemAnswers]

    def measure(self) -> dict[str, Measurement]:
        reference = [*self.systems][1]
        return {
            name: measure_collapse(
                self.prompts, answers, None if name == reference else self.systems[reference], reference
            )
            for name, answers in self.systems.items()
        }


def task_answers(heard: Heard) -> dict[str, TaskAnswers]:
    """Return the name of each task → the answers to its distinct prompts."""
    answers: dict[str, TaskAnswers] = {}
    first = 0
    for task, items in heard.tasks:
        numbers = range(first, first + len(items))
        first += len(items)
        if heard.greedy:
            greedy = next(iter(heard.greedy.values()))
            numbers = [number for number in numbers if greedy[number] is not None]
        prompts = [prompt_text(items[number - first].prompt.messages) for number in numbers]
        rows = [numbers[row] for row in first_of_each_prompt(prompts)]
        answers[task.name] = TaskAnswers(
            [items[row - first] for row in rows],
            [prompt_text(items[row - first].prompt.messages) for row in rows],
            {
                name: SystemAnswers(
                    [texts[row].answers[0] for row in rows],
                    [heard.greedy[name][row] or "" for row in rows] if name in heard.greedy else None,
                    heard.no_greedy.get(name, ""),
                )
                for name, texts in heard.said.items()
            },
        )
    return answers


def is_closed(task: Task, items: Sequence[Item], default: bool | None) -> bool:
    """Return whether many prompts of a task may share one right answer.

    Args:
        default: `eval.closed`, of tasks that do not say it.
    """
    if task.closed is not None:
        return task.closed
    if default is not None:
        return default
    if task.asks == REFUSES:
        return task.path != HARMLESS
    checks = [item.check if isinstance(item.check, Sequence) else [item.check] for item in items]
    return any(check is not None and check["kind"] in CLOSED_KINDS for turns in checks for check in turns)


def score_by_checks(items: Sequence[Item], allow_code: AllowCode) -> Score:
    """Return a function that scores one answer to each item by its check, on the first rank."""
    checks = [checks_of(item.check, 1, item.id, allow_code=allow_code)[0] for item in items]

    def score(texts: Sequence[str]) -> list[float]:
        def run_checks() -> list[float]:
            return [check(text).score for check, text in zip(checks, texts, strict=True) if check is not None]

        return ranks.from_main(run_checks() if ranks.is_main() else [])

    return score


def score_by_scorer(items: Sequence[Item], scorer: Scorer, hides: bool) -> Score:
    """Return a function that scores one answer to each item by a reward.

    Args:
        hides: the reasoning of earlier turns.
    """
    prompts = [asked_alone(item, hides) for item in items]

    def score(texts: Sequence[str]) -> list[float]:
        return scorer.score([prompt.answered(text) for prompt, text in zip(prompts, texts, strict=True)]).tolist()

    return score


class ClosedScore(NamedTuple):
    """How answers to a closed task are scored.

    Attributes:
        score: None if single answers are not scored.
        best: the highest score that an answer can have. None if there is no such limit.
        why_none: why single answers are not scored.
    """

    score: Score | None
    best: float | None = None
    why_none: str = ""


def closed_score(items: Sequence[Item], allow_code: AllowCode, scorer: Scorer | None, hides: bool) -> ClosedScore:
    """Return how single answers to the items of a closed task are scored.

    Args:
        scorer: of items without checks. None if their judge scores no single answer.
        hides: the reasoning of earlier turns.
    """
    if any(item.then for item in items):
        return ClosedScore(None, why_none="several turns are scored together")
    if items[0].check is not None:
        return ClosedScore(score_by_checks(items, allow_code), 1.0)
    if scorer is None:
        return ClosedScore(None, why_none="its judge scores no single answer")
    return ClosedScore(score_by_scorer(items, scorer, hides))


def measure_closed(answers: TaskAnswers, scoring: ClosedScore) -> dict[str, Measurement]:
    """Measure the systems on a closed task, where each must beat the best constant answer."""
    measurements = answers.measure()
    reference = [*answers.systems][1]
    for name, system in answers.systems.items():
        if scoring.score is None:
            verdict = Collapse(NOT_MEASURED, (f"equal answers may be right, and {scoring.why_none}",))
        else:
            ref = None if name == reference else answers.systems[reference]
            verdict = judge_closed_task(scoring.score, system, ref, scoring.best)
        measurements[name] = measurements[name]._replace(collapse=verdict)
    return measurements


def measure_open(answers: Mapping[str, TaskAnswers]) -> dict[str, dict[str, Measurement]]:
    """Measure the systems on open tasks: name of a task → system. Those with too few prompts are measured together."""
    small = {name: task for name, task in answers.items() if len(task.prompts) < MIN_PROMPTS}
    groups = {name: task for name, task in answers.items() if name not in small}
    if len(small) > 1:
        groups[SEVERAL] = join_tasks([*small.values()])
    else:
        groups |= small
    return {name: task.measure() for name, task in groups.items()}


def join_tasks(tasks: Sequence[TaskAnswers]) -> TaskAnswers:
    """Return the answers to several tasks as those to one."""

    def join(name: str) -> SystemAnswers:
        parts = [task.systems[name] for task in tasks]
        greedy = [text for part in parts for text in part.greedy or ()]
        has_greedy = all(part.greedy is not None for part in parts)
        return SystemAnswers(
            [text for part in parts for text in part.sampled], greedy if has_greedy else None, parts[0].no_greedy
        )

    return TaskAnswers(
        [item for task in tasks for item in task.items],
        [prompt for task in tasks for prompt in task.prompts],
        {name: join(name) for name in tasks[0].systems},
    )


def verdicts_by_system(groups: Mapping[str, Mapping[str, Measurement]], systems: Sequence[str]) -> dict[str, Collapse]:
    """Return the verdict on each system over all tasks.

    Args:
        groups: name of a task → system → its measurement.
    """
    return {
        name: combine_verdicts({task: measured[name].collapse for task, measured in groups.items()}) for name in systems
    }
