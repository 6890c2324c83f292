"""Whether a store is what was written: its chain, and every content that was not erased."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, select

from align.annotate.store.ledger import FIELD, RESTORE, Entry, corrupt
from align.annotate.store.projects import Settings, settings_of
from align.annotate.store.queries import VOTES
from align.annotate.store.records import item_payload
from align.annotate.store.tables import (
    annotators,
    candidates,
    guidelines,
    keys,
    ledger,
    projects,
    prompts,
    remarks,
    work,
)
from align.core.chain import GENESIS, Head, advance, salted_digest
from align.core.errors import CorruptFile

KEY = re.compile(r"[0-9a-f]{64}")
Subject = tuple[str, str]
"""(project, item id or pseudonym)."""


def verify(connection: Connection, expected: Head | None = None) -> Head:
    """Walks the ledger from its first row; returns its head.

    Raises:
        CorruptFile: `value` is the seq of the first bad row; for contents that no row speaks of, their ids.
    """
    rows = connection.execute(select(ledger).order_by(ledger.c.seq)).all()
    entries = [Entry(**row._asdict()) for row in rows]
    # Where an erasure is claimed, the content must be gone; the claim itself is checked when the walk reaches it.
    erased = {(e.project, e.item or e.annotator or ""): e.seq for e in entries if e.kind == "erasure"}
    for e in entries:
        if e.kind in ("candidates", *VOTES) and (whole := erased.get((e.project, ""))):
            erased |= {(e.project, subject): whole for subject in (e.item, e.annotator) if subject}
    items, people, remarked = _items(connection), _people(connection), _remarks(connection)
    texts = {(row.project, row.version): row.text for row in connection.execute(select(guidelines))}

    head, spoken_of = Head(0, GENESIS), set()
    changes: dict[str, dict[str, Any]] = defaultdict(dict)
    for entry in entries:
        head = advance(head, entry, FIELD, RESTORE)
        if expected is not None and entry.seq == expected.seq and entry.hash != expected.hash:
            raise corrupt(entry.seq, "the row is not the one that the expected head names")
        if entry.kind == "candidates":
            _check_item(entry, items, erased)
        elif entry.kind in VOTES:
            _check_annotator(entry, people, erased)
            _check_remark(entry, remarked.pop((entry.project, entry.seq), None), erased)
        elif entry.kind == "guidelines":
            if (entry.project, "") not in erased:
                _check_guidelines(entry, texts.pop((entry.project, json.loads(entry.payload)["version"]), None))
        elif entry.kind == "settings":
            changes[entry.project] |= json.loads(entry.payload)
        elif entry.kind == "erasure":
            subject = (entry.project, entry.item or entry.annotator or "")
            there = {*items, *people} if subject[1] else {(project, "") for project, _ in {*items, *people, *texts}}
            if subject in there:
                raise corrupt(entry.seq, f"what it erased is there again ({subject[1] or subject[0]})")
        spoken_of |= {(entry.project, entry.item), (entry.project, entry.annotator)}
    if expected is not None and head.seq < expected.seq:
        raise corrupt(head.seq + 1, f"the ledger's tail is cut: it ends at seq {head.seq}, not {expected.seq}")
    # An annotator who has not voted yet is nobody's concern.
    if strangers := sorted(id for project, id in items if (project, id) not in spoken_of):
        raise CorruptFile("store", strangers[:3], "the ledger speaks of no such contents", RESTORE)
    if remarked or texts:
        raise CorruptFile("store", sorted({**remarked, **texts})[:3], "the ledger speaks of no such text", RESTORE)
    _check_settings(connection, changes)
    _check_keys(connection, {project for project, subject in erased if not subject})
    _check_gold(connection, entries)
    return head


def _check_settings(connection: Connection, changes: Mapping[str, dict[str, Any]]) -> None:
    for row in connection.execute(select(projects)):
        settings = dict(changes.get(row.name, {}))
        state = settings.pop("state", "open")
        if (settings_of(connection, row.name), row.state) != (Settings.read(settings), state):
            raise CorruptFile("projects", row.name, "its settings are not those of the ledger", RESTORE)


def _check_keys(connection: Connection, erased: Collection[str]) -> None:
    """Each project has a key, and one that was erased has none. No digest of a key is kept anywhere."""
    there = {row.project: row.key for row in connection.execute(select(keys))}
    named = {*connection.execute(select(projects.c.name)).scalars()}
    for project in sorted(named | {*there}):
        problem = ""
        if project not in there:
            problem = "its key is gone, and nobody erased the project"
        elif project not in named or project in erased:
            problem = "its key is there, and the project is not"
        elif not KEY.fullmatch(there[project]):
            problem = "its key is not one of 32 bytes in hex"
        if problem:
            raise CorruptFile("project_keys", project, problem, RESTORE)


def _check_gold(connection: Connection, entries: Sequence[Entry]) -> None:
    known = {(e.project, e.item) for e in entries if e.kind == "candidates" and "expected" in json.loads(e.payload)}
    for row in connection.execute(select(work.c.project, work.c.item, work.c.gold)):
        if bool(row.gold) != ((row.project, row.item) in known):
            raise CorruptFile("work", row.item, "the ledger says otherwise whether it is a gold item", RESTORE)


def _check_item(entry: Entry, items: Mapping[Subject, dict[str, Any]], erased: Mapping[Subject, int]) -> None:
    found = items.get((entry.project, entry.item or ""))
    if found is None:
        if (entry.project, entry.item or "") not in erased:
            raise corrupt(entry.seq, f"the contents of item {entry.item} are gone, and nobody erased them")
    elif (entry.project, entry.item or "") not in erased and not found.items() <= json.loads(entry.payload).items():
        raise corrupt(entry.seq, f"the contents of item {entry.item} are not those that were added")


def _check_annotator(entry: Entry, people: Mapping[Subject, Any], erased: Mapping[Subject, int]) -> None:
    who = (entry.project, entry.annotator or "")
    person = people.get(who)
    if person is None:
        if who not in erased:
            raise corrupt(entry.seq, f"annotator {entry.annotator} is gone, and nobody erased them")
    elif salted_digest(person.salt, person.identity) != json.loads(entry.payload)["annotator_digest"]:
        raise corrupt(entry.seq, f"annotator {entry.annotator} is not who judged")


def _check_remark(entry: Entry, found: Any, erased: Mapping[Subject, int]) -> None:
    digest = json.loads(entry.payload).get("remark")
    gone = {(entry.project, entry.item or ""), (entry.project, entry.annotator or "")} & erased.keys()
    if found is None:
        if digest is not None and not gone:
            raise corrupt(entry.seq, "what the annotator wrote is gone, and nobody erased it")
    elif gone or digest != salted_digest(found.salt, found.content):
        raise corrupt(entry.seq, "what the annotator wrote is not what lies there")
    elif (found.item, found.annotator) != (entry.item, entry.annotator):
        raise corrupt(entry.seq, "what the annotator wrote lies with another vote")


def _check_guidelines(entry: Entry, text: str | None) -> None:
    if text is None or hashlib.sha256(text.encode()).hexdigest() != json.loads(entry.payload)["digest"]:
        raise corrupt(entry.seq, "the guidelines are not those that were published")


def _remarks(connection: Connection) -> dict[tuple[str, int], Any]:
    return {(row.project, row.seq): row for row in connection.execute(select(remarks))}


def _items(connection: Connection) -> dict[Subject, dict[str, Any]]:
    """The payload that each item's contents would have in the ledger."""
    answers = defaultdict(list)
    for row in connection.execute(select(candidates)).mappings():
        answers[row["project"], row["prompt_id"]].append(row)
    return {
        (row["project"], row["id"]): item_payload(row, answers[row["project"], row["id"]])
        for row in connection.execute(select(prompts)).mappings()
    }


def _people(connection: Connection) -> dict[Subject, Any]:
    return {(row.project, row.pseudonym): row for row in connection.execute(select(annotators))}
