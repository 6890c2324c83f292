"""The queue of a project: each request of an annotator is one transaction."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, case, func, select, update

from align.annotate.assignment.leases import (
    AnnotationTask,
    Terms,
    build_item_lease_condition,
    build_new_items_query,
    choose_item,
    choose_review,
    compute_next_lease_number,
    discard_draft,
    extend_lease,
    find_contested_items,
    grant_lease,
    is_wanted_again,
    read_lease,
    read_task,
    reopen_lease,
    require_valid_terms,
    save_draft,
)
from align.annotate.store import Judgement, Store
from align.annotate.store.ledger import (
    VOTE_KINDS,
    build_standing_vote_condition,
    close_leases,
    ensure_annotator,
    find_annotator,
    find_row_by_key,
    read_quarantined,
    read_remark,
)
from align.annotate.store.projects import read_settings, read_state
from align.annotate.store.records import parse_vote
from align.annotate.store.tables import leases, ledger, work
from align.core.errors import InputError

SUMS_CACHE_S = 1
"""Seconds for which a project's counts of wanted and recorded votes are cached, because they scan all items."""
CONTESTED_CACHE_S = 5
"""Seconds for which the list of contested items, a scan of all votes, is cached."""
MAX_RECENT_VOTES = 100
"""Number of votes that a newly opened page can undo."""
DRAFT_FIELDS = ("tiers", "strength", "quality", "ratings", "flagged", "skipped", "rationale", "demonstration")
"""Fields of a retracted vote that are saved as the draft."""


class SteadyClock:
    """A clock of seconds since 1970 that never jumps: the wall clock at creation, advanced by the monotonic clock.

    A jump of the wall clock therefore ends no lease. Each process has its own clock, so serve a project from one
    process.
    """

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> float:
        return self._offset + time.monotonic()


@dataclass(frozen=True, slots=True)
class QueueProgress:
    """The number of votes of an annotator and of their project, with the numbers that are wanted.

    Attributes:
        own_votes: the annotator's standing rankings, including gold items and repeats.
        quota: the annotator's maximum; 0 for no limit.
        votes, votes_wanted: rankings of the whole project, without gold items and repeats.
    """

    own_votes: int
    quota: int
    votes: int
    votes_wanted: int


class RecordedVote(NamedTuple):
    """The ledger row of a recorded vote, and the annotator's next task.

    Attributes:
        seq: seq of the vote's row in the ledger.
        next_task: the annotator's next task, leased to them; None if nothing is left.
    """

    seq: int
    next_task: AnnotationTask | None


class AssignmentQueue:
    """The queue that assigns a project's items to annotators and records their votes.

    It is safe to share between threads and processes.

    Args:
        clock: returns seconds since 1970.

    Raises:
        InputError: unknown project.
    """

    def __init__(self, store: Store, project: str, clock: Callable[[], float] | None = None) -> None:
        self.store = store
        self.project = project
        self.clock = clock or SteadyClock()
        with store.transaction() as db:
            # If the wall clock was set back while the server was down, leases must not last longer than they should.
            latest = self.clock() + 60 * read_settings(db, project).lease_minutes
            too_late = (leases.c.project == project, leases.c.state == "open", leases.c.expires_at > latest)
            db.execute(update(leases).where(*too_late).values(expires_at=latest))
        self._sums = (float("-inf"), 0, 0)
        self._contested: tuple[float, list[str]] = (float("-inf"), [])

    def take(self, annotator: str) -> AnnotationTask | None:
        """Return the task that an annotator has leased, with its lease extended, or else lease them a new item.

        Returns None if nothing is left for them, their quota is reached, they are in quarantine, or the project is not
        open.
        """
        with self.store.transaction() as db:
            return self._take_next(db, ensure_annotator(db, self.project, annotator).pseudonym)

    def take_review(self, reviewer: str) -> AnnotationTask | None:
        """Lease the item on which annotators disagree most to a reviewer, or return None if nothing is left to decide.

        An item that the reviewer has leased already comes first.
        """
        if self.clock() - self._contested[0] > CONTESTED_CACHE_S:
            with self.store.reading() as db:  # scans all votes, so not inside the write transaction
                self._contested = (self.clock(), find_contested_items(db, self.project))
        with self.store.transaction() as db:
            return self._take_next_review(db, ensure_annotator(db, self.project, reviewer).pseudonym)

    def get_task(self, annotator: str, token: str) -> AnnotationTask:
        """Return the task of an annotator's lease, even if the lease has ended.

        Raises:
            InputError: no such lease of this annotator, or its item was erased.
        """
        with self.store.reading() as db:
            return read_task(db, self._find_lease(db, annotator, token))

    def vote(self, annotator: str, token: str, key: str, judgement: Judgement, terms: Terms) -> RecordedVote:
        """Record a judgement of a leased item, end the lease, and lease the next item, in one transaction.

        Args:
            key: idempotency key: the same vote sent again, also with other `seconds`, returns the same seq, and the
                item that is next by then.
            judgement: a ranking or a skip. Its `display_order`, `purpose`, `source` and versions are set here, and its
                `seconds` are at most the time since the annotator got the item.
            terms: the terms under which it was made.

        Raises:
            AlreadyJudged: the annotator has judged the item, for instance in another tab.
            InputError: no such lease of this annotator, or as `Store.record`.
        """
        with self.store.transaction() as db:
            lease = self._find_lease(db, annotator, token)
            pseudonym = lease.annotator
            require_valid_terms(db, self.project, lease.purpose, terms)
            earlier_row = find_row_by_key(db, self.project, judgement.kind, key)
            if earlier_row is None:
                seconds = limit_seconds(judgement.seconds, self.clock() - lease.granted_at)
            else:  # as recorded when it was sent for the first time
                seconds = json.loads(earlier_row.payload).get("seconds")
            judgement = replace(
                judgement,
                display_order=tuple(json.loads(lease.shown)),
                purpose=lease.purpose,
                source="human",
                guideline_version="" if terms.guidelines is None else str(terms.guidelines),
                project_version=terms.version,
                seconds=seconds,
            )
            seq = self.store.record(self.project, lease.item, judgement, annotator=annotator, key=key)
            if earlier_row is None:  # else it was sent before, and may have been retracted since
                own_leases = build_item_lease_condition(self.project, pseudonym, lease.item, lease.purpose)
                close_leases(db, self.project, own_leases, "returned")
                db.execute(update(leases).where(leases.c.token == token).values(state="judged", vote=seq))
                discard_draft(db, lease)
            take_next = self._take_next_review if lease.purpose == "review" else self._take_next
            return RecordedVote(seq, take_next(db, pseudonym))

    def undo(self, annotator: str, seq: int) -> AnnotationTask:
        """Retract the annotator's vote of ledger row `seq`, and lease them its item again with the vote as a draft.

        A repeated call changes nothing more. An annotator in quarantine does not lease the item again; a vote on it is
        recorded nevertheless.

        Raises:
            InputError: no vote of this annotator, or its item was erased.
        """
        with self.store.transaction() as db:
            pseudonym = self._find_pseudonym(db, annotator)
            own_row = (ledger.c.project == self.project, ledger.c.seq == seq, ledger.c.annotator == pseudonym)
            row = db.execute(select(ledger).where(*own_row, ledger.c.kind.in_(VOTE_KINDS))).first()
            if row is None:
                raise InputError("seq", seq, "it is no vote of yours", "Give the seq of one of your own.")
            own_leases = (leases.c.project == self.project, leases.c.annotator == pseudonym, leases.c.item == row.item)
            lease = db.execute(select(leases).where(*own_leases, leases.c.vote == seq)).first()
            if lease is not None:
                self.store.retract(self.project, seq)
                vote = parse_vote(row, read_remark(db, self.project, seq))
                save_draft(db, lease, {name: getattr(vote, name) for name in DRAFT_FIELDS})
                if lease.purpose == "work":  # a repeat makes no sense without the first vote
                    close_leases(
                        db,
                        self.project,
                        build_item_lease_condition(self.project, pseudonym, lease.item, "repeat"),
                        "returned",
                    )
                if pseudonym not in read_quarantined(db, self.project):
                    reopen_lease(db, lease, self.clock())
                    db.execute(update(leases).where(leases.c.token == lease.token).values(granted_at=self.clock()))
            else:
                is_open = (leases.c.state == "open", leases.c.purpose != "repeat")
                lease = db.execute(select(leases).where(*own_leases, *is_open)).first()
            if lease is None:
                raise InputError("seq", seq, "its item cannot be judged again", "Go on with the next one.")
            return read_task(db, lease)

    def renew(self, annotator: str, token: str) -> bool:
        """Extend an annotator's lease of an item, and return whether they still have it.

        An expired lease is opened again if the item needs a vote. If they do not have it any more, the item may be
        leased to another annotator; a vote is accepted nevertheless.
        """
        with self.store.transaction() as db:
            lease = self._find_lease(db, annotator, token)
            is_quarantined = lease.annotator in read_quarantined(db, self.project)
            if lease.state == "expired" and is_wanted_again(db, lease) and not is_quarantined:
                reopen_lease(db, lease, self.clock())
                return True
            if lease.state == "open":
                extend_lease(db, lease, self.clock())
            return lease.state == "open"

    def is_judged(self, annotator: str, token: str) -> bool:
        """Return whether an annotator has judged the item of the lease with a token."""
        with self.store.reading() as db:
            return self._find_lease(db, annotator, token).state == "judged"

    def list_recent_votes(self, annotator: str) -> list[int]:
        """Return the ledger row numbers of an annotator's last votes that were not retracted, the newest last.

        A newly opened page can undo these.
        """
        with self.store.reading() as db:
            pseudonym = self._find_pseudonym(db, annotator)
            conditions = (leases.c.project == self.project, leases.c.annotator == pseudonym, leases.c.state == "judged")
            votes = select(leases.c.vote).where(*conditions).order_by(leases.c.vote.desc()).limit(MAX_RECENT_VOTES)
            return db.execute(votes).scalars().all()[::-1]  # type: ignore[return-value]

    def read_known_guidelines(self, annotator: str) -> int | None:
        """Return the version of the guidelines that an annotator saw at their newest vote, or None if there were none.

        A retracted vote counts too.
        """
        with self.store.reading() as db:
            pseudonym = self._find_pseudonym(db, annotator)
            conditions = (
                ledger.c.project == self.project,
                ledger.c.kind.in_(VOTE_KINDS),
                ledger.c.annotator == pseudonym,
            )
            payload = db.execute(
                select(ledger.c.payload).where(*conditions).order_by(ledger.c.seq.desc()).limit(1)
            ).scalar()
        version = json.loads(payload)["guideline_version"] if payload else ""
        return int(version) if version else None

    def save_draft(self, annotator: str, token: str, content: Mapping[str, Any]) -> None:
        """Save an annotator's unsent judgement of a leased item in the store, unless they have judged the item.

        It survives a reload, a restart and the end of the lease.
        """
        with self.store.transaction() as db:
            lease = self._find_lease(db, annotator, token)
            if lease.state != "judged":
                save_draft(db, lease, content)

    def read_progress(self, annotator: str, recount_totals: bool = False) -> QueueProgress:
        """Return how many rankings an annotator and the whole project have, and how many are wanted.

        Args:
            recount_totals: whether to count the project's rankings even if the cached counts are younger than
                `SUMS_CACHE_S`.
        """
        with self.store.reading() as db:
            own_rankings = self._count_rankings(db, self._find_pseudonym(db, annotator))
            summed_at, rankings_done, rankings_wanted = self._sums
            if recount_totals or self.clock() - summed_at > SUMS_CACHE_S:
                capped_rankings = case((work.c.judged < work.c.wanted, work.c.judged), else_=work.c.wanted)
                sums = select(func.coalesce(func.sum(capped_rankings), 0), func.coalesce(func.sum(work.c.wanted), 0))
                rankings_done, rankings_wanted = map(int, db.execute(sums.where(work.c.project == self.project)).one())
                self._sums = (self.clock(), rankings_done, rankings_wanted)
            return QueueProgress(own_rankings, read_settings(db, self.project).quota, rankings_done, rankings_wanted)

    def explain_idle(self, annotator: str) -> str:
        """Return the reason why an annotator gets no item from `take`, as one word.

        `paused` or `closed`: the project's state. `quota`: theirs is reached. `held`: others hold all remaining items.
        `done`: no items remain, or the annotator is in quarantine.
        """
        with self.store.reading() as db:
            pseudonym = self._find_pseudonym(db, annotator)
            state = read_state(db, self.project)
            if state != "open":
                return state
            if self._has_reached_quota(db, pseudonym):
                return "quota"
            if pseudonym in read_quarantined(db, self.project):
                return "done"
            held_items = (
                build_new_items_query(self.project, pseudonym)
                .where(work.c.leased > 0, work.c.judged < work.c.wanted)
                .limit(1)
            )
            return "done" if db.execute(held_items).first() is None else "held"

    def _take_next(self, db: Connection, pseudonym: str) -> AnnotationTask | None:
        if pseudonym in read_quarantined(db, self.project):
            return None
        held_task = self._take_held(db, pseudonym, leases.c.purpose != "review")
        if held_task is not None:
            return held_task
        if self._has_reached_quota(db, pseudonym) or read_state(db, self.project) != "open":
            return None
        number = compute_next_lease_number(db, self.project, pseudonym)
        settings = read_settings(db, self.project)
        choice = choose_item(db, self.project, pseudonym, number, settings)
        if choice.item is None:
            return None
        lease = grant_lease(
            db, self.project, pseudonym, number, choice.purpose, choice.item, choice.display_order, self.clock()
        )
        return read_task(db, lease)

    def _take_next_review(self, db: Connection, pseudonym: str) -> AnnotationTask | None:
        if pseudonym in read_quarantined(db, self.project):
            return None
        held_task = self._take_held(db, pseudonym, leases.c.purpose == "review")
        if held_task is not None:
            return held_task
        item = choose_review(db, self.project, self._contested[1])
        if item is None:
            return None
        number = compute_next_lease_number(db, self.project, pseudonym)
        return read_task(db, grant_lease(db, self.project, pseudonym, number, "review", item, (), self.clock()))

    def _take_held(self, db: Connection, pseudonym: str, condition: ColumnElement[bool]) -> AnnotationTask | None:
        """Return the task of an annotator's open lease that fulfils an SQL condition, and extend the lease.

        It may have expired, if it was not closed yet. If none exists, close all expired leases, of everyone, and
        return None.
        """
        conditions = (leases.c.project == self.project, leases.c.annotator == pseudonym, leases.c.state == "open")
        lease = db.execute(select(leases).where(*conditions, condition).order_by(leases.c.number).limit(1)).first()
        if lease is None:
            close_leases(db, self.project, leases.c.expires_at < self.clock())
            return None
        extend_lease(db, lease, self.clock())
        return read_task(db, lease)

    def _count_rankings(self, db: Connection, pseudonym: str) -> int:
        """Return the number of an annotator's rankings that were not retracted."""
        conditions = (
            build_standing_vote_condition(self.project),
            ledger.c.kind == "ranking",
            ledger.c.annotator == pseudonym,
        )
        return db.execute(select(func.count()).select_from(ledger).where(*conditions)).scalar_one()

    def _has_reached_quota(self, db: Connection, pseudonym: str) -> bool:
        quota = read_settings(db, self.project).quota
        return quota > 0 and self._count_rankings(db, pseudonym) >= quota

    def _find_lease(self, db: Connection, annotator: str, token: str) -> Row[Any]:
        """Return an annotator's lease with a token, or raise InputError if they have no such lease."""
        return read_lease(db, self.project, self._find_pseudonym(db, annotator), token)

    def _find_pseudonym(self, db: Connection, annotator: str) -> str:
        """Return an annotator's pseudonym, or an empty string, which matches no row, for an unknown annotator."""
        row = find_annotator(db, self.project, annotator)
        return "" if row is None else row.pseudonym


def limit_seconds(measured: float | None, elapsed: float) -> float | None:
    """Return the seconds that the page measured for an item, at most the elapsed ones; None if it measured none.

    Args:
        measured: by the page, which may be wrong.
        elapsed: since the annotator got the item, by the server. If they are not positive, because the server started
            again with a clock that was set back, the page's seconds are taken.
    """
    return measured if measured is None or elapsed <= 0 else min(measured, round(elapsed, 1))
