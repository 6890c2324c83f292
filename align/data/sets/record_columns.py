"""Records as columns of Arrow, and columns as records: nothing of a record is lost on the way there and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy import ndarray

from align.core.types import Conversation, Feedback, Message, Preference, Record, Tool, dump_json
from align.data.read.content import DOCUMENTS, FEEDBACK, PREFERENCES, to_turn_row

pc: Any = pyarrow.compute  # whose functions are made when it is imported

TURN = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("train", pa.bool_()),
        ("calls", pa.string()),
        ("row", pa.string()),
    ]
)
"""Of a turn. `calls` is what it calls, as JSON, a line each, so that it is compared as a text is; `row` is the JSON of
the whole turn if it calls tools or is the result of one. Both are null mostly."""
TURNS = pa.list_(TURN)
SAID = pa.list_(pa.json_())
"""Turns of which some call tools, as rows write them: JSON objects, in which only those fields stand that say
something. In structs each turn would have null calls, which chat templates take for calls."""
TOOLS = "tools"
"""The column of what records offer to the assistant: a list of schemas as JSON; null for none."""
ABOUT_PAIRS: Mapping[str, pa.DataType] = {
    "id": pa.string(),
    "group_id": pa.string(),
    "margin": pa.float64(),
    "annotator": pa.string(),
    "judged_by": pa.string(),
    "strength": pa.int64(),
    "guideline_version": pa.string(),
    "created_at": pa.string(),
    "chosen_ended": pa.bool_(),
    "rejected_ended": pa.bool_(),
    "scorer": pa.string(),
}
"""Of a preference pair, beside its turns. `judged_by` is its `source`: a data set calls a file of rows by that name."""
CONTENT: Mapping[str, Mapping[str, pa.DataType]] = {
    DOCUMENTS: {"messages": TURNS, "text": pa.string(), TOOLS: pa.string()},
    PREFERENCES: {"prompt": TURNS, "chosen": TURNS, "rejected": TURNS, TOOLS: pa.string(), **ABOUT_PAIRS},
    FEEDBACK: {"prompt": TURNS, "completion": TURNS, TOOLS: pa.string(), "label": pa.bool_(), "id": pa.string()},
}
"""Kind of records → its columns. A document has either `messages` or `text`."""
PARTS: Mapping[str, Sequence[str]] = {
    kind: [name for name, type in columns.items() if type == TURNS] for kind, columns in CONTENT.items()
}
"""Kind of records → its columns of turns."""
OVER: Mapping[str, Sequence[str]] = {
    "both": ("user", "assistant", "tool"),
    "prompts": ("user",),
    "answers": ("assistant",),
}
"""What is compared to find duplicates → whose turns, those of the assistant with its calls. A system prompt stands in
front of thousands of conversations that are not the same, as tools do, so they are never compared."""


def columns_of(kind: str, records: Sequence[Record]) -> dict[str, pa.Array]:
    """Return column → its values, of records of one kind."""
    columns = {}
    for name, type in CONTENT[kind].items():
        if name == "text":
            values: list[Any] = [record if isinstance(record, str) else None for record in records]
        else:
            attribute = "source" if name == "judged_by" else name
            values = [None if isinstance(record, str) else getattr(record, attribute) for record in records]
        if name == TOOLS:
            values = [dump_json([tool.as_dict() for tool in tools]) if tools else None for tools in values]
        columns[name] = turns_array(values) if type == TURNS else pa.array(values, type)
    return columns


def turns_array(values: Sequence[Sequence[Message] | None]) -> pa.ListArray:
    """Return lists of turns; null for None."""
    flat = [turn for turns in values if turns is not None for turn in turns]
    fields = (
        [turn.role for turn in flat],
        [turn.content for turn in flat],
        [turn.trained for turn in flat],
        [calls_text(turn) if turn.tool_calls else None for turn in flat],
        [dump_json(to_turn_row(turn)) if turn.tool_calls or turn.role == "tool" else None for turn in flat],
    )
    arrays = [pa.array(field, type.type) for field, type in zip(fields, TURN, strict=True)]
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([0 if turns is None else len(turns) for turns in values], out=offsets[1:])
    missing = np.array([turns is None for turns in values], bool)
    mask = pa.array(missing) if missing.any() else None
    struct = pa.StructArray.from_arrays(arrays, fields=list(TURN))
    return pa.ListArray.from_arrays(pa.array(offsets), struct, type=TURNS, mask=mask)


def calls_text(turn: Message) -> str:
    """Return the calls of a turn, a line each."""
    return "\n".join(
        dump_json({"name": call.name, "arguments": json.loads(call.arguments)}) for call in turn.tool_calls
    )


def tools_in(value: str | Sequence[str] | None) -> tuple[Tool, ...]:
    """Return the tools of a row, from one JSON text or from a list of them."""
    if not value:
        return ()
    return tuple(map(Tool.from_dict, json.loads(value) if isinstance(value, str) else map(json.loads, value)))


def records_of(kind: str, table: pa.RecordBatch | pa.Table, names: Sequence[str]) -> list[Record]:
    """Return the records of such columns. Columns that are not there count as empty.

    Args:
        names: for documents and feedback: the id of each.
    """
    there = table.schema.names
    read: dict[str, Any] = {
        name: turns_in(table.column(name)) if type == TURNS else table.column(name).to_pylist()
        for name, type in CONTENT[kind].items()
        if name in there
    }
    none = [None] * table.num_rows
    offered = [tools_in(tools) for tools in read.pop(TOOLS, none)]
    if kind == DOCUMENTS:
        rows = zip(read.get("messages", none), read.get("text", none), names, offered, strict=True)
        return [text if turns is None else Conversation(turns, name, tools) for turns, text, name, tools in rows]
    if kind == FEEDBACK:
        rows = zip(
            read["prompt"], read["completion"], read["label"], read.get("id", names), names, offered, strict=True
        )
        return [Feedback(p, c, label, id or name, tools) for p, c, label, id, name, tools in rows]
    if "judged_by" in read:
        read["source"] = read.pop("judged_by")
    rows = (dict(zip(read, values, strict=True)) for values in zip(*read.values(), strict=True))
    return [
        Preference(**{name: value for name, value in row.items() if value is not None}, tools=tools)
        for row, tools in zip(rows, offered, strict=True)
    ]


def turns_in(column: pa.Array | pa.ChunkedArray) -> list[tuple[Message, ...] | None]:
    """Return the turns of each row; None for null."""
    rows = list[tuple[Message, ...] | None]()
    for lists in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        turns = messages_in(lists.flatten())
        offsets = list_offsets(lists).tolist()
        there = lists.is_valid().to_pylist()
        rows += [
            tuple(turns[start:end]) if valid else None
            for start, end, valid in zip(offsets, offsets[1:], there, strict=False)
        ]
    return rows


def messages_in(flat: pa.Array) -> list[Message]:
    """Return turns one behind the other. If none has calls or results, fields are read as columns, and not turn by
    turn."""
    if not pa.types.is_struct(flat.type):
        return list(map(turn_of, flat.to_pylist()))
    fields = {field.name: values for field, values in zip(flat.type, flat.flatten(), strict=True)}
    if "row" in fields and fields["row"].null_count < len(flat):
        return list(map(turn_of, flat.to_pylist()))
    columns = [fields["role"], fields["content"]]
    if "train" in fields:
        columns.append(pc.fill_null(fields["train"], True))
    return list(map(Message, *(column.to_pylist() for column in columns)))


def turn_of(turn: Mapping[str, Any] | str) -> Message:
    """Return a turn, from the fields of `TURN` or from the JSON of `SAID`."""
    fields = {"row": turn} if isinstance(turn, str) else turn
    if fields.get("row") is not None:
        fields = json.loads(fields["row"])
    return replace(Message.from_dict(fields), trained=fields.get("train") is not False)


def texts_of(kind: str, table: pa.RecordBatch | pa.Table, over: str = "both") -> pa.Array:
    """Return what each record says, a turn a line, without its system turns; plain text counts as what is answered and
    as what is asked alike.

    Args:
        over: `both`, `prompts` or `answers`, see `OVER`.
    """
    names = table.schema.names
    said = [joined_turns(whole(table.column(name)), OVER[over]) for name in PARTS[kind] if name in names]
    if kind != DOCUMENTS:
        return pc.binary_join_element_wise(*said, "\n") if len(said) > 1 else said[0]
    if "text" not in names:
        return said[0]
    text = whole(table.column("text"))
    return pc.if_else(pc.is_valid(table.column("messages")), said[0], text) if said else text


def whole_texts(table: pa.RecordBatch | pa.Table) -> pa.Array:
    """Return all that each document says, system turns and tools included, who says it, and whether it is trained
    on."""
    turns = whole(table.column("messages"))
    flat = turns.flatten()
    role = flat.field("role")
    who = pc.if_else(flat.field("train"), role, pc.binary_join_element_wise(role, "not trained on", ", "))
    spoken = pc.binary_join_element_wise(who, with_calls(flat), ": ")
    lists = pa.ListArray.from_arrays(pa.array(list_offsets(turns), pa.int32()), spoken)
    said = pc.binary_join(lists, "\n")
    tools = whole(table.column(TOOLS))
    if tools.null_count < len(tools):
        said = pc.if_else(pc.is_valid(tools), pc.binary_join_element_wise(said, tools, "\n"), said)
    return pc.if_else(pc.is_valid(turns), said, whole(table.column("text")))


def with_calls(flat: pa.StructArray) -> pa.Array:
    """Return the contents of turns, with what they call on the lines below."""
    content = flat.field("content")
    calls = flat.field("calls")
    if calls.null_count == len(calls):  # mostly
        return content
    return pc.if_else(pc.is_valid(calls), pc.binary_join_element_wise(content, calls, "\n"), content)


def whole(column: pa.Array | pa.ChunkedArray) -> Any:
    """Return a column in one piece."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def joined_turns(turns: pa.ListArray, roles: Sequence[str]) -> pa.Array:
    """Return the contents of these roles' turns, joined by line breaks; empty if there is none."""
    flat = turns.flatten()
    wanted = pc.is_in(flat.field("role"), value_set=pa.array(roles))
    kept = np.append(0, np.cumsum(wanted.to_numpy(zero_copy_only=False)))
    offsets = pa.array(kept[list_offsets(turns)], pa.int32())
    return pc.binary_join(pa.ListArray.from_arrays(offsets, with_calls(flat).filter(wanted)), "\n")


def list_offsets(lists: pa.ListArray) -> ndarray:
    """Return where each list begins in `flatten()`, and where the last one ends; int64 (N + 1). A null list is
    empty."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return np.append(0, np.cumsum(lengths, dtype=np.int64))


def turn_counts(kind: str, table: pa.RecordBatch | pa.Table) -> ndarray:
    """Return the turns of each record, int64 (N); 1 for plain text."""
    counts = [np.diff(list_offsets(whole(table.column(name)))) for name in PARTS[kind]]
    return np.maximum(np.sum(counts, axis=0), 1)
