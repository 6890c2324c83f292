"""What is read of a project for its figures, all at one moment."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sqlalchemy import Connection, func, select

from align.annotate.store import Store, Vote
from align.annotate.store.queries import VOTES, check_project
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
        """The same without votes behind a row of the ledger. (What was taken back since does not stand either.)"""
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
    """A view of the project.

    Raises:
        InputError: unknown project.
    """
    with store.reading() as db:
        check_project(db, project)
        theirs = (ledger.c.project == project, ledger.c.kind.in_(VOTES))
        votes = [vote_of(row, None) for row in db.execute(select(ledger).where(*theirs).order_by(ledger.c.seq))]
        taken_back = select(ledger.c.retracts).where(ledger.c.project == project, ledger.c.kind == "retraction")
        retracted = frozenset(db.execute(taken_back).scalars())
        ids, lengths = _candidates(db, project)
        to_do = select(work.c.item, work.c.wanted, work.c.judged).where(work.c.project == project, ~work.c.gold)
        left = db.execute(to_do).all()
        people = select(annotators.c.pseudonym, annotators.c.identity).where(annotators.c.project == project)
        identities = {row.pseudonym: row.identity for row in db.execute(people)}
        expected = _expected(db, project)
    standing = [vote for vote in votes if vote.seq not in retracted and vote.item in ids]
    return View(
        rankings=[vote for vote in standing if vote.kind == "ranking"],
        skips=[vote for vote in standing if vote.kind == "skip"],
        votes=votes,
        retracted=retracted,
        candidates=ids,
        lengths=lengths,
        expected=expected,
        identities=identities,
        wanted={row.item: row.wanted for row in left},
        judged={row.item: row.judged for row in left},
    )


def _candidates(db: Connection, project: str) -> tuple[dict[str, tuple[str, ...]], dict[str, int]]:
    """The candidates' ids by item, and the lengths of their texts, which stay in the database."""
    columns = (candidates.c.prompt_id, candidates.c.id, func.length(candidates.c.text).label("characters"))
    mine = select(*columns).where(candidates.c.project == project)
    ids, lengths = defaultdict(list), {}
    for item, id, characters in db.execute(mine.order_by(candidates.c.prompt_id, candidates.c.position)):
        ids[item].append(id)
        lengths[id] = characters
    return {item: tuple(named) for item, named in ids.items()}, lengths


def _expected(db: Connection, project: str) -> dict[str, tuple[tuple[str, ...], ...]]:
    rows = select(ledger.c.item, ledger.c.payload).where(ledger.c.project == project, ledger.c.kind == "candidates")
    known = db.execute(rows.where(ledger.c.payload.contains('"expected":'))).all()
    return {row.item: tuple(tuple(tier) for tier in json.loads(row.payload)["expected"]) for row in known}
