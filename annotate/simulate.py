"""A simulated annotator: ranks candidates by a gold scorer, with noise that imitates a person's.

Every candidate gets the utility `slope · score + Gumbel noise` and the ranking is the utilities in descending order.
That is the Plackett–Luce model, and its pairwise marginals are exactly Bradley–Terry's (Yellott, 1977):

    P(i above j) = sigmoid(slope · (score_i - score_j))

so pairs of nearly equal scores are ordered almost at random and clear pairs almost always rightly, while the K(K-1)/2
pairs of one ranking never contradict each other. Candidates of equal score share one draw of the noise, and so a tier.
A position bias is added to the utility of the candidate that is shown first, which then has a draw of its own.

Rankings are recorded like any annotator's, with `source: simulated`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import NamedTuple

import numpy as np

from align.annotate.store import Judgement, Store, Vote
from align.annotate.store.ledger import ensure_annotator
from align.core.errors import require
from align.reward.scorer import Scorer, require_finite_scores

COMMIT_EVERY = 200
"""Number of rankings in one transaction. An interruption loses at most so many."""


@dataclass(frozen=True, slots=True)
class SimulationSummary:
    """A summary of all rankings of a simulated annotator, including earlier calls, and their agreement with the scorer.

    Attributes:
        annotator: its identity in the store, one for each scorer and seed.
        added: number of items ranked by this call.
        items: number of items with a standing ranking by it.
        pairs: number of pairs of candidates in these rankings, including ties.
        tie_share: share of these pairs whose gold scores are equal.
        agreement: share of the untied pairs that are ordered as by the gold scores; nan if all are tied.
        slope: slope of the utilities, see the module's equation.
    """

    annotator: str
    added: int
    items: int
    pairs: int
    tie_share: float
    agreement: float
    slope: float


def simulate_annotator(
    store: Store,
    project: str,
    scorer: Scorer,
    seed: int,
    agreement: float = 0.75,
    position_bias: float = 0.0,
    scorer_name: str = "",
    scorer_digest: str = "",
) -> SimulationSummary:
    """Rank the items of a project as a simulated annotator, by a scorer with noise, and record the rankings.

    Items that this annotator has ranked before are left out.

    The noise of an item depends on `(seed, item id)` alone, so that an interrupted and resumed call gives the same
    rankings.

    Args:
        scorer: the gold scorer; must not be the reward model that is trained on these rankings.
        agreement: expected share of untied pairs ordered as by the gold scores. It determines the slope, which changes
            if items are added between two calls.
        position_bias: added to the utility of the candidate that is shown first, a random one of each item. It lowers
            the share of pairs that agree with the gold scores, and breaks that candidate's ties.
        scorer_name: name of the scorer in the votes. Empty: `scorer.name`.
        scorer_digest: a digest that enters the annotator's identity, so that another scorer of the same name is
            another annotator.

    Raises:
        InputError: unknown project, no items, or no two candidates with different scores.
    """
    scorer_name = scorer_name or scorer.name
    details = [scorer.name, str(agreement), str(seed)]
    if position_bias:
        details.append(f"bias {float(position_bias)}")
    if scorer_digest:
        details.append(scorer_digest)
    annotator = "/".join(["simulated", *details])
    items = list(store.items(project))
    require(bool(items), "project", project, "it holds no items", "Fill it first with stage=sample.")
    answers = [(c.id, item.prompt.with_answer(c.text)) for item in items for c in item.candidates]
    scores_B = scorer.score([conversation for _, conversation in answers])
    require_finite_scores(scores_B, scorer.name)
    scores = dict(zip((id for id, _ in answers), scores_B.tolist(), strict=True))
    slope = calibrate_slope([[scores[c.id] for c in item.candidates] for item in items], agreement)

    with store.transaction() as db:
        pseudonym = ensure_annotator(db, project, annotator).pseudonym
    ranked = {ranking.item for ranking in store.rankings(project) if ranking.annotator == pseudonym}
    unranked = (item for item in store.items(project) if item.id not in ranked)
    added = 0
    while batch := list(islice(unranked, COMMIT_EVERY)):
        with store.transaction():
            for item in batch:
                gold = {c.id: scores[c.id] for c in item.candidates if c.id in scores}
                if len(gold) < len(item.candidates):
                    continue  # added after scoring: left to the next call
                utilities = {id: slope * score for id, score in gold.items()}
                if position_bias:
                    utilities[random.Random(f"{seed}/{item.id}/first").choice(sorted(utilities))] += position_bias
                tiers = draw_tiers(utilities, random.Random(f"{seed}/{item.id}"))
                judgement = Judgement(tuple(tuple(tier) for tier in tiers), source="simulated", scorer=scorer_name)
                # The key stays in the ledger when the annotator is erased: it holds the pseudonym, not the identity.
                store.record(project, item.id, judgement, annotator=annotator, key=f"{pseudonym}/{item.id}")
                added += 1

    item_ids = {item.id for item in items}  # others may have added items since
    own_rankings = [r for r in store.rankings(project) if r.annotator == pseudonym and r.item in item_ids]
    agreements = count_agreements(own_rankings, scores)
    untied_pairs = agreements.pairs - agreements.tied_pairs
    return SimulationSummary(
        annotator=annotator,
        added=added,
        items=len(own_rankings),
        pairs=agreements.pairs,
        tie_share=agreements.tied_pairs / agreements.pairs if agreements.pairs else 0.0,
        agreement=agreements.agreed_pairs / untied_pairs if untied_pairs else math.nan,
        slope=slope,
    )


def draw_tiers(utilities: Mapping[str, float], rng: random.Random) -> list[list[str]]:
    """Draw a random Plackett–Luce ranking of candidates by their utilities: ids in tiers, best first.

    Equal utilities share a tier.

    Noise is drawn for the distinct utilities in descending order, so that the order of the candidates does not matter.
    """
    noisy_utilities = {}
    for utility in sorted(set(utilities.values()), reverse=True):
        # A standard Gumbel draw, -log(-log(u)) with u uniform in (0, 1). `random()` may return 0, and is the one
        # method whose sequence Python promises to keep between versions.
        noisy_utilities[utility] = utility - math.log(-math.log(rng.random() or 2.0**-54))
    best_first = sorted(noisy_utilities, key=lambda utility: -noisy_utilities[utility])
    return [sorted(id for id in utilities if utilities[id] == utility) for utility in best_first]


def calibrate_slope(scores: Sequence[Sequence[float]], agreement: float = 0.75) -> float:
    """Return the slope of the utilities at which the expected agreement with the gold scores is `agreement`.

    The expected agreement is the mean of sigmoid(slope · |gap|) over the untied pairs within each item. The mean grows
    with the slope, from 0.5 at slope 0 towards 1, so that bisection finds it. The result is deterministic.

    Args:
        scores: the candidates' gold scores, one sequence per item; [items][K].

    Raises:
        InputError: `agreement` outside (0.5, 1), or all pairs tied.
    """
    is_possible = 0.5 < agreement < 1
    require(is_possible, "agreement", agreement, "it must lie between 0.5 and 1", "A person's is about 0.75.")
    gaps = np.array([abs(a - b) for item in scores for a, b in combinations(item, 2) if a != b], dtype=np.float64)
    remedy = "Sample more varied answers, or rank by another scorer."
    require(gaps.size > 0, "scores", len(scores), "no item has two candidates with different scores", remedy)

    def expect_agreement(slope: float) -> float:
        return float(np.mean(1 / (1 + np.exp(-slope * gaps))))

    low = 0.0
    high = 1.0
    while expect_agreement(high) < agreement:
        low = high
        high *= 2
    for _ in range(60):  # halves the bracket to the last bit of a double
        middle = (low + high) / 2
        if expect_agreement(middle) < agreement:
            low = middle
        else:
            high = middle
    return (low + high) / 2


class PairAgreements(NamedTuple):
    """Counts of pairs of candidates in rankings, compared with gold scores.

    Attributes:
        pairs: all pairs.
        tied_pairs: the pairs with equal gold scores.
        agreed_pairs: the pairs that are ordered as by the gold scores; tied pairs do not count.
    """

    pairs: int
    tied_pairs: int
    agreed_pairs: int


def count_agreements(rankings: Sequence[Vote], scores: Mapping[str, float]) -> PairAgreements:
    """Count the pairs of candidates in rankings: all, tied in their gold scores, and ordered as by their gold scores.

    Args:
        scores: gold score by candidate id.
    """
    pairs = 0
    tied = 0
    agreed = 0
    for ranking in rankings:
        tier_of = {id: t for t, tier in enumerate(ranking.tiers) for id in tier}
        for a, b in combinations(tier_of, 2):
            pairs += 1
            if scores[a] == scores[b]:
                tied += 1
            else:
                agreed += tier_of[a] != tier_of[b] and (tier_of[a] < tier_of[b]) == (scores[a] > scores[b])
    return PairAgreements(pairs, tied, agreed)
