"""Whether a store is what was written: its chain, every content that was not erased, and its counters counted anew."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, insert, select, update

from align.annotate.store.ledger import VOTES, Entry, counts, stands
from align.annotate.store.projects import Settings, ensure_project, settings_of
from align.annotate.store.records import RESTORE, item_payload, vote_of, work_row
from align.annotate.store.tables import (
    annotators,
    candidates,
    guidelines,
    keys,
    leases,
    ledger,
    projects,
    prompts,
    remarks,
    work,
)
from align.core.chain import GENESIS, ChainHead, advance, hash_with_salt
from align.core.errors import CorruptFile

FIELD = "ledger.seq"
"""The field of an error that names a row."""
KEY = re.compile(r"[0-9a-f]{64}")
Subject = tuple[str, str]
"""(project, item id or pseudonym); the latter is empty for a whole project."""


def verify(connection: Connection, expected: ChainHead | None = None) -> ChainHead:
    """Walk the ledger from its first row. Returns its head.

    Raises:
        CorruptFile: `value` is the seq of the first bad row; for contents that no row speaks of, their ids.
    """
    rows = connection.execute(select(ledger).order_by(ledger.c.seq)).all()
    entries = [Entry(**row._asdict()) for row in rows]
    # Where an erasure is claimed, the content must be gone; the claim itself is checked when the walk reaches it.
    erased = {subject_of(entry): entry.seq for entry in entries if entry.kind == "erasure"}
    for entry in entries:
        if entry.kind in ("candidates", *VOTES) and (whole := erased.get((entry.project, ""))):
            erased |= {(entry.project, subject): whole for subject in (entry.item, entry.annotator) if subject}
    answers = defaultdict(list)
    for row in connection.execute(select(candidates)).mappings():
        answers[row["project"], row["prompt_id"]].append(row)
    items = {  # the payload that each item's contents would have in the ledger
        (row["project"], row["id"]): item_payload(row, answers[row["project"], row["id"]])
        for row in connection.execute(select(prompts)).mappings()
    }
    people = {(row.project, row.pseudonym): row for row in connection.execute(select(annotators))}
    remarked = {(row.project, row.seq): row for row in connection.execute(select(remarks))}
    texts = {(row.project, row.version): row.text for row in connection.execute(select(guidelines))}

    head = ChainHead(0, GENESIS)
    mentioned = set[Subject]()
    changes: dict[str, dict[str, Any]] = defaultdict(dict)
    for entry in entries:
        head = advance(head, entry, FIELD, RESTORE)
        payload = json.loads(entry.payload)
        if expected is not None and entry.seq == expected.seq and entry.hash != expected.hash:
            raise corrupt(entry.seq, "the row is not the one that the expected head names")
        if entry.kind == "candidates":
            check_item_contents(entry, payload, items, erased)
        elif entry.kind in VOTES:
            check_voter(entry, payload, people, erased)
            check_remark(entry, payload, remarked.pop((entry.project, entry.seq), None), erased)
        elif entry.kind == "guidelines":
            if (entry.project, "") not in erased:
                text = texts.pop((entry.project, payload["version"]), None)
                if text is None or hashlib.sha256(text.encode()).hexdigest() != payload["digest"]:
                    raise corrupt(entry.seq, "the guidelines are not those that were published")
        elif entry.kind == "settings":
            changes[entry.project] |= payload
        elif entry.kind == "erasure":
            project, subject = subject_of(entry)
            there = {*items, *people} if subject else {(name, "") for name, _ in {*items, *people, *texts}}
            if (project, subject) in there:
                raise corrupt(entry.seq, f"what it erased is there again ({subject or project})")
        mentioned |= {(entry.project, entry.item or ""), (entry.project, entry.annotator or "")}
    if expected is not None and head.seq < expected.seq:
        raise corrupt(head.seq + 1, f"the ledger's tail is cut: it ends at seq {head.seq}, not {expected.seq}")
    # An annotator who has not voted yet is nobody's concern.
    if strangers := sorted(id for project, id in items if (project, id) not in mentioned):
        raise CorruptFile("store", strangers[:3], "the ledger speaks of no such contents", RESTORE)
    if remarked or texts:
        raise CorruptFile("store", sorted({**remarked, **texts})[:3], "the ledger speaks of no such text", RESTORE)
    check_projects(connection, changes, erased)
    gold = {(e.project, e.item) for e in entries if e.kind == "candidates" and "expected" in json.loads(e.payload)}
    for row in connection.execute(select(work.c.project, work.c.item, work.c.gold)):
        if bool(row.gold) != ((row.project, row.item) in gold):
            raise CorruptFile("work", row.item, "the ledger says otherwise whether it is a gold item", RESTORE)
    return head


def subject_of(entry: Entry) -> Subject:
    """Return what an erasure erased."""
    return entry.project, entry.item or entry.annotator or ""


def corrupt(seq: int, problem: str) -> CorruptFile:
    """Return the error that names the first bad row."""
    return CorruptFile(FIELD, seq, problem, RESTORE)


def check_item_contents(
    entry: Entry, payload: dict[str, Any], items: Mapping[Subject, dict[str, Any]], erased: Mapping[Subject, int]
) -> None:
    if (entry.project, entry.item) in erased:
        return
    contents = items.get((entry.project, entry.item or ""))
    if contents is None:
        raise corrupt(entry.seq, f"the contents of item {entry.item} are gone, and nobody erased them")
    if not contents.items() <= payload.items():
        raise corrupt(entry.seq, f"the contents of item {entry.item} are not those that were added")


def check_voter(
    entry: Entry, payload: dict[str, Any], people: Mapping[Subject, Any], erased: Mapping[Subject, int]
) -> None:
    who = (entry.project, entry.annotator or "")
    person = people.get(who)
    if person is None:
        if who not in erased:
            raise corrupt(entry.seq, f"annotator {entry.annotator} is gone, and nobody erased them")
    elif hash_with_salt(person.salt, person.identity) != payload["annotator_digest"]:
        raise corrupt(entry.seq, f"annotator {entry.annotator} is not who judged")


def check_remark(entry: Entry, payload: dict[str, Any], row: Any, erased: Mapping[Subject, int]) -> None:
    digest = payload.get("remark")
    gone = {(entry.project, entry.item or ""), (entry.project, entry.annotator or "")} & erased.keys()
    if row is None:
        if digest is not None and not gone:
            raise corrupt(entry.seq, "what the annotator wrote is gone, and nobody erased it")
    elif gone or digest != hash_with_salt(row.salt, row.content):
        raise corrupt(entry.seq, "what the annotator wrote is not what lies there")
    elif (row.item, row.annotator) != (entry.item, entry.annotator):
        raise corrupt(entry.seq, "what the annotator wrote lies with another vote")


def check_projects(
    connection: Connection, changes: Mapping[str, dict[str, Any]], erased: Mapping[Subject, int]
) -> None:
    """Raise CorruptFile unless each project has the settings that the ledger says and a key, and an erased one has no
    key. No digest of a key is kept anywhere."""
    names = set[str]()
    for row in connection.execute(select(projects)):
        names.add(row.name)
        settings = dict(changes.get(row.name, {}))
        state = settings.pop("state", "open")
        if (settings_of(connection, row.name), row.state) != (Settings.read(settings), state):
            raise CorruptFile("projects", row.name, "its settings are not those of the ledger", RESTORE)
    key_of = {row.project: row.key for row in connection.execute(select(keys))}
    for project in sorted(names | key_of.keys()):
        problem = ""
        if project not in key_of:
            problem = "its key is gone, and nobody erased the project"
        elif project not in names or (project, "") in erased:
            problem = "its key is there, and the project is not"
        elif not KEY.fullmatch(key_of[project]):
            problem = "its key is not one of 32 bytes in hex"
        if problem:
            raise CorruptFile("project_keys", project, problem, RESTORE)


def recount(connection: Connection, project: str) -> int:
    """Set every counter of a project right, and make the rows of `work` that are missing. Returns how many were wrong.

    The counters are written in the transactions that change what they count, so they cannot drift; `restore` counts
    them anew all the same.
    """
    votes = connection.execute(select(ledger).where(stands(project), ledger.c.kind == "ranking")).all()
    judged = Counter(row.item for row in votes if counts(vote_of(row, None)))
    held = (leases.c.project == project, leases.c.state == "open", leases.c.purpose == "work")
    leased = Counter(connection.execute(select(leases.c.item).where(*held)).scalars())
    rows = {row.item: row for row in connection.execute(select(work).where(work.c.project == project))}
    settings = ensure_project(connection, project)
    wrong = 0
    same_item = (prompts.c.project == ledger.c.project) & (prompts.c.id == ledger.c.item)
    added = select(ledger.c.item, ledger.c.payload).join(prompts, same_item)
    added = added.where(ledger.c.project == project, ledger.c.kind == "candidates")
    for item, payload in connection.execute(added).all():
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
