"""Leases: which item somebody is given next, in which order its answers stand on their screen, what they hold until
they vote or show no sign of life, and under which terms they judge it. Functions of an open connection; `now` is in
seconds since 1970.
"""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, delete, exists, func, insert, select, update

from align.annotate.figures.agreement import panels, ranked_by_contradictions
from align.annotate.store import Item, Settings, Vote
from align.annotate.store.database import read_item
from align.annotate.store.ledger import count_work, remark_of, stands
from align.annotate.store.projects import guidelines_of, settings_of, version_of
from align.annotate.store.records import shuffle_of, vote_of
from align.annotate.store.tables import drafts, leases, ledger, work
from align.core.chain import to_canonical_json
from align.core.errors import InputError, require

REPEAT_AFTER = 10
"""Other votes that lie between a vote and its repeat, at least."""
REVIEWS_LOOKED_AT = 50


# Which item is given next


def choose(
    db: Connection, project: str, who: str, number: int, settings: Settings
) -> tuple[str, str | None, tuple[str, ...]]:
    """Return purpose and item of the annotator's next lease, and the order of a repeat; no item if nothing is left."""
    if chance(settings.gold_share, who, number, "gold"):
        gold = db.execute(fresh(project, who).where(work.c.gold).order_by(work.c.shuffle).limit(1)).scalar()
        if gold is not None:
            return "gold", gold, ()
    if chance(settings.repeat_share, who, number, "repeat"):
        earlier = to_repeat(db, project, who)
        if earlier is not None:
            return "repeat", earlier.item, tuple(reversed(json.loads(earlier.shown)))
    order = (work.c.priority.desc(), work.c.shuffle) if settings.order == "priority" else (work.c.shuffle,)
    left = fresh(project, who).where(work.c.wanted > work.c.judged + work.c.leased)
    return "work", db.execute(left.order_by(*order).limit(1)).scalar(), ()


def chance(share: float, annotator: str, number: int, what: str) -> bool:
    """Decide whether something that befalls a share of all leases befalls an annotator's lease of this number: the
    same every time."""
    return shuffle_of(f"{what}/{annotator}/{number}") < share


def fresh(project: str, who: str) -> Select[Any]:
    """Select the items that the annotator has not judged or skipped, nor holds."""
    held = (leases.c.project == project, leases.c.item == work.c.item, leases.c.annotator == who)
    theirs = exists().where(*held, leases.c.state.in_(("open", "judged")))
    judged = exists().where(stands(project), ledger.c.item == work.c.item, ledger.c.annotator == who)
    return select(work.c.item).where(work.c.project == project, ~theirs, ~judged)


def to_repeat(db: Connection, project: str, who: str) -> Row[Any] | None:
    """Return the lease of the annotator's first ranking that lies far enough back and has not been repeated."""
    again = leases.alias("again")
    repeated = exists().where(
        again.c.project == project,
        again.c.annotator == who,
        again.c.item == leases.c.item,
        again.c.purpose == "repeat",
        again.c.state.in_(("open", "judged")),
    )
    ranked = exists().where(stands(project), ledger.c.seq == leases.c.vote, ledger.c.kind == "ranking")
    mine = (leases.c.project == project, leases.c.annotator == who, leases.c.state == "judged")
    newest = select(leases.c.vote).where(*mine).order_by(leases.c.vote.desc())
    far = db.execute(newest.offset(REPEAT_AFTER).limit(1)).scalar() or 0
    due = (leases.c.purpose == "work", leases.c.vote <= far)
    return db.execute(select(leases).where(*mine, *due, ranked, ~repeated).order_by(leases.c.vote).limit(1)).first()


# What annotators disagree on, for a reviewer to settle: a vote of purpose `review`, trained on in place of theirs


def contested(db: Connection, project: str) -> list[str]:
    """Return the items on which annotators contradict each other and nobody has settled it, the most contradicted
    first."""
    often = select(work.c.item).where(work.c.project == project, work.c.judged >= 2, ~work.c.gold)
    theirs = (stands(project), ledger.c.kind == "ranking", ledger.c.item.in_(often))
    votes = [vote_of(row, None) for row in db.execute(select(ledger).where(*theirs).order_by(ledger.c.seq))]
    settled = {vote.item for vote in votes if vote.purpose == "review"}
    unsettled = [vote for vote in votes if vote.purpose == "work" and vote.item not in settled]
    ids = {vote.item: tuple(sorted(id for tier in vote.tiers for id in tier)) for vote in unsettled}
    return [panel.item for _, panel in ranked_by_contradictions(panels(unsettled, ids))]


def choose_review(db: Connection, project: str, contested: Sequence[str]) -> str | None:
    """Return the first of these items that no reviewer has settled or holds; None if there is none."""
    given = (leases.c.project == project, leases.c.purpose == "review")
    taken = set(db.execute(select(leases.c.item).where(*given, leases.c.state.in_(("open", "judged")))).scalars())
    left = [item for item in contested if item not in taken][:REVIEWS_LOOKED_AT]
    there = (work.c.project == project, work.c.item.in_(left))  # not erased since
    known = set(db.execute(select(work.c.item).where(*there)).scalars())
    return next((item for item in left if item in known), None)


def opinions_of(db: Connection, project: str, item: str) -> list[Vote]:
    """Return what annotators said of an item as work, those who skipped it among them, and why."""
    theirs = (stands(project), ledger.c.item == item)
    rows = db.execute(select(ledger).where(*theirs).order_by(ledger.c.seq)).all()
    votes = [vote_of(row, remark_of(db, project, row.seq)) for row in rows]
    return [vote for vote in votes if vote.purpose == "work"]


# Leases


def lease_of(db: Connection, project: str, who: str, token: str) -> Row[Any]:
    """Return the annotator's lease of this token. Raises InputError if there is none."""
    mine = (leases.c.project == project, leases.c.token == token, leases.c.annotator == who)
    lease = db.execute(select(leases).where(*mine)).first()
    if lease is None:
        raise InputError("token", token, "you hold no such item", "Ask for the next one.")
    return lease


def of_item(project: str, who: str, item: str, purpose: str) -> ColumnElement[bool]:
    """Return the condition of the annotator's leases of an item for a purpose."""
    theirs = (leases.c.annotator == who) & (leases.c.item == item) & (leases.c.purpose == purpose)
    return (leases.c.project == project) & theirs


def next_number(db: Connection, project: str, who: str) -> int:
    """Return the number of the annotator's next lease."""
    mine = (leases.c.project == project, leases.c.annotator == who)
    last = db.execute(select(func.max(leases.c.number)).where(*mine)).scalar()
    return 0 if last is None else last + 1


def grant(
    db: Connection,
    project: str,
    who: str,
    number: int,
    purpose: str,
    item: str,
    display_order: tuple[str, ...],
    now: float,
) -> Row[Any]:
    """Lease an item.

    Args:
        display_order: of its candidates on the screen; empty: the annotator's next one, or the item's where the
            project says so.

    Raises:
        InputError: the item was erased.
    """
    settings = settings_of(db, project)
    ids = [candidate.id for candidate in read_item(db, project, item).candidates]
    alike = (leases.c.project == project, leases.c.annotator == who, leases.c.k == len(ids))
    last = db.execute(select(func.max(leases.c.turn)).where(*alike)).scalar()
    turn = -1 if last is None else last
    if purpose != "repeat":  # whose order is given: it takes no turn
        turn += 1
    # A gold item wants nobody, and turned by item it would stand the same way before everyone.
    if purpose == "work" and settings.turned_by_item:
        counters = select(work.c.judged + work.c.leased).where(work.c.project == project, work.c.item == item)
        display_order = turned(ids, db.execute(counters).scalar_one())  # those who judged it, and who are at it
    row = {
        "token": secrets.token_urlsafe(24),
        "project": project,
        "annotator": who,
        "number": number,
        "item": item,
        "purpose": purpose,
        "shown": to_canonical_json(list(display_order or counterbalanced_order(ids, who, turn))),
        "k": len(ids),
        "turn": turn,
        "state": "open",
        "granted_at": now,
        "vote": None,
        "expires_at": now + 60 * settings.lease_minutes,
    }
    db.execute(insert(leases), row)
    if purpose == "work":
        count_work(db, project, item, leased=1)
    return lease_of(db, project, who, row["token"])


def counterbalanced_order(ids: Sequence[str], annotator: str, turn: int) -> tuple[str, ...]:
    """Return the candidates as they stand on the screen, counterbalanced over an annotator's items.

    Of every K turns in a row (from a multiple of K) a candidate's position in the item is shown once in each place: the
    rows of a cyclic Latin square over a random order, in random order (Williams, "Experimental designs balanced for the
    estimation of residual effects", 1949, is the finer one, which needs 2K rows for odd K). Where a position means a
    model, each model stands first equally often.

    Args:
        ids: the K candidates, by position.
        turn: the how-manieth item of K candidates this is for the annotator, from 0.
    """
    k = len(ids)
    block, row = divmod(turn, k)
    rng = random.Random(f"{annotator}/{k}/{block}")
    order = list(range(k))
    shifts = list(range(k))
    rng.shuffle(order)
    rng.shuffle(shifts)
    return turned([ids[place] for place in order], shifts[row])


def turned(ids: Sequence[str], turn: int) -> tuple[str, ...]:
    """Return the candidates turned on by so many places: of every K turns each stands once in each place."""
    return tuple(ids[(place + turn) % len(ids)] for place in range(len(ids)))


def prolong(db: Connection, lease: Row[Any], now: float) -> None:
    until = now + 60 * settings_of(db, lease.project).lease_minutes
    db.execute(update(leases).where(leases.c.token == lease.token).values(expires_at=until))


def open_again(db: Connection, lease: Row[Any], now: float) -> None:
    db.execute(update(leases).where(leases.c.token == lease.token).values(state="open", vote=None))
    prolong(db, lease, now)
    if lease.purpose == "work":
        count_work(db, lease.project, lease.item, leased=1)


def is_wanted_again(db: Connection, lease: Row[Any]) -> bool:
    """Return whether an item that went back from a lease still wants somebody, and its holder has not taken it anew."""
    place = (work.c.project == lease.project, work.c.item == lease.item)
    left = db.execute(select(work.c.wanted - work.c.judged - work.c.leased).where(*place)).scalar()
    mine = of_item(lease.project, lease.annotator, lease.item, lease.purpose)
    anew = db.execute(select(leases.c.token).where(mine, leases.c.state.in_(("open", "judged")))).first()
    return anew is None and left is not None and (lease.purpose != "work" or left > 0)


# What an annotator holds


@dataclass(frozen=True, slots=True)
class Task:
    """An item as one annotator holds it.

    Attributes:
        token: of the lease; only its annotator can vote with it.
        item: the prompt and its candidates, by position.
        purpose: as a judgement has it; never shown to an annotator.
        display_order: the candidates' ids as they are to stand on the screen.
        draft: what the annotator had saved of a judgement, or had said before taking it back; empty at first.
        expires_at: seconds since 1970, unless renewed.
    """

    token: str
    item: Item
    purpose: str
    display_order: tuple[str, ...]
    draft: Mapping[str, Any]
    expires_at: float


def task_of(db: Connection, lease: Row[Any]) -> Task:
    """Return the task of a lease, which may have been prolonged since it was read. Raises InputError if its item was
    erased."""
    draft = db.execute(select(drafts.c.content).where(draft_of_lease(lease))).scalar()
    return Task(
        token=lease.token,
        item=read_item(db, lease.project, lease.item),
        purpose=lease.purpose,
        display_order=tuple(json.loads(lease.shown)),
        draft=json.loads(draft or "{}"),
        expires_at=db.execute(select(leases.c.expires_at).where(leases.c.token == lease.token)).scalar_one(),
    )


def save_draft(db: Connection, lease: Row[Any], content: Mapping[str, Any]) -> None:
    discard_draft(db, lease)
    names = {"project": lease.project, "item": lease.item, "annotator": lease.annotator, "purpose": lease.purpose}
    db.execute(insert(drafts), {**names, "content": to_canonical_json(dict(content))})


def discard_draft(db: Connection, lease: Row[Any]) -> None:
    db.execute(delete(drafts).where(draft_of_lease(lease)))


def draft_of_lease(lease: Row[Any]) -> ColumnElement[bool]:
    """Return the condition of a lease's draft, which outlives it: it belongs to annotator, item and purpose."""
    whose = (drafts.c.project == lease.project) & (drafts.c.annotator == lease.annotator)
    return whose & (drafts.c.item == lease.item) & (drafts.c.purpose == lease.purpose)


# What somebody judges under


@dataclass(frozen=True, slots=True)
class Terms:
    """The project's settings, the guidelines before the annotator, and what the page is for.

    Settings and guidelines change while people work. Each step that a page is sent says its terms, and each vote says
    those that it was made under; it is held to these, however long it waited in the page, and keeps them in the ledger.

    Attributes:
        version: of the project's settings, see `version_of`.
        mode: `work`, judging items, or `review`, settling what others said of them.
        guidelines: the version before their eyes; None where there are none.
    """

    version: int
    mode: str
    guidelines: int | None


def mode_of(purpose: str) -> str:
    """Return what a page is for that shows an item of this purpose: gold items and repeats look like any other."""
    return "review" if purpose == "review" else "work"


def terms_now(db: Connection, project: str, mode: str) -> Terms:
    """Return what is judged under from now on."""
    guidelines = guidelines_of(db, project)
    return Terms(version_of(db, project), mode, None if guidelines is None else guidelines[0])


def check_terms(db: Connection, project: str, purpose: str, terms: Terms) -> None:
    """Raise InputError if nobody can have judged an item of this purpose under such terms. (Its version is checked by
    the store.)"""
    mode = mode_of(purpose)
    require(terms.mode == mode, "mode", terms.mode, f"the item was given for {mode}", "Ask for another.")
    known = terms.guidelines is None or guidelines_of(db, project, terms.guidelines) is not None
    require(known, "guidelines", terms.guidelines, "there is no such version", "Give the one that was shown.")
