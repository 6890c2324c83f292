"""Statistics of a judge: agreement with a reference, consistency under a swap, taste for place and length. Pure
functions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.evals.stats.length import length_controlled
from align.evals.stats.observed import Clusters, cluster_means, columns, places
from align.evals.stats.win_rate import share_won, surviving
from align.ops.agreement import below_one, cohen_kappas
from align.ops.intervals import Interval, normal_quantile, proportion, wilson


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two raters agree on the same pairs.

    Attributes:
        raw: the share of verdicts that are equal, ties among them.
        kappa: Cohen's, the agreement beyond chance; None where both always said the same one thing.
        verdicts: how many were compared.
    """

    raw: Interval
    kappa: Interval | None
    verdicts: int


@dataclass(frozen=True, slots=True)
class Swap:
    """What becomes of a judge's verdicts when the two answers change places.

    Attributes:
        consistency: the share of pairs with the same verdict in both orders. A judge that always says "A" has 0.
        shown_first: the share won by the answer that is shown first, a tie counted as half; ½ is no taste for place.
        win_rate: of the first system, verdicts that change with the order counted as ties.
    """

    consistency: Interval
    shown_first: Interval
    win_rate: Interval


@dataclass(frozen=True, slots=True)
class JudgeStatistics:
    """The statistics of a judge on known pairs.

    Attributes:
        agreement: with people or gold.
        swap: None where the judge saw one order.
        length_slope: the log-odds that length adds, of the judge; see `LengthControlled`. None without lengths.
        reference_slope: the same of people or gold on these pairs: longer answers may be better, and a judge's slope is
            a fault so far as it exceeds theirs.
        n: clusters behind the agreement.
    """

    agreement: Agreement
    swap: Swap | None
    length_slope: Interval | None
    reference_slope: Interval | None
    n: int

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def measure_judge(
    judge: ArrayLike,
    reference: ArrayLike,
    swapped: ArrayLike | None = None,
    lengths: tuple[ArrayLike, ArrayLike] | None = None,
    clusters: Clusters | None = None,
    level: float = 0.95,
    failed: ArrayLike | None = None,
) -> JudgeStatistics:
    """Compare a judge with people or gold on the same pairs.

    Args:
        judge, reference: verdicts, 1 for the first system, ½ or 0, shape [n].
        swapped: the judge's verdicts with the second answer shown first; 1 is still for the first system. What is
            compared with the reference is then what survives the swap.
        lengths: of the first and of the second answers.
        clusters: the prompt, or what prompts share, of each pair.
        failed: True for a pair on which the judge gave no verdict in some order, shape [n]; in its place `judge` or
            `swapped` has ½. It agrees with no verdict and survives no swap; to the slope it is a tie.

    Raises:
        ValueError: no verdicts, numbers of rows that differ, or a value that is no verdict or not finite.
    """
    verdicts = judge if swapped is None else surviving(judge, swapped)
    agreed = agreement(verdicts, reference, clusters, level, failed)
    slope, reference_slope = (
        length_controlled(of, *lengths, clusters=clusters, level=level).slope if lengths else None
        for of in (verdicts, reference)
    )
    swaps = None if swapped is None else swap(judge, swapped, clusters, level, failed)
    return JudgeStatistics(agreed, swaps, slope, reference_slope, agreed.raw.n)


def agreement(
    first: ArrayLike, second: ArrayLike, clusters: Clusters | None = None, level: float = 0.95,
    failed: ArrayLike | None = None,
) -> Agreement:  # fmt: skip
    """Raw agreement with Wilson's interval at the effective number of clusters, and Cohen's kappa with an interval of
    ln(1 − κ) by the jackknife over clusters (`align.ops.agreement.below_one`).

    Raw agreement counts each cluster once, kappa each verdict. Where the two never differ, κ is 1, and its interval
    ends where it would be if as many verdicts differed as Wilson's interval of none leaves possible.

    Args:
        first, second: verdicts of two raters on the same pairs, each 0, ½ or 1, shape [n].
        failed: True where the first rater gave no verdict, which equals none of the second's, shape [n].

    Raises:
        ValueError: no verdicts, numbers of rows that differ, or a value other than 0, ½ and 1.
    """
    a, b = verdicts_of(first, second)
    at, none = places(clusters, a.size), failures(failed, a.size)
    same = proportion(cluster_means(at, ((a == b) & ~none).astype(np.float64)), level=level)
    tables = np.zeros((int(at.max()) + 1, 4, 4))
    # The fourth value is "no verdict". The second rater never says it, so the two never share it, nor by chance.
    np.add.at(tables, (at, np.where(none, 3, 2 * a).astype(int), (2 * b).astype(int)), 1.0)
    whole = tables.sum(axis=0, keepdims=True)
    value = float(cohen_kappas(whole)[0])
    if np.isnan(value):
        return Agreement(same, None, a.size)
    if value >= 1:
        unlike = 1 - float(((whole[0].sum(axis=1) / a.size) ** 2).sum())
        low = 1 - wilson(0.0, len(tables), normal_quantile(level))[1] / unlike
        return Agreement(same, Interval(1.0, low, 1.0, len(tables)), a.size)
    return Agreement(same, Interval(value, *below_one(value, cohen_kappas(whole - tables), level), len(tables)), a.size)


def swap(
    verdicts: ArrayLike, swapped: ArrayLike, clusters: Clusters | None = None, level: float = 0.95,
    failed: ArrayLike | None = None,
) -> Swap:  # fmt: skip
    """What the order of the answers does to a judge.

    Args:
        verdicts, swapped: with the first system's answer shown first, and shown second; 1 is for the first *system* in
            both, each 0, ½ or 1, shape [n].
        failed: True where there is no verdict in some order, so that no two are the same, shape [n].

    Raises:
        ValueError: as of `agreement`.
    """
    one, other = verdicts_of(verdicts, swapped)
    at, none = places(clusters, one.size), failures(failed, one.size)
    consistent = proportion(cluster_means(at, ((one == other) & ~none).astype(np.float64)), level=level)
    return Swap(
        consistent,
        share_won((one + 1 - other) / 2, clusters, level),
        share_won(surviving(one, other), clusters, level),
    )


def failures(failed: ArrayLike | None, rows: int) -> NDArray[np.bool_]:
    """Raises: ValueError: another number of rows."""
    found = np.zeros(rows, dtype=bool) if failed is None else np.asarray(failed, dtype=bool)
    if found.shape != (rows,):
        raise ValueError(f"{found.size} failures for {rows} verdicts")
    return found


def verdicts_of(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both as columns of 0, ½ and 1."""
    one, other = columns(verdicts=first, others=second)
    for column in (one, other):
        odd = np.flatnonzero(~np.isin(column, (0.0, 0.5, 1.0)))
        if odd.size:
            raise ValueError(f"{column[odd[0]]} in row {odd[0]} is no verdict: 0, 0.5 or 1 is expected")
    return one, other
