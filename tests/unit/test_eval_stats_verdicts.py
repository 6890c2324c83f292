"""Verdicts on pairs of answers and the win rate; `test_intervals.py` has the intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.evals.stats.verdicts import compute_win_rate, compute_wins, merge_swapped_verdicts
from align.ops.intervals import proportion_interval


def test_win_rate_counts_ties_as_half():
    assert compute_wins([2, 1, 0], [1, 1, 1]).tolist() == [1, 0.5, 0]
    with pytest.raises(ValueError, match="NaN"):
        compute_wins([np.nan], [1])
    with pytest.raises(ValueError, match="differ"):
        compute_wins([1, 2], [1])


def test_the_share_won_counts_each_cluster_once():
    """Prompt b wins all of three, prompt a half of one: the mean of 1 and ½, of two prompts."""
    win_rate = compute_win_rate([1, 0.5, 1, 1], ["b", "a", "b", "b"])
    assert (win_rate.value, win_rate.n) == (0.75, 2)
    assert win_rate == proportion_interval([1, 0.5])
    assert compute_win_rate([1, 0.5, 1, 1]).n == 4


def test_one_cluster_says_as_little_as_one_verdict():
    win_rate = compute_win_rate([1, 1, 0, 1] * 25, ["the same"] * 100)
    assert win_rate.n == 1
    assert win_rate.low is not None
    assert win_rate.high is not None
    assert win_rate.high - win_rate.low > 0.85


def test_what_survives_the_swap():
    assert merge_swapped_verdicts([1, 0, 0.5, 1, 0.5], [1, 0, 0.5, 0, 1]).tolist() == [1, 0, 0.5, 0.5, 0.5]


def test_a_judge_that_always_says_a_is_at_one_half():
    """The first shown answer wins: a verdict of 1 in the first order, and of 0 in the second."""
    win_rate = compute_win_rate(merge_swapped_verdicts([1.0] * 60, [0.0] * 60))
    assert win_rate.value == 0.5


@pytest.mark.parametrize(
    ("verdicts", "clusters", "message"),
    [
        ([], None, "verdicts has shape"),
        ([[1.0]], None, "verdicts has shape"),
        ([1.0, math.nan], None, "verdicts is nan in row 1"),
        ([1.0, 1.5], None, r"verdicts is 1\.5 in row 1"),
        ([1.0, 0.0], ["a"], "1 cluster ids for 2 rows"),
    ],
)
def test_what_is_no_verdict_is_refused(verdicts: list, clusters: list | None, message: str):
    with pytest.raises(ValueError, match=message):
        compute_win_rate(verdicts, clusters)
