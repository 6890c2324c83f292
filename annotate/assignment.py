"""Who judges what next: exclusive leases, and votes that end them, in one transaction with the ledger.

    queue = AssignmentQueue(store, "quickstart")
    task = queue.take("ann")
    seq, following = queue.vote("ann", task.token, key, Judgement(tiers))

An item is *leased* to one annotator for each vote that it still wants. A lease ends with a vote, with its return, or
when its holder has shown no sign of life for a while; then the item goes to somebody else, and a vote that comes late
is taken all the same. Nobody is given an item that they have judged or hold, but for deliberate repeats.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, case, delete, exists, func, insert, select, update

from align.errors import InputError, require
from annotate.clock import Clock
from annotate.orders import chance, shown_order
from annotate.reviewing import contested
from annotate.store import Judgement, Settings, Store
from annotate.store.ledger import canonical
from annotate.store.projects import guidelines_of, settings_of, state_of
from annotate.store.queries import (
    VOTES,
    act,
    annotator_of,
    close_leases,
    count_work,
    meet,
    remark_of,
    stands,
)
from annotate.store.records import check_text, vote_of
from annotate.store.tables import drafts, leases, ledger, work
from annotate.tasks import Progress, Task, draft_of
from annotate.terms import Terms, check_terms

REPEAT_AFTER = 10
"""Other votes that lie between a vote and its repeat, at least."""
SUMS_LAST_S, CONTESTED_LAST_S = 1, 5
"""Seconds for which what takes a look at every item, or at every vote, is not looked at again."""
RECENT = 100


class AssignmentQueue:
    """Gives out the items of one project, and takes the votes. Safe to share between threads and processes.

    Args:
        clock: seconds since 1970.

    Raises:
        InputError: unknown project.
    """

    def __init__(self, store: Store, project: str, clock: Callable[[], float] | None = None) -> None:
        self.store, self.project, self.clock = store, project, clock or Clock()
        with store.transaction() as db:
            settings = settings_of(db, project)
            # A wall clock that was set back while we were down must not make leases outlast their time.
            latest = self._expiry(settings)
            late = (leases.c.project == project, leases.c.state == "open", leases.c.expires_at > latest)
            db.execute(update(leases).where(*late).values(expires_at=latest))
        self._sums = (float("-inf"), 0, 0)
        self._contested: tuple[float, list[str]] = (float("-inf"), [])

    def take(self, annotator: str) -> Task | None:
        """The annotator's next item: one they hold, or a new one, leased to them; None where nothing is left for them,
        their quota is reached, or the project is not open."""
        with self.store.transaction() as db:
            return self._next(db, self._pseudonym(db, annotator))

    def take_review(self, reviewer: str) -> Task | None:
        """An item that annotators disagree on, the most contradicted first; None where nothing is left to settle."""
        if (
            self.clock() - self._contested[0] > CONTESTED_LAST_S
        ):  # a look at every vote, before anybody has to wait for it
            with self.store.reading() as db:
                self._contested = (self.clock(), contested(db, self.project))
        with self.store.transaction() as db:
            return self._next_review(db, self._pseudonym(db, reviewer))

    def held(self, annotator: str, token: str) -> Task:
        """The item of a lease of the annotator's, ended or not.

        Raises:
            InputError: there is none, or its item was erased.
        """
        with self.store.reading() as db:
            person = annotator_of(db, self.project, annotator)
            who = "" if person is None else person.pseudonym
            return self._task(db, who, self._lease(db, who, token))

    def vote(
        self, annotator: str, token: str, key: str, judgement: Judgement, terms: Terms | None = None
    ) -> tuple[int, Task | None]:
        """Records a judgement (or a skip) of a leased item, ends the lease, and takes the next, all or nothing.

        Args:
            key: idempotency key: the same vote sent again gives the same seq, and the item that is next by now.
            judgement: `shown`, `purpose`, `source` and the versions are set here, whatever it says.
            terms: what it was made under, however long ago; None: whoever made it did not say, and it is held to any
                settings that the project ever had, and to the guidelines that were in force when the item was given.

        Raises:
            AlreadyJudged: the annotator has judged the item, in another tab for instance.
            InputError: no such lease of this annotator, or as `Store.record` does.
        """
        with self.store.transaction() as db:
            who = self._pseudonym(db, annotator)
            lease = self._lease(db, who, token)
            if terms is not None:
                check_terms(db, self.project, lease.purpose, terms)
            read = lease.guidelines if terms is None else terms.guidelines
            judgement = replace(
                judgement, shown=tuple(json.loads(lease.shown)), purpose=lease.purpose, source="human",
                guideline_version="" if read is None else str(read),
                project_version=None if terms is None else terms.version,
            )  # fmt: skip
            sent_before = act(db, self.project, judgement.kind, key)
            seq = self.store.record(self.project, lease.item, judgement, annotator=annotator, key=key)
            if sent_before is None:  # else it is a copy, which must not bring back what was taken back since
                close_leases(db, self.project, self._mine(who, lease.item, lease.purpose), "returned")
                db.execute(update(leases).where(leases.c.token == token).values(state="judged", vote=seq))
                db.execute(delete(drafts).where(*self._my_draft(who, lease.item, lease.purpose)))
            return seq, self._next_review(db, who) if lease.purpose == "review" else self._next(db, who)

    def undo(self, annotator: str, seq: int) -> Task:
        """Takes one of the annotator's votes back and gives them the item again, what they had said as its draft.

        Asked again, it does nothing more.

        Raises:
            InputError: no vote of this annotator, or its item was erased.
        """
        with self.store.transaction() as db:
            who = self._pseudonym(db, annotator)
            mine = (ledger.c.project == self.project, ledger.c.seq == seq, ledger.c.annotator == who)
            row = db.execute(select(ledger).where(*mine, ledger.c.kind.in_(VOTES))).first()
            if row is None:
                raise InputError("seq", seq, "it is no vote of yours", "Give the seq of one of your own.")
            of_item = (leases.c.project == self.project, leases.c.annotator == who, leases.c.item == row.item)
            lease = db.execute(select(leases).where(*of_item, leases.c.vote == seq)).first()
            if lease is not None:
                self.store.retract(self.project, seq)
                self._save(db, lease, draft_of(vote_of(row, remark_of(db, self.project, seq))))
                if lease.purpose == "work":  # a repeat of what is not said any more repeats nothing
                    close_leases(db, self.project, self._mine(who, lease.item, "repeat"), "returned")
                self._open_again(db, lease)
            else:
                again = (leases.c.state == "open", leases.c.purpose != "repeat")
                lease = db.execute(select(leases).where(*of_item, *again)).first()
            if lease is None:
                raise InputError("seq", seq, "its item is not to be judged again", "Go on with the next one.")
            return self._task(db, who, lease)

    def renew(self, annotator: str, token: str) -> bool:
        """A sign of life; whether the item is still kept for the annotator. Where it is not, it is with somebody else,
        and a vote is taken all the same."""
        with self.store.transaction() as db:
            lease = self._lease(db, self._pseudonym(db, annotator), token)
            if lease.state == "expired" and self._wanted_again(db, lease):
                self._open_again(db, lease)
                return True
            if lease.state == "open":
                self._prolong(db, token)
            return lease.state == "open"

    def is_judged(self, annotator: str, token: str) -> bool:
        """Whether the annotator has judged what this lease gave them."""
        with self.store.reading() as db:
            return self._lease(db, self._pseudonym(db, annotator), token).state == "judged"

    def recent(self, annotator: str) -> list[int]:
        """The `seq` of the annotator's last votes that stand, the newest last: what a page that is opened can undo."""
        with self.store.reading() as db:
            person = annotator_of(db, self.project, annotator)
            who = "" if person is None else person.pseudonym
            mine = (leases.c.project == self.project, leases.c.annotator == who, leases.c.state == "judged")
            last = select(leases.c.vote).where(*mine).order_by(leases.c.vote.desc()).limit(RECENT)
            return db.execute(last).scalars().all()[::-1]  # type: ignore[return-value]

    def save_draft(self, annotator: str, token: str, content: Mapping[str, Any]) -> None:
        """Keeps what the annotator has said so far, over a refresh, a restart and the end of the lease."""
        with self.store.transaction() as db:
            who = self._pseudonym(db, annotator)
            lease = self._lease(db, who, token)
            if lease.state != "judged":
                self._save(db, lease, content)

    def give_back(self, annotator: str, token: str) -> None:
        """Returns an item unjudged, for somebody else."""
        with self.store.transaction() as db:
            lease = self._lease(db, self._pseudonym(db, annotator), token)
            close_leases(db, self.project, leases.c.token == lease.token, "returned")

    def progress(self, annotator: str, anew: bool = False) -> Progress:
        """How far they are. The project's sums take a look at every item and may be a second old, unless `anew`."""
        with self.store.reading() as db:
            person = annotator_of(db, self.project, annotator)
            mine = 0 if person is None else self._judged_by(db, person.pseudonym)
            at, done, wanted = self._sums
            if anew or self.clock() - at > SUMS_LAST_S:
                judged = case((work.c.judged < work.c.wanted, work.c.judged), else_=work.c.wanted)
                sums = select(func.coalesce(func.sum(judged), 0), func.coalesce(func.sum(work.c.wanted), 0))
                done, wanted = map(int, db.execute(sums.where(work.c.project == self.project)).one())
                self._sums = (self.clock(), done, wanted)
            return Progress(mine, settings_of(db, self.project).quota, done, wanted)

    def idle(self, annotator: str) -> str:
        """Why `take` has nothing for an annotator: `paused` or `closed`, their `quota`, all that is left is `held` by
        others, or all is `done`."""
        with self.store.reading() as db:
            state, settings = state_of(db, self.project), settings_of(db, self.project)
            person = annotator_of(db, self.project, annotator)
            who = "" if person is None else person.pseudonym
            held = self._fresh(who).where(work.c.leased > 0, work.c.judged < work.c.wanted).limit(1)
            if state != "open":
                return state
            if settings.quota and self._judged_by(db, who) >= settings.quota:
                return "quota"
            return "done" if db.execute(held).first() is None else "held"

    # What comes next

    def _next(self, db: Connection, who: str) -> Task | None:
        held = self._held(db, who, leases.c.purpose != "review")
        if held is not None:
            return held
        close_leases(db, self.project, leases.c.expires_at < self.clock())
        settings = settings_of(db, self.project)
        over = settings.quota and self._judged_by(db, who) >= settings.quota
        if over or state_of(db, self.project) != "open":
            return None
        number = self._number(db, who)
        purpose, item, shown = self._choose(db, who, number, settings)
        return None if item is None else self._grant(db, who, number, purpose, item, shown)

    def _next_review(self, db: Connection, who: str) -> Task | None:
        held = self._held(db, who, leases.c.purpose == "review")
        if held is not None:
            return held
        close_leases(db, self.project, leases.c.expires_at < self.clock())
        given = (leases.c.project == self.project, leases.c.purpose == "review")
        taken = set(db.execute(select(leases.c.item).where(*given, leases.c.state.in_(("open", "judged")))).scalars())
        left = [item for item in self._contested[1] if item not in taken][:50]
        there = (work.c.project == self.project, work.c.item.in_(left))  # not erased since
        known = set(db.execute(select(work.c.item).where(*there)).scalars())
        item = next((item for item in left if item in known), None)
        return None if item is None else self._grant(db, who, self._number(db, who), "review", item, ())

    def _held(self, db: Connection, who: str, which: ColumnElement[bool]) -> Task | None:
        """What somebody holds already, overdue or not: nobody else has asked for it."""
        open_ones = (leases.c.project == self.project, leases.c.annotator == who, leases.c.state == "open")
        lease = db.execute(select(leases).where(*open_ones, which).order_by(leases.c.number).limit(1)).first()
        if lease is None:
            return None
        self._prolong(db, lease.token)
        return self._task(db, who, lease)

    def _number(self, db: Connection, who: str) -> int:
        """Of the annotator's next lease."""
        mine = (leases.c.project == self.project, leases.c.annotator == who)
        last = db.execute(select(func.max(leases.c.number)).where(*mine)).scalar()
        return 0 if last is None else last + 1

    def _choose(
        self, db: Connection, who: str, number: int, settings: Settings
    ) -> tuple[str, str | None, tuple[str, ...]]:
        """Purpose and item of a new lease, and the order of a repeat; no item where nothing is left."""
        if chance(settings.gold_share, who, number, "gold"):
            gold = db.execute(self._fresh(who).where(work.c.gold).order_by(work.c.shuffle).limit(1)).scalar()
            if gold is not None:
                return "gold", gold, ()
        if chance(settings.repeat_share, who, number, "repeat"):
            earlier = self._to_repeat(db, who)
            if earlier is not None:
                return "repeat", earlier.item, tuple(reversed(json.loads(earlier.shown)))
        order = (work.c.priority.desc(), work.c.shuffle) if settings.order == "priority" else (work.c.shuffle,)
        item = None
        for passed in (("open", "judged", "returned"), ("open", "judged")):  # what they gave back comes last
            if item is None:
                left = self._fresh(who, passed).where(work.c.wanted > work.c.judged + work.c.leased)
                item = db.execute(left.order_by(*order).limit(1)).scalar()
        return "work", item, ()

    def _fresh(self, who: str, passed: Sequence[str] = ("open", "judged")) -> Select[Any]:
        """Items that the annotator has not judged or skipped, nor has a lease of in one of these states."""
        held = (leases.c.project == self.project, leases.c.item == work.c.item, leases.c.annotator == who)
        theirs = exists().where(*held, leases.c.state.in_(passed))
        said = exists().where(stands(self.project), ledger.c.item == work.c.item, ledger.c.annotator == who)
        return select(work.c.item).where(work.c.project == self.project, ~theirs, ~said)

    def _to_repeat(self, db: Connection, who: str) -> Row[Any] | None:
        """The annotator's first ranking that lies far enough back and has not been repeated."""
        again = leases.alias("again")
        repeated = exists().where(
            again.c.project == self.project, again.c.annotator == who, again.c.item == leases.c.item,
            again.c.purpose == "repeat", again.c.state.in_(("open", "judged")),
        )  # fmt: skip
        ranked = exists().where(stands(self.project), ledger.c.seq == leases.c.vote, ledger.c.kind == "ranking")
        mine = (leases.c.project == self.project, leases.c.annotator == who, leases.c.state == "judged")
        newest = select(leases.c.vote).where(*mine).order_by(leases.c.vote.desc())
        far = db.execute(newest.offset(REPEAT_AFTER).limit(1)).scalar()
        due = (leases.c.purpose == "work", leases.c.vote <= (0 if far is None else far))
        return db.execute(select(leases).where(*mine, *due, ranked, ~repeated).order_by(leases.c.vote).limit(1)).first()

    def _grant(
        self, db: Connection, who: str, number: int, purpose: str, item: str, shown: tuple[str, ...]
    ) -> Task | None:
        content = self.store.item(self.project, item)
        ids = [candidate.id for candidate in content.candidates]
        alike = (leases.c.project == self.project, leases.c.annotator == who, leases.c.k == len(ids))
        last = db.execute(select(func.max(leases.c.turn)).where(*alike)).scalar()
        turn = -1 if last is None else last
        turn += purpose != "repeat"  # whose order is given: it takes no turn
        guidelines = guidelines_of(db, self.project)
        row = {
            "token": secrets.token_urlsafe(24), "project": self.project, "annotator": who, "number": number,
            "item": item, "purpose": purpose, "shown": canonical(list(shown or shown_order(ids, who, turn))),
            "k": len(ids), "turn": turn, "state": "open", "granted_at": self.clock(), "vote": None,
            "guidelines": None if guidelines is None else guidelines[0],
            "expires_at": self._expiry(settings_of(db, self.project)),
        }  # fmt: skip
        db.execute(insert(leases), row)
        if purpose == "work":
            count_work(db, self.project, item, leased=1)
        return self._task(db, who, self._lease(db, who, row["token"]))

    # Leases

    def _lease(self, db: Connection, who: str, token: str) -> Row[Any]:
        mine = (leases.c.project == self.project, leases.c.token == token, leases.c.annotator == who)
        lease = db.execute(select(leases).where(*mine)).first()
        if lease is None:
            raise InputError("token", token, "you hold no such item", "Ask for the next one.")
        return lease

    def _task(self, db: Connection, who: str, lease: Row[Any]) -> Task:
        draft = db.execute(select(drafts.c.content).where(*self._my_draft(who, lease.item, lease.purpose))).scalar()
        expiry = select(leases.c.expires_at).where(leases.c.token == lease.token)
        return Task(
            lease.token, self.store.item(self.project, lease.item), lease.purpose, tuple(json.loads(lease.shown)),
            json.loads(draft or "{}"), db.execute(expiry).scalar_one(),
        )  # fmt: skip

    def _open_again(self, db: Connection, lease: Row[Any]) -> None:
        db.execute(update(leases).where(leases.c.token == lease.token).values(state="open", vote=None))
        self._prolong(db, lease.token)
        if lease.purpose == "work":
            count_work(db, self.project, lease.item, leased=1)

    def _wanted_again(self, db: Connection, lease: Row[Any]) -> bool:
        """Whether an item that went back from a lease still wants somebody, and its holder has not taken it anew."""
        place = (work.c.project == self.project, work.c.item == lease.item)
        left = db.execute(select(work.c.wanted - work.c.judged - work.c.leased).where(*place)).scalar()
        mine = self._mine(lease.annotator, lease.item, lease.purpose)
        anew = db.execute(select(leases.c.token).where(mine, leases.c.state.in_(("open", "judged")))).first()
        return anew is None and left is not None and (lease.purpose != "work" or left > 0)

    def _mine(self, who: str, item: str, purpose: str) -> ColumnElement[bool]:
        theirs = (leases.c.annotator == who) & (leases.c.item == item) & (leases.c.purpose == purpose)
        return (leases.c.project == self.project) & theirs

    def _prolong(self, db: Connection, token: str) -> None:
        until = self._expiry(settings_of(db, self.project))
        db.execute(update(leases).where(leases.c.token == token).values(expires_at=until))

    def _expiry(self, settings: Settings) -> float:
        return self.clock() + 60 * settings.lease_minutes

    # Annotators

    def _pseudonym(self, db: Connection, annotator: str) -> str:
        require(bool(annotator), "annotator", annotator, "an item needs somebody to judge it", "Say who asks.")
        check_text("annotator", annotator, 320)
        return (annotator_of(db, self.project, annotator) or meet(db, self.project, annotator)).pseudonym

    def _judged_by(self, db: Connection, who: str) -> int:
        mine = (stands(self.project), ledger.c.kind == "ranking", ledger.c.annotator == who)
        return db.execute(select(func.count()).select_from(ledger).where(*mine)).scalar_one()

    def _my_draft(self, who: str, item: str, purpose: str) -> tuple[ColumnElement[bool], ...]:
        mine = (drafts.c.project == self.project, drafts.c.annotator == who)
        return *mine, drafts.c.item == item, drafts.c.purpose == purpose

    def _save(self, db: Connection, lease: Row[Any], content: Mapping[str, Any]) -> None:
        db.execute(delete(drafts).where(*self._my_draft(lease.annotator, lease.item, lease.purpose)))
        names = {"project": self.project, "item": lease.item, "annotator": lease.annotator, "purpose": lease.purpose}
        db.execute(insert(drafts), {**names, "content": canonical(dict(content))})
