"""Where documents, prompts and pairs come from: the `data` group, read into the records of `align.types`.

A *document* is what supervised training imitates: a `Conversation`, or plain text (`str`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from align.config.root import DataConfig
from align.data import chitchat
from align.errors import InputError, require
from align.run import file_digest
from align.types import Conversation, Message

Document = Conversation | str
T = TypeVar("T")


def data_record(data: DataConfig) -> dict[str, Any]:
    """The input record of a data set that lies in a file: its path and digest.

    Raises:
        InputError: the file is not there.
    """
    path = chitchat.corpus_path() if data.name == "chitchat" else Path(data.path or "").expanduser()
    if not path.is_file():
        raise InputError("data.path", data.path, "there is no such file", "Give the path of a JSON Lines file.")
    return {"path": data.path or data.name, "digest": file_digest(path)}


def documents(data: DataConfig, split: str, seed: int = 0) -> list[Document]:
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
        found = [d for d in read_documents(Path(data.path or "")) if in_split(d, split, data.held_out)]
        if split == "test" and not found and data.held_out > 0:
            found = read_documents(Path(data.path or ""))[:1]
    require(
        bool(found), "data", data.path or data.name, f"holds no documents for {split}", "Give a file with more rows."
    )
    return shuffled(found, seed, data.limit)


def prompts(data: DataConfig, split: str, seed: int = 0) -> list[Conversation]:
    """Conversations that end where an answer is due.

    Args:
        split: `train` for sampling and PPO, `test` for evaluation.
    """
    if data.name == "chitchat":
        found = chitchat.prompts("test" if split == "test" else data.part or "prompts")
    else:
        rows = (d for d in read_documents(Path(data.path or "")) if in_split(d, split, data.held_out))
        found = [asked for d in rows if (asked := question(d)) is not None]
    require(bool(found), "data", data.path or data.name, f"holds no prompts for {split}", "Give rows with a user turn.")
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


def in_split(document: Document, split: str, held_out: float) -> bool:
    """Whether a document belongs to `split`, by the hash of what it asks (or says)."""
    asked = question(document)
    content = document if isinstance(document, str) else repr(asked.messages if asked else document.messages)
    share = int(hashlib.sha256(content.encode()).hexdigest()[:8], 16) / 2**32
    return (share < held_out) == (split == "test")


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, object) of a JSON Lines file, plain or `.gz`; empty lines are passed over.

    Raises:
        InputError: the file is missing or not text, or a line is no JSON object.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise InputError(
                        f"{path} row {number}", type(row).__name__, "is no object", "Write one object a line."
                    )
                yield number, row
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError("data.path", str(path), "there is no such file", "Give a JSON Lines file.") from error
    except (ValueError, EOFError, OSError) as error:
        raise InputError(
            f"{path} row {number + isinstance(error, UnicodeDecodeError)}", str(error)[:80], "is not JSON", "Write one JSON object a line, in UTF-8."
        ) from error  # fmt: skip


def read_documents(path: Path) -> list[Document]:
    """Conversations (`messages`, or `prompt` with `completion`/`response`/`chosen`) and plain `text` of a JSON Lines file.

    Raises:
        InputError: a row has none of these; the message names the file and the row.
    """
    found = [document_of(row, f"{path} row {number}", f"{path.name}:{number}") for number, row in json_rows(path)]
    require(bool(found), "data.path", str(path), "is empty", "Give at least one row.")
    return found


def document_of(row: Mapping[str, Any], where: str, id: str) -> Document:
    """One row as a document."""
    if isinstance(row.get("text"), str):
        return row["text"]
    try:
        if "messages" in row:
            return Conversation.of(row["messages"], id)
        if "prompt" in row:
            prompt, answer = (
                row["prompt"],
                next((row[k] for k in ("completion", "response", "chosen") if k in row), None),
            )
            asked = [Message("user", prompt)] if isinstance(prompt, str) else list(Conversation.of(prompt).messages)
            said = [] if answer is None else [Message("assistant", answer)] if isinstance(answer, str) else list(Conversation.of(answer).messages)  # fmt: skip
            return Conversation((*asked, *said), id)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(where, str(error), "is not a conversation", "Write {role, content} messages.") from error
    raise InputError(
        where, ", ".join(map(str, row)) or "(no fields)", "has no field to learn from",
        "Give `messages`, `prompt` with `completion`, or `text`.",
    )  # fmt: skip
