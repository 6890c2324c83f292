"""The store: every act writes its contents and one row of the ledger in one transaction."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Row, delete, exists, func, insert, select, update

from align.annotate.store.connections import Connections, connect
from align.annotate.store.erasure import remove_member
from align.annotate.store.integrity import verify
from align.annotate.store.ledger import (
    VOTES,
    annotator_of,
    append,
    check_item,
    check_project,
    close_leases,
    count_work,
    counts,
    ensure_annotator,
    erasure_of,
    head_of,
    known_projects,
    project_erasure,
    row_by_key,
    stands,
)
from align.annotate.store.projects import ensure_project, history, settings_of
from align.annotate.store.records import (
    MOST_ANSWERS,
    SKIPS,
    Candidate,
    Item,
    Judgement,
    Vote,
    candidate_row,
    check_text,
    item_of,
    item_payload,
    prompt_row,
    vote_of,
    work_row,
)
from align.annotate.store.tables import (
    annotators,
    candidates,
    drafts,
    keys,
    leases,
    ledger,
    members,
    metadata,
    projects,
    prompts,
    remarks,
    users,
    work,
)
from align.core.chain import ChainHead, hash_with_salt, to_canonical_json
from align.core.errors import InputError, require
from align.core.types import Conversation

PAGE = 500
"""Items read in one transaction by `Store.items`."""


class AlreadyJudged(InputError):
    """The annotator has judged the item, and that judgement stands."""


class Store(Connections):
    """An open store. Safe to share between threads; a process opens its own.

    The connections of its transactions and views are for the packages of `annotate` that have tables of their own to
    read or write.
    """

    @classmethod
    def open(cls, url: str, create: bool = True) -> Store:
        """Open the store at a SQLAlchemy URL; `create=False` refuses to make one. Raises as `connect` does."""
        return cls(connect(url, create))

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
        """Add a prompt with its K candidates. Returns the item's id, a function of project and key alone.

        Args:
            key: names the act, for instance `<run>/<conversation id>`: adding it again returns the first item, even
                one erased since. It outlives an erasure, so it must not be made from the content.
            priority: higher is judged earlier where the project's order is `priority`; a known item takes the new one.
            expected: of a gold item, the known answer: the position of each candidate, in tiers, best first.

        Raises:
            InputError: K below 2 or above `MOST_ANSWERS`, an empty project, a prompt with tools, a text that no
                database keeps, or the key was used for other content.
        """
        problem = f"{len(answers)} answer(s) cannot be ranked"
        possible = 2 <= len(answers) <= MOST_ANSWERS
        require(possible, "candidates", len(answers), problem, f"Give 2 to {MOST_ANSWERS} a prompt.")
        problem = "offers or calls tools, which the annotation page does not show"
        require(not prompt.uses_tools, "prompt", "(with tools)", problem, "Give prompts without tools.")
        for text in (*(turn.content for turn in prompt.messages), *(answer.text for answer in answers)):
            check_text("text", text)
        check_text("key", key, 300)
        item = id_of(project, key)
        gold = {}
        if expected is not None:
            gold = {"expected": [sorted(f"{item}-{position}" for position in tier) for tier in expected]}
        with self.transaction() as connection:
            before = row_by_key(connection, project, "candidates", key)
            if before is not None:
                check_same_item(connection, before, prompt, answers, gold)
                set_priority(connection, project, item, priority)
                return item
            settings = ensure_project(connection, project)
            first = prompt_row(project, item, prompt)
            rows = [candidate_row(project, item, k, answer) for k, answer in enumerate(answers)]
            connection.execute(insert(prompts), first)
            connection.execute(insert(candidates), rows)
            append(connection, project, "candidates", item_payload(first, rows) | gold, item=item, key=key)
            counters = {"wanted": 0 if gold else settings.wanted(item), "gold": bool(gold)}
            connection.execute(insert(work), work_row(project, item, priority) | counters)
            return item

    def prioritise(self, project: str, priorities: Mapping[str, float]) -> int:
        """Set how early items are to be judged, by id, where the project's order is `priority`; higher is earlier. It
        is no row of the ledger. Returns how many of the items are there to be judged: erased ones are passed over."""
        with self.transaction() as connection:
            for item, priority in priorities.items():
                set_priority(connection, project, item, priority)
            there = select(work.c.item).where(work.c.project == project)
            return len(priorities.keys() & set(connection.execute(there).scalars()))

    def record(self, project: str, item: str, judgement: Judgement, *, annotator: str, key: str) -> int:
        """Record what an annotator said of an item. Returns its row in the ledger.

        Args:
            judgement: its tiers hold exactly the item's candidates, each once; of a skip, nothing. Of a gold item its
                purpose is gold, whatever it says.
            annotator: the identity (erasable); the ledger has a pseudonym.
            key: the act's idempotency key: the same key with the same judgement returns the first row. It outlives an
                erasure, so it must not name the annotator; a random one is best.

        Raises:
            AlreadyJudged: this annotator's judgement of the item stands, and this is no repeat.
            InputError: unknown project or item; a candidate missing or twice; ratings that the project did not ask
                for; the key was used for another judgement.
        """
        with self.transaction() as connection:
            person = ensure_annotator(connection, project, annotator)
            if connection.execute(select(work.c.gold).where(work.c.project == project, work.c.item == item)).scalar():
                judgement = replace(judgement, purpose="gold")
            before = row_by_key(connection, project, judgement.kind, key)
            if before is not None:
                if not is_same_vote(connection, before, item, person.pseudonym, judgement):
                    raise InputError("key", key, "it was used for another judgement", "Send a fresh key.")
                return before.seq
            check_judgement(connection, project, item, judgement)
            check_not_judged(connection, project, item, person.pseudonym, judgement.purpose)
            payload = judgement.payload() | {"annotator_digest": hash_with_salt(person.salt, annotator)}
            if remark := judgement.remark():
                salt = secrets.token_hex(16)
                row = {"project": project, "seq": head_of(connection).seq + 1, "item": item}
                row |= {"annotator": person.pseudonym, "content": remark, "salt": salt}
                connection.execute(insert(remarks), row)
                payload["remark"] = hash_with_salt(salt, remark)
            if counts(judgement):
                count_work(connection, project, item, judged=1)
            return append(connection, project, judgement.kind, payload, item=item, annotator=person.pseudonym, key=key)

    def retract(self, project: str, seq: int) -> int:
        """Take a judgement back (undo). Returns the retraction's row, the first one if it was retracted before.

        Raises:
            InputError: `seq` is no ranking or skip of this project.
        """
        with self.transaction() as connection:
            row = connection.execute(select(ledger).where(ledger.c.project == project, ledger.c.seq == seq)).first()
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
        """Erase an item's prompt and candidates for good; its rankings go out of every export. Returns the tombstone.

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
            self.erased()
            return append(connection, project, "erasure", {"what": "item"}, item=item)

    def erase_annotator(self, project: str, pseudonym: str) -> int:
        """Erase who an annotator is and what they wrote; the items that they hold go back, and their account goes,
        unless another project has it too. The rankings stay, under a pseudonym that nobody can resolve any more.

        Raises:
            InputError: unknown project or pseudonym.
        """
        with self.transaction() as connection:
            mine = (annotators.c.project == project, annotators.c.pseudonym == pseudonym)
            name = connection.execute(delete(annotators).where(*mine).returning(annotators.c.identity)).scalar()
            if name is None:
                check_project(connection, project)
                raise unknown_annotator(project, pseudonym)
            remove_member(connection, project, name)
            for table in (remarks, drafts):
                connection.execute(delete(table).where(table.c.project == project, table.c.annotator == pseudonym))
            close_leases(connection, project, leases.c.annotator == pseudonym)
            self.erased()
            return append(connection, project, "erasure", {"what": "annotator"}, annotator=pseudonym)

    def erase_project(self, project: str) -> int:
        """Erase a project for good: its items, who judged and what they wrote, guidelines, settings, and the key under
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
            accounts = select(users.c.name).join(members, members.c.user == users.c.id)
            accounts = accounts.where(members.c.project == project)
            people = select(annotators.c.identity).where(annotators.c.project == project)
            for name in {*connection.execute(accounts).scalars(), *connection.execute(people).scalars()}:
                remove_member(connection, project, name)
            for table in reversed(metadata.sorted_tables):
                if "project" in table.c and table is not ledger:
                    connection.execute(delete(table).where(table.c.project == project))
            connection.execute(delete(projects).where(projects.c.name == project))
            self.erased()
            return append(connection, project, "erasure", {"what": "project"})

    # Reading

    def key(self, project: str) -> bytes | None:
        """Return the 32 bytes under which a project's rows in data sets have their ids; None once it is erased. Raises
        as `items` does. The key is for no log, no file and no page."""
        with self.reading() as connection:
            key = connection.execute(select(keys.c.key).where(keys.c.project == project)).scalar()
            if key is None:
                check_project(connection, project)
                return None
            return bytes.fromhex(key)

    def items(self, project: str) -> Iterator[Item]:
        """Iterate over the project's items in the order they were added, without erased ones. It is safe to write
        between two of them.

        Raises:
            InputError: unknown project.
        """
        with self.reading() as connection:
            check_project(connection, project)
        return self._iter_items(project)

    def _iter_items(self, project: str) -> Iterator[Item]:
        same_item = (prompts.c.project == ledger.c.project) & (prompts.c.id == ledger.c.item)
        query = select(ledger.c.seq, prompts).join(prompts, same_item).order_by(ledger.c.seq).limit(PAGE)
        query = query.where(ledger.c.project == project, ledger.c.kind == "candidates")
        after = 0
        while True:  # pages by seq, not by offset, so that writes shift nothing, and each with a view of its own
            with self.reading() as connection:
                rows = connection.execute(query.where(ledger.c.seq > after)).mappings().all()
                its = (candidates.c.project == project, candidates.c.prompt_id.in_([row["id"] for row in rows]))
                answers = defaultdict(list)
                for answer in connection.execute(select(candidates).where(*its)).mappings():
                    answers[answer["prompt_id"]].append(answer)
            if not rows:
                return
            yield from (item_of(row, answers[row["id"]]) for row in rows)
            after = rows[-1]["seq"]

    def rankings(self, project: str) -> list[Vote]:
        """Return the rankings that stand: not retracted, their item not erased; in ledger order. Raises as `items`."""
        return self._read_standing(project, "ranking")

    def skips(self, project: str) -> list[Vote]:
        """Return the skips that stand, likewise."""
        return self._read_standing(project, "skip")

    def _read_standing(self, project: str, kind: str) -> list[Vote]:
        present = exists().where(prompts.c.project == ledger.c.project, prompts.c.id == ledger.c.item)
        with_it = (remarks.c.project == ledger.c.project) & (remarks.c.seq == ledger.c.seq)
        query = select(ledger, remarks.c.content).outerjoin(remarks, with_it)
        query = query.where(stands(project), ledger.c.kind == kind, present).order_by(ledger.c.seq)
        with self.reading() as connection:
            check_project(connection, project)
            return [vote_of(row, row.content) for row in connection.execute(query)]

    def projects(self) -> list[str]:
        """Return the names of all projects, erased ones too."""
        with self.reading() as connection:
            return known_projects(connection)

    def entries(self, project: str) -> list[dict[str, Any]]:
        """Return the project's rows of the ledger, as they are hashed, in its order. Raises as `items` does."""
        with self.reading() as connection:
            check_project(connection, project)
            rows = select(ledger).where(ledger.c.project == project).order_by(ledger.c.seq)
            return [dict(row) for row in connection.execute(rows).mappings()]

    def pseudonym(self, project: str, identity: str) -> str | None:
        """Return the pseudonym of an annotator in the ledger; None for one it has not met."""
        with self.reading() as connection:
            person = annotator_of(connection, project, identity)
        return None if person is None else person.pseudonym

    def first_row(self, project: str, *, item: str | None = None, annotator: str | None = None) -> int | None:
        """Return the first row of the ledger that concerns an item or a pseudonym."""
        about = ledger.c.item == item if item is not None else ledger.c.annotator == annotator
        with self.reading() as connection:
            return connection.execute(select(func.min(ledger.c.seq)).where(ledger.c.project == project, about)).scalar()

    def head(self, project: str | None = None) -> ChainHead:
        """Return the last row, of one project or of the whole ledger (`Head(0, GENESIS)` while it is empty).

        Raises:
            InputError: unknown project.
        """
        with self.reading() as connection:
            if project is not None:
                check_project(connection, project)
            return head_of(connection, project)

    def verify(self, expected: ChainHead | None = None) -> ChainHead:
        """Walk the whole ledger, check every hash and every content that was not erased. Returns the head.

        Args:
            expected: a head noted earlier, of the whole ledger or of a project: a cut tail shows only against it.

        Raises:
            CorruptFile: `value` is the first bad row's seq.
        """
        with self.reading() as connection:
            return verify(connection, expected)


def id_of(project: str, key: str) -> str:
    """Return the id of an item, a function of project and key alone."""
    return hashlib.sha256(to_canonical_json([project, key]).encode()).hexdigest()[:16]


def set_priority(connection: Connection, project: str, item: str, priority: float) -> None:
    mine = (work.c.project == project, work.c.item == item, work.c.priority != priority)
    connection.execute(update(work).where(*mine).values(priority=priority))


def read_item(connection: Connection, project: str, id: str) -> Item:
    """Read one item.

    Raises:
        InputError: unknown project or item, or it was erased.
    """
    mine = select(prompts).where(prompts.c.project == project, prompts.c.id == id)
    row = connection.execute(mine).mappings().first()
    if row is None:
        check_item(connection, project, id)
        raise InputError("item", id, "it was erased", "Take another.")
    its = (candidates.c.project == project, candidates.c.prompt_id == id)
    return item_of(row, connection.execute(select(candidates).where(*its)).mappings().all())


def unknown_annotator(project: str, name: str) -> InputError:
    """Return the error of a name or pseudonym that the project does not know."""
    remedy = "Check the spelling; an erased one is not known any more."
    return InputError("annotator", name, f"project {project} knows no such annotator", remedy)


# What is refused before it is written, for nothing in the ledger can be corrected


def check_same_item(
    connection: Connection, before: Row[Any], prompt: Conversation, answers: Sequence[Candidate], gold: dict[str, Any]
) -> None:
    """Raise InputError unless the row's item holds just this content. An erased item is left in peace."""
    its = (candidates.c.project == before.project, candidates.c.prompt_id == before.item)
    rows = connection.execute(select(candidates.c.position, candidates.c.salt).where(*its))
    salts = {row.position: row.salt for row in rows}
    where = (prompts.c.project == before.project, prompts.c.id == before.item)
    salt = connection.execute(select(prompts.c.salt).where(*where)).scalar()
    if salt is None and erasure_of(connection, before.project, before.item) is not None:
        return
    first = prompt_row(before.project, before.item, prompt, salt or "")
    rows = [candidate_row(before.project, before.item, k, a, salts.get(k, "")) for k, a in enumerate(answers)]
    if item_payload(first, rows) | gold != json.loads(before.payload):
        raise InputError("key", before.key, "it was used for other content", "Give every prompt and run its own key.")


def is_same_vote(connection: Connection, row: Row[Any], item: str, annotator: str, judgement: Judgement) -> bool:
    """Return whether a row of the ledger is this judgement; of a remark that was erased since, any text will do."""
    kept = json.loads(row.payload)
    digest = kept.pop("remark", "")
    kept.pop("annotator_digest", None)
    mine = (remarks.c.project == row.project, remarks.c.seq == row.seq)
    salt = connection.execute(select(remarks.c.salt).where(*mine)).scalar()
    remark = judgement.remark()
    if bool(remark) != bool(digest) or (salt is not None and hash_with_salt(salt, remark) != digest):
        return False
    given = json.loads(to_canonical_json(judgement.payload()))
    return (row.item, row.annotator, kept) == (item, annotator, given)


def check_judgement(connection: Connection, project: str, item: str, judgement: Judgement) -> None:
    """Raise InputError unless the item is there and the judgement is one that its project can have. The types and the
    ranges of a request's other values are checked where it is read, by `web.routes.JudgementBody`."""
    check_item(connection, project, item)
    where = (candidates.c.project == project, candidates.c.prompt_id == item)
    known = sorted(connection.execute(select(candidates.c.id).where(*where)).scalars())
    require(bool(known), "item", item, "it was erased", "Rank another.")
    versions = dict(history(connection, project))
    version = judgement.project_version
    there = version is None or version in versions
    require(there, "project_version", version, "the project had no such version", "Give the one that was shown.")
    settings = settings_of(connection, project) if version is None else versions[version]
    for attribute, rating in (pair for ratings in judgement.ratings.values() for pair in ratings.items()):
        names = ", ".join(settings.attributes) or "nothing"
        require(attribute in settings.attributes, "ratings", attribute, "nobody asked for it", f"Rate {names}.")
        fits = 1 <= rating <= settings.scale
        remedy = f"Give 1 to {settings.scale}."
        require(fits, f"ratings.{attribute}", rating, "it is not on the scale", remedy)
    skipped, tiers = judgement.skipped, judgement.tiers
    if skipped:
        require(skipped in SKIPS, "skipped", skipped, "is no choice here", f"Choose one of: {', '.join(SKIPS)}.")
        require(not tiers, "tiers", tiers, "a skipped item has no ranking", "Skip it or rank it.")
    else:
        whole = sorted(id for tier in tiers for id in tier) == known and all(tiers)
        problem = f"they do not hold each answer of item {item} once, or one of them is empty"
        remedy = f"Rank each of {', '.join(known)} once; ties share a tier."
        require(whole, "tiers", [list(tier) for tier in tiers], problem, remedy)


def check_not_judged(connection: Connection, project: str, item: str, annotator: str, purpose: str) -> None:
    """Raise where the annotator's judgement of the item stands; a repeat needs one, and there is one repeat. A review
    is a reviewer's second judgement of what they may have judged as others did."""
    mine = (stands(project), ledger.c.item == item, ledger.c.annotator == annotator)
    rows = connection.execute(select(ledger.c.seq, ledger.c.payload).where(*mine).order_by(ledger.c.seq)).all()
    kinds: dict[str, list[int]] = {"first": [], "repeat": [], "review": []}
    for seq, payload in rows:
        kind = json.loads(payload).get("purpose")
        kinds[kind if kind in kinds else "first"].append(seq)
    if purpose == "repeat":
        require(bool(kinds["first"]), "item", item, "this annotator has not judged it", "Judge it first.")
    earlier = kinds[purpose if purpose in kinds else "first"]
    if earlier:
        problem = f"this annotator's judgement of it stands (seq {earlier[0]})"
        raise AlreadyJudged("item", item, problem, "Retract that one first.")
