"""Records as columns of Arrow, and columns as records: nothing of a record is lost on the way there and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from align.data.records.content import DOCUMENTS, FEEDBACK, PREFERENCES
from align.types import Conversation, Feedback, Message, Preference, Record

pc: Any = pyarrow.compute  # whose functions are made when it is imported

TURN = pa.struct([("role", pa.string()), ("content", pa.string()), ("train", pa.bool_())])
TURNS = pa.list_(TURN)
ABOUT_PAIRS: Mapping[str, pa.DataType] = {
    "id": pa.string(), "group_id": pa.string(), "margin": pa.float64(), "annotator": pa.string(),
    "judged_by": pa.string(), "strength": pa.int64(), "guideline_version": pa.string(), "created_at": pa.string(),
    "chosen_ended": pa.bool_(), "rejected_ended": pa.bool_(), "scorer": pa.string(),
}  # fmt: skip
"""Of a preference pair, beside its turns. `judged_by` is its `source`: a data set calls a file of rows by that name."""
CONTENT: Mapping[str, Mapping[str, pa.DataType]] = {
    DOCUMENTS: {"messages": TURNS, "text": pa.string()},
    PREFERENCES: {"prompt": TURNS, "chosen": TURNS, "rejected": TURNS, **ABOUT_PAIRS},
    FEEDBACK: {"prompt": TURNS, "completion": TURNS, "label": pa.bool_(), "id": pa.string()},
}
"""Kind of records → its columns. A document has either `messages` or `text`."""
OVER: Mapping[str, frozenset[str]] = {
    "both": frozenset({"user", "assistant"}), "prompts": frozenset({"user"}), "answers": frozenset({"assistant"}),
}  # fmt: skip
"""What is compared to find duplicates → whose turns. A system prompt stands in front of thousands of conversations
that are not the same, so it is never compared."""


def columns_of(kind: str, records: Sequence[Record]) -> dict[str, pa.Array]:
    """Column → its values, of records of one kind."""
    if kind == DOCUMENTS:
        texts = [record if isinstance(record, str) else None for record in records]
        messages = [None if isinstance(record, str) else record.messages for record in records]  # type: ignore[union-attr]
        return {"messages": turns_array(messages), "text": pa.array(texts, pa.string())}
    made = {}
    for name, type in CONTENT[kind].items():
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
        ],
        fields=list(TURN),
    )
    missing = np.array([turns is None for turns in values], bool)
    mask = pa.array(missing) if missing.any() else None
    return pa.ListArray.from_arrays(pa.array(offsets), struct, type=TURNS, mask=mask)


def records_of(kind: str, table: pa.RecordBatch | pa.Table, names: Sequence[str]) -> list[Record]:
    """The records of such columns. Columns that are not there count as empty.

    Args:
        names: for documents and feedback: the id of each.
    """
    there = set(table.schema.names)
    read = {name: table.column(name).to_pylist() for name in CONTENT[kind] if name in there}
    none = [None] * table.num_rows
    if kind == DOCUMENTS:
        both = zip(read.get("messages", none), read.get("text", none), names, strict=True)
        return [text if turns is None else Conversation(turns_of(turns), name) for turns, text, name in both]
    if kind == FEEDBACK:
        rows = zip(read["prompt"], read["completion"], read["label"], read.get("id", names), names, strict=True)
        return [Feedback(turns_of(p), turns_of(c), label, id or name) for p, c, label, id, name in rows]
    return [pair_of({name: values[i] for name, values in read.items()}) for i in range(table.num_rows)]


def pair_of(row: Mapping[str, Any]) -> Preference:
    sides = {name: turns_of(row[name]) for name in ("prompt", "chosen", "rejected")}
    about = {name: row[name] for name in ABOUT_PAIRS if row.get(name) is not None}
    if "judged_by" in about:
        about["source"] = about.pop("judged_by")
    return Preference(**sides, **about)


def turns_of(value: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    return tuple(Message(turn["role"], turn["content"], turn.get("train") is not False) for turn in value)


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
    """All that each document says, system turns included, who says it, and whether it is trained on."""
    turns = whole(table.column("messages"))
    flat = turns.flatten()
    role = flat.field("role")
    who = pc.if_else(flat.field("train"), role, pc.binary_join_element_wise(role, "not trained on", ", "))
    spoken = pc.binary_join_element_wise(who, flat.field("content"), ": ")
    lists = pa.ListArray.from_arrays(pa.array(list_offsets(turns).astype(np.int32)), spoken)
    return pc.if_else(pc.is_valid(turns), pc.binary_join(lists, "\n"), whole(table.column("text")))


def whole(column: pa.Array | pa.ChunkedArray) -> Any:
    """A column in one piece."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def joined_turns(turns: pa.ListArray, roles: frozenset[str]) -> pa.Array:
    """The contents of these roles' turns, joined by line breaks; empty where there is none."""
    flat, offsets = turns.flatten(), list_offsets(turns)
    wanted = pc.is_in(flat.field("role"), value_set=pa.array(sorted(roles)))
    kept = np.concatenate([[0], np.cumsum(wanted.to_numpy(zero_copy_only=False))])
    contents = flat.field("content").filter(wanted)
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
