"""The queue of one project: each thing that an annotator asks is one transaction."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, case, func, select, update

from align.annotate.assignment.leases import (
    Task,
    Terms,
    check_terms,
    choose,
    choose_review,
    contested,
    discard_draft,
    fresh,
    grant,
    is_wanted_again,
    lease_of,
    next_number,
    of_item,
    open_again,
    prolong,
    save_draft,
    task_of,
)
from align.annotate.store import Judgement, Store
from align.annotate.store.ledger import (
    VOTES,
    annotator_of,
    close_leases,
    ensure_annotator,
    remark_of,
    row_by_key,
    stands,
)
from align.annotate.store.projects import settings_of, state_of
from align.annotate.store.records import vote_of
from align.annotate.store.tables import leases, ledger, work
from align.core.errors import InputError

SUMS_LAST_S = 1
"""Seconds for which the project's sums, a look at every item, are kept."""
CONTESTED_LAST_S = 5
"""Seconds for which the contested items, a look at every vote, are kept."""
RECENT = 100
DRAFTED = ("tiers", "strength", "quality", "ratings", "flagged", "skipped", "rationale", "demonstration")
"""What the draft of an item holds whose vote was taken back."""


class Clock:
    """Seconds since 1970 that run evenly: the wall clock when it was made, and the monotonic clock since. A wall clock
    that jumps ends nobody's lease. Of two processes each has its own: serve a project from one."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> float:
        return self._offset + time.monotonic()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an annotator and their project are.

    Attributes:
        mine: the annotator's standing rankings, gold and repeats among them.
        quota: asked of them; 0: no number.
        done, wanted: rankings of the whole project, gold and repeats aside.
    """

    mine: int
    quota: int
    done: int
    wanted: int


class AssignmentQueue:
    """Gives out the items of one project, and takes the votes. Safe to share between threads and processes.

    Args:
        clock: seconds since 1970.

    Raises:
        InputError: unknown project.
    """

    def __init__(self, store: Store, project: str, clock: Callable[[], float] | None = None) -> None:
        self.store = store
        self.project = project
        self.clock = clock or Clock()
        with store.transaction() as db:
            # A wall clock that was set back while we were down must not make leases outlast their time.
            latest = self.clock() + 60 * settings_of(db, project).lease_minutes
            late = (leases.c.project == project, leases.c.state == "open", leases.c.expires_at > latest)
            db.execute(update(leases).where(*late).values(expires_at=latest))
        self._sums = (float("-inf"), 0, 0)
        self._contested: tuple[float, list[str]] = (float("-inf"), [])

    def take(self, annotator: str) -> Task | None:
        """Return the annotator's next item: one they hold, or a new one, leased to them; None if nothing is left for
        them, their quota is reached, or the project is not open."""
        with self.store.transaction() as db:
            return self._next(db, ensure_annotator(db, self.project, annotator).pseudonym)

    def take_review(self, reviewer: str) -> Task | None:
        """Return an item that annotators disagree on, the most contradicted first; None if nothing is left to
        settle."""
        if self.clock() - self._contested[0] > CONTESTED_LAST_S:
            with self.store.reading() as db:  # a look at every vote, before anybody has to wait for it
                self._contested = (self.clock(), contested(db, self.project))
        with self.store.transaction() as db:
            return self._next_review(db, ensure_annotator(db, self.project, reviewer).pseudonym)

    def held(self, annotator: str, token: str) -> Task:
        """Return the item of a lease of the annotator's, ended or not.

        Raises:
            InputError: there is none, or its item was erased.
        """
        with self.store.reading() as db:
            return task_of(db, self._lease(db, annotator, token))

    def vote(self, annotator: str, token: str, key: str, judgement: Judgement, terms: Terms) -> tuple[int, Task | None]:
        """Record a judgement (or a skip) of a leased item, end the lease, and take the next, all or nothing.

        Args:
            key: idempotency key: the same vote sent again gives the same seq, and the item that is next by now.
            judgement: `display_order`, `purpose`, `source` and the versions are set here, whatever it says.
            terms: what it was made under, however long ago.

        Raises:
            AlreadyJudged: the annotator has judged the item, in another tab for instance.
            InputError: no such lease of this annotator, or as `Store.record` does.
        """
        with self.store.transaction() as db:
            lease = self._lease(db, annotator, token)
            who = lease.annotator
            check_terms(db, self.project, lease.purpose, terms)
            judgement = replace(
                judgement,
                display_order=tuple(json.loads(lease.shown)),
                purpose=lease.purpose,
                source="human",
                guideline_version="" if terms.guidelines is None else str(terms.guidelines),
                project_version=terms.version,
            )
            sent_before = row_by_key(db, self.project, judgement.kind, key)
            seq = self.store.record(self.project, lease.item, judgement, annotator=annotator, key=key)
            if sent_before is None:  # else it is a copy, which must not bring back what was taken back since
                mine = of_item(self.project, who, lease.item, lease.purpose)
                close_leases(db, self.project, mine, "returned")
                db.execute(update(leases).where(leases.c.token == token).values(state="judged", vote=seq))
                discard_draft(db, lease)
            return seq, self._next_review(db, who) if lease.purpose == "review" else self._next(db, who)

    def undo(self, annotator: str, seq: int) -> Task:
        """Take one of the annotator's votes back and give them the item again, what they had said as its draft.

        Asked again, it does nothing more.

        Raises:
            InputError: no vote of this annotator, or its item was erased.
        """
        with self.store.transaction() as db:
            who = self._known(db, annotator)
            mine = (ledger.c.project == self.project, ledger.c.seq == seq, ledger.c.annotator == who)
            row = db.execute(select(ledger).where(*mine, ledger.c.kind.in_(VOTES))).first()
            if row is None:
                raise InputError("seq", seq, "it is no vote of yours", "Give the seq of one of your own.")
            theirs = (leases.c.project == self.project, leases.c.annotator == who, leases.c.item == row.item)
            lease = db.execute(select(leases).where(*theirs, leases.c.vote == seq)).first()
            if lease is not None:
                self.store.retract(self.project, seq)
                vote = vote_of(row, remark_of(db, self.project, seq))
                save_draft(db, lease, {name: getattr(vote, name) for name in DRAFTED})
                if lease.purpose == "work":  # a repeat of what is not said any more repeats nothing
                    close_leases(db, self.project, of_item(self.project, who, lease.item, "repeat"), "returned")
                open_again(db, lease, self.clock())
            else:
                again = (leases.c.state == "open", leases.c.purpose != "repeat")
                lease = db.execute(select(leases).where(*theirs, *again)).first()
            if lease is None:
                raise InputError("seq", seq, "its item is not to be judged again", "Go on with the next one.")
            return task_of(db, lease)

    def renew(self, annotator: str, token: str) -> bool:
        """Note a sign of life. Returns whether the item is still kept for the annotator; if not, it is with somebody
        else, and a vote is taken all the same."""
        with self.store.transaction() as db:
            lease = self._lease(db, annotator, token)
            if lease.state == "expired" and is_wanted_again(db, lease):
                open_again(db, lease, self.clock())
                return True
            if lease.state == "open":
                prolong(db, lease, self.clock())
            return lease.state == "open"

    def is_judged(self, annotator: str, token: str) -> bool:
        """Return whether the annotator has judged what this lease gave them."""
        with self.store.reading() as db:
            return self._lease(db, annotator, token).state == "judged"

    def recent(self, annotator: str) -> list[int]:
        """Return the `seq` of the annotator's last votes that stand, the newest last: what a page that is opened can
        undo."""
        with self.store.reading() as db:
            who = self._known(db, annotator)
            mine = (leases.c.project == self.project, leases.c.annotator == who, leases.c.state == "judged")
            last = select(leases.c.vote).where(*mine).order_by(leases.c.vote.desc()).limit(RECENT)
            return db.execute(last).scalars().all()[::-1]  # type: ignore[return-value]

    def known_guidelines(self, annotator: str) -> int | None:
        """Return the version of the guidelines that the annotator had before them at their newest vote, taken back or
        not."""
        with self.store.reading() as db:
            who = self._known(db, annotator)
            mine = (ledger.c.project == self.project, ledger.c.kind.in_(VOTES), ledger.c.annotator == who)
            payload = db.execute(select(ledger.c.payload).where(*mine).order_by(ledger.c.seq.desc()).limit(1)).scalar()
        version = json.loads(payload)["guideline_version"] if payload else ""
        return int(version) if version else None

    def save_draft(self, annotator: str, token: str, content: Mapping[str, Any]) -> None:
        """Keep what the annotator has said so far, over a refresh, a restart and the end of the lease."""
        with self.store.transaction() as db:
            lease = self._lease(db, annotator, token)
            if lease.state != "judged":
                save_draft(db, lease, content)

    def progress(self, annotator: str, anew: bool = False) -> Progress:
        """Return how far they are. The project's sums take a look at every item and may be a second old, unless
        `anew`."""
        with self.store.reading() as db:
            mine = self._judged_by(db, self._known(db, annotator))
            at, done, wanted = self._sums
            if anew or self.clock() - at > SUMS_LAST_S:
                judged = case((work.c.judged < work.c.wanted, work.c.judged), else_=work.c.wanted)
                sums = select(func.coalesce(func.sum(judged), 0), func.coalesce(func.sum(work.c.wanted), 0))
                done, wanted = map(int, db.execute(sums.where(work.c.project == self.project)).one())
                self._sums = (self.clock(), done, wanted)
            return Progress(mine, settings_of(db, self.project).quota, done, wanted)

    def idle(self, annotator: str) -> str:
        """Return why `take` has nothing for an annotator: `paused` or `closed`, their `quota`, all that is left is
        `held` by others, or all is `done`."""
        with self.store.reading() as db:
            who = self._known(db, annotator)
            state = state_of(db, self.project)
            if state != "open":
                return state
            if self._quota_reached(db, who):
                return "quota"
            held = fresh(self.project, who).where(work.c.leased > 0, work.c.judged < work.c.wanted).limit(1)
            return "done" if db.execute(held).first() is None else "held"

    def _next(self, db: Connection, who: str) -> Task | None:
        held = self._held(db, who, leases.c.purpose != "review")
        if held is not None:
            return held
        if self._quota_reached(db, who) or state_of(db, self.project) != "open":
            return None
        number = next_number(db, self.project, who)
        settings = settings_of(db, self.project)
        purpose, item, display_order = choose(db, self.project, who, number, settings)
        if item is None:
            return None
        return task_of(db, grant(db, self.project, who, number, purpose, item, display_order, self.clock()))

    def _next_review(self, db: Connection, who: str) -> Task | None:
        held = self._held(db, who, leases.c.purpose == "review")
        if held is not None:
            return held
        item = choose_review(db, self.project, self._contested[1])
        if item is None:
            return None
        number = next_number(db, self.project, who)
        return task_of(db, grant(db, self.project, who, number, "review", item, (), self.clock()))

    def _held(self, db: Connection, who: str, which: ColumnElement[bool]) -> Task | None:
        """Return what somebody holds already, overdue or not (nobody else has asked for it), kept for longer. If there
        is nothing, take back what is overdue, from everybody."""
        mine = (leases.c.project == self.project, leases.c.annotator == who, leases.c.state == "open")
        lease = db.execute(select(leases).where(*mine, which).order_by(leases.c.number).limit(1)).first()
        if lease is None:
            close_leases(db, self.project, leases.c.expires_at < self.clock())
            return None
        prolong(db, lease, self.clock())
        return task_of(db, lease)

    def _judged_by(self, db: Connection, who: str) -> int:
        """Return the number of the annotator's standing rankings."""
        mine = (stands(self.project), ledger.c.kind == "ranking", ledger.c.annotator == who)
        return db.execute(select(func.count()).select_from(ledger).where(*mine)).scalar_one()

    def _quota_reached(self, db: Connection, who: str) -> bool:
        quota = settings_of(db, self.project).quota
        return quota > 0 and self._judged_by(db, who) >= quota

    def _lease(self, db: Connection, annotator: str, token: str) -> Row[Any]:
        """Return the annotator's lease of this token. Raises InputError if there is none."""
        return lease_of(db, self.project, self._known(db, annotator), token)

    def _known(self, db: Connection, annotator: str) -> str:
        """Return their pseudonym; empty, which is nobody's, if they were not met yet."""
        person = annotator_of(db, self.project, annotator)
        return "" if person is None else person.pseudonym
