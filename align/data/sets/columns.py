"""Records as columns of Arrow, and columns as records: nothing of a record is lost on the way there and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from align.data.read.content import DOCUMENTS, FEEDBACK, PREFERENCES
from align.types import Conversation, Feedback, Message, Preference, Record, Tool, ToolCall, json_text

pc: Any = pyarrow.compute  # whose functions are made when it is imported

TURN = pa.struct([
    ("role", pa.string()), ("content", pa.string()), ("train", pa.bool_()), ("calls", pa.string()),
    ("ids", pa.string()),
])  # fmt: skip
"""Of a turn. `calls` is what it calls, as JSON, a line each, so that it is compared as a text is; `ids` is JSON too:
the ids of these calls, or which call the result of a tool answers. Both are null mostly."""
TURNS = pa.list_(TURN)
SAID = pa.list_(pa.json_())
"""Turns of which some call tools, as rows write them: JSON objects, in which only those fields stand that say
something. In structs each turn would have null calls, which chat templates take for calls."""
TOOLS = "tools"
"""The column of what records offer to the assistant: a list of schemas as JSON; null for none."""
ABOUT_PAIRS: Mapping[str, pa.DataType] = {
    "id": pa.string(), "group_id": pa.string(), "margin": pa.float64(), "annotator": pa.string(),
    "judged_by": pa.string(), "strength": pa.int64(), "guideline_version": pa.string(), "created_at": pa.string(),
    "chosen_ended": pa.bool_(), "rejected_ended": pa.bool_(), "scorer": pa.string(),
}  # fmt: skip
"""Of a preference pair, beside its turns. `judged_by` is its `source`: a data set calls a file of rows by that name."""
CONTENT: Mapping[str, Mapping[str, pa.DataType]] = {
    DOCUMENTS: {"messages": TURNS, "text": pa.string(), TOOLS: pa.string()},
    PREFERENCES: {"prompt": TURNS, "chosen": TURNS, "rejected": TURNS, TOOLS: pa.string(), **ABOUT_PAIRS},
    FEEDBACK: {
        "prompt": TURNS,
        "completion": TURNS,
        TOOLS: pa.string(),
        "label": pa.bool_(),
        "id": pa.string(),
    },
}
"""Kind of records → its columns. A document has either `messages` or `text`."""
OVER: Mapping[str, frozenset[str]] = {
    "both": frozenset({"user", "assistant", "tool"}), "prompts": frozenset({"user"}),
    "answers": frozenset({"assistant"}),
}  # fmt: skip
"""What is compared to find duplicates → whose turns, those of the assistant with its calls. A system prompt stands in
front of thousands of conversations that are not the same, as tools do, so they are never compared."""


def columns_of(kind: str, records: Sequence[Record]) -> dict[str, pa.Array]:
    """Column → its values, of records of one kind."""
    if kind == DOCUMENTS:
        texts = [record if isinstance(record, str) else None for record in records]
        messages = [None if isinstance(record, str) else record.messages for record in records]  # type: ignore[union-attr]
        offered = tools_array([() if isinstance(record, str) else record.tools for record in records])  # type: ignore[union-attr]
        return {"messages": turns_array(messages), "text": pa.array(texts, pa.string()), TOOLS: offered}
    made = {}
    for name, type in CONTENT[kind].items():
        if name == TOOLS:
            made[name] = tools_array([record.tools for record in records])  # type: ignore[union-attr]
            continue
        values = [getattr(record, "source" if name == "judged_by" else name) for record in records]
        made[name] = turns_array(values) if type == TURNS else pa.array(values, type)
    return made


def turns_array(values: Sequence[Sequence[Message] | None]) -> pa.ListArray:
    """Lists of turns; null for None."""
    flat = [turn for turns in values if turns is not None for turn in turns]
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([0 if turns is None else len(turns) for turns in values], out=offsets[1:])
    struct = pa.StructArray.from_arrays(
        [
            pa.array([turn.role for turn in flat], pa.string()),
            pa.array([turn.content for turn in flat], pa.string()),
            pa.array([turn.trained for turn in flat], pa.bool_()),
            pa.array([calls_text(turn) if turn.tool_calls else None for turn in flat], pa.string()),
            pa.array(
                [ids_text(turn) if turn.tool_calls or turn.role == "tool" else None for turn in flat], pa.string()
            ),
        ],
        fields=list(TURN),
    )
    missing = np.array([turns is None for turns in values], bool)
    mask = pa.array(missing) if missing.any() else None
    return pa.ListArray.from_arrays(pa.array(offsets), struct, type=TURNS, mask=mask)


def calls_text(turn: Message) -> str:
    """The calls of a turn, a line each."""
    return "\n".join(
        json_text({"name": call.name, "arguments": json.loads(call.arguments)}) for call in turn.tool_calls
    )


def ids_text(turn: Message) -> str | None:
    """What a turn's calls are named by, or which call it answers; None for nothing."""
    if turn.role == "tool":
        named = {name: value for name in ("tool_call_id", "name") if (value := getattr(turn, name))}
        return json_text(named) if named else None
    ids = [call.id for call in turn.tool_calls]
    return json_text(ids) if any(ids) else None


def tools_array(values: Sequence[Sequence[Tool]]) -> pa.Array:
    return pa.array([json_text([tool.as_dict() for tool in tools]) if tools else None for tools in values], pa.string())


def tools_in(value: str | Sequence[str] | None) -> tuple[Tool, ...]:
    """The tools of a row, from one JSON text or from a list of them."""
    if not value:
        return ()
    return tuple(map(Tool.of, json.loads(value) if isinstance(value, str) else map(json.loads, value)))


def records_of(kind: str, table: pa.RecordBatch | pa.Table, names: Sequence[str]) -> list[Record]:
    """The records of such columns. Columns that are not there count as empty.

    Args:
        names: for documents and feedback: the id of each.
    """
    there, none = set(table.schema.names), [None] * table.num_rows
    wanted = {name: type for name, type in CONTENT[kind].items() if name in there}
    read: dict[str, Any] = {
        name: turns_in(table.column(name)) if type == TURNS else table.column(name).to_pylist()
        for name, type in wanted.items()
    }
    if kind == DOCUMENTS:
        rows = zip(read.get("messages", none), read.get("text", none), names, read.get(TOOLS, none), strict=True)
        return [
            text if turns is None else Conversation(turns, name, tools_in(tools)) for turns, text, name, tools in rows
        ]
    if kind == FEEDBACK:
        ids, offered = read.get("id", names), read.get(TOOLS, none)
        rows = zip(read["prompt"], read["completion"], read["label"], ids, names, offered, strict=True)
        return [Feedback(p, c, label, id or name, tools_in(tools)) for p, c, label, id, name, tools in rows]
    return [pair_of({name: values[i] for name, values in read.items()}) for i in range(table.num_rows)]


def named_records(kind: str, table: pa.RecordBatch | pa.Table, sources: Sequence[str]) -> list[tuple[str, Record]]:
    """Rows of a spool as `source:row` and their records, from its columns of the content, `source` and `row`."""
    places = zip(table["source"].to_pylist(), table["row"].to_pylist(), strict=True)
    names = [f"{sources[source]}:{row}" for source, row in places]
    return list(zip(names, records_of(kind, table, names), strict=True))


def pair_of(row: Mapping[str, Any]) -> Preference:
    about = {name: row[name] for name in ABOUT_PAIRS if row.get(name) is not None}
    if "judged_by" in about:
        about["source"] = about.pop("judged_by")
    return Preference(row["prompt"], row["chosen"], row["rejected"], **about, tools=tools_in(row.get(TOOLS)))


def turns_in(column: pa.Array | pa.ChunkedArray) -> list[tuple[Message, ...] | None]:
    """The turns of each row; None for null."""
    found = list[tuple[Message, ...] | None]()
    for lists in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        turns, offsets = messages_in(lists.flatten()), list_offsets(lists).tolist()
        there = lists.is_valid().to_pylist()
        found += [
            tuple(turns[start:end]) if valid else None
            for start, end, valid in zip(offsets, offsets[1:], there, strict=False)
        ]
    return found


def messages_in(flat: pa.Array) -> list[Message]:
    """Turns one behind the other. Where none has calls or results, fields are read as columns, and not turn by turn."""
    if not pa.types.is_struct(flat.type):
        return list(map(turn_of, flat.to_pylist()))
    said = {field.name: values for field, values in zip(flat.type, flat.flatten(), strict=True)}
    if any(said[name].null_count < len(flat) for name in ("calls", "ids") if name in said):
        return list(map(turn_of, flat.to_pylist()))
    role, content = said["role"].to_pylist(), said["content"].to_pylist()
    if "train" not in said:
        return list(map(Message, role, content))
    return [Message(*turn) for turn in zip(role, content, pc.fill_null(said["train"], True).to_pylist(), strict=True)]


def turns_of(value: Sequence[Mapping[str, Any] | str]) -> tuple[Message, ...]:
    return tuple(map(turn_of, value))


def turn_of(turn: Mapping[str, Any] | str) -> Message:
    """A turn, from the fields of `TURN` or from the JSON of `SAID`."""
    if isinstance(turn, str):
        said = json.loads(turn)
        return replace(Message.of(said), trained=said.get("train") is not False)
    trained, calls, ids = turn.get("train") is not False, turn.get("calls"), turn.get("ids")
    if calls is None and ids is None:
        return Message(turn["role"], turn["content"], trained)
    named = json.loads(ids) if ids else None
    if calls is None:
        return Message(turn["role"], turn["content"], trained, **(named or {}))
    made = [json.loads(line) for line in calls.split("\n")]
    called = zip(made, named or [""] * len(made), strict=True)
    return Message(
        turn["role"], turn["content"], trained,
        tuple(ToolCall.of(call["name"], call["arguments"], id) for call, id in called),
    )  # fmt: skip


def texts_of(kind: str, table: pa.RecordBatch | pa.Table, over: str = "both") -> pa.Array:
    """What each record says, a turn a line, without its system turns; plain text counts as what is answered and as what
    is asked alike.

    Args:
        over: `both`, `prompts` or `answers`, see `OVER`.
    """
    parts = [name for name, type in CONTENT[kind].items() if type == TURNS and name in table.schema.names]
    said = [joined_turns(whole(table.column(name)), OVER[over]) for name in parts]
    if kind != DOCUMENTS:
        return pc.binary_join_element_wise(*said, "\n") if len(said) > 1 else said[0]
    text = whole(table.column("text")) if "text" in table.schema.names else None
    if not said:
        assert text is not None
        return text
    return said[0] if text is None else pc.if_else(pc.is_valid(table.column("messages")), said[0], text)


def whole_texts(table: pa.RecordBatch | pa.Table) -> pa.Array:
    """All that each document says, system turns and tools included, who says it, and whether it is trained on."""
    turns = whole(table.column("messages"))
    flat = turns.flatten()
    role = flat.field("role")
    who = pc.if_else(flat.field("train"), role, pc.binary_join_element_wise(role, "not trained on", ", "))
    spoken = pc.binary_join_element_wise(who, with_calls(flat), ": ")
    lists = pa.ListArray.from_arrays(pa.array(list_offsets(turns).astype(np.int32)), spoken)
    said, tools = pc.binary_join(lists, "\n"), whole(table.column(TOOLS))
    if tools.null_count < len(tools):
        said = pc.if_else(pc.is_valid(tools), pc.binary_join_element_wise(said, tools, "\n"), said)
    return pc.if_else(pc.is_valid(turns), said, whole(table.column("text")))


def with_calls(flat: pa.StructArray) -> pa.Array:
    """The contents of turns, with what they call on the lines below."""
    content, calls = flat.field("content"), flat.field("calls")
    if calls.null_count == len(calls):  # nobody calls anything, mostly
        return content
    return pc.if_else(pc.is_valid(calls), pc.binary_join_element_wise(content, calls, "\n"), content)


def whole(column: pa.Array | pa.ChunkedArray) -> Any:
    """A column in one piece."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def joined_turns(turns: pa.ListArray, roles: frozenset[str]) -> pa.Array:
    """The contents of these roles' turns, joined by line breaks; empty where there is none."""
    flat, offsets = turns.flatten(), list_offsets(turns)
    wanted = pc.is_in(flat.field("role"), value_set=pa.array(sorted(roles)))
    kept = np.concatenate([[0], np.cumsum(wanted.to_numpy(zero_copy_only=False))])
    contents = with_calls(flat).filter(wanted)
    lists = pa.ListArray.from_arrays(pa.array(kept[offsets].astype(np.int32)), contents)
    return pc.binary_join(lists, "\n")


def list_offsets(lists: pa.ListArray) -> np.ndarray:
    """Where each list begins in `flatten()`, and where the last one ends; int64 (N + 1). A null list is empty."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def turn_counts(kind: str, table: pa.RecordBatch | pa.Table) -> np.ndarray:
    """Turns of each record, int64 (N); 1 for plain text."""
    parts = [name for name, type in CONTENT[kind].items() if type == TURNS]
    counts = [np.diff(list_offsets(whole(table.column(name)))) for name in parts]
    return np.maximum(np.sum(counts, axis=0), 1)
