"""Agreement: textbook values, values by hand, and undefined values."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from votes import build_vote, collect_candidate_ids

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
UNITS = [
    [1, 1, 1],
    [2, 2, 3, 2],
    [3, 3, 3, 3],
    [3, 3, 3, 3],
    [2, 2, 2, 2],
    [1, 2, 3, 4],
    [4, 4, 4, 4],
    [1, 1, 2, 1],
    [2, 2, 2, 2],
    [5, 5, 5],
    [1, 1],
]


def build_panel(*rows: list[int], item: str = "i") -> ItemRatings:
    """Build a panel of a row for each annotator: a, b, c, …"""
    return ItemRatings(item, tuple("abcdefgh"[: len(rows)]), tuple(range(len(rows))), np.array(rows))


def build_panels(votes, **options) -> list[ItemRatings]:
    return build_item_ratings(votes, collect_candidate_ids(votes), **options)


def sum_coincidences(panels: list[ItemRatings], domain: list[int]) -> np.ndarray:
    matrices = [build_coincidences(count_ratings(item_ratings.values_RU, np.array(domain))) for item_ratings in panels]
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
    assert compute_directions(build_vote("i", order), ("i-0", "i-1", "i-2")) == expected


def test_a_panel_is_an_item_that_two_people_judged():
    votes = [build_vote("i", "0>1", "ann"), build_vote("j", "0>1", "ann"), build_vote("i", "1>0", "bob")]
    (item_ratings,) = build_panels(votes)
    assert (item_ratings.item, item_ratings.annotators, item_ratings.seqs) == (
        "i",
        ("ann", "bob"),
        (votes[0].seq, votes[2].seq),
    )
    assert item_ratings.values_RU.tolist() == [[-1], [1]]


def test_strengths_are_signed_and_of_two_answers_alone():
    votes = [
        build_vote("i", "0>1", "ann", strength=3),
        build_vote("i", "1>0", "bob", strength=2),
        build_vote("i", "01", "cat"),
    ]
    votes += [build_vote("k", "0>1>2", annotator, strength=1) for annotator in ("ann", "bob")]
    votes += [build_vote("j", "01", "ann", strength=0), build_vote("j", "0>1", "bob", strength=1)]
    assert [item_ratings.values_RU.ravel().tolist() for item_ratings in build_panels(votes, use_strengths=True)] == [
        [-3, 2],
        [0, -1],
    ]


# Alpha


@pytest.mark.parametrize(("level", "expected"), [("nominal", 0.743), ("ordinal", 0.815)])
def test_the_textbook_alpha(level, expected):
    units = [build_panel(*([value] for value in unit), item=str(k)) for k, unit in enumerate(UNITS)]
    estimate = compute_alpha(units, level)
    assert isinstance(estimate, Interval)
    assert estimate.value == pytest.approx(expected, abs=5e-4)
    assert estimate.n == len(UNITS)
    assert estimate.low < estimate.value < estimate.high
    values = np.arange(1, 6)
    (value,) = compute_alphas(sum_coincidences(units, values.tolist())[None], values, level)
    assert value == pytest.approx(estimate.value, abs=1e-12)


def test_three_answers_with_a_tie():
    """Alpha by hand: five values are −1 and one is 0. 2 of 6 coincidences differ, and 2·5·1/5 would by chance."""
    panels = build_panels([build_vote("i", "0>1>2", "ann"), build_vote("i", "0>12", "bob")])
    estimate = compute_alpha(panels, "nominal")
    assert estimate == Interval(pytest.approx(0.0), None, None, 1)  # one item has no interval
    assert compute_raw_agreement(panels).value == pytest.approx(2 / 3)


def test_unanimous_is_undefined_and_not_one():
    votes = [build_vote(item, "0>1", annotator) for item in "ijk" for annotator in ("ann", "bob")]
    panels = build_panels(votes)
    assert compute_alpha(panels, "nominal") == UNANIMOUS
    assert json.dumps(as_json({"alpha": compute_alpha(panels, "nominal")})) == '{"alpha": "undefined (unanimous)"}'
    assert compute_raw_agreement(panels).value == 1.0
    assert np.isnan(compute_alphas(sum_coincidences(panels, [-1, 0, 1])[None], np.array([-1, 0, 1]), "nominal"))


def test_there_is_no_interval_where_one_item_makes_the_alpha():
    agreeing = [build_panel([-1], [-1], item=str(k)) for k in range(50)]
    single_estimate = compute_alpha([*agreeing, build_panel([-1], [1])], "nominal")
    # By hand: 2 of 102 coincidences differ, and 2·101·1/101 would by chance.
    assert single_estimate == Interval(pytest.approx(0.0), None, None, 51)
    estimate = compute_alpha([*agreeing, *(build_panel([-1], [1], item=f"x{k}") for k in range(9))], "nominal")
    assert estimate.low < estimate.value < estimate.high


@pytest.mark.parametrize("level", ["nominal", "ordinal"])
def test_full_agreement_has_an_interval_too(level):
    """Ten items, half of them −1 and half +1: alpha is 1. Wilson's interval of 0 of 10 ends at 0.2775; D_e is 10/19 of
    the greatest distance, because ten of 20 values are equal."""
    estimate = compute_alpha([build_panel([v], [v], item=f"{v}{k}") for k in range(5) for v in (-1, 1)], level)
    assert estimate == Interval(1.0, pytest.approx(1 - 0.27753 * 19 / 10, abs=1e-4), 1.0, 10)


def test_the_interval_comes_from_items_and_not_from_pairs():
    """Three pairs of an item that always agree count as one."""
    rng = random.Random(0)
    verdicts = [(rng.choice((-1, 1)), rng.choice((-1, 1, 1))) for _ in range(30)]
    verdicts = [(a, a if rng.random() < 0.6 else b) for a, b in verdicts]
    triples = compute_alpha(
        [build_panel([a] * 3, [b] * 3, item=str(k)) for k, (a, b) in enumerate(verdicts)], "nominal"
    )
    repeated = compute_alpha([build_panel([a], [b], item=f"{k}") for k, (a, b) in enumerate(verdicts * 3)], "nominal")
    assert triples.value == pytest.approx(repeated.value)
    assert triples.high - triples.low > 1.5 * (repeated.high - repeated.low)


@pytest.mark.parametrize("items", [32, 80])
@pytest.mark.parametrize("right", [0.6, 0.8, 0.95])
def test_the_interval_of_alpha_covers_it(items, right):
    """Two annotators report the truth, a fair coin, with probability q each: alpha is 1 − 2q(1−q)/½. Coverage is within
    three standard errors of 600 draws."""
    rng = np.random.default_rng(0)
    draws = 600
    true_alpha = 1 - 4 * right * (1 - right)
    covered = 0
    for _ in range(draws):
        truth = rng.choice((-1, 1), size=items)
        is_right = rng.random((2, items)) < right
        values = np.where(is_right, truth, -truth)
        estimate = compute_alpha(
            [build_panel([a], [b], item=str(k)) for k, (a, b) in enumerate(values.T.tolist())], "nominal"
        )
        covered += estimate.low <= true_alpha <= estimate.high
    share = covered / draws
    tolerance = 3 * (share * (1 - share) / draws) ** 0.5
    assert 0.92 - tolerance <= share <= 0.985 + tolerance


# Kappa


def test_kappa_by_hand():
    """Both agree 20 and 15 times, and differ 5 and 10 times: 0.7 observed, 0.5·0.6 + 0.5·0.4 by chance."""
    assert compute_kappa(np.array([[20, 5], [10, 15]])) == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    # Weights 0, 1, 4: 2 observed; rows 3, 2, 1 and columns 2, 2, 2 give 8 by chance.
    assert compute_kappa(np.array([[2, 1, 0], [0, 1, 1], [0, 0, 1]]), has_quadratic_weights=True) == pytest.approx(
        1 - 2 / 8
    )


def test_kappa_of_the_unanimous_is_undefined():
    assert compute_kappa(np.array([[5, 0], [0, 0]])) == UNANIMOUS
    assert compute_kappa(np.array([[0, 5], [0, 0]])) == pytest.approx(
        0.0
    )  # each always gives one value, and they never agree
    assert compute_kappa(np.array([[0]])) == NO_STRENGTHS


def test_two_annotators_have_a_kappa_where_they_share_enough_items(monkeypatch):
    orders = {"i": ("0>1", "0>1"), "j": ("1>0", "1>0"), "k": ("0>1", "1>0"), "l": ("1>0", "1>0")}
    judgements = [
        (item, *pair) for item, pair_orders in orders.items() for pair in zip(("bob", "ann"), pair_orders, strict=True)
    ]
    votes = [build_vote(item, order, annotator) for item, annotator, order in judgements]
    votes.append(build_vote("i", "01", "cat"))
    panels = build_panels(votes)
    # Both −1 once, both +1 twice, bob −1 against ann's +1 once: 3/4 observed, (1·2 + 3·2)/16 by chance.
    expected = Kappa(("ann", "bob"), 4, 4, pytest.approx((3 / 4 - 1 / 2) / (1 - 1 / 2)), NO_STRENGTHS)
    for at_least, kappas in ((4, [expected]), (5, [])):
        monkeypatch.setattr("align.annotate.figures.agreement.SHARED_ITEMS", at_least)
        assert compute_kappas(panels, []) == kappas
    monkeypatch.setattr("align.annotate.figures.agreement.SHARED_ITEMS", 1)
    assert len(compute_kappas(panels, [])) == 3


def test_kappa_of_strengths_weighs_by_distance(monkeypatch):
    strengths = [(-3, -2), (3, 3), (1, 2), (-1, -3)]
    votes = []
    for k, values in enumerate(strengths):
        for annotator, value in zip(("ann", "bob"), values, strict=True):
            votes.append(build_vote(f"i{k}", "0>1" if value < 0 else "1>0", annotator, strength=abs(value)))
    monkeypatch.setattr("align.annotate.figures.agreement.SHARED_ITEMS", 1)
    (kappa,) = compute_kappas(build_panels(votes), build_panels(votes, use_strengths=True))
    # Σ (a − b)² = 1 + 0 + 1 + 4; by chance Σ over all sixteen pairings, over four.
    chance = sum((a - b) ** 2 for a, _ in strengths for _, b in strengths) / 4
    assert kappa.strength == pytest.approx(1 - 6 / chance)
    assert kappa.direction == pytest.approx(1.0)


# Contradictions


def test_a_tie_contradicts_nobody():
    assert count_contradictions(build_panel([-1, 0, 1], [-1, 1, 0])) == 0
    assert count_contradictions(build_panel([-1, 0, 1], [1, 1, -1])) == 2
    assert count_contradictions(build_panel([-1], [-1], [1])) == 2
