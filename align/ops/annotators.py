"""A model of annotators: how closely each one follows the strengths of the answers and the order on the screen.

The strengths θ of an item's K answers are independent and standard normal. Annotator a ranks the answers by the
Davidson-Luce model (`align.ops.rankings`) with the utilities β·θ + γ·x, where x goes from ½ for the first answer on the
screen to −½ for the last. β is the annotator's ability and γ the position bias; ν says how readily the annotator gives
ties. Their priors are normal: β ~ N(μ, (ABILITY_SPREAD·μ)²), γ ~ N(0, POSITION_SD²), ln ν ~ N(m, TIE_SD²), and μ and m
are fitted. With two answers, β·(θ₁ − θ₂) + γ·(x₁ − x₂) are the log-odds of the first.

`fit_annotators` finds the likeliest traits by expectation-maximisation, with the normal distribution of the strengths
that is nearest to their posterior (variational inference).

Source: Chen, Bennett, Collins-Thompson and Horvitz 2013, "Pairwise ranking aggregation in a crowdsourced setting", for
abilities beside the strengths.

Shapes: N rankings, I items, K answers, C = K − 1 contrasts of an item's strengths, A annotators, D draws of the
strengths, F subsets of the answers, 3 traits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from align.ops.rankings import (
    Choices,
    Floats,
    Ints,
    build_choices,
    compute_log_likelihoods,
    compute_log_sums,
    differentiate_by_coefficients,
    differentiate_by_utilities,
    list_subsets,
)

ABILITY = 0.8
ABILITY_LOG_SD = 0.5
"""Prior of μ: ln μ ~ N(ln ABILITY, ABILITY_LOG_SD²). An annotator with an ability of 0.5 orders some 63 % of
random pairs as their strengths do, and one with 1 some 73 %."""
ABILITY_SPREAD = 0.35
POSITION_SD = 0.5
LOG_NU = -1.0
TIE_SD = 1.0

DRAWS = 32
MAX_ITERATIONS = 60
TOLERANCE = 1e-3
"""The fit ends when an iteration changes no ability by more."""
STEPS = 2
"""Steps of the strengths' distribution in one iteration."""
MIN_CURVATURE = 0.1
"""Smallest curvature of the likelihood in ln μ, relative to that with known strengths."""
MAX_STEP = 0.5


class RankedItems(NamedTuple):
    """Rankings of I items with K answers each.

    Attributes:
        item_N: number of the item of each ranking, 0 to I − 1.
        annotator_N: number of its annotator.
        tiers_NK: number of the tier of each answer; 0 is the best.
        places_NK: ½ for the first answer on the screen to −½ for the last; 0 if the order is not known.
    """

    item_N: Ints
    annotator_N: Ints
    tiers_NK: Ints
    places_NK: Floats

    @property
    def items(self) -> int:
        return int(self.item_N.max()) + 1


class Traits(NamedTuple):
    """The traits of A annotators: abilities β, position biases γ, and ln ν."""

    ability_A: Floats
    position_A: Floats
    log_nu_A: Floats


class Strengths(NamedTuple):
    """Normal distributions of the strengths of I items' answers, about their mean within the item.

    A ranking says nothing about what all answers of an item have in common, so C = K − 1 coordinates suffice.

    Attributes:
        means_IC: means of the coordinates, see `build_contrasts`.
        roots_ICC: a factor R of their covariance, R·Rᵀ.
    """

    means_IC: Floats
    roots_ICC: Floats

    @classmethod
    def standard(cls, items: int, k: int) -> Strengths:
        """Return the prior."""
        return cls(np.zeros((items, k - 1)), np.tile(np.eye(k - 1), (items, 1, 1)))

    def draw(self) -> Floats:
        """Return strengths whose mean and covariance over the draws are those of the distributions, [I, D, K]."""
        count = self.means_IC.shape[1]
        draws_IDC = self.means_IC[:, None, :] + draw_normals(DRAWS, count) @ self.roots_ICC.transpose(0, 2, 1)
        return draws_IDC @ build_contrasts(count + 1).T


@dataclass(frozen=True, slots=True)
class AnnotatorFit:
    """The fitted model.

    Attributes:
        traits: of each annotator.
        ability: μ, the mean ability.
        strengths: of the answers, one for each block of items.
    """

    traits: Traits
    ability: float
    strengths: Sequence[Strengths]


def fit_annotators(blocks: Sequence[RankedItems], annotators: int) -> AnnotatorFit:
    """Fit the traits of annotators and the strengths of answers to rankings.

    Args:
        blocks: the rankings. All rankings of an item are in one block.
        annotators: A. Annotators without rankings have the traits of the prior.
    """
    choices = [build_choices(block.tiers_NK) for block in blocks]
    ability = ABILITY
    log_nu = LOG_NU
    traits = Traits(np.full(annotators, ability), np.zeros(annotators), np.full(annotators, log_nu))
    strengths = [Strengths.standard(block.items, block.tiers_NK.shape[1]) for block in blocks]
    for _ in range(MAX_ITERATIONS):
        strengths = [
            improve_strengths(block, block_choices, traits, block_strengths)
            for block, block_choices, block_strengths in zip(blocks, choices, strengths, strict=True)
        ]
        ability_before_A = traits.ability_A
        traits = improve_traits(blocks, choices, strengths, traits, ability, log_nu)
        # The size of the abilities is updated separately: expectation-maximisation approaches it slowly.
        scaled_ability = ability * np.exp(compute_scale_step(strengths, ability))
        traits = traits._replace(ability_A=traits.ability_A * scaled_ability / traits.ability_A.mean())
        ability = float(scaled_ability)
        log_nu = float(traits.log_nu_A.mean())
        if np.abs(traits.ability_A - ability_before_A).max() < TOLERANCE:
            break
    return AnnotatorFit(traits, ability, strengths)


@lru_cache(maxsize=16)
def draw_normals(count: int, k: int) -> Floats:
    """Return quasi-random standard normal vectors, [count, K], in pairs of opposite signs and with the covariance 1.

    Source: the additive recurrence of Roberts 2018, "The unreasonable effectiveness of quasirandom sequences".
    """
    root = 2.0
    for _ in range(64):
        root = (1 + root) ** (1 / (k + 1))
    uniform = (0.5 + np.arange(1, count // 2 + 1)[:, None] * root ** -np.arange(1, k + 1)) % 1
    half = np.vectorize(NormalDist().inv_cdf)(uniform)
    root_KK = np.linalg.cholesky(half.T @ half / len(half))
    half = np.linalg.solve(root_KK, half.T).T
    return np.concatenate([half, -half])


@lru_cache(maxsize=16)
def build_contrasts(k: int) -> Floats:
    """Return orthonormal contrasts of K values, [K, K − 1]: vectors whose elements sum to 0."""
    return np.linalg.qr(np.eye(k)[:, : k - 1] - 1 / k)[0]


def improve_strengths(ranked: RankedItems, choices: Choices, traits: Traits, strengths: Strengths) -> Strengths:
    """Return distributions of the strengths that are some steps nearer to their posterior given the traits.

    A fixed point has the mean at which the expected gradient of the log-posterior vanishes, and the expected Hessian as
    negative inverse covariance. Source: Opper and Archambeau 2009, "The variational Gaussian approximation revisited".
    """
    k = ranked.tiers_NK.shape[1]
    basis_KC = build_contrasts(k)
    ability_N1 = traits.ability_A[ranked.annotator_N, None]
    shift_N1K = (traits.position_A[ranked.annotator_N, None] * ranked.places_NK)[:, None, :]
    log_nu_N = traits.log_nu_A[ranked.annotator_N]
    for _ in range(STEPS):
        utilities_NDK = ability_N1[:, :, None] * strengths.draw()[ranked.item_N] + shift_N1K
        gradient_NK, information_NKK = differentiate_by_utilities(choices, utilities_NDK, log_nu_N)
        gradient_IC = -strengths.means_IC
        np.add.at(gradient_IC, ranked.item_N, ability_N1 * (gradient_NK @ basis_KC))
        information_ICC = np.tile(np.eye(k - 1), (len(gradient_IC), 1, 1))
        information_NCC = basis_KC.T @ information_NKK @ basis_KC
        np.add.at(information_ICC, ranked.item_N, ability_N1[:, :, None] ** 2 * information_NCC)
        step_IC = np.linalg.solve(information_ICC, gradient_IC[:, :, None])[:, :, 0]
        means_IC = strengths.means_IC + step_IC / np.maximum(np.linalg.norm(step_IC, axis=1, keepdims=True), 1)
        roots_ICC = np.linalg.cholesky(np.linalg.inv(information_ICC))
        strengths = Strengths(means_IC, roots_ICC.astype(np.float64))
    return strengths


def compute_likelihoods_of_draws(ranked: RankedItems, choices: Choices, traits: Traits, draws_IDK: Floats) -> Floats:
    """Return ln P(ranking | strengths) of each ranking under each draw of its item's strengths, [N, D]."""
    shift_N1K = (traits.position_A[ranked.annotator_N, None] * ranked.places_NK)[:, None, :]
    utilities_NDK = traits.ability_A[ranked.annotator_N, None, None] * draws_IDK[ranked.item_N] + shift_N1K
    return compute_log_likelihoods(choices, utilities_NDK, traits.log_nu_A[ranked.annotator_N])


def weigh_draws_by_others(ranked: RankedItems, choices: Choices, traits: Traits, strengths: Strengths) -> Floats:
    """Return weights of the draws of each ranking's item given the item's other rankings, [N, D], which sum to 1."""
    log_weights_ND = -compute_likelihoods_of_draws(ranked, choices, traits, strengths.draw())
    return np.exp(log_weights_ND - compute_log_sums(log_weights_ND)[:, None])


def improve_traits(
    blocks: Sequence[RankedItems],
    choices: Sequence[Choices],
    strengths: Sequence[Strengths],
    traits: Traits,
    ability: float,
    log_nu: float,
) -> Traits:
    """Return traits that are a Newton step nearer to the maximum of the expected log-likelihood and the prior.

    Args:
        ability, log_nu: means of the prior, μ and m.
    """
    current_A3 = np.stack(traits, axis=1)
    precision_3 = np.array([ABILITY_SPREAD * ability, POSITION_SD, TIE_SD]) ** -2
    gradient_A3 = precision_3 * (np.array([ability, 0.0, log_nu]) - current_A3)
    information_A33 = np.tile(np.diag(precision_3), (len(current_A3), 1, 1))
    for block, block_choices, block_strengths in zip(blocks, choices, strengths, strict=True):
        means_FK, extra_F = list_subsets(block.tiers_NK.shape[1])
        strength_NDF = (block_strengths.draw() @ means_FK.T)[block.item_N]
        place_N1F = (block.places_NK @ means_FK.T)[:, None, :]
        ability_N11, position_N11, log_nu_N11 = (trait_A[block.annotator_N, None, None] for trait_A in traits)
        scores_NDF = ability_N11 * strength_NDF + position_N11 * place_N1F + log_nu_N11 * extra_F
        gradient_N3, information_N33 = differentiate_by_coefficients(
            block_choices, scores_NDF, (strength_NDF, place_N1F, extra_F)
        )
        np.add.at(gradient_A3, block.annotator_N, gradient_N3)
        np.add.at(information_A33, block.annotator_N, information_N33)
    step_A3 = np.linalg.solve(information_A33, gradient_A3[:, :, None])[:, :, 0]
    return Traits(*(current_A3 + np.clip(step_A3, -MAX_STEP, MAX_STEP)).T)


def compute_scale_step(strengths: Sequence[Strengths], ability: float) -> float:
    """Return a Newton step of ln μ, with all abilities in proportion, towards the maximum of likelihood and prior.

    To multiply all abilities by a factor is to multiply the prior standard deviation of the strengths by it. Its score
    is that of the complete data, and its curvature theirs less the variance of the score. Source: Louis 1982, "Finding
    the observed information matrix when using the EM algorithm".
    """
    score = (np.log(ABILITY) - np.log(ability)) / ABILITY_LOG_SD**2
    curvature = ABILITY_LOG_SD**-2
    for block_strengths in strengths:
        squares_ID = (block_strengths.draw() ** 2).sum(axis=2)
        complete = 2 * float(squares_ID.mean(axis=1).sum())
        score += complete / 2 - block_strengths.means_IC.size
        curvature += max(complete - float(squares_ID.var(axis=1).sum()), MIN_CURVATURE * complete)
    return float(np.clip(score / curvature, -MAX_STEP, MAX_STEP))
