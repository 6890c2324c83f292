"""The counters of `work`, from what the ledger and the open leases say.

They are written in the transactions that change what they count, so they cannot drift; `restore` counts them anew all
the same.
"""

from __future__ import annotations

import json
from collections import Counter

from sqlalchemy import Connection, insert, select, update

from align.annotate.store.projects import met
from align.annotate.store.queries import counts, stands, work_row
from align.annotate.store.records import vote_of
from align.annotate.store.tables import leases, ledger, prompts, work


def recount(connection: Connection, project: str) -> int:
    """Sets every counter of a project right, and makes the rows that are missing; how many were wrong."""
    votes = connection.execute(select(ledger).where(stands(project), ledger.c.kind == "ranking")).all()
    judged = Counter(row.item for row in votes if counts(vote_of(row, None)))
    held = (leases.c.project == project, leases.c.state == "open", leases.c.purpose == "work")
    leased = Counter(connection.execute(select(leases.c.item).where(*held)).scalars())
    rows = {row.item: row for row in connection.execute(select(work).where(work.c.project == project))}
    settings, wrong = met(connection, project), 0
    added = (ledger.c.project == project, ledger.c.kind == "candidates")
    here = select(ledger.c.item, ledger.c.payload).join(
        prompts, (prompts.c.project == ledger.c.project) & (prompts.c.id == ledger.c.item)
    )
    for item, payload in connection.execute(here.where(*added)).all():
        gold = "expected" in json.loads(payload)
        wanted = 0 if gold else settings.wanted(item)
        right = {"wanted": wanted, "judged": judged[item], "leased": leased[item], "gold": gold}
        if item not in rows:
            connection.execute(insert(work), work_row(project, item, priority=0.0) | right)
        elif any(getattr(rows[item], name) != value for name, value in right.items()):
            connection.execute(update(work).where(work.c.project == project, work.c.item == item).values(right))
        else:
            continue
        wrong += 1
    return wrong
