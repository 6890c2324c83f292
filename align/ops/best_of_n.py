"""Estimates of the value of best-of-n sampling and of pass@k, from N ≥ n answers to each prompt."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def list_sizes(max_size: int) -> list[int]:
    """Return the powers of two 1, 2, 4, … below `max_size`, and `max_size` itself."""
    powers = [2**k for k in range(max_size.bit_length()) if 2**k < max_size]
    return [*powers, max_size]


def compute_best_probabilities(n: int, total: int) -> NDArray[np.float64]:
    """Return for each rank the probability that its answer is the best of n drawn without replacement from N answers;
    shape [N]. It is C(i−1, n−1) / C(N, n) for rank i = 1, the worst, to N. The binomials are whole numbers, so that
    nothing overflows.

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
    """Return the indices of each prompt's answers from the highest to the lowest score, int64 [P, N]. Of equal scores
    the answer that was sampled first ranks higher.

    Args:
        scores: [P, N], finite.
    """
    return np.argsort(-np.asarray(scores, dtype=np.float64), axis=1, kind="stable")


def estimate_best_of_n(scores: ArrayLike, values: ArrayLike, n: int) -> NDArray[np.float64]:
    """Estimate for each prompt the mean value of the best-scored of n answers, over all subsets of n of the N answers;
    shape [P]. It is Σᵢ P(rank i is the best of n) · valueᵢ.

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


def estimate_pass_at_k(right: int, answers: int, k: int) -> float:
    """Estimate the probability that at least one of k answers to a prompt is right, without bias: 1 − C(n−c, k)/C(n, k)
    for c right ones among n answers. It is best-of-k of scores that are 0 or 1.

    Source: Chen et al. 2021, "Evaluating large language models trained on code".

    Args:
        k: from 1 to `answers`.

    Raises:
        ValueError: k is not from 1 to `answers`.
    """
    if not 1 <= k <= answers:
        raise ValueError(f"k={k} is not from 1 to {answers}")
    return 1 - math.comb(answers - right, k) / math.comb(answers, k)


def compute_kl_bound(n: int) -> float:
    """Return ln n − (n−1)/n, an upper bound of KL(best-of-n ‖ policy) in nats. It is reached if no two answers have the
    same score.

    Sources: Stiennon et al. 2020, "Learning to summarize from human feedback", appendix G; that it is a bound: Beirami
    et al. 2024, "Theoretical guarantees on the best-of-n alignment policy".
    """
    return math.log(n) - (n - 1) / n
