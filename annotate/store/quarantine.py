"""Quarantine of annotators: their votes stay in the ledger, and do not count until they are released."""

from __future__ import annotations

from sqlalchemy import Connection, select

from align.annotate.store.database import Store, build_unknown_annotator_error
from align.annotate.store.ledger import (
    add_to_counters,
    append_ledger_row,
    build_standing_vote_condition,
    is_counted,
    read_quarantined,
    require_known_project,
)
from align.annotate.store.records import parse_vote
from align.annotate.store.tables import ledger
from align.core.errors import require


def quarantine_annotator(store: Store, project: str, pseudonym: str) -> int:
    """Put an annotator into quarantine, and return the number (seq) of the row in the ledger.

    The items that the annotator has judged are asked again, as if these votes did not exist.

    Raises:
        InputError: the project has no such annotator, or the annotator is in quarantine already.
    """
    with store.transaction() as connection:
        require_known_annotator(connection, project, pseudonym)
        is_free = pseudonym not in read_quarantined(connection, project)
        remedy = "Release the annotator with stage.action=release."
        require(is_free, "annotator", pseudonym, "is in quarantine already", remedy)
        change_counted_votes(connection, project, pseudonym, -1)
        return append_ledger_row(connection, project, "quarantine", {}, annotator=pseudonym)


def release_annotator(store: Store, project: str, pseudonym: str) -> int:
    """Release an annotator from quarantine, so that all of their votes count again, and return the number (seq) of the
    row in the ledger.

    Raises:
        InputError: the project has no such annotator, or the annotator is not in quarantine.
    """
    with store.transaction() as connection:
        require_known_annotator(connection, project, pseudonym)
        is_held = pseudonym in read_quarantined(connection, project)
        require(is_held, "annotator", pseudonym, "is not in quarantine", "Name another annotator.")
        change_counted_votes(connection, project, pseudonym, 1)
        return append_ledger_row(connection, project, "release", {}, annotator=pseudonym)


def require_known_annotator(connection: Connection, project: str, pseudonym: str) -> None:
    """Raise InputError unless an annotator has voted in the project, or was given an item."""
    require_known_project(connection, project)
    votes = select(ledger.c.seq).where(ledger.c.project == project, ledger.c.annotator == pseudonym).limit(1)
    if connection.execute(votes).first() is None:
        raise build_unknown_annotator_error(project, pseudonym)


def change_counted_votes(connection: Connection, project: str, pseudonym: str, change: int) -> None:
    """Add `change` to the number of votes of each item on which a vote of the annotator counts."""
    votes = select(ledger).where(build_standing_vote_condition(project), ledger.c.annotator == pseudonym)
    for row in connection.execute(votes).all():
        if is_counted(parse_vote(row, None)):
            add_to_counters(connection, project, row.item, judged=change)
