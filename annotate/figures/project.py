"""All figures of a project as one JSON-ready object."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sqlalchemy import func, select

from align.annotate.figures.agreement import (
    NO_STRENGTHS,
    ItemRatings,
    build_item_ratings,
    compute_alpha,
    compute_kappas,
    compute_raw_agreement,
    rank_by_contradictions,
)
from align.annotate.figures.estimates import as_json
from align.annotate.figures.people import (
    CEILING_S,
    UNMEASURED,
    compute_length_bias,
    compute_position_bias,
    compute_tie_share,
    count_skips,
    summarize_annotators,
    to_csv,
)
from align.annotate.store import Store, Vote
from align.annotate.store.ledger import VOTE_KINDS, read_quarantined, require_known_project
from align.annotate.store.records import parse_vote
from align.annotate.store.tables import candidates, ledger, work
from align.annotate.store.vote_selection import read_identities, read_known_answers


@dataclass(frozen=True, slots=True)
class ProjectView:
    """A project's votes and the items that they judge, read at one moment.

    Attributes:
        rankings, skips: those that stand: not retracted, their item not erased; in ledger order.
        votes: all votes in the ledger, including those that do not stand, for the time spent on them.
        retracted: the seqs of retracted votes.
        candidates: candidate ids by item, in the order of positions; without erased items.
        lengths: number of characters by candidate id.
        expected: the known answer by gold item: tiers of candidate ids, best first.
        identities: name by pseudonym; without erased annotators.
        quarantined: pseudonyms of the annotators in quarantine.
        votes_wanted, votes_done: by item, without gold items: number of people who are to judge it, and who have.
    """

    rankings: list[Vote]
    skips: list[Vote]
    votes: list[Vote]
    retracted: frozenset[int]
    candidates: Mapping[str, tuple[str, ...]]
    lengths: Mapping[str, int]
    expected: Mapping[str, tuple[tuple[str, ...], ...]]
    identities: Mapping[str, str]
    quarantined: frozenset[str]
    votes_wanted: Mapping[str, int]
    votes_done: Mapping[str, int]

    @property
    def counted_rankings(self) -> list[Vote]:
        """The rankings of annotators who are not in quarantine."""
        return [vote for vote in self.rankings if vote.annotator not in self.quarantined]

    @property
    def work(self) -> list[Vote]:
        """The counted rankings for training (purpose `work`), without gold items, repeats and reviews."""
        return [vote for vote in self.counted_rankings if vote.purpose == "work"]

    def through(self, seq: int) -> ProjectView:
        """Return the view with only the votes up to row `seq` of the ledger.

        Votes that were retracted after that row are left out as well.
        """
        return replace(
            self,
            rankings=[vote for vote in self.rankings if vote.seq <= seq],
            skips=[vote for vote in self.skips if vote.seq <= seq],
            votes=[vote for vote in self.votes if vote.seq <= seq],
        )

    @property
    def reviewed_items(self) -> set[str]:
        """The ids of items that a reviewer who is not in quarantine has decided."""
        return {vote.item for vote in self.counted_rankings if vote.purpose == "review"}


def read_view(store: Store, project: str) -> ProjectView:
    """Read a project's votes, and the items that they judge, from the store in one consistent read.

    Raises:
        InputError: unknown project.
    """
    with store.reading() as db:
        require_known_project(db, project)
        vote_conditions = (ledger.c.project == project, ledger.c.kind.in_(VOTE_KINDS))
        votes = [
            parse_vote(row, None) for row in db.execute(select(ledger).where(*vote_conditions).order_by(ledger.c.seq))
        ]
        retractions = select(ledger.c.retracts).where(ledger.c.project == project, ledger.c.kind == "retraction")
        retracted = frozenset(db.execute(retractions).scalars())
        columns = (candidates.c.prompt_id, candidates.c.id, func.length(candidates.c.text).label("characters"))
        answers = select(*columns).where(candidates.c.project == project)  # their texts stay in the database
        ids = defaultdict(list)
        lengths = {}
        for item, id, characters in db.execute(answers.order_by(candidates.c.prompt_id, candidates.c.position)):
            ids[item].append(id)
            lengths[id] = characters
        query = select(work.c.item, work.c.wanted, work.c.judged).where(work.c.project == project, ~work.c.gold)
        work_rows = db.execute(query).all()
        identities = read_identities(db, project)
        quarantined = read_quarantined(db, project)
        expected = read_known_answers(db, project)
    standing_votes = [vote for vote in votes if vote.seq not in retracted and vote.item in ids]
    return ProjectView(
        rankings=[vote for vote in standing_votes if vote.kind == "ranking"],
        skips=[vote for vote in standing_votes if vote.kind == "skip"],
        votes=votes,
        retracted=retracted,
        candidates={item: tuple(candidate_ids) for item, candidate_ids in ids.items()},
        lengths=lengths,
        expected=expected,
        identities=identities,
        quarantined=quarantined,
        votes_wanted={row.item: row.wanted for row in work_rows},
        votes_done={row.item: row.judged for row in work_rows},
    )


SECONDS_EDGES = (0, 2, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600)
"""Lower edges of the histogram's bins of seconds per item; the last bin is open."""


def compute_figures(store: Store, project: str) -> dict[str, Any]:
    """Compute a project's current figures about votes and annotators as JSON values, see `compute_view_figures`.

    Raises:
        InputError: unknown project.
    """
    return compute_view_figures(read_view(store, project), project)


def compute_view_figures(view: ProjectView, project: str) -> dict[str, Any]:
    """Compute the figures about a project's votes and annotators as a mapping of JSON values, such as `agreement`.

    The keys are `totals`, `hours`, `per_day`, `seconds`, `agreement`, `position`, `length`, `people` and
    `disagreements`. An interval is `{value, low, high, n}`, at 95 %, where n is the number of independent items or
    votes. An undefined figure is a text with the reason.

    Only votes that stand count: not retracted, their item not erased. Agreement, biases and disagreements cover *work*,
    without gold items, repeats and votes of annotators in quarantine. Simulated votes count; `totals` has their number.
    Disagreements are those that no reviewer has decided.
    """
    work = view.work
    summaries = summarize_annotators(view)
    directions = build_item_ratings(work, view.candidates)
    strengths = build_item_ratings(work, view.candidates, use_strengths=True)
    return as_json(
        {
            "project": project,
            "totals": count_totals(view),
            "hours": {"total": sum(person.hours for person in summaries), "ceiling_seconds": CEILING_S},
            "per_day": count_per_day(view),
            "seconds": summarize_seconds(view),
            "agreement": {
                "items": len(directions),
                "pairs": sum(rated_item.values_RU.shape[1] for rated_item in directions),
                "alpha": compute_alpha(directions, "nominal"),
                "alpha_strength": compute_alpha(strengths, "ordinal") if strengths else NO_STRENGTHS,
                "raw": compute_raw_agreement(directions),
                "kappas": compute_kappas(directions, strengths),
            },
            "position": compute_position_bias(work),
            "length": compute_length_bias(work, view.lengths),
            "people": summaries,
            "disagreements": list_disagreements(
                [rated_item for rated_item in directions if rated_item.item not in view.reviewed_items]
            ),
        }
    )


def build_people_csv(store: Store, project: str) -> str:
    """Return a CSV text with one row for each annotator of a project: working hours, counts of votes, and shares.

    Raises:
        InputError: unknown project.
    """
    return to_csv(summarize_annotators(read_view(store, project)))


def count_totals(view: ProjectView) -> dict[str, Any]:
    """Return a project's counts of items and votes, and the share of ties, by name, such as `rankings`.

    An item is done when the wanted number of people have ranked it. Gold items are counted separately.
    """
    sources = Counter(vote.source for vote in view.rankings)
    purposes = Counter(vote.purpose for vote in view.rankings)
    wanted_by_item = view.votes_wanted
    return {
        "rankings": len(view.rankings),
        "by_people": sources["human"],
        "simulated": sources["simulated"],
        "by_purpose": {purpose: purposes[purpose] for purpose in ("work", "gold", "repeat", "review")},
        "items": len(wanted_by_item),
        "items_done": sum(view.votes_done[item] >= wanted_by_item[item] for item in wanted_by_item),
        "gold_items": len(view.expected.keys() & view.candidates.keys()),
        "skips": count_skips(view.skips),
        "ties": compute_tie_share(view.rankings),
        "retracted": len(view.retracted),
        "flagged": sum(bool(vote.flagged) for vote in (*view.rankings, *view.skips)),
    }


def count_per_day(view: ProjectView) -> list[dict[str, Any]]:
    """Return the numbers of rankings by people, simulated rankings and skips for each UTC day with votes, in order."""
    days: dict[str, Counter[str]] = defaultdict(Counter)
    for vote in (*view.rankings, *view.skips):
        days[vote.created_at[:10]]["skips" if vote.skipped else vote.source] += 1
    return [
        {"day": day, "people": counts["human"], "simulated": counts["simulated"], "skips": counts["skips"]}
        for day, counts in sorted(days.items())
    ]


def summarize_seconds(view: ProjectView) -> dict[str, Any]:
    """Return the quartiles of the measured seconds per ranking, and a histogram whose last bin is open."""
    durations = [vote.seconds for vote in view.rankings if vote.seconds is not None]
    quartiles = np.quantile(durations, (0.25, 0.5, 0.75)).tolist() if durations else [UNMEASURED] * 3
    counts, _ = np.histogram(durations, (*SECONDS_EDGES, np.inf))
    bins = zip(SECONDS_EDGES, (*SECONDS_EDGES[1:], None), counts.tolist(), strict=True)
    return {
        "n": len(durations),
        **dict(zip(("lower_quartile", "median", "upper_quartile"), quartiles, strict=True)),
        "histogram": [{"from": low, "below": high, "count": count} for low, high, count in bins],
    }


def list_disagreements(rated_items: Sequence[ItemRatings]) -> list[dict[str, Any]]:
    """Return the items on which annotators contradict each other, with their votes, as JSON values.

    The most contradicted items come first.
    """
    return [
        {
            "item": contested.ratings.item,
            "contradictions": contested.contradictions,
            "votes": [
                {"seq": seq, "annotator": pseudonym}
                for seq, pseudonym in zip(contested.ratings.seqs, contested.ratings.annotators, strict=True)
            ],
        }
        for contested in rank_by_contradictions(rated_items)
    ]
