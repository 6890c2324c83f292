"""The win rate at equal lengths: what it leaves alone, what it takes out, and the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.evals.stats import compute_win_rate, control_for_length
from align.ops.intervals import Interval

DRAW = np.random.default_rng(0)
FIRST, SECOND = (np.exp(DRAW.normal(m, 0.6, 4000)).round() for m in (5.4, 5.0))
RATIO = np.log1p(FIRST) - np.log1p(SECOND)


def judged(log_odds: np.ndarray) -> np.ndarray:
    """Chances as verdicts: the expectation of a judge, without noise."""
    return 1 / (1 + np.exp(-log_odds))


def test_a_taste_for_length_is_taken_out_and_measured():
    """θ = 0.8 and a slope of 1.1 by the arctangent of the ratio over its deviation, found again."""
    verdicts = judged(0.8 + 1.1 * np.arctan(RATIO / RATIO.std()))
    found = control_for_length(verdicts, FIRST, SECOND)
    assert found.controlled.value == pytest.approx(1 / (1 + math.exp(-0.8)), abs=1e-3)
    assert found.slope.value == pytest.approx(1.1, abs=2e-3)
    assert found.raw.value > found.controlled.value + 0.03


def test_a_judge_without_a_taste_is_left_alone():
    verdicts = DRAW.permutation([1.0] * 2400 + [0.5] * 400 + [0.0] * 1200)
    found = control_for_length(verdicts, FIRST, SECOND)
    assert found.controlled.value == pytest.approx(found.raw.value, abs=0.02)
    assert found.slope.low < 0 < found.slope.high


def test_swapping_the_systems_mirrors_it():
    verdicts = np.where(DRAW.random(300) < judged(RATIO[:300]), 1.0, 0.0)
    one = control_for_length(verdicts, FIRST[:300], SECOND[:300])
    other = control_for_length(1 - verdicts, SECOND[:300], FIRST[:300])
    assert one.controlled.value == pytest.approx(1 - other.controlled.value)
    assert (one.controlled.low, one.controlled.high) == pytest.approx(
        (1 - other.controlled.high, 1 - other.controlled.low)
    )
    assert one.slope.value == pytest.approx(other.slope.value)


def test_the_unit_of_length_hardly_matters():
    verdicts = np.where(DRAW.random(500) < judged(RATIO[:500]), 1.0, 0.0)
    tokens = control_for_length(verdicts, FIRST[:500], SECOND[:500]).controlled.value
    assert control_for_length(verdicts, 4 * FIRST[:500], 4 * SECOND[:500]).controlled.value == pytest.approx(
        tokens, abs=1e-3
    )


def test_copies_of_a_prompt_are_no_further_evidence():
    verdicts, ids = np.where(DRAW.random(100) < judged(RATIO[:100]), 1.0, 0.0), list(range(100))
    alone = control_for_length(verdicts, FIRST[:100], SECOND[:100], ids)
    copied = control_for_length(np.tile(verdicts, 4), np.tile(FIRST[:100], 4), np.tile(SECOND[:100], 4), ids * 4)
    for one, other in ((alone.controlled, copied.controlled), (alone.slope, copied.slope)):
        assert (one.value, one.low, one.high, one.n) == pytest.approx((other.value, other.low, other.high, other.n))
    as_rows = control_for_length(np.tile(verdicts, 4), np.tile(FIRST[:100], 4), np.tile(SECOND[:100], 4)).controlled
    assert as_rows.high - as_rows.low < 0.6 * (alone.controlled.high - alone.controlled.low)


# The edges


def test_equal_lengths_leave_the_win_rate():
    found = control_for_length([1, 0, 0.5, 1], [9, 5, 7, 3], [9, 5, 7, 3])
    assert found.controlled == found.raw == compute_win_rate([1, 0, 0.5, 1])
    assert found.slope == Interval(0.0, None, None, 4)


def test_a_constant_ratio_says_nothing():
    """Each first answer has twice the length: nobody can tell length from worth."""
    lengths = 2.0 ** np.arange(3, 11)
    found = control_for_length([1, 1, 0, 1, 1, 0.5, 1, 1], 2 * lengths + 1, lengths)
    assert (found.controlled.low, found.controlled.high) == (0.0, 1.0)
    assert found.controlled.value == found.raw.value
    assert found.slope.low is None


@pytest.mark.parametrize("verdict", [0.0, 0.5, 1.0])
def test_equal_verdicts_keep_the_interval_of_the_win_rate(verdict: float):
    found = control_for_length([verdict] * 30, FIRST[:30], SECOND[:30])
    assert found.controlled == found.raw
    assert found.raw.value == verdict


def test_length_that_decides_every_verdict_has_a_bounded_slope():
    """Longer wins, always: the maximum of the likelihood lies at infinity, and the ridge keeps the fit finite."""
    verdicts = np.where(RATIO[:400] > 0, 1.0, 0.0)
    found = control_for_length(verdicts, FIRST[:400], SECOND[:400])
    assert 5 < found.slope.value < 50
    assert found.controlled.low < 0.5 < found.controlled.high
    assert found.controlled.low < found.controlled.high


@pytest.mark.parametrize("clusters", [["a"] * 6, ["a", "a", "a", "b", "b", "b"]])
def test_one_cluster_and_two_say_nothing(clusters: list[str]):
    found = control_for_length([1, 0, 1, 1, 0, 0.5], FIRST[:6], SECOND[:6], clusters)
    assert (found.controlled.low, found.controlled.high) == (0.0, 1.0)
    assert found.slope.low is None


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
