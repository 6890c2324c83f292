"""Whose votes a run read, as the annotation store knows it now: by pseudonyms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from align.core.chain import Head
from align.core.errors import AlignError, CorruptFile


@dataclass(frozen=True, slots=True)
class Votes:
    """What a store says of the votes that a run read.

    Attributes:
        by: pseudonym → how many of its rankings, without those that were retracted or erased since.
        state: whether the ledger is still the one that was read.
        whole: False where it is known to be another.
    """

    by: Mapping[str, int] = field(default_factory=dict)
    state: str = ""
    whole: bool = True


def votes_read(url: str, project: str, head: Head, full: bool) -> Votes:
    """The votes of a project up to the row that was the newest when they were read.

    Args:
        url: of the store.
        head: that row; one before the first for what notes none.
        full: walk the whole ledger, and check its hashes and contents.
    """
    from sqlalchemy import select

    from align.annotate.store import Store
    from align.annotate.store.tables import ledger

    try:
        with Store.open(url, create=False) as store, store.reading() as connection:
            rankings = [vote for vote in store.rankings(project) if head.seq < 0 or vote.seq <= head.seq]
            by = Counter(vote.annotator for vote in rankings)
            if head.seq < 0:
                return Votes(by)
            found = connection.execute(select(ledger.c.hash).where(ledger.c.seq == head.seq)).scalar()
            if found != head.hash:
                return Votes(by, f"row {head.seq:,} of its ledger is another one, or gone", whole=False)
            if not full:
                return Votes(by, "the last row that was read is in the ledger")
            store.verify(head)
            return Votes(by, "every row of the ledger and every content hashed now: as written")
    except CorruptFile as error:
        return Votes(state=str(error), whole=False)
    except AlignError as error:
        return Votes(state=f"the store cannot say: {error}")
