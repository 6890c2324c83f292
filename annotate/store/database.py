"""The store itself: every act writes its contents and one row of the ledger in one transaction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Engine, func, select

from align.annotate.store import erasure, items, votes
from align.annotate.store.connections import Connections
from align.annotate.store.integrity import verify
from align.annotate.store.projects import key_of
from align.annotate.store.queries import (
    annotator_of,
    check_item,
    check_project,
    erasure_of,
    head_of,
    new_annotator,
    project_erasure,
    set_priority,
)
from align.annotate.store.records import Candidate, Item, Judgement, Vote, check_text
from align.annotate.store.schema import connect
from align.annotate.store.tables import ledger, work
from align.core.chain import Head
from align.core.errors import InputError, require
from align.core.types import Conversation


class Store:
    """An open store. Safe to share between threads; a process opens its own.

    Attributes:
        masked_url: its URL without the password.
        reading, transaction: of `Connections`: a view, and a transaction that commits all that is written in it or
            nothing. Their connection is for the rooms of `annotate` that have tables of their own to read or write.
        erased: to be called within a transaction that erased something.
        alone: of `Connections`: a block for the one process that serves the store.
    """

    def __init__(self, engine: Engine) -> None:
        self._connections = Connections(engine)
        self.masked_url = self._connections.masked_url
        self.reading = self._connections.reading
        self.transaction = self._connections.writing
        self.erased = self._connections.erased
        self.alone = self._connections.alone

    @property
    def emptied(self) -> bool:
        """Whether nothing that was erased is left in the database's own log, which a reader (a backup) may hold."""
        return self._connections.emptied

    @classmethod
    def open(cls, url: str, create: bool = True) -> Store:
        """The store at a SQLAlchemy URL; `create=False` refuses to make one. Raises as `schema.connect` does."""
        return cls(connect(url, create))

    def close(self) -> None:
        self._connections.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Writing

    def add_item(
        self,
        project: str,
        key: str,
        prompt: Conversation,
        answers: Sequence[Candidate],
        *,
        priority: float = 0.0,
        expected: Sequence[Sequence[int]] | None = None,
    ) -> str:
        """Adds a prompt with its K candidates; returns the item's id, a function of project and key alone.

        Args:
            key: names the act, for instance `<run>/<conversation id>`: adding it again returns the first item, even
                one erased since. It outlives an erasure, so it must not be made from the content.
            priority: higher is judged earlier where the project's order is `priority`; a known item takes the new one.
            expected: of a gold item, the known answer: positions of the candidates in tiers, best first.

        Raises:
            InputError: K below 2 or above `MOST_ANSWERS`, an empty project or key, a known answer that leaves out or
                repeats a candidate, or the key was used for other content.
        """
        known = items.check_new(project, key, prompt, answers, expected)
        with self.transaction() as connection:
            return items.add(connection, project, key, prompt, answers, priority, known)

    def prioritise(self, project: str, priorities: Mapping[str, float]) -> int:
        """Says how early items are to be judged, by id, where the project's order is `priority`; higher is earlier. It
        is no row of the ledger. Returns how many are there to be judged: those erased since are passed over."""
        with self.transaction() as connection:
            for item, priority in priorities.items():
                set_priority(connection, project, item, priority)
            there = select(work.c.item).where(work.c.project == project)
            return len(priorities.keys() & set(connection.execute(there).scalars()))

    def record(self, project: str, item: str, judgement: Judgement, *, annotator: str, key: str) -> int:
        """Records what an annotator said of an item and returns its row in the ledger.

        Args:
            judgement: its tiers hold exactly the item's candidates, each once; of a skip, nothing. Of a gold item its
                purpose is gold, whatever it says.
            annotator: the identity (erasable); the ledger sees a pseudonym.
            key: the act's idempotency key: the same key with the same judgement returns the first row. It outlives an
                erasure, so it must not name the annotator; a random one is best.

        Raises:
            AlreadyJudged: this annotator's judgement of the item stands, and this is no repeat.
            InputError: unknown project, item or candidate; a candidate missing or twice; the key was used for another
                judgement.
        """
        require(bool(annotator), "annotator", annotator, "a judgement needs one", "Say who judged.")
        require(bool(key), "key", key, "a judgement needs one", "Send a fresh random key with every judgement.")
        check_text("annotator", annotator, 320)
        check_text("key", key, 300)
        with self.transaction() as connection:
            return votes.record(connection, project, item, judgement, annotator, key)

    def retract(self, project: str, seq: int) -> int:
        """Takes a judgement back (undo); returns the retraction's row, the first one if it was retracted before.

        Raises:
            InputError: `seq` is no ranking or skip of this project.
        """
        with self.transaction() as connection:
            return votes.retract(connection, project, seq)

    def erase_content(self, project: str, item: str) -> int:
        """Erases an item's prompt and candidates for good; its rankings go out of every export. Returns the tombstone.

        Raises:
            InputError: unknown project or item.
        """
        with self.transaction() as connection:
            check_item(connection, project, item)
            before = erasure_of(connection, project, item)
            if before is not None:
                return before
            seq = erasure.erase_item(connection, project, item)
            self.erased()
            return seq

    def erase_annotator(self, project: str, pseudonym: str) -> int:
        """Erases who an annotator is and what they wrote; the items that they hold go back, and their account goes,
        unless another project has it too. The rankings stay, under a pseudonym that nobody can resolve any more.

        Raises:
            InputError: unknown project or pseudonym.
        """
        with self.transaction() as connection:
            seq = erasure.erase_annotator(connection, project, pseudonym)
            self.erased()
            return seq

    def erase_project(self, project: str) -> int:
        """Erases a project for good: its items, who judged and what they wrote, guidelines, settings, and the key under
        which its rows in data sets have their ids. Accounts go that no other project has. Returns the tombstone; the
        ledger keeps its rows, and the project's name is not used again.

        Raises:
            InputError: unknown project.
        """
        with self.transaction() as connection:
            check_project(connection, project)
            before = project_erasure(connection, project)
            if before is not None:
                return before
            seq = erasure.erase_project(connection, project)
            self.erased()
            return seq

    # Reading

    def key(self, project: str) -> bytes | None:
        """The key under which a project's rows in data sets have their ids; None once it is erased. Raises as `items`
        does. It is for no log, no file and no page."""
        with self.reading() as connection:
            return key_of(connection, project)

    def items(self, project: str, unranked_by: str | None = None) -> Iterator[Item]:
        """The project's items in the order they were added, without erased ones; safe to write between two of them.

        Args:
            unranked_by: an identity: leave out what this annotator's standing rankings cover.

        Raises:
            InputError: unknown project.
        """
        with self.reading() as connection:
            check_project(connection, project)
        return self._walk(project, unranked_by)

    def item(self, project: str, id: str) -> Item:
        """One item.

        Raises:
            InputError: unknown project or item, or it was erased.
        """
        with self.reading() as connection:
            return items.one(connection, project, id)

    def rankings(self, project: str) -> list[Vote]:
        """The rankings that stand: not retracted, their item not erased; in ledger order. Raises as `items` does."""
        with self.reading() as connection:
            return votes.standing(connection, project, "ranking")

    def skips(self, project: str) -> list[Vote]:
        """The skips that stand, likewise."""
        with self.reading() as connection:
            return votes.standing(connection, project, "skip")

    def known(self, project: str, identity: str) -> str:
        """The pseudonym of an annotator.

        Raises:
            InputError: unknown project or identity.
        """
        found = self.pseudonym(project, identity)
        if found is None:
            with self.reading() as connection:
                check_project(connection, project)
            remedy = "Check the spelling; an erased one is not known either."
            raise InputError("annotator", identity, f"project {project} knows no such annotator", remedy)
        return found

    def entries(self, project: str) -> list[dict[str, Any]]:
        """The project's rows of the ledger, as they are hashed, in its order. Raises as `items` does."""
        with self.reading() as connection:
            check_project(connection, project)
            rows = select(ledger).where(ledger.c.project == project).order_by(ledger.c.seq)
            return [dict(row) for row in connection.execute(rows).mappings()]

    def pseudonym(self, project: str, identity: str) -> str | None:
        """What the ledger calls an annotator; None for one it has not met."""
        with self.reading() as connection:
            person = annotator_of(connection, project, identity)
        return None if person is None else person.pseudonym

    def ensure_pseudonym(self, project: str, identity: str) -> str:
        """Return what the ledger calls an annotator: a random pseudonym, drawn now for a new one.

        Raises:
            InputError: unknown project.
        """
        check_text("annotator", identity, 320)
        with self.transaction() as connection:
            check_project(connection, project)
            person = annotator_of(connection, project, identity) or new_annotator(connection, project, identity)
        return person.pseudonym

    def first_row(self, project: str, *, item: str | None = None, annotator: str | None = None) -> int | None:
        """The first row of the ledger that speaks of an item or of a pseudonym."""
        about = ledger.c.item == item if item is not None else ledger.c.annotator == annotator
        with self.reading() as connection:
            return connection.execute(select(func.min(ledger.c.seq)).where(ledger.c.project == project, about)).scalar()

    def head(self, project: str | None = None) -> Head:
        """The last row, of one project or of the whole ledger (`Head(0, GENESIS)` while it is empty).

        Raises:
            InputError: unknown project.
        """
        with self.reading() as connection:
            if project is not None:
                check_project(connection, project)
            return head_of(connection, project)

    def verify(self, expected: Head | None = None) -> Head:
        """Walks the whole ledger, checks every hash and every content that was not erased; returns the head.

        Args:
            expected: a head noted earlier, of the whole ledger or of a project: a cut tail shows only against it.

        Raises:
            CorruptFile: `value` is the first bad row's seq.
        """
        with self.reading() as connection:
            return verify(connection, expected)

    def _walk(self, project: str, unranked_by: str | None) -> Iterator[Item]:
        after = 0
        while page := self._page(project, unranked_by, after):
            yield from (item for _, item in page)
            after = page[-1][0]

    def _page(self, project: str, unranked_by: str | None, after: int) -> list[tuple[int, Item]]:
        with self.reading() as connection:  # of its own, so that others may write between two pages
            return items.page(connection, project, unranked_by, after)
