"""Best-of-n: what the best of n answers is worth, estimated from N ≥ n answers to each prompt. Pure functions, without
torch."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def sizes(most: int) -> list[int]:
    """1, 2, 4, … up to `most`, and `most` itself."""
    powers = [2**k for k in range(most.bit_length()) if 2**k < most]
    return [*powers, most]


def chance_of_best(n: int, of: int) -> NDArray[np.float64]:
    """P(the answer of rank i is the best of n that are drawn without replacement from N) = C(i−1, n−1) / C(N, n), for
    i = 1, the worst, to N; shape [N]. The binomials are whole numbers, so that nothing overflows.

    Args:
        n: from 1 to N.
        of: N.

    Raises:
        ValueError: n is not from 1 to N.
    """
    if not 1 <= n <= of:
        raise ValueError(f"n={n} is not from 1 to {of}")
    ways = math.comb(of, n)
    return np.array([math.comb(i - 1, n - 1) / ways for i in range(1, of + 1)])


def best_first(scores: ArrayLike) -> NDArray[np.int64]:
    """The answers to each prompt from the best to the worst, [P, N]; of equal scores the first drawn is the better.

    Args:
        scores: [P, N], finite.
    """
    return np.argsort(-np.asarray(scores, dtype=np.float64), axis=1, kind="stable")


def best_of_n(scores: ArrayLike, values: ArrayLike, n: int) -> NDArray[np.float64]:
    """The mean value of the answer that the scores rank first among n, over all subsets of n of the N answers: Σᵢ
    P(rank i is the best of n) · valueᵢ, for each prompt; shape [P].

    Over N independent answers it is an unbiased estimate of the value of best-of-n, with less variance than one draw of
    n has. Sources: Nakano et al. 2021, "WebGPT: Browser-assisted question-answering with human feedback", appendix I;
    Gao, Schulman and Hilton 2022, "Scaling laws for reward model overoptimization".

    Args:
        scores: what ranks the answers, [P, N], in the order in which they were drawn.
        values: what the winner is measured by, [P, N]: the scores themselves, or those of another scorer.
        n: answers that one is chosen from, 1 to N.
    """
    ranked = np.take_along_axis(np.asarray(values, dtype=np.float64), best_first(scores)[:, ::-1], axis=1)
    return ranked @ chance_of_best(n, ranked.shape[1])


def kl_bound(n: int) -> float:
    """ln n − (n−1)/n, in nats: an upper bound of KL(best-of-n ‖ policy), reached where no two answers have the same
    score.

    Sources: Stiennon et al. 2020, "Learning to summarize from human feedback", appendix G; that it is a bound: Beirami
    et al. 2024, "Theoretical guarantees on the best-of-n alignment policy".
    """
    return math.log(n) - (n - 1) / n
