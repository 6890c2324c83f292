"""Access to the turns and texts of a record, and its content as canonical JSON.

A content row holds the content alone. Attributes about the record (`id`, `annotator`, `source`, …) are left out: two
rows that teach the same have the same content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from json.encoder import encode_basestring_ascii
from typing import Any

from align.core.chain import to_canonical_json
from align.core.types import Conversation, Document, Feedback, Message, Preference, Record, dump_json

DOCUMENTS = "documents"
PREFERENCES = "preferences"
FEEDBACK = "feedback"
"""The kinds of records. All records of a data set are of one kind."""
MESSAGE_ATTRIBUTES: Mapping[type, tuple[str, ...]] = {
    Conversation: ("messages",),
    Preference: ("prompt", "chosen", "rejected"),
    Feedback: ("prompt", "completion"),
}
"""Attributes of a record that hold messages."""
ENDED_FLAGS = ("chosen_ended", "rejected_ended")


def split_names(names: str) -> tuple[str, ...]:
    return tuple(names.split())


def get_record_kind(record: Record) -> str:
    """Return the kind of a record: `documents`, `preferences` or `feedback`."""
    return {Preference: PREFERENCES, Feedback: FEEDBACK}.get(type(record), DOCUMENTS)


def list_turns(record: Record) -> tuple[Message, ...]:
    """Return all messages of a record as one tuple: for a pair, its prompt, chosen and rejected messages in a row.
    Plain text gives an empty tuple."""
    return tuple(turn for part in MESSAGE_ATTRIBUTES.get(type(record), ()) for turn in getattr(record, part))


def extract_prompt(record: Record) -> Document:
    """Return the prompt of a preference pair or a labelled answer as a conversation, and any other record as it is."""
    return Conversation(record.prompt, record.id, record.tools) if isinstance(record, Preference | Feedback) else record


def join_answer(record: Preference | Feedback, answer: tuple[Message, ...]) -> Conversation:
    """Return a conversation that consists of a record's prompt and `answer`."""
    return Conversation(record.prompt + answer, record.id, record.tools)


def join_trained_answer(record: Preference | Feedback, answer: tuple[Message, ...]) -> Conversation:
    """Return a conversation of a record's prompt and `answer`, with all prompt turns excluded from the loss."""
    prompt = tuple(replace(turn, trained=False) for turn in record.prompt)
    return join_answer(replace(record, prompt=prompt), answer)


def list_texts(record: Record) -> list[str]:
    """Return the texts of a record in order: the contents of all turns, and the strings in arguments of tool calls.
    Tool results are included, tool schemas are left out."""
    if isinstance(record, str):
        return [record]
    messages = list_turns(record)
    if not any(turn.tool_calls for turn in messages):  # most have none
        return [turn.content for turn in messages]
    return [
        text
        for turn in messages
        for text in (
            turn.content,
            *(text for call in turn.tool_calls for text in iter_strings(json.loads(call.arguments))),
        )
    ]


def iter_strings(value: Any) -> Iterator[str]:
    """Yield the strings nested within a JSON value in order, without the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from iter_strings(inner)


def list_argument_names(record: Record) -> list[str]:
    """Return the argument names in a record's tool calls, including the keys of nested objects. A name may be
    repeated."""

    def iter_keys(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from value
            value = [*value.values()]
        if isinstance(value, list):
            for inner in value:
                yield from iter_keys(inner)

    calls = (call for turn in list_turns(record) for call in turn.tool_calls)
    return [name for call in calls for name in iter_keys(json.loads(call.arguments))]


def map_texts(record: Record, change: Callable[[str], str], change_name: Callable[[str], str] = str) -> Record:
    """Return a copy of a record with `change` applied to each of its texts. Returns the same object if nothing changes.

    Args:
        change: maps a text to the new one.
        change_name: maps a name of a tool call argument to the new one.

    Raises:
        ValueError: the answers of a pair become equal.
    """
    if isinstance(record, str):
        return change(record)
    changed = {}
    for part in MESSAGE_ATTRIBUTES[type(record)]:
        old = getattr(record, part)
        new = tuple(map_turn(turn, change, change_name) for turn in old)
        if new != old:
            changed[part] = new
    return replace(record, **changed) if changed else record


def map_turn(turn: Message, change: Callable[[str], str], change_name: Callable[[str], str]) -> Message:
    content = change(turn.content)
    if not turn.tool_calls:
        return turn if content == turn.content else replace(turn, content=content)
    calls = tuple(
        replace(call, arguments=dump_json(map_strings(json.loads(call.arguments), change, change_name)))
        for call in turn.tool_calls
    )
    return replace(turn, content=content, tool_calls=calls)


def map_strings(value: Any, change: Callable[[str], str], change_name: Callable[[str], str] = str) -> Any:
    """Return a copy of a JSON value with `change` applied to each string in it, and `change_name` to each key of an
    object. If keys of an object become equal, the later ones get a number."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_strings(inner, change, change_name) for inner in value]
    if not isinstance(value, dict):
        return value
    fields: dict[str, Any] = {}
    for key, inner in value.items():
        name = new = change_name(key)
        number = 2
        while name in fields:
            name = f"{new} {number}"
            number += 1
        fields[name] = map_strings(inner, change, change_name)
    return fields


def to_content_row(record: Record) -> dict[str, Any]:
    """Return a record's content as a JSON object: its text or messages, tools and label, without attributes such as
    `id`. Records that teach the same have equal rows."""
    if isinstance(record, str):
        return {"text": record}
    row: dict[str, Any] = {
        part: [to_turn_row(turn) for turn in getattr(record, part)] for part in MESSAGE_ATTRIBUTES[type(record)]
    }
    if record.tools:
        row["tools"] = [tool.as_dict() for tool in record.tools]
    if isinstance(record, Feedback):
        row["label"] = record.label
    if isinstance(record, Preference):  # an answer that was cut is judged otherwise
        row |= {name: False for name in ENDED_FLAGS if not getattr(record, name)}
    return row


def to_turn_row(turn: Message) -> dict[str, Any]:
    """Return a message as a JSON object, with `train: false` if the message is excluded from the loss."""
    row = turn.as_dict()
    return row if turn.trained else {**row, "train": False}


def encode_turn(turn: Message) -> str:
    """Return a message as canonical JSON, as it stands in a content row."""
    if turn.trained and not (turn.tool_calls or turn.tool_call_id or turn.name):
        return encode_role_and_content(turn)
    return to_canonical_json(to_turn_row(turn))


def encode_role_and_content(turn: Message) -> str:
    """Return a message's role and content as canonical JSON, built without a JSON encoder for speed. Most turns have no
    other field, and a data set has millions of them; a JSON encoder would take four times as long."""
    return f'{{"content":{encode_basestring_ascii(turn.content)},"role":"{turn.role}"}}'


def encode_content_row(record: Record) -> bytes:
    """Return a record's content row, see `to_content_row`, as bytes of canonical JSON."""
    if isinstance(record, str):
        return f'{{"text":{encode_basestring_ascii(record)}}}'.encode()
    if isinstance(record, Conversation) and not record.tools:
        return f'{{"messages":[{",".join(map(encode_turn, record.messages))}]}}'.encode()
    return to_canonical_json(to_content_row(record)).encode()
