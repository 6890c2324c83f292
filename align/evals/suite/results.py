"""What came of a suite: figures of each system and of the first beside each other one, task by task.

Systems are compared on the same items, and items of one cluster count as one. `answers.jsonl` is the evidence; this is
arithmetic on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from align.core.types import Message
from align.evals.judges.judge_verdict import JudgeVerdict, merge_verdicts, pair_orders
from align.evals.judges.llm_judge import describe_yes
from align.evals.stats import (
    bradley_terry,
    cluster_effect,
    detectable,
    deviation,
    holm,
    length_controlled,
    paired_scores,
    paired_shares,
    swap,
    win_rate,
)
from align.evals.suite.probes import Choices, figures_of
from align.evals.suite.systems import System
from align.evals.suite.tasks import Item
from align.ops.intervals import Interval, average_by_group, mean_interval, proportion_interval
from align.report import in_words
from align.report.figure_text import counted, few
from align.reward.checkers import CheckResult, compute_accuracy

GOES_ON = "— The user goes on: —\n{}\n— The answer: —"

SHARES = ("exact", "graded")
"""Roles of scores that are shares of 1."""


@dataclass(frozen=True, slots=True)
class Said:
    """An answer as it was scored.

    Attributes:
        id: in the store of answers; empty where a file gave it.
        text: without the reasoning that is hidden.
        score: the scorer's; of a check 1 where the answer has all that is asked, else 0; None of a judge that compares
            answers and scores none.
        ended: False where the answer was cut; None of a file, which does not say.
        reasoning: what is hidden; None where nothing is.
        checked: what a check says of it; None of a judge.
        weighed: what a probe found, see `align.evals.suite.probes`; None of an answer.
        p: a grader's probability of yes; None where it gives none, and of all others.
        error: why a grader says neither yes nor no, which scores one half; empty where it says one.
        before: of several turns what was said between the item's prompt and this answer.
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
        """The system's answers, one a turn."""
        return [*(message.content for message in self.before if message.role == "assistant"), self.text]

    @property
    def transcript(self) -> str:
        """All that follows the item's prompt, as one text."""
        parts = [
            message.content if message.role == "assistant" else GOES_ON.format(message.content)
            for message in self.before
        ]
        return "\n\n".join([*parts, self.text])

    def as_dict(self) -> dict[str, Any]:
        """What there is of it, as a line of `answers.jsonl` has it; of its checks those that do not hold."""
        made = {"text": self.text, "score": self.score, "ended": self.ended, "reasoning": self.reasoning}
        made |= {"id": self.id or None, "before": [m.as_dict() for m in self.before] or None, "weighed": self.weighed}
        made |= {"p": self.p, "error": self.error or None}
        if self.checked is not None:
            made["missed"] = {part.asks: part.found for part in self.checked.parts if not part.held} or None
            made["error"] = self.checked.error or None
            made["sandbox"] = self.checked.sandbox or None
        return {name: value for name, value in made.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Scored:
    """A task with all answers.

    Attributes:
        name: of the task.
        by: who scored: the judge's title, or `checks`.
        role: `exact` of checks, whose scores are shares; `graded` of a language model that answers a question about
            each answer, whose scores are shares of yes; `measured` of probes, whose scores are numbers that nobody
            judged; `gold` of a judge, `proxy` of one that a system was optimised against, `people` of people.
        items: that every system answered [n].
        said: system → its answers [n].
        verdicts: of a judge, other system → what is said of the first system's answers beside its own.
        dropped: items that some system could not be asked, whose prompt is too long for it.
        asks: the question of what is graded; else empty.
        figures: of a task of lm-eval, system → lm-eval's own figures, by its name of the metric.
        notes: on how it was scored, a sentence each.
    """

    name: str
    by: str
    role: str
    items: Sequence[Item]
    said: Mapping[str, Sequence[Said]]
    verdicts: Mapping[str, Sequence[JudgeVerdict]] = field(default_factory=dict)
    dropped: int = 0
    asks: str = ""
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def clusters(self) -> list[str]:
        return [item.cluster for item in self.items]

    @property
    def scored(self) -> bool:
        """Whether each answer has a score of its own."""
        return all(one.score is not None for said in self.said.values() for one in said)

    @property
    def in_shares(self) -> bool:
        """Whether what is compared lies between 0 and 1."""
        return self.role in SHARES or not self.scored

    def scores(self, system: str) -> list[float]:
        """
        Raises:
            ValueError: answers are compared, and none has a score.
        """
        found = [one.score for one in self.said[system] if one.score is not None]
        if len(found) < len(self.items):
            raise ValueError(f"{self.by} compares the answers to {self.name}, and scores none of {system}")
        return found

    def compared_with(self, other: str) -> Scored:
        """The items on which the first system is compared with another: all that are scored; of those that are judged,
        the ones with a verdict, for people may have judged some and not yet others."""
        if self.scored:
            return self
        said = merge_verdicts(self.verdicts.get(other, ()))
        return only(self, [item.id in said for item in self.items])

    def wins(self, other: str) -> list[float]:
        """Of each item how far the first system won against another: 1, ½ for a tie, 0, or a mean of such."""
        found = merge_verdicts(self.verdicts[other])
        return [found[item.id] for item in self.items]

    def pair(self, other: str) -> tuple[list[float], list[float]]:
        """What is compared, of the first system and of another: their scores; where there are none, wins and losses."""
        if self.scored:
            return self.scores(next(iter(self.said))), self.scores(other)
        return self.wins(other), [1 - won for won in self.wins(other)]

    @property
    def unsaid(self) -> int:
        """How many answers, or judgements of a pair, a judge said nothing readable of."""
        graded = sum(bool(one.error) for said in self.said.values() for one in said)
        return graded + sum(bool(one.error) for said in self.verdicts.values() for one in said)

    def if_unsaid(self, for_first: float) -> Scored:
        """The same if each answer or pair without a verdict had been this good for the first system: 1, or 0."""
        first = next(iter(self.said))
        said = {
            name: [
                replace(one, score=for_first if name == first else 1 - for_first) if one.error else one for one in of
            ]
            for name, of in self.said.items()
        }
        verdicts = dict[str, Sequence[JudgeVerdict]]()
        for other, of in self.verdicts.items():
            failed = {one.prompt for one in of if one.error}
            verdicts[other] = [one._replace(verdict=for_first) if one.prompt in failed else one for one in of]
        return replace(self, said=said, verdicts=verdicts)

    def lengths(self, system: str) -> list[int]:
        """Characters of all turns: systems have tokens of their own."""
        return [sum(map(len, one.answers)) for one in self.said[system]]


def results_of(tasks: Sequence[Scored], level: float, shown: int) -> dict[str, Any]:
    """By task: `systems`, and `against` with the first beside each other one, where there are verdicts. The p of each
    comparison is also given after Holm's step-down over all of them (`p_holm`).

    Args:
        shown: the most items of `regressions`, those on which the first system lost most.

    Raises:
        ValueError: a task has no items.
    """
    found = {task.name: of_task(task, level, shown) for task in tasks}
    p = {f"{name} {other}": c["p"] for name, task in found.items() for other, c in task["against"].items()}
    adjusted = holm(p)
    for name, task in found.items():
        for other, compared in task["against"].items():
            compared["p_holm"] = adjusted[f"{name} {other}"]
    return found


def of_task(task: Scored, level: float, shown: int) -> dict[str, Any]:
    names = [*task.said]
    first, others = names[0], names[1:]
    categories = dict.fromkeys(item.category for item in task.items if item.category)
    parts = {other: part for other in others if (part := task.compared_with(other)).items}
    return {
        "by": task.by, "role": task.role, **({"asks": task.asks, "yes": describe_yes(task.asks)} if task.asks else {}),
        "items": len(task.items), "dropped": task.dropped,
        "systems": {name: of_system(task, name, level) for name in names},
        "against": {other: against(part, first, other, level) for other, part in parts.items()},
        **({"strengths": strengths(task, level)} if len(parts) > 1 and task.verdicts else {}),
        "categories": {
            category: {
                other: beside(found, other, level)
                for other, part in parts.items()
                if (found := only(part, [item.category == category for item in part.items])).items
            }
            for category in categories
        },
        **nearly_trained_on(task, parts, level),
        "regressions": {other: regressions(part, other)[:shown] for other, part in parts.items()},
    }  # fmt: skip


def of_system(task: Scored, name: str, level: float) -> dict[str, Any]:
    """Figures of one system: its mean score; of checks, the share of items whose checks all hold, and IFEval's others
    beside it; of a probe its own, or lm-eval's."""
    said = task.said[name]
    if task.figures:
        return {**task.figures[name], "score": own_mean(task, name, level).as_dict()}
    weighed = [one.weighed for one in said if one.weighed is not None]
    if weighed:
        return {"score": own_mean(task, name, level).as_dict(), **figures_of(weighed)}
    told = [one.ended for one in said if one.ended is not None]
    results = [one.checked for one in said if one.checked is not None]
    return {
        **({"score": own_mean(task, name, level).as_dict()} if task.scored else {}),
        **(compute_accuracy(results)._asdict() if results else {}),
        **({"errors": sum(bool(one.error) for one in said)} if task.asks else {}),
        "characters": float(np.mean(task.lengths(name))),
        "cut": 1 - sum(told) / len(told) if told else None,
        "empty": sum(not one.text.strip() for one in said) / len(said),
    }  # fmt: skip


def own_mean(task: Scored, name: str, level: float) -> Interval:
    """A system's mean score, each cluster counted once."""
    scores = average_by_group(task.clusters, task.scores(name))[0]
    return proportion_interval(scores, level=level) if task.role in SHARES else mean_interval(scores, level)


def beside(task: Scored, other: str, level: float) -> dict[str, Any]:
    """The difference of the mean scores, first less other, paired by item; without scores, wins less losses."""
    compare = paired_shares if task.in_shares else paired_scores
    return asdict(compare(*task.pair(other), task.clusters, level))


def against(task: Scored, first: str, other: str, level: float) -> dict[str, Any]:
    """The same with the difference that so many items would show, and for a judge the win rate: a score has its units
    from the judge, a win has not."""
    found = beside(task, other, level)
    found["items"] = len(task.items)
    found["detectable"] = would_show(task, other, Interval(**found["difference"]), level)
    if task.verdicts:
        lengths = task.lengths(first), task.lengths(other)
        controlled = length_controlled(task.wins(other), *lengths, task.clusters, level)
        found |= {"win_rate": controlled.raw.as_dict(), "win_rate_at_equal_lengths": controlled.controlled.as_dict()}
        found |= of_orders(task, other, level)
        found["no_verdict"] = sum(bool(one.error) for one in task.verdicts[other])
    return found


def of_orders(task: Scored, other: str, level: float) -> dict[str, Any]:
    """What the order of the answers does to a judge, where it saw both."""
    both = pair_orders(task.verdicts[other])
    if not both:
        return {}
    clusters = [item.cluster for item in task.items if item.id in both]
    shown_first, shown_second = zip(*(both[item.id] for item in task.items if item.id in both), strict=True)
    found = swap(shown_first, shown_second, clusters, level)
    return {"swap": {"consistency": found.consistency.as_dict(), "shown_first": found.shown_first.as_dict()}}


def would_show(task: Scored, other: str, difference: Interval, level: float) -> float | None:
    """The difference that as many items find in four of five evaluations; None where too few tell how they vary."""
    sd = deviation(difference, level)
    if sd is None or difference.n < 2:
        return None
    reach = 0.0
    if task.in_shares:  # shares end at 0 and 1
        apart = [a - b for a, b in zip(*task.pair(other), strict=True)]
        reach = cluster_effect(apart, task.clusters)
    size = detectable(sd, difference.n, level, reach=reach)
    return None if task.in_shares and size >= 1 else size


def strengths(task: Scored, level: float) -> dict[str, Any]:
    """Bradley–Terry's strengths of all systems, from the wins of each pair; without scores, of the first system's."""
    names, rows = [*task.said], list[tuple[str, str, float, str]]()
    for i, a in enumerate(names if task.scored else names[:1]):
        for b in names[i + 1 :]:
            part = task.compared_with(b)
            verdicts = win_rate(task.scores(a), task.scores(b)).tolist() if task.scored else part.wins(b)
            rows += [(a, b, won, cluster) for won, cluster in zip(verdicts, part.clusters, strict=True)]
    a, b, won, clusters = zip(*rows, strict=True)
    return bradley_terry(a, b, won, clusters, level).as_dict()


def nearly_trained_on(task: Scored, parts: Mapping[str, Scored], level: float) -> dict[str, Any]:
    """How many items each system was nearly trained on, and the comparisons on the items that none was; nothing where
    there are no such items.

    Args:
        parts: other system → the items on which it is compared.
    """
    count = {name: sum(name in item.near for item in task.items) for name in task.said}
    near = sum(bool(item.near) for item in task.items)
    if not near:
        return {}
    apart = {other: only(part, [not item.near for item in part.items]) for other, part in parts.items()}
    against = {other: beside(part, other, level) for other, part in apart.items() if part.items}
    return {"near": {"items": near, "systems": count, "others": against}}


def only(task: Scored, which: Sequence[bool]) -> Scored:
    """Some of the items."""
    rows = [i for i, one in enumerate(which) if one]
    said = {name: [found[i] for i in rows] for name, found in task.said.items()}
    return replace(task, items=[task.items[i] for i in rows], said=said)


def regressions(task: Scored, other: str) -> list[dict[str, Any]]:
    """The items on which the first system lost most, largest loss first. A yes may be good or bad: of what is graded
    they are the items on which the two differ most, with `by` below 0 where the first one has the yes."""
    lost = [a - b for a, b in zip(*task.pair(other), strict=True)]
    sizes = [abs(by) if task.role == "graded" else -by for by in lost]
    worst = sorted((i for i, size in enumerate(sizes) if size > 0), key=lambda i: -sizes[i])
    return [{"id": task.items[i].id, "by": -lost[i]} for i in worst]


def list_evidence(tasks: Sequence[Scored]) -> Iterator[dict[str, Any]]:
    """Yield a row for each item: what was asked, and what every system said."""
    for task in tasks:
        for i, item in enumerate(task.items):
            answers = {name: one[i].as_dict() for name, one in task.said.items()}
            prompt = {"prompt": item.prompt.as_dicts(), "tools": item.prompt.tool_dicts()}
            about = {"task": task.name, "id": item.id, "cluster": item.cluster, "category": item.category}
            about |= {"near": dict(item.near)} if item.near else {}
            if isinstance(item.probe, Choices):
                about |= {"choices": [*item.probe.texts], "right": item.probe.answer}
            yield {**about, **{key: value for key, value in prompt.items() if value}, "answers": answers}


def list_verdicts(tasks: Sequence[Scored]) -> Iterator[dict[str, Any]]:
    """Yield a row for each verdict of a judge."""
    for task in tasks:
        for other, said in task.verdicts.items():
            yield from ({"task": task.name, "against": other, **one.as_dict()} for one in said)


def describe_system(system: System) -> dict[str, Any]:
    """Return what exactly answered, as JSON."""
    base = {"base": system.base.digest, "base_id": system.base.id, "method": system.method} if system.base else {}
    return {"name": system.name, "ref": system.ref, "digest": system.record.digest, **base}


def describe_task(first: str, name: str, task: Mapping[str, Any]) -> Iterator[str]:
    """Yield a task's results in words.

    Args:
        first: the system that is compared with the others.
        task: see `results_of`.
    """
    if "asks" in task:
        shares = ", ".join(f"{who} {in_words(found['score'], '.2f')}" for who, found in task["systems"].items())
        yield f"{name}: share that {task['yes']}, by {task['by']}: {shares}"
    by = {"exact": "", "proxy": f" by {task['by']}, a proxy"}.get(task["role"], f" by {task['by']}")
    for other, found in task["against"].items():
        scores = f"{found['first']['value']:.3f} against {found['second']['value']:.3f}"
        won = f", win rate {in_words(found['win_rate'])}" if "win_rate" in found else ""
        n, items = found["difference"]["n"], counted(found["items"], "item")
        items += f"{'' if n == found['items'] else f' from {n:,} sources'}{few(n)}"
        yield (
            f"{name}: {first} against {other}{by}: {scores}, difference {in_words(found['difference'])}{won}, "
            f"p after Holm {found['p_holm']:.2g} on {items}"
        )
    for other in task["systems"]:
        if other != first and other not in task["against"]:
            yield f"{name}: nobody has judged {first} against {other} yet"
    if near := task.get("near"):
        said = [f"against {other} {in_words(found['difference'])}" for other, found in near["others"].items()]
        others = f"; on the others {first} {', '.join(said)}" if said else ", which leaves no others"
        yield f"{name}: {counted(near['items'], 'item')} nearly what training saw{others}"
    if task["dropped"]:
        yield f"{name}: {counted(task['dropped'], 'item')} too long for some system, and asked of none"
    for system, found in task["systems"].items():
        if errors := found.get("errors"):
            count_as = "count as one half" if "asks" in task else "score 0"
            yield f"{name}: no verdict on {counted(errors, 'answer')} of {system}, which {count_as}"
