"""Rankings into preference pairs: what a reward model or DPO trains on."""

from __future__ import annotations

from itertools import combinations

from align.annotate.store.database import Store
from align.annotate.store.records import Item, Vote
from align.core.errors import InputError, require
from align.core.types import Message, Preference


def pairs_of(ranking: Vote, item: Item) -> list[Preference]:
    """Return every pair across the ranking's tiers, as one group: at most K(K-1)/2 records. Of an item of two answers
    the strength is the margin.

    A tie yields no pair. Nor do two candidates with the same text: sampling can give one answer twice, and whatever
    was said of such a pair holds nothing to learn.
    """
    return [pair for two in ranking.pairs if (pair := pair_of(ranking, item, *two)) is not None]


def pair_of(ranking: Vote, item: Item, better: str, worse: str) -> Preference | None:
    """Return two candidates of an item, by their ids, as a pair; None if both have the same text."""
    by_id = {candidate.id: candidate for candidate in item.candidates}
    chosen = by_id[better]
    rejected = by_id[worse]
    if chosen.text == rejected.text:
        return None
    return Preference(
        prompt=item.prompt.messages,
        chosen=(Message("assistant", chosen.text),),
        rejected=(Message("assistant", rejected.text),),
        id=f"{ranking.seq}:{better}>{worse}",
        group_id=item.id,
        annotator=ranking.annotator,
        source=ranking.source,
        scorer=ranking.scorer,
        margin=float(ranking.strength) if ranking.strength and len(item.candidates) == 2 else None,
        strength=ranking.strength,
        guideline_version=ranking.guideline_version,
        created_at=ranking.created_at,
        chosen_ended=chosen.ended,
        rejected_ended=rejected.ended,
    )


def training_rankings(
    store: Store, project: str, allow_simulated: bool = False, through: int | None = None
) -> list[Vote]:
    """Return `counted_rankings`, of which there are some. Raises as `preferences`."""
    rankings = counted_rankings(store, project, allow_simulated, through)
    require(bool(rankings), "project", project, "nothing in it has been ranked", "Rank some items with stage=annotate.")
    return rankings


def counted_rankings(
    store: Store, project: str, allow_simulated: bool = False, through: int | None = None
) -> list[Vote]:
    """Return the rankings that stand and are neither of gold items nor repeats, in ledger order; of an item that a
    reviewer settled, the newest review alone.

    Args:
        through: the last row of the ledger that counts; None for all.

    Raises:
        InputError: unknown project, or rankings by the stand-in for a person where only people's were asked for.
    """
    rankings = [ranking for ranking in store.rankings(project) if ranking.purpose in ("work", "review")]
    rankings = [ranking for ranking in rankings if through is None or ranking.seq <= through]
    settled = {ranking.item: ranking for ranking in rankings if ranking.purpose == "review"}
    rankings = [ranking for ranking in rankings if settled.get(ranking.item, ranking) is ranking]
    simulated = sum(ranking.source == "simulated" for ranking in rankings)
    if simulated and not allow_simulated:
        problem = f"{simulated} of its {len(rankings)} rankings are simulated, not a person's"
        raise InputError("project", project, problem, "Say data.allow_simulated=true to use them all the same.")
    return rankings


def preferences(
    store: Store, project: str, allow_simulated: bool = False, through: int | None = None
) -> list[Preference]:
    """Return the pairs of every ranking of a project that stands (not retracted, its item not erased), in ledger order.
    Gold items and repeats measure the annotators and are left out; what a reviewer settled stands alone.

    Args:
        through: see `counted_rankings`.

    Raises:
        InputError: unknown project, nothing ranked, no pair in what was ranked, or rankings by the stand-in for a
            person where only people's were asked for.
    """
    decided, _ = verdicts_of_people(store, project, allow_simulated, through)
    require(bool(decided), "project", project, "its rankings hold only ties", "Rank more items with stage=annotate.")
    return decided


def verdicts_of_people(
    store: Store, project: str, allow_simulated: bool = False, through: int | None = None
) -> tuple[list[Preference], list[Preference]]:
    """Return what people said of pairs: those of `preferences`, and those that they called equal, whichever of their
    answers is called chosen: what a judge is measured on, and nothing learns from.

    Raises:
        InputError: as `preferences`, but that ties alone are something.
    """
    rankings = training_rankings(store, project, allow_simulated, through)
    items = {item.id: item for item in store.items(project)}
    decided = list[Preference]()
    tied = list[Preference]()
    for ranking in rankings:
        if ranking.item in items:  # else it was erased between the two reads
            item = items[ranking.item]
            decided += pairs_of(ranking, item)
            ties = (two for tier in ranking.tiers for two in combinations(sorted(tier), 2))
            tied += [pair for two in ties if (pair := pair_of(ranking, item, *two)) is not None]
    problem = "its rankings compare no two answers that differ"
    require(bool(decided or tied), "project", project, problem, "Rank more items with stage=annotate.")
    return decided, tied
