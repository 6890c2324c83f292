"""The win rate at equal lengths: effects that it removes, effects that it keeps, and edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.evals.stats.length_control import control_for_length
from align.evals.stats.verdicts import compute_win_rate
from align.ops.intervals import Interval

DRAW = np.random.default_rng(0)
FIRST, SECOND = (np.exp(DRAW.normal(m, 0.6, 4000)).round() for m in (5.4, 5.0))
RATIO = np.log1p(FIRST) - np.log1p(SECOND)


def compute_verdicts(log_odds: np.ndarray) -> np.ndarray:
    """Return chances as verdicts: a judge's expectation, without noise."""
    return 1 / (1 + np.exp(-log_odds))


def test_a_taste_for_length_is_taken_out_and_measured():
    """The fit recovers θ = 0.8 and a slope of 1.1 by the arctangent of the ratio over its deviation."""
    verdicts = compute_verdicts(0.8 + 1.1 * np.arctan(RATIO / RATIO.std()))
    estimate = control_for_length(verdicts, FIRST, SECOND)
    assert estimate.controlled.value == pytest.approx(1 / (1 + math.exp(-0.8)), abs=1e-3)
    assert estimate.slope.value == pytest.approx(1.1, abs=2e-3)
    assert estimate.raw.value > estimate.controlled.value + 0.03


def test_a_judge_without_a_taste_is_left_alone():
    verdicts = DRAW.permutation([1.0] * 2400 + [0.5] * 400 + [0.0] * 1200)
    estimate = control_for_length(verdicts, FIRST, SECOND)
    assert estimate.controlled.value == pytest.approx(estimate.raw.value, abs=0.02)
    assert estimate.slope.low < 0 < estimate.slope.high


def test_swapping_the_systems_mirrors_it():
    verdicts = np.where(DRAW.random(300) < compute_verdicts(RATIO[:300]), 1.0, 0.0)
    estimate = control_for_length(verdicts, FIRST[:300], SECOND[:300])
    swapped = control_for_length(1 - verdicts, SECOND[:300], FIRST[:300])
    assert estimate.controlled.value == pytest.approx(1 - swapped.controlled.value)
    assert (estimate.controlled.low, estimate.controlled.high) == pytest.approx(
        (1 - swapped.controlled.high, 1 - swapped.controlled.low)
    )
    assert estimate.slope.value == pytest.approx(swapped.slope.value)


def test_the_unit_of_length_hardly_matters():
    verdicts = np.where(DRAW.random(500) < compute_verdicts(RATIO[:500]), 1.0, 0.0)
    tokens = control_for_length(verdicts, FIRST[:500], SECOND[:500]).controlled.value
    assert control_for_length(verdicts, 4 * FIRST[:500], 4 * SECOND[:500]).controlled.value == pytest.approx(
        tokens, abs=1e-3
    )


def test_copies_of_a_prompt_are_no_further_evidence():
    verdicts = np.where(DRAW.random(100) < compute_verdicts(RATIO[:100]), 1.0, 0.0)
    ids = list(range(100))
    original = control_for_length(verdicts, FIRST[:100], SECOND[:100], ids)
    copied = control_for_length(np.tile(verdicts, 4), np.tile(FIRST[:100], 4), np.tile(SECOND[:100], 4), ids * 4)
    for interval, copied_interval in ((original.controlled, copied.controlled), (original.slope, copied.slope)):
        assert (interval.value, interval.low, interval.high, interval.n) == pytest.approx(
            (copied_interval.value, copied_interval.low, copied_interval.high, copied_interval.n)
        )
    unclustered = control_for_length(np.tile(verdicts, 4), np.tile(FIRST[:100], 4), np.tile(SECOND[:100], 4)).controlled
    assert unclustered.high - unclustered.low < 0.6 * (original.controlled.high - original.controlled.low)


# The edges


def test_equal_lengths_leave_the_win_rate():
    estimate = control_for_length([1, 0, 0.5, 1], [9, 5, 7, 3], [9, 5, 7, 3])
    assert estimate.controlled == estimate.raw == compute_win_rate([1, 0, 0.5, 1])
    assert estimate.slope == Interval(0.0, None, None, 4)


def test_a_constant_ratio_says_nothing():
    """Each first answer has twice the length, so that the effects of length and quality cannot be separated."""
    lengths = 2.0 ** np.arange(3, 11)
    estimate = control_for_length([1, 1, 0, 1, 1, 0.5, 1, 1], 2 * lengths + 1, lengths)
    assert (estimate.controlled.low, estimate.controlled.high) == (0.0, 1.0)
    assert estimate.controlled.value == estimate.raw.value
    assert estimate.slope.low is None


@pytest.mark.parametrize("verdict", [0.0, 0.5, 1.0])
def test_equal_verdicts_keep_the_interval_of_the_win_rate(verdict: float):
    estimate = control_for_length([verdict] * 30, FIRST[:30], SECOND[:30])
    assert estimate.controlled == estimate.raw
    assert estimate.raw.value == verdict


def test_length_that_decides_every_verdict_has_a_bounded_slope():
    """The longer answer always wins: the likelihood's maximum lies at infinity, and the ridge keeps the fit finite."""
    verdicts = np.where(RATIO[:400] > 0, 1.0, 0.0)
    estimate = control_for_length(verdicts, FIRST[:400], SECOND[:400])
    assert 5 < estimate.slope.value < 50
    assert estimate.controlled.low < 0.5 < estimate.controlled.high
    assert estimate.controlled.low < estimate.controlled.high


@pytest.mark.parametrize("clusters", [["a"] * 6, ["a", "a", "a", "b", "b", "b"]])
def test_one_cluster_and_two_say_nothing(clusters: list[str]):
    estimate = control_for_length([1, 0, 1, 1, 0, 0.5], FIRST[:6], SECOND[:6], clusters)
    assert (estimate.controlled.low, estimate.controlled.high) == (0.0, 1.0)
    assert estimate.slope.low is None


def test_one_verdict_has_the_interval_of_one():
    assert control_for_length([1], [30], [20]).controlled == compute_win_rate([1])


@pytest.mark.parametrize(
    ("verdicts", "first", "second", "message"),
    [
        ([], [], [], "verdicts has shape"),
        ([1, 0], [3], [3, 4], "first_lengths has 1 rows and verdicts has 2"),
        ([1, 0], [3, 4], [3, math.nan], "second_lengths is nan in row 1"),
        ([1, 0], [3, -4], [3, 4], r"first_lengths is -4\.0 in row 1"),
        ([1, 2], [3, 4], [3, 4], r"verdicts is 2\.0 in row 1"),
    ],
)
def test_what_is_no_verdict_or_length_is_refused(verdicts, first, second, message):
    with pytest.raises(ValueError, match=message):
        control_for_length(verdicts, first, second)
