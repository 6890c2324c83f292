"""Rows to imitate, as documents: conversations in the field's common shapes, and plain text.

A row is recognised by its columns:

    messages                          OpenAI's, TRL's: a list of {role, content}
    conversations                     ShareGPT's: a list of {from, value}, or of messages
    prompt [completion|response|chosen]   texts, or lists of messages
    instruction [input] [output] [history]   Alpaca's
    text                              plain text
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align.data.formats.json_lines import json_lines
from align.data.reasoning import CLOSE, answer_alone, reasoning_length
from align.data.records.bad_rows import BadRows
from align.data.records.messages import (
    EMPTY,
    check_row,
    check_weight,
    message_of,
    messages_of,
    refused,
    with_system_column,
)
from align.errors import InputError, require
from align.types import Conversation, Document, Message

Placed = list[tuple[str, Message]]
"""Messages, each with the place in its row that its text stands at, for errors to name."""
TEXT = "text"
ANSWERS = ("completion", "response", "chosen")
SHARE_GPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
"""Who speaks in ShareGPT's rows and their kin → the role. Other names are roles."""


def read_documents(path: Path, field: str = "data.path", skips: bool = False, answered: bool = False) -> list[Document]:
    """The documents of a file, in its order.

    Args:
        field: what the user calls the file.
        skips: rows that are refused are left out. Without, the file is refused.
        answered: a question has to have an answer beside it, in a column that may be null: without, a misspelt column
            would make questions of rows to train on.

    Raises:
        InputError: there is no row, or rows say nothing to learn from, or what cannot be kept: names file and row.
    """
    bad_rows, found = BadRows(skips), list[Document]()
    for number, row in bad_rows.good(json_lines(path, field)):
        with bad_rows:
            found.append(document_of(row, f"{path}, row {number}", f"{path.name}:{number}", answered))
    bad_rows.settle(path, len(found))
    require(bool(found), field, str(path), "is empty", "Give at least one row.")
    return found


def document_of(row: Mapping[str, Any], where: str, id: str, answered: bool = False) -> Document:
    """One row as a document, see `read_documents`. Where a row has `text` beside a conversation, that is its rendering,
    and the conversation counts."""
    check_row(row, where)
    check_weight(row, where)
    there = [column for column in (*SHAPES, TEXT) if column in row]
    shape = next((column for column in there if row[column] is not None), there[0] if there else "")
    if not shape:
        raise InputError(
            f"{where}, columns", ", ".join(map(str, row)) or "(none)", "there is nothing to learn from among them",
            "Give `messages`, `prompt` with `completion`, or `text`; docs/data-formats.md has every shape.",
        )  # fmt: skip
    if shape == TEXT:
        return plain_text(row, where)
    read, answers = SHAPES[shape]
    placed = read(row, where)
    if answered and answers and not any(name in row for name in answers):
        problem = "there is no answer among them"
        raise refused(where, "columns", ", ".join(map(str, row)), problem, f"Call it {' or '.join(answers)}.")
    for place, message in placed:
        check_said(place, message, where)
    return Conversation(with_system_column(tuple(message for _, message in placed), row, where), id)


def plain_text(row: Mapping[str, Any], where: str) -> str:
    """What a row of plain text says."""
    text, system = row["text"], row.get("system")
    if not isinstance(text, str) or not text.strip():
        problem = "is empty" if isinstance(text, str | None) else "is no text"
        raise refused(where, "text", text, problem, "Give its text, or leave the row out.")
    require(not system, f"{where}, system", system, "stands beside plain text", "Give `messages`.")
    return text


def check_said(place: str, message: Message, where: str) -> None:
    """Raises: InputError: a turn that counts says nothing."""
    content = message.content
    said = answer_alone(content) if message.role == "assistant" else content
    if said.strip() or message.role == "system" or not message.trained:
        return
    if message.role != "assistant":
        raise refused(where, place, content, f"the {message.role}'s turn is empty", "Leave the row out.")
    problem = "the assistant's turn is empty"
    if content.strip():
        problem = f"the assistant's turn is reasoning without its end, {CLOSE}"
        if reasoning_length(content):
            problem = "the assistant's turn is reasoning alone"
    raise refused(where, place, content, problem, EMPTY)


def listed(value: Any, where: str, column: str) -> Placed:
    """A list of messages."""
    messages = messages_of(value, where, column)
    return [(f"{column}[{i}].content", message) for i, message in enumerate(messages)]


def share_gpt(value: Any, where: str, column: str) -> Placed:
    """A list of `{from, value}`, ShareGPT's, or of messages."""
    if not isinstance(value, list) or not any(isinstance(turn, Mapping) and "from" in turn for turn in value):
        return listed(value, where, column)
    placed = []
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping) or "from" not in turn:
            raise refused(where, f"{column}[{i}]", turn, "is no turn", "Write a list of {from, value}.")
        rest = {name: given for name, given in turn.items() if name not in ("from", "value")}
        role = SHARE_GPT.get(str(turn["from"]), turn["from"])
        said = {"content": turn["value"]} if "value" in turn else {}
        placed.append((f"{column}[{i}].value", message_of({**rest, "role": role, **said}, where, f"{column}[{i}]")))
    return placed


def asked_and_answered(row: Mapping[str, Any], where: str) -> Placed:
    """The turns of a `prompt` and of its answer, in whichever column that stands; of the prompt alone where there is
    none."""
    given = {name: row[name] for name in ANSWERS if row.get(name) is not None}
    if len({repr(value) for value in given.values()}) > 1:
        problem = f"has several answers ({', '.join(given)})"
        raise refused(where, "prompt", row["prompt"], problem, "Keep one of these columns.")
    asked = turns_of(row["prompt"], "user", where, "prompt")
    name = next(iter(given), ANSWERS[0])
    answered = turns_of(given.get(name), "assistant", where, name)
    require(bool(asked), f"{where}, prompt", row["prompt"], "asks nothing", "Give its text.")
    if [message for _, message in answered[: len(asked)]] == [message for _, message in asked]:
        answered = answered[len(asked) :]  # UltraFeedback's `chosen` repeats the prompt
    return [*asked, *answered]


def turns_of(value: Any, role: str, where: str, column: str) -> Placed:
    """Text as one turn of `role`, a list of messages as it is, nothing as no turn."""
    if value is None:
        return []
    return [(column, Message(role, value))] if isinstance(value, str) else listed(value, where, column)


def alpaca(row: Mapping[str, Any], where: str) -> Placed:
    """An `instruction`, with its `input` on the lines below it, and the `output`; `history`, pairs of a question and an
    answer, in front."""
    texts = {name: row.get(name) for name in ("instruction", "input", "output")}
    for name, text in texts.items():
        if not isinstance(text, str | None) or (name == "instruction" and text is None):
            raise refused(where, name, text, "is no text", "Give its text, or leave the row out.")
    turns: Placed = []
    for i, pair in enumerate(row.get("history") or ()):
        place, texts_of_it = f"history[{i}]", pair if isinstance(pair, list) else []
        if len(texts_of_it) != 2 or not all(isinstance(text, str) for text in texts_of_it):
            raise refused(where, place, pair, "is no pair of texts", "Write [question, answer].")
        turns += [(place, Message("user", texts_of_it[0])), (place, Message("assistant", texts_of_it[1]))]
    asked = "\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    turns.append(("instruction", Message("user", asked)))
    if texts["output"] is not None:
        turns.append(("output", Message("assistant", texts["output"])))
    return turns


SHAPES: Mapping[str, tuple[Callable[[Mapping[str, Any], str], Placed], tuple[str, ...]]] = {
    "messages": (lambda row, where: listed(row["messages"], where, "messages"), ()),
    "conversations": (lambda row, where: share_gpt(row["conversations"], where, "conversations"), ()),
    "prompt": (asked_and_answered, ANSWERS),
    "instruction": (alpaca, ("output",)),
}
"""Column that a conversation's shape is recognised by → what reads it, and the columns that its answer may stand in. Of
several the first counts that is not null: data sets fill the columns of other rows with null."""
