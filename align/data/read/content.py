"""What a record says: its turns and texts, and the one row that stands for it.

The row is the content alone. Who said so, when, and under which name (`id`, `annotator`, `source`, …) is about the
record and no part of it: two rows that teach the same are the same content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from json.encoder import encode_basestring_ascii
from typing import Any

from align.core.chain import to_canonical_json
from align.core.types import Conversation, Document, Feedback, Message, Preference, Record, dump_json

DOCUMENTS, PREFERENCES, FEEDBACK = "documents", "preferences", "feedback"
"""Kinds of records, of which a data set holds one."""
PARTS: Mapping[type, tuple[str, ...]] = {
    Conversation: ("messages",),
    Preference: ("prompt", "chosen", "rejected"),
    Feedback: ("prompt", "completion"),
}
"""Attributes that hold turns."""
ENDED = ("chosen_ended", "rejected_ended")


def split_names(names: str) -> tuple[str, ...]:
    return tuple(names.split())


def kind_of(record: Record) -> str:
    return {Preference: PREFERENCES, Feedback: FEEDBACK}.get(type(record), DOCUMENTS)


def turns(record: Record) -> tuple[Message, ...]:
    """Return all turns of a record, those of a pair one answer behind the other; of plain text none."""
    return tuple(turn for part in PARTS.get(type(record), ()) for turn in getattr(record, part))


def asked(record: Record) -> Document:
    """Return what a record asks, as a document whose question that is."""
    return Conversation(record.prompt, record.id, record.tools) if isinstance(record, Preference | Feedback) else record


def with_answer(record: Preference | Feedback, answer: tuple[Message, ...]) -> Conversation:
    """Return the prompt of a record with one of its answers."""
    return Conversation(record.prompt + answer, record.id, record.tools)


def taught(record: Preference | Feedback, answer: tuple[Message, ...]) -> Conversation:
    """Return the same as training reads it: the loss is on the answer alone, whoever speaks in the prompt."""
    prompt = tuple(replace(turn, trained=False) for turn in record.prompt)
    return with_answer(replace(record, prompt=prompt), answer)


def texts(record: Record) -> list[str]:
    """Return all that a record says, in order: the texts of its turns, results of tools among them, and those in
    arguments of calls. The schemas of tools say what could be done, and are left out."""
    if isinstance(record, str):
        return [record]
    found = turns(record)
    if not any(turn.tool_calls for turn in found):  # most have none
        return [turn.content for turn in found]
    return [
        text
        for turn in found
        for text in (turn.content, *(text for call in turn.tool_calls for text in strings(json.loads(call.arguments))))
    ]


def strings(value: Any) -> Iterator[str]:
    """Yield the texts within a JSON value, in order, without its keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def names_in(record: Record) -> list[str]:
    """Return the names of arguments of calls, at any depth."""

    def keys(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from value
            value = [*value.values()]
        if isinstance(value, list):
            for inner in value:
                yield from keys(inner)

    calls = (call for turn in turns(record) for call in turn.tool_calls)
    return [name for call in calls for name in keys(json.loads(call.arguments))]


def with_texts(record: Record, change: Callable[[str], str], change_name: Callable[[str], str] = str) -> Record:
    """Return the record with each of its texts changed; the very same one if nothing changes.

    Args:
        change_name: changes names of arguments.

    Raises:
        ValueError: the answers of a pair become equal.
    """
    if isinstance(record, str):
        return change(record)
    changed = {}
    for part in PARTS[type(record)]:
        old = getattr(record, part)
        new = tuple(change_turn(turn, change, change_name) for turn in old)
        if new != old:
            changed[part] = new
    return replace(record, **changed) if changed else record


def change_turn(turn: Message, change: Callable[[str], str], change_name: Callable[[str], str]) -> Message:
    content = change(turn.content)
    if not turn.tool_calls:
        return turn if content == turn.content else replace(turn, content=content)
    calls = tuple(
        replace(call, arguments=dump_json(with_strings(json.loads(call.arguments), change, change_name)))
        for call in turn.tool_calls
    )
    return replace(turn, content=content, tool_calls=calls)


def with_strings(value: Any, change: Callable[[str], str], change_name: Callable[[str], str] = str) -> Any:
    """Return a JSON value with each text within it changed, which is JSON still. Of keys that become the same, the
    later ones are numbered."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [with_strings(inner, change, change_name) for inner in value]
    if not isinstance(value, dict):
        return value
    fields: dict[str, Any] = {}
    for key, inner in value.items():
        name = new = change_name(key)
        number = 2
        while name in fields:
            name = f"{new} {number}"
            number += 1
        fields[name] = with_strings(inner, change, change_name)
    return fields


def content_of(record: Record) -> dict[str, Any]:
    """Return the row that stands for a record, of plain JSON values: equal for records that teach the same."""
    if isinstance(record, str):
        return {"text": record}
    row: dict[str, Any] = {part: [turn_row(turn) for turn in getattr(record, part)] for part in PARTS[type(record)]}
    if record.tools:
        row["tools"] = [tool.as_dict() for tool in record.tools]
    if isinstance(record, Feedback):
        row["label"] = record.label
    if isinstance(record, Preference):  # an answer that was cut is judged otherwise
        row |= {name: False for name in ENDED if not getattr(record, name)}
    return row


def turn_row(turn: Message) -> dict[str, Any]:
    row = turn.as_dict()
    return row if turn.trained else {**row, "train": False}


def turn_json(turn: Message) -> str:
    """Return a turn of such a row as canonical JSON."""
    if turn.trained and not (turn.tool_calls or turn.tool_call_id or turn.name):
        return said_json(turn)
    return to_canonical_json(turn_row(turn))


def said_json(turn: Message) -> str:
    """Return the role and the content of a turn as canonical JSON. Most turns are no more, and there are millions of
    them: an encoder of objects would take four times as long."""
    return f'{{"content":{encode_basestring_ascii(turn.content)},"role":"{turn.role}"}}'


def row_bytes(record: Record) -> bytes:
    """Return the row that stands for a record, as canonical JSON."""
    if isinstance(record, str):
        return f'{{"text":{encode_basestring_ascii(record)}}}'.encode()
    if isinstance(record, Conversation) and not record.tools:
        return f'{{"messages":[{",".join(map(turn_json, record.messages))}]}}'.encode()
    return to_canonical_json(content_of(record)).encode()
