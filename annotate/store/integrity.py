"""Integrity checks of a store: the ledger's chain, all contents that were not erased, and the counters of `work`."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from align.annotate.store.ledger import (
    VOTE_KINDS,
    LedgerEntry,
    build_standing_vote_condition,
    is_counted,
    read_quarantined,
)
from align.annotate.store.projects import ProjectSettings, ensure_project, read_settings
from align.annotate.store.records import RESTORE_REMEDY, build_item_payload, build_work_row, parse_vote
from align.annotate.store.tables import (
    annotators,
    candidates,
    guidelines,
    leases,
    ledger,
    project_keys,
    projects,
    prompts,
    remarks,
    work,
)
from align.core.chain import GENESIS, ChainHead, hash_with_salt, verify_successor
from align.core.errors import CorruptFile

FIELD = "ledger.seq"
"""The `field` of an error about a row of the ledger."""
KEY_PATTERN = re.compile(r"[0-9a-f]{64}")
Subject = tuple[str, str]
"""A pair of project and item id or pseudonym; the second is empty for a whole project."""


def verify_store(connection: Connection, expected: ChainHead | None = None) -> ChainHead:
    """Check the ledger's hash chain, and that the store's contents match it; return the last row's number and hash.

    Args:
        expected: a head noted earlier.

    Raises:
        CorruptFile: `value` is the seq of the first bad row, or ids of contents that the ledger does not mention.
    """
    rows = connection.execute(select(ledger).order_by(ledger.c.seq)).all()
    entries = [LedgerEntry(**row._asdict()) for row in rows]
    # Contents that an erasure names must be gone. The erasure row itself is checked when the loop reaches it.
    erased = {get_erased_subject(entry): entry.seq for entry in entries if entry.kind == "erasure"}
    for entry in entries:
        if entry.kind in ("candidates", *VOTE_KINDS) and (project_erasure := erased.get((entry.project, ""))):
            erased |= {
                (entry.project, subject): project_erasure for subject in (entry.item, entry.annotator) if subject
            }
    answers = defaultdict(list)
    for row in connection.execute(select(candidates)).mappings():
        answers[row["project"], row["prompt_id"]].append(row)
    payloads = {  # the payload in the ledger, computed from each item's contents
        (row["project"], row["id"]): build_item_payload(row, answers[row["project"], row["id"]])
        for row in connection.execute(select(prompts)).mappings()
    }
    annotators_by_subject = {(row.project, row.pseudonym): row for row in connection.execute(select(annotators))}
    remarks_by_vote = {(row.project, row.seq): row for row in connection.execute(select(remarks))}
    guideline_texts = {(row.project, row.version): row.text for row in connection.execute(select(guidelines))}

    head = ChainHead(0, GENESIS)
    mentioned = set[Subject]()
    changes: dict[str, dict[str, Any]] = defaultdict(dict)
    for entry in entries:
        head = verify_successor(head, entry, FIELD, RESTORE_REMEDY)
        payload = json.loads(entry.payload)
        if expected is not None and entry.seq == expected.seq and entry.hash != expected.hash:
            raise build_corrupt_row_error(entry.seq, "its hash differs from that of the expected head")
        if entry.kind == "candidates":
            check_item_contents(entry, payload, payloads, erased)
        elif entry.kind in VOTE_KINDS:
            check_voter(entry, payload, annotators_by_subject, erased)
            check_remark(entry, payload, remarks_by_vote.pop((entry.project, entry.seq), None), erased)
        elif entry.kind == "guidelines":
            if (entry.project, "") not in erased:
                text = guideline_texts.pop((entry.project, payload["version"]), None)
                if text is None or hashlib.sha256(text.encode()).hexdigest() != payload["digest"]:
                    raise build_corrupt_row_error(entry.seq, "the guidelines are not those that were published")
        elif entry.kind == "settings":
            changes[entry.project] |= payload
        elif entry.kind == "erasure":
            project, subject = get_erased_subject(entry)
            existing_subjects = (
                {*payloads, *annotators_by_subject}
                if subject
                else {(name, "") for name, _ in {*payloads, *annotators_by_subject, *guideline_texts}}
            )
            if (project, subject) in existing_subjects:
                raise build_corrupt_row_error(entry.seq, f"what it erased exists again ({subject or project})")
        mentioned |= {(entry.project, entry.item or ""), (entry.project, entry.annotator or "")}
    if expected is not None and head.seq < expected.seq:
        raise build_corrupt_row_error(
            head.seq + 1, f"the ledger's tail is cut: it ends at seq {head.seq}, not {expected.seq}"
        )
    # Annotators are not checked: one who has not voted yet is in no row.
    if unmentioned_items := sorted(id for project, id in payloads if (project, id) not in mentioned):
        raise CorruptFile("store", unmentioned_items[:3], "the ledger does not mention these contents", RESTORE_REMEDY)
    if remarks_by_vote or guideline_texts:
        raise CorruptFile(
            "store",
            sorted({**remarks_by_vote, **guideline_texts})[:3],
            "the ledger does not mention these texts",
            RESTORE_REMEDY,
        )
    check_projects(connection, changes, erased)
    gold = {(e.project, e.item) for e in entries if e.kind == "candidates" and "expected" in json.loads(e.payload)}
    for row in connection.execute(select(work.c.project, work.c.item, work.c.gold)):
        if bool(row.gold) != ((row.project, row.item) in gold):
            raise CorruptFile("work", row.item, "whether it is a gold item differs from the ledger", RESTORE_REMEDY)
    return head


def get_erased_subject(entry: LedgerEntry) -> Subject:
    """Return the project and the item id or pseudonym that an erasure row of the ledger erased.

    The second is empty for a whole project.
    """
    return entry.project, entry.item or entry.annotator or ""


def build_corrupt_row_error(seq: int, problem: str) -> CorruptFile:
    """Return the CorruptFile error about the first bad row of the ledger."""
    return CorruptFile(FIELD, seq, problem, RESTORE_REMEDY)


def check_item_contents(
    entry: LedgerEntry, payload: dict[str, Any], items: Mapping[Subject, dict[str, Any]], erased: Mapping[Subject, int]
) -> None:
    """Raise CorruptFile unless an item's stored contents have the digests in its ledger row, or were erased.

    Args:
        payload: of the ledger row.
        items: digests computed from the stored contents, by (project, item id).
        erased: (project, item id or pseudonym) → seq of the erasure.
    """
    if (entry.project, entry.item) in erased:
        return
    contents = items.get((entry.project, entry.item or ""))
    if contents is None:
        raise build_corrupt_row_error(entry.seq, f"the contents of item {entry.item} are missing, but were not erased")
    if not contents.items() <= payload.items():
        raise build_corrupt_row_error(entry.seq, f"the contents of item {entry.item} are not those that were added")


def check_voter(
    entry: LedgerEntry, payload: dict[str, Any], people: Mapping[Subject, Any], erased: Mapping[Subject, int]
) -> None:
    """Raise CorruptFile unless the name of a vote's annotator has the digest in the vote's ledger row or was erased."""
    subject = (entry.project, entry.annotator or "")
    annotator = people.get(subject)
    if annotator is None:
        if subject not in erased:
            raise build_corrupt_row_error(entry.seq, f"annotator {entry.annotator} is missing, but was not erased")
    elif hash_with_salt(annotator.salt, annotator.identity) != payload["annotator_digest"]:
        raise build_corrupt_row_error(
            entry.seq, f"annotator {entry.annotator} has another identity than when they judged"
        )


def check_remark(
    entry: LedgerEntry, payload: dict[str, Any], row: Row[Any] | None, erased: Mapping[Subject, int]
) -> None:
    """Raise CorruptFile unless an annotator's text on a vote has the digest in the vote's ledger row, or was erased.

    Args:
        payload: of the ledger row.
        row: the text's row of the table `remarks`; None if none exists.
        erased: (project, item id or pseudonym) → seq of the erasure.
    """
    digest = payload.get("remark")
    erasures = {(entry.project, entry.item or ""), (entry.project, entry.annotator or "")} & erased.keys()
    if row is None:
        if digest is not None and not erasures:
            raise build_corrupt_row_error(entry.seq, "the annotator's text is missing, but was not erased")
    elif erasures or digest != hash_with_salt(row.salt, row.content):
        raise build_corrupt_row_error(entry.seq, "the annotator's text is not the one that the ledger records")
    elif (row.item, row.annotator) != (entry.item, entry.annotator):
        raise build_corrupt_row_error(entry.seq, "the annotator's text belongs to another vote")


def check_projects(
    connection: Connection, changes: Mapping[str, dict[str, Any]], erased: Mapping[Subject, int]
) -> None:
    """Raise CorruptFile unless each project has the settings that the ledger records, and a key unless it was erased.

    The key itself cannot be compared: no digest of it is kept.
    """
    existing_projects = set[str]()
    for row in connection.execute(select(projects)):
        existing_projects.add(row.name)
        settings = dict(changes.get(row.name, {}))
        state = settings.pop("state", "open")
        if (read_settings(connection, row.name), row.state) != (ProjectSettings.from_json(settings), state):
            raise CorruptFile("projects", row.name, "its settings are not those of the ledger", RESTORE_REMEDY)
    keys_by_project = {row.project: row.key for row in connection.execute(select(project_keys))}
    for project in sorted(existing_projects | keys_by_project.keys()):
        problem = ""
        if project not in keys_by_project:
            problem = "its key is missing, but the project was not erased"
        elif project not in existing_projects or (project, "") in erased:
            problem = "its key exists, but the project does not"
        elif not KEY_PATTERN.fullmatch(keys_by_project[project]):
            problem = "its key is not one of 32 bytes in hex"
        if problem:
            raise CorruptFile("project_keys", project, problem, RESTORE_REMEDY)


def correct_counters(connection: Connection, project: str) -> int:
    """Recount the votes and leases of each item of a project in the table `work`, and return the number of wrong rows.

    Wrong rows are corrected, and missing rows are created. Counters are written in the transactions that change what
    they count, so they should never be wrong; `restore_store` recounts as a precaution.
    """
    votes = connection.execute(
        select(ledger).where(build_standing_vote_condition(project), ledger.c.kind == "ranking")
    ).all()
    quarantined = read_quarantined(connection, project)
    judged_by_item = Counter(
        row.item for row in votes if row.annotator not in quarantined and is_counted(parse_vote(row, None))
    )
    lease_conditions = (leases.c.project == project, leases.c.state == "open", leases.c.purpose == "work")
    leased_by_item = Counter(connection.execute(select(leases.c.item).where(*lease_conditions)).scalars())
    rows = {row.item: row for row in connection.execute(select(work).where(work.c.project == project))}
    settings = ensure_project(connection, project)
    corrections = 0
    same_item = (prompts.c.project == ledger.c.project) & (prompts.c.id == ledger.c.item)
    query = select(ledger.c.item, ledger.c.payload).join(prompts, same_item)
    query = query.where(ledger.c.project == project, ledger.c.kind == "candidates")
    for item, payload in connection.execute(query).all():
        gold = "expected" in json.loads(payload)
        overlap = 0 if gold else settings.count_wanted_votes(item)
        correct = {"wanted": overlap, "judged": judged_by_item[item], "leased": leased_by_item[item], "gold": gold}
        if item not in rows:
            connection.execute(insert(work), build_work_row(project, item, priority=0.0) | correct)
        elif any(getattr(rows[item], name) != value for name, value in correct.items()):
            connection.execute(update(work).where(work.c.project == project, work.c.item == item).values(correct))
        else:
            continue
        corrections += 1
    return corrections
