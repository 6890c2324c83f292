"""The results of an evaluation, task by task: figures of each model, and of the first compared with each other one.

Systems are compared on the same items, and items of one cluster count as one. All figures are computed from
`answers.jsonl`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from align.core.types import Message
from align.evals.judges.judge_verdict import JudgeVerdict, collect_both_orders, merge_verdicts
from align.evals.judges.llm_judge import describe_yes_answer
from align.evals.stats.bradley_terry import fit_bradley_terry
from align.evals.stats.judge_agreement import measure_swap_effect
from align.evals.stats.length_control import control_for_length
from align.evals.stats.paired import adjust_by_holm, compare_scores, compare_shares
from align.evals.stats.power import compute_cluster_effect, compute_detectable_difference, estimate_deviation
from align.evals.stats.verdicts import compute_wins
from align.evals.suite.probes import ChoiceQuestion, compute_probe_figures
from align.evals.suite.systems import System
from align.evals.suite.tasks import EvalItem
from align.ops.best_of_n import estimate_pass_at_k
from align.ops.intervals import Interval, average_by_group, mean_interval, proportion_interval
from align.report import format_interval
from align.report.figure_text import note_small_sample, pluralize
from align.reward.checkers import CheckResult, compute_accuracy

GOES_ON = "— The user goes on: —\n{}\n— The answer: —"

SHARE_ROLES = ("exact", "graded")
"""Values of `ScoredTask.role` whose scores are shares within [0, 1]."""


@dataclass(frozen=True, slots=True)
class EvaluatedAnswer:
    """A model's answer to an item with its score.

    Attributes:
        id: in the store of answers. Empty for an answer from a file.
        text: without hidden reasoning.
        score: of the scorer. For a check it is 1 if all constraints hold, else 0. None for a judge that only compares
            answers.
        ended: False if the answer was cut. None for an answer from a file, which does not say.
        reasoning: the hidden reasoning, if any.
        checked: the result of a check. None without one.
        weighed: the measurements of a probe, see `align.evals.suite.probes`. None for other tasks.
        p: a grader's probability of yes. None if it gives none, and for other scorers.
        error: why a grader gave no verdict, which scores one half. Empty if it gave one.
        before: the turns between the item's prompt and this answer, for items of several turns.
    """

    id: str
    text: str
    score: float | None = None
    ended: bool | None = None
    reasoning: str | None = None
    checked: CheckResult | None = None
    weighed: Mapping[str, Any] | None = None
    p: float | None = None
    error: str = ""
    before: tuple[Message, ...] = ()

    @property
    def answers(self) -> list[str]:
        """The texts of the model's answers to the item, one per turn."""
        return [*(message.content for message in self.before if message.role == "assistant"), self.text]

    @property
    def transcript(self) -> str:
        """All turns after the item's prompt, joined to one text."""
        parts = [
            message.content if message.role == "assistant" else GOES_ON.format(message.content)
            for message in self.before
        ]
        return "\n\n".join([*parts, self.text])

    def as_dict(self) -> dict[str, Any]:
        """Return the answer as the JSON object that a line of `answers.jsonl` contains. Only fields with a value are
        included, and of a check only the constraints that do not hold."""
        row: dict[str, Any] = {
            "text": self.text,
            "score": self.score,
            "ended": self.ended,
            "reasoning": self.reasoning,
            "id": self.id or None,
            "before": [message.as_dict() for message in self.before] or None,
            "weighed": self.weighed,
            "p": self.p,
            "error": self.error or None,
        }
        if self.checked is not None:
            row["missed"] = {part.asks: part.found for part in self.checked.parts if not part.held} or None
            row["error"] = self.checked.error or None
            row["sandbox"] = self.checked.sandbox or None
        return {name: value for name, value in row.items() if value is not None}


@dataclass(frozen=True, slots=True)
class ScoredTask:
    """A task of an evaluation with the scored answers of all models.

    Attributes:
        name: of the task.
        by: the scorer's name: the judge's title, or `checks`.
        role: `exact` for checks, whose scores are shares; `graded` for a language model that answers a question about
            each answer, whose scores are shares of yes; `measured` for probes, whose scores are not judged; `gold` for
            a judge; `proxy` for a judge that a system was optimised against; `people` for people.
        items: those that every system answered [n].
        answers: system → its answers [n].
        verdicts: other system → a judge's verdicts on the first system's answers compared with its own.
        dropped: number of items whose prompt is too long for some system.
        asks: the question of a graded task, else empty.
        figures: for a task of lm-eval, system → lm-eval's own figures, by its name of the metric.
        notes: sentences about the scoring.
    """

    name: str
    by: str
    role: str
    items: Sequence[EvalItem]
    answers: Mapping[str, Sequence[EvaluatedAnswer]]
    verdicts: Mapping[str, Sequence[JudgeVerdict]] = field(default_factory=dict)
    dropped: int = 0
    asks: str = ""
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def clusters(self) -> list[str]:
        return [item.cluster for item in self.items]

    @property
    def has_scores(self) -> bool:
        """True if each answer has a score of its own, False if answers are only compared in pairs."""
        return all(answer.score is not None for answers in self.answers.values() for answer in answers)

    @property
    def compares_shares(self) -> bool:
        """True if the values by which models are compared lie within [0, 1]."""
        return self.role in SHARE_ROLES or not self.has_scores

    def get_scores(self, system: str) -> list[float]:
        """Return the scores of a model's answers, one per item.

        Raises:
            ValueError: the answers are only compared and have no scores.
        """
        scores = [answer.score for answer in self.answers[system] if answer.score is not None]
        if len(scores) < len(self.items):
            raise ValueError(f"{self.by} compares answers to {self.name} in pairs, and gives {system} no score")
        return scores

    def select_compared_items(self, other: str) -> ScoredTask:
        """Return the task with only the items on which the first model is compared with `other`. All are if answers
        have scores, else the items with a verdict, since people may have judged only some."""
        if self.has_scores:
            return self
        verdicts = merge_verdicts(self.verdicts.get(other, ()))
        return select_items(self, [item.id in verdicts for item in self.items])

    def get_wins(self, other: str) -> list[float]:
        """Return the first model's result against `other` on each item: 1 for a win, ½ for a tie, 0 for a loss. Several
        verdicts on an item are averaged."""
        verdicts = merge_verdicts(self.verdicts[other])
        return [verdicts[item.id] for item in self.items]

    def get_compared_values(self, other: str) -> tuple[list[float], list[float]]:
        """Return the values by which the first model and `other` are compared on each item: their scores, or without
        scores their wins."""
        if self.has_scores:
            return self.get_scores(next(iter(self.answers))), self.get_scores(other)
        return self.get_wins(other), [1 - won for won in self.get_wins(other)]

    @property
    def missing_verdicts(self) -> int:
        """The number of graded answers and pair verdicts for which the judge gave no valid reply."""
        missing_grades = sum(bool(answer.error) for answers in self.answers.values() for answer in answers)
        return missing_grades + sum(bool(verdict.error) for verdicts in self.verdicts.values() for verdict in verdicts)

    def fill_missing_verdicts(self, filled_verdict: float) -> ScoredTask:
        """Return a copy of the task with `filled_verdict` in place of every missing verdict, to test whether missing
        verdicts could change an outcome.

        Args:
            filled_verdict: 1 to take the missing verdicts in favour of the first system, 0 against it.
        """
        first = next(iter(self.answers))
        answers_by_system = {}
        for name, answers in self.answers.items():
            score = filled_verdict if name == first else 1 - filled_verdict
            answers_by_system[name] = [replace(answer, score=score) if answer.error else answer for answer in answers]
        verdicts_by_system: dict[str, Sequence[JudgeVerdict]] = {}
        for name, verdicts in self.verdicts.items():
            failed = {verdict.prompt for verdict in verdicts if verdict.error}
            verdicts_by_system[name] = [
                verdict._replace(verdict=filled_verdict) if verdict.prompt in failed else verdict
                for verdict in verdicts
            ]
        return replace(self, answers=answers_by_system, verdicts=verdicts_by_system)

    def count_characters(self, system: str) -> list[int]:
        """Return the number of characters of each of a model's answers, over all turns. Tokens would differ between
        models."""
        return [sum(map(len, answer.answers)) for answer in self.answers[system]]


def compute_results(tasks: Sequence[ScoredTask], level: float, max_regressions: int) -> dict[str, Any]:
    """Compute the figures of all models and comparisons on all tasks as a JSON object, task name → results. `systems`
    has the figures of each model, and `against` the comparisons of the first with each other one that has verdicts. The
    p of each comparison is also adjusted by Holm's step-down rule over all of them (`p_holm`).

    Args:
        max_regressions: maximum number of `regressions`, the items on which the first system lost most.

    Raises:
        ValueError: a task has no items.
    """
    results = {task.name: compute_task_results(task, level, max_regressions) for task in tasks}
    p_values = {
        f"{name} {opponent}": comparison["p"]
        for name, task in results.items()
        for opponent, comparison in task["against"].items()
    }
    adjusted = adjust_by_holm(p_values)
    for name, task in results.items():
        for opponent, comparison in task["against"].items():
            comparison["p_holm"] = adjusted[f"{name} {opponent}"]
    return results


def compute_task_results(task: ScoredTask, level: float, max_regressions: int) -> dict[str, Any]:
    """Compute one task's results as a JSON object: the figures of each model, and the comparisons of the first model
    with each other one."""
    names = [*task.answers]
    first = names[0]
    parts = {opponent: part for opponent in names[1:] if (part := task.select_compared_items(opponent)).items}
    results: dict[str, Any] = {"by": task.by, "role": task.role}
    if task.asks:
        results |= {"asks": task.asks, "yes": describe_yes_answer(task.asks)}
    results |= {
        "items": len(task.items),
        "dropped": task.dropped,
        "systems": {name: compute_system_figures(task, name, level) for name in names},
        "against": {opponent: compare_with_opponent(part, first, opponent, level) for opponent, part in parts.items()},
    }
    if len(parts) > 1 and task.verdicts:
        results["strengths"] = compute_strengths(task, level)
    results["categories"] = {}
    for category in dict.fromkeys(item.category for item in task.items if item.category):
        by_system = {}
        for opponent, part in parts.items():
            selected = select_items(part, [item.category == category for item in part.items])
            if selected.items:
                by_system[opponent] = compare_means(selected, opponent, level)
        results["categories"][category] = by_system
    results |= compare_on_unseen(task, parts, level)
    results["regressions"] = {
        opponent: list_regressions(part, opponent)[:max_regressions] for opponent, part in parts.items()
    }
    return results


def compute_system_figures(task: ScoredTask, name: str, level: float) -> dict[str, Any]:
    """Return one model's figures on a task: its mean score, and further ones that depend on the kind of task. A check
    adds the accuracies of IFEval, a probe its figures, and a task of lm-eval has lm-eval's figures."""
    answers = task.answers[name]
    if task.figures:
        return {**task.figures[name], "score": compute_mean_score(task, name, level).as_dict()}
    measurements = [answer.weighed for answer in answers if answer.weighed is not None]
    if measurements:
        return {"score": compute_mean_score(task, name, level).as_dict(), **compute_probe_figures(measurements)}
    end_flags = [answer.ended for answer in answers if answer.ended is not None]
    check_results = [answer.checked for answer in answers if answer.checked is not None]
    return {
        **({"score": compute_mean_score(task, name, level).as_dict()} if task.has_scores else {}),
        **(compute_accuracy(check_results)._asdict() if check_results else {}),
        **compute_pass_at_k_figures(task, name, level),
        **({"errors": sum(bool(answer.error) for answer in answers)} if task.asks else {}),
        "characters": float(np.mean(task.count_characters(name))),
        "cut": 1 - sum(end_flags) / len(end_flags) if end_flags else None,
        "empty": sum(not answer.text.strip() for answer in answers) / len(answers),
    }


def compute_pass_at_k_figures(task: ScoredTask, name: str, level: float) -> dict[str, Any]:
    """Return pass@k of a model's several answers to each prompt of a task with checks, and, if all checks are of the
    kind `exact`, the accuracy of the majority vote (`majority`).

    `pass_at` is a list of intervals with their k: powers of two and the number of answers. Returns an empty dict for
    one answer to each prompt, and for other tasks.
    """
    rows_by_prompt: dict[str, list[int]] = {}
    for i, item in enumerate(task.items):
        rows_by_prompt.setdefault(item.prompt_id, []).append(i)
    answers_per_prompt = min(map(len, rows_by_prompt.values()), default=0)
    results = [answer.checked for answer in task.answers[name]]
    if answers_per_prompt < 2 or None in results:
        return {}
    clusters = [task.items[rows[0]].cluster for rows in rows_by_prompt.values()]

    def average_prompts(values: Sequence[float]) -> dict[str, Any]:
        return proportion_interval(average_by_group(clusters, values)[0], level=level).as_dict()

    groups = [[result for i in rows if (result := results[i])] for rows in rows_by_prompt.values()]
    right_counts = [(sum(result.score == 1 for result in group), len(group)) for group in groups]
    powers = [2**exponent for exponent in range(1, answers_per_prompt.bit_length())]
    figures: dict[str, Any] = {
        "pass_at": [
            {"k": k, **average_prompts([estimate_pass_at_k(right, answers, k) for right, answers in right_counts])}
            for k in sorted({*powers, answers_per_prompt})
        ]
    }
    if all(get_check_kind(item) == "exact" for item in task.items):
        figures["majority"] = average_prompts([compute_majority_share(group) for group in groups])
    return figures


def get_check_kind(item: EvalItem) -> str:
    """Return the kind of an item's check. Returns an empty text if there are several checks."""
    return str(item.check.get("kind", "")) if isinstance(item.check, Mapping) else ""


def compute_majority_share(results: Sequence[CheckResult]) -> float:
    """Return the probability that the majority vote over the answers to a prompt is right: 1 or 0, or a share if
    several answers are equally common. Answers from which nothing was read have no vote; 0 if all are such."""
    votes = Counter(text for result in results if (text := result.parts[0].compared) is not None)
    highest_count = max(votes.values(), default=0)
    winners = [answer for answer, count in votes.items() if count == highest_count]
    right_answers = {result.parts[0].compared for result in results if result.score == 1}
    return sum(answer in right_answers for answer in winners) / max(1, len(winners))


def compute_mean_score(task: ScoredTask, name: str, level: float) -> Interval:
    """Return a model's mean score on a task with its interval, each cluster counted once."""
    scores = average_by_group(task.clusters, task.get_scores(name))[0]
    return proportion_interval(scores, level=level) if task.role in SHARE_ROLES else mean_interval(scores, level)


def compare_means(task: ScoredTask, other: str, level: float) -> dict[str, Any]:
    """Return the paired comparison of the first model's mean score with another's as a JSON object. Without scores,
    wins and losses are compared."""
    compare = compare_shares if task.compares_shares else compare_scores
    return asdict(compare(*task.get_compared_values(other), task.clusters, level))


def compare_with_opponent(task: ScoredTask, first: str, other: str, level: float) -> dict[str, Any]:
    """Return the paired comparison of the first model with another, with the smallest detectable difference. For a
    judge, also return its win rates, since the units of its scores are arbitrary."""
    comparison = compare_means(task, other, level)
    comparison["items"] = len(task.items)
    comparison["detectable"] = compute_smallest_detectable(task, other, Interval(**comparison["difference"]), level)
    if task.verdicts:
        controlled = control_for_length(
            task.get_wins(other), task.count_characters(first), task.count_characters(other), task.clusters, level
        )
        comparison["win_rate"] = controlled.raw.as_dict()
        comparison["win_rate_at_equal_lengths"] = controlled.controlled.as_dict()
        comparison |= measure_order_effect(task, other, level)
        comparison["no_verdict"] = sum(bool(verdict.error) for verdict in task.verdicts[other])
    return comparison


def measure_order_effect(task: ScoredTask, other: str, level: float) -> dict[str, Any]:
    """Measure how often a judge's verdict changes with the order of the two answers. Returns an empty dict if no pair
    was judged in both orders."""
    verdict_pairs = collect_both_orders(task.verdicts[other])
    if not verdict_pairs:
        return {}
    items = [item for item in task.items if item.id in verdict_pairs]
    shown_first, shown_second = zip(*(verdict_pairs[item.id] for item in items), strict=True)
    effect = measure_swap_effect(shown_first, shown_second, [item.cluster for item in items], level)
    return {"swap": {"consistency": effect.consistency.as_dict(), "shown_first": effect.shown_first.as_dict()}}


def compute_smallest_detectable(task: ScoredTask, other: str, difference: Interval, level: float) -> float | None:
    """Compute the smallest true difference between two models that the task's number of items detects in four of five
    evaluations. Returns None if there are too few clusters, or if the difference of shares would have to be 1 or
    more."""
    sd = estimate_deviation(difference, level)
    if sd is None or difference.n < 2:
        return None
    reach = 0.0
    if task.compares_shares:  # shares end at 0 and 1
        differences = [a - b for a, b in zip(*task.get_compared_values(other), strict=True)]
        reach = compute_cluster_effect(differences, task.clusters)
    size = compute_detectable_difference(sd, difference.n, level, reach=reach)
    return None if task.compares_shares and size >= 1 else size


def compute_strengths(task: ScoredTask, level: float) -> dict[str, Any]:
    """Fit the Bradley-Terry strengths of all models on a task, as a JSON object. With scores, all pairs of models are
    compared, else the first model with each other one."""
    names = [*task.answers]
    rows: list[tuple[str, str, float, str]] = []
    for i, first in enumerate(names if task.has_scores else names[:1]):
        for second in names[i + 1 :]:
            part = task.select_compared_items(second)
            wins = (
                compute_wins(task.get_scores(first), task.get_scores(second)).tolist()
                if task.has_scores
                else part.get_wins(second)
            )
            rows += [(first, second, win, cluster) for win, cluster in zip(wins, part.clusters, strict=True)]
    firsts, seconds, wins, clusters = zip(*rows, strict=True)
    return fit_bradley_terry(firsts, seconds, wins, clusters, level).as_dict()


def compare_on_unseen(task: ScoredTask, parts: Mapping[str, ScoredTask], level: float) -> dict[str, Any]:
    """Repeat the comparisons without the items whose prompts are nearly the same as training data of any model. Returns
    the number of excluded items and the comparisons, or an empty dict if no item was excluded.

    Args:
        parts: other system → the items on which it is compared.
    """
    counts = {name: sum(name in item.near for item in task.items) for name in task.answers}
    near_count = sum(bool(item.near) for item in task.items)
    if not near_count:
        return {}
    unseen = {opponent: select_items(part, [not item.near for item in part.items]) for opponent, part in parts.items()}
    comparisons = {opponent: compare_means(part, opponent, level) for opponent, part in unseen.items() if part.items}
    return {"near": {"items": near_count, "systems": counts, "others": comparisons}}


def select_items(task: ScoredTask, is_selected: Sequence[bool]) -> ScoredTask:
    rows = [i for i, selected in enumerate(is_selected) if selected]
    answers_by_system = {name: [answers[i] for i in rows] for name, answers in task.answers.items()}
    return replace(task, items=[task.items[i] for i in rows], answers=answers_by_system)


def list_regressions(task: ScoredTask, other: str) -> list[dict[str, Any]]:
    """Return the items on which the first model lost to `other`, each as `{id, by}`, the largest loss first.

    A yes of a grader may be good or bad, so for a graded task the items are those on which the two systems differ, with
    `by` below 0 if the first system has the yes.
    """
    differences = [a - b for a, b in zip(*task.get_compared_values(other), strict=True)]
    sizes = [abs(difference) if task.role == "graded" else -difference for difference in differences]
    worst = sorted((i for i, size in enumerate(sizes) if size > 0), key=lambda i: -sizes[i])
    return [{"id": task.items[i].id, "by": -differences[i]} for i in worst]


def iter_answer_rows(tasks: Sequence[ScoredTask]) -> Iterator[dict[str, Any]]:
    """Yield for each item of each task the JSON object of a line in `answers.jsonl`, with its prompt and the answers of
    every model."""
    for task in tasks:
        for i, item in enumerate(task.items):
            row: dict[str, Any] = {
                "task": task.name,
                "id": item.id,
                "cluster": item.cluster,
                "category": item.category,
            }
            if item.near:
                row["near"] = dict(item.near)
            if isinstance(item.probe, ChoiceQuestion):
                row |= {"choices": [*item.probe.texts], "right": item.probe.answer}
            if prompt := item.prompt.as_dicts():
                row["prompt"] = prompt
            if tools := item.prompt.tool_dicts():
                row["tools"] = tools
            row["answers"] = {name: answers[i].as_dict() for name, answers in task.answers.items()}
            yield row


def iter_verdict_rows(tasks: Sequence[ScoredTask]) -> Iterator[dict[str, Any]]:
    """Yield the JSON object of a line in `verdicts.jsonl` for each pair verdict of a judge."""
    for task in tasks:
        for opponent, verdicts in task.verdicts.items():
            for verdict in verdicts:
                yield {"task": task.name, "against": opponent, **verdict.as_dict()}


def describe_system(system: System) -> dict[str, Any]:
    """Return the name, reference and digests of an evaluated model as a JSON object."""
    base = {"base": system.base.digest, "base_id": system.base.id, "method": system.method} if system.base else {}
    return {"name": system.name, "ref": system.ref, "digest": system.record.digest, **base}


def describe_task_results(first: str, name: str, task: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines of text that summarise a task's results for the console.

    Args:
        first: the system that is compared with the others.
        task: see `compute_results`.
    """
    if "asks" in task:
        shares = ", ".join(
            f"{system} {format_interval(figures['score'], '.2f')}" for system, figures in task["systems"].items()
        )
        yield f"{name}: share that {task['yes']}, by {task['by']}: {shares}"
    elif len(task["systems"]) == 1:
        score = format_interval(task["systems"][first]["score"])
        yield f"{name}: {first} scores {score} on {pluralize(task['items'], 'item')}"
    by = {"exact": "", "proxy": f" by {task['by']}, a proxy"}.get(task["role"], f" by {task['by']}")
    for opponent, comparison in task["against"].items():
        scores = f"{comparison['first']['value']:.3f} against {comparison['second']['value']:.3f}"
        win_rate_text = f", win rate {format_interval(comparison['win_rate'])}" if "win_rate" in comparison else ""
        n = comparison["difference"]["n"]
        items = pluralize(comparison["items"], "item")
        items += f"{'' if n == comparison['items'] else f' from {n:,} sources'}{note_small_sample(n)}"
        yield (
            f"{name}: {first} against {opponent}{by}: {scores}, difference {format_interval(comparison['difference'])}"
            f"{win_rate_text}, p after Holm {comparison['p_holm']:.2g} on {items}"
        )
    for opponent in task["systems"]:
        if opponent != first and opponent not in task["against"]:
            yield f"{name}: {first} has not been judged against {opponent} yet"
    if near := task.get("near"):
        parts = [
            f"against {opponent} {format_interval(comparison['difference'])}"
            for opponent, comparison in near["others"].items()
        ]
        remark = f"; on the others {first} {', '.join(parts)}" if parts else ", which leaves no others"
        remark = remark if len(task["systems"]) > 1 else ""
        yield f"{name}: {pluralize(near['items'], 'item')} nearly the same as training data{remark}"
    if task["dropped"]:
        yield f"{name}: {pluralize(task['dropped'], 'item')} too long for some system, and left out"
    for system, figures in task["systems"].items():
        if "pass_at" in figures:
            shares = [f"pass@{share['k']} {format_interval(share)}" for share in figures["pass_at"]]
            if "majority" in figures:
                shares.append(f"majority vote {format_interval(figures['majority'])}")
            yield f"{name}: {system}, {', '.join(shares)}"
        if errors := figures.get("errors"):
            count_as = "count as one half" if "asks" in task else "score 0"
            yield f"{name}: no verdict on {pluralize(errors, 'answer')} of {system}, which {count_as}"
