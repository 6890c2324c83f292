"""Agreement: textbook values, values by hand, and what is undefined."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from votes import ids_of, voted

from align.annotate.figures.agreement import (
    NO_STRENGTHS,
    UNANIMOUS,
    ItemRatings,
    Kappa,
    build_coincidences,
    build_item_ratings,
    compute_alpha,
    compute_alphas,
    compute_directions,
    compute_kappa,
    compute_kappas,
    compute_raw_agreement,
    count_contradictions,
    count_ratings,
)
from align.annotate.figures.estimates import as_json
from align.ops.intervals import Interval

# Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C and on: four observers, twelve units, the
# last of which has one value and is no panel. He finds 0.743 (nominal) and 0.815 (ordinal).
UNITS = [[1, 1, 1], [2, 2, 3, 2], [3, 3, 3, 3], [3, 3, 3, 3], [2, 2, 2, 2], [1, 2, 3, 4], [4, 4, 4, 4], [1, 1, 2, 1],
         [2, 2, 2, 2], [5, 5, 5], [1, 1]]  # fmt: skip


def panel(*rows: list[int], item: str = "i") -> ItemRatings:
    """A row an annotator: a, b, c, …"""
    return ItemRatings(item, tuple("abcdefgh"[: len(rows)]), tuple(range(len(rows))), np.array(rows))


def found(votes, **more) -> list[ItemRatings]:
    return build_item_ratings(votes, ids_of(votes), **more)


def summed(panels: list[ItemRatings], domain: list[int]) -> np.ndarray:
    matrices = [build_coincidences(count_ratings(panel.values_RU, np.array(domain))) for panel in panels]
    return np.sum(matrices, axis=0)


# Units


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("0>1>2", [-1, -1, -1]),
        ("2>1>0", [1, 1, 1]),
        ("1>0>2", [1, -1, -1]),
        ("0>12", [-1, -1, 0]),
        ("012", [0, 0, 0]),
    ],
)
def test_what_a_ranking_says_of_each_pair(order, expected):
    assert compute_directions(voted("i", order), ("i-0", "i-1", "i-2")) == expected


def test_a_panel_is_an_item_that_two_people_judged():
    votes = [voted("i", "0>1", "ann"), voted("j", "0>1", "ann"), voted("i", "1>0", "bob")]
    (one,) = found(votes)
    assert (one.item, one.annotators, one.seqs) == ("i", ("ann", "bob"), (votes[0].seq, votes[2].seq))
    assert one.values_RU.tolist() == [[-1], [1]]


def test_strengths_are_signed_and_of_two_answers_alone():
    votes = [voted("i", "0>1", "ann", strength=3), voted("i", "1>0", "bob", strength=2), voted("i", "01", "cat")]
    votes += [voted("k", "0>1>2", who, strength=1) for who in ("ann", "bob")]
    votes += [voted("j", "01", "ann", strength=0), voted("j", "0>1", "bob", strength=1)]
    assert [one.values_RU.ravel().tolist() for one in found(votes, strength=True)] == [[-3, 2], [0, -1]]


# Alpha


@pytest.mark.parametrize(("level", "expected"), [("nominal", 0.743), ("ordinal", 0.815)])
def test_the_textbook_alpha(level, expected):
    units = [panel(*([value] for value in unit), item=str(k)) for k, unit in enumerate(UNITS)]
    estimate = compute_alpha(units, level)
    assert isinstance(estimate, Interval)
    assert estimate.value == pytest.approx(expected, abs=5e-4)
    assert estimate.n == len(UNITS)
    assert estimate.low < estimate.value < estimate.high
    values = np.arange(1, 6)
    (value,) = compute_alphas(summed(units, values.tolist())[None], values, level)
    assert value == pytest.approx(estimate.value, abs=1e-12)


def test_three_answers_with_a_tie():
    """By hand: −1 is said five times and 0 once; 2 of 6 coincidences differ, and 2·5·1/5 would by chance."""
    said = found([voted("i", "0>1>2", "ann"), voted("i", "0>12", "bob")])
    estimate = compute_alpha(said, "nominal")
    assert estimate == Interval(pytest.approx(0.0), None, None, 1)  # one item bears no interval
    assert compute_raw_agreement(said).value == pytest.approx(2 / 3)


def test_unanimous_is_undefined_and_not_one():
    votes = [voted(item, "0>1", who) for item in "ijk" for who in ("ann", "bob")]
    said = found(votes)
    assert compute_alpha(said, "nominal") == UNANIMOUS
    assert json.dumps(as_json({"alpha": compute_alpha(said, "nominal")})) == '{"alpha": "undefined (unanimous)"}'
    assert compute_raw_agreement(said).value == 1.0
    assert np.isnan(compute_alphas(summed(said, [-1, 0, 1])[None], np.array([-1, 0, 1]), "nominal"))


def test_there_is_no_interval_where_one_item_makes_the_alpha():
    agreed = [panel([-1], [-1], item=str(k)) for k in range(50)]
    once = compute_alpha([*agreed, panel([-1], [1])], "nominal")
    # By hand: 2 of 102 coincidences differ, and 2·101·1/101 would by chance.
    assert once == Interval(pytest.approx(0.0), None, None, 51)
    often = compute_alpha([*agreed, *(panel([-1], [1], item=f"x{k}") for k in range(9))], "nominal")
    assert often.low < often.value < often.high


@pytest.mark.parametrize("level", ["nominal", "ordinal"])
def test_full_agreement_has_an_interval_too(level):
    """Ten items, half of them −1 and half +1: alpha is 1. Wilson's interval of none of ten ends at 0.2775; D_e is 10/19
    of the greatest distance, by 20 values of which ten are equal."""
    found = compute_alpha([panel([v], [v], item=f"{v}{k}") for k in range(5) for v in (-1, 1)], level)
    assert found == Interval(1.0, pytest.approx(1 - 0.27753 * 19 / 10, abs=1e-4), 1.0, 10)


def test_the_interval_comes_from_items_and_not_from_pairs():
    """Three pairs of an item that always say the same are worth one, not three."""
    rng = random.Random(0)
    said = [(rng.choice((-1, 1)), rng.choice((-1, 1, 1))) for _ in range(30)]
    said = [(a, a if rng.random() < 0.6 else b) for a, b in said]
    triples = compute_alpha([panel([a] * 3, [b] * 3, item=str(k)) for k, (a, b) in enumerate(said)], "nominal")
    thrice = compute_alpha([panel([a], [b], item=f"{k}") for k, (a, b) in enumerate(said * 3)], "nominal")
    assert triples.value == pytest.approx(thrice.value)
    assert triples.high - triples.low > 1.5 * (thrice.high - thrice.low)


@pytest.mark.parametrize("items", [32, 80])
@pytest.mark.parametrize("right", [0.6, 0.8, 0.95])
def test_the_interval_of_alpha_covers_it(items, right):
    """Two annotators say the truth, a fair coin, with probability q each: alpha is 1 − 2q(1−q)/½. Within three standard
    errors of 600 draws."""
    rng, draws = np.random.default_rng(0), 600
    truth_of = 1 - 4 * right * (1 - right)
    covered = 0
    for _ in range(draws):
        truth, said = rng.choice((-1, 1), size=items), rng.random((2, items)) < right
        values = np.where(said, truth, -truth)
        estimate = compute_alpha(
            [panel([a], [b], item=str(k)) for k, (a, b) in enumerate(values.T.tolist())], "nominal"
        )
        covered += estimate.low <= truth_of <= estimate.high
    share = covered / draws
    error = 3 * (share * (1 - share) / draws) ** 0.5
    assert 0.92 - error <= share <= 0.985 + error


# Kappa


def test_kappa_by_hand():
    """20 and 15 times both, 5 and 10 times one: 0.7 observed, 0.5·0.6 + 0.5·0.4 by chance."""
    assert compute_kappa(np.array([[20, 5], [10, 15]])) == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    # Weights 0, 1, 4: 2 observed; rows 3, 2, 1 and columns 2, 2, 2 give 8 by chance.
    assert compute_kappa(np.array([[2, 1, 0], [0, 1, 1], [0, 0, 1]]), quadratic=True) == pytest.approx(1 - 2 / 8)


def test_kappa_of_the_unanimous_is_undefined():
    assert compute_kappa(np.array([[5, 0], [0, 0]])) == UNANIMOUS
    assert compute_kappa(np.array([[0, 5], [0, 0]])) == pytest.approx(0.0)  # each always says the same, and never both
    assert compute_kappa(np.array([[0]])) == NO_STRENGTHS


def test_two_annotators_have_a_kappa_where_they_share_enough_items(monkeypatch):
    orders = {"i": ("0>1", "0>1"), "j": ("1>0", "1>0"), "k": ("0>1", "1>0"), "l": ("1>0", "1>0")}
    both = [(item, *pair) for item, said in orders.items() for pair in zip(("bob", "ann"), said, strict=True)]
    votes = [voted(item, order, who) for item, who, order in both]
    votes.append(voted("i", "01", "cat"))
    said = found(votes)
    # Both −1 once, both +1 twice, bob −1 against ann's +1 once: 3/4 observed, (1·2 + 3·2)/16 by chance.
    expected = Kappa(("ann", "bob"), 4, 4, pytest.approx((3 / 4 - 1 / 2) / (1 - 1 / 2)), NO_STRENGTHS)
    for at_least, kept in ((4, [expected]), (5, [])):
        monkeypatch.setattr("align.annotate.figures.agreement.SHARED_ITEMS", at_least)
        assert compute_kappas(said, []) == kept
    monkeypatch.setattr("align.annotate.figures.agreement.SHARED_ITEMS", 1)
    assert len(compute_kappas(said, [])) == 3


def test_kappa_of_strengths_weighs_by_distance(monkeypatch):
    said = [(-3, -2), (3, 3), (1, 2), (-1, -3)]
    votes = []
    for k, values in enumerate(said):
        for who, value in zip(("ann", "bob"), values, strict=True):
            votes.append(voted(f"i{k}", "0>1" if value < 0 else "1>0", who, strength=abs(value)))
    monkeypatch.setattr("align.annotate.figures.agreement.SHARED_ITEMS", 1)
    (two,) = compute_kappas(found(votes), found(votes, strength=True))
    # Σ (a − b)² = 1 + 0 + 1 + 4; by chance Σ over all sixteen pairings, over four.
    chance = sum((a - b) ** 2 for a, _ in said for _, b in said) / 4
    assert two.strength == pytest.approx(1 - 6 / chance)
    assert two.direction == pytest.approx(1.0)


# Contradictions


def test_a_tie_contradicts_nobody():
    assert count_contradictions(panel([-1, 0, 1], [-1, 1, 0])) == 0
    assert count_contradictions(panel([-1, 0, 1], [1, 1, -1])) == 2
    assert count_contradictions(panel([-1], [-1], [1])) == 2
