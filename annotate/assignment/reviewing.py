"""What annotators disagree on, for a reviewer to settle: a vote of purpose `review`, trained on in place of theirs."""

from __future__ import annotations

from sqlalchemy import Connection, select

from align.annotate.figures.agreement import panels, ranked_by_contradictions
from align.annotate.store import Vote
from align.annotate.store.queries import remark_of, stands
from align.annotate.store.records import vote_of
from align.annotate.store.tables import ledger, work


def contested(db: Connection, project: str) -> list[str]:
    """The items on which annotators contradict each other and nobody has settled it, the most contradicted first."""
    often = select(work.c.item).where(work.c.project == project, work.c.judged >= 2, ~work.c.gold)
    theirs = (stands(project), ledger.c.kind == "ranking", ledger.c.item.in_(often))
    votes = [vote_of(row, None) for row in db.execute(select(ledger).where(*theirs).order_by(ledger.c.seq))]
    settled = {vote.item for vote in votes if vote.purpose == "review"}
    unsettled = [vote for vote in votes if vote.purpose == "work" and vote.item not in settled]
    ids = {vote.item: tuple(sorted(id for tier in vote.tiers for id in tier)) for vote in unsettled}
    return [panel.item for _, panel in ranked_by_contradictions(panels(unsettled, ids))]


def opinions_of(db: Connection, project: str, item: str) -> list[Vote]:
    """What annotators said of an item as work, those who skipped it among them, and why."""
    theirs = (stands(project), ledger.c.item == item)
    rows = db.execute(select(ledger).where(*theirs).order_by(ledger.c.seq)).all()
    votes = [vote_of(row, remark_of(db, project, row.seq)) for row in rows]
    return [vote for vote in votes if vote.purpose == "work"]
