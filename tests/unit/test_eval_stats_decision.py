"""Decisions of a gate by an interval, and the number of prompts that a difference needs."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest

from align.evals.stats.decisions import DecisionRule, decide_by_rule
from align.evals.stats.paired import compare_scores, compare_shares
from align.evals.stats.power import (
    compute_cluster_effect,
    compute_detectable_difference,
    compute_sample_size,
    estimate_deviation,
    find_smallest_n,
)
from align.evals.stats.verdicts import compute_win_rate
from align.ops.intervals import Interval, mean_interval, t_quantile


def build_interval(low: float | None, high: float | None, n: int = 100) -> Interval:
    value = 0.0 if low is None or high is None else (low + high) / 2
    return Interval(value, low, high, n)


@pytest.mark.parametrize(
    ("rule", "low", "high", "outcome"),
    [
        (DecisionRule("superior"), 0.01, 0.09, "pass"),
        (DecisionRule("superior"), -0.01, 0.09, "undecided"),
        (DecisionRule("superior"), 0.0, 0.09, "undecided"),  # an end on the bound is no proof
        (DecisionRule("superior"), -0.09, -0.01, "fail"),
        (DecisionRule("superior", margin=0.05), 0.01, 0.09, "undecided"),
        (DecisionRule("superior", margin=0.05), 0.06, 0.09, "pass"),
        (DecisionRule("superior", margin=0.05), 0.01, 0.04, "fail"),
        (DecisionRule("superior", even=0.5), 0.51, 0.6, "pass"),
        (DecisionRule("superior", even=0.5), 0.4, 0.49, "fail"),
        (DecisionRule("not_worse", margin=0.05), -0.04, 0.03, "pass"),
        (DecisionRule("not_worse", margin=0.05), -0.06, 0.03, "undecided"),
        (DecisionRule("not_worse", margin=0.05), -0.2, -0.06, "fail"),
        (DecisionRule("not_worse", margin=0.05, even=0.5), 0.46, 0.6, "pass"),
        (DecisionRule("at_most", margin=0.05), 0.01, 0.04, "pass"),
        (DecisionRule("at_most", margin=0.05), 0.01, 0.06, "undecided"),
        (DecisionRule("at_most", margin=0.05), 0.06, 0.08, "fail"),
        (DecisionRule("superior"), None, None, "undecided"),
        (DecisionRule("superior", least_n=101), 0.01, 0.09, "undecided"),
        (DecisionRule("superior", least_n=101), -0.09, -0.01, "undecided"),
        (DecisionRule("superior", least_n=100), 0.01, 0.09, "pass"),
    ],
)
def test_an_interval_decides(rule: DecisionRule, low: float | None, high: float | None, outcome: str):
    decision = decide_by_rule(rule, build_interval(low, high))
    assert decision.outcome == outcome
    assert decision.figure == build_interval(low, high)
    assert outcome == "undecided" or decision.n_to_decide is None


def test_equal_systems_are_undecided_and_no_number_decides():
    decision = decide_by_rule(DecisionRule("superior"), compare_shares([1, 0] * 50, [1, 0] * 50).difference)
    assert (decision.outcome, decision.n_to_decide) == ("undecided", None)
    assert (
        decide_by_rule(DecisionRule("superior"), mean_interval([2.0] * 9)).outcome == "undecided"
    )  # without an interval


def test_the_number_that_would_decide_decides():
    """An undecided sample is repeated up to its `n_to_decide`. The interval then excludes the bound, with a margin for
    a power of 80 %."""
    differences = np.tile([0.4, 0.9, -0.7, 0.1, -0.2, 0.2, -0.1, 0.1], 4)
    decision = decide_by_rule(DecisionRule("superior"), mean_interval(differences))
    assert decision.outcome == "undecided"
    assert decision.n_to_decide is not None
    assert decision.n_to_decide > differences.size
    longer = mean_interval(np.resize(differences, decision.n_to_decide))
    assert longer.low is not None
    assert longer.low > 0
    share = longer.low / longer.value  # 1 − t/(t + z) of the value is left
    assert share == pytest.approx(1 - 1.96 / (1.96 + 0.8416), abs=0.04)


def test_a_bound_further_off_needs_fewer():
    shares = compute_win_rate([1] * 34 + [0] * 30)
    near, far = (
        decide_by_rule(DecisionRule("not_worse", margin=m, even=0.5), shares).n_to_decide for m in (0.02, 0.05)
    )
    assert near is not None
    assert far is not None
    assert near > far > 64


def test_the_least_number_is_never_undercut():
    assert decide_by_rule(DecisionRule("superior", least_n=300), build_interval(0.2, 0.3)).n_to_decide == 300
    assert decide_by_rule(DecisionRule("superior", least_n=300), mean_interval([2.0] * 9)).n_to_decide == 300
    assert decide_by_rule(DecisionRule("superior", least_n=20), build_interval(-0.01, 0.05)).n_to_decide > 100


def test_a_decision_is_json():
    decision = asdict(decide_by_rule(DecisionRule("superior"), Interval(0.1, 0.05, 0.15, 40)))
    expected = {"value": 0.1, "low": 0.05, "high": 0.15, "n": 40}
    assert decision.pop("figure") == expected
    assert decision == {"outcome": "pass", "bound": 0.0, "n_to_decide": None, "why": "", "level": 0.95, "looks": ()}


# Power


def test_a_deviation_comes_back_from_its_interval():
    half = np.random.default_rng(0).normal(0.3, 2.0, 25)
    differences = np.concatenate([half, 0.6 - half])  # without skewness, which widens intervals
    for level in (0.8, 0.95):
        assert estimate_deviation(mean_interval(differences, level), level) == pytest.approx(differences.std(ddof=1))
    paired = compare_scores(np.repeat(differences, 3), np.zeros(150), np.repeat(np.arange(50), 3).tolist())
    assert estimate_deviation(paired.difference) == pytest.approx(differences.std(ddof=1))
    assert estimate_deviation(mean_interval([1.0, 1.0])) is None


def test_detectable_by_hand():
    """n = 10,000: (1.960 + 0.842)·sd/100, slightly more for the deviation's own error."""
    assert compute_detectable_difference(0.5, 10_000) == pytest.approx(2.8016 * 0.5 / 100, rel=1e-3)
    assert compute_detectable_difference(0.5, 10_000, power=0.5) == pytest.approx(t_quantile(9999) * 0.5 / 100)
    assert compute_detectable_difference(0.5, 10_000, level=0.9, power=0.9) == pytest.approx(
        2.9264 * 0.5 / 100, rel=1e-3
    )
    assert compute_detectable_difference(0.0, 50) == 0.0


def test_a_bounded_difference_varies_more_the_larger_it_is():
    """The computed δ satisfies δ·√n = c·√(sd² + δ − δ²)."""
    delta = compute_detectable_difference(0.4, 400, reach=1.0)
    c = compute_detectable_difference(1.0, 400) * 20
    assert delta * 20 == pytest.approx(c * math.sqrt(0.16 + delta - delta**2))
    assert delta > compute_detectable_difference(0.4, 400)
    assert compute_detectable_difference(0.0, 400, reach=1.0) > 0
    assert compute_detectable_difference(0.0, 2, reach=1.0) <= 1


@pytest.mark.parametrize("distance", [0.3, -0.1, 0.02])
@pytest.mark.parametrize("reach", [0.0, 0.5])
def test_needed_is_the_fewest(distance: float, reach: float):
    n = compute_sample_size(0.45, distance, reach=reach)
    assert n is not None
    assert (
        compute_detectable_difference(0.45, n, reach=reach)
        <= abs(distance)
        < compute_detectable_difference(0.45, n - 1, reach=reach)
    )


def test_some_differences_no_number_finds():
    assert compute_sample_size(1.0, 0.0) is None
    assert compute_sample_size(1.0, 1e-9) is None
    assert compute_sample_size(0.0, 0.1) == 2


def test_the_effect_of_clusters():
    ids = [k // 4 for k in range(4000)]
    draw = np.random.default_rng(0)
    assert compute_cluster_effect(np.repeat(draw.normal(size=1000), 4), ids) == pytest.approx(1.0)
    assert compute_cluster_effect(draw.normal(size=4000), ids) == pytest.approx(0.25, abs=0.02)
    assert compute_cluster_effect([1.0, 2.0]) == 1.0
    assert compute_cluster_effect([1.0, 1.0, 1.0], ["a", "a", "b"]) == 1.0


def test_what_is_no_power_is_refused():
    for sd in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="sd="):
            compute_detectable_difference(sd, 10)
    with pytest.raises(ValueError, match="n=1"):
        compute_detectable_difference(1.0, 1)
    for power in (0.3, 1.0):
        with pytest.raises(ValueError, match="power="):
            compute_sample_size(1.0, 0.1, power=power)


def test_the_smallest_n_is_found_for_every_start_and_limit():
    for highest in range(1, 40):
        for above in range(highest):
            for enough in range(45):
                expected = max(enough, above + 1)
                found = find_smallest_n(lambda n, enough=enough: n >= enough, above, highest)
                assert found == (expected if enough <= highest else None), (enough, above, highest)
