"""How far annotators agree: pure functions.

The unit is a pair of candidates of one item, in the order of their positions, and what an annotator says of it is −1
where the first is better, 0 for a tie, +1 where the second is. Of two answers with a strength there is more: from −3
(the first is much better) to +3. The pairs of one item depend on each other, so intervals are over items.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import krippendorff
import numpy as np
from numpy.typing import NDArray

from align.annotate.figures.estimates import Figure, Undefined, share
from align.annotate.store import Vote
from align.ops.agreement import below_one, cohen_kappas
from align.ops.intervals import Interval, normal_quantile, wilson

Level = Literal["nominal", "ordinal"]

ALONE = Undefined("nobody judged the same item")
NO_STRENGTHS = Undefined("no item has two strengths")
UNANIMOUS = Undefined("unanimous")

SHARED_ITEMS = 10
"""Items that two annotators must share for a kappa: of fewer it says next to nothing."""


@dataclass(frozen=True, slots=True)
class Panel:
    """What several annotators said of one item.

    Attributes:
        item: its id.
        annotators: R pseudonyms, each once.
        seqs: of their votes.
        values_RU: a row an annotator, a column a pair of candidates.
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
        items, pairs: that both judged.
        direction: plain, over −1, 0 and +1.
        strength: with quadratic weights, over −3 … +3.
    """

    annotators: tuple[str, str]
    items: int
    pairs: int
    direction: float | Undefined
    strength: float | Undefined


def directions(vote: Vote, ids: Sequence[str]) -> list[int]:
    """What a ranking says of each pair of K candidates, K(K−1)/2 values in the order of `combinations(ids, 2)`."""
    place = {id: k for k, tier in enumerate(vote.tiers) for id in tier}
    ranks = [place[id] for id in ids]
    return [(a > b) - (a < b) for a, b in combinations(ranks, 2)]


def panels(votes: Iterable[Vote], candidates: Mapping[str, Sequence[str]], strength: bool = False) -> list[Panel]:
    """The items that at least two annotators ranked, in the order of their first votes.

    Args:
        votes: standing rankings, one for each annotator and item.
        candidates: by item, its candidates' ids by position.
        strength: the signed strength instead of the direction, of items with two candidates, where one was given.
    """
    by_item: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        if not strength or (vote.strength is not None and len(candidates[vote.item]) == 2):
            by_item[vote.item].append(vote)
    found = []
    for item, judged in by_item.items():
        if len(judged) > 1:
            rows = [directions(vote, candidates[item]) for vote in judged]
            scale = np.array([[vote.strength if strength else 1] for vote in judged], dtype=np.int64)
            names, seqs = tuple(vote.annotator for vote in judged), tuple(vote.seq for vote in judged)
            found.append(Panel(item, names, seqs, np.array(rows, dtype=np.int64) * scale))
    return found


# Krippendorff's alpha


def alpha(panels: Sequence[Panel], level: Level) -> Figure:
    """Krippendorff's alpha, 1 − D_o/D_e, with an interval over items.

    The interval is that of ln(1 − α) by its jackknife standard error, item by item, with Student's quantile, taken back
    to α: the ratio of two means of what is never negative is skewed, and its logarithm is less so. By simulation it
    covers 0.94 to 0.96 at 32 items, where the percentile bootstrap covers 0.90 to 0.95 (docs/decisions.md).

    Where nobody disagrees, α is 1, and the interval ends where the greatest disagreement would put it in as many items
    as Wilson's interval of none among them leaves possible. There is no interval for a single item, nor where the items
    but one have no α.

    Source: Krippendorff 2019, "Content Analysis", chapter 12.

    Args:
        level: of measurement: which differences weigh more.
    """
    if not panels:
        return ALONE
    domain = np.unique(np.concatenate([panel.values_RU.ravel() for panel in panels]))
    if len(domain) < 2:
        return UNANIMOUS
    counts = [(panel.values_RU[:, :, None] == domain).sum(axis=0) for panel in panels]
    value = krippendorff.alpha(value_counts=np.concatenate(counts), value_domain=domain, level_of_measurement=level)
    low, high = _interval(np.stack([coincidences(counts_UV) for counts_UV in counts]), level)
    return Interval(float(value), low, high, len(panels))


def coincidences(counts_UV: NDArray[np.int64]) -> NDArray[np.float64]:
    """The coincidence matrix, [V][V], of one item: ordered pairs of annotators by what they said, each unit weighing as
    much as it has annotators.

    Args:
        counts_UV: how many of the item's annotators, all of whom judged each unit, said what of it.
    """
    annotators = counts_UV[0].sum()
    return (counts_UV.T @ counts_UV - np.diag(counts_UV.sum(axis=0))) / (annotators - 1)


def alphas(coincidences_BVV: NDArray[np.float64], level: Level) -> NDArray[np.float64]:
    """Alpha of each of B coincidence matrices; nan where all said the same. What the package does for one table of
    units, for the sums of a thousand resamples at once.

    Args:
        coincidences_BVV: over the values in ascending order.
    """
    apart_BVV = distances(coincidences_BVV, level)
    observed_B = (coincidences_BVV * apart_BVV).sum(axis=(1, 2))
    expected_B = by_chance(coincidences_BVV, apart_BVV)
    return 1 - np.divide(observed_B, expected_B, out=np.full_like(observed_B, np.nan), where=expected_B > 0)


def distances(coincidences_BVV: NDArray[np.float64], level: Level) -> NDArray[np.float64]:
    """How far two values are apart, squared, [B][V][V]."""
    n_BV = coincidences_BVV.sum(axis=2)
    if level == "nominal":
        return np.broadcast_to(1 - np.eye(n_BV.shape[1]), coincidences_BVV.shape)
    # The ordinal distance of two values is the number of values said between them, half of either included.
    middle_BV = n_BV.cumsum(axis=1) - n_BV / 2
    return (middle_BV[:, :, None] - middle_BV[:, None, :]) ** 2


def by_chance(coincidences_BVV: NDArray[np.float64], apart_BVV: NDArray[np.float64]) -> NDArray[np.float64]:
    """The disagreement, summed over coincidences, that chance would give to these values, [B]."""
    n_BV = coincidences_BVV.sum(axis=2)
    return (n_BV[:, :, None] * n_BV[:, None, :] * apart_BVV).sum(axis=(1, 2)) / (n_BV.sum(axis=1) - 1)


def _interval(coincidences_IVV: NDArray[np.float64], level: Level) -> tuple[float | None, float | None]:
    items, whole_1VV = len(coincidences_IVV), coincidences_IVV.sum(axis=0, keepdims=True)
    if items < 2:
        return None, None
    value = float(alphas(whole_1VV, level)[0])
    if value >= 1:
        apart_1VV = distances(whole_1VV, level)
        most = wilson(0.0, items, normal_quantile(0.95))[1] * float(apart_1VV.max() * whole_1VV.sum())
        return 1 - most / float(by_chance(whole_1VV, apart_1VV)[0]), 1.0
    return below_one(value, alphas(whole_1VV - coincidences_IVV, level))


# Others


def raw_agreement(panels: Sequence[Panel]) -> Figure:
    """Share of the pairs of annotators on a unit who say the same of it, with an interval over items; see `share`."""
    if not panels:
        return ALONE
    same, pairs = [], []
    for panel in panels:
        values = panel.values_RU
        alike = (values[:, None, :] == values[None, :, :]).sum()  # ordered, and each with itself
        same.append((int(alike) - values.size) // 2)
        pairs.append(values.size * (len(values) - 1) // 2)
    return share(same, pairs)


def contradictions(panel: Panel) -> int:
    """Pairs of annotators, over all units, of whom one says that the first is better and the other that the second is;
    a tie contradicts neither."""
    first, second = (panel.values_RU < 0).sum(axis=0), (panel.values_RU > 0).sum(axis=0)
    return int((first * second).sum())


def ranked_by_contradictions(panels: Sequence[Panel]) -> list[tuple[int, Panel]]:
    """The panels that hold any, each with their number, the most first."""
    found = [(contradictions(panel), panel) for panel in panels]
    return sorted([row for row in found if row[0]], key=lambda row: (-row[0], row[1].seqs[0]))


def kappas(directions: Sequence[Panel], strengths: Sequence[Panel], at_least: int = SHARED_ITEMS) -> list[Kappa]:
    """Of each two annotators who share so many items, those with the most in common first.

    Args:
        directions, strengths: what `panels` finds of one and the other.
    """
    plain, weighted = _tables(directions), _tables(strengths)
    none = (0, np.zeros((1, 1), dtype=np.int64))
    found = [
        Kappa(pair, items, int(table.sum()), kappa(table), kappa(weighted.get(pair, none)[1], quadratic=True))
        for pair, (items, table) in plain.items()
        if items >= at_least
    ]
    return sorted(found, key=lambda two: (-two.items, two.annotators))


def kappa(table_VV: NDArray[np.int64], quadratic: bool = False) -> float | Undefined:
    """Cohen's kappa of two annotators; see `align.ops.agreement.cohen_kappas`.

    Args:
        table_VV: how often one said the row's value and the other the column's, values in ascending order.
        quadratic: differences weigh by their square.
    """
    if not table_VV.any():
        return NO_STRENGTHS
    found = float(cohen_kappas(table_VV[None], quadratic)[0])
    return UNANIMOUS if math.isnan(found) else found


def _tables(panels: Sequence[Panel]) -> dict[tuple[str, str], tuple[int, NDArray[np.int64]]]:
    """By two annotators, the items they share and how often one said what and the other what, −3 … +3."""
    tables: dict[tuple[str, str], NDArray[np.int64]] = defaultdict(lambda: np.zeros((7, 7), dtype=np.int64))
    items: dict[tuple[str, str], int] = defaultdict(int)
    for panel in panels:
        rows = sorted(zip(panel.annotators, panel.values_RU + 3, strict=True), key=lambda row: row[0])
        for (one, mine), (other, theirs) in combinations(rows, 2):
            items[one, other] += 1
            np.add.at(tables[one, other], (mine, theirs), 1)
    return {pair: (items[pair], table) for pair, table in tables.items()}
