"""Shares with their intervals, and biases: by hand, and by simulation with and without an injected bias."""

from __future__ import annotations

import math
import random

import pytest
from votes import build_vote

from align.annotate.assignment.leases import counterbalance_order
from align.annotate.figures.estimates import NOTHING_COUNTED, ONE_SIDED, compute_share, to_log_odds
from align.annotate.figures.people import compute_length_bias, compute_position_bias
from align.ops.intervals import Interval, normal_quantile, proportion_interval, wilson_interval


def draw_order(rng: random.Random, ids: tuple[str, ...], follow: float) -> list[str]:
    """Draw the screen's order with probability `follow`, else any: the earlier of two wins with ½ + follow/2."""
    return list(ids) if rng.random() < follow else rng.sample(ids, len(ids))


def simulate_votes(rng: random.Random, count: int, k: int, follow: float, annotator: str = "ann") -> list:
    votes = []
    for turn in range(count):
        screen = counterbalance_order("012345678"[:k], annotator, turn)
        order = draw_order(rng, screen, follow)
        votes.append(build_vote(f"i{turn}", ">".join(order), annotator, screen="".join(screen)))
    return votes


# Shares


def test_clusters_count_for_as_much_as_they_have_trials():
    share = compute_share([1, 3], [1, 6])
    assert share == proportion_interval([1, 0.5], [1, 6])
    assert share.value == pytest.approx(4 / 7)


def test_trials_that_balance_within_clusters_still_have_an_interval():
    """Four clusters of one success in two trials: by hand φ = 0.15 / (4·¼ + 0.15), and t(3) = 3.1824."""
    share = compute_share([1, 1, 1, 1], [2, 2, 2, 2])
    assert (share.low, share.high) == pytest.approx(wilson_interval(0.5, 4 * 1.15 / 0.15, 3.1824463))


def test_unanimous_clusters_count_once_each():
    assert (compute_share([3, 3], [3, 3]).low, compute_share([2], [2]).low) == pytest.approx(
        (wilson_interval(1, 2, normal_quantile(0.95))[0], wilson_interval(1, 1, normal_quantile(0.95))[0])
    )


def test_clusters_without_trials_do_not_count():
    assert compute_share([1, 0, 0], [1, 0, 1]) == compute_share([1, 0], [1, 1])
    assert compute_share([0], [0]) == compute_share([], []) == NOTHING_COUNTED


def test_log_odds():
    log_odds = to_log_odds(Interval(0.75, 0.5, 0.9, 8))
    assert log_odds == Interval(pytest.approx(math.log(3)), pytest.approx(0.0), pytest.approx(math.log(9)), 8)
    assert to_log_odds(compute_share([2], [2])) == to_log_odds(compute_share([0], [2])) == ONE_SIDED
    assert to_log_odds(NOTHING_COUNTED) == NOTHING_COUNTED


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("follow", [0.0, 0.3])
def test_the_interval_covers_the_share(k, follow):
    rng = random.Random(0)
    covered = naively_covered = 0
    for _ in range(300):
        share = compute_position_bias(simulate_votes(rng, 60, k, follow)).share
        truth = 0.5 + follow / 2
        covered += share.low <= truth <= share.high
        pairs = share.n * k * (k - 1) // 2
        low, high = wilson_interval(share.value, pairs, normal_quantile(0.95))
        naively_covered += low <= truth <= high
    assert 0.92 <= covered / 300 <= 0.985
    if k == 5:
        assert naively_covered / 300 < 0.9  # as if the pairs of a ranking were independent


# Position


def test_the_earlier_answer_of_two():
    votes = [
        build_vote("i", "0>1", screen="01"),
        build_vote("j", "0>1", screen="10"),
        build_vote("k", "1>0", screen="10"),
        build_vote("l", "01", screen="01"),  # a tie favours no side
        build_vote("m", "0>1", source="simulated"),  # no screen
    ]
    bias = compute_position_bias(votes)
    assert bias.share == compute_share([1, 0, 1], [1, 1, 1])
    assert bias.log_odds.value == pytest.approx(math.log(2))


def test_the_earlier_answers_of_three_with_a_tie():
    """The screen shows 2, 0, 1, and 0 is ranked above 1 and 2: one of two untied pairs, 0 before 1, follows it."""
    assert compute_position_bias([build_vote("i", "0>12", screen="201")]).share.value == 0.5
    assert compute_position_bias([build_vote("i", "2>0>1", screen="201")]).share == compute_share([3], [3])


@pytest.mark.parametrize("k", [2, 4])
def test_an_injected_bias_is_found_and_none_is_not(k):
    biased = compute_position_bias(simulate_votes(random.Random(1), 400, k, 0.3)).share
    assert biased.low > 0.5
    assert biased.low < 0.65 < biased.high
    fair = compute_position_bias(simulate_votes(random.Random(2), 400, k, 0.0))
    assert fair.share.low < 0.5 < fair.share.high
    assert fair.log_odds.low < 0 < fair.log_odds.high


def test_whoever_always_prefers_one_candidate_has_no_bias_to_a_side():
    """The order on the screen is counterbalanced, so a true preference cancels out."""
    votes = [build_vote(f"i{t}", "0>1", screen="".join(counterbalance_order("01", "ann", t))) for t in range(40)]
    assert compute_position_bias(votes).share.value == 0.5


# Length


def test_the_longer_answer():
    lengths = {"i-0": 10, "i-1": 5, "i-2": 5, "j-0": 3, "j-1": 9}
    votes = [build_vote("i", "0>1>2"), build_vote("j", "0>1"), build_vote("j", "01", "bob")]
    share = compute_length_bias(votes, lengths).share
    assert share == compute_share([2, 0], [2, 1])  # the pair of equal lengths is left out, and the tie


def test_who_judges_the_same_item_sees_the_same_lengths():
    votes = [
        build_vote(f"i{n}", "0>1" if n % 2 else "1>0", annotator)
        for n in range(20)
        for annotator in ("ann", "bob", "cat")
    ]
    lengths = {f"i{n}-{k}": 5 - k for n in range(20) for k in (0, 1)}
    share = compute_length_bias(votes, lengths).share
    assert share == proportion_interval([1, 0] * 10)


def test_no_votes_have_no_bias():
    assert compute_position_bias([]).share == compute_length_bias([], {}).log_odds == NOTHING_COUNTED
