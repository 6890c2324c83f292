"""The annotation store. Every write stores its contents and one row of the ledger in one transaction."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Row, delete, exists, func, insert, select, update

from align.annotate.store.connections import StoreConnections, open_store_engine
from align.annotate.store.erasure import remove_member
from align.annotate.store.integrity import verify_store
from align.annotate.store.ledger import (
    VOTE_KINDS,
    add_to_counters,
    append_ledger_row,
    build_standing_vote_condition,
    close_leases,
    ensure_annotator,
    find_annotator,
    find_item_tombstone,
    find_project_tombstone,
    find_row_by_key,
    is_counted,
    list_project_names,
    read_ledger_head,
    read_quarantined,
    require_known_item,
    require_known_project,
)
from align.annotate.store.projects import ensure_project, read_settings, read_settings_history
from align.annotate.store.records import (
    MAX_ANSWERS,
    SKIP_REASONS,
    AnnotationItem,
    Candidate,
    Judgement,
    Vote,
    build_candidate_row,
    build_item_from_rows,
    build_item_payload,
    build_prompt_row,
    build_work_row,
    check_text,
    parse_vote,
)
from align.annotate.store.tables import (
    annotators,
    candidates,
    drafts,
    leases,
    ledger,
    members,
    metadata,
    project_keys,
    projects,
    prompts,
    remarks,
    users,
    work,
)
from align.core.chain import ChainHead, hash_with_salt, to_canonical_json
from align.core.errors import InputError, require
from align.core.types import Conversation

ITEMS_PER_READ = 500
"""Number of items that `Store.items` reads in one transaction."""


class AlreadyJudged(InputError):
    """The error for a second judgement of an item by an annotator whose first one was not retracted."""


class Store(StoreConnections):
    """An open annotation store: items, annotators' judgements of them, and a ledger of all changes, in a database.

    It is safe to share between threads; a process opens its own. Its `transaction` and `reading` blocks give
    connections to packages of `annotate` that have their own tables.
    """

    @classmethod
    def open(cls, url: str, create_if_missing: bool = True) -> Store:
        """Open the annotation store at a SQLAlchemy URL, and by default create it if it does not exist.

        Raises as `open_store_engine`.

        Args:
            create_if_missing: whether to create the database file and the tables if they do not exist.
        """
        return cls(open_store_engine(url, create_if_missing))

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
        """Add a prompt with its K candidate answers to a project as an item, and return the item's id.

        The id is a function of project and key alone.

        Args:
            key: idempotency key, for instance `<run>/<conversation id>`. Adding it again returns the first item, even
                if that was erased since. The key outlives an erasure, so it must not be made from the content.
            priority: higher is judged earlier if the project's order is `priority`. An item added again takes the new
                value.
            expected: the known answer of a gold item: the positions of the candidates in tiers, best first.

        Raises:
            InputError: K below 2 or above `MAX_ANSWERS`, an empty project, a prompt with tools, a text that a database
                cannot store, or the key was used for other content.
        """
        problem = f"{len(answers)} answer(s) cannot be ranked"
        has_valid_count = 2 <= len(answers) <= MAX_ANSWERS
        require(has_valid_count, "candidates", len(answers), problem, f"Give 2 to {MAX_ANSWERS} a prompt.")
        problem = "offers or calls tools, which the annotation page does not show"
        require(not prompt.uses_tools, "prompt", "(with tools)", problem, "Give prompts without tools.")
        for text in (*(turn.content for turn in prompt.messages), *(answer.text for answer in answers)):
            check_text("text", text)
        check_text("key", key, 300)
        item = make_item_id(project, key)
        gold = {}
        if expected is not None:
            gold = {"expected": [sorted(f"{item}-{position}" for position in tier) for tier in expected]}
        with self.transaction() as connection:
            existing_row = find_row_by_key(connection, project, "candidates", key)
            if existing_row is not None:
                require_same_content(connection, existing_row, prompt, answers, gold)
                set_priority(connection, project, item, priority)
                return item
            settings = ensure_project(connection, project)
            prompt_columns = build_prompt_row(project, item, prompt)
            candidate_rows = [build_candidate_row(project, item, k, answer) for k, answer in enumerate(answers)]
            connection.execute(insert(prompts), prompt_columns)
            connection.execute(insert(candidates), candidate_rows)
            append_ledger_row(
                connection,
                project,
                "candidates",
                build_item_payload(prompt_columns, candidate_rows) | gold,
                item=item,
                key=key,
            )
            counters = {"wanted": 0 if gold else settings.count_wanted_votes(item), "gold": bool(gold)}
            connection.execute(insert(work), build_work_row(project, item, priority) | counters)
            return item

    def record(self, project: str, item: str, judgement: Judgement, *, annotator: str, key: str) -> int:
        """Record an annotator's judgement of an item, and return the number (seq) of its row in the ledger.

        Args:
            judgement: its tiers hold exactly the item's candidates, each once; a skip has none. The purpose of a
                judgement of a gold item is set to `gold`.
            annotator: the identity (erasable); the ledger has a pseudonym.
            key: idempotency key: the same key with the same judgement returns the first row. The key outlives an
                erasure, so it must not name the annotator; a random one is best.

        Raises:
            AlreadyJudged: this annotator's judgement of the item stands, and this is not a repeat.
            InputError: unknown project or item; a candidate missing or twice; ratings of attributes that the project
                does not have; or the key was used for another judgement.
        """
        with self.transaction() as connection:
            person = ensure_annotator(connection, project, annotator)
            if connection.execute(select(work.c.gold).where(work.c.project == project, work.c.item == item)).scalar():
                judgement = replace(judgement, purpose="gold")
            existing_row = find_row_by_key(connection, project, judgement.kind, key)
            if existing_row is not None:
                if not is_same_vote(connection, existing_row, item, person.pseudonym, judgement):
                    raise InputError("key", key, "it was used for another judgement", "Send a fresh key.")
                return existing_row.seq
            require_valid_judgement(connection, project, item, judgement)
            require_not_judged(connection, project, item, person.pseudonym, judgement.purpose)
            payload = judgement.to_payload() | {"annotator_digest": hash_with_salt(person.salt, annotator)}
            if remark := judgement.to_remark():
                salt = secrets.token_hex(16)
                row = {"project": project, "seq": read_ledger_head(connection).seq + 1, "item": item}
                row |= {"annotator": person.pseudonym, "content": remark, "salt": salt}
                connection.execute(insert(remarks), row)
                payload["remark"] = hash_with_salt(salt, remark)
            if is_counted(judgement) and person.pseudonym not in read_quarantined(connection, project):
                add_to_counters(connection, project, item, judged=1)
            return append_ledger_row(
                connection, project, judgement.kind, payload, item=item, annotator=person.pseudonym, key=key
            )

    def retract(self, project: str, seq: int) -> int:
        """Retract the judgement of ledger row `seq`, and return the number of the retraction's row in the ledger.

        If it was retracted before, nothing is written, and the row of that retraction is returned.

        Raises:
            InputError: `seq` is not a ranking or skip of this project.
        """
        with self.transaction() as connection:
            row = connection.execute(select(ledger).where(ledger.c.project == project, ledger.c.seq == seq)).first()
            if row is None or row.kind not in VOTE_KINDS:
                require_known_project(connection, project)
                raise InputError("seq", seq, f"it is no judgement of project {project}", "Give a vote's seq.")
            retraction = connection.execute(select(ledger.c.seq).where(ledger.c.retracts == seq)).scalar()
            if retraction is not None:
                return retraction
            if is_counted(parse_vote(row, None)) and row.annotator not in read_quarantined(connection, project):
                add_to_counters(connection, project, row.item, judged=-1)
            return append_ledger_row(
                connection, project, "retraction", {}, item=row.item, annotator=row.annotator, retracts=seq
            )

    def erase_content(self, project: str, item: str) -> int:
        """Delete an item's prompt, answers, drafts and annotators' texts for good, and record this in the ledger.

        Its rankings no longer appear in any export. Returns the seq of the tombstone, the ledger row of the erasure.

        Raises:
            InputError: unknown project or item.
        """
        with self.transaction() as connection:
            require_known_item(connection, project, item)
            tombstone = find_item_tombstone(connection, project, item)
            if tombstone is not None:
                return tombstone
            candidate_conditions = (candidates.c.project == project, candidates.c.prompt_id == item)
            connection.execute(delete(candidates).where(*candidate_conditions))
            connection.execute(delete(prompts).where(prompts.c.project == project, prompts.c.id == item))
            for table in (remarks, drafts, work, leases):
                connection.execute(delete(table).where(table.c.project == project, table.c.item == item))
            self.note_erasure()
            return append_ledger_row(connection, project, "erasure", {"what": "item"}, item=item)

    def erase_annotator(self, project: str, pseudonym: str) -> int:
        """Delete an annotator's identity, texts and drafts for good, and record the erasure in the ledger.

        Returns the seq of the tombstone, the ledger row of the erasure. The items that they hold go back to the queue.
        Their account is deleted unless it is a member of another project. The rankings stay, under a pseudonym that can
        no longer be resolved.

        Raises:
            InputError: unknown project or pseudonym.
        """
        with self.transaction() as connection:
            conditions = (annotators.c.project == project, annotators.c.pseudonym == pseudonym)
            name = connection.execute(delete(annotators).where(*conditions).returning(annotators.c.identity)).scalar()
            if name is None:
                require_known_project(connection, project)
                raise build_unknown_annotator_error(project, pseudonym)
            remove_member(connection, project, name)
            for table in (remarks, drafts):
                connection.execute(delete(table).where(table.c.project == project, table.c.annotator == pseudonym))
            close_leases(connection, project, leases.c.annotator == pseudonym)
            self.note_erasure()
            return append_ledger_row(connection, project, "erasure", {"what": "annotator"}, annotator=pseudonym)

    def erase_project(self, project: str) -> int:
        """Delete a project's items, annotators, texts, guidelines, settings and key for good, and record the erasure.

        From the key the ids of the project's rows in data sets are made. Returns the seq of the tombstone, the ledger
        row of the erasure. Accounts that are in no other project are deleted. The ledger keeps its rows, and the
        project's name cannot be used again.

        Raises:
            InputError: unknown project.
        """
        with self.transaction() as connection:
            require_known_project(connection, project)
            tombstone = find_project_tombstone(connection, project)
            if tombstone is not None:
                return tombstone
            member_names = select(users.c.name).join(members, members.c.user == users.c.id)
            member_names = member_names.where(members.c.project == project)
            annotator_names = select(annotators.c.identity).where(annotators.c.project == project)
            for name in {*connection.execute(member_names).scalars(), *connection.execute(annotator_names).scalars()}:
                remove_member(connection, project, name)
            for table in reversed(metadata.sorted_tables):
                if "project" in table.c and table is not ledger:
                    connection.execute(delete(table).where(table.c.project == project))
            connection.execute(delete(projects).where(projects.c.name == project))
            self.note_erasure()
            return append_ledger_row(connection, project, "erasure", {"what": "project"})

    # Reading

    def key(self, project: str) -> bytes | None:
        """Return the secret key, 32 bytes, by which the ids of a project's data set rows are hashed.

        Returns None if the project was erased. The key must not appear in a log, file or page. Raises as `items`.
        """
        with self.reading() as connection:
            key = connection.execute(select(project_keys.c.key).where(project_keys.c.project == project)).scalar()
            if key is None:
                require_known_project(connection, project)
                return None
            return bytes.fromhex(key)

    def items(self, project: str) -> Iterator[AnnotationItem]:
        """Iterate over a project's items in the order in which they were added, without erased ones.

        The store may be written to during the iteration.

        Raises:
            InputError: unknown project.
        """
        with self.reading() as connection:
            require_known_project(connection, project)
        return self._iter_items(project)

    def _iter_items(self, project: str) -> Iterator[AnnotationItem]:
        same_item = (prompts.c.project == ledger.c.project) & (prompts.c.id == ledger.c.item)
        query = select(ledger.c.seq, prompts).join(prompts, same_item).order_by(ledger.c.seq).limit(ITEMS_PER_READ)
        query = query.where(ledger.c.project == project, ledger.c.kind == "candidates")
        last_seq = 0
        while True:  # pages by seq, not by offset, so that writes shift nothing; each page is a read of its own
            with self.reading() as connection:
                rows = connection.execute(query.where(ledger.c.seq > last_seq)).mappings().all()
                candidate_conditions = (
                    candidates.c.project == project,
                    candidates.c.prompt_id.in_([row["id"] for row in rows]),
                )
                answers = defaultdict(list)
                for answer in connection.execute(select(candidates).where(*candidate_conditions)).mappings():
                    answers[answer["prompt_id"]].append(answer)
            if not rows:
                return
            yield from (build_item_from_rows(row, answers[row["id"]]) for row in rows)
            last_seq = rows[-1]["seq"]

    def rankings(self, project: str) -> list[Vote]:
        """Return a project's rankings that were not retracted and whose item was not erased, in ledger order.

        Raises as `items`.
        """
        return self._read_standing(project, "ranking")

    def skips(self, project: str) -> list[Vote]:
        """Return a project's skips that were not retracted and whose item was not erased, in ledger order.

        Raises as `items`.
        """
        return self._read_standing(project, "skip")

    def _read_standing(self, project: str, kind: str) -> list[Vote]:
        item_exists = exists().where(prompts.c.project == ledger.c.project, prompts.c.id == ledger.c.item)
        same_vote = (remarks.c.project == ledger.c.project) & (remarks.c.seq == ledger.c.seq)
        query = select(ledger, remarks.c.content).outerjoin(remarks, same_vote)
        query = query.where(build_standing_vote_condition(project), ledger.c.kind == kind, item_exists).order_by(
            ledger.c.seq
        )
        with self.reading() as connection:
            require_known_project(connection, project)
            return [parse_vote(row, row.content) for row in connection.execute(query)]

    def projects(self) -> list[str]:
        """Return the names of all projects of the store, including erased ones."""
        with self.reading() as connection:
            return list_project_names(connection)

    def entries(self, project: str) -> list[dict[str, Any]]:
        """Return a project's rows of the ledger as mappings of column to value, in ledger order. Raises as `items`."""
        with self.reading() as connection:
            require_known_project(connection, project)
            rows = select(ledger).where(ledger.c.project == project).order_by(ledger.c.seq)
            return [dict(row) for row in connection.execute(rows).mappings()]

    def pseudonym(self, project: str, identity: str) -> str | None:
        """Return the pseudonym that stands for an annotator in the ledger, or None if they are not in the project."""
        with self.reading() as connection:
            annotator = find_annotator(connection, project, identity)
        return None if annotator is None else annotator.pseudonym

    def find_first_row(self, project: str, *, item: str | None = None, annotator: str | None = None) -> int | None:
        """Return the number of the first ledger row about an item, or else about an annotator's pseudonym, or None."""
        condition = ledger.c.item == item if item is not None else ledger.c.annotator == annotator
        with self.reading() as connection:
            return connection.execute(
                select(func.min(ledger.c.seq)).where(ledger.c.project == project, condition)
            ).scalar()

    def head(self, project: str | None = None) -> ChainHead:
        """Return the number and hash of the last ledger row of one project, or of the whole ledger.

        Returns `ChainHead(0, GENESIS)` if there is no row.

        Raises:
            InputError: unknown project.
        """
        with self.reading() as connection:
            if project is not None:
                require_known_project(connection, project)
            return read_ledger_head(connection, project)

    def verify(self, expected: ChainHead | None = None) -> ChainHead:
        """Check every hash of the ledger and all contents that were not erased; return number and hash of the last row.

        Args:
            expected: a head noted earlier, of the whole ledger or of a project. Without it, a ledger whose last rows
                were cut off passes.

        Raises:
            CorruptFile: `value` is the first bad row's seq.
        """
        with self.reading() as connection:
            return verify_store(connection, expected)


def make_item_id(project: str, key: str) -> str:
    """Return the id of an item, 16 hex digits, which is a hash of its project and idempotency key."""
    return hashlib.sha256(to_canonical_json([project, key]).encode()).hexdigest()[:16]


def set_priority(connection: Connection, project: str, item: str, priority: float) -> None:
    conditions = (work.c.project == project, work.c.item == item, work.c.priority != priority)
    connection.execute(update(work).where(*conditions).values(priority=priority))


def read_item(connection: Connection, project: str, id: str) -> AnnotationItem:
    """Return an item, its prompt and candidates, by its id.

    Raises:
        InputError: unknown project or item, or the item was erased.
    """
    query = select(prompts).where(prompts.c.project == project, prompts.c.id == id)
    row = connection.execute(query).mappings().first()
    if row is None:
        require_known_item(connection, project, id)
        raise InputError("item", id, "it was erased", "Take another.")
    candidate_conditions = (candidates.c.project == project, candidates.c.prompt_id == id)
    return build_item_from_rows(
        row, connection.execute(select(candidates).where(*candidate_conditions)).mappings().all()
    )


def build_unknown_annotator_error(project: str, name: str) -> InputError:
    """Return the InputError for an annotator's name or pseudonym that is unknown in a project."""
    remedy = "Check the spelling. The names of erased annotators are no longer known."
    return InputError("annotator", name, f"project {project} knows no such annotator", remedy)


# Checks before a write, because a row of the ledger cannot be corrected


def require_same_content(
    connection: Connection, row: Row[Any], prompt: Conversation, answers: Sequence[Candidate], gold: dict[str, Any]
) -> None:
    """Raise InputError unless a ledger row's item has exactly the given prompt and answers, or was erased.

    Args:
        gold: the key `expected` of a gold item's payload; empty for any other item.
    """
    candidate_conditions = (candidates.c.project == row.project, candidates.c.prompt_id == row.item)
    rows = connection.execute(select(candidates.c.position, candidates.c.salt).where(*candidate_conditions))
    salts = {row.position: row.salt for row in rows}
    prompt_conditions = (prompts.c.project == row.project, prompts.c.id == row.item)
    salt = connection.execute(select(prompts.c.salt).where(*prompt_conditions)).scalar()
    if salt is None and find_item_tombstone(connection, row.project, row.item) is not None:
        return
    prompt_columns = build_prompt_row(row.project, row.item, prompt, salt or "")
    rows = [build_candidate_row(row.project, row.item, k, a, salts.get(k, "")) for k, a in enumerate(answers)]
    if build_item_payload(prompt_columns, rows) | gold != json.loads(row.payload):
        raise InputError("key", row.key, "it was used for other content", "Give every prompt and run its own key.")


def is_same_vote(connection: Connection, row: Row[Any], item: str, annotator: str, judgement: Judgement) -> bool:
    """Return whether a ledger row records this judgement of this item by this annotator.

    If its texts were erased, any texts match.
    """
    recorded = json.loads(row.payload)
    digest = recorded.pop("remark", "")
    recorded.pop("annotator_digest", None)
    remark_conditions = (remarks.c.project == row.project, remarks.c.seq == row.seq)
    salt = connection.execute(select(remarks.c.salt).where(*remark_conditions)).scalar()
    remark = judgement.to_remark()
    if bool(remark) != bool(digest) or (salt is not None and hash_with_salt(salt, remark) != digest):
        return False
    payload = json.loads(to_canonical_json(judgement.to_payload()))
    return (row.item, row.annotator, recorded) == (item, annotator, payload)


def require_valid_judgement(connection: Connection, project: str, item: str, judgement: Judgement) -> None:
    """Raise InputError unless the item exists and the judgement fits it: its candidates, skip reason and ratings.

    Types and ranges of the other values of a request are checked by `web.routes.JudgementBody`.
    """
    require_known_item(connection, project, item)
    conditions = (candidates.c.project == project, candidates.c.prompt_id == item)
    candidate_ids = sorted(connection.execute(select(candidates.c.id).where(*conditions)).scalars())
    require(bool(candidate_ids), "item", item, "it was erased", "Rank another.")
    versions = dict(read_settings_history(connection, project))
    version = judgement.project_version
    is_known_version = version is None or version in versions
    require(
        is_known_version, "project_version", version, "the project had no such version", "Give the one that was shown."
    )
    settings = read_settings(connection, project) if version is None else versions[version]
    for attribute, rating in (pair for ratings in judgement.ratings.values() for pair in ratings.items()):
        names = ", ".join(settings.attributes) or "nothing"
        require(
            attribute in settings.attributes, "ratings", attribute, "the project has no such rating", f"Rate {names}."
        )
        is_on_scale = 1 <= rating <= settings.scale
        remedy = f"Give 1 to {settings.scale}."
        require(is_on_scale, f"ratings.{attribute}", rating, "it is not on the scale", remedy)
    skipped = judgement.skipped
    tiers = judgement.tiers
    if skipped:
        require(
            skipped in SKIP_REASONS,
            "skipped",
            skipped,
            "is not a reason to skip",
            f"Choose one of: {', '.join(SKIP_REASONS)}.",
        )
        require(not tiers, "tiers", tiers, "a skipped item has no ranking", "Skip it or rank it.")
    else:
        is_complete = sorted(id for tier in tiers for id in tier) == candidate_ids and all(tiers)
        problem = f"they must hold each answer of item {item} once, and no tier may be empty"
        remedy = f"Rank each of {', '.join(candidate_ids)} once; ties share a tier."
        require(is_complete, "tiers", [list(tier) for tier in tiers], problem, remedy)


def require_not_judged(connection: Connection, project: str, item: str, annotator: str, purpose: str) -> None:
    """Raise AlreadyJudged if the annotator has judged the item for the same purpose and did not retract it.

    There may be one first judgement, one repeat and one review of an item. A repeat needs a first judgement, else
    InputError is raised. A review is a second judgement, by a reviewer who may have judged the item like any annotator.
    """
    conditions = (build_standing_vote_condition(project), ledger.c.item == item, ledger.c.annotator == annotator)
    rows = connection.execute(select(ledger.c.seq, ledger.c.payload).where(*conditions).order_by(ledger.c.seq)).all()
    seqs_by_kind: dict[str, list[int]] = {"first": [], "repeat": [], "review": []}
    for seq, payload in rows:
        kind = json.loads(payload).get("purpose")
        seqs_by_kind[kind if kind in seqs_by_kind else "first"].append(seq)
    if purpose == "repeat":
        require(bool(seqs_by_kind["first"]), "item", item, "this annotator has not judged it", "Judge it first.")
    standing_seqs = seqs_by_kind[purpose if purpose in seqs_by_kind else "first"]
    if standing_seqs:
        problem = f"this annotator's judgement of it stands (seq {standing_seqs[0]})"
        raise AlreadyJudged("item", item, problem, "Retract that one first.")
