"""Two systems on the same prompts: the difference of their means, with its interval and p. Pure functions.

Both answered the same prompts, so that a prompt's difficulty cancels out of the difference: a test that does not pair
them finds few of the differences that are there (`benchmarks/evals/coverage.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.evals.stats.observed import Clusters, cluster_means, columns, places, within
from align.evals.stats.power import MOST, POWER
from align.ops.intervals import PRIOR, Interval, mean, normal_quantile, proportion

ENUMERATED = 13
"""Differences whose 2¹³ flips are all counted; of more, a sample is drawn."""
FLIPS = 9_999
"""Random flips; with what was observed, the smallest p is 1/10,000."""
DIFFERENCE_PRIOR = PRIOR / 2
"""For `proportion` of differences. They lie on both sides of the middle, where few of them say more than few failures
do. By simulation, 32 prompts of four answers cover 0.93 to 0.983; with `PRIOR` up to 0.994, with a quarter of it 0.907
upwards."""
BLOCK = 1_000
"""Flips of all signs held in memory at once."""


@dataclass(frozen=True, slots=True)
class Paired:
    """The first system beside the second.

    Attributes:
        first, second: the mean of each, with its own interval. These may overlap where the difference is clear.
        difference: first − second, paired by cluster.
        p: two-sided, of the hypothesis that swapping the two within a cluster changes nothing.
        better, worse, equal: clusters whose difference is above, below and at 0.
    """

    first: Interval
    second: Interval
    difference: Interval
    p: float
    better: int
    worse: int
    equal: int

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def paired_shares(first: ArrayLike, second: ArrayLike, clusters: Clusters | None = None, level: float = 0.95) -> Paired:
    """Compare outcomes within [0, 1], such as right and wrong.

    Where every cluster's difference d is −1, 0 or 1, it has Tango's score interval. Elsewhere (d + 1)/2 is a share: it
    has Wilson's interval at the effective number of clusters, also where all are equal.

    Args:
        first, second: one outcome a row, shape [n] each; row i of both answers one prompt.
        clusters: what each row shares with others: the prompt of several answers, the source of several prompts. Each
            cluster counts once. Without, each row is one.

    Raises:
        ValueError: no rows, numbers of rows that differ, or a value that is outside [0, 1] or not finite.
    """
    a, b = _means(first, second, clusters, shares=True)
    return _paired(proportion(a, level=level), proportion(b, level=level), _of_shares(a - b, level), a - b)


def paired_scores(first: ArrayLike, second: ArrayLike, clusters: Clusters | None = None, level: float = 0.95) -> Paired:
    """Compare scores of any range, such as rewards, losses or grades.

    Args:
        first, second, clusters: as of `paired_shares`.

    Raises:
        ValueError: no rows, numbers of rows that differ, or a value that is not finite.
    """
    a, b = _means(first, second, clusters, shares=False)
    return _paired(mean(a, level), mean(b, level), mean(a - b, level), a - b)


def share_difference(
    first: ArrayLike, second: ArrayLike, clusters: Clusters | None = None, level: float = 0.95
) -> Interval:
    """The difference of `paired_shares` alone, which is all that a gate asks for; p takes most of the time.

    See `paired_shares`.
    """
    a, b = _means(first, second, clusters, shares=True)
    return _of_shares(a - b, level)


def bounded_difference(
    first: ArrayLike, second: ArrayLike, clusters: Clusters | None = None, level: float = 0.95
) -> Interval:
    """The same with Tango's interval whatever the differences are: what a gate asks, whose bound may lie where the
    variance of few differences says nothing. Of fractions it is wider than it need be."""
    a, b = _means(first, second, clusters, shares=True)
    return _tango(a - b, level)


def needed_pairs(
    first: ArrayLike, second: ArrayLike, bound: float, clusters: Clusters | None = None, level: float = 0.95
) -> int | None:
    """The fewest clusters whose `bounded_difference` would leave a bound in four of five cases if as large a share of
    them is won and lost: those with which it just leaves it, times ((z₁ + z₂)/z₁)², as for a mean. Where no cluster
    differs none is expected to, and nothing is left to chance. None where the difference is at the bound, or it takes
    more than 10⁹.

    Args:
        first, second, clusters: as of `paired_shares`.
    """
    a, b = _means(first, second, clusters, shares=True)
    d = a - b
    won, lost = float(np.maximum(d, 0).mean()), float(np.maximum(-d, 0).mean())
    z = normal_quantile(level)
    chance = ((z + normal_quantile(2 * POWER - 1)) / z) ** 2 if won or lost else 1.0

    def leaves(n: int) -> bool:
        found = _tango_of(won * n, lost * n, n, level)
        assert found.low is not None
        assert found.high is not None
        return not found.low <= bound <= found.high

    most = 1
    while not leaves(most):
        if (most := 2 * most) > MOST:
            return None
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if leaves(middle) else (middle, most)
    return math.ceil(most * chance)


def _end(beyond: Callable[[float], bool], inside: float, outside: float) -> float:
    """Where it begins to hold, between a point inside and one outside; the latter, where it never does."""
    if not beyond(outside):
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if beyond(middle) else (middle, outside)
    return inside


def score_difference(
    first: ArrayLike, second: ArrayLike, clusters: Clusters | None = None, level: float = 0.95
) -> Interval:
    """The difference of `paired_scores` alone, with Student's interval over clusters. Where all differences are equal
    there is none: nothing bounds the next one."""
    a, b = _means(first, second, clusters, shares=False)
    return mean(a - b, level)


def _means(
    first: ArrayLike, second: ArrayLike, clusters: Clusters | None, shares: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each cluster's mean outcome of either system, shape [C] each."""
    one, other = columns(first=first, second=second)
    if shares:
        within(0, 1, first=one, second=other)
    at = places(clusters, one.size)
    return cluster_means(at, one), cluster_means(at, other)


def _of_shares(d: NDArray[np.float64], level: float) -> Interval:
    if np.isin(d, (-1.0, 0.0, 1.0)).all():
        return _tango(d, level)
    share = proportion(np.clip((d + 1) / 2, 0, 1), level=level, prior=DIFFERENCE_PRIOR)
    assert share.low is not None  # a share always has an interval
    assert share.high is not None
    return Interval(float(d.mean()), 2 * share.low - 1, 2 * share.high - 1, d.size)


def _tango(d: NDArray[np.float64], level: float) -> Interval:
    return _tango_of(float(d[d > 0].sum()), float(-d[d < 0].sum()), d.size, level)


def _tango_of(won: float, lost: float, n: int, level: float) -> Interval:
    """Of n differences, b the sum of those above 0 and c of those below, it holds all δ with
    |b − c − nδ| ≤ z·√(n·(2q + δ(1 − δ))), q being the likeliest share of losses under δ.

    Source: Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design".
    """
    value, z = (won - lost) / n, normal_quantile(level)

    def beyond(delta: float) -> bool:
        """Whether the differences are too far from δ."""
        middle = -won - lost + (2 * n - won + lost) * delta
        root = math.sqrt(max(0.0, middle * middle + 8 * n * lost * delta * (1 - delta)))
        spread = n * ((root - middle) / (2 * n) + delta * (1 - delta))
        return abs(won - lost - n * delta) > z * math.sqrt(max(0.0, spread))

    return Interval(value, _end(beyond, value, -1.0), _end(beyond, value, 1.0), n)


def _paired(first: Interval, second: Interval, difference: Interval, d: NDArray[np.float64]) -> Paired:
    better, worse = int((d > 0).sum()), int((d < 0).sum())
    return Paired(first, second, difference, sign_flip(d), better, worse, d.size - better - worse)


def sign_flip(differences: ArrayLike) -> float:
    """The two-sided p of Fisher's test by flips of signs: how often |Σ ±d| is at least |Σ d|.

    If the systems are equal, each cluster's difference is as likely to have the other sign, whatever ties the rows of a
    cluster to each other. So the test is exact with clusters, where McNemar's on single rows is not. Where all
    differences that are not 0 have one size it is McNemar's exact test, from the binomial distribution. Otherwise up
    to 2¹³ flips are counted, and of more a sample of 9,999 is drawn with a fixed seed.

    Sources: Fisher 1935, "The Design of Experiments", section 21; McNemar 1947, "Note on the sampling error of the
    difference between correlated proportions"; Phipson and Smyth 2010, "Permutation p-values should never be zero".

    Args:
        differences: one a cluster, shape [C].

    Raises:
        ValueError: no differences, or one that is not finite.
    """
    (given,) = columns(differences=differences)
    d = given[given != 0]
    if not d.size:
        return 1.0
    if np.ptp(np.abs(d)) == 0:
        return binomial_p(int((d > 0).sum()), d.size)
    observed = abs(float(d.sum())) - 1e-9 * float(np.abs(d).sum())  # sums that are equal but for rounding count
    if d.size <= ENUMERATED:
        signs = 1 - 2 * ((np.arange(1 << d.size)[:, None] >> np.arange(d.size)) & 1)
        return float((np.abs(signs @ d) >= observed).mean())
    draw, extreme, width = np.random.default_rng(0), 0, -(-d.size // 8)
    for start in range(0, FLIPS, BLOCK):
        rows = min(BLOCK, FLIPS - start)
        bits = np.frombuffer(draw.bytes(rows * width), np.uint8).reshape(rows, width)
        flipped = np.unpackbits(bits, axis=1, count=d.size).astype(np.float64)
        extreme += int((np.abs(d.sum() - 2 * (flipped @ d)) >= observed).sum())
    return (extreme + 1) / (FLIPS + 1)


def binomial_p(heads: int, throws: int) -> float:
    """The two-sided p of so many heads of a fair coin: twice the smaller tail, at most 1."""
    log_half, log_all = throws * math.log(2), math.lgamma(throws + 1)
    tail = sum(
        math.exp(log_all - math.lgamma(k + 1) - math.lgamma(throws - k + 1) - log_half)
        for k in range(min(heads, throws - heads) + 1)
    )
    return min(1.0, 2 * tail)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Each task's p adjusted for their number by Holm's step-down rule: at most `a` of them holds the chance of any
    false finding to `a`, however the tasks depend on each other.

    The k-th smallest of m is max over j ≤ k of (m − j + 1)·p₍ⱼ₎, at most 1.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".

    Args:
        p_values: by task, in any order, which is kept.

    Raises:
        ValueError: one is not within [0, 1].
    """
    for task, p in p_values.items():
        if not 0 <= p <= 1:
            raise ValueError(f"p={p} of {task!r} is not within [0, 1]")
    order = sorted(p_values, key=p_values.__getitem__)
    raised = accumulate((min(1.0, (len(order) - j) * p_values[task]) for j, task in enumerate(order)), max)
    adjusted = dict(zip(order, raised, strict=True))
    return {task: adjusted[task] for task in p_values}
