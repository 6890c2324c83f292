"""Quarantine of annotators: their votes stay in the ledger, and do not count until they are released."""

from __future__ import annotations

from sqlalchemy import Connection, select

from align.annotate.store.database import Store
from align.annotate.store.ledger import (
    add_to_counters,
    append_ledger_row,
    build_standing_vote_condition,
    close_leases,
    is_counted,
    read_quarantined,
    require_known_project,
)
from align.annotate.store.records import parse_vote
from align.annotate.store.tables import leases, ledger
from align.annotate.store.vote_selection import find_pseudonyms, read_pseudonyms
from align.core.errors import require


def quarantine_annotator(store: Store, project: str, annotator: str) -> int:
    """Put an annotator into quarantine, and return the number (seq) of the row in the ledger.

    Other annotators are asked about the items that the annotator has judged. The annotator's open leases end, and the
    annotator gets no more items. A vote that is sent nevertheless is recorded, and does not count either.

    Args:
        annotator: name or pseudonym.

    Raises:
        InputError: the project has no such annotator, or the annotator is in quarantine already.
    """
    with store.transaction() as connection:
        pseudonym = find_pseudonym(connection, project, annotator)
        is_quarantined = pseudonym in read_quarantined(connection, project)
        remedy = "Nothing is left to do. Release the annotator (stage.action=release) to undo it."
        require(not is_quarantined, "stage.annotator", annotator, "is in quarantine already", remedy)
        close_leases(connection, project, leases.c.annotator == pseudonym, "returned")
        change_counted_votes(connection, project, pseudonym, -1)
        return append_ledger_row(connection, project, "quarantine", {}, annotator=pseudonym)


def release_annotator(store: Store, project: str, annotator: str) -> int:
    """Release an annotator from quarantine, so that all of their votes count again, and return the number (seq) of the
    row in the ledger.

    Args:
        annotator: name or pseudonym.

    Raises:
        InputError: the project has no such annotator, or the annotator is not in quarantine.
    """
    with store.transaction() as connection:
        pseudonym = find_pseudonym(connection, project, annotator)
        is_quarantined = pseudonym in read_quarantined(connection, project)
        require(is_quarantined, "stage.annotator", annotator, "is not in quarantine", "Name another annotator.")
        change_counted_votes(connection, project, pseudonym, 1)
        return append_ledger_row(connection, project, "release", {}, annotator=pseudonym)


def find_pseudonym(connection: Connection, project: str, annotator: str) -> str:
    """Return the pseudonym of an annotator of a project, who is named or given by pseudonym."""
    require_known_project(connection, project)
    (pseudonym,) = find_pseudonyms(read_pseudonyms(connection, project), project, "stage.annotator", [annotator])
    return pseudonym


def change_counted_votes(connection: Connection, project: str, pseudonym: str, change: int) -> None:
    """Add `change` to the number of votes of each item on which a vote of the annotator counts."""
    votes = select(ledger).where(build_standing_vote_condition(project), ledger.c.annotator == pseudonym)
    for row in connection.execute(votes).all():
        if is_counted(parse_vote(row, None)):
            add_to_counters(connection, project, row.item, judged=change)
