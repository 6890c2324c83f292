"""Calibration figures, compared with values computed by hand."""

from __future__ import annotations

import math

import pytest

from align.ops.calibration import bin_predictions, compute_brier_scores, compute_calibration_error, compute_log_losses
from align.ops.intervals import proportion_interval


def test_calibration_bins_by_hand():
    bins = bin_predictions([0.05, 0.15, 0.85, 1.0, 0.9], [0, 1, 1, 0.5, 1], bin_count=2)
    assert [b.count for b in bins] == [2, 3]
    assert [b.predicted for b in bins] == [pytest.approx(0.1), pytest.approx(2.75 / 3)]
    assert [b.observed for b in bins] == [0.5, pytest.approx(2.5 / 3)]
    assert [(b.low, b.high) for b in bins] == [
        (interval.low, interval.high) for interval in (proportion_interval([0, 1]), proportion_interval([1, 0.5, 1]))
    ]
    assert len(bin_predictions([0.99], [1])) == 1  # empty bins are left out
    with pytest.raises(ValueError, match="within"):
        bin_predictions([1.2], [1])
    with pytest.raises(ValueError, match="outcomes"):
        bin_predictions([0.5], [])


def test_pairs_of_one_ranking_are_one_observation():
    """Three pairs from each of two rankings count as two trials, not as six."""
    (independent,) = bin_predictions([0.6] * 6, [1, 1, 1, 0, 0, 0], bin_count=1)
    (grouped,) = bin_predictions([0.6] * 6, [1, 1, 1, 0, 0, 0], ["a"] * 3 + ["b"] * 3, bin_count=1)
    assert (independent.observed, grouped.observed, grouped.count) == (0.5, 0.5, 6)
    interval_of_two = proportion_interval([1, 0])
    assert (grouped.low, grouped.high) == (interval_of_two.low, interval_of_two.high)
    assert independent.high - independent.low < grouped.high - grouped.low


def test_the_error_of_calibration_by_hand():
    """Two of three predictions of 0.8 come true, and the one of 0.1 does not."""
    bins = bin_predictions([0.8, 0.8, 0.8, 0.1], [1, 1, 0, 0])
    assert compute_calibration_error(bins) == pytest.approx((3 * (0.8 - 2 / 3) + 0.1) / 4)
    assert compute_calibration_error(bin_predictions([1.0, 0.0], [1, 0])) == 0
    with pytest.raises(ValueError, match="no predictions"):
        compute_calibration_error([])


def test_brier_and_log_loss_by_hand():
    odds = [math.log(3), math.log(3), -math.log(3), 0.0]
    assert compute_brier_scores(odds, [1, 0, 1, 0]) == pytest.approx([1 / 16, 9 / 16, 9 / 16, 1 / 4])
    losses = [-math.log(3 / 4), -math.log(1 / 4), -math.log(1 / 4), math.log(2)]
    assert compute_log_losses(odds, [1, 0, 1, 0]) == pytest.approx(losses)
    assert compute_log_losses([2000.0, -2000.0], [1, 1]).tolist() == [0, 2000], (
        "no probability is so small that it is lost"
    )
    assert compute_brier_scores([2000.0, -2000.0], [1, 1]).tolist() == [0, 1]
    with pytest.raises(ValueError, match="predictions for"):
        compute_log_losses([0.0], [1, 0])
