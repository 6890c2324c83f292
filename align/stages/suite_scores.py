"""Who scores the answers to a suite's tasks: the checks of the items, or the judge of the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from typing import NamedTuple

from align import ranks
from align.config.root import Config
from align.config.scorers import reward_spec
from align.data.chat.reasoning import without_reasoning
from align.evals import judges
from align.evals.llm_judge import GradedAnswer, LLMJudge, describe_self_judging
from align.evals.results import Said, Scored
from align.evals.suite import Work
from align.evals.tasks import Item
from align.evals.verdicts import Pair, of_scores
from align.models.load import choose_device, choose_dtype
from align.reward.build import build, on_its_own_base
from align.reward.checkers import check_turns, checks_of
from align.reward.checkers.code import AllowCode
from align.reward.combined import comparable
from align.reward.inputs import models_of
from align.reward.scorer import Scorer
from align.rollout.kept import AnswerStore
from align.run import Run
from align.stages.suite_answers import answer_store
from align.types import Conversation, Rollout


class Told(NamedTuple):
    """What the systems said to the items of a task.

    Attributes:
        answers: system → its answers, the first system before the others.
        rollouts: system → the same as tokens, of those that answer here.
        asks: the question about each answer, of a task that is graded; else empty.
    """

    task: str
    items: Sequence[Item]
    answers: Mapping[str, Sequence[Said]]
    rollouts: Mapping[str, Rollout]
    asks: str = ""

    @property
    def first(self) -> str:
        """Who is compared with the others."""
        return next(iter(self.answers))


class Judge(NamedTuple):
    """Who judges what no check scores.

    Attributes:
        scored: what it says of a task's answers, and what is to be said of that.
        notes: what is to be said of it.
        scorer: scores single answers. None of a judge that compares or grades them.
    """

    scored: Callable[[Told], tuple[Scored, Sequence[str]]]
    notes: Sequence[str] = ()
    scorer: Scorer | None = None


def judge_of(run: Run, config: Config, work: Work) -> Judge:
    """The judge of the evaluation, loaded."""
    hides = config.rollout.reasoning == "hide"
    if isinstance(work.judge, LLMJudge):
        store = answer_store(config)
        return Judge(partial(by_llm, work.judge, store, hides), describe_self_judging(work.judge, work.systems))
    return judge_of_reward(run, config, work)


def by_checks(told: Told, allow_code: AllowCode) -> tuple[Scored, Sequence[str]]:
    """What the check of each item says of its answers, and what there is to be said of the checks. Checks are made and
    run by the first rank alone."""
    checks = [checks_of(item.check, 1 + len(item.then), item.id, allow_code=allow_code) for item in told.items]
    warnings = [*dict.fromkeys(line for turns in checks for check in turns if check for line in check.warnings)]

    def checked() -> dict[str, list[Said]]:
        found: dict[str, list[Said]] = {}
        for name, answers in told.answers.items():
            results = [check_turns(turns, answer.answers) for turns, answer in zip(checks, answers, strict=True)]
            rows = zip(answers, results, strict=True)
            found[name] = [replace(answer, score=result.score, checked=result) for answer, result in rows]
        return found

    said = ranks.from_main(checked() if ranks.is_main() else {})
    return Scored(told.task, "checks", "exact", told.items, said), warnings


def judge_of_reward(run: Run, config: Config, work: Work) -> Judge:
    """The scorer of `reward=` as a judge, and what it is to the systems."""
    reward, models = run.manifest.config["reward"], models_of(run.inputs)
    title, identities = judges.title(reward, run.inputs), judges.identities(reward, run.inputs)
    root, device = config.run.folder, choose_device(config.device)
    artifacts = [s.artifact for s in work.systems if s.artifact is not None and s.artifact.manifest is not None]
    found = [judges.standing_of(artifact, identities, root, models) for artifact in artifacts]
    role = "proxy" if any(of.role == "proxy" for of in found) else "gold"
    dtype = choose_dtype(config.dtype, device)
    scorer = build(reward_spec(config.reward), (on_its_own_base(m, device, dtype, 32) for m in models))
    notes = [note for of in found for note in of.sentences(title)]
    return Judge(partial(by_scorer, scorer, title, role, config.rollout.reasoning == "hide"), notes, scorer)


def by_llm(judge: LLMJudge, store: AnswerStore, hides: bool, told: Told) -> tuple[Scored, Sequence[str]]:
    """What a language model says of the first system's answers beside each other one's, or of each answer where the
    task asks a question. The first rank asks it."""
    if told.asks:
        return grade_answers(judge.with_question(told.asks), told.asks, store, hides, told)
    others = [name for name in told.answers if name != told.first]
    asked = {other: pairs_of(told, other, hides) for other in others if ranks.is_main()}
    found = ranks.from_main({other: judge.compare(pairs, store) for other, pairs in asked.items()})
    notes = [f"{told.task}: {note}" for note in judge.describe_errors([one for said in found.values() for one in said])]
    return Scored(told.task, judge.title, "gold", told.items, told.answers, found), notes


def grade_answers(
    judge: LLMJudge, question: str, store: AnswerStore, hides: bool, told: Told
) -> tuple[Scored, Sequence[str]]:
    """Return the judge's yes or no to each answer of each system; of several turns, to the last."""
    prompts = [asked_alone(item, hides) for item in told.items]
    answers = [answer for each in told.answers.values() for answer in each]
    shown = [
        GradedAnswer(talk(prompt, answer), answer.text) for prompt, answer in zip(cycle(prompts), answers, strict=False)
    ]
    verdicts = ranks.from_main(judge.grade(shown, store) if ranks.is_main() else [])
    graded = (
        replace(answer, score=verdict.verdict, p=verdict.p, error=verdict.error)
        for answer, verdict in zip(answers, verdicts, strict=True)
    )
    by_system = {name: [*islice(graded, len(told.items))] for name in told.answers}
    notes = [f"{told.task}: {note}" for note in judge.describe_errors(verdicts)]
    return Scored(told.task, judge.title, "graded", told.items, by_system, asks=question), notes


def pairs_of(told: Told, other: str, hides: bool) -> list[Pair]:
    """The first system's answers beside another's.

    Args:
        hides: the reasoning of earlier turns.
    """
    rows = zip(told.items, told.answers[told.first], told.answers[other], strict=True)
    return [
        Pair(item.id, asked_alone(item, hides), first.transcript, second.transcript) for item, first, second in rows
    ]


def asked_alone(item: Item, hides: bool) -> Conversation:
    """An item's prompt as judges read it."""
    return replace(item.prompt, messages=without_reasoning(item.prompt.messages)) if hides else item.prompt


def talk(prompt: Conversation, answer: Said) -> Conversation:
    """A conversation up to the last answer."""
    return replace(prompt, messages=(*prompt.messages, *answer.before)) if answer.before else prompt


def by_scorer(scorer: Scorer, title: str, role: str, hides: bool, told: Told) -> tuple[Scored, Sequence[str]]:
    """The scores of all answers, and who won by them. The scorer's learned parts are brought to one scale on the
    answers of the second system, which the first is compared with."""
    answers, rollouts = told.answers, told.rollouts
    asked = [asked_alone(item, hides) for item in told.items]
    read = {
        name: [talk(prompt, answer).answered(answer.text) for prompt, answer in zip(asked, each, strict=True)]
        for name, each in answers.items()
    }
    reference = [*answers][1]
    scorer = comparable(scorer, read[reference], rollouts.get(reference))
    scores = {name: scorer.score(each, rollouts.get(name)).tolist() for name, each in read.items()}
    ids = [item.id for item in told.items]
    verdicts = {name: of_scores(ids, scores[told.first], of) for name, of in scores.items() if name != told.first}
    said = {
        name: [replace(answer, score=score) for answer, score in zip(each, scores[name], strict=True)]
        for name, each in answers.items()
    }
    return Scored(told.task, title, role, told.items, said, verdicts), ()
