"""Strengths of many systems: known optima, another algorithm, systems that win all, and disconnected groups."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.core.errors import InputError
from align.evals.stats.bradley_terry import fit_bradley_terry


def expand_games(*rows: tuple[str, str, float, int]) -> tuple[list[str], list[str], list[float]]:
    """Return columns first, second and verdict of rows (first, second, verdict, count), each repeated count times."""
    games = [(a, b, v) for a, b, v, times in rows for _ in range(times)]
    return [a for a, _, _ in games], [b for _, b, _ in games], [v for _, _, v in games]


def fit_by_minorization(first: list[str], second: list[str], verdicts: list[float]) -> dict[str, float]:
    """Iterate π ← wins / Σ n/(π_i + π_j) with no prior: Hunter 2004, "MM algorithms for generalized Bradley-Terry"."""
    names = sorted({*first, *second})
    place = {name: k for k, name in enumerate(names)}
    wins = np.zeros(len(names))
    game_counts = np.zeros((len(names), len(names)))
    for a, b, v in zip(first, second, verdicts, strict=True):
        i = place[a]
        j = place[b]
        wins[i], wins[j] = wins[i] + v, wins[j] + 1 - v
        game_counts[i, j] += 1
        game_counts[j, i] += 1
    strengths = np.ones(len(names))
    for _ in range(3000):
        strengths = wins / (game_counts / (strengths[:, None] + strengths[None, :])).sum(axis=1)
        strengths /= strengths.prod() ** (1 / len(names))
    return dict(zip(names, np.log(strengths).tolist(), strict=True))


def test_two_systems_by_hand():
    """Three wins in four are a distance of ln 3, half to either side of 0, apart from the prior."""
    ranking = fit_bradley_terry(*expand_games(("a", "b", 1, 3000), ("b", "a", 1, 1000)))
    assert ranking.systems == ("a", "b")
    assert [strength.value for strength in ranking.strengths] == pytest.approx(
        [math.log(3) / 2, -math.log(3) / 2], abs=1e-3
    )
    assert ranking.verdicts == 4000


def test_a_tie_is_half_a_win_each():
    ties = fit_bradley_terry(*expand_games(("a", "b", 0.5, 40), ("a", "b", 1, 10)))
    halves = fit_bradley_terry(*expand_games(("a", "b", 1, 30), ("a", "b", 0, 20)))
    assert [strength.value for strength in ties.strengths] == pytest.approx(
        [strength.value for strength in halves.strengths]
    )
    assert ties.strengths[0].high < halves.strengths[0].high  # ties vary less


def test_it_agrees_with_another_algorithm():
    draw = np.random.default_rng(0)
    names = "abcde"
    true_strengths = dict(zip(names, (1.0, 0.4, 0.0, -0.5, -0.9), strict=True))
    pairs = [draw.choice(5, 2, replace=False) for _ in range(4000)]
    first, second = ([names[pair[side]] for pair in pairs] for side in (0, 1))
    chance = [1 / (1 + math.exp(true_strengths[b] - true_strengths[a])) for a, b in zip(first, second, strict=True)]
    verdicts = np.where(draw.random(4000) < 0.1, 0.5, draw.random(4000) < chance).tolist()
    ranking = fit_bradley_terry(first, second, verdicts)
    expected_strengths = fit_by_minorization(first, second, verdicts)
    for name, strength in zip(ranking.systems, ranking.strengths, strict=True):
        assert strength.value == pytest.approx(expected_strengths[name], abs=2e-3)
    assert sum(strength.value for strength in ranking.strengths) == pytest.approx(0, abs=1e-9)


def test_order_and_sides_do_not_matter():
    first, second, verdicts = expand_games(("a", "b", 1, 6), ("b", "c", 1, 5), ("c", "a", 1, 3), ("a", "c", 0.5, 2))
    ranking = fit_bradley_terry(first, second, verdicts)
    swapped_ranking = fit_bradley_terry(second[::-1], first[::-1], [1 - v for v in verdicts[::-1]])
    assert ranking.systems == swapped_ranking.systems
    for a, b in zip(ranking.strengths, swapped_ranking.strengths, strict=True):
        assert (a.value, a.low, a.high, a.n) == pytest.approx((b.value, b.low, b.high, b.n))


def test_a_system_that_wins_all_and_one_that_loses_all_have_wide_intervals():
    ranking = fit_bradley_terry(
        *expand_games(("a", "b", 1, 20), ("b", "c", 1, 12), ("c", "b", 1, 12), ("b", "d", 1, 20))
    )
    assert (ranking.systems[0], ranking.systems[-1]) == ("a", "d")
    best, second, _, worst = ranking.strengths
    assert 2 < best.value < 10
    assert -10 < worst.value < -2
    assert best.high - best.low > 2 * (second.high - second.low)


def test_all_ties_are_equal_systems_with_an_interval():
    ranking = fit_bradley_terry(*expand_games(("a", "b", 0.5, 10), ("b", "c", 0.5, 10)))
    for strength in ranking.strengths:
        assert strength.value == pytest.approx(0, abs=1e-12)
        assert strength.low < 0 < strength.high


def test_copies_of_a_prompt_are_no_further_evidence():
    first, second, verdicts = expand_games(("a", "b", 1, 30), ("a", "b", 0, 20))
    ids = list(range(50))
    original = fit_bradley_terry(first, second, verdicts, ids).strengths[0]
    copied = fit_bradley_terry(first * 4, second * 4, verdicts * 4, ids * 4).strengths[0]
    assert copied.n == original.n == 50
    assert copied.high - copied.low == pytest.approx(original.high - original.low, rel=0.03)
    unclustered = fit_bradley_terry(first * 4, second * 4, verdicts * 4).strengths[0]
    assert unclustered.high - unclustered.low < 0.6 * (original.high - original.low)


def test_one_cluster_and_one_verdict_have_no_interval():
    first, second, verdicts = expand_games(("a", "b", 1, 5), ("a", "b", 0, 2))
    assert fit_bradley_terry(first, second, verdicts, ["p"] * 7).strengths[0].low is None
    ranking = fit_bradley_terry(["a"], ["b"], [1])
    assert (ranking.systems, ranking.strengths[0].low) == (("a", "b"), None)


def test_parts_without_a_bridge_are_named():
    rows = expand_games(("a", "b", 1, 3), ("c", "d", 0, 2), ("e", "d", 1, 1))
    with pytest.raises(InputError, match=r"systems=a, b \| c, d, e: no verdict compares") as caught:
        fit_bradley_terry(*rows)
    assert caught.value.exit_status == 2
    bridged = expand_games(("a", "b", 1, 3), ("c", "d", 0, 2), ("e", "d", 1, 1), ("e", "a", 0.5, 1))
    assert len(fit_bradley_terry(*bridged).systems) == 5


def test_it_is_json():
    ranking = fit_bradley_terry(*expand_games(("a", "b", 1, 3), ("a", "b", 0, 2))).as_dict()
    assert list(ranking["strengths"]) == ["a", "b"]
    assert ranking["strengths"]["a"].keys() == {"value", "low", "high", "n"}
    assert ranking["verdicts"] == 5


@pytest.mark.parametrize(
    ("first", "second", "verdicts", "message"),
    [
        ([], [], [], "verdicts has shape"),
        (["a"], ["b", "c"], [1], "1 first and 2 second systems for 1 verdicts"),
        (["a", "a"], ["b", "a"], [1, 1], "'a' is compared with itself"),
        (["a"], ["b"], [math.nan], "verdicts is nan"),
        (["a"], ["b"], [1.5], "outside 0 to 1"),
    ],
)
def test_what_is_no_tournament_is_refused(first, second, verdicts, message):
    with pytest.raises(ValueError, match=message):
        fit_bradley_terry(first, second, verdicts)
