"""The scores of answers, and whether systems collapsed.

Answers are scored by the checks of their items, or by the judge of the evaluation: a reward, a language model or
people. A system has collapsed if it gives nearly the same answer to every prompt. Each one is compared with the second
system, the reference; the reference itself is judged by its commonest answer alone. First answers count: of several
turns the first, of several answers to a prompt the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from align import ranks
from align.core.types import Conversation
from align.data.chat.reasoning import without_reasoning
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
    prompt_text,
)
from align.evals.judges.identity import find_standing, list_scorer_parts, scorer_title
from align.evals.judges.judge_verdict import JudgeVerdict, Pair, verdicts_by_scores
from align.evals.judges.llm_judge import REFUSES, GradedAnswer, LLMJudge
from align.evals.suite.answers import Sampling, TaskAnswers
from align.evals.suite.people import PEOPLE, Question
from align.evals.suite.results import Said, Scored
from align.evals.suite.tasks import HARMLESS, Item, Task
from align.reward.build import build_scorer, load_reward_model
from align.reward.checkers import build_checkers, check_turns, exact, json_schema, pattern
from align.reward.checkers.checked import AllowCode
from align.reward.combined import standardise_members
from align.reward.inputs import load_reward_artifacts
from align.reward.scorer import Scorer
from align.rollout.answer_cache import AnswerStore
from align.run import Artifact, Input

CLOSED_KINDS = (exact.KIND, pattern.KIND, json_schema.KIND)
"""Checks that one answer may pass for many prompts."""
SEVERAL = "tasks with few prompts"
"""The name of the group of open tasks that have too few prompts to be measured one by one."""
SCORED_AT_ONCE = 32


# Judges


class Judge(NamedTuple):
    """Who judges what no check scores.

    Attributes:
        score: scores a task's answers.
        notes: on the judge itself.
        role: what scores of single answers are called, `gold` or `proxy`.
        scorer: scores single answers. None of a judge that compares or grades them.
        best: the highest score that a single answer can have. None if there is no such limit.
    """

    score: Callable[[TaskAnswers], Scored]
    notes: Sequence[str] = ()
    role: str = "gold"
    scorer: Scorer | None = None
    best: float | None = None


def score_answers(tasks: Sequence[TaskAnswers], judge: Judge | None, allow_code: AllowCode) -> list[Scored]:
    """Score the answers to all tasks.

    Args:
        judge: of tasks without checks; None if there are none.
        allow_code: whether checks may run programs that a model wrote.
    """
    scored: list[Scored] = []
    for task in tasks:
        result = judge.score(task) if judge is not None and task.is_judged else score_by_checks(task, allow_code)
        scored.append(replace(result, dropped=task.dropped))
    return scored


def score_by_checks(task: TaskAnswers, allow_code: AllowCode) -> Scored:
    """Run the check of each item on its answers, on the first rank."""
    checks = [build_checkers(item.check, 1 + len(item.then), item.id, allow_code=allow_code) for item in task.items]
    warnings = [*dict.fromkeys(line for turns in checks for check in turns if check for line in check.warnings)]

    def run_checks() -> dict[str, list[Said]]:
        scored: dict[str, list[Said]] = {}
        for name, answers in task.said.items():
            results = [check_turns(turns, answer.answers) for turns, answer in zip(checks, answers, strict=True)]
            rows = zip(answers, results, strict=True)
            scored[name] = [replace(answer, score=result.score, checked=result) for answer, result in rows]
        return scored

    said = ranks.broadcast(run_checks() if ranks.is_main() else {})
    return Scored(task.task.name, "checks", "exact", task.items, said, notes=warnings)


def load_reward_judge(
    reward: Mapping[str, Any],
    spec: Mapping[str, Any],
    inputs: Mapping[str, Input],
    judged: Sequence[Artifact],
    root: Path,
    sampling: Sampling,
) -> Judge:
    """Load the scorer of `reward=` as a judge.

    Args:
        reward: the group `reward` of the configuration, as a manifest has it.
        spec: its description, see `align.reward.build.build_scorer`.
        inputs: of the run.
        judged: the artifacts whose training says what the judge is to them.
        root: the folder of runs.
    """
    models = load_reward_artifacts(inputs)
    title = scorer_title(reward, inputs)
    parts = list_scorer_parts(reward, inputs)
    standings = [find_standing(artifact, parts, root, models) for artifact in judged]
    role = "proxy" if any(standing.role == "proxy" for standing in standings) else "gold"
    loaded = (load_reward_model(model, sampling.device, sampling.dtype, SCORED_AT_ONCE) for model in models)
    scorer = build_scorer(spec, loaded)
    notes = [note for standing in standings for note in standing.sentences(title)]
    best = 1.0 if reward["name"] == "check" else None
    return Judge(partial(score_by_scorer, scorer, title, role, sampling.hides_reasoning), notes, role, scorer, best)


def score_by_scorer(scorer: Scorer, title: str, role: str, hides: bool, task: TaskAnswers) -> Scored:
    """Score all answers, and decide who won by the scores. The scorer's learned parts are brought to one scale on the
    answers of the second system, which the first is compared with."""
    prompts = [hide_reasoning(item, hides) for item in task.items]
    read = {
        name: [
            with_turns(prompt, answer).with_answer(answer.text) for prompt, answer in zip(prompts, each, strict=True)
        ]
        for name, each in task.said.items()
    }
    reference = [*task.said][1]
    scorer = standardise_members(scorer, read[reference], task.rollouts.get(reference))
    scores = {name: scorer.score(each, task.rollouts.get(name)).tolist() for name, each in read.items()}
    ids = [item.id for item in task.items]
    verdicts = {
        name: verdicts_by_scores(ids, scores[task.first], of) for name, of in scores.items() if name != task.first
    }
    said = {
        name: [replace(answer, score=score) for answer, score in zip(each, scores[name], strict=True)]
        for name, each in task.said.items()
    }
    return Scored(task.task.name, title, role, task.items, said, verdicts)


def score_by_llm(judge: LLMJudge, store: AnswerStore, hides: bool, task: TaskAnswers) -> Scored:
    """Ask a language model about the first system's answers beside each other one's, or about each answer if the task
    asks a question. The first rank asks it."""
    if task.task.asks:
        return grade_answers(judge.with_question(task.task.asks), store, hides, task)
    pairs = {other: pair_answers(task, other, hides) for other in task.said if other != task.first}
    verdicts = ranks.broadcast(
        {other: judge.compare(each, store) for other, each in pairs.items()} if ranks.is_main() else {}
    )
    errors = judge.describe_errors([verdict for each in verdicts.values() for verdict in each])
    notes = [f"{task.task.name}: {note}" for note in errors]
    return Scored(task.task.name, judge.title, "gold", task.items, task.said, verdicts, notes=notes)


def grade_answers(judge: LLMJudge, store: AnswerStore, hides: bool, task: TaskAnswers) -> Scored:
    """Return the judge's yes or no to each answer of each system; of several turns, to the last."""
    prompts = [hide_reasoning(item, hides) for item in task.items]
    answers = [answer for each in task.said.values() for answer in each]
    shown = [
        GradedAnswer(with_turns(prompt, answer), answer.text)
        for prompt, answer in zip(cycle(prompts), answers, strict=False)
    ]
    verdicts = ranks.broadcast(judge.grade(shown, store) if ranks.is_main() else [])
    graded = (
        replace(answer, score=verdict.verdict, p=verdict.p, error=verdict.error)
        for answer, verdict in zip(answers, verdicts, strict=True)
    )
    said = {name: [*islice(graded, len(task.items))] for name in task.said}
    notes = [f"{task.task.name}: {note}" for note in judge.describe_errors(verdicts)]
    return Scored(task.task.name, judge.title, "graded", task.items, said, asks=task.task.asks, notes=notes)


def score_by_people(verdicts: Mapping[tuple[str, str], Sequence[JudgeVerdict]], task: TaskAnswers) -> Scored:
    """Return the verdicts of people on a task's answers.

    Args:
        verdicts: by task and other system.
    """
    others = [name for name in task.said if name != task.first]
    of_task = {other: verdicts.get((task.task.name, other), ()) for other in others}
    return Scored(task.task.name, PEOPLE, PEOPLE, task.items, task.said, of_task)


def list_people_questions(task: TaskAnswers, hides: bool) -> Iterator[Question]:
    """Yield the pairs of a task that people could be asked about: the first system's answers beside those of each other
    one."""
    for other in task.said:
        if other != task.first:
            pairs = pair_answers(task, other, hides)
            for pair, first, second in zip(pairs, task.said[task.first], task.said[other], strict=True):
                ended = first.ended is not False, second.ended is not False
                yield Question(task.task.name, other, pair, ended)


def pair_answers(task: TaskAnswers, other: str, hides: bool) -> list[Pair]:
    """Return the first system's answers beside another's.

    Args:
        hides: the reasoning of earlier turns.
    """
    rows = zip(task.items, task.said[task.first], task.said[other], strict=True)
    return [
        Pair(item.id, hide_reasoning(item, hides), first.transcript, second.transcript) for item, first, second in rows
    ]


def hide_reasoning(item: Item, hides: bool) -> Conversation:
    """Return an item's prompt as judges read it."""
    return replace(item.prompt, messages=without_reasoning(item.prompt.messages)) if hides else item.prompt


def with_turns(prompt: Conversation, answer: Said) -> Conversation:
    """Return a conversation up to the last answer."""
    return replace(prompt, messages=(*prompt.messages, *answer.before)) if answer.before else prompt


# Collapse

Score = Callable[[Sequence[str]], Sequence[float]]


class FirstAnswers(NamedTuple):
    """The first answers of all systems to the distinct prompts of a task."""

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


def measure_tasks(
    tasks: Sequence[TaskAnswers], judge: Judge | None, closed: bool | None, allow_code: AllowCode, hides: bool
) -> dict[str, dict[str, Measurement]]:
    """Return task → system → whether its answers are nearly the same whatever is asked.

    Args:
        closed: `eval.closed`, of tasks that do not say it.
        hides: the reasoning of earlier turns.
    """
    opened: dict[str, FirstAnswers] = {}
    measured: dict[str, dict[str, Measurement]] = {}
    for task in tasks:
        answers = select_first_answers(task)
        if is_closed(task.task, task.items, closed, judge is not None and judge.best is not None):
            scoring = closed_score(answers.items, allow_code, judge, hides)
            measured[task.task.name] = measure_closed(answers, scoring)
        else:
            opened[task.task.name] = answers
    return {**(measure_open(opened) if opened else {}), **measured}


def select_first_answers(task: TaskAnswers) -> FirstAnswers:
    rows = range(len(task.items))
    if task.greedy:
        asked_greedily = next(iter(task.greedy.values()))
        rows = [row for row in rows if asked_greedily[row] is not None]
    texts = [prompt_text(task.items[row].prompt.messages) for row in rows]
    rows = [rows[i] for i in first_of_each_prompt(texts)]
    return FirstAnswers(
        [task.items[row] for row in rows],
        [prompt_text(task.items[row].prompt.messages) for row in rows],
        {
            name: SystemAnswers(
                [said[row].answers[0] for row in rows],
                [task.greedy[name][row] or "" for row in rows] if name in task.greedy else None,
                task.no_greedy.get(name, ""),
            )
            for name, said in task.said.items()
        },
    )


def is_closed(task: Task, items: Sequence[Item], default: bool | None, judged_by_checks: bool = False) -> bool:
    """Return whether many prompts of a task may share one right answer.

    Args:
        default: `eval.closed`, of tasks that do not say it.
        judged_by_checks: the judge of items without checks is `reward=check`.
    """
    if task.closed is not None:
        return task.closed
    if default is not None:
        return default
    if task.asks == REFUSES:
        return task.path != HARMLESS
    if judged_by_checks and items[0].check is None:
        return True
    checks = [item.check if isinstance(item.check, Sequence) else [item.check] for item in items]
    return any(check is not None and check["kind"] in CLOSED_KINDS for turns in checks for check in turns)


class ClosedScore(NamedTuple):
    """How answers to a closed task are scored.

    Attributes:
        score: one answer to each item. None if single answers are not scored.
        best: the highest score that an answer can have. None if there is no such limit.
        why_none: why single answers are not scored.
    """

    score: Score | None
    best: float | None = None
    why_none: str = ""


def closed_score(items: Sequence[Item], allow_code: AllowCode, judge: Judge | None, hides: bool) -> ClosedScore:
    """Return how single answers to the items of a closed task are scored.

    Args:
        judge: of items without checks.
        hides: the reasoning of earlier turns.
    """
    if any(item.then for item in items):
        return ClosedScore(None, why_none="several turns are scored together")
    if items[0].check is not None:
        checks = [build_checkers(item.check, 1, item.id, allow_code=allow_code)[0] for item in items]

        def run_checks(texts: Sequence[str]) -> list[float]:
            rows = zip(checks, texts, strict=True)
            scores = [check(text).score for check, text in rows if check] if ranks.is_main() else []
            return ranks.broadcast(scores)

        return ClosedScore(run_checks, 1.0)
    scorer = judge.scorer if judge else None
    if judge is None or scorer is None:
        return ClosedScore(None, why_none="its judge scores no single answer")
    prompts = [hide_reasoning(item, hides) for item in items]

    def ask_scorer(texts: Sequence[str]) -> list[float]:
        return scorer.score([prompt.with_answer(text) for prompt, text in zip(prompts, texts, strict=True)]).tolist()

    return ClosedScore(ask_scorer, judge.best)


def measure_closed(answers: FirstAnswers, scoring: ClosedScore) -> dict[str, Measurement]:
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


def measure_open(answers: Mapping[str, FirstAnswers]) -> dict[str, dict[str, Measurement]]:
    """Measure the systems on open tasks: name of a task → system. Those with too few prompts are measured together."""
    small = {name: task for name, task in answers.items() if len(task.prompts) < MIN_PROMPTS}
    groups = {name: task for name, task in answers.items() if name not in small}
    if len(small) > 1:
        groups[SEVERAL] = join_tasks([*small.values()])
    else:
        groups |= small
    return {name: task.measure() for name, task in groups.items()}


def join_tasks(tasks: Sequence[FirstAnswers]) -> FirstAnswers:
    """Return the answers to several tasks as those to one."""

    def join(name: str) -> SystemAnswers:
        parts = [task.systems[name] for task in tasks]
        greedy = [text for part in parts for text in part.greedy or ()]
        has_greedy = all(part.greedy is not None for part in parts)
        return SystemAnswers(
            [text for part in parts for text in part.sampled], greedy if has_greedy else None, parts[0].no_greedy
        )

    return FirstAnswers(
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
