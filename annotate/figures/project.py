"""Everything that a project's votes say, as one JSON-ready object."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sqlalchemy import func, select

from align.annotate.figures.agreement import (
    NO_STRENGTHS,
    Panel,
    alpha,
    kappas,
    panels,
    ranked_by_contradictions,
    raw_agreement,
)
from align.annotate.figures.estimates import as_json
from align.annotate.figures.people import (
    CEILING_S,
    UNMEASURED,
    as_csv,
    length_bias,
    people,
    position_bias,
    skipped,
    ties,
)
from align.annotate.store import Store, Vote
from align.annotate.store.ledger import VOTES, check_project
from align.annotate.store.records import vote_of
from align.annotate.store.tables import annotators, candidates, ledger, work


@dataclass(frozen=True, slots=True)
class View:
    """A project's votes and what they were cast on.

    Attributes:
        rankings, skips: those that stand: not retracted, their item not erased; in ledger order.
        votes: all of the ledger's, those that do not stand among them, for the time that they took was spent.
        retracted: the seqs of those that were taken back.
        candidates: by item, its candidates' ids by position; without erased items.
        lengths: by candidate id, the characters of its text.
        expected: by gold item, its known answer: tiers of candidate ids, best first.
        identities: by pseudonym, who that is; without erased annotators.
        wanted, judged: by item that is no gold item, how many people are to judge it, and how many have.
    """

    rankings: list[Vote]
    skips: list[Vote]
    votes: list[Vote]
    retracted: frozenset[int]
    candidates: Mapping[str, tuple[str, ...]]
    lengths: Mapping[str, int]
    expected: Mapping[str, tuple[tuple[str, ...], ...]]
    identities: Mapping[str, str]
    wanted: Mapping[str, int]
    judged: Mapping[str, int]

    @property
    def work(self) -> list[Vote]:
        """The rankings that the project asked for: neither of gold items, nor repeats, nor a reviewer's."""
        return [vote for vote in self.rankings if vote.purpose == "work"]

    def through(self, seq: int) -> View:
        """Return the same without votes behind a row of the ledger. What was taken back since does not stand either."""
        return replace(
            self,
            rankings=[vote for vote in self.rankings if vote.seq <= seq],
            skips=[vote for vote in self.skips if vote.seq <= seq],
            votes=[vote for vote in self.votes if vote.seq <= seq],
        )

    @property
    def settled(self) -> set[str]:
        """The items that a reviewer has settled."""
        return {vote.item for vote in self.rankings if vote.purpose == "review"}


def read(store: Store, project: str) -> View:
    """Read a view of the project.

    Raises:
        InputError: unknown project.
    """
    with store.reading() as db:
        check_project(db, project)
        theirs = (ledger.c.project == project, ledger.c.kind.in_(VOTES))
        votes = [vote_of(row, None) for row in db.execute(select(ledger).where(*theirs).order_by(ledger.c.seq))]
        taken_back = select(ledger.c.retracts).where(ledger.c.project == project, ledger.c.kind == "retraction")
        retracted = frozenset(db.execute(taken_back).scalars())
        columns = (candidates.c.prompt_id, candidates.c.id, func.length(candidates.c.text).label("characters"))
        answers = select(*columns).where(candidates.c.project == project)  # their texts stay in the database
        ids = defaultdict(list)
        lengths = {}
        for item, id, characters in db.execute(answers.order_by(candidates.c.prompt_id, candidates.c.position)):
            ids[item].append(id)
            lengths[id] = characters
        to_do = select(work.c.item, work.c.wanted, work.c.judged).where(work.c.project == project, ~work.c.gold)
        left = db.execute(to_do).all()
        people = select(annotators.c.pseudonym, annotators.c.identity).where(annotators.c.project == project)
        identities = {row.pseudonym: row.identity for row in db.execute(people)}
        gold = (ledger.c.project == project, ledger.c.kind == "candidates", ledger.c.payload.contains('"expected":'))
        known = db.execute(select(ledger.c.item, ledger.c.payload).where(*gold)).all()
        expected = {row.item: tuple(tuple(tier) for tier in json.loads(row.payload)["expected"]) for row in known}
    standing = [vote for vote in votes if vote.seq not in retracted and vote.item in ids]
    return View(
        rankings=[vote for vote in standing if vote.kind == "ranking"],
        skips=[vote for vote in standing if vote.kind == "skip"],
        votes=votes,
        retracted=retracted,
        candidates={item: tuple(named) for item, named in ids.items()},
        lengths=lengths,
        expected=expected,
        identities=identities,
        wanted={row.item: row.wanted for row in left},
        judged={row.item: row.judged for row in left},
    )


SECONDS = (0, 2, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600)
"""Where the bins of the histogram of seconds per item begin; the last has no end."""


def figures(store: Store, project: str) -> dict[str, Any]:
    """Return `figures_of` all that there is by now.

    Raises:
        InputError: unknown project.
    """
    return figures_of(read(store, project), project)


def figures_of(view: View, project: str) -> dict[str, Any]:
    """Return the project's figures as numbers, texts, None, lists and objects; what is undefined says why as a text.

    Disagreements are those that no reviewer has settled.

    `totals`, `hours`, `per_day`, `seconds`, `agreement`, `position`, `length`, `people` and `disagreements`. An
    interval is `{value, low, high, n}`, at 95 %; n counts what is independent: items, or votes. Votes count that
    stand: not retracted, their item not erased.
    Agreement, biases and disagreements are of *work*, without gold items and repeats. Simulated votes count; `totals`
    says how many there are.
    """
    work = view.work
    everyone = people(view)
    directions = panels(work, view.candidates)
    strengths = panels(work, view.candidates, strength=True)
    return as_json(
        {
            "project": project,
            "totals": totals(view),
            "hours": {"total": sum(person.hours for person in everyone), "ceiling_seconds": CEILING_S},
            "per_day": per_day(view),
            "seconds": seconds(view),
            "agreement": {
                "items": len(directions),
                "pairs": sum(panel.values_RU.shape[1] for panel in directions),
                "alpha": alpha(directions, "nominal"),
                "alpha_strength": alpha(strengths, "ordinal") if strengths else NO_STRENGTHS,
                "raw": raw_agreement(directions),
                "kappas": kappas(directions, strengths),
            },
            "position": position_bias(work),
            "length": length_bias(work, view.lengths),
            "people": everyone,
            "disagreements": disagreements([panel for panel in directions if panel.item not in view.settled]),
        }
    )


def people_csv(store: Store, project: str) -> str:
    """Return hours, counts and shares, a row an annotator; see `people`.

    Raises:
        InputError: unknown project.
    """
    return as_csv(people(read(store, project)))


def totals(view: View) -> dict[str, Any]:
    """Count what the whole project has. An item is done when as many people as it wants have ranked it; gold items want
    nobody and are counted apart."""
    sources = Counter(vote.source for vote in view.rankings)
    purposes = Counter(vote.purpose for vote in view.rankings)
    wanted = view.wanted
    return {
        "rankings": len(view.rankings),
        "by_people": sources["human"],
        "simulated": sources["simulated"],
        "by_purpose": {purpose: purposes[purpose] for purpose in ("work", "gold", "repeat", "review")},
        "items": len(wanted),
        "items_done": sum(view.judged[item] >= wanted[item] for item in wanted),
        "gold_items": len(view.expected.keys() & view.candidates.keys()),
        "skips": skipped(view.skips),
        "ties": ties(view.rankings),
        "retracted": len(view.retracted),
        "flagged": sum(bool(vote.flagged) for vote in (*view.rankings, *view.skips)),
    }


def per_day(view: View) -> list[dict[str, Any]]:
    """Count rankings by people and by their stand-in, and skips, of each UTC day that has any, in order."""
    days: dict[str, Counter[str]] = defaultdict(Counter)
    for vote in (*view.rankings, *view.skips):
        days[vote.created_at[:10]]["skips" if vote.skipped else vote.source] += 1
    return [
        {"day": day, "people": n["human"], "simulated": n["simulated"], "skips": n["skips"]}
        for day, n in sorted(days.items())
    ]


def seconds(view: View) -> dict[str, Any]:
    """Return how long a ranking took where that was measured: quartiles, and a histogram whose last bin has no end."""
    taken = [vote.seconds for vote in view.rankings if vote.seconds is not None]
    quartiles = np.quantile(taken, (0.25, 0.5, 0.75)).tolist() if taken else [UNMEASURED] * 3
    counts, _ = np.histogram(taken, (*SECONDS, np.inf))
    bins = zip(SECONDS, (*SECONDS[1:], None), counts.tolist(), strict=True)
    return {
        "n": len(taken),
        **dict(zip(("lower_quartile", "median", "upper_quartile"), quartiles, strict=True)),
        "histogram": [{"from": low, "below": high, "count": count} for low, high, count in bins],
    }


def disagreements(found: Sequence[Panel]) -> list[dict[str, Any]]:
    """Return the items on which annotators contradict each other, for adjudication, the most contradicted first."""
    return [
        {
            "item": panel.item,
            "contradictions": number,
            "votes": [{"seq": seq, "annotator": who} for seq, who in zip(panel.seqs, panel.annotators, strict=True)],
        }
        for number, panel in ranked_by_contradictions(found)
    ]
