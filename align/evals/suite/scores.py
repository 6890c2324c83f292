"""Scores of answers by checks or a judge, and measurements of collapse to few texts.

Answers are scored by the checks of their items, or by the judge of the evaluation: a reward, a language model or
people. A system has collapsed if it gives nearly the same answer to every prompt. Each system is compared with the
second one, the reference, while the reference itself is judged by its commonest answer alone. Only first answers are
compared: the first of several turns, and the first of several answers to a prompt.
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
from align.data.chat.reasoning import strip_all_reasoning
from align.evals.collapse import (
    MIN_PROMPTS,
    NOT_MEASURED,
    Collapse,
    Measurement,
    SystemAnswers,
    combine_verdicts,
    find_distinct_prompts,
    get_prompt_text,
    judge_closed_task,
    measure_collapse,
)
from align.evals.judges.identity import find_scorer_relation, get_scorer_title, list_scorer_parts
from align.evals.judges.judge_verdict import AnswerPair, JudgeVerdict, judge_by_scores
from align.evals.judges.llm_judge import REFUSES, GradedAnswer, LLMJudge
from align.evals.suite.answers import Sampling, TaskAnswers
from align.evals.suite.people import PEOPLE, PairQuestion
from align.evals.suite.results import EvaluatedAnswer, ScoredTask
from align.evals.suite.systems import get_reference
from align.evals.suite.tasks import HARMLESS, EvalItem, EvalTask
from align.reward.build import build_scorer, load_reward_model
from align.reward.checkers import build_checkers, check_answers_of_turns, exact, json_schema, pattern
from align.reward.checkers.checked import AllowCode
from align.reward.combined import standardise_members
from align.reward.inputs import load_reward_artifacts
from align.reward.scorer import Scorer
from align.rollout.answer_cache import AnswerStore
from align.run import Artifact, Input

CLOSED_KINDS = (exact.KIND, pattern.KIND, json_schema.KIND)
"""Kinds of checks that one and the same answer may pass for many prompts."""
SMALL_TASKS = "tasks with few prompts"
"""Name of the group of open tasks that are measured for collapse together, because each has too few prompts."""
SCORING_BATCH_SIZE = 32


# Judges


class Judge(NamedTuple):
    """The judge of answers to items without checks: a function that scores them, by a reward, a language model or
    people.

    Attributes:
        score: scores a task's answers.
        notes: sentences about the judge.
        role: the name of its scores of single answers, `gold` or `proxy`.
        scorer: scores single answers. None for a judge that compares or grades them.
        best: the highest score that a single answer can have. None if there is no such limit.
    """

    score: Callable[[TaskAnswers], ScoredTask]
    notes: Sequence[str] = ()
    role: str = "gold"
    scorer: Scorer | None = None
    best: float | None = None


def score_tasks(tasks: Sequence[TaskAnswers], judge: Judge | None, allow_code: AllowCode) -> list[ScoredTask]:
    """Score the answers of all models to all tasks. The judge scores tasks without checks, and the checks score the
    others.

    Args:
        judge: of tasks without checks. None if all tasks have checks.
        allow_code: whether checks may run programs that a model wrote.
    """
    scored: list[ScoredTask] = []
    for task in tasks:
        result = judge.score(task) if judge is not None and task.is_judged else score_by_checks(task, allow_code)
        scored.append(replace(result, dropped=task.dropped))
    return scored


def score_by_checks(task: TaskAnswers, allow_code: AllowCode) -> ScoredTask:
    """Score a task's answers by running the check of each item. The main rank runs them and broadcasts the scores."""
    checks = [build_checkers(item.check, 1 + len(item.then), item.id, allow_code=allow_code) for item in task.items]
    warnings = [*dict.fromkeys(line for turns in checks for check in turns if check for line in check.warnings)]

    def run_checks() -> dict[str, list[EvaluatedAnswer]]:
        scored: dict[str, list[EvaluatedAnswer]] = {}
        for name, answers in task.answers.items():
            results = [
                check_answers_of_turns(turns, answer.answers) for turns, answer in zip(checks, answers, strict=True)
            ]
            rows = zip(answers, results, strict=True)
            scored[name] = [replace(answer, score=result.score, checked=result) for answer, result in rows]
        return scored

    answers_by_system = ranks.broadcast(run_checks() if ranks.is_main() else {})
    return ScoredTask(task.task.name, "checks", "exact", task.items, answers_by_system, notes=warnings)


def load_reward_judge(
    reward: Mapping[str, Any],
    spec: Mapping[str, Any],
    inputs: Mapping[str, Input],
    judged_artifacts: Sequence[Artifact],
    root: Path,
    sampling: Sampling,
) -> Judge:
    """Load the reward of the configuration (`reward=`) as a judge, and find out whether an evaluated model was
    optimised against it.

    Args:
        reward: the group `reward` of the configuration, as in a manifest.
        spec: its description, see `align.reward.build.build_scorer`.
        inputs: of the run.
        judged_artifacts: the systems' artifacts, whose lineage decides whether the judge is a proxy.
        root: the folder of runs.
    """
    models = load_reward_artifacts(inputs)
    title = get_scorer_title(reward, inputs)
    parts = list_scorer_parts(reward, inputs)
    relations = [find_scorer_relation(artifact, parts, root, models) for artifact in judged_artifacts]
    role = "proxy" if any(relation.role == "proxy" for relation in relations) else "gold"
    loaded = (load_reward_model(model, sampling.device, sampling.dtype, SCORING_BATCH_SIZE) for model in models)
    scorer = build_scorer(spec, loaded)
    notes = [note for relation in relations for note in relation.describe(title)]
    best = 1.0 if reward["name"] == "check" else None
    return Judge(partial(score_by_scorer, scorer, title, role, sampling.hides_reasoning), notes, role, scorer, best)


def score_by_scorer(scorer: Scorer, title: str, role: str, hides_reasoning: bool, task: TaskAnswers) -> ScoredTask:
    """Score all answers to a task by a reward, and derive pair verdicts from the scores. Learned members of the reward
    are standardised on the answers of the second model, with which the first is compared, or of the only one."""
    prompts = [get_judged_prompt(item, hides_reasoning) for item in task.items]
    conversations = {
        name: [
            append_turns(prompt, answer).with_answer(answer.text)
            for prompt, answer in zip(prompts, system_answers, strict=True)
        ]
        for name, system_answers in task.answers.items()
    }
    reference = get_reference(task.answers)
    scorer = standardise_members(scorer, conversations[reference], task.rollouts.get(reference))
    scores = {
        name: scorer.score(system_conversations, task.rollouts.get(name)).tolist()
        for name, system_conversations in conversations.items()
    }
    ids = [item.id for item in task.items]
    verdicts = {
        name: judge_by_scores(ids, scores[task.first], other_scores)
        for name, other_scores in scores.items()
        if name != task.first
    }
    answers_by_system = {
        name: [replace(answer, score=score) for answer, score in zip(system_answers, scores[name], strict=True)]
        for name, system_answers in task.answers.items()
    }
    return ScoredTask(task.task.name, title, role, task.items, answers_by_system, verdicts)


def score_by_llm(judge: LLMJudge, store: AnswerStore, hides_reasoning: bool, task: TaskAnswers) -> ScoredTask:
    """Score a task by an LLM judge, which compares the first model's answers with each other model's. If the task has a
    yes/no question, the judge grades each answer by it instead. Only the main rank sends requests."""
    if task.task.asks:
        return grade_answers(judge.with_question(task.task.asks), store, hides_reasoning, task)
    pairs = {
        opponent: pair_answers(task, opponent, hides_reasoning) for opponent in task.answers if opponent != task.first
    }
    verdicts = ranks.broadcast(
        {opponent: judge.compare(pairs_of_system, store) for opponent, pairs_of_system in pairs.items()}
        if ranks.is_main()
        else {}
    )
    errors = judge.describe_errors([verdict for system_verdicts in verdicts.values() for verdict in system_verdicts])
    notes = [f"{task.task.name}: {note}" for note in errors]
    return ScoredTask(task.task.name, judge.title, "gold", task.items, task.answers, verdicts, notes=notes)


def grade_answers(judge: LLMJudge, store: AnswerStore, hides_reasoning: bool, task: TaskAnswers) -> ScoredTask:
    """Score each model's answer to each item by an LLM judge, which answers the task's yes/no question about it. Of
    several turns the last is graded."""
    prompts = [get_judged_prompt(item, hides_reasoning) for item in task.items]
    answers = [answer for system_answers in task.answers.values() for answer in system_answers]
    graded_answers = [
        GradedAnswer(append_turns(prompt, answer), answer.text)
        for prompt, answer in zip(cycle(prompts), answers, strict=False)
    ]
    verdicts = ranks.broadcast(judge.grade(graded_answers, store) if ranks.is_main() else [])
    graded = (
        replace(answer, score=verdict.verdict, p=verdict.p, error=verdict.error)
        for answer, verdict in zip(answers, verdicts, strict=True)
    )
    answers_by_system = {name: [*islice(graded, len(task.items))] for name in task.answers}
    notes = [f"{task.task.name}: {note}" for note in judge.describe_errors(verdicts)]
    return ScoredTask(
        task.task.name, judge.title, "graded", task.items, answers_by_system, asks=task.task.asks, notes=notes
    )


def score_by_people(verdicts: Mapping[tuple[str, str], Sequence[JudgeVerdict]], task: TaskAnswers) -> ScoredTask:
    """Return the task's answers without scores, together with people's verdicts on the pairs.

    Args:
        verdicts: by task and other system.
    """
    opponents = [name for name in task.answers if name != task.first]
    task_verdicts = {opponent: verdicts.get((task.task.name, opponent), ()) for opponent in opponents}
    return ScoredTask(task.task.name, PEOPLE, PEOPLE, task.items, task.answers, task_verdicts)


def iter_pair_questions(task: TaskAnswers, hides_reasoning: bool) -> Iterator[PairQuestion]:
    """Yield the answer pairs of a task to show to people: the first model's answer with each other model's, item by
    item."""
    for opponent in task.answers:
        if opponent != task.first:
            pairs = pair_answers(task, opponent, hides_reasoning)
            for pair, first, second in zip(pairs, task.answers[task.first], task.answers[opponent], strict=True):
                ended = (first.ended is not False, second.ended is not False)
                yield PairQuestion(task.task.name, opponent, pair, ended)


def pair_answers(task: TaskAnswers, other: str, hides_reasoning: bool) -> list[AnswerPair]:
    """Pair the first model's answer to each item with the answer of the model `other`.

    Args:
        hides_reasoning: True to leave out the reasoning of earlier turns.
    """
    rows = zip(task.items, task.answers[task.first], task.answers[other], strict=True)
    return [
        AnswerPair(item.id, get_judged_prompt(item, hides_reasoning), first.transcript, second.transcript)
        for item, first, second in rows
    ]


def get_judged_prompt(item: EvalItem, hides_reasoning: bool) -> Conversation:
    """Return an item's prompt as the judge reads it, without the reasoning of earlier turns if `hides_reasoning`."""
    return replace(item.prompt, messages=strip_all_reasoning(item.prompt.messages)) if hides_reasoning else item.prompt


def append_turns(prompt: Conversation, answer: EvaluatedAnswer) -> Conversation:
    """Return the prompt followed by the turns before a model's last answer."""
    return replace(prompt, messages=(*prompt.messages, *answer.before)) if answer.before else prompt


# Collapse

Score = Callable[[Sequence[str]], Sequence[float]]


class FirstAnswers(NamedTuple):
    """The first answers of all models to the distinct prompts of a task, to measure collapse."""

    items: Sequence[EvalItem]
    prompts: Sequence[str]
    systems: Mapping[str, SystemAnswers]

    def measure(self) -> dict[str, Measurement]:
        reference = get_reference(self.systems)
        return {
            name: measure_collapse(
                self.prompts, answers, None if name == reference else self.systems[reference], reference
            )
            for name, answers in self.systems.items()
        }


def measure_tasks(
    tasks: Sequence[TaskAnswers],
    judge: Judge | None,
    closed_setting: bool | None,
    allow_code: AllowCode,
    hides_reasoning: bool,
) -> dict[str, dict[str, Measurement]]:
    """Measure for each task and model whether its answers collapsed to few texts. Returns task name → model name →
    measurement.

    Args:
        closed_setting: `eval.closed`, the default for tasks.
        hides_reasoning: True to leave out the reasoning of earlier turns.
    """
    open_answers: dict[str, FirstAnswers] = {}
    measurements: dict[str, dict[str, Measurement]] = {}
    for task in tasks:
        answers = select_first_answers(task)
        if is_closed(task.task, task.items, closed_setting, judge is not None and judge.best is not None):
            scoring = build_closed_score(answers.items, allow_code, judge, hides_reasoning)
            measurements[task.task.name] = measure_closed_task(answers, scoring)
        else:
            open_answers[task.task.name] = answers
    return {**(measure_open_tasks(open_answers) if open_answers else {}), **measurements}


def select_first_answers(task: TaskAnswers) -> FirstAnswers:
    """Select the first answers of all models to the distinct prompts of a task, sampled and greedy."""
    rows = range(len(task.items))
    if task.greedy:
        asked_greedily = next(iter(task.greedy.values()))
        rows = [row for row in rows if asked_greedily[row] is not None]
    texts = [get_prompt_text(task.items[row].prompt.messages) for row in rows]
    rows = [rows[i] for i in find_distinct_prompts(texts)]
    return FirstAnswers(
        [task.items[row] for row in rows],
        [get_prompt_text(task.items[row].prompt.messages) for row in rows],
        {
            name: SystemAnswers(
                [answers[row].answers[0] for row in rows],
                [task.greedy[name][row] or "" for row in rows] if name in task.greedy else None,
                task.no_greedy.get(name, ""),
            )
            for name, answers in task.answers.items()
        },
    )


def is_closed(
    task: EvalTask, items: Sequence[EvalItem], default: bool | None, is_judged_by_checks: bool = False
) -> bool:
    """Return whether a task's prompts may share one right answer, so that equal answers are no sign of a collapse.

    Args:
        default: `eval.closed`, for tasks without a setting of their own.
        is_judged_by_checks: True if the judge of items without checks is `reward=check`.
    """
    if task.closed is not None:
        return task.closed
    if default is not None:
        return default
    if task.asks == REFUSES:
        return task.path != HARMLESS
    if is_judged_by_checks and items[0].check is None:
        return True
    checks = [item.check if isinstance(item.check, Sequence) else [item.check] for item in items]
    return any(check is not None and check["kind"] in CLOSED_KINDS for turns in checks for check in turns)


class ClosedScore(NamedTuple):
    """The function that scores constant answers to a closed task, whose prompts may share one right answer.

    Attributes:
        score: scores one answer to each item. None if single answers have no scores.
        best: the highest score that an answer can have. None if there is no such limit.
        why_none: why single answers have no scores.
    """

    score: Score | None
    best: float | None = None
    why_none: str = ""


def build_closed_score(
    items: Sequence[EvalItem], allow_code: AllowCode, judge: Judge | None, hides_reasoning: bool
) -> ClosedScore:
    """Build the function that scores one text per item by the items' checks or the judge, to score a constant answer to
    all of them.

    Args:
        judge: of items without checks.
        hides_reasoning: True to leave out the reasoning of earlier turns.
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
    prompts = [get_judged_prompt(item, hides_reasoning) for item in items]

    def ask_scorer(texts: Sequence[str]) -> list[float]:
        return scorer.score([prompt.with_answer(text) for prompt, text in zip(prompts, texts, strict=True)]).tolist()

    return ClosedScore(ask_scorer, judge.best)


def measure_closed_task(answers: FirstAnswers, scoring: ClosedScore) -> dict[str, Measurement]:
    """Measure the variety of each model's answers to a closed task, whose prompts may share one right answer. See
    `judge_closed_task` for when a model has collapsed."""
    measurements = answers.measure()
    reference = get_reference(answers.systems)
    for name, system in answers.systems.items():
        if scoring.score is None:
            verdict = Collapse(NOT_MEASURED, (f"equal answers may be right, and {scoring.why_none}",))
        else:
            ref = None if name == reference else answers.systems[reference]
            verdict = judge_closed_task(scoring.score, system, ref, scoring.best)
        measurements[name] = measurements[name]._replace(collapse=verdict)
    return measurements


def measure_open_tasks(answers: Mapping[str, FirstAnswers]) -> dict[str, dict[str, Measurement]]:
    """Measure the variety of each model's answers to open tasks. Returns task name → model name → measurement. Tasks
    with too few prompts are measured together."""
    small = {name: task for name, task in answers.items() if len(task.prompts) < MIN_PROMPTS}
    groups = {name: task for name, task in answers.items() if name not in small}
    if len(small) > 1:
        groups[SMALL_TASKS] = join_tasks([*small.values()])
    else:
        groups |= small
    return {name: task.measure() for name, task in groups.items()}


def join_tasks(tasks: Sequence[FirstAnswers]) -> FirstAnswers:
    """Concatenate the first answers to several tasks, as if they were one task. There are greedy answers only if all
    tasks have them."""

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


def combine_verdicts_by_system(
    groups: Mapping[str, Mapping[str, Measurement]], systems: Sequence[str]
) -> dict[str, Collapse]:
    """Combine each model's collapse verdicts over all tasks into one. Returns model name → verdict.

    Args:
        groups: name of a task → system → its measurement.
    """
    return {
        name: combine_verdicts({task: measurements[name].collapse for task, measurements in groups.items()})
        for name in systems
    }
