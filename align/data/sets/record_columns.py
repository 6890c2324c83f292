"""Lossless conversion between records and Arrow columns."""

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
"""Arrow type of a turn. `calls` has its tool calls as lines of JSON, so that they are compared as text. `row` is the
JSON of the whole turn if it has tool calls or is the result of one. Both are mostly null."""
TURNS = pa.list_(TURN)
JSON_TURNS = pa.list_(pa.json_())
"""Arrow type of turns with tool calls in a published data set: JSON objects without empty fields. In structs, every
turn would have null calls, which chat templates take for calls."""
TOOLS = "tools"
"""Name of the column of tools that are available to the assistant: a list of schemas as JSON; null for none."""
PAIR_COLUMNS: Mapping[str, pa.DataType] = {
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
    "posterior": pa.float64(),
}
"""Columns of a preference pair beside its turns. `judged_by` is its `source`, a name that data sets use for files."""
CONTENT: Mapping[str, Mapping[str, pa.DataType]] = {
    DOCUMENTS: {"messages": TURNS, "text": pa.string(), TOOLS: pa.string()},
    PREFERENCES: {"prompt": TURNS, "chosen": TURNS, "rejected": TURNS, TOOLS: pa.string(), **PAIR_COLUMNS},
    FEEDBACK: {"prompt": TURNS, "completion": TURNS, TOOLS: pa.string(), "label": pa.bool_(), "id": pa.string()},
}
"""Kind of records → Arrow type of each column of its content. A document has either `messages` or `text`."""
PARTS: Mapping[str, Sequence[str]] = {
    kind: [name for name, type in columns.items() if type == TURNS] for kind, columns in CONTENT.items()
}
"""Kind of records → names of its columns of turns."""
COMPARED_ROLES: Mapping[str, Sequence[str]] = {
    "both": ("user", "assistant", "tool"),
    "prompts": ("user",),
    "answers": ("assistant",),
}
"""Setting `over` of the search for duplicates → roles of the compared turns. Tool calls of the assistant are included.
System prompts and tools are never compared: thousands of different conversations have the same."""


def records_to_columns(kind: str, records: Sequence[Record]) -> dict[str, pa.Array]:
    """Return records of one kind as Arrow columns, a dictionary from column name to values."""
    columns = {}
    for name, type in CONTENT[kind].items():
        if name == "text":
            values: list[Any] = [record if isinstance(record, str) else None for record in records]
        else:
            attribute = "source" if name == "judged_by" else name
            values = [None if isinstance(record, str) else getattr(record, attribute) for record in records]
        if name == TOOLS:
            values = [dump_json([tool.as_dict() for tool in tools]) if tools else None for tools in values]
        columns[name] = build_turns_array(values) if type == TURNS else pa.array(values, type)
    return columns


def build_turns_array(values: Sequence[Sequence[Message] | None]) -> pa.ListArray:
    """Return an Arrow array with one list of turns per row, and null for a row that is `None`."""
    flat = [turn for turns in values if turns is not None for turn in turns]
    fields = (
        [turn.role for turn in flat],
        [turn.content for turn in flat],
        [turn.trained for turn in flat],
        [format_calls(turn) if turn.tool_calls else None for turn in flat],
        [dump_json(to_turn_row(turn)) if turn.tool_calls or turn.role == "tool" else None for turn in flat],
    )
    arrays = [pa.array(field, type.type) for field, type in zip(fields, TURN, strict=True)]
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([0 if turns is None else len(turns) for turns in values], out=offsets[1:])
    missing = np.array([turns is None for turns in values], bool)
    mask = pa.array(missing) if missing.any() else None
    struct = pa.StructArray.from_arrays(arrays, fields=list(TURN))
    return pa.ListArray.from_arrays(pa.array(offsets), struct, type=TURNS, mask=mask)


def format_calls(turn: Message) -> str:
    """Return the tool calls of a turn as lines of JSON, each with `name` and `arguments`."""
    return "\n".join(
        dump_json({"name": call.name, "arguments": json.loads(call.arguments)}) for call in turn.tool_calls
    )


def parse_tools(value: str | Sequence[str] | None) -> tuple[Tool, ...]:
    """Parse the tool schemas of a row from a JSON list, or from a list of JSON texts. Returns an empty tuple if there
    are none."""
    if not value:
        return ()
    return tuple(map(Tool.from_dict, json.loads(value) if isinstance(value, str) else map(json.loads, value)))


def columns_to_records(kind: str, table: pa.RecordBatch | pa.Table, names: Sequence[str]) -> list[Record]:
    """Return one record per row of a table of one kind; `names` are the ids of documents and feedback. Missing columns
    count as empty.

    Args:
        names: id of each record, for documents and feedback.
    """
    columns: dict[str, Any] = {
        name: parse_turn_lists(table.column(name)) if type == TURNS else table.column(name).to_pylist()
        for name, type in CONTENT[kind].items()
        if name in table.schema.names
    }
    nulls = [None] * table.num_rows
    row_tools = [parse_tools(tools) for tools in columns.pop(TOOLS, nulls)]
    if kind == DOCUMENTS:
        rows = zip(columns.get("messages", nulls), columns.get("text", nulls), names, row_tools, strict=True)
        return [text if turns is None else Conversation(turns, name, tools) for turns, text, name, tools in rows]
    if kind == FEEDBACK:
        rows = zip(
            columns["prompt"],
            columns["completion"],
            columns["label"],
            columns.get("id", names),
            names,
            row_tools,
            strict=True,
        )
        return [
            Feedback(prompt, completion, label, id or name, tools)
            for prompt, completion, label, id, name, tools in rows
        ]
    if "judged_by" in columns:
        columns["source"] = columns.pop("judged_by")
    rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    return [
        Preference(**{name: value for name, value in row.items() if value is not None}, tools=tools)
        for row, tools in zip(rows, row_tools, strict=True)
    ]


def parse_turn_lists(column: pa.Array | pa.ChunkedArray) -> list[tuple[Message, ...] | None]:
    """Return the turns of each row in a column of turn lists, or None for a row that is null."""
    rows = list[tuple[Message, ...] | None]()
    for lists in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        turns = parse_turns(lists.flatten())
        offsets = list_offsets(lists).tolist()
        is_valid = lists.is_valid().to_pylist()
        rows += [
            tuple(turns[start:end]) if valid else None
            for start, end, valid in zip(offsets, offsets[1:], is_valid, strict=False)
        ]
    return rows


def parse_turns(flat: pa.Array) -> list[Message]:
    """Return a flat Arrow array of turns as messages. If no turn has tool calls or results, fields are read column by
    column, which is faster."""
    if not pa.types.is_struct(flat.type):
        return list(map(parse_turn, flat.to_pylist()))
    fields = {field.name: values for field, values in zip(flat.type, flat.flatten(), strict=True)}
    if "row" in fields and fields["row"].null_count < len(flat):
        return list(map(parse_turn, flat.to_pylist()))
    columns = [fields["role"], fields["content"]]
    if "train" in fields:
        columns.append(pc.fill_null(fields["train"], True))
    return list(map(Message, *(column.to_pylist() for column in columns)))


def parse_turn(turn: Mapping[str, Any] | str) -> Message:
    """Return a turn as a message, from a mapping of its fields or from JSON."""
    fields = {"row": turn} if isinstance(turn, str) else turn
    if fields.get("row") is not None:
        fields = json.loads(fields["row"])
    return replace(Message.from_dict(fields), trained=fields.get("train") is not False)


def join_record_texts(kind: str, table: pa.RecordBatch | pa.Table, over: str = "both") -> pa.Array:
    """Return the text of each record as one string, with one line a turn and without system turns. Plain text counts as
    prompt and answer.

    Args:
        over: roles to include: `both`, `prompts` or `answers`, see `COMPARED_ROLES`.
    """
    names = table.schema.names
    texts = [
        join_role_turns(combine_column(table.column(name)), COMPARED_ROLES[over])
        for name in PARTS[kind]
        if name in names
    ]
    if kind != DOCUMENTS:
        return pc.binary_join_element_wise(*texts, "\n") if len(texts) > 1 else texts[0]
    if "text" not in names:
        return texts[0]
    plain_text = combine_column(table.column("text"))
    return pc.if_else(pc.is_valid(table.column("messages")), texts[0], plain_text) if texts else plain_text


def join_complete_texts(table: pa.RecordBatch | pa.Table) -> pa.Array:
    """Return the complete text of each document: all turns with their role and whether they are trained on, and the
    tool schemas."""
    turns = combine_column(table.column("messages"))
    flat = turns.flatten()
    role = flat.field("role")
    labels = pc.if_else(flat.field("train"), role, pc.binary_join_element_wise(role, "not trained on", ", "))
    lines = pc.binary_join_element_wise(labels, append_calls(flat), ": ")
    lists = pa.ListArray.from_arrays(pa.array(list_offsets(turns), pa.int32()), lines)
    texts = pc.binary_join(lists, "\n")
    tools = combine_column(table.column(TOOLS))
    if tools.null_count < len(tools):
        texts = pc.if_else(pc.is_valid(tools), pc.binary_join_element_wise(texts, tools, "\n"), texts)
    return pc.if_else(pc.is_valid(turns), texts, combine_column(table.column("text")))


def append_calls(flat: pa.StructArray) -> pa.Array:
    """Return the content of each turn, followed by its tool calls as lines of JSON."""
    content = flat.field("content")
    calls = flat.field("calls")
    if calls.null_count == len(calls):  # the common case
        return content
    return pc.if_else(pc.is_valid(calls), pc.binary_join_element_wise(content, calls, "\n"), content)


def combine_column(column: pa.Array | pa.ChunkedArray) -> Any:
    """Return a column as a single array, with its chunks combined."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def join_role_turns(turns: pa.ListArray, roles: Sequence[str]) -> pa.Array:
    """Return the contents of each record's turns with the given roles, joined by line breaks, or an empty text if there
    are none."""
    flat = turns.flatten()
    has_role = pc.is_in(flat.field("role"), value_set=pa.array(roles))
    turns_before = np.append(0, np.cumsum(has_role.to_numpy(zero_copy_only=False)))
    offsets = pa.array(turns_before[list_offsets(turns)], pa.int32())
    return pc.binary_join(pa.ListArray.from_arrays(offsets, append_calls(flat).filter(has_role)), "\n")


def list_offsets(lists: pa.ListArray) -> ndarray:
    """Return the offset of each list in the flattened values, and the end of the last one; int64 (N + 1). A null list
    is empty."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return np.append(0, np.cumsum(lengths, dtype=np.int64))


def count_turns(kind: str, table: pa.RecordBatch | pa.Table) -> ndarray:
    """Return the number of turns of each record, int64 (N). Plain text counts as one turn."""
    counts = [np.diff(list_offsets(combine_column(table.column(name)))) for name in PARTS[kind]]
    return np.maximum(np.sum(counts, axis=0), 1)
