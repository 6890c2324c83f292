"""Predicted beside observed, by hand."""

from __future__ import annotations

import pytest

from align.ops.calibration import calibration_bins
from align.ops.intervals import proportion


def test_calibration_bins_by_hand():
    bins = calibration_bins([0.05, 0.15, 0.85, 1.0, 0.9], [0, 1, 1, 0.5, 1], bins=2)
    assert [b.count for b in bins] == [2, 3]
    assert [b.predicted for b in bins] == [pytest.approx(0.1), pytest.approx(2.75 / 3)]
    assert [b.observed for b in bins] == [0.5, pytest.approx(2.5 / 3)]
    assert [(b.low, b.high) for b in bins] == [
        (found.low, found.high) for found in (proportion([0, 1]), proportion([1, 0.5, 1]))
    ]
    assert len(calibration_bins([0.99], [1])) == 1  # empty bins are left out
    with pytest.raises(ValueError, match="within"):
        calibration_bins([1.2], [1])
    with pytest.raises(ValueError, match="outcomes"):
        calibration_bins([0.5], [])


def test_pairs_of_one_ranking_are_one_observation():
    """Three pairs of each of two rankings: as two trials, not as six."""
    (alone,) = calibration_bins([0.6] * 6, [1, 1, 1, 0, 0, 0], bins=1)
    (together,) = calibration_bins([0.6] * 6, [1, 1, 1, 0, 0, 0], ["a"] * 3 + ["b"] * 3, bins=1)
    assert (alone.observed, together.observed, together.count) == (0.5, 0.5, 6)
    two = proportion([1, 0])
    assert (together.low, together.high) == (two.low, two.high)
    assert alone.high - alone.low < together.high - together.low
