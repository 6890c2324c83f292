"""Tests that find annotators who do not judge the answers: who choose at random, by the place on the screen, or copy.

Each compares an annotator's rankings with what an attentive annotator would give of the same items, by the strengths of
the answers that the other annotators' rankings show (`align.ops.annotators`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from align.ops.annotators import (
    ABILITY_SPREAD,
    POSITION_SD,
    AnnotatorFit,
    RankedItems,
    compute_likelihoods_of_draws,
    fit_annotators,
    weigh_draws_by_others,
)
from align.ops.rankings import Floats, Ints, build_choices, compute_log_likelihoods, draw_rankings

REPLICATES = 200
MIN_RANKINGS = 20
"""Number of rankings below which no annotator is suspect."""
MIN_ANNOTATORS = 4
"""Number of comparable annotators below which none is suspected of copying or of disagreeing. Two annotators who agree
well look like one who copies the other, and two who disagree do not show which of them is wrong."""
MAX_SHIFT = 3.0
AGREEMENT_LIMIT = -1.5
SIDE_LIMIT = 3.0
COPY_LEVEL = 0.005
"""Limits beyond which an annotator is suspect. `benchmarks/annotation/annotator_model.py` measures how often attentive
annotators are."""


class AttentionTests(NamedTuple):
    """The results of all tests of A annotators, with the fitted model of all of their rankings.

    Attributes:
        fit: includes annotators who prefer a side or copy.
        agreement_A: see `AttentionScores`; from a fit without annotators who prefer a side or copy. They have nan.
        side_A: see `AttentionScores`.
        copy_p_A: see `compute_copy_p_values`.
        rankings_A: number of rankings.
    """

    fit: AnnotatorFit
    agreement_A: Floats
    side_A: Floats
    copy_p_A: Floats
    rankings_A: Ints

    @property
    def prefers_side_A(self) -> NDArray[np.bool_]:
        return self.is_tested_A & (np.abs(self.side_A) > SIDE_LIMIT)

    @property
    def copies_A(self) -> NDArray[np.bool_]:
        can_be_copied = int((self.is_tested_A & ~self.prefers_side_A).sum()) >= MIN_ANNOTATORS
        return self.is_tested_A & (self.copy_p_A < COPY_LEVEL) & can_be_copied

    @property
    def disagrees_A(self) -> NDArray[np.bool_]:
        can_be_compared = int((self.is_tested_A & np.isfinite(self.agreement_A)).sum()) >= MIN_ANNOTATORS
        return self.is_tested_A & (self.agreement_A < AGREEMENT_LIMIT) & can_be_compared

    @property
    def is_tested_A(self) -> NDArray[np.bool_]:
        return self.rankings_A >= MIN_RANKINGS


def apply_attention_tests(blocks: Sequence[RankedItems], annotators: int, seed: int = 0) -> AttentionTests:
    """Fit the model of annotators to rankings, and test each annotator by it.

    Args:
        blocks: the rankings. All rankings of an item are in one block, in the order in which they were given.
        annotators: A.
    """
    fit = fit_annotators(blocks, annotators)
    scores = score_attention(blocks, fit, seed)
    rankings_A = np.bincount(np.concatenate([block.annotator_N for block in blocks]), minlength=annotators)
    tests = AttentionTests(fit, scores.agreement_A, scores.side_A, compute_copy_p_values(blocks, fit), rankings_A)
    is_distorting_A = tests.prefers_side_A | tests.copies_A
    if is_distorting_A.any():
        others = leave_out_annotators(blocks, is_distorting_A)
        agreement_A = (
            score_attention(others, fit_annotators(others, annotators), seed).agreement_A if others else np.nan
        )
        tests = tests._replace(agreement_A=np.where(is_distorting_A, np.nan, agreement_A))
    return tests


def leave_out_annotators(blocks: Sequence[RankedItems], is_left_out_A: NDArray[np.bool_]) -> list[RankedItems]:
    """Return the rankings of the other annotators, and renumber their items."""
    kept_blocks = []
    for block in blocks:
        is_kept_N = ~is_left_out_A[block.annotator_N]
        if is_kept_N.any():
            item_N = np.unique(block.item_N[is_kept_N], return_inverse=True)[1]
            kept_blocks.append(
                RankedItems(item_N, block.annotator_N[is_kept_N], block.tiers_NK[is_kept_N], block.places_NK[is_kept_N])
            )
    return kept_blocks


class AttentionScores(NamedTuple):
    """Differences of annotators' rankings from those of simulated attentive annotators, in standard deviations, [A].

    Attributes:
        agreement_A: how well they follow the strengths that the others' rankings show, less the annotators' median,
            because careless ones among them lower what the model expects. It is nan for annotators who share fewer than
            `MIN_RANKINGS` items with others.
        side_A: how often they prefer answers that came earlier on the screen; negative if they prefer later ones.
    """

    agreement_A: Floats
    side_A: Floats


def score_attention(blocks: Sequence[RankedItems], fit: AnnotatorFit, seed: int = 0) -> AttentionScores:
    """Compare each annotator's rankings with simulated rankings of the same items by attentive annotators.

    Agreement is the log-likelihood ratio of an annotator with the mean ability and one with none. Abilities and
    position biases of the simulated annotators are drawn from the priors of `align.ops.annotators`.
    """
    random = np.random.default_rng(seed)
    annotators = len(fit.traits.ability_A)
    observed_2A = np.zeros((2, annotators))
    simulated_R2A = np.zeros((REPLICATES, 2, annotators))
    ability_RA = fit.ability * (1 + ABILITY_SPREAD * random.standard_normal((REPLICATES, annotators)))
    position_RA = POSITION_SD * random.standard_normal((REPLICATES, annotators))
    for block, strengths in zip(blocks, fit.strengths, strict=True):
        weights_ND = weigh_draws_by_others(block, build_choices(block.tiers_NK), fit.traits, strengths)
        cumulative_ND = weights_ND.cumsum(axis=1)
        draws_NDK = strengths.draw()[block.item_N]
        means_NK = (weights_ND[:, :, None] * draws_NDK).sum(axis=1)
        log_nu_N = fit.traits.log_nu_A[block.annotator_N]
        observed_2A += sum_statistics(block, block.tiers_NK, fit.ability * means_NK, log_nu_N, annotators)
        for ability_A, position_A, simulated_2A in zip(ability_RA, position_RA, simulated_R2A, strict=True):
            draw_N = (random.random((len(draws_NDK), 1)) > cumulative_ND[:, :-1]).sum(axis=1)
            strengths_NK = np.take_along_axis(draws_NDK, draw_N[:, None, None], axis=1)[:, 0]
            shift_NK = position_A[block.annotator_N, None] * block.places_NK
            tiers_NK = draw_rankings(random, ability_A[block.annotator_N, None] * strengths_NK + shift_NK, log_nu_N)
            simulated_2A += sum_statistics(block, tiers_NK, fit.ability * means_NK, log_nu_N, annotators)
    spread_2A = np.maximum(simulated_R2A.std(axis=0, ddof=1), 1e-9)
    agreement_A, side_A = (observed_2A - simulated_R2A.mean(axis=0)) / spread_2A
    shared_A = sum_by_annotator([find_shared_rankings(block) for block in blocks], blocks, annotators)
    agreement_A[shared_A < MIN_RANKINGS] = np.nan
    if np.isfinite(agreement_A).any():
        agreement_A -= np.nanmedian(agreement_A)
    return AttentionScores(agreement_A, side_A)


def find_shared_rankings(ranked: RankedItems) -> NDArray[np.bool_]:
    """Return for each ranking whether others have ranked the item as well, [N]."""
    return np.bincount(ranked.item_N)[ranked.item_N] > 1


def sum_by_annotator(values: Sequence[NDArray[Any]], blocks: Sequence[RankedItems], annotators: int) -> Floats:
    """Return the sum over each annotator's rankings, [A]."""
    annotator_N = np.concatenate([block.annotator_N for block in blocks])
    return np.bincount(annotator_N, np.concatenate(values), annotators).astype(np.float64)


def sum_statistics(
    ranked: RankedItems, tiers_NK: Ints, utilities_NK: Floats, log_nu_N: Floats, annotators: int
) -> Floats:
    """Return both statistics of `AttentionScores`, summed over each annotator's rankings, [2, A]."""
    utilities_N2K = np.stack([utilities_NK, np.zeros_like(utilities_NK)], axis=1)
    likelihoods_N2 = compute_log_likelihoods(build_choices(tiers_NK), utilities_N2K, log_nu_N)
    agreement_N = (likelihoods_N2[:, 0] - likelihoods_N2[:, 1]) * find_shared_rankings(ranked)
    side_N = -(ranked.places_NK * tiers_NK).sum(axis=1)
    return np.stack([sum_by_annotator([values_N], [ranked], annotators) for values_N in (agreement_N, side_N)])


def compute_copy_p_values(blocks: Sequence[RankedItems], fit: AnnotatorFit) -> Floats:
    """Return the probability that as many rankings as an annotator's equal the first ranking of their item by chance,
    [A].

    The chances follow from the strengths that the item's other rankings show. They are corrected by a factor of the
    odds, so that all other annotators together have as many equal rankings as expected.

    Args:
        blocks: the rankings of an item in the order in which they were given.
    """
    chances = []
    equals = []
    annotators = []
    for block, strengths in zip(blocks, fit.strengths, strict=True):
        _, first_I, item_N = np.unique(block.item_N, return_index=True, return_inverse=True)
        first_tiers_NK = block.tiers_NK[first_I][item_N]
        is_later_N = first_I[item_N] != np.arange(len(item_N))
        weights_ND = weigh_draws_by_others(block, build_choices(block.tiers_NK), fit.traits, strengths)
        equal_ND = compute_likelihoods_of_draws(block, build_choices(first_tiers_NK), fit.traits, strengths.draw())
        chances.append((weights_ND * np.exp(equal_ND)).sum(axis=1)[is_later_N])
        equals.append((first_tiers_NK == block.tiers_NK).all(axis=1)[is_later_N])
        annotators.append(block.annotator_N[is_later_N])
    chance_N = np.clip(np.concatenate(chances), 1e-12, 1 - 1e-12)
    logit_N = np.log(chance_N) - np.log1p(-chance_N)
    is_equal_N = np.concatenate(equals)
    annotator_N = np.concatenate(annotators)
    p_values = []
    for annotator in range(len(fit.traits.ability_A)):
        is_own_N = annotator_N == annotator
        shift = solve_shift(logit_N[~is_own_N], int(is_equal_N[~is_own_N].sum()))
        p_values.append(compute_tail(to_probability(logit_N[is_own_N] + shift), int(is_equal_N[is_own_N].sum())))
    return np.array(p_values)


def to_probability(logits: Floats) -> Floats:
    return 1 / (1 + np.exp(-logits))


def solve_shift(logit_N: Floats, total: int) -> float:
    """Return the likeliest shift of log-odds with `total` successes, at most `MAX_SHIFT` either way.

    Its prior is standard normal, so that few trials, or none, shift little.
    """
    low = -MAX_SHIFT
    high = MAX_SHIFT
    for _ in range(40):
        middle = (low + high) / 2
        if to_probability(logit_N + middle).sum() + middle < total:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def compute_tail(chance_N: Floats, count: int) -> float:
    """Return the probability of at least `count` successes in independent trials with these chances."""
    distribution = np.ones(1)
    for chance in chance_N:
        distribution = np.convolve(distribution, (1 - chance, chance))
    return float(min(1.0, distribution[count:].sum()))
