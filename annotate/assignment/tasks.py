"""What an annotator holds: an item as it stands on their screen, with the draft of what they say of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, delete, insert, select

from align.annotate.store import Item, Judgement
from align.annotate.store.items import one
from align.annotate.store.tables import drafts, leases
from align.core.chain import canonical


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
    """The task of a lease, which may have been prolonged since it was read. Raises: InputError: its item was erased."""
    draft = db.execute(select(drafts.c.content).where(*_drafts_of(lease))).scalar()
    expires_at = db.execute(select(leases.c.expires_at).where(leases.c.token == lease.token)).scalar_one()
    return Task(
        lease.token, one(db, lease.project, lease.item), lease.purpose, tuple(json.loads(lease.shown)),
        json.loads(draft or "{}"), expires_at,
    )  # fmt: skip


def draft_of(judgement: Judgement) -> dict[str, Any]:
    """What a judgement says, as a draft of the next one."""
    names = ("tiers", "strength", "quality", "ratings", "flagged", "skipped", "rationale", "demonstration")
    return {name: getattr(judgement, name) for name in names}


def save_draft(db: Connection, lease: Row[Any], content: Mapping[str, Any]) -> None:
    discard_draft(db, lease)
    names = {"project": lease.project, "item": lease.item, "annotator": lease.annotator, "purpose": lease.purpose}
    db.execute(insert(drafts), {**names, "content": canonical(dict(content))})


def discard_draft(db: Connection, lease: Row[Any]) -> None:
    db.execute(delete(drafts).where(*_drafts_of(lease)))


def _drafts_of(lease: Row[Any]) -> tuple[ColumnElement[bool], ...]:
    """A draft outlives its lease: it belongs to annotator, item and purpose."""
    mine = (drafts.c.project == lease.project, drafts.c.annotator == lease.annotator)
    return *mine, drafts.c.item == lease.item, drafts.c.purpose == lease.purpose
