"""Data sets with known true values, and the behaviour of `align.evals.stats` on samples of them.

Rows of a cluster share one uniform number with probability √icc each, so any two of them have correlation icc, and each
still wins with its own probability: the true values are exact for every correlation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from align.evals.stats.bradley_terry import fit_bradley_terry
from align.evals.stats.decisions import DecisionRule, decide_by_rule
from align.evals.stats.judge_agreement import compute_agreement
from align.evals.stats.length_control import control_for_length
from align.evals.stats.paired import compute_score_difference, compute_share_difference, compute_sign_flip_p
from align.evals.stats.power import compute_cluster_effect, compute_detectable_difference, estimate_deviation
from align.evals.stats.verdicts import compute_win_rate
from align.ops.intervals import Interval, mean_interval, normal_quantile
from align.ops.looks import compute_boundary_quantile, compute_sequence_quantile, quantile_to_level

Floats = NDArray[np.float64]
Generator = np.random.Generator
Figure = Callable[[Generator], Interval]
"""Draws a sample and computes an interval from it."""

LOWEST_COVERAGE = 0.92
HIGHEST_COVERAGE = 0.985
"""Bounds of the coverage of an interval at 95 %, as in tests/unit/test_intervals.py."""
MAX_FALSE_PASSES = 0.03
"""Largest share of samples of equal systems in which `superior` may pass."""
MIN_POWER = 0.80
"""Least share of samples with a true difference of the detectable size in which `superior` has to pass."""
ICCS = (0.0, 0.3, 0.8)
ANSWERS = 4
"""To each prompt."""


class IntervalCase(NamedTuple):
    """A figure whose interval is tested.

    Attributes:
        name: of the data set and the figure.
        truth: value that the interval should contain.
        figure: computes the interval from a sample.
        highest: bound of the coverage, if it differs from the usual one.
    """

    name: str
    truth: float
    figure: Figure
    highest: float = HIGHEST_COVERAGE


# Samples


def build_cluster_ids(clusters: int, answers: int = ANSWERS) -> list[int]:
    return np.repeat(np.arange(clusters), answers).tolist()


def draw_uniforms(rng: Generator, clusters: int, icc: float, answers: int = ANSWERS) -> Floats:
    """Return correlated uniform numbers, shape [clusters · answers]."""
    is_shared = rng.random((clusters, answers)) < math.sqrt(icc)
    return np.where(is_shared, rng.random((clusters, 1)), rng.random((clusters, answers))).ravel()


def convert_to_verdicts(uniforms: Floats, mean: Floats | float, ties: float = 0.5) -> Floats:
    """Convert uniform numbers to verdicts of 0, ½ and 1 with the given mean. At mean ½, a share of `ties`/2 are ½."""
    half_width = ties * np.asarray(mean) * (1 - np.asarray(mean))
    return np.where(uniforms < mean - half_width, 1.0, np.where(uniforms < mean + half_width, 0.5, 0.0))


def draw_outcomes(
    rng: Generator,
    prompts: int,
    icc: float,
    first_share: float,
    second_share: float,
    common_difficulty: float = 0.6,
    answers: int = ANSWERS,
) -> tuple[Floats, Floats]:
    """Return right (1) and wrong (0) answers of two systems.

    Args:
        first_share: probability that an answer of the first system is right.
        second_share: the same for the second system.
        common_difficulty: share of prompts that are equally difficult for both systems.
    """
    first_uniforms = draw_uniforms(rng, prompts, icc, answers)
    independent_uniforms = draw_uniforms(rng, prompts, icc, answers)
    is_common = np.repeat(rng.random(prompts) < common_difficulty, answers)
    second_uniforms = np.where(is_common, first_uniforms, independent_uniforms)
    return (first_uniforms < first_share).astype(float), (second_uniforms < second_share).astype(float)


def draw_scores(
    rng: Generator, prompts: int, icc: float, gap: float, skewed: bool = False, answers: int = ANSWERS
) -> tuple[Floats, Floats]:
    """Return scores of two systems that differ by `gap`: difficulty of the prompt, effect of the prompt on each system,
    and noise of each answer."""

    def draw_noise(size: int) -> Floats:
        return rng.exponential(1, size) - 1 if skewed else rng.normal(0, 1, size)

    difficulty = np.repeat(rng.normal(0, 2, prompts), answers)
    first, second = (
        difficulty
        + math.sqrt(icc) * np.repeat(draw_noise(prompts), answers)
        + math.sqrt(1 - icc) * draw_noise(prompts * answers)
        for _ in range(2)
    )
    return first + gap, second


JUDGES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "log ratio": lambda difference, log_ratio: 1 / (1 + np.exp(-1.2 * log_ratio)),
    "difference": lambda difference, log_ratio: 1 / (1 + np.exp(-difference / 120)),
    "saturating": lambda difference, log_ratio: 1 / (1 + np.exp(-1.2 * np.tanh(difference / 150))),
    "step": lambda difference, log_ratio: 0.5 + 0.2 * np.sign(difference),
}
"""Length bias of judges: P(the first of two equally good answers wins), from the difference and the log ratio of their
lengths."""


def draw_lengths(rng: Generator, rows: int, log_factor: float = 0.5) -> tuple[Floats, Floats]:
    """Return the lengths in tokens of two answers to each prompt. The median of the first is larger by a factor of
    e^`log_factor`."""
    log_length = rng.normal(5, 0.5, rows)
    first, second = (np.exp(log_length + rng.normal(shift, 0.5, rows)).round() + 1 for shift in (log_factor, 0))
    return first, second


def draw_length_biased_verdicts(
    rng: Generator, prompts: int, icc: float, judge: str, advantage: float = 0.0, answers: int = ANSWERS
) -> tuple[Floats, Floats, Floats]:
    """Return the verdicts of a length-biased judge, and the lengths of both answers.

    Args:
        judge: a key of `JUDGES`.
        advantage: of the first system, in log-odds.
    """
    first_lengths, second_lengths = draw_lengths(rng, prompts * answers)
    win_probability = JUDGES[judge](first_lengths - second_lengths, np.log(first_lengths / second_lengths))
    if advantage:
        log_odds = np.log(win_probability / (1 - win_probability))
        win_probability = 1 / (1 + np.exp(-(advantage + log_odds)))
    verdicts = convert_to_verdicts(draw_uniforms(rng, prompts, icc, answers), win_probability)
    return verdicts, first_lengths, second_lengths


STRENGTHS = (1.5, 0.7, 0.2, -0.4, -0.8, -1.2)
"""Of six systems, in log-odds."""


def draw_tournament(rng: Generator, prompts: int, icc: float) -> tuple[list[str], list[str], Floats]:
    """Return the first system, the second system and the verdict of four comparisons a prompt."""
    strengths = np.array(STRENGTHS)
    systems = len(STRENGTHS)
    first = rng.integers(0, systems, prompts * ANSWERS)
    second = (first + rng.integers(1, systems, prompts * ANSWERS)) % systems
    win_probability = 1 / (1 + np.exp(strengths[second] - strengths[first]))
    first_names, second_names = ([f"system {k}" for k in side.tolist()] for side in (first, second))
    return first_names, second_names, convert_to_verdicts(draw_uniforms(rng, prompts, icc), win_probability)


def estimate_strength(rng: Generator, prompts: int, icc: float, system: int) -> Interval:
    """Return a system's Bradley-Terry strength in a sample.

    Args:
        system: index in `STRENGTHS`.
    """
    model = fit_bradley_terry(*draw_tournament(rng, prompts, icc), clusters=build_cluster_ids(prompts))
    return model.strengths[model.systems.index(f"system {system}")]


KAPPA = 0.6


def estimate_kappa(rng: Generator, prompts: int, icc: float) -> Interval:
    """Return kappa of two raters in a sample. The second rater copies the first with probability `KAPPA` and rates
    independently otherwise."""
    shares = np.array([0.45, 0.2, 0.35])
    edges = shares.cumsum()[:2]
    values = np.array([1.0, 0.5, 0.0])
    first, independent = (values[np.searchsorted(edges, draw_uniforms(rng, prompts, icc))] for _ in range(2))
    second = np.where(draw_uniforms(rng, prompts, icc) < KAPPA, first, independent)
    kappa = compute_agreement(first, second, build_cluster_ids(prompts)).kappa
    assert kappa
    return kappa


# Coverage


def build_interval_cases(prompts: int) -> list[IntervalCase]:
    """Return the cases of every interval, at each correlation within prompts."""
    cases = []
    clusters = build_cluster_ids(prompts)
    for icc in ICCS:
        suffix = f"ICC {icc}, {prompts} × {ANSWERS}"
        for first_share, second_share in ((0.5, 0.5), (0.6, 0.5), (0.95, 0.9)):

            def compute_share(
                rng: Generator, icc: float = icc, shares: tuple[float, float] = (first_share, second_share)
            ) -> Interval:
                return compute_share_difference(*draw_outcomes(rng, prompts, icc, *shares), clusters)

            name = f"paired shares {first_share} and {second_share}, {suffix}"
            cases.append(IntervalCase(name, first_share - second_share, compute_share))
        for skewed in (False, True):

            def compute_score(rng: Generator, icc: float = icc, skewed: bool = skewed) -> Interval:
                return compute_score_difference(*draw_scores(rng, prompts, icc, 0.3, skewed), clusters)

            name = f"paired scores, {'skewed' if skewed else 'normal'}, {suffix}"
            cases.append(IntervalCase(name, 0.3, compute_score))
        for win_rate in (0.5, 0.8):

            def compute_sample_win_rate(rng: Generator, icc: float = icc, win_rate: float = win_rate) -> Interval:
                return compute_win_rate(convert_to_verdicts(draw_uniforms(rng, prompts, icc), win_rate), clusters)

            cases.append(IntervalCase(f"win rate {win_rate}, {suffix}", win_rate, compute_sample_win_rate))
        for advantage in (0.0, 1.0):

            def compute_controlled(rng: Generator, icc: float = icc, advantage: float = advantage) -> Interval:
                sample = draw_length_biased_verdicts(rng, prompts, icc, "log ratio", advantage)
                return control_for_length(*sample, clusters).controlled

            truth = 1 / (1 + math.exp(-advantage))
            cases.append(IntervalCase(f"length-controlled win rate {truth:.2f}, {suffix}", truth, compute_controlled))
        for system in (0, 2):

            def compute_strength(rng: Generator, icc: float = icc, system: int = system) -> Interval:
                return estimate_strength(rng, prompts, icc, system)

            cases.append(IntervalCase(f"strength {STRENGTHS[system]}, {suffix}", STRENGTHS[system], compute_strength))

        def compute_kappa(rng: Generator, icc: float = icc) -> Interval:
            return estimate_kappa(rng, prompts, icc)

        cases.append(IntervalCase(f"kappa {KAPPA}, {suffix}", KAPPA, compute_kappa))
    return cases


CLUSTER_SIZES = (1, 2, 4, 8)
"""Numbers of answers to a prompt if prompts have unequal numbers."""
PAIRED_SHARES = ((0.5, 0.5), (0.6, 0.5), (0.95, 0.9))
LOWEST_PAIRED_COVERAGE = 0.94
HIGHEST_PAIRED_COVERAGE = 0.97
"""Bounds of the coverage of a paired difference of shares."""


def build_paired_cases(prompts: int) -> list[IntervalCase]:
    """Return the cases of a paired difference of shares, with four answers to each prompt and with unequal numbers."""
    equal_ids = np.repeat(np.arange(prompts), ANSWERS)
    sizes = np.resize(CLUSTER_SIZES, prompts)
    is_kept = (np.arange(max(CLUSTER_SIZES)) < sizes[:, None]).ravel()
    unequal_ids = np.repeat(np.arange(prompts), sizes)
    cases = []
    for icc in ICCS:
        for first_share, second_share in PAIRED_SHARES:

            def compute_equal(
                rng: Generator, icc: float = icc, shares: tuple[float, float] = (first_share, second_share)
            ) -> Interval:
                return compute_share_difference(*draw_outcomes(rng, prompts, icc, *shares), equal_ids.tolist())

            def compute_unequal(
                rng: Generator, icc: float = icc, shares: tuple[float, float] = (first_share, second_share)
            ) -> Interval:
                first, second = draw_outcomes(rng, prompts, icc, *shares, answers=max(CLUSTER_SIZES))
                return compute_share_difference(first[is_kept], second[is_kept], unequal_ids.tolist())

            for figure, answers in ((compute_equal, str(ANSWERS)), (compute_unequal, "1 to 8")):
                name = f"paired shares {first_share} and {second_share}, ICC {icc}, {prompts} × {answers}"
                cases.append(IntervalCase(name, first_share - second_share, figure))
    return cases


def build_skewed_cases(observations: int) -> list[IntervalCase]:
    """Return the cases of the mean of skewed and of heavy-tailed observations."""

    def draw_lognormal(rng: Generator) -> Interval:
        return mean_interval(rng.lognormal(0, 1, observations))

    def draw_exponential(rng: Generator) -> Interval:
        return mean_interval(rng.exponential(1, observations))

    def draw_heavy_tails(rng: Generator) -> Interval:
        return mean_interval(rng.standard_t(3, observations))

    return [
        IntervalCase(f"lognormal, σ = 1, {observations} observations", math.exp(0.5), draw_lognormal),
        IntervalCase(f"exponential, {observations} observations", 1.0, draw_exponential),
        IntervalCase(f"Student's with 3 degrees of freedom, {observations} observations", 0.0, draw_heavy_tails),
    ]


def measure_coverage(case: IntervalCase, draws: int, seed: int = 0) -> dict[str, float]:
    """Draw samples and return the share of intervals that contain the truth (`coverage`), the means of the figure and
    of the interval's width, that width over the width of a normal interval with the true standard deviation
    (`relative_width`), and the number of samples without an interval (`without`)."""
    rng = np.random.default_rng(seed)
    intervals = [case.figure(rng) for _ in range(draws)]
    bounds = [
        (interval.low, interval.high)
        for interval in intervals
        if interval.low is not None and interval.high is not None
    ]
    hits = sum(low <= case.truth <= high for low, high in bounds)
    values = [interval.value for interval in intervals]
    width = float(np.mean([high - low for low, high in bounds]))
    return {
        "truth": case.truth,
        "mean": float(np.mean(values)),
        "coverage": hits / draws,
        "width": width,
        "relative_width": width / (2 * normal_quantile(0.95) * float(np.std(values))),
        "without": draws - len(bounds),
    }


def is_within_bar(
    coverage: float, draws: int, lowest: float = LOWEST_COVERAGE, highest: float = HIGHEST_COVERAGE
) -> bool:
    """Return whether the coverage is within its bounds, plus or minus three standard errors of the simulation."""
    tolerance = 3 * math.sqrt(coverage * (1 - coverage) / draws)
    return lowest - tolerance <= coverage <= highest + tolerance


# Gates


def build_null_figures(prompts: int) -> dict[str, Figure]:
    """Return differences between equal systems by name. The true value is 0."""
    figures: dict[str, Figure] = {}
    clusters = build_cluster_ids(prompts)
    for icc in ICCS:
        suffix = f"ICC {icc}, {prompts} × {ANSWERS}"
        for share in (0.5, 0.9):

            def compute_share(rng: Generator, icc: float = icc, share: float = share) -> Interval:
                return compute_share_difference(*draw_outcomes(rng, prompts, icc, share, share), clusters)

            figures[f"paired shares {share}, {suffix}"] = compute_share

        def compute_score(rng: Generator, icc: float = icc) -> Interval:
            return compute_score_difference(*draw_scores(rng, prompts, icc, 0.0), clusters)

        def compute_sample_win_rate(rng: Generator, icc: float = icc) -> Interval:
            return subtract_half(compute_win_rate(convert_to_verdicts(draw_uniforms(rng, prompts, icc), 0.5), clusters))

        def compute_controlled(rng: Generator, icc: float = icc) -> Interval:
            sample = draw_length_biased_verdicts(rng, prompts, icc, "log ratio")
            return subtract_half(control_for_length(*sample, clusters).controlled)

        figures[f"paired scores, {suffix}"] = compute_score
        figures[f"win rate, {suffix}"] = compute_sample_win_rate
        figures[f"length-controlled win rate, {suffix}"] = compute_controlled
    for share in (0.5, 0.9, 0.98):

        def compute_single_answer(rng: Generator, share: float = share) -> Interval:
            return compute_share_difference(*draw_outcomes(rng, prompts, 0.0, share, share, answers=1))

        figures[f"paired shares {share}, {prompts} × 1"] = compute_single_answer
    return figures


MARGINS = (0.02, 0.05, 0.1)


def build_margin_figures(prompts: int) -> dict[str, tuple[float, Figure]]:
    """Return name → margin and difference, where the first system is worse by exactly the margin: the smallest
    difference that `not_worse` has to refuse."""
    figures: dict[str, tuple[float, Figure]] = {}
    clusters = build_cluster_ids(prompts)
    for margin in MARGINS:
        for one_sided_share in (0.0, 0.05, 0.2):

            def compute_single_answer(
                rng: Generator, margin: float = margin, one_sided_share: float = one_sided_share
            ) -> Interval:
                return compute_share_difference(*draw_rare_differences(rng, prompts, margin, one_sided_share))

            name = f"checks, {margin} worse, {one_sided_share} others each way, {prompts} × 1"
            figures[name] = (margin, compute_single_answer)
        for icc in ICCS:

            def compute_check(rng: Generator, margin: float = margin, icc: float = icc) -> Interval:
                return compute_share_difference(*draw_outcomes(rng, prompts, icc, 0.9 - margin, 0.9), clusters)

            def compute_win(rng: Generator, margin: float = margin, icc: float = icc) -> Interval:
                verdicts = convert_to_verdicts(draw_uniforms(rng, prompts, icc), 0.5 - margin / 2)
                return compute_share_difference(verdicts, 1 - verdicts, clusters)

            figures[f"checks, {margin} worse, ICC {icc}, {prompts} × {ANSWERS}"] = (margin, compute_check)
            figures[f"wins, {margin} worse, ICC {icc}, {prompts} × {ANSWERS}"] = (margin, compute_win)
    return figures


def draw_rare_differences(rng: Generator, prompts: int, margin: float, one_sided_share: float) -> tuple[Floats, Floats]:
    """Return right and wrong answers of two systems that agree on most prompts. The second is better by the margin.

    Args:
        one_sided_share: share of prompts on which only the first is right, and, besides the margin, only the second.
    """
    uniforms = rng.random(prompts)
    first = uniforms >= one_sided_share + margin
    second = (uniforms < one_sided_share + margin) | (uniforms >= 2 * one_sided_share + margin)
    return first.astype(float), second.astype(float)


def subtract_half(win_rate: Interval) -> Interval:
    assert win_rate.low is not None
    assert win_rate.high is not None
    return Interval(win_rate.value - 0.5, win_rate.low - 0.5, win_rate.high - 0.5, win_rate.n)


# Families of gates, and looks at growing data

LOOKS = 8


def measure_family_passes(gates: int, draws: int, is_adjusted: bool = True, prompts: int = 200, seed: int = 6) -> float:
    """Return the share of samples in which at least one of several `superior` gates between equal systems passes.

    Holm's rule passes none unless one passes at its first step, so that this step alone is computed.
    """
    rng = np.random.default_rng(seed)
    rule = DecisionRule("superior", level=1 - 0.05 / (gates if is_adjusted else 1))
    passes = 0
    for _ in range(draws):
        samples = (draw_outcomes(rng, prompts, 0.0, 0.7, 0.7, answers=1) for _ in range(gates))
        differences = (compute_share_difference(*sample, level=rule.level) for sample in samples)
        passes += any(decide_by_rule(rule, difference).outcome == "pass" for difference in differences)
    return passes / draws


def measure_passes_over_looks(
    compute_level: Callable[[Sequence[int]], float], draws: int, prompts: int = 400, seed: int = 7
) -> float:
    """Return the share of samples of equal systems in which `superior` passes at one of eight looks at growing data.

    Args:
        compute_level: returns the level of the interval, from the numbers of prompts at the looks so far.
        prompts: their number at the last look.
    """
    rng = np.random.default_rng(seed)
    counts = [prompts * (k + 1) // LOOKS for k in range(LOOKS)]
    rules = [DecisionRule("superior", level=compute_level(counts[: k + 1])) for k in range(LOOKS)]
    passes = 0
    for _ in range(draws):
        first, second = draw_outcomes(rng, prompts, 0.0, 0.7, 0.7, answers=1)
        passes += any(
            decide_by_rule(rule, compute_share_difference(first[:n], second[:n], level=rule.level)).outcome == "pass"
            for n, rule in zip(counts, rules, strict=True)
        )
    return passes / draws


LOOK_LEVELS: dict[str, Callable[[Sequence[int]], float]] = {
    "boundary of Lan and DeMets": lambda counts: quantile_to_level(compute_boundary_quantile(counts, 400)),
    "confidence sequence": lambda counts: quantile_to_level(compute_sequence_quantile(counts[-1], 100)),
}
"""Levels of the interval at each look of gates with `max_n`, and of gates on people's votes without."""
MAX_PASSES_OVER_LOOKS = 0.027
MAX_FAMILY_PASSES = 0.03


def measure_false_passes(figure: Figure, draws: int, rule: DecisionRule, seed: int = 1) -> float:
    """Return the share of samples in which a rule passes systems that it has to refuse."""
    rng = np.random.default_rng(seed)
    return sum(decide_by_rule(rule, figure(rng)).outcome == "pass" for _ in range(draws)) / draws


class Scenario(NamedTuple):
    """Two systems with a given true difference, by which the first is better.

    Attributes:
        name: in the report.
        figure: draws a sample of n prompts with a true difference. Returns the measured difference, and `reach` of
            `compute_detectable_difference`.
    """

    name: str
    figure: Callable[[Generator, int, float], tuple[Interval, float]]


def estimate_share_difference(
    rng: Generator, prompts: int, gap: float, icc: float = 0.0, answers: int = ANSWERS
) -> tuple[Interval, float]:
    first, second = draw_outcomes(rng, prompts, icc, 0.5 + gap, 0.5, answers=answers)
    clusters = build_cluster_ids(prompts, answers)
    return compute_share_difference(first, second, clusters), compute_cluster_effect(first - second, clusters)


def estimate_score_difference(rng: Generator, prompts: int, gap: float, icc: float = 0.0) -> tuple[Interval, float]:
    return compute_score_difference(*draw_scores(rng, prompts, icc, gap), build_cluster_ids(prompts)), 0.0


def estimate_win_rate_difference(rng: Generator, prompts: int, gap: float, icc: float = 0.0) -> tuple[Interval, float]:
    verdicts = convert_to_verdicts(draw_uniforms(rng, prompts, icc), 0.5 + gap)
    clusters = build_cluster_ids(prompts)
    return subtract_half(compute_win_rate(verdicts, clusters)), compute_cluster_effect(verdicts, clusters) / 2


def build_scenarios() -> list[Scenario]:
    scenarios = [Scenario("paired shares, one answer", partial(estimate_share_difference, answers=1))]
    figures = {
        "paired shares": estimate_share_difference,
        "paired scores": estimate_score_difference,
        "win rate": estimate_win_rate_difference,
    }
    for icc in ICCS:
        for name, figure in figures.items():
            scenarios.append(Scenario(f"{name}, ICC {icc}, × {ANSWERS}", partial(figure, icc=icc)))
    return scenarios


def measure_power_at_detectable(scenario: Scenario, prompts: int, draws: int, seed: int = 2) -> float:
    """Return the share of samples in which `superior` passes a true difference of the size that
    `compute_detectable_difference` computes from an earlier sample of equal systems."""
    rng = np.random.default_rng(seed)
    rule = DecisionRule("superior")
    passes = 0
    for _ in range(draws):
        pilot, reach = scenario.figure(rng, prompts, 0.0)
        sd = estimate_deviation(pilot)
        assert sd is not None
        difference, _ = scenario.figure(rng, prompts, compute_detectable_difference(sd, prompts, reach=reach))
        passes += decide_by_rule(rule, difference).outcome == "pass"
    return passes / draws


def measure_sign_flip_rejections(prompts: int, icc: float, draws: int, seed: int = 3) -> float:
    """Return the share of samples of equal systems in which the sign-flip test has p ≤ 0.05. Its definition bounds it
    by 0.05."""
    rng = np.random.default_rng(seed)
    rejections = 0
    for _ in range(draws):
        first, second = draw_outcomes(rng, prompts, icc, 0.7, 0.7)
        rejections += compute_sign_flip_p((first - second).reshape(prompts, ANSWERS).mean(axis=1)) <= 0.05
    return rejections / draws


# Length


def measure_length_control(judge: str, samples: int, prompts: int = 512, seed: int = 4) -> dict[str, float]:
    """Compare equal systems by a length-biased judge, with one answer a prompt.

    Returns:
        Means of the raw and the length-controlled win rate, standard deviation and coverage of the latter.
    """
    rng = np.random.default_rng(seed)
    win_rates = [
        control_for_length(*draw_length_biased_verdicts(rng, prompts, 0.0, judge, answers=1)) for _ in range(samples)
    ]
    hits = [win_rate.controlled.low <= 0.5 <= win_rate.controlled.high for win_rate in win_rates]  # type: ignore[operator]
    return {
        "raw": float(np.mean([win_rate.raw.value for win_rate in win_rates])),
        "controlled": float(np.mean([win_rate.controlled.value for win_rate in win_rates])),
        "sd": float(np.std([win_rate.controlled.value for win_rate in win_rates])),
        "coverage": float(np.mean(hits)),
    }


# Wrong methods, which the bars have to reject


def compute_percentile_bootstrap(values: Floats, rng: Generator, resamples: int = 500) -> Interval:
    means = values[rng.integers(0, values.size, (resamples, values.size))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return Interval(float(values.mean()), low, high, values.size)


def compute_unclustered_difference(first: Floats, second: Floats) -> Interval:
    """Return the paired difference with each answer as a prompt of its own."""
    return compute_share_difference(first, second)


def compute_unpaired_difference(first: Floats, second: Floats) -> Interval:
    """Return the z interval of the difference of two independent means."""
    difference = float(first.mean() - second.mean())
    half_width = normal_quantile(0.95) * math.sqrt(first.var(ddof=1) / first.size + second.var(ddof=1) / second.size)
    return Interval(difference, difference - half_width, difference + half_width, first.size)


def build_wrong_cases(prompts: int = 64) -> dict[str, IntervalCase]:
    """Return a case for each of three wrong methods."""

    def compute_bootstrap(rng: Generator) -> Interval:
        return compute_percentile_bootstrap((rng.random(32) < 0.95).astype(float), rng)

    def compute_unclustered(rng: Generator) -> Interval:
        return compute_unclustered_difference(*draw_outcomes(rng, prompts, 0.8, 0.6, 0.5))

    def compute_unpaired(rng: Generator) -> Interval:
        return compute_unpaired_difference(*draw_outcomes(rng, prompts, 0.0, 0.6, 0.5, answers=1))

    return {
        "percentile bootstrap": IntervalCase("win rate 0.95, 32 × 1", 0.95, compute_bootstrap),
        "answers as prompts": IntervalCase(
            f"paired shares 0.6 and 0.5, ICC 0.8, {prompts} × {ANSWERS}", 0.1, compute_unclustered
        ),
        "unpaired z": IntervalCase(f"paired shares 0.6 and 0.5, {prompts} × 1", 0.1, compute_unpaired),
    }


def measure_power(
    compute_difference: Callable[[Floats, Floats], Interval], prompts: int, draws: int, seed: int = 5
) -> float:
    """Return the share of samples in which `superior` passes a difference of five points, where nine in ten prompts are
    equally difficult for both systems."""
    rng = np.random.default_rng(seed)
    rule = DecisionRule("superior")
    samples = (draw_outcomes(rng, prompts, 0.0, 0.7, 0.65, common_difficulty=0.9, answers=1) for _ in range(draws))
    return sum(decide_by_rule(rule, compute_difference(*sample)).outcome == "pass" for sample in samples) / draws


def compute_paired_difference(first: Floats, second: Floats) -> Interval:
    return compute_share_difference(first, second)
