"""Items: a prompt with its candidates, added once, read alone or in pages. Functions of an open connection."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, exists, insert, select

from align.annotate.store.checks import check_expected, check_same_item
from align.annotate.store.projects import met
from align.annotate.store.queries import annotator_of, append, check_item, row_by_key, set_priority, stands, work_row
from align.annotate.store.records import (
    MOST_ANSWERS,
    Candidate,
    Item,
    candidate_row,
    check_text,
    item_of,
    item_payload,
    prompt_row,
)
from align.annotate.store.tables import candidates, ledger, prompts, work
from align.core.chain import canonical
from align.core.errors import InputError, require
from align.core.types import Conversation

PAGE = 500
"""Items read in one transaction by `Store.items`."""


def id_of(project: str, key: str) -> str:
    """A function of project and key alone."""
    return hashlib.sha256(canonical([project, key]).encode()).hexdigest()[:16]


def check_new(
    project: str,
    key: str,
    prompt: Conversation,
    answers: Sequence[Candidate],
    expected: Sequence[Sequence[int]] | None,
) -> dict[str, Any]:
    """What the ledger keeps of an item's known answer. Raises as `Store.add_item`, for all but a key that was used."""
    require(bool(project.strip()), "project", project, "it is empty", "Name one, for instance project=quickstart.")
    require(bool(key), "key", key, "an item needs one", "Name the run and the prompt, for instance sample-1/17.")
    problem = f"{len(answers)} answer(s) cannot be ranked"
    possible = 2 <= len(answers) <= MOST_ANSWERS
    require(possible, "candidates", len(answers), problem, f"Give 2 to {MOST_ANSWERS} a prompt.")
    known = check_expected(id_of(project, key), len(answers), expected)
    problem = "offers or calls tools, which the annotation page does not show"
    require(not prompt.uses_tools, "prompt", "(with tools)", problem, "Give prompts without tools.")
    texts = (*(turn.content for turn in prompt.messages), *(answer.text for answer in answers))
    for text in texts:
        check_text("text", text)
    named = {"project": [project], "model": [a.model_digest for a in answers]}
    named["adapter"] = [a.adapter_digest for a in answers]
    for name, values in named.items():
        for value in values:
            check_text(name, value, 200)
    check_text("key", key, 300)
    return known


def add(
    connection: Connection,
    project: str,
    key: str,
    prompt: Conversation,
    answers: Sequence[Candidate],
    priority: float,
    known: dict[str, Any],
) -> str:
    """Adds an item that was checked, or gives a known one this priority; returns its id."""
    item, before = id_of(project, key), row_by_key(connection, project, "candidates", key)
    if before is not None:
        check_same_item(connection, before, prompt, answers, known)
        set_priority(connection, project, item, priority)
        return item
    first = prompt_row(project, item, prompt)
    rows = [candidate_row(project, item, k, answer) for k, answer in enumerate(answers)]
    connection.execute(insert(prompts), first)
    connection.execute(insert(candidates), rows)
    append(connection, project, "candidates", item_payload(first, rows) | known, item=item, key=key)
    settings = met(connection, project)
    row = work_row(project, item, priority) | {"wanted": 0 if known else settings.wanted(item), "gold": bool(known)}
    connection.execute(insert(work), row)
    return item


def one(connection: Connection, project: str, id: str) -> Item:
    """One item. Raises as `Store.item` does."""
    mine = select(prompts).where(prompts.c.project == project, prompts.c.id == id)
    row = connection.execute(mine).mappings().first()
    if row is None:
        check_item(connection, project, id)
        raise InputError("item", id, "it was erased", "Take another.")
    its = (candidates.c.project == project, candidates.c.prompt_id == id)
    return item_of(row, connection.execute(select(candidates).where(*its)).mappings().all())


def page(connection: Connection, project: str, unranked_by: str | None, after: int) -> list[tuple[int, Item]]:
    """The next items after row `after`, each with its row: by seq, not by offset, so that writes shift nothing."""
    ours = (prompts.c.project == ledger.c.project) & (prompts.c.id == ledger.c.item)
    query = select(ledger.c.seq, prompts).join(prompts, ours)
    query = query.where(ledger.c.project == project, ledger.c.kind == "candidates", ledger.c.seq > after)
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
