"""Agreement of annotators, as pure functions.

The unit is a pair of candidates of one item, in the order of their positions. An annotator's rating of it is −1 if the
first is better, 0 for a tie, +1 if the second is. With the strengths of items with two answers it goes from −3 (the
first is much better) to +3. The pairs of one item depend on each other, so intervals are over items.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from align.annotate.figures.estimates import Figure, Undefined, compute_share
from align.annotate.store import Vote
from align.ops.agreement import cohen_kappas, compute_coefficient_interval
from align.ops.intervals import Interval, normal_quantile, wilson_interval

Level = Literal["nominal", "ordinal", "interval", "ratio"]
AnnotatorPair = tuple[str, str]
"""Pseudonyms of two annotators, in alphabetical order."""

NO_SHARED_ITEM = Undefined("nobody judged the same item")
NO_STRENGTHS = Undefined("no item has two strengths")
UNANIMOUS = Undefined("unanimous")

SHARED_ITEMS = 10
"""Minimum number of items that both annotators judged for a kappa: with fewer it would be too uncertain."""


@dataclass(frozen=True, slots=True)
class ItemRatings:
    """The ratings of each pair of one item's candidates by several annotators.

    Attributes:
        item: its id.
        annotators: R pseudonyms, each once.
        seqs: seqs of their votes.
        values_RU: ratings, one row per annotator and one column per pair of candidates.
    """

    item: str
    annotators: tuple[str, ...]
    seqs: tuple[int, ...]
    values_RU: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Kappa:
    """Cohen's kappa of two annotators.

    Attributes:
        annotators: two pseudonyms, in alphabetical order.
        items, pairs: number of items and of pairs of candidates that both judged.
        direction: unweighted, over −1, 0 and +1.
        strength: with quadratic weights, over −3 … +3.
    """

    annotators: tuple[str, str]
    items: int
    pairs: int
    direction: float | Undefined
    strength: float | Undefined


def compute_directions(vote: Vote, ids: Sequence[str]) -> list[int]:
    """Return a ranking's rating of each pair of K candidates (−1, 0 or +1), in the order of `combinations(ids, 2)`."""
    tier_of = {id: k for k, tier in enumerate(vote.tiers) for id in tier}
    ranks = [tier_of[id] for id in ids]
    return [(a > b) - (a < b) for a, b in combinations(ranks, 2)]


def build_item_ratings(
    votes: Iterable[Vote], candidates: Mapping[str, Sequence[str]], use_strengths: bool = False
) -> list[ItemRatings]:
    """Return the ratings of each item that at least two annotators ranked, in the order of the items' first votes.

    Args:
        votes: standing rankings, one for each annotator and item.
        candidates: candidate ids by item, in the order of positions.
        use_strengths: whether to use the signed strength instead of the direction. Only votes with a strength on items
            with two candidates count then.
    """
    by_item: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        if not use_strengths or (vote.strength is not None and len(candidates[vote.item]) == 2):
            by_item[vote.item].append(vote)
    rated_items = []
    for item, item_votes in by_item.items():
        if len(item_votes) > 1:
            rows = [compute_directions(vote, candidates[item]) for vote in item_votes]
            scale = np.array([[vote.strength if use_strengths else 1] for vote in item_votes], dtype=np.int64)
            names = tuple(vote.annotator for vote in item_votes)
            seqs = tuple(vote.seq for vote in item_votes)
            rated_items.append(ItemRatings(item, names, seqs, np.array(rows, dtype=np.int64) * scale))
    return rated_items


# Krippendorff's alpha, 1 − D_o/D_e: agreement of any number of raters, with missing ratings. Source: Krippendorff 2011,
# "Computing Krippendorff's Alpha-Reliability", section D.


def compute_alpha(rated_items: Sequence[ItemRatings], level: Level) -> Figure:
    """Compute Krippendorff's alpha, the agreement of annotators beyond chance, with a 95 % interval over items.

    The interval is that of ln(1 − α) by its jackknife standard error, item by item, with Student's quantile, taken back
    to α: the ratio of two means of non-negative values is skewed, and its logarithm is less so. In simulations it
    covers 0.94 to 0.96 at 32 items, where the percentile bootstrap covers 0.90 to 0.95 (docs/decisions.md).

    If all annotators agree, α is 1. Its lower end assumes the greatest disagreement in the share of items that Wilson's
    interval for zero disagreements leaves possible. A single item has no interval, and neither have items whose α is
    undefined once one of them is left out.

    Source: Krippendorff 2019, "Content Analysis", chapter 12.

    Args:
        level: level of measurement, which determines the weights of differences.
    """
    if not rated_items:
        return NO_SHARED_ITEM
    values_V = np.unique(np.concatenate([rated_item.values_RU.ravel() for rated_item in rated_items]))
    if len(values_V) < 2:
        return UNANIMOUS
    coincidences_IVV = np.stack(
        [build_coincidences(count_ratings(rated_item.values_RU, values_V)) for rated_item in rated_items]
    )
    total_1VV = coincidences_IVV.sum(axis=0, keepdims=True)
    value = float(compute_alphas(total_1VV, values_V, level)[0])
    items = len(rated_items)
    low = None
    high = None
    if items > 1 and value >= 1:
        distances_1VV = compute_squared_distances(total_1VV, values_V, level)
        max_disagreement = wilson_interval(0.0, items, normal_quantile(0.95))[1] * float(
            distances_1VV.max() * total_1VV.sum()
        )
        low = 1 - max_disagreement / float(compute_expected_disagreements(total_1VV, distances_1VV)[0])
        high = 1.0
    elif items > 1:
        low, high = compute_coefficient_interval(value, compute_alphas(total_1VV - coincidences_IVV, values_V, level))
    return Interval(value, low, high, items)


def count_ratings(ratings_RU: NDArray[np.generic], values_V: NDArray[np.generic]) -> NDArray[np.int64]:
    """Return the number of raters that gave each of U units each of V values, [U, V], from R raters' ratings.

    Missing ratings, which equal no value, count nowhere.
    """
    return (ratings_RU[:, :, None] == values_V).sum(axis=0)


def build_coincidences(counts_UV: NDArray[np.int64]) -> NDArray[np.float64]:
    """Build Krippendorff's coincidence matrix of V values, [V, V], from the counts of ratings of each unit.

    It counts the ordered pairs of ratings of a unit by their two values, divided by the unit's number of ratings less
    one. Units with fewer than two ratings have no pairs.

    Args:
        counts_UV: how many raters gave each unit each value.
    """
    ratings_U = counts_UV.sum(axis=1)
    paired_UV = counts_UV[ratings_U > 1]
    weighted_UV = paired_UV / (ratings_U[ratings_U > 1, None] - 1)
    return weighted_UV.T @ paired_UV - np.diag(weighted_UV.sum(axis=0))


def compute_alphas(
    coincidences_BVV: NDArray[np.float64], values_V: NDArray[np.generic], level: Level
) -> NDArray[np.float64]:
    """Compute Krippendorff's alpha of each of B coincidence matrices, [B]; nan if all ratings of one are equal.

    Args:
        values_V: the values in ascending order.
    """
    distances_BVV = compute_squared_distances(coincidences_BVV, values_V, level)
    observed_B = (coincidences_BVV * distances_BVV).sum(axis=(1, 2))
    expected_B = compute_expected_disagreements(coincidences_BVV, distances_BVV)
    return 1 - np.divide(observed_B, expected_B, out=np.full_like(observed_B, np.nan), where=expected_B > 0)


def compute_squared_distances(
    coincidences_BVV: NDArray[np.float64], values_V: NDArray[np.generic], level: Level
) -> NDArray[np.float64]:
    """Return the squared distance between each two rating values for each of B coincidence matrices, [B, V, V].

    Only ordinal distances depend on the matrix.
    """
    if level == "ordinal":
        # The distance is the number of ratings from one value to the other, with half of the ratings at both ends.
        ratings_BV = coincidences_BVV.sum(axis=2)
        middles_BV = ratings_BV.cumsum(axis=1) - ratings_BV / 2
        return (middles_BV[:, :, None] - middles_BV[:, None, :]) ** 2
    differences_VV = np.subtract.outer(values_V, values_V).astype(np.float64)
    if level == "nominal":
        distances_VV = (differences_VV != 0).astype(np.float64)
    elif level == "interval":
        distances_VV = differences_VV**2
    else:
        sums_VV = np.add.outer(values_V, values_V).astype(np.float64)
        distances_VV = np.divide(differences_VV, sums_VV, out=np.zeros_like(sums_VV), where=sums_VV != 0) ** 2
    return np.broadcast_to(distances_VV, coincidences_BVV.shape)


def compute_expected_disagreements(
    coincidences_BVV: NDArray[np.float64], distances_BVV: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the disagreement expected by chance in each of B coincidence matrices, [B], as a sum of distances.

    It is that of as many pairs, drawn at random from the ratings, as the matrix has.
    """
    ratings_BV = coincidences_BVV.sum(axis=2)
    pairs_BVV = ratings_BV[:, :, None] * ratings_BV[:, None, :]  # the diagonal has no distance
    drawn_B = np.maximum(ratings_BV.sum(axis=1) - 1, 1)  # an empty matrix has no ratings to draw from
    return (pairs_BVV * distances_BVV).sum(axis=(1, 2)) / drawn_B


# Other measures


def compute_raw_agreement(rated_items: Sequence[ItemRatings]) -> Figure:
    """Compute the share of pairs of annotators that rate a pair of candidates equally, with an interval over items."""
    if not rated_items:
        return NO_SHARED_ITEM
    equal_counts = []
    pair_counts = []
    for rated_item in rated_items:
        values = rated_item.values_RU
        # This counts ordered pairs, and each rating with itself.
        equal_ratings = (values[:, None, :] == values[None, :, :]).sum()
        equal_counts.append((int(equal_ratings) - values.size) // 2)
        pair_counts.append(values.size * (len(values) - 1) // 2)
    return compute_share(equal_counts, pair_counts)


class ContestedItem(NamedTuple):
    """An item whose annotators contradict one another, with the number of contradictions and the ratings.

    Attributes:
        contradictions: number of pairs of annotators, over all pairs of candidates, with opposite ratings.
    """

    contradictions: int
    ratings: ItemRatings


class SharedRatings(NamedTuple):
    """The ratings that two annotators gave to the items that both judged.

    Attributes:
        items: number of shared items.
        table_VV: number of pairs of candidates by the first annotator's rating (row) and the second's (column), each
            from −3 to +3.
    """

    items: int
    table_VV: NDArray[np.int64]


def count_contradictions(rated_item: ItemRatings) -> int:
    """Return the number of pairs of annotators with opposite ratings, summed over an item's pairs of candidates.

    A tie contradicts neither.
    """
    first_is_better = (rated_item.values_RU < 0).sum(axis=0)
    second_is_better = (rated_item.values_RU > 0).sum(axis=0)
    return int((first_is_better * second_is_better).sum())


def rank_by_contradictions(rated_items: Sequence[ItemRatings]) -> list[ContestedItem]:
    """Return the items whose annotators contradict one another, the most contradicted first."""
    counted_items = [ContestedItem(count_contradictions(rated_item), rated_item) for rated_item in rated_items]
    contested_items = [item for item in counted_items if item.contradictions]
    return sorted(contested_items, key=lambda item: (-item.contradictions, item.ratings.seqs[0]))


def compute_kappas(directions: Sequence[ItemRatings], strengths: Sequence[ItemRatings]) -> list[Kappa]:
    """Compute Cohen's kappa of each pair of annotators with at least `SHARED_ITEMS` items in common.

    Pairs with the most items in common come first.

    Args:
        directions, strengths: results of `build_item_ratings` without and with strength.
    """
    direction_tables = tabulate_ratings(directions)
    strength_tables = tabulate_ratings(strengths)
    no_shared_items = SharedRatings(0, np.zeros((1, 1), dtype=np.int64))
    results = [
        Kappa(
            pair,
            shared.items,
            int(shared.table_VV.sum()),
            compute_kappa(shared.table_VV),
            compute_kappa(strength_tables.get(pair, no_shared_items).table_VV, has_quadratic_weights=True),
        )
        for pair, shared in direction_tables.items()
        if shared.items >= SHARED_ITEMS
    ]
    return sorted(results, key=lambda result: (-result.items, result.annotators))


def compute_kappa(table_VV: NDArray[np.int64], has_quadratic_weights: bool = False) -> float | Undefined:
    """Compute Cohen's kappa from the table of two annotators' ratings, or return Undefined if it has no value.

    See `align.ops.agreement.cohen_kappas`.

    Args:
        table_VV: number of units by the first annotator's rating (row) and the second's (column), in ascending order.
        has_quadratic_weights: whether differences weigh by their square.
    """
    if not table_VV.any():
        return NO_STRENGTHS
    value = float(cohen_kappas(table_VV[None], has_quadratic_weights)[0])
    return UNANIMOUS if math.isnan(value) else value


def tabulate_ratings(rated_items: Sequence[ItemRatings]) -> dict[AnnotatorPair, SharedRatings]:
    """Return, for each pair of annotators, the number of items that both rated and the table of their ratings."""
    tables: dict[AnnotatorPair, NDArray[np.int64]] = defaultdict(lambda: np.zeros((7, 7), dtype=np.int64))
    items: dict[AnnotatorPair, int] = defaultdict(int)
    for rated_item in rated_items:
        rows = sorted(zip(rated_item.annotators, rated_item.values_RU + 3, strict=True), key=lambda row: row[0])
        for (first, first_values), (second, second_values) in combinations(rows, 2):
            items[first, second] += 1
            np.add.at(tables[first, second], (first_values, second_values), 1)
    return {pair: SharedRatings(items[pair], table) for pair, table in tables.items()}
