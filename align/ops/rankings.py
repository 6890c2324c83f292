"""The Davidson-Luce model of rankings with ties: log-likelihoods, their derivatives, and random rankings.

A ranking is a sequence of choices. Of the answers R that are left, the next tier T is chosen with a probability
proportional to

    ν^(|T| − 1) · exp(mean of the utilities of T)

among all non-empty subsets of R, until one answer or none is left. With two answers it is Davidson's model, and without
ties (ν = 0) that of Plackett and Luce, or of Bradley and Terry for two answers. Its log-likelihood is concave in the
utilities and ln ν.

Source: Turner, van Etten, Firth and Kosmidis 2020, "Modelling rankings in R: the PlackettLuce package", section 2;
Davidson 1970, "On extending the Bradley-Terry model to accommodate ties in paired comparison experiments".

Shapes: N rankings, K answers, F subsets (2^K − 1), T choices, D draws of the utilities, P coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Subsets(NamedTuple):
    """The non-empty subsets of K answers. Subset number f, from 0, has the answers at the bits of f + 1.

    Attributes:
        means_FK: 1 / size for each member, so that `means_FK @ utilities` has the subsets' mean utilities.
        extra_F: size − 1.
    """

    means_FK: Floats
    extra_F: Floats


@lru_cache(maxsize=16)
def list_subsets(k: int) -> Subsets:
    members_FK = (np.arange(1, 2**k)[:, None] >> np.arange(k) & 1).astype(np.float64)
    sizes_F = members_FK.sum(axis=1)
    return Subsets(members_FK / sizes_F[:, None], sizes_F - 1)


class Choices(NamedTuple):
    """The choices of tiers of N rankings of K answers.

    Attributes:
        chosen_NT: number of the chosen subset; 0 where there is no choice.
        is_open_NTF: whether a subset may be chosen: its answers are left. All are True where there is no choice.
        exists_NT: whether there is a choice.
    """

    chosen_NT: Ints
    is_open_NTF: NDArray[np.bool_]
    exists_NT: NDArray[np.bool_]


def build_choices(tiers_NK: Ints) -> Choices:
    """Return the choices that rankings consist of.

    Args:
        tiers_NK: the number of each answer's tier; 0 is the best.
    """
    k = tiers_NK.shape[1]
    bits_K = 1 << np.arange(k)
    steps_T = np.arange(max(k - 1, 1))
    chosen_NT = (bits_K * (tiers_NK[:, None, :] == steps_T[:, None])).sum(axis=2)
    left_NTK = tiers_NK[:, None, :] >= steps_T[:, None]
    exists_NT = (chosen_NT > 0) & (left_NTK.sum(axis=2) > 1)
    left_NT = np.where(exists_NT, (bits_K * left_NTK).sum(axis=2), 2**k - 1)
    is_open_NTF = (np.arange(1, 2**k) & ~left_NT[:, :, None]) == 0
    return Choices(np.where(exists_NT, chosen_NT - 1, 0), is_open_NTF, exists_NT)


def compute_scores(utilities_NDK: Floats, log_nu_N: Floats) -> Floats:
    """Return the log-weight of each subset of answers in N rankings under D utilities each, [N, D, F]."""
    means_FK, extra_F = list_subsets(utilities_NDK.shape[2])
    return utilities_NDK @ means_FK.T + (log_nu_N[:, None] * extra_F)[:, None, :]


def compute_log_likelihoods(choices: Choices, utilities_NDK: Floats, log_nu_N: Floats) -> Floats:
    """Return ln P(ranking) of N rankings under D utilities each, [N, D].

    Args:
        log_nu_N: ln ν of each ranking's annotator.
    """
    scores_NDF = compute_scores(utilities_NDK, log_nu_N)
    total_ND = np.zeros(scores_NDF.shape[:2])
    for t in range(choices.chosen_NT.shape[1]):
        open_N1F = choices.is_open_NTF[:, t][:, None, :]
        log_sums_ND = compute_log_sums(np.where(open_N1F, scores_NDF, -np.inf))
        total_ND += choices.exists_NT[:, t][:, None] * (select_chosen(choices, t, scores_NDF) - log_sums_ND)
    return total_ND


def compute_log_sums(values: Floats) -> Floats:
    """Return ln Σ exp over the last axis, whose maximum must be finite."""
    peak = values.max(axis=-1, keepdims=True)
    return np.log(np.exp(values - peak).sum(axis=-1)) + peak[..., 0]


def select_chosen(choices: Choices, t: int, values_NDF: Floats) -> Floats:
    """Return the values of the subsets that were chosen in choice t, [N, D]."""
    return np.take_along_axis(values_NDF, choices.chosen_NT[:, t][:, None, None], axis=2)[:, :, 0]


def compute_weights(scores_NDF: Floats) -> Floats:
    """Return the weights of the subsets relative to the largest of the ranking, [N, D, F]."""
    return np.exp(scores_NDF - scores_NDF.max(axis=(1, 2), keepdims=True))


def compute_probabilities(choices: Choices, t: int, weights_NDF: Floats) -> Floats:
    """Return the probability of each subset in choice t, [N, D, F]; 0 where there is no choice."""
    open_NDF = weights_NDF * choices.is_open_NTF[:, t][:, None, :]
    open_NDF *= (choices.exists_NT[:, t, None] / sum_subsets(open_NDF))[:, :, None]
    return open_NDF


def sum_subsets(values_NDF: Floats) -> Floats:
    """Return the sum over subsets, [N, D], several times as fast as NumPy's."""
    return values_NDF @ np.ones(values_NDF.shape[2])


class Derivatives(NamedTuple):
    """Derivatives of ln P(ranking) by P coordinates, averaged over D utilities.

    Attributes:
        gradient_NP: [N, P].
        information_NPP: minus the Hessian, [N, P, P]; positive semidefinite.
    """

    gradient_NP: Floats
    information_NPP: Floats


def differentiate_by_utilities(choices: Choices, utilities_NDK: Floats, log_nu_N: Floats) -> Derivatives:
    """Return the derivatives of the log-likelihoods of N rankings by the K utilities."""
    means_FK, _ = list_subsets(utilities_NDK.shape[2])
    count, draws, k = utilities_NDK.shape
    products_FR = (means_FK[:, :, None] * means_FK[:, None, :]).reshape(len(means_FK), -1)
    weights_NDF = compute_weights(compute_scores(utilities_NDK, log_nu_N))
    gradient_NK = np.zeros((count, k))
    information_NKK = np.zeros((count, k, k))
    for t in range(choices.chosen_NT.shape[1]):
        probabilities_NDF = compute_probabilities(choices, t, weights_NDF)
        expected_NDK = probabilities_NDF @ means_FK
        gradient_NK += choices.exists_NT[:, t, None] * means_FK[choices.chosen_NT[:, t]] - expected_NDK.mean(axis=1)
        information_NKK += (probabilities_NDF.mean(axis=1) @ products_FR).reshape(information_NKK.shape)
        information_NKK -= expected_NDK.transpose(0, 2, 1) @ expected_NDK / draws
    return Derivatives(gradient_NK, information_NKK)


def differentiate_by_coefficients(choices: Choices, scores_NDF: Floats, features: Sequence[Floats]) -> Derivatives:
    """Return the derivatives by P coefficients. The subsets' log-weights are linear functions of them.

    Args:
        scores_NDF: log-weights of the subsets.
        features: their derivatives by each of the P coefficients, of shapes that broadcast to [N, D, F].
    """
    count = len(scores_NDF)
    size = len(features)
    weights_NDF = compute_weights(scores_NDF)
    gradient_NP = np.zeros((count, size))
    information_NPP = np.zeros((count, size, size))
    for t in range(choices.chosen_NT.shape[1]):
        probabilities_NDF = compute_probabilities(choices, t, weights_NDF)
        weighted = [probabilities_NDF * feature for feature in features]
        expected = [sum_subsets(weighted_NDF) for weighted_NDF in weighted]
        for p in range(size):
            chosen_ND = select_chosen(choices, t, np.broadcast_to(features[p], scores_NDF.shape))
            gradient_NP[:, p] += (choices.exists_NT[:, t, None] * chosen_ND - expected[p]).mean(axis=1)
            for q in range(p + 1):
                square_ND = sum_subsets(weighted[p] * features[q]) - expected[p] * expected[q]
                information_NPP[:, p, q] += square_ND.mean(axis=1)
    lower_NPP = np.tril(information_NPP, -1)
    return Derivatives(gradient_NP, information_NPP + lower_NPP.transpose(0, 2, 1))


def draw_rankings(random: np.random.Generator, utilities_NK: Floats, log_nu_N: Floats) -> Ints:
    """Return random rankings under the model: the number of each answer's tier, [N, K]."""
    means_FK, _ = list_subsets(utilities_NK.shape[1])
    scores_NF = compute_scores(utilities_NK[:, None, :], log_nu_N)[:, 0]
    members_FK = means_FK > 0
    tiers_NK = np.full(utilities_NK.shape, -1)
    for t in range(utilities_NK.shape[1]):
        is_open_NF = ~(members_FK & (tiers_NK >= 0)[:, None, :]).any(axis=2)
        noisy_NF = np.where(is_open_NF, scores_NF + random.gumbel(size=scores_NF.shape), -np.inf)
        is_chosen_NK = members_FK[noisy_NF.argmax(axis=1)] & (tiers_NK < 0)
        tiers_NK[is_chosen_NK] = t
    return tiers_NK
