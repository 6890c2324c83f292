"""Two systems on the same prompts: by hand, compared with brute force, and at the edges; Holm's rule."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from align.evals.stats.paired import (
    adjust_by_holm,
    compare_scores,
    compare_shares,
    compute_score_difference,
    compute_share_difference,
    compute_sign_flip_p,
)
from align.ops.intervals import mean_interval


def test_shares_by_hand():
    """Ten prompts: six right by the first alone, one by the second alone, three alike. p = 2·(1 + 7)/2⁷."""
    first = [1] * 6 + [0] + [1, 1, 0]
    second = [0] * 6 + [1] + [1, 1, 0]
    comparison = compare_shares(first, second)
    assert (comparison.first.value, comparison.second.value, comparison.difference.value) == (0.8, 0.3, 0.5)
    assert (comparison.better, comparison.worse, comparison.equal) == (6, 1, 3)
    assert comparison.p == pytest.approx(2 * 8 / 128)
    assert comparison.difference.n == 10


def test_scores_that_are_equal_up_to_rounding_show_no_difference() -> None:
    """Each prompt has three answers, whose scores are summed in another order."""
    first = [0.1, 0.2, 0.3] * 40 + [1.0] * 3
    second = [0.3, 0.2, 0.1] * 40 + [1.0] * 3
    prompts = [str(i // 3) for i in range(len(first))]
    comparison = compare_scores(first, second, prompts)
    assert (comparison.difference.value, comparison.difference.low, comparison.p) == (0.0, None, 1.0)
    assert comparison.equal == 41
    assert compute_score_difference(first, second, prompts) == comparison.difference
    assert compute_score_difference([1000.1, 1000.2] * 9, [1000.0, 1000.1] * 9).low is None


def test_scores_have_students_interval_of_the_differences():
    first = np.array([3.0, 5, 2, 9])
    second = np.array([1.0, 4, 3, 5])
    comparison = compare_scores(first, second)
    assert comparison.difference == mean_interval(first - second)
    assert (comparison.better, comparison.worse) == (3, 1)
    # Of the 16 sums ±2 ±1 ±1 ±4 one is 8 and two are 6; with their mirror images six are as far from 0 as the sum, 6.
    assert comparison.p == 6 / 16


def test_a_cluster_counts_once():
    """Prompt a has a difference of 1 in all of three answers, b of 0 in one: the mean of 1 and 0."""
    comparison = compare_shares([1, 1, 1, 1], [0, 0, 0, 1], ["a", "a", "a", "b"])
    assert (comparison.difference.value, comparison.difference.n) == (0.5, 2)
    assert comparison.p == 1.0  # only one cluster differs


def test_swapping_the_systems_turns_the_difference():
    draw = np.random.default_rng(0)
    for compare in (compare_shares, compare_scores):
        a = draw.random(30)
        b = draw.random(30)
        comparison = compare(a, b)
        swapped = compare(b, a)
        assert (comparison.first, comparison.second, comparison.p) == (swapped.second, swapped.first, swapped.p)
        ends = (swapped.difference.high, swapped.difference.low)
        assert (-comparison.difference.low, -comparison.difference.high) == pytest.approx(ends)


def test_the_difference_alone_is_that_of_the_comparison():
    draw = np.random.default_rng(2)
    a = draw.random(30)
    b = draw.random(30)
    ids = [k // 3 for k in range(30)]
    assert compute_share_difference(a, b, ids, 0.9) == compare_shares(a, b, ids, 0.9).difference
    assert compute_score_difference(a, b, ids, 0.9) == compare_scores(a, b, ids, 0.9).difference


def test_pairing_takes_out_the_difficulty_of_prompts():
    draw = np.random.default_rng(1)
    difficulties = draw.normal(0, 10, 200)
    noise = draw.normal(0, 0.1, 200)
    comparison = compare_scores(difficulties + 0.1 + noise, difficulties)
    assert comparison.difference.low > 0
    assert comparison.first.low < comparison.second.high  # the two intervals overlap
    assert comparison.p < 0.001


# The edges


@pytest.mark.parametrize("n", [1, 2, 40])
def test_equal_answers_are_no_difference(n: int):
    shares = compare_shares([1.0] * n, [1.0] * n)
    scores = compare_scores([3.5] * n, [3.5] * n)
    assert (shares.p, scores.p) == (1.0, 1.0)
    assert shares.difference.low < 0 < shares.difference.high
    assert (scores.difference.low, scores.difference.high) == (None, None)


def test_winning_all_has_an_interval_among_shares_and_none_among_scores():
    comparison = compare_shares([1] * 20, [0] * 20)
    assert comparison.difference.value == 1
    assert 0.5 < comparison.difference.low < 1
    assert comparison.difference.high == 1
    assert comparison.p == pytest.approx(2 / 2**20)
    assert compare_scores([2.0] * 20, [1.0] * 20).difference.low is None


def test_one_cluster_shows_nothing():
    comparison = compare_shares([1, 1, 1, 0], [0, 0, 1, 0], ["a"] * 4)
    assert comparison.p == 1.0
    assert comparison.difference.low < 0 < comparison.difference.high
    assert compare_scores([1, 2, 3], [0, 0, 0], ["a"] * 3).difference.low is None


@pytest.mark.parametrize("compare", [compare_shares, compare_scores])
@pytest.mark.parametrize(
    ("first", "second", "clusters", "message"),
    [
        ([], [], None, "first has shape"),
        ([1, 0], [1], None, "second has 1 rows and first has 2"),
        ([1, math.nan], [1, 0], None, "first is nan in row 1"),
        ([1, 0], [math.inf, 0], None, "second is inf in row 0"),
        ([1, 0], [1, 0], ["a", "b", "c"], "3 cluster ids for 2 rows"),
    ],
)
def test_what_cannot_be_compared_is_refused(compare, first, second, clusters, message):
    with pytest.raises(ValueError, match=message):
        compare(first, second, clusters)


def test_scores_are_no_shares():
    with pytest.raises(ValueError, match=r"second is -0\.5 in row 1"):
        compare_shares([1, 0], [1, -0.5])


# Flips of signs


@pytest.mark.parametrize("size", [2, 5, 9])
def test_every_flip_is_counted(size: int):
    differences = np.random.default_rng(size).normal(0.5, 1, size)
    sums = [abs(sum(s * x for s, x in zip(signs, differences, strict=True))) for signs in product((1, -1), repeat=size)]
    assert compute_sign_flip_p(differences) == pytest.approx(
        np.mean([s >= abs(differences.sum()) - 1e-9 for s in sums])
    )


def test_a_sample_of_flips_is_near_all_of_them():
    """Fourteen differences: a sample of their flips agrees with a count of all 2¹⁴, and is the same twice."""
    differences = np.array([1, 0.25, 0.5, -0.25, 0.75, 1, -0.5, 0.25, 0.5, -0.75, 1, 0.25, 0.25, -0.25])
    signs = 1 - 2 * ((np.arange(1 << 14)[:, None] >> np.arange(14)) & 1)
    exact = float((np.abs(signs @ differences) >= differences.sum() - 1e-9).mean())
    assert 0.01 < exact < 0.2
    assert compute_sign_flip_p(differences) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 9_999))
    assert compute_sign_flip_p(differences) == compute_sign_flip_p(differences)


def test_differences_of_one_size_are_mcnemars():
    for b, c in ((9, 1), (30, 14), (400, 350)):
        tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
        assert compute_sign_flip_p([0.25] * b + [-0.25] * c + [0.0] * 7) == pytest.approx(2 * tail)
    assert compute_sign_flip_p([1] * 7 + [-1] * 7) == 1.0


def test_the_smallest_p_is_never_zero():
    assert compute_sign_flip_p(np.random.default_rng(0).uniform(1, 2, 100)) == pytest.approx(1e-4)


def test_copies_of_an_answer_are_no_further_evidence():
    """McNemar's test on rows would take ten copies of six prompts for evidence."""
    first = [1] * 5 + [0]
    second = [0] * 5 + [1]
    ids = list(range(6))
    original = compare_shares(first, second, ids)
    copied = compare_shares(first * 10, second * 10, ids * 10)
    assert copied == original
    assert compare_shares(first * 10, second * 10).p < 1e-6 < original.p


# Several tasks


def test_holm_by_hand():
    """Sorted 0.005·5, 0.01·4, 0.03·3, 0.04·2 (raised to 0.09), 0.2·1; the order of tasks is kept."""
    p_values = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": 0.2}
    adjusted = adjust_by_holm(p_values)
    assert list(adjusted) == list(p_values)
    assert adjusted == pytest.approx({"a": 0.04, "b": 0.09, "c": 0.09, "d": 0.025, "e": 0.2})
    assert adjust_by_holm({"a": 0.7, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert adjust_by_holm({}) == {}
    assert adjust_by_holm({"only": 0.03}) == {"only": 0.03}


def test_holm_refuses_what_is_no_p():
    for p in (math.nan, -0.1, 1.1):
        with pytest.raises(ValueError, match="'b' is not within"):
            adjust_by_holm({"a": 0.5, "b": p})
