"""Rankings into preference pairs: what a reward model or DPO trains on."""

from __future__ import annotations

from align.errors import InputError, require
from align.types import Message, Preference
from annotate.store.database import Store
from annotate.store.records import Item, Vote


def pairs_of(ranking: Vote, item: Item) -> list[Preference]:
    """Every pair across the ranking's tiers, as one group: at most K(K-1)/2 records. Of an item of two answers the
    strength is the margin.

    A tie yields no pair. Nor do two candidates with the same text: sampling can give one answer twice, and whatever
    was said of such a pair holds nothing to learn.
    """
    texts = {candidate.id: candidate.text for candidate in item.candidates}
    ended = {candidate.id: candidate.ended for candidate in item.candidates}
    return [
        Preference(
            prompt=item.prompt.messages,
            chosen=(Message("assistant", texts[better]),),
            rejected=(Message("assistant", texts[worse]),),
            id=f"{ranking.seq}:{better}>{worse}",
            group_id=item.id,
            annotator=ranking.annotator,
            source=ranking.source,
            scorer=ranking.scorer,
            margin=float(ranking.strength) if ranking.strength and len(item.candidates) == 2 else None,
            strength=ranking.strength,
            guideline_version=ranking.guideline_version,
            created_at=ranking.created_at,
            chosen_ended=ended[better],
            rejected_ended=ended[worse],
        )
        for better, worse in ranking.pairs
        if texts[better] != texts[worse]
    ]


def training_rankings(
    store: Store, project: str, allow_simulated: bool = False, through: int | None = None
) -> list[Vote]:
    """The rankings that stand and are neither of gold items nor repeats, in ledger order; of an item that a reviewer
    settled, the newest review alone. Raises as `preferences`.

    Args:
        through: the last row of the ledger that counts; None for all.
    """
    rankings = [ranking for ranking in store.rankings(project) if ranking.purpose in ("work", "review")]
    rankings = [ranking for ranking in rankings if through is None or ranking.seq <= through]
    settled = {ranking.item: ranking for ranking in rankings if ranking.purpose == "review"}
    rankings = [ranking for ranking in rankings if settled.get(ranking.item, ranking) is ranking]
    require(bool(rankings), "project", project, "nothing in it has been ranked", "Rank some items with stage=annotate.")
    simulated = sum(ranking.source == "simulated" for ranking in rankings)
    if simulated and not allow_simulated:
        problem = f"{simulated} of its {len(rankings)} rankings are simulated, not a person's"
        raise InputError("project", project, problem, "Say data.allow_simulated=true to use them all the same.")
    return rankings


def preferences(
    store: Store, project: str, allow_simulated: bool = False, through: int | None = None
) -> list[Preference]:
    """The pairs of every ranking of a project that stands (not retracted, its item not erased), in ledger order. Gold
    items and repeats measure the annotators and are left out; what a reviewer settled stands alone.

    Args:
        through: see `training_rankings`.

    Raises:
        InputError: unknown project, nothing ranked, no pair in what was ranked, or rankings by the stand-in for a
            person where only people's were asked for.
    """
    rankings = training_rankings(store, project, allow_simulated, through)
    items = {item.id: item for item in store.items(project)}
    # An item erased between the two reads is missing here, and its ranking with it.
    found = [pair for r in rankings if r.item in items for pair in pairs_of(r, items[r.item])]
    require(bool(found), "project", project, "its rankings hold only ties", "Rank more items with stage=annotate.")
    return found
