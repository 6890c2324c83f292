"""The quality of a judge: agreement with reference verdicts, the effect of the answers' order, and length bias."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.evals.stats.columns import Clusters, average_clusters, number_clusters, to_columns
from align.evals.stats.length_control import control_for_length
from align.evals.stats.verdicts import compute_win_rate, merge_swapped_verdicts
from align.ops.agreement import cohen_kappas, compute_coefficient_interval
from align.ops.intervals import Interval, normal_quantile, proportion_interval, wilson_interval


@dataclass(frozen=True, slots=True)
class RaterAgreement:
    """The agreement of two raters on the same pairs.

    Attributes:
        raw: the share of equal verdicts, equal ties included.
        kappa: Cohen's kappa, the agreement beyond chance. None if both raters always gave one and the same verdict.
        verdicts: number of compared verdicts.
    """

    raw: Interval
    kappa: Interval | None
    verdicts: int


@dataclass(frozen=True, slots=True)
class SwapEffect:
    """The effect of swapping the two shown answers on a judge's verdicts.

    Attributes:
        consistency: the share of pairs with the same verdict in both orders. A judge that always prefers "A" has 0.
        shown_first: the share won by the answer that is shown first, a tie counted as half. Without a position bias it
            is ½.
        win_rate: of the first system, with verdicts that change with the order counted as ties.
    """

    consistency: Interval
    shown_first: Interval
    win_rate: Interval


@dataclass(frozen=True, slots=True)
class JudgeStatistics:
    """A judge's agreement, order effect and length bias, on pairs with known verdicts.

    Attributes:
        agreement: with the reference, which is people or gold.
        swap: None if the judge saw one order only.
        length_slope: the log-odds that length adds to the judge's verdicts, see
            `align.evals.stats.length_control.LengthControlledWinRate`. None without lengths.
        reference_slope: the same for the reference on these pairs. Longer answers may be better, so only the excess of
            the judge's slope over this one is a bias.
        n: number of clusters behind the agreement.
    """

    agreement: RaterAgreement
    swap: SwapEffect | None
    length_slope: Interval | None
    reference_slope: Interval | None
    n: int


def compute_judge_statistics(
    judge: ArrayLike,
    reference: ArrayLike,
    swapped: ArrayLike | None = None,
    lengths: tuple[ArrayLike, ArrayLike] | None = None,
    clusters: Clusters | None = None,
    level: float = 0.95,
    failed: ArrayLike | None = None,
) -> JudgeStatistics:
    """Compute a judge's agreement with reference verdicts on the same pairs, the effect of the answers' order, and the
    length bias of both.

    Args:
        judge, reference: verdicts, 1 for the first system, ½ or 0, shape [n].
        swapped: the judge's verdicts with the second answer shown first; 1 is still for the first system. If given,
            only verdicts that are the same in both orders are compared with the reference, others count as ties.
        lengths: of the first and of the second answers.
        clusters: the prompt, or what prompts share, of each pair.
        failed: True for a pair on which the judge gave no verdict in some order, shape [n]. `judge` or `swapped` then
            has ½ for it. It agrees with no verdict and is not consistent; for the slope it is a tie.

    Raises:
        ValueError: there are no verdicts, the numbers of rows differ, or a value is not a verdict.
    """
    verdicts = judge if swapped is None else merge_swapped_verdicts(judge, swapped)
    judge_agreement = compute_agreement(verdicts, reference, clusters, level, failed)
    length_slope, reference_slope = (
        control_for_length(column, *lengths, clusters=clusters, level=level).slope if lengths else None
        for column in (verdicts, reference)
    )
    swap_effect = None if swapped is None else measure_swap_effect(judge, swapped, clusters, level, failed)
    return JudgeStatistics(judge_agreement, swap_effect, length_slope, reference_slope, judge_agreement.raw.n)


def compute_agreement(
    first: ArrayLike,
    second: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
    failed: ArrayLike | None = None,
) -> RaterAgreement:
    """Compute the share of equal verdicts of two raters and Cohen's kappa, each with an interval over clusters. The
    share has Wilson's interval at the effective number of clusters; kappa has an interval of ln(1 − κ) by the jackknife
    over clusters (`align.ops.agreement.compute_coefficient_interval`).

    Raw agreement counts each cluster once, kappa each verdict. If the two never differ, κ is 1, and the lower end of
    its interval is the κ that results if as many verdicts differ as Wilson's interval of no difference allows.

    Args:
        first, second: verdicts of two raters on the same pairs, each 0, ½ or 1, shape [n].
        failed: True for a row without a verdict of the first rater, which equals no verdict of the second; shape [n].

    Raises:
        ValueError: there are no verdicts, the numbers of rows differ, or a value is not 0, ½ or 1.
    """
    first_verdicts, second_verdicts = validate_verdicts(first, second)
    cluster_numbers = number_clusters(clusters, first_verdicts.size)
    is_missing = flag_failures(failed, first_verdicts.size)
    raw = proportion_interval(
        average_clusters(cluster_numbers, ((first_verdicts == second_verdicts) & ~is_missing).astype(np.float64)),
        level=level,
    )
    tables = np.zeros((int(cluster_numbers.max()) + 1, 4, 4))
    # The fourth value is "no verdict". The second rater never has it, so the expected agreement on it is 0.
    np.add.at(
        tables,
        (cluster_numbers, np.where(is_missing, 3, 2 * first_verdicts).astype(int), (2 * second_verdicts).astype(int)),
        1.0,
    )
    table = tables.sum(axis=0, keepdims=True)
    value = float(cohen_kappas(table)[0])
    if np.isnan(value):
        return RaterAgreement(raw, None, first_verdicts.size)
    if value >= 1:
        unlike = 1 - float(((table[0].sum(axis=1) / first_verdicts.size) ** 2).sum())
        low = 1 - wilson_interval(0.0, len(tables), normal_quantile(level))[1] / unlike
        return RaterAgreement(raw, Interval(1.0, low, 1.0, len(tables)), first_verdicts.size)
    return RaterAgreement(
        raw,
        Interval(value, *compute_coefficient_interval(value, cohen_kappas(table - tables), level), len(tables)),
        first_verdicts.size,
    )


def measure_swap_effect(
    verdicts: ArrayLike,
    swapped: ArrayLike,
    clusters: Clusters | None = None,
    level: float = 0.95,
    failed: ArrayLike | None = None,
) -> SwapEffect:
    """Measure the effect of the order of the answers on a judge's verdicts: consistency, share won by the answer shown
    first, and merged win rate.

    Args:
        verdicts, swapped: with the first system's answer shown first, and shown second. In both, 1 is for the first
            *system*. Each is 0, ½ or 1, shape [n].
        failed: True for a pair without a verdict in some order, which is not consistent; shape [n].

    Raises:
        ValueError: as in `compute_agreement`.
    """
    in_order, in_swapped_order = validate_verdicts(verdicts, swapped)
    cluster_numbers = number_clusters(clusters, in_order.size)
    is_missing = flag_failures(failed, in_order.size)
    consistent = proportion_interval(
        average_clusters(cluster_numbers, ((in_order == in_swapped_order) & ~is_missing).astype(np.float64)),
        level=level,
    )
    return SwapEffect(
        consistent,
        compute_win_rate((in_order + 1 - in_swapped_order) / 2, clusters, level),
        compute_win_rate(merge_swapped_verdicts(in_order, in_swapped_order), clusters, level),
    )


def flag_failures(failed: ArrayLike | None, rows: int) -> NDArray[np.bool_]:
    """Return `failed` as a boolean array of shape [rows], all False without it. Raises ValueError if it has another
    number of rows."""
    flags = np.zeros(rows, dtype=bool) if failed is None else np.asarray(failed, dtype=bool)
    if flags.shape != (rows,):
        raise ValueError(f"{flags.size} failures for {rows} verdicts")
    return flags


def validate_verdicts(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return two columns of verdicts as float64 arrays of shape [n]. Raises ValueError if a verdict is not 0, ½ or 1,
    or the lengths differ."""
    first_column, second_column = to_columns(verdicts=first, others=second)
    for column in (first_column, second_column):
        invalid_rows = np.flatnonzero(~np.isin(column, (0.0, 0.5, 1.0)))
        if invalid_rows.size:
            raise ValueError(
                f"{column[invalid_rows[0]]} in row {invalid_rows[0]} is no verdict: 0, 0.5 or 1 is expected"
            )
    return first_column, second_column
