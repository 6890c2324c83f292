"""Preference pairs from rankings, the training data of reward models and DPO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

from align.annotate.store.database import Store
from align.annotate.store.records import AnnotationItem, Vote
from align.annotate.store.vote_selection import (
    DEFAULT_SELECTION,
    VoteSelection,
    find_exclusion_reasons,
    select_votes,
)
from align.core.errors import InputError, require
from align.core.types import Message, Preference

TRAINING_PURPOSES = ("work", "review")
"""Purposes of the rankings that pairs are made of. Gold items and repeats measure the annotators."""
LoadPairs = Callable[[Store, str, VoteSelection, int | None], list[Preference]]
"""A function with the arguments of `load_preferences` that returns the preference pairs of a project."""


def build_pairs(ranking: Vote, item: AnnotationItem) -> list[Preference]:
    """Return the preference pairs of a ranking of K answers: one for each two answers in different tiers.

    They are at most K(K-1)/2, with one `group_id`. If the item has two answers, the strength is the margin. A tie
    yields no pair, and neither do two candidates with the same text: sampling can give one answer twice, and such a
    pair has nothing to learn from.
    """
    return [pair for ids in ranking.pairs if (pair := build_pair(ranking, item, *ids)) is not None]


def build_pair(vote: Vote, item: AnnotationItem, chosen_id: str, rejected_id: str) -> Preference | None:
    """Return the preference pair of two candidates of an item, given by their ids, or None if their texts are equal."""
    by_id = {candidate.id: candidate for candidate in item.candidates}
    chosen = by_id[chosen_id]
    rejected = by_id[rejected_id]
    if chosen.text == rejected.text:
        return None
    return Preference(
        prompt=item.prompt.messages,
        chosen=(Message("assistant", chosen.text),),
        rejected=(Message("assistant", rejected.text),),
        id=f"{vote.seq}:{chosen_id}>{rejected_id}",
        group_id=item.id,
        annotator=vote.annotator,
        source=vote.source,
        scorer=vote.scorer,
        margin=float(vote.strength) if vote.strength and len(item.candidates) == 2 else None,
        strength=vote.strength,
        guideline_version=vote.guideline_version,
        created_at=vote.created_at,
        chosen_ended=chosen.ended,
        rejected_ended=rejected.ended,
    )


def parse_candidate_ids(pair: Preference) -> tuple[str, str]:
    """Return the ids of the chosen and of the rejected candidate of a pair that `build_pair` built."""
    better, worse = pair.id.partition(":")[2].split(">")
    return better, worse


def load_training_rankings(
    store: Store, project: str, selection: VoteSelection = DEFAULT_SELECTION, through: int | None = None
) -> list[Vote]:
    """Return a project's rankings for training, as `load_counted_rankings` does, or raise InputError if none exist.

    The error counts the rankings that do not count, by reason. Raises also as `load_preferences`.
    """
    with store.reading():  # all reads see the same votes
        if rankings := load_counted_rankings(store, project, selection, through):
            return rankings
        all_rankings = list_rankings(store, project, through)
        reasons = find_exclusion_reasons(store, project, all_rankings, selection, through)
    counts = Counter(reasons[vote.annotator] for vote in all_rankings if vote.purpose in TRAINING_PURPOSES)
    problem = "none of its items has been ranked"
    if counts:
        by_reason = "; ".join(f"{count} by annotators {reason}" for reason, count in counts.items())
        problem = f"none of its rankings counts: {by_reason}"
    raise InputError("project", project, problem, "Rank items with stage=annotate, or select other annotators.")


def list_rankings(store: Store, project: str, through: int | None) -> list[Vote]:
    """Return a project's standing rankings up to a row of the ledger, or all if it is None."""
    return [ranking for ranking in store.rankings(project) if through is None or ranking.seq <= through]


def load_counted_rankings(
    store: Store, project: str, selection: VoteSelection = DEFAULT_SELECTION, through: int | None = None
) -> list[Vote]:
    """Return a project's rankings for training, in ledger order; an item's newest review replaces its other rankings.

    Retracted rankings, gold items, repeats and the rankings of annotators in quarantine are left out.

    Args:
        selection: the annotators whose rankings count, reviews included.
        through: seq of the last row of the ledger that counts; None for all.

    Raises:
        InputError: unknown project or annotator, or simulated rankings without `selection.allow_simulated`.
    """
    rankings = select_votes(store, project, list_rankings(store, project, through), selection, through)
    rankings = [ranking for ranking in rankings if ranking.purpose in TRAINING_PURPOSES]
    newest_reviews = {ranking.item: ranking for ranking in rankings if ranking.purpose == "review"}
    rankings = [ranking for ranking in rankings if newest_reviews.get(ranking.item, ranking) is ranking]
    simulated = sum(ranking.source == "simulated" for ranking in rankings)
    if simulated and not selection.allow_simulated:
        problem = f"{simulated} of its {len(rankings)} rankings are simulated, not a person's"
        raise InputError("project", project, problem, "Add data.allow_simulated=true to use them nevertheless.")
    return rankings


def load_preferences(
    store: Store, project: str, selection: VoteSelection = DEFAULT_SELECTION, through: int | None = None
) -> list[Preference]:
    """Return the preference pairs of a project's rankings for training, in ledger order.

    They come from the rankings that stand: not retracted, their item not erased. Gold items and repeats, which measure
    the annotators, are left out; an item's newest review replaces its other rankings.

    Args:
        through: see `load_counted_rankings`.

    Raises:
        InputError: unknown project, no rankings, rankings without a pair, or simulated rankings without
            `selection.allow_simulated`.
    """
    decided = load_human_verdicts(store, project, selection, through).decided
    require(bool(decided), "project", project, "its rankings hold only ties", "Rank more items with stage=annotate.")
    return decided


class HumanVerdicts(NamedTuple):
    """The pairs of answers that annotators compared: with a preference, and judged equal.

    Attributes:
        decided: the preference pairs of `load_preferences`.
        tied: the pairs judged equal, in arbitrary order of chosen and rejected.
    """

    decided: list[Preference]
    tied: list[Preference]


def load_human_verdicts(
    store: Store, project: str, selection: VoteSelection = DEFAULT_SELECTION, through: int | None = None
) -> HumanVerdicts:
    """Return the pairs of answers that a project's annotators compared, as preference pairs and as ties.

    Ties serve to measure a judge; nothing is trained on them.

    Raises:
        InputError: as `load_preferences`, except that ties alone suffice.
    """
    rankings = load_training_rankings(store, project, selection, through)
    items = {item.id: item for item in store.items(project)}
    decided = list[Preference]()
    tied = list[Preference]()
    for ranking in rankings:
        if ranking.item in items:  # else it was erased between the two reads
            item = items[ranking.item]
            decided += build_pairs(ranking, item)
            ties = (ids for tier in ranking.tiers for ids in combinations(sorted(tier), 2))
            tied += [pair for ids in ties if (pair := build_pair(ranking, item, *ids)) is not None]
    problem = "its rankings compare no two answers that differ"
    require(bool(decided or tied), "project", project, problem, "Rank more items with stage=annotate.")
    return HumanVerdicts(decided, tied)
