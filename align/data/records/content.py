"""What a record says: its turns and texts, the one row that stands for it, and the id that this content has.

The row is the content alone. Who said so, when, and under which name (`id`, `annotator`, `source`, …) is about the
record and no part of it: two rows that teach the same are the same content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from align.chain import canonical
from align.types import Conversation, Document, Feedback, Message, Preference, Record

DOCUMENTS, PREFERENCES, FEEDBACK = "documents", "preferences", "feedback"
"""Kinds of records, of which a data set holds one."""
PARTS: Mapping[type, tuple[str, ...]] = {
    Conversation: ("messages",),
    Preference: ("prompt", "chosen", "rejected"),
    Feedback: ("prompt", "completion"),
}
"""Attributes that hold turns."""


def kind_of(record: Record) -> str:
    """Which kind a record is of."""
    if isinstance(record, Preference):
        return PREFERENCES
    return FEEDBACK if isinstance(record, Feedback) else DOCUMENTS


def turns(record: Record) -> tuple[Message, ...]:
    """All turns of a record, those of a pair one answer behind the other; of plain text none."""
    return tuple(turn for part in PARTS.get(type(record), ()) for turn in getattr(record, part))


def asked(record: Record) -> Document:
    """What a record asks, as a document whose question that is."""
    return Conversation(record.prompt, record.id) if isinstance(record, Preference | Feedback) else record


def texts(record: Record) -> list[str]:
    """All that a record says, in order."""
    return [record] if isinstance(record, str) else [turn.content for turn in turns(record)]


def with_texts(record: Record, change: Callable[[str], str]) -> Record:
    """The record with each of its texts changed; the very same one where nothing changes.

    Raises:
        ValueError: the answers of a pair become equal.
    """
    if isinstance(record, str):
        return change(record)
    made = {}
    for part in PARTS[type(record)]:
        old = getattr(record, part)
        new = tuple(replace(turn, content=changed) if (changed := change(turn.content)) != turn.content else turn
                    for turn in old)  # fmt: skip
        if new != old:
            made[part] = new
    return replace(record, **made) if made else record


def content_of(record: Record) -> dict[str, Any]:
    """The row that stands for a record, of plain JSON values: equal for records that teach the same."""
    if isinstance(record, str):
        return {"text": record}
    row: dict[str, Any] = {part: [turn_row(turn) for turn in getattr(record, part)] for part in PARTS[type(record)]}
    if isinstance(record, Feedback):
        row["label"] = record.label
    if isinstance(record, Preference):  # an answer that was cut is judged otherwise
        row |= {name: False for name in ("chosen_ended", "rejected_ended") if not getattr(record, name)}
    return row


def turn_row(turn: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": turn.role, "content": turn.content}
    return row if turn.trained else {**row, "train": False}


def row_bytes(record: Record) -> bytes:
    """The row that stands for a record, as canonical JSON."""
    return canonical(content_of(record)).encode()


def content_id(record: Record) -> bytes:
    """SHA-256 of the record's row, 32 bytes."""
    return hashlib.sha256(row_bytes(record)).digest()
