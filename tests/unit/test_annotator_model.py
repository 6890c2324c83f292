"""The annotator model finds the traits of simulated annotators, its posteriors cover, and its tests find annotators who
do not judge the answers."""

from __future__ import annotations

from typing import NamedTuple

import choix
import numpy as np
import pytest

from align.ops.annotator_tests import MIN_RANKINGS, apply_attention_tests, solve_shift
from align.ops.annotators import RankedItems, Strengths, Traits, fit_annotators, improve_strengths
from align.ops.rankings import build_choices, draw_rankings


class World(NamedTuple):
    """Simulated rankings with what they were drawn from.

    Attributes:
        strengths_IK: of the answers.
        traits: of the annotators.
    """

    ranked: RankedItems
    strengths_IK: np.ndarray
    traits: Traits


def draw_world(
    seed: int, items: int, answers: int, ability: float = 1.0, spread: float = 0.2, overlap: int = 3
) -> World:
    """Return random rankings by ten attentive annotators. Each ranks about as many items.

    Args:
        ability: the median ability.
        spread: standard deviation of the abilities' logarithms.
    """
    annotators = 10
    random = np.random.default_rng(seed)
    strengths_IK = random.normal(size=(items, answers))
    traits = Traits(
        ability * np.exp(spread * random.normal(size=annotators)),
        0.4 * random.normal(size=annotators),
        -1.5 + 0.5 * random.normal(size=annotators),
    )
    item_N = np.repeat(np.arange(items), overlap)
    annotator_N = np.concatenate([random.permutation(annotators)[:overlap] for _ in range(items)])
    places_NK = random.permuted(np.tile(np.linspace(0.5, -0.5, answers), (len(item_N), 1)), axis=1)
    utilities_NK = (
        traits.ability_A[annotator_N, None] * strengths_IK[item_N] + traits.position_A[annotator_N, None] * places_NK
    )
    tiers_NK = draw_rankings(random, utilities_NK, traits.log_nu_A[annotator_N])
    return World(RankedItems(item_N, annotator_N, tiers_NK, places_NK), strengths_IK, traits)


def replace_rankings(world: World, random: np.random.Generator) -> RankedItems:
    """Return the rankings with those of three annotators replaced. Annotator 0 ranks at random, 1 by the place, and 2
    copies the item's first ranking, where it is another annotator's."""
    ranked = world.ranked
    tiers_NK = ranked.tiers_NK.copy()
    random_NK = random.permuted(np.tile(np.arange(tiers_NK.shape[1]), (len(tiers_NK), 1)), axis=1)
    tiers_NK[ranked.annotator_N == 0] = random_NK[ranked.annotator_N == 0]
    by_place_NK = np.argsort(np.argsort(-ranked.places_NK, axis=1), axis=1)
    tiers_NK[ranked.annotator_N == 1] = by_place_NK[ranked.annotator_N == 1]
    first_N = np.unique(ranked.item_N, return_index=True)[1][ranked.item_N]
    copies_N = ranked.annotator_N == 2
    tiers_NK[copies_N] = np.where((first_N == np.arange(len(first_N)))[:, None], random_NK, tiers_NK[first_N])[copies_N]
    return ranked._replace(tiers_NK=tiers_NK)


def test_the_posterior_of_pairs_is_that_of_expectation_propagation():
    random = np.random.default_rng(0)
    results = [random.integers(0, 2, size=size) for size in (1, 2, 5, 20)]
    item_N = np.repeat(np.arange(4), [len(wins) for wins in results])
    wins_N = np.concatenate(results)
    ranked = RankedItems(
        item_N, np.zeros_like(item_N), np.stack([wins_N, 1 - wins_N], axis=1), np.zeros((len(item_N), 2))
    )
    traits = Traits(np.ones(1), np.zeros(1), np.full(1, -40.0))
    strengths = Strengths.standard(4, 2)
    for _ in range(10):
        strengths = improve_strengths(ranked, build_choices(ranked.tiers_NK), traits, strengths)
    draws_ID = strengths.draw()[:, :, 0] - strengths.draw()[:, :, 1]
    for wins, draws_D in zip(results, draws_ID, strict=True):
        pairs = [(1, 0) if win else (0, 1) for win in wins]
        mean_2, covariance_22 = choix.ep_pairwise(2, pairs, alpha=1.0, model="logit")
        difference = np.array([1, -1])
        assert draws_D.mean() == pytest.approx(difference @ mean_2, abs=0.02)
        assert draws_D.var() == pytest.approx(difference @ covariance_22 @ difference, rel=0.02)


@pytest.mark.parametrize("answers", [2, 4])
def test_the_fit_finds_the_traits(answers: int):
    relative_abilities = []
    for seed in range(3):
        world = draw_world(seed, items=1000, answers=answers, spread=0.35)
        fit = fit_annotators([world.ranked], 10)
        relative_abilities.append(fit.ability / world.traits.ability_A.mean())
        assert np.corrcoef(fit.traits.ability_A, world.traits.ability_A)[0, 1] > 0.5
        assert np.abs(fit.traits.position_A - world.traits.position_A).mean() < 0.2
        assert np.abs(fit.traits.log_nu_A - world.traits.log_nu_A).mean() < 0.35
    assert np.mean(relative_abilities) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(("answers", "ability"), [(2, 0.5), (2, 1.0), (4, 0.5), (4, 1.0)])
def test_posteriors_at_90_percent_cover_88_to_92(answers: int, ability: float):
    covered = []
    for seed in range(6):
        world = draw_world(seed, items=200, answers=answers, ability=ability)
        draws_IDK = fit_annotators([world.ranked], 10).strengths[0].draw()
        draws_ID = draws_IDK[:, :, 0] - draws_IDK[:, :, 1]
        true_I = world.strengths_IK[:, 0] - world.strengths_IK[:, 1]
        covered.append(np.abs(true_I - draws_ID.mean(axis=1)) < 1.645 * draws_ID.std(axis=1))
    simulation_error = 2 * np.sqrt(0.09 / np.size(covered))
    assert 0.88 - simulation_error <= np.mean(covered) <= 0.92 + simulation_error


def test_items_with_different_numbers_of_answers_are_fitted_together():
    two = draw_world(5, items=100, answers=2)
    four = draw_world(6, items=100, answers=4)
    fit = fit_annotators([two.ranked, four.ranked], 11)
    assert [block.means_IC.shape for block in fit.strengths] == [(100, 1), (100, 3)]
    assert fit.traits.ability_A[10] == pytest.approx(fit.ability, rel=0.1)  # has no rankings
    assert fit.traits.position_A[10] == pytest.approx(0, abs=1e-6)


def test_annotators_who_do_not_judge_the_answers_are_found():
    world = draw_world(7, items=200, answers=4)
    ranked = replace_rankings(world, np.random.default_rng(0))
    tests = apply_attention_tests([ranked], 10)
    assert np.flatnonzero(tests.disagrees_A).tolist() == [0]
    assert np.flatnonzero(tests.prefers_side_A).tolist() == [1]
    assert np.flatnonzero(tests.copies_A).tolist() == [2]


def test_few_rankings_raise_no_suspicion():
    world = draw_world(8, items=(MIN_RANKINGS - 1) * 10 // 3, answers=4)
    ranked = replace_rankings(world, np.random.default_rng(0))
    few_A = np.bincount(ranked.annotator_N, minlength=10) < MIN_RANKINGS
    tests = apply_attention_tests([ranked], 10)
    assert few_A[:3].any()
    assert not (few_A & (tests.disagrees_A | tests.prefers_side_A | tests.copies_A)).any()


def test_an_annotator_who_always_prefers_what_comes_last_is_found():
    world = draw_world(9, items=200, answers=2)
    ranked = world.ranked
    is_last_N = ranked.annotator_N == 4
    tiers_NK = np.where(is_last_N[:, None], (ranked.places_NK > 0).astype(int), ranked.tiers_NK)
    tests = apply_attention_tests([ranked._replace(tiers_NK=tiers_NK)], 10)
    assert np.flatnonzero(tests.prefers_side_A).tolist() == [4]
    assert tests.side_A[4] < 0


def test_an_annotator_without_shared_items_is_not_compared():
    world = draw_world(10, items=200, answers=4)
    ranked = world.ranked
    is_alone_N = ranked.annotator_N == 3
    item_N = np.where(is_alone_N, 200 + np.arange(len(is_alone_N)), ranked.item_N)
    alone = ranked._replace(item_N=np.unique(item_N, return_inverse=True)[1])
    tests = apply_attention_tests([alone], 10)
    assert np.isnan(tests.agreement_A[3])
    assert not tests.disagrees_A[3]
    assert np.isfinite(np.delete(tests.agreement_A, 3)).all()


def test_an_annotator_who_always_comes_second_does_not_copy():
    random = np.random.default_rng(0)
    item_N = np.repeat(np.arange(80), 2)
    annotator_N = np.tile([0, 4], 80)
    annotator_N[::2] = np.arange(80) % 4
    strengths_IK = random.normal(size=(80, 2))
    tiers_NK = draw_rankings(random, strengths_IK[item_N], np.full(160, -1.5))
    tests = apply_attention_tests([RankedItems(item_N, annotator_N, tiers_NK, np.zeros((160, 2)))], 5)
    assert not tests.copies_A.any()


def test_no_rankings_shift_no_chances():
    assert solve_shift(np.zeros(0), 0) == pytest.approx(0, abs=1e-9)
    assert abs(solve_shift(np.zeros(2), 0)) < 1
    assert solve_shift(np.zeros(10_000), 7311) == pytest.approx(1, abs=0.01)


def test_removed_annotators_are_no_peers():
    """Four annotators are compared, but one prefers a side and so leaves three."""
    random = np.random.default_rng(1)
    item_N = np.repeat(np.arange(60), 4)
    annotator_N = np.tile(np.arange(4), 60)
    places_NK = random.permuted(np.tile([0.5, -0.5], (240, 1)), axis=1)
    tiers_NK = draw_rankings(random, 2 * random.normal(size=(60, 2))[item_N], np.full(240, -1.5))
    by_place_NK = (places_NK < 0).astype(int)
    random_NK = draw_rankings(random, np.zeros((240, 2)), np.full(240, -1.5))
    tiers_NK = np.where((annotator_N == 0)[:, None], by_place_NK, tiers_NK)
    tiers_NK = np.where((annotator_N == 1)[:, None], random_NK, tiers_NK)
    tests = apply_attention_tests([RankedItems(item_N, annotator_N, tiers_NK, places_NK)], 4)
    assert tests.prefers_side_A[0]
    assert not tests.disagrees_A.any()
    assert not tests.copies_A.any()
