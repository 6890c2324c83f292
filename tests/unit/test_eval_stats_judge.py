"""Statistics of a judge: agreement, kappa, the swap of sides, and the preference for length."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest

from align.evals.stats.judge_agreement import compute_agreement, compute_judge_statistics, measure_swap_effect
from align.ops.agreement import cohen_kappas, compute_coefficient_interval
from align.ops.intervals import Interval, proportion_interval, t_quantile

TABLE = [[1.0, 1.0]] * 20 + [[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 10 + [[0.0, 0.0]] * 15
"""Cohen's textbook example: 35 of 50 agree, 0.5 by chance, κ = 0.4."""


def test_kappa_of_the_textbook():
    first_rater, second_rater = np.array(TABLE).T
    agreement = compute_agreement(first_rater, second_rater)
    assert agreement.kappa is not None
    assert agreement.kappa.value == pytest.approx(0.4)
    assert agreement.raw == proportion_interval([1] * 35 + [0] * 15)
    # Fleiss, Cohen and Everitt's (1969) standard error at these margins is 0.1270; here it is that of ln(1 − κ).
    factor = math.exp(t_quantile(49) * 0.1270 / 0.6)
    assert agreement.kappa.low == pytest.approx(1 - 0.6 * factor, abs=0.012)
    assert agreement.kappa.high == pytest.approx(1 - 0.6 / factor, abs=0.012)
    assert agreement.verdicts == agreement.kappa.n == 50


def test_kappas_of_many_tables_by_hand():
    kappas = cohen_kappas([[[20, 5], [10, 15]], [[0, 0], [0, 7]], [[5, 0], [0, 5]]])
    assert kappas.tolist() == pytest.approx([0.4, math.nan, 1.0], nan_ok=True)
    # Weights 0 1 4: one step of ten, of 24 rated 0 1 2 evenly by both.
    assert cohen_kappas([[[6, 2, 0], [2, 4, 2], [0, 2, 6]]], quadratic=True)[0] == pytest.approx(1 - 8 / 32)


def test_perfect_agreement_ends_where_unseen_disagreement_may_lie():
    agreement = compute_agreement([1, 0] * 20, [1, 0] * 20)
    assert agreement.kappa is not None
    assert (agreement.kappa.value, agreement.kappa.high) == (1.0, 1.0)
    assert agreement.kappa.low == pytest.approx(
        1 - 2 * 3.841459 / 43.841459, abs=1e-6
    )  # Wilson's 0 of 40, over ½ by chance
    assert compute_agreement([1, 0] * 3, [1, 0] * 3).kappa.low < agreement.kappa.low


def test_raters_who_always_say_one_thing_have_no_kappa():
    agreement = compute_agreement([1.0] * 12, [1.0] * 12)
    assert agreement.kappa is None
    assert agreement.raw.value == 1.0
    assert agreement.raw.low < 0.8


def test_agreement_counts_a_prompt_once():
    """Four copies of ten prompts count as ten prompts."""
    first_rater = [1, 0, 0.5, 1, 0, 1, 1, 0, 0, 0.5]
    second_rater = [1, 0, 0.5, 0, 0, 1, 0.5, 0, 1, 1]
    original = compute_agreement(first_rater, second_rater)
    copied = compute_agreement(first_rater * 4, second_rater * 4, list(range(10)) * 4)
    assert copied.raw == original.raw
    assert copied.kappa is not None
    assert original.kappa is not None
    assert (copied.kappa.value, copied.kappa.low, copied.kappa.high) == pytest.approx(
        (original.kappa.value, original.kappa.low, original.kappa.high)
    )
    assert (copied.verdicts, copied.kappa.n) == (40, 10)


def test_one_cluster_has_no_interval_of_kappa():
    agreement = compute_agreement([1, 0, 1, 0], [1, 0, 0, 0], ["p"] * 4)
    assert agreement.kappa is not None
    assert agreement.kappa.low is None
    assert agreement.raw.n == 1
    assert compute_coefficient_interval(0.5, [0.4]) == (None, None)
    assert compute_coefficient_interval(0.5, [0.4, math.nan]) == (None, None)
    assert compute_coefficient_interval(0.5, [0.5, 0.5]) == (None, None)


# The swap


def test_a_judge_that_always_says_a():
    swap = measure_swap_effect([1.0] * 60, [0.0] * 60)
    assert (swap.consistency.value, swap.shown_first.value, swap.win_rate.value) == (0.0, 1.0, 0.5)
    assert 0 < swap.consistency.high < 0.1
    assert swap.shown_first.low > 0.9


def test_a_judge_that_the_order_does_not_move():
    swap = measure_swap_effect([1, 0, 0.5, 1], [1, 0, 0.5, 1])
    assert (swap.consistency.value, swap.shown_first.value, swap.win_rate.value) == (1.0, 0.5, 0.625)


def test_half_a_change_is_one():
    """A win that becomes a tie is no consistent verdict, and leans to the first shown by a quarter."""
    swap = measure_swap_effect([1.0], [0.5])
    assert (swap.consistency.value, swap.shown_first.value, swap.win_rate.value) == (0.0, 0.75, 0.5)


# Failed verdicts


def test_no_verdict_equals_none_and_is_never_alike_by_chance():
    """Six of ten pairs agree, two of these as ties. Then the judge fails on one of the ties and on one that differs."""
    judge = [1, 1, 0, 0, 0.5, 0.5, 1, 0, 0.5, 1.0]
    people = [1, 1, 0, 0, 0.5, 0.5, 0, 1, 1, 0.5]
    assert compute_agreement(judge, people).raw.value == 0.6
    failed = [i in (5, 8) for i in range(10)]
    agreement = compute_agreement(judge, people, failed=failed)
    assert (agreement.raw.value, agreement.verdicts) == (0.5, 10)
    assert agreement.kappa is not None
    # By chance: 1 in 4 and 4 of ten, 0 in 3 and 3, a tie in 1 and 3, a failure in 2 and 0.
    assert agreement.kappa.value == pytest.approx(1 - 0.5 / (1 - 0.16 - 0.09 - 0.03))
    all_failed = compute_agreement([0.5] * 9, [0.5] * 6 + [1.0] * 3, failed=[True] * 9)
    assert all_failed.raw.value == 0
    assert all_failed.kappa is not None
    assert all_failed.kappa.value == 0


def test_what_has_no_two_verdicts_survives_no_swap():
    swap = measure_swap_effect([1, 0.5, 0.5, 0.5], [1, 0.5, 0.5, 1], failed=[False, False, True, True])
    assert swap.consistency.value == 0.5
    for compute in (compute_agreement, measure_swap_effect):
        with pytest.raises(ValueError, match="1 failures for 2 verdicts"):
            compute([1, 0], [1, 0], failed=[True])


# All statistics


def test_a_card_has_what_it_was_given():
    draw = np.random.default_rng(0)
    people = draw.choice([1.0, 0.5, 0.0], 200)
    judge = np.where(draw.random(200) < 0.8, people, draw.choice([1.0, 0.0], 200))
    swapped = np.where(draw.random(200) < 0.9, judge, 1 - judge)
    lengths = (draw.integers(20, 200, 200), draw.integers(20, 200, 200))
    bare = compute_judge_statistics(judge, people)
    full = compute_judge_statistics(judge, people, swapped, lengths, [k % 50 for k in range(200)])
    assert (bare.swap, bare.length_slope, bare.reference_slope, bare.n) == (None, None, None, 200)
    assert full.n == 50
    assert full.swap is not None
    assert full.swap.consistency.value == pytest.approx(0.93, abs=0.06)
    assert full.length_slope.low < 0 < full.length_slope.high
    assert asdict(full)["agreement"]["raw"].keys() == {"value", "low", "high", "n"}


def test_the_verdicts_compared_are_those_that_survive_the_swap():
    always_a = compute_judge_statistics([1.0] * 40, [1.0, 0.5] * 20, [0.0] * 40)
    assert always_a.agreement.raw.value == 0.5  # all are ties, and half of people's are
    assert compute_judge_statistics([1.0] * 40, [1.0, 0.5] * 20).agreement.raw.value == 0.5


def test_a_taste_for_length_shows_beside_that_of_people():
    draw = np.random.default_rng(1)
    lengths = tuple(np.exp(draw.normal(5, 0.6, 800)).round() for _ in range(2))
    ratio = np.log(lengths[0] / lengths[1])
    people = np.where(draw.random(800) < 0.5, 1.0, 0.0)
    judge = np.where(draw.random(800) < 1 / (1 + np.exp(-2 * ratio)), 1.0, 0.0)
    statistics = compute_judge_statistics(judge, people, lengths=lengths)
    assert isinstance(statistics.length_slope, Interval)
    assert statistics.length_slope.low > 1
    assert statistics.reference_slope.low < 0 < statistics.reference_slope.high


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ([], [], "verdicts has shape"),
        ([1, 0], [1], "others has 1 rows and verdicts has 2"),
        ([1, math.nan], [1, 0], "verdicts is nan in row 1"),
        ([1, 0.75], [1, 0], r"0\.75 in row 1 is no verdict"),
    ],
)
def test_what_is_no_verdict_is_refused(one, other, message):
    for compute in (compute_agreement, measure_swap_effect, compute_judge_statistics):
        with pytest.raises(ValueError, match=message):
            compute(one, other)
