"""Worlds whose truth is known, and what `align.evals.stats` says of sets drawn from them.

Rows of a cluster share one uniform number with a chance of √icc each, so that two of them have that correlation and
each still wins with its own probability: the truth is exact, whatever the correlation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from align.evals.stats import (
    Rule,
    agreement,
    bounded_difference,
    bradley_terry,
    cluster_effect,
    decided,
    detectable,
    deviation,
    length_controlled,
    score_difference,
    share_difference,
    share_won,
    sign_flip,
)
from align.ops.intervals import Interval, normal_quantile

Floats = NDArray[np.float64]
Draw = np.random.Generator

LOWEST, HIGHEST = 0.92, 0.985
"""Between these lies how often an interval at 95 % covers: the bar of tests/unit/test_intervals.py."""
WRONGLY, FOUND = 0.03, 0.80
"""The most equal systems that `superior` may pass, and the fewest true differences of the detectable size it finds."""
ICCS = (0.0, 0.3, 0.8)
ANSWERS = 4
"""A prompt."""


class Case(NamedTuple):
    """A world and a figure of it.

    Attributes:
        name: of both.
        truth: what the interval should hold.
        figure: from one set of the world.
        highest: bar of the coverage, where it is another than usual.
    """

    name: str
    truth: float
    figure: Callable[[Draw], Interval]
    highest: float = HIGHEST


# Sets


def ids(clusters: int, answers: int = ANSWERS) -> list[int]:
    return np.repeat(np.arange(clusters), answers).tolist()


def uniforms(draw: Draw, clusters: int, icc: float, answers: int = ANSWERS) -> Floats:
    """One number a row, shape [clusters · answers]."""
    shared = draw.random((clusters, answers)) < math.sqrt(icc)
    return np.where(shared, draw.random((clusters, 1)), draw.random((clusters, answers))).ravel()


def judged(u: Floats, p: Floats | float, ties: float = 0.5) -> Floats:
    """Verdicts whose mean is p, ties at ½ among them: with p = ½, a share of `ties`/2."""
    half = ties * np.asarray(p) * (1 - np.asarray(p))
    return np.where(u < p - half, 1.0, np.where(u < p + half, 0.5, 0.0))


def outcomes(draw: Draw, n: int, icc: float, p: float, q: float, alike: float = 0.6, answers: int = ANSWERS):
    """Right and wrong of two systems; a share of `alike` prompts is as hard for both."""
    u, other = (uniforms(draw, n, icc, answers) for _ in range(2))
    same = np.repeat(draw.random(n) < alike, answers)
    return (u < p).astype(float), (np.where(same, u, other) < q).astype(float)


def scores(draw: Draw, n: int, icc: float, gap: float, skewed: bool = False, answers: int = ANSWERS):
    """Scores of two systems: the prompt's difficulty, what the prompt does to each, and noise of each answer."""
    make = (lambda shape: draw.exponential(1, shape) - 1) if skewed else (lambda shape: draw.normal(0, 1, shape))
    hard = np.repeat(draw.normal(0, 2, n), answers)
    first, second = (
        hard + math.sqrt(icc) * np.repeat(make(n), answers) + math.sqrt(1 - icc) * make(n * answers) for _ in range(2)
    )
    return first + gap, second


JUDGES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "log ratio": lambda d, r: 1 / (1 + np.exp(-1.2 * r)),
    "difference": lambda d, r: 1 / (1 + np.exp(-d / 120)),
    "saturating": lambda d, r: 1 / (1 + np.exp(-1.2 * np.tanh(d / 150))),
    "step": lambda d, r: 0.5 + 0.2 * np.sign(d),
}
"""How a judge between equals loves length: P(the first wins) from the difference and the log ratio of lengths."""


def lengths(draw: Draw, rows: int, longer: float = 0.5) -> tuple[Floats, Floats]:
    """Tokens of two answers to each prompt; the first are longer by a factor of e^`longer` in the median."""
    prompt = draw.normal(5, 0.5, rows)
    first, second = (np.exp(prompt + draw.normal(more, 0.5, rows)).round() + 1 for more in (longer, 0))
    return first, second


def length_lover(draw: Draw, n: int, icc: float, judge: str, theta: float = 0.0, answers: int = ANSWERS):
    """Verdicts of a judge that loves length between systems of which the first is better by θ (log-odds), and the
    lengths."""
    first, second = lengths(draw, n * answers)
    p = JUDGES[judge](first - second, np.log(first / second))
    p = p if theta == 0 else 1 / (1 + np.exp(-(theta + np.log(p / (1 - p)))))
    return judged(uniforms(draw, n, icc, answers), p), first, second


STRENGTHS = (1.5, 0.7, 0.2, -0.4, -0.8, -1.2)


def tournament(draw: Draw, n: int, icc: float):
    """Verdicts on four pairs a prompt, of six systems."""
    theta, systems = np.array(STRENGTHS), len(STRENGTHS)
    one = draw.integers(0, systems, n * ANSWERS)
    other = (one + draw.integers(1, systems, n * ANSWERS)) % systems
    p = 1 / (1 + np.exp(theta[other] - theta[one]))
    first, second = ([f"system {k}" for k in side.tolist()] for side in (one, other))
    return first, second, judged(uniforms(draw, n, icc), p)


def strength(draw: Draw, n: int, icc: float, system: int) -> Interval:
    found = bradley_terry(*tournament(draw, n, icc), clusters=ids(n))
    return found.strengths[found.systems.index(f"system {system}")]


KAPPA = 0.6


def rated(draw: Draw, n: int, icc: float) -> Interval:
    """Kappa of two raters: with a chance of `KAPPA` the second says what the first said, else what chance says."""
    shares = np.array([0.45, 0.2, 0.35])
    edges, values = shares.cumsum()[:2], np.array([1.0, 0.5, 0.0])
    one, other = (values[np.searchsorted(edges, uniforms(draw, n, icc))] for _ in range(2))
    found = agreement(one, np.where(uniforms(draw, n, icc) < KAPPA, one, other), ids(n)).kappa
    assert found
    return found


# Coverage


def cases(n: int) -> list[Case]:
    """Every interval, at each correlation within prompts."""
    found = []
    for icc in ICCS:
        at = f"ICC {icc}, {n} × {ANSWERS}"
        for p, q in ((0.5, 0.5), (0.6, 0.5), (0.95, 0.9)):
            found.append(Case(f"paired shares {p} and {q}, {at}", p - q,
                lambda draw, icc=icc, p=p, q=q: share_difference(*outcomes(draw, n, icc, p, q), ids(n))))  # fmt: skip
        for skewed in (False, True):
            found.append(Case(f"paired scores, {'skewed' if skewed else 'normal'}, {at}", 0.3,
                lambda draw, icc=icc, skewed=skewed: score_difference(
                    *scores(draw, n, icc, 0.3, skewed), ids(n))))  # fmt: skip
        for p in (0.5, 0.8):
            found.append(Case(f"win rate {p}, {at}", p, lambda draw, icc=icc, p=p: share_won(
                judged(uniforms(draw, n, icc), p), ids(n))))  # fmt: skip
        for theta in (0.0, 1.0):
            truth = 1 / (1 + math.exp(-theta))
            found.append(Case(f"length-controlled win rate {truth:.2f}, {at}", truth,
                lambda draw, icc=icc, theta=theta: length_controlled(
                    *length_lover(draw, n, icc, "log ratio", theta), ids(n)).controlled))  # fmt: skip
        for system in (0, 2):
            found.append(Case(f"strength {STRENGTHS[system]}, {at}", STRENGTHS[system],
                lambda draw, icc=icc, system=system: strength(draw, n, icc, system)))  # fmt: skip
        found.append(Case(f"kappa {KAPPA}, {at}", KAPPA, lambda draw, icc=icc: rated(draw, n, icc)))
    return found


def covered(case: Case, draws: int, seed: int = 0) -> dict[str, float]:
    """How often the interval holds the truth, the mean of the figure, and the interval's mean width."""
    draw = np.random.default_rng(seed)
    found = [case.figure(draw) for _ in range(draws)]
    ends = [(one.low, one.high) for one in found if one.low is not None and one.high is not None]
    hits = sum(low <= case.truth <= high for low, high in ends)
    return {
        "truth": case.truth, "mean": float(np.mean([one.value for one in found])), "coverage": hits / draws,
        "width": float(np.mean([high - low for low, high in ends])), "without": draws - len(ends),
    }  # fmt: skip


def within_bar(coverage: float, draws: int, highest: float = HIGHEST) -> bool:
    """Whether the coverage lies within the bar, give or take three standard errors of the simulation."""
    error = 3 * math.sqrt(coverage * (1 - coverage) / draws)
    return LOWEST - error <= coverage <= highest + error


# Gates


def equals(n: int) -> dict[str, Callable[[Draw], Interval]]:
    """Figures of two equal systems; the value of equality is 0, or ½ of a win rate."""
    found: dict[str, Callable[[Draw], Interval]] = {}
    for icc in ICCS:
        at = f"ICC {icc}, {n} × {ANSWERS}"
        for p in (0.5, 0.9):
            found[f"paired shares {p}, {at}"] = lambda draw, icc=icc, p=p: share_difference(
                *outcomes(draw, n, icc, p, p), ids(n)
            )
        found[f"paired scores, {at}"] = lambda draw, icc=icc: score_difference(*scores(draw, n, icc, 0.0), ids(n))
        found[f"win rate, {at}"] = lambda draw, icc=icc: minus_half(
            share_won(judged(uniforms(draw, n, icc), 0.5), ids(n))
        )
        found[f"length-controlled win rate, {at}"] = lambda draw, icc=icc: minus_half(
            length_controlled(*length_lover(draw, n, icc, "log ratio"), ids(n)).controlled
        )
    for p in (0.5, 0.9, 0.98):
        found[f"paired shares {p}, {n} × 1"] = lambda draw, p=p: share_difference(
            *outcomes(draw, n, 0.0, p, p, answers=1)
        )
    return found


MARGINS = (0.02, 0.05, 0.1)


def at_the_bound(n: int) -> dict[str, tuple[float, Callable[[Draw], Interval]]]:
    """What a gate decides on where the first system is worse by the margin, just what `not_worse` has to refuse: the
    margin, and the difference from one set. `others` is the share of prompts on which either wins beside it."""
    found: dict[str, tuple[float, Callable[[Draw], Interval]]] = {}
    for margin in MARGINS:
        for others in (0.0, 0.05, 0.2):
            found[f"checks, {margin} worse, {others} others each way, {n} × 1"] = (
                margin,
                (lambda draw, margin=margin, others=others: bounded_difference(*unlike(draw, n, margin, others))),
            )
        for icc in ICCS:
            found[f"checks, {margin} worse, ICC {icc}, {n} × {ANSWERS}"] = (
                margin,
                (
                    lambda draw, margin=margin, icc=icc: bounded_difference(
                        *outcomes(draw, n, icc, 0.9 - margin, 0.9), ids(n)
                    )
                ),
            )
            found[f"wins, {margin} worse, ICC {icc}, {n} × {ANSWERS}"] = (
                margin,
                (
                    lambda draw, margin=margin, icc=icc: won_and_lost(
                        judged(uniforms(draw, n, icc), 0.5 - margin / 2), ids(n)
                    )
                ),
            )
    return found


def unlike(draw: Draw, n: int, margin: float, others: float) -> tuple[Floats, Floats]:
    """Right and wrong of two systems that differ on few prompts: the second wins on more by the margin."""
    u = draw.random(n)
    first, second = u >= others + margin, (u < others + margin) | (u >= 2 * others + margin)
    return first.astype(float), second.astype(float)


def won_and_lost(verdicts: Floats, clusters: list[int]) -> Interval:
    return bounded_difference(verdicts, 1 - verdicts, clusters)


def minus_half(found: Interval) -> Interval:
    assert found.low is not None
    assert found.high is not None
    return Interval(found.value - 0.5, found.low - 0.5, found.high - 0.5, found.n)


def passed_wrongly(figure: Callable[[Draw], Interval], draws: int, rule: Rule, seed: int = 1) -> float:
    """How often a rule passes systems that it has to refuse: equal ones, or those at its bound."""
    draw = np.random.default_rng(seed)
    return sum(decided(rule, figure(draw)).outcome == "pass" for _ in range(draws)) / draws


class World(NamedTuple):
    """Sets in which the first system is better by a true difference.

    Attributes:
        name: what it is called.
        figure: the difference, from one set of n clusters with the given true difference; and `reach` of `detectable`.
    """

    name: str
    figure: Callable[[Draw, int, float], tuple[Interval, float]]


def right(draw: Draw, n: int, gap: float, icc: float = 0.0, answers: int = ANSWERS) -> tuple[Interval, float]:
    first, second = outcomes(draw, n, icc, 0.5 + gap, 0.5, answers=answers)
    of = ids(n, answers)
    return share_difference(first, second, of), cluster_effect(first - second, of)


def graded(draw: Draw, n: int, gap: float, icc: float = 0.0) -> tuple[Interval, float]:
    return score_difference(*scores(draw, n, icc, gap), ids(n)), 0.0


def preferred(draw: Draw, n: int, gap: float, icc: float = 0.0) -> tuple[Interval, float]:
    verdicts = judged(uniforms(draw, n, icc), 0.5 + gap)
    return minus_half(share_won(verdicts, ids(n))), cluster_effect(verdicts, ids(n)) / 2


def worlds() -> list[World]:
    found = [World("paired shares, one answer", partial(right, answers=1))]
    for icc in ICCS:
        for name, figure in (("paired shares", right), ("paired scores", graded), ("win rate", preferred)):
            found.append(World(f"{name}, ICC {icc}, × {ANSWERS}", partial(figure, icc=icc)))
    return found


def found_at_detectable(world: World, n: int, draws: int, seed: int = 2) -> float:
    """How often `superior` passes a true difference of the size that an earlier set of the same kind, of equal systems,
    stated to be detectable."""
    draw, rule, passes = np.random.default_rng(seed), Rule("superior"), 0
    for _ in range(draws):
        before, reach = world.figure(draw, n, 0.0)
        sd = deviation(before)
        assert sd is not None
        after, _ = world.figure(draw, n, detectable(sd, n, reach=reach))
        passes += decided(rule, after).outcome == "pass"
    return passes / draws


def null_p(n: int, icc: float, draws: int, seed: int = 3) -> float:
    """How often the sign-flip test has p ≤ 0.05 between equals; by its definition at most 0.05."""
    draw, hits = np.random.default_rng(seed), 0
    for _ in range(draws):
        first, second = outcomes(draw, n, icc, 0.7, 0.7)
        hits += sign_flip((first - second).reshape(n, ANSWERS).mean(axis=1)) <= 0.05
    return hits / draws


# Length


def length_control(judge: str, sets: int, n: int = 512, seed: int = 4) -> dict[str, float]:
    """A judge that loves length, between equals, one answer a prompt."""
    draw = np.random.default_rng(seed)
    found = [length_controlled(*length_lover(draw, n, 0.0, judge, answers=1)) for _ in range(sets)]
    hits = [one.controlled.low <= 0.5 <= one.controlled.high for one in found]  # type: ignore[operator]
    return {
        "raw": float(np.mean([one.raw.value for one in found])),
        "controlled": float(np.mean([one.controlled.value for one in found])),
        "sd": float(np.std([one.controlled.value for one in found])), "coverage": float(np.mean(hits)),
    }  # fmt: skip


# What does not hold: the alternatives that the bars are to refuse


def percentile_bootstrap(x: Floats, draw: Draw, resamples: int = 500) -> Interval:
    means = x[draw.integers(0, x.size, (resamples, x.size))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return Interval(float(x.mean()), low, high, x.size)


def rows_as_prompts(first: Floats, second: Floats) -> Interval:
    """Each answer counted as a prompt of its own."""
    return share_difference(first, second)


def unpaired(first: Floats, second: Floats) -> Interval:
    """The z interval of the difference of two independent means."""
    value = float(first.mean() - second.mean())
    half = normal_quantile(0.95) * math.sqrt(first.var(ddof=1) / first.size + second.var(ddof=1) / second.size)
    return Interval(value, value - half, value + half, first.size)


def wrong_cases(n: int = 64) -> dict[str, Case]:
    """The three of them."""
    return {
        "percentile bootstrap": Case("win rate 0.95, 32 × 1", 0.95, lambda draw: percentile_bootstrap(
            (draw.random(32) < 0.95).astype(float), draw)),
        "answers as prompts": Case(f"paired shares 0.6 and 0.5, ICC 0.8, {n} × {ANSWERS}", 0.1, lambda draw:
            rows_as_prompts(*outcomes(draw, n, 0.8, 0.6, 0.5))),
        "unpaired z": Case(f"paired shares 0.6 and 0.5, {n} × 1", 0.1, lambda draw:
            unpaired(*outcomes(draw, n, 0.0, 0.6, 0.5, answers=1))),
    }  # fmt: skip


def power_of(difference: Callable[[Floats, Floats], Interval], n: int, draws: int, seed: int = 5) -> float:
    """How often a difference of five points on n prompts is found, where nine in ten are as hard for both."""
    draw, rule = np.random.default_rng(seed), Rule("superior")
    sets = (outcomes(draw, n, 0.0, 0.7, 0.65, alike=0.9, answers=1) for _ in range(draws))
    return sum(decided(rule, difference(*pair)).outcome == "pass" for pair in sets) / draws


def paired(first: Floats, second: Floats) -> Interval:
    return share_difference(first, second)
