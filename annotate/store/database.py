"""The store itself: every act writes its contents and one row of the ledger in one transaction."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Engine, delete, exists, func, insert, select

from align.errors import InputError, require
from align.types import Conversation
from annotate.store.checks import check_expected, check_first, check_judgement, check_same_item
from annotate.store.connections import Connections
from annotate.store.ledger import Head, canonical, salted_digest
from annotate.store.people import leave
from annotate.store.projects import met
from annotate.store.queries import (
    VOTES,
    act,
    annotator_of,
    append,
    check_item,
    check_project,
    close_leases,
    count_work,
    counts,
    erasure_of,
    head_of,
    is_gold,
    meet,
    same_vote,
    set_priority,
    stands,
    work_row,
)
from annotate.store.records import (
    MOST_ANSWERS,
    Candidate,
    Item,
    Judgement,
    Vote,
    candidate_row,
    check_text,
    item_of,
    item_payload,
    prompt_row,
    remark_row,
    vote_of,
)
from annotate.store.schema import connect
from annotate.store.tables import annotators, candidates, drafts, leases, ledger, prompts, remarks, work
from annotate.store.verify import verify

PAGE = 500
"""Items read in one transaction by `Store.items`."""


class Store:
    """An open store. Safe to share between threads; a process opens its own.

    Attributes:
        shown: its URL without the password.
        reading, transaction: of `Connections`: a view, and a transaction that commits all that is written in it or
            nothing. Their connection is for the rooms of `annotate` that have tables of their own to read or write.
        erased: to be called within a transaction that erased something.
        alone: of `Connections`: a block for the one process that serves the store.
    """

    def __init__(self, engine: Engine) -> None:
        self._connections = Connections(engine)
        self.shown = self._connections.shown
        self.reading = self._connections.reading
        self.transaction = self._connections.writing
        self.erased = self._connections.erased
        self.alone = self._connections.alone

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
        require(bool(project.strip()), "project", project, "it is empty", "Name one, for instance project=quickstart.")
        require(bool(key), "key", key, "an item needs one", "Name the run and the prompt, for instance sample-1/17.")
        problem = f"{len(answers)} answer(s) cannot be ranked"
        possible = 2 <= len(answers) <= MOST_ANSWERS
        require(possible, "candidates", len(answers), problem, f"Give 2 to {MOST_ANSWERS} a prompt.")
        item = hashlib.sha256(canonical([project, key]).encode()).hexdigest()[:16]
        known = check_expected(item, len(answers), expected)
        texts = (*(turn.content for turn in prompt.messages), *(answer.text for answer in answers))
        for text in texts:
            check_text("text", text)
        named = {"project": [project], "model": [a.model_digest for a in answers]}
        named["adapter"] = [a.adapter_digest for a in answers]
        for name, values in named.items():
            for value in values:
                check_text(name, value, 200)
        check_text("key", key, 300)
        with self.transaction() as connection:
            before = act(connection, project, "candidates", key)
            if before is not None:
                check_same_item(connection, before, prompt, answers, known)
                set_priority(connection, project, item, priority)
                return item
            first = prompt_row(project, item, prompt)
            rows = [candidate_row(project, item, k, answer) for k, answer in enumerate(answers)]
            connection.execute(insert(prompts), first)
            connection.execute(insert(candidates), rows)
            append(connection, project, "candidates", item_payload(first, rows) | known, item=item, key=key)
            wanted = 0 if known else met(connection, project).wanted(item)
            connection.execute(
                insert(work), work_row(project, item, priority) | {"wanted": wanted, "gold": bool(known)}
            )
        return item

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
            person = annotator_of(connection, project, annotator)
            if is_gold(connection, project, item):
                judgement = replace(judgement, purpose="gold")
            before = act(connection, project, judgement.kind, key)
            if before is not None:
                if person is None or not same_vote(connection, before, item, person.pseudonym, judgement):
                    raise InputError("key", key, "it was used for another judgement", "Send a fresh key.")
                return before.seq
            check_judgement(connection, project, item, judgement)
            if person is None:
                person = meet(connection, project, annotator)
            check_first(connection, project, item, person.pseudonym, judgement)
            payload = judgement.payload() | {"annotator_digest": salted_digest(person.salt, annotator)}
            seq = head_of(connection).seq + 1
            if remark := judgement.remark():
                row = remark_row(project, seq, item, person.pseudonym, remark)
                connection.execute(insert(remarks), row)
                payload["remark"] = salted_digest(row["salt"], remark)
            append(connection, project, judgement.kind, payload, item=item, annotator=person.pseudonym, key=key)
            if counts(judgement):
                count_work(connection, project, item, judged=1)
            return seq

    def retract(self, project: str, seq: int) -> int:
        """Takes a judgement back (undo); returns the retraction's row, the first one if it was retracted before.

        Raises:
            InputError: `seq` is no ranking or skip of this project.
        """
        with self.transaction() as connection:
            of_project = ledger.c.project == project
            row = connection.execute(select(ledger).where(of_project, ledger.c.seq == seq)).first()
            if row is None or row.kind not in VOTES:
                check_project(connection, project)
                raise InputError("seq", seq, f"it is no judgement of project {project}", "Give a vote's seq.")
            before = connection.execute(select(ledger.c.seq).where(ledger.c.retracts == seq)).scalar()
            if before is not None:
                return before
            if counts(vote_of(row, None)):
                count_work(connection, project, row.item, judged=-1)
            return append(connection, project, "retraction", {}, item=row.item, annotator=row.annotator, retracts=seq)

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
            its = (candidates.c.project == project, candidates.c.prompt_id == item)
            connection.execute(delete(candidates).where(*its))
            connection.execute(delete(prompts).where(prompts.c.project == project, prompts.c.id == item))
            for table in (remarks, drafts, work, leases):
                connection.execute(delete(table).where(table.c.project == project, table.c.item == item))
            seq = append(connection, project, "erasure", {"what": "item"}, item=item)
            self._connections.erased()
            return seq

    def erase_annotator(self, project: str, pseudonym: str) -> int:
        """Erases who an annotator is and what they wrote; the items that they hold go back, and their account goes,
        unless another project has it too. The rankings stay, under a pseudonym that nobody can resolve any more.

        Raises:
            InputError: unknown project or pseudonym.
        """
        with self.transaction() as connection:
            mine = (annotators.c.project == project, annotators.c.pseudonym == pseudonym)
            name = connection.execute(delete(annotators).where(*mine).returning(annotators.c.identity)).scalar()
            if name is None:
                check_project(connection, project)
                remedy = "Ask `known` for it; an erased one is not known any more."
                raise InputError("annotator", pseudonym, f"project {project} knows no such annotator", remedy)
            leave(connection, project, name)
            for table in (remarks, drafts):
                theirs = (table.c.project == project, table.c.annotator == pseudonym)
                connection.execute(delete(table).where(*theirs))
            close_leases(connection, project, leases.c.annotator == pseudonym)
            seq = append(connection, project, "erasure", {"what": "annotator"}, annotator=pseudonym)
            self._connections.erased()
            return seq

    # Reading

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
            row = (
                connection.execute(select(prompts).where(prompts.c.project == project, prompts.c.id == id))
                .mappings()
                .first()
            )
            if row is None:
                check_item(connection, project, id)
                raise InputError("item", id, "it was erased", "Take another.")
            its = (candidates.c.project == project, candidates.c.prompt_id == id)
            return item_of(row, connection.execute(select(candidates).where(*its)).mappings().all())

    def rankings(self, project: str) -> list[Vote]:
        """The rankings that stand: not retracted, their item not erased; in ledger order. Raises as `items` does."""
        return self._votes(project, "ranking")

    def skips(self, project: str) -> list[Vote]:
        """The skips that stand, likewise."""
        return self._votes(project, "skip")

    def _votes(self, project: str, kind: str) -> list[Vote]:
        with self.reading() as connection:
            check_project(connection, project)
            present = exists().where(prompts.c.project == ledger.c.project, prompts.c.id == ledger.c.item)
            with_it = (remarks.c.project == ledger.c.project) & (remarks.c.seq == ledger.c.seq)
            query = select(ledger, remarks.c.content).outerjoin(remarks, with_it)
            rows = connection.execute(
                query.where(stands(project), ledger.c.kind == kind, present).order_by(ledger.c.seq)
            ).all()
        return [vote_of(row, row.content) for row in rows]

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

    # Pages

    def _walk(self, project: str, unranked_by: str | None) -> Iterator[Item]:
        after = 0
        while page := self._page(project, unranked_by, after):
            yield from (item for _, item in page)
            after = page[-1][0]

    def _page(self, project: str, unranked_by: str | None, after: int) -> list[tuple[int, Item]]:
        """The next items after row `after`, each with its row: by seq, not by offset, so that writes shift nothing."""
        ours = (prompts.c.project == ledger.c.project) & (prompts.c.id == ledger.c.item)
        query = select(ledger.c.seq, prompts).join(prompts, ours)
        query = query.where(ledger.c.project == project, ledger.c.kind == "candidates", ledger.c.seq > after)
        with self.reading() as connection:
            person = None if unranked_by is None else annotator_of(connection, project, unranked_by)
            if person is not None:
                mine = ledger.alias("mine")
                ranked = (mine.c.item == prompts.c.id) & (mine.c.annotator == person.pseudonym)
                query = query.where(~exists().where(stands(project, mine), ranked))
            rows = connection.execute(query.order_by(ledger.c.seq).limit(PAGE)).mappings().all()
            within = (candidates.c.project == project, candidates.c.prompt_id.in_([row["id"] for row in rows]))
            answers = defaultdict(list)
            for answer in connection.execute(select(candidates).where(*within)).mappings():
                answers[answer["prompt_id"]].append(answer)
        return [(row["seq"], item_of(row, answers[row["id"]])) for row in rows]
