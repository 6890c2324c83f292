"""Leases: selection of an annotator's next item, the order of its answers on the screen, the lease until a vote or
until it expires, and the terms under which the item is judged.

All functions take an open connection; `now` is in seconds since 1970.
"""

from __future__ import annotations

import json
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, Select, delete, exists, func, insert, select, update

from align.annotate.figures.agreement import build_item_ratings, rank_by_contradictions
from align.annotate.store import AnnotationItem, ProjectSettings, Vote
from align.annotate.store.database import read_item
from align.annotate.store.ledger import (
    add_to_counters,
    build_standing_vote_condition,
    read_quarantined,
    read_remark,
)
from align.annotate.store.projects import read_guidelines, read_settings, read_settings_version
from align.annotate.store.records import hash_to_fraction, parse_vote
from align.annotate.store.tables import drafts, leases, ledger, work
from align.core.chain import to_canonical_json
from align.core.errors import InputError, require

REPEAT_AFTER = 10
"""Minimum number of other votes between a vote and its repeat."""
MAX_REVIEW_CHOICES = 50
"""Number of contested items among which `choose_review` looks for one that still exists."""


# Selection of the next item


class ItemChoice(NamedTuple):
    """The item that an annotator gets next, and its purpose.

    Attributes:
        purpose: `work`, `gold` or `repeat`.
        item: its id; None if no items are left.
        display_order: candidate ids in the order on the screen, of a repeat only; else empty.
    """

    purpose: str
    item: str | None
    display_order: tuple[str, ...]


def choose_item(db: Connection, project: str, pseudonym: str, number: int, settings: ProjectSettings) -> ItemChoice:
    """Choose an annotator's next item: at random a gold item or a repeat of an earlier one, else an item to be judged.

    A gold item has a known answer. The shares of gold items and repeats are in the settings.

    Args:
        number: number of the annotator's next lease, counted from 0; the draws depend on it.
    """
    if is_drawn(settings.gold_share, pseudonym, number, "gold"):
        gold = db.execute(
            build_new_items_query(project, pseudonym).where(work.c.gold).order_by(work.c.shuffle).limit(1)
        ).scalar()
        if gold is not None:
            return ItemChoice("gold", gold, ())
    if is_drawn(settings.repeat_share, pseudonym, number, "repeat"):
        earlier = find_ranking_to_repeat(db, project, pseudonym)
        if earlier is not None:
            return ItemChoice("repeat", earlier.item, tuple(reversed(json.loads(earlier.shown))))
    order = (work.c.priority.desc(), work.c.shuffle) if settings.order == "priority" else (work.c.shuffle,)
    open_items = build_new_items_query(project, pseudonym).where(work.c.wanted > work.c.judged + work.c.leased)
    return ItemChoice("work", db.execute(open_items.order_by(*order).limit(1)).scalar(), ())


def is_drawn(share: float, annotator: str, number: int, event: str) -> bool:
    """Return True for a share of an annotator's leases, chosen by a hash of annotator, lease number and event.

    The same call returns the same result.

    Args:
        event: what is drawn, `gold` or `repeat`; each is drawn independently.
    """
    return hash_to_fraction(f"{event}/{annotator}/{number}") < share


def build_new_items_query(project: str, pseudonym: str) -> Select[Any]:
    """Build a query for the ids of a project's items that an annotator has not judged, skipped or leased."""
    lease_conditions = (leases.c.project == project, leases.c.item == work.c.item, leases.c.annotator == pseudonym)
    has_lease = exists().where(*lease_conditions, leases.c.state.in_(("open", "judged")))
    has_vote = exists().where(
        build_standing_vote_condition(project), ledger.c.item == work.c.item, ledger.c.annotator == pseudonym
    )
    return select(work.c.item).where(work.c.project == project, ~has_lease, ~has_vote)


def find_ranking_to_repeat(db: Connection, project: str, pseudonym: str) -> Row[Any] | None:
    """Return the lease of an annotator's earliest ranking that is due for a repeat, or None if none is due.

    A ranking is due if it was not repeated yet and has `REPEAT_AFTER` votes after it.
    """
    repeat_leases = leases.alias("repeat_leases")
    is_repeated = exists().where(
        repeat_leases.c.project == project,
        repeat_leases.c.annotator == pseudonym,
        repeat_leases.c.item == leases.c.item,
        repeat_leases.c.purpose == "repeat",
        repeat_leases.c.state.in_(("open", "judged")),
    )
    is_ranked = exists().where(
        build_standing_vote_condition(project), ledger.c.seq == leases.c.vote, ledger.c.kind == "ranking"
    )
    own_judged = (leases.c.project == project, leases.c.annotator == pseudonym, leases.c.state == "judged")
    votes_newest_first = select(leases.c.vote).where(*own_judged).order_by(leases.c.vote.desc())
    newest_repeatable = db.execute(votes_newest_first.offset(REPEAT_AFTER).limit(1)).scalar() or 0
    is_due = (leases.c.purpose == "work", leases.c.vote <= newest_repeatable)
    return db.execute(
        select(leases).where(*own_judged, *is_due, is_ranked, ~is_repeated).order_by(leases.c.vote).limit(1)
    ).first()


# Contested items. A reviewer's vote, of purpose `review`, replaces the annotators' votes in training.


def find_contested_items(db: Connection, project: str) -> list[str]:
    """Return the ids of items on which annotators contradict each other and no reviewer has decided.

    The most contradicted come first. Votes and reviews of annotators in quarantine do not count.
    """
    items_with_votes = select(work.c.item).where(work.c.project == project, work.c.judged >= 2, ~work.c.gold)
    conditions = (
        build_standing_vote_condition(project),
        ledger.c.kind == "ranking",
        ledger.c.item.in_(items_with_votes),
    )
    quarantined = read_quarantined(db, project)
    rows = db.execute(select(ledger).where(*conditions).order_by(ledger.c.seq))
    votes = [parse_vote(row, None) for row in rows if row.annotator not in quarantined]
    reviewed_items = {vote.item for vote in votes if vote.purpose == "review"}
    unreviewed_votes = [vote for vote in votes if vote.purpose == "work" and vote.item not in reviewed_items]
    ids = {vote.item: tuple(sorted(id for tier in vote.tiers for id in tier)) for vote in unreviewed_votes}
    return [contested.ratings.item for contested in rank_by_contradictions(build_item_ratings(unreviewed_votes, ids))]


def choose_review(db: Connection, project: str, contested: Sequence[str]) -> str | None:
    """Return the first of the `contested` items that no reviewer has decided or leased, or None if none exists.

    Erased items are passed over. Reviewers in quarantine do not count.
    """
    is_counted_reviewer = leases.c.annotator.not_in(read_quarantined(db, project))
    conditions = (leases.c.project == project, leases.c.purpose == "review", is_counted_reviewer)
    taken_items = set(
        db.execute(select(leases.c.item).where(*conditions, leases.c.state.in_(("open", "judged")))).scalars()
    )
    open_items = [item for item in contested if item not in taken_items][:MAX_REVIEW_CHOICES]
    still_exists = (work.c.project == project, work.c.item.in_(open_items))  # false for erased items
    existing_items = set(db.execute(select(work.c.item).where(*still_exists)).scalars())
    return next((item for item in open_items if item in existing_items), None)


def read_opinions(db: Connection, project: str, item: str) -> list[Vote]:
    """Return the annotators' votes on an item, with their texts, for a reviewer: rankings and skips.

    Only votes with purpose `work` that were not retracted count, and none of annotators in quarantine.
    """
    quarantined = read_quarantined(db, project)
    conditions = (build_standing_vote_condition(project), ledger.c.item == item)
    rows = db.execute(select(ledger).where(*conditions).order_by(ledger.c.seq)).all()
    votes = [parse_vote(row, read_remark(db, project, row.seq)) for row in rows]
    return [vote for vote in votes if vote.purpose == "work" and vote.annotator not in quarantined]


# Leases


def read_lease(db: Connection, project: str, pseudonym: str, token: str) -> Row[Any]:
    """Return an annotator's lease with a token, or raise InputError if they have no such lease."""
    conditions = (leases.c.project == project, leases.c.token == token, leases.c.annotator == pseudonym)
    lease = db.execute(select(leases).where(*conditions)).first()
    if lease is None:
        raise InputError("token", token, "you hold no such item", "Ask for the next one.")
    return lease


def build_item_lease_condition(project: str, pseudonym: str, item: str, purpose: str) -> ColumnElement[bool]:
    """Build the SQL condition that selects an annotator's leases of an item for a purpose, such as `review`."""
    is_own_lease = (leases.c.annotator == pseudonym) & (leases.c.item == item) & (leases.c.purpose == purpose)
    return (leases.c.project == project) & is_own_lease


def compute_next_lease_number(db: Connection, project: str, pseudonym: str) -> int:
    """Return the number of an annotator's next lease in a project, counted from 0."""
    conditions = (leases.c.project == project, leases.c.annotator == pseudonym)
    last_number = db.execute(select(func.max(leases.c.number)).where(*conditions)).scalar()
    return 0 if last_number is None else last_number + 1


def grant_lease(
    db: Connection,
    project: str,
    pseudonym: str,
    number: int,
    purpose: str,
    item: str,
    display_order: tuple[str, ...],
    now: float,
) -> Row[Any]:
    """Lease an item to an annotator: insert a row into `leases`, and return it.

    Args:
        display_order: candidate ids in their order on the screen. If empty, it is counterbalanced, or determined by the
            item if the project has `turned_by_item`.

    Raises:
        InputError: the item was erased.
    """
    settings = read_settings(db, project)
    ids = [candidate.id for candidate in read_item(db, project, item).candidates]
    same_size_leases = (leases.c.project == project, leases.c.annotator == pseudonym, leases.c.k == len(ids))
    last_turn = db.execute(select(func.max(leases.c.turn)).where(*same_size_leases)).scalar()
    turn = -1 if last_turn is None else last_turn
    if purpose != "repeat":  # a repeat brings its own order and takes no turn
        turn += 1
    # The counters of a gold item stay 0: rotated by them, its order would be the same for everyone.
    if purpose == "work" and settings.turned_by_item:
        counters = select(work.c.judged + work.c.leased).where(work.c.project == project, work.c.item == item)
        display_order = rotate_candidates(ids, db.execute(counters).scalar_one())  # who judged it or holds it
    row = {
        "token": secrets.token_urlsafe(24),
        "project": project,
        "annotator": pseudonym,
        "number": number,
        "item": item,
        "purpose": purpose,
        "shown": to_canonical_json(list(display_order or counterbalance_order(ids, pseudonym, turn))),
        "k": len(ids),
        "turn": turn,
        "state": "open",
        "granted_at": now,
        "vote": None,
        "expires_at": now + 60 * settings.lease_minutes,
    }
    db.execute(insert(leases), row)
    if purpose == "work":
        add_to_counters(db, project, item, leased=1)
    return read_lease(db, project, pseudonym, row["token"])


def counterbalance_order(ids: Sequence[str], annotator: str, turn: int) -> tuple[str, ...]:
    """Return candidate ids in their order on the screen, which is counterbalanced over an annotator's items.

    In every K turns in a row (starting at a multiple of K), a candidate's position in the item is shown once in each
    position on the screen: the rows of a cyclic Latin square over a random order, in random order. (The design of
    Williams, "Experimental designs balanced for the estimation of residual effects", 1949, also balances neighbours,
    but needs 2K rows for odd K.) If positions correspond to models, each model comes first equally often.

    Args:
        ids: the K candidates, by position.
        turn: the annotator's number of items with K candidates before this one.
    """
    k = len(ids)
    block, row = divmod(turn, k)
    rng = random.Random(f"{annotator}/{k}/{block}")
    positions = list(range(k))
    shifts = list(range(k))
    rng.shuffle(positions)
    rng.shuffle(shifts)
    return rotate_candidates([ids[position] for position in positions], shifts[row])


def rotate_candidates(ids: Sequence[str], turn: int) -> tuple[str, ...]:
    """Return the candidate ids rotated by `turn` positions. Over K turns, each candidate takes each position once."""
    return tuple(ids[(position + turn) % len(ids)] for position in range(len(ids)))


def extend_lease(db: Connection, lease: Row[Any], now: float) -> None:
    """Set the end of a lease to the project's `lease_minutes` after `now`."""
    expires_at = now + 60 * read_settings(db, lease.project).lease_minutes
    db.execute(update(leases).where(leases.c.token == lease.token).values(expires_at=expires_at))


def reopen_lease(db: Connection, lease: Row[Any], now: float) -> None:
    """Set an ended lease to open again, without its vote, and extend it."""
    db.execute(update(leases).where(leases.c.token == lease.token).values(state="open", vote=None))
    extend_lease(db, lease, now)
    if lease.purpose == "work":
        add_to_counters(db, lease.project, lease.item, leased=1)


def is_wanted_again(db: Connection, lease: Row[Any]) -> bool:
    """Return whether an expired lease may be reopened: its item needs a vote, and its holder has no newer lease."""
    same_item = (work.c.project == lease.project, work.c.item == lease.item)
    unassigned_votes = db.execute(select(work.c.wanted - work.c.judged - work.c.leased).where(*same_item)).scalar()
    own_leases = build_item_lease_condition(lease.project, lease.annotator, lease.item, lease.purpose)
    newer_lease = db.execute(select(leases.c.token).where(own_leases, leases.c.state.in_(("open", "judged")))).first()
    return newer_lease is None and unassigned_votes is not None and (lease.purpose != "work" or unassigned_votes > 0)


# Tasks and drafts


@dataclass(frozen=True, slots=True)
class AnnotationTask:
    """An item that is reserved (leased) for an annotator, with the order of its answers on the screen.

    Attributes:
        token: the lease's token; only its annotator can vote with it.
        item: the prompt and its candidates, by position.
        purpose: as in `Judgement`; never shown to an annotator.
        display_order: the candidates' ids in their order on the screen.
        draft: the annotator's saved draft, or the judgement that they took back; empty at first.
        expires_at: seconds since 1970, unless renewed.
    """

    token: str
    item: AnnotationItem
    purpose: str
    display_order: tuple[str, ...]
    draft: Mapping[str, Any]
    expires_at: float


def read_task(db: Connection, lease: Row[Any]) -> AnnotationTask:
    """Return the task of a lease: its item, the order of the answers on the screen, the saved draft and the expiry.

    The expiry is read again, since the lease may have been extended.

    Raises:
        InputError: the item was erased.
    """
    draft = db.execute(select(drafts.c.content).where(build_draft_condition(lease))).scalar()
    return AnnotationTask(
        token=lease.token,
        item=read_item(db, lease.project, lease.item),
        purpose=lease.purpose,
        display_order=tuple(json.loads(lease.shown)),
        draft=json.loads(draft or "{}"),
        expires_at=db.execute(select(leases.c.expires_at).where(leases.c.token == lease.token)).scalar_one(),
    )


def save_draft(db: Connection, lease: Row[Any], content: Mapping[str, Any]) -> None:
    discard_draft(db, lease)
    keys = {"project": lease.project, "item": lease.item, "annotator": lease.annotator, "purpose": lease.purpose}
    db.execute(insert(drafts), {**keys, "content": to_canonical_json(dict(content))})


def discard_draft(db: Connection, lease: Row[Any]) -> None:
    db.execute(delete(drafts).where(build_draft_condition(lease)))


def build_draft_condition(lease: Row[Any]) -> ColumnElement[bool]:
    """Build the SQL condition that selects the saved draft of a lease.

    A draft belongs to annotator, item and purpose, and outlives the lease.
    """
    same_annotator = (drafts.c.project == lease.project) & (drafts.c.annotator == lease.annotator)
    return same_annotator & (drafts.c.item == lease.item) & (drafts.c.purpose == lease.purpose)


# Terms of a judgement


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of a judgement: the versions of the project's settings and guidelines, and the page's mode.

    Settings and guidelines change while people work. Every step sent to a page includes its terms, and every vote names
    the terms under which it was made. The vote is checked against these, however old they are, and they are recorded in
    the ledger.

    Attributes:
        version: of the project's settings, see `read_settings_version`.
        mode: `work` for judging items, or `review` for deciding contested items.
        guidelines: the version that the annotator sees; None if there are no guidelines.
    """

    version: int
    mode: str
    guidelines: int | None


def get_page_mode(purpose: str) -> str:
    """Return the mode of the ranking page, `work` or `review`, for an item's purpose.

    Gold items and repeats look like work.
    """
    return "review" if purpose == "review" else "work"


def read_terms(db: Connection, project: str, mode: str) -> Terms:
    """Return the current terms of a judgement: a project's newest versions of settings and guidelines, and the mode."""
    guidelines = read_guidelines(db, project)
    return Terms(read_settings_version(db, project), mode, None if guidelines is None else guidelines.version)


def require_valid_terms(db: Connection, project: str, purpose: str, terms: Terms) -> None:
    """Raise InputError unless the mode in `terms` fits the item's purpose, and the project has these guidelines.

    The settings' version is checked by the store.
    """
    mode = get_page_mode(purpose)
    require(terms.mode == mode, "mode", terms.mode, f"the item was given for {mode}", "Ask for another.")
    is_known_version = terms.guidelines is None or read_guidelines(db, project, terms.guidelines) is not None
    require(
        is_known_version, "guidelines", terms.guidelines, "there is no such version", "Give the one that was shown."
    )
