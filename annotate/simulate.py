"""The documented stand-in for a person: ranks candidates by a gold scorer, with a person's unreliability.

Every candidate gets the utility `slope · score + Gumbel noise` and the ranking is the utilities in descending order.
That is the Plackett–Luce model, and its pairwise marginals are exactly Bradley–Terry's (Yellott, 1977):

    P(i above j) = sigmoid(slope · (score_i - score_j))

so near ties are decided almost by a coin and clear cases almost never wrongly, and still the K(K-1)/2 pairs of one
ranking never contradict each other. Candidates of equal score share one draw of the noise, and thus a tier: a tie.

It writes through the store's own door, as any annotator does, and every ranking says `source: simulated`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice

import numpy as np

from align.annotate.store import Judgement, Store, Vote
from align.annotate.store.ledger import ensure_annotator
from align.core.errors import require
from align.reward.scorer import Scorer

COMMIT_EVERY = 200
"""Rankings in one transaction: what an interruption can cost."""


@dataclass(frozen=True, slots=True)
class Simulation:
    """What a simulated annotator has ranked, earlier calls included.

    Attributes:
        annotator: its identity in the store, one for each scorer and seed.
        added: items ranked by this call.
        items: items of which its ranking stands.
        pairs: pairs of candidates in them, ties included.
        tie_share: part of those pairs whose gold scores are equal.
        agreement: part of the untied pairs ordered as the gold scores order them; nan without any.
        slope: of the noise, see the module's equation.
    """

    annotator: str
    added: int
    items: int
    pairs: int
    tie_share: float
    agreement: float
    slope: float


def simulate(store: Store, project: str, scorer: Scorer, seed: int, agreement: float = 0.75) -> Simulation:
    """Rank every item of a project that this annotator has not ranked yet.

    The noise of an item depends on `(seed, item id)` alone: an interrupted run, continued, ranks as if uninterrupted.

    Args:
        scorer: the gold; never the reward that is trained on these rankings.
        agreement: the share of untied pairs to be ordered as the gold orders them, in expectation. Items added between
            two calls shift the slope of the noise that it asks for.

    Raises:
        InputError: unknown project, no item in it, or no two candidates with different scores.
    """
    annotator = f"simulated/{scorer.name}/{agreement}/{seed}"
    items = list(store.items(project))
    require(bool(items), "project", project, "it holds no items", "Fill it first with stage=sample.")
    answers = [(c.id, item.prompt.with_answer(c.text)) for item in items for c in item.candidates]
    scores_B = scorer.score([conversation for _, conversation in answers])
    scores = dict(zip((id for id, _ in answers), scores_B.tolist(), strict=True))
    slope = calibrate_slope([[scores[c.id] for c in item.candidates] for item in items], agreement)

    with store.transaction() as db:
        name = ensure_annotator(db, project, annotator).pseudonym
    ranked = {ranking.item for ranking in store.rankings(project) if ranking.annotator == name}
    todo = (item for item in store.items(project) if item.id not in ranked)
    added = 0
    while batch := list(islice(todo, COMMIT_EVERY)):
        with store.transaction():
            for item in batch:
                gold = {c.id: scores[c.id] for c in item.candidates if c.id in scores}
                if len(gold) < len(item.candidates):
                    continue  # added since we scored: the next call's
                tiers = noisy_tiers(gold, slope, random.Random(f"{seed}/{item.id}"))
                judgement = Judgement(tuple(tuple(tier) for tier in tiers), source="simulated", scorer=scorer.name)
                # The key stays in the ledger when the annotator is erased: it holds the pseudonym, not the identity.
                store.record(project, item.id, judgement, annotator=annotator, key=f"{name}/{item.id}")
                added += 1

    known = {item.id for item in items}  # someone may add and rank more while we do
    mine = [r for r in store.rankings(project) if r.annotator == name and r.item in known]
    pairs, tied, agreed = tally(mine, scores)
    untied = pairs - tied
    return Simulation(
        annotator=annotator,
        added=added,
        items=len(mine),
        pairs=pairs,
        tie_share=tied / pairs if pairs else 0.0,
        agreement=agreed / untied if untied else math.nan,
        slope=slope,
    )


def noisy_tiers(scores: Mapping[str, float], slope: float, rng: random.Random) -> list[list[str]]:
    """Draw one Plackett–Luce ranking: candidate ids in tiers, best first; equal scores share a tier.

    The draws go to the distinct scores in descending order, so that the order of the candidates does not matter.
    """
    utilities = {}
    for score in sorted(set(scores.values()), reverse=True):
        # A standard Gumbel draw, -log(-log(u)) with u uniform in (0, 1). `random()` may return 0, and is the one
        # method whose sequence Python promises to keep between versions.
        utilities[score] = slope * score - math.log(-math.log(rng.random() or 2.0**-54))
    best_first = sorted(utilities, key=lambda score: -utilities[score])
    return [sorted(id for id in scores if scores[id] == score) for score in best_first]


def calibrate_slope(scores: Sequence[Sequence[float]], agreement: float = 0.75) -> float:
    """Find the slope at which `mean(sigmoid(slope · |gap|))` over the untied pairs within each item is `agreement`.

    The mean grows with the slope, from 0.5 at slope 0 towards 1, so that bisection finds it; deterministic.

    Args:
        scores: the candidates' gold scores, one sequence an item; [items][K].

    Raises:
        InputError: `agreement` outside (0.5, 1), or all pairs tied.
    """
    possible = 0.5 < agreement < 1
    require(possible, "agreement", agreement, "it must lie between 0.5 and 1", "A person's is about 0.75.")
    gaps = np.array([abs(a - b) for item in scores for a, b in combinations(item, 2) if a != b], dtype=np.float64)
    remedy = "Sample more varied answers, or rank by another scorer."
    require(gaps.size > 0, "scores", len(scores), "no item has two candidates with different scores", remedy)

    def expected(slope: float) -> float:
        return float(np.mean(1 / (1 + np.exp(-slope * gaps))))

    low = 0.0
    high = 1.0
    while expected(high) < agreement:
        low = high
        high *= 2
    for _ in range(60):  # halves the bracket to the last bit of a double
        middle = (low + high) / 2
        if expected(middle) < agreement:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def tally(rankings: Sequence[Vote], scores: Mapping[str, float]) -> tuple[int, int, int]:
    """Count the pairs in the rankings, those tied in the gold scores, and the untied ones in the gold's order."""
    pairs = tied = agreed = 0
    for ranking in rankings:
        tier_of = {id: t for t, tier in enumerate(ranking.tiers) for id in tier}
        for a, b in combinations(tier_of, 2):
            pairs += 1
            if scores[a] == scores[b]:
                tied += 1
            else:
                agreed += tier_of[a] != tier_of[b] and (tier_of[a] < tier_of[b]) == (scores[a] > scores[b])
    return pairs, tied, agreed
