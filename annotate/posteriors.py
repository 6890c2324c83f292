"""The probability that one answer is better than another, given all rankings and how closely each annotator follows the
answers' strengths (`align.ops.annotators`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from align.annotate.store import Store, Vote
from align.annotate.store.preference_pairs import load_preferences, load_training_rankings, parse_candidate_ids
from align.annotate.store.vote_selection import DEFAULT_SELECTION, VoteSelection
from align.core.types import Preference
from align.ops.annotators import RankedItems, build_contrasts, fit_annotators

BLOCK_SUBSETS = 32_000
"""Number of subsets of answers, 2^K − 1 for a ranking of K, that the model handles at a time. It limits the memory."""


class RankedBlock(NamedTuple):
    """Rankings of items with equally many answers.

    Attributes:
        items: their ids, by their number in `ranked`.
        candidates: the ids of each item's answers, by their number in `ranked`.
        ranked: the rankings as arrays; those of an item are in the order in which they were given.
    """

    items: list[str]
    candidates: list[tuple[str, ...]]
    ranked: RankedItems


def build_ranked_blocks(rankings: Sequence[Vote], annotators: Sequence[str]) -> list[RankedBlock]:
    """Return rankings as arrays, with all rankings of an item in one block.

    Args:
        rankings: in ledger order.
        annotators: pseudonyms, by their number in the blocks.
    """
    by_item = defaultdict[str, list[Vote]](list)
    for vote in rankings:
        by_item[vote.item].append(vote)
    items_by_size = defaultdict[int, list[list[Vote]]](list)
    for votes in by_item.values():
        items_by_size[sum(map(len, votes[0].tiers))].append(votes)
    numbers = {annotator: number for number, annotator in enumerate(annotators)}
    blocks = []
    for size in sorted(items_by_size):
        block = []
        count = 0
        max_count = BLOCK_SUBSETS // 2**size
        for votes in items_by_size[size]:
            if block and count + len(votes) > max_count:
                blocks.append(build_ranked_block(block, numbers))
                block = []
                count = 0
            block.append(votes)
            count += len(votes)
        blocks.append(build_ranked_block(block, numbers))
    return blocks


def build_ranked_block(items: Sequence[Sequence[Vote]], annotator_numbers: Mapping[str, int]) -> RankedBlock:
    candidates = [tuple(sorted(id for tier in votes[0].tiers for id in tier)) for votes in items]
    rows = []
    for number, (votes, ids) in enumerate(zip(items, candidates, strict=True)):
        places = np.linspace(0.5, -0.5, len(ids)).tolist()
        for vote in votes:
            tier_of = {id: t for t, tier in enumerate(vote.tiers) for id in tier}
            place_of = dict(zip(vote.display_order, places, strict=False))
            tiers = [tier_of[id] for id in ids]
            rows.append((number, annotator_numbers[vote.annotator], tiers, [place_of.get(id, 0.0) for id in ids]))
    ranked = RankedItems(*(np.array(column) for column in zip(*rows, strict=True)))
    return RankedBlock([votes[0].item for votes in items], candidates, ranked)


Posteriors = Mapping[str, Mapping[tuple[str, str], float]]
"""Item → (better, worse) → probability that the first of two answers is better. Both orders are present."""


def compute_pair_posteriors(rankings: Sequence[Vote]) -> Posteriors:
    """Fit the model of annotators to rankings, and return the probability of each order of two answers of an item.

    Args:
        rankings: in ledger order.
    """
    annotators = list(dict.fromkeys(vote.annotator for vote in rankings))
    blocks = build_ranked_blocks(rankings, annotators)
    fit = fit_annotators([block.ranked for block in blocks], len(annotators))
    posteriors = {}
    for block, strengths in zip(blocks, fit.strengths, strict=True):
        basis_KC = build_contrasts(len(block.candidates[0]))
        means_IK = strengths.means_IC @ basis_KC.T
        roots_IKC = basis_KC @ strengths.roots_ICC
        for item, ids, means_K, roots_KC in zip(block.items, block.candidates, means_IK, roots_IKC, strict=True):
            posteriors[item] = {
                (ids[a], ids[b]): NormalDist(0, float(np.linalg.norm(roots_KC[a] - roots_KC[b]))).cdf(
                    float(means_K[a] - means_K[b])
                )
                for a, b in permutations(range(len(ids)), 2)
            }
    return posteriors


def add_posteriors(pairs: Sequence[Preference], rankings: Sequence[Vote]) -> list[Preference]:
    """Return pairs that were built of rankings, each with the probability that its chosen answer is better. It is below
    0.5 if the other rankings of the item outweigh the one that the pair is from."""
    posteriors = compute_pair_posteriors(rankings)
    return [replace(pair, posterior=posteriors[pair.group_id][parse_candidate_ids(pair)]) for pair in pairs]


def load_soft_preferences(
    store: Store, project: str, selection: VoteSelection = DEFAULT_SELECTION, through: int | None = None
) -> list[Preference]:
    """Return the pairs of `load_preferences`, each with its posterior given all of these rankings."""
    with store.reading():  # both reads see the same votes
        pairs = load_preferences(store, project, selection, through)
        rankings = load_training_rankings(store, project, selection, through)
    return add_posteriors(pairs, rankings)
