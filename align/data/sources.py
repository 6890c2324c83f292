"""Where documents, prompts and pairs come from: the `data` group, read into the records of `align.types`.

A *document* is what supervised training imitates: a `Conversation`, or plain text (`str`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from align.data import chitchat
from align.data.rows import json_rows
from align.errors import InputError, require
from align.run import HUB, Input, file_digest, hub_file
from align.types import Conversation, Message

Document = Conversation | str


@dataclass(frozen=True, slots=True)
class DataSource:
    """Where rows come from.

    Attributes:
        name: `chitchat`, the corpus of the built-in model; `jsonl`, a file; `annotations`, votes.
        path: the file, or `hub:ORG/NAME/FILE`.
        part: of the corpus; None for what the stage needs.
        held_out: the share of a file that is kept for measuring.
        limit: the most rows that are read; None for all.
    """

    name: str
    path: str | None = None
    part: str | None = None
    held_out: float = 0.0
    limit: int | None = None


T = TypeVar("T")
MORE = "Give a file with more rows, or another data.held_out."


def data_record(data: DataSource) -> Input:
    """A data set that lies in a file, as an input of a run.

    Raises:
        InputError: the file is not there.
    """
    path = chitchat.corpus_path() if data.name == "chitchat" else data_file(data)
    if not path.is_file():
        raise InputError("data.path", data.path, "there is no such file", "Give the path of a JSON Lines file.")
    return Input(file_digest(path), path=data.path or data.name)


LICENCES = {"chitchat": "MIT"}


def licence_of(name: str) -> str:
    """The licence of a data set that this package names; empty where nobody says."""
    return LICENCES.get(name, "")


def data_file(data: DataSource) -> Path:
    """The file that `data.path` names: here, or one of a hub's data set (`hub:ORG/NAME/FILE`), downloaded once.

    Raises:
        InputError: the hub does not give it.
    """
    path = data.path or ""
    return hub_file(path, "data.path") if path.startswith(HUB) else Path(path).expanduser()


def documents(data: DataSource, split: str, seed: int = 0) -> list[Document]:
    """What supervised training reads.

    Args:
        split: `train` or `test`. A file is divided by the hash of each row's content (`data.held_out`), so that equal
            rows never stand on both sides; the corpus has parts of its own.

    Raises:
        InputError: a row without the expected fields (with file and row number), or nothing left.
    """
    if data.name == "chitchat":
        part = "test" if split == "test" else data.part or "sft"
        plain = data.part == "base"
        found: list[Document] = [*chitchat.texts(part)] if plain else [*chitchat.conversations(part)]
    else:
        found = side(read_documents(data_file(data)), split, data.held_out)
    require(bool(found), "data", data.path or data.name, f"holds no documents for {split}", MORE)
    return shuffled(found, seed, data.limit)


def prompts(data: DataSource, split: str, seed: int = 0) -> list[Conversation]:
    """Conversations that end where an answer is due.

    Args:
        split: `train` for sampling and PPO, `test` for evaluation.
    """
    if data.name == "chitchat":
        found = chitchat.contexts("test" if split == "test" else data.part or "prompts")
    else:
        rows = side(read_documents(data_file(data)), split, data.held_out)
        found = [asked for d in rows if (asked := question(d)) is not None]
    require(bool(found), "data", data.path or data.name, f"holds no prompts for {split}", f"{MORE} A user must speak.")
    return shuffled(found, seed, data.limit)


def question(document: Document) -> Conversation | None:
    """The conversation up to the user's last turn; None for plain text or where no user speaks."""
    if isinstance(document, str):
        return None
    messages = document.messages
    while messages and messages[-1].role != "user":
        messages = messages[:-1]
    return Conversation(messages, document.id) if messages else None


def shuffled(items: list[T], seed: int, limit: int | None) -> list[T]:
    random.Random(seed).shuffle(items)
    return items[:limit]


def side(found: list[Document], split: str, held_out: float) -> list[Document]:
    """The documents of `split`. Where the share `held_out` is too small for a file, one content is held out all the
    same, and then nothing trains on it."""
    shares = [share_of(d) for d in found]
    least = min(shares) if held_out > 0 and len(set(shares)) > 1 else -1.0
    return [d for d, s in zip(found, shares, strict=True) if (s < held_out or s == least) == (split == "test")]


def share_of(document: Document) -> float:
    """A number in [0, 1) from the hash of what a document asks (or says)."""
    asked = question(document)
    content = document if isinstance(document, str) else repr(asked.messages if asked else document.messages)
    return int(hashlib.sha256(content.encode()).hexdigest()[:8], 16) / 2**32


def read_documents(path: Path) -> list[Document]:
    """Conversations (`messages`, or `prompt` with `completion`, `response` or `chosen`) and plain `text` of a file.

    Raises:
        InputError: a row has none of these; the message names the file and the row.
    """
    found = [document_of(row, f"{path}, row {number}", f"{path.name}:{number}") for number, row in json_rows(path)]
    require(bool(found), "data.path", str(path), "is empty", "Give at least one row.")
    return found


def turns_of(value: Any, role: str) -> tuple[Message, ...]:
    """Text as one turn of `role`, a list of messages as it is, nothing as no turn."""
    if value is None:
        return ()
    return (Message(role, value),) if isinstance(value, str) else Conversation.of(value).messages


def document_of(row: Mapping[str, Any], where: str, id: str) -> Document:
    """One row as a document."""
    if isinstance(row.get("text"), str):
        return row["text"]
    try:
        if "messages" in row:
            return Conversation.of(row["messages"], id)
        if "prompt" in row:
            answer = next((row[k] for k in ("completion", "response", "chosen") if k in row), None)
            asked, answered = turns_of(row["prompt"], "user"), turns_of(answer, "assistant")
            if answered[: len(asked)] == asked:  # UltraFeedback's `chosen` repeats the prompt
                answered = answered[len(asked) :]
            return Conversation((*asked, *answered), id)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(where, str(error), "is not a conversation", "Write {role, content} messages.") from error
    raise InputError(
        where, ", ".join(map(str, row)) or "(no fields)", "has no field to learn from",
        "Give `messages`, `prompt` with `completion`, or `text`.",
    )  # fmt: skip
