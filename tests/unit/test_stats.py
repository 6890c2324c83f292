"""Intervals against hand-computed values and what they must not depend on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from align.evals import stats
from align.evals.stats import paired_bootstrap, per_prompt, wilson, win_rate


def test_bootstrap_of_two_prompts_by_enumeration():
    # Two differences 0 and 1: resampled means are 0, ½, 1 with probability ¼, ½, ¼, so the 95 % interval is [0, 1] and
    # the 40 % interval (30th to 70th percentile) is [½, ½].
    assert paired_bootstrap([1, 3], [1, 2], seed=0) == stats.Interval(0.5, 0.0, 1.0, 2)
    assert paired_bootstrap([0, 1], seed=0, level=0.4) == stats.Interval(0.5, 0.5, 0.5, 2)


def test_bootstrap_agrees_with_all_resamples_of_a_small_set():
    values = np.array([0.0, 1.0, 3.0, 7.0, 15.0])
    means = [np.mean(draw) for draw in itertools.product(values, repeat=5)]
    found = paired_bootstrap(values, seed=1, resamples=50_000, level=0.9)
    assert found.value == 5.2
    assert found.low == pytest.approx(np.quantile(means, 0.05), abs=0.15)
    assert found.high == pytest.approx(np.quantile(means, 0.95), abs=0.25)


def test_pairing_cancels_what_prompts_share():
    hard = np.random.default_rng(0).normal(0, 100, 50)
    found = paired_bootstrap(hard + 1, hard, seed=0)
    assert (found.low, found.high) == (pytest.approx(1), pytest.approx(1))  # unpaired it would be about ±40


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(3)
    hits = 0
    for seed in range(300):
        found = paired_bootstrap(generator.normal(2, 1, 40), seed=seed, resamples=500)
        hits += found.low <= 2 <= found.high
    assert 0.90 <= hits / 300 <= 0.98


def test_bootstrap_depends_on_seed_and_nothing_else(monkeypatch):
    values = np.arange(30.0)
    first = paired_bootstrap(values, seed=5)
    np.random.seed(99)
    assert paired_bootstrap(values, seed=5) == first
    assert paired_bootstrap(values, seed=6) != first
    # Memory is bounded by drawing in chunks; the chunks are no part of the result.
    monkeypatch.setattr(stats, "RESAMPLED_ELEMENTS", 30 * 7)
    assert paired_bootstrap(values, seed=5) == first


def test_bootstrap_of_another_statistic():
    found = paired_bootstrap([0, 0, 10], seed=0, statistic=np.median)
    assert (found.value, found.low, found.high) == (0, 0, 10)


@pytest.mark.parametrize(
    ("a", "b", "match"),
    [([], None, "at least one"), ([1, 2], [1], "differ"), ([1, np.nan], None, "prompt 1"), ([[1.0]], None, "shape")],
)
def test_bootstrap_refuses(a, b, match):
    with pytest.raises(ValueError, match=match):
        paired_bootstrap(a, b, seed=0)


def test_wilson_by_hand():
    found = wilson(8, 10)
    assert found.as_dict() == {
        "value": 0.8,
        "low": pytest.approx(0.49016, abs=1e-5),
        "high": pytest.approx(0.94331, abs=1e-5),
        "n": 10,
    }
    assert wilson(8, 10, level=0.5).low > found.low


def test_win_rate_counts_ties_as_half():
    assert win_rate([2, 1, 0], [1, 1, 1]).tolist() == [1, 0.5, 0]
    with pytest.raises(ValueError, match="NaN"):
        win_rate([np.nan], [1])
    with pytest.raises(ValueError, match="differ"):
        win_rate([1, 2], [1])


def test_per_prompt_means_in_order_of_appearance():
    assert per_prompt(["b", "a", "b"], [1, 5, 2]).tolist() == [1.5, 5]
