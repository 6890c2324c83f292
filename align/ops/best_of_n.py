"""Estimate the value of best-of-n sampling from N ≥ n answers to each prompt."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def list_sizes(max_size: int) -> list[int]:
    """Return 1, 2, 4, … up to `max_size`, and `max_size` itself."""
    powers = [2**k for k in range(max_size.bit_length()) if 2**k < max_size]
    return [*powers, max_size]


def compute_best_probabilities(n: int, total: int) -> NDArray[np.float64]:
    """Return P(the answer of rank i is the best of n drawn without replacement from N) = C(i−1, n−1) / C(N, n), for
    i = 1, the worst, to N; shape [N]. The binomials are whole numbers, so that nothing overflows.

    Args:
        n: from 1 to N.
        total: N.

    Raises:
        ValueError: n is not from 1 to N.
    """
    if not 1 <= n <= total:
        raise ValueError(f"n={n} is not from 1 to {total}")
    ways = math.comb(total, n)
    return np.array([math.comb(i - 1, n - 1) / ways for i in range(1, total + 1)])


def rank_answers(scores: ArrayLike) -> NDArray[np.int64]:
    """Return the indices of the answers to each prompt from the best to the worst, [P, N]. Of equal scores the answer
    that was sampled first ranks higher.

    Args:
        scores: [P, N], finite.
    """
    return np.argsort(-np.asarray(scores, dtype=np.float64), axis=1, kind="stable")


def estimate_best_of_n(scores: ArrayLike, values: ArrayLike, n: int) -> NDArray[np.float64]:
    """Return the mean value of the answer that the scores rank first among n, over all subsets of n of the N answers:
    Σᵢ P(rank i is the best of n) · valueᵢ, for each prompt; shape [P].

    Over N independent answers it is an unbiased estimate of the value of best-of-n, with less variance than one draw of
    n has. Sources: Nakano et al. 2021, "WebGPT: Browser-assisted question-answering with human feedback", appendix I;
    Gao, Schulman and Hilton 2022, "Scaling laws for reward model overoptimization".

    Args:
        scores: scores that rank the answers, [P, N], in the order of sampling.
        values: values of the answers, [P, N]: the scores themselves, or those of another scorer.
        n: number of answers that the best is chosen from, 1 to N.
    """
    ranked = np.take_along_axis(np.asarray(values, dtype=np.float64), rank_answers(scores)[:, ::-1], axis=1)
    return ranked @ compute_best_probabilities(n, ranked.shape[1])


def compute_kl_bound(n: int) -> float:
    """Return ln n − (n−1)/n, in nats: an upper bound of KL(best-of-n ‖ policy), which is reached if no two answers have
    the same score.

    Sources: Stiennon et al. 2020, "Learning to summarize from human feedback", appendix G; that it is a bound: Beirami
    et al. 2024, "Theoretical guarantees on the best-of-n alignment policy".
    """
    return math.log(n) - (n - 1) / n
