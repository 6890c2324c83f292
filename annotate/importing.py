"""Prompts with candidate answers from a file into a project: JSON Lines, or a folder that `datasets` saved.

    {"prompt": "How are you?", "answers": ["Fine!", "Go away."]}
    {"id": "greet-2", "prompt": [{"role": "user", "content": "Hi"}], "answers": [{"text": "Hello", "model": "a"}, …],
     "priority": 0.7, "expected": [[0], [1, 2]]}

A file is taken whole or not at all, and taking it again adds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.rows import json_rows
from align.errors import InputError, require
from align.types import Conversation, Message
from annotate.store import Candidate, Store

HELP = 'Write {"prompt": "…", "answers": ["…", "…"]} a row.'
COLUMNS = ("id", "prompt", "answers", "priority", "expected")
ANSWER = ("text", "model", "adapter", "sampling", "ended")


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of a file: rows read, and items that the project did not have."""

    rows: int
    added: int


def import_items(store: Store, project: str, path: Path, source: str = "") -> Imported:
    """Adds every row as an item.

    Args:
        source: names the rows: a row's item is a function of project, source and the row's `id` (or its number).

    Raises:
        InputError: no such file, or a bad row: names file, row (from 1) and column. Nothing was added then.
    """
    source = source or path.name.removesuffix(".gz").removesuffix(".jsonl")
    rows = 0
    with store.transaction():
        before = store.head().seq
        for number, row in rows_of(path):
            where = f"{path}, row {number}"
            add_row(store, project, where, f"import/{source}/{row.get('id', number)}", row)
            rows += 1
        require(rows > 0, "stage.path", str(path), "it holds no rows", HELP)
        return Imported(rows, store.head().seq - before)  # nothing else writes meanwhile


def rows_of(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number from 1, columns) of each row; columns that are null are left out."""
    for number, row in saved_rows(path) if path.is_dir() else json_rows(path):
        yield number, {name: value for name, value in row.items() if value is not None}


def saved_rows(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        remedy = "Name a folder that Dataset.save_to_disk wrote, or a JSON Lines file."
        raise InputError("stage.path", str(path), f"it is no saved data set ({error})", remedy) from error
    if not isinstance(found, Dataset):
        parts = ", ".join(map(str, found))
        raise InputError("stage.path", str(path), f"it holds several parts ({parts})", "Name the folder of one part.")
    return enumerate(found, start=1)  # type: ignore[arg-type]


def add_row(store: Store, project: str, where: str, key: str, row: Mapping[str, Any]) -> None:
    def refuse(column: str, problem: str, value: Any = None) -> InputError:
        shown = repr(row.get(column) if value is None else value)
        return InputError(f"{where}, {column}", shown if len(shown) <= 80 else f"{shown[:77]}…", problem, HELP)

    for column in row.keys() - set(COLUMNS):
        raise refuse(column, f"there is no such column (there are {', '.join(COLUMNS)})")
    answers = row.get("answers")
    if not isinstance(answers, list) or len(answers) < 2:
        raise refuse("answers", "not a list of two or more answers")
    priority = row.get("priority", 0.0)
    if isinstance(priority, bool) or not isinstance(priority, int | float) or not math.isfinite(priority):
        raise refuse("priority", "not a finite number")
    if not isinstance(row.get("id", ""), str | int):
        raise refuse("id", "neither a text nor a whole number")
    try:
        prompt = prompt_of(row.get("prompt"))
    except (KeyError, TypeError, ValueError) as error:
        raise refuse("prompt", f"neither a text nor a list of messages that ends with the user ({error})") from error
    candidates = []
    for k, answer in enumerate(answers):
        try:
            candidates.append(candidate_of(answer))
        except (TypeError, ValueError) as error:
            raise refuse(f"answers[{k}]", str(error), answer) from error
    try:
        store.add_item(project, key, prompt, candidates, priority=priority, expected=row.get("expected"))
    except InputError as error:
        raise InputError(f"{where}, {error.field}", error.value, error.problem, error.remedy) from error
    except TypeError as error:
        raise refuse("expected", "not a list of lists of positions") from error


def prompt_of(value: Any) -> Conversation:
    prompt = Conversation((Message("user", value),)) if isinstance(value, str) else Conversation.of(value)
    if prompt.messages[-1].role != "user":
        raise ValueError(f"its last turn is the {prompt.messages[-1].role}'s")
    return prompt


def candidate_of(value: Any) -> Candidate:
    if isinstance(value, str):
        return Candidate(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("text"), str):
        raise TypeError("neither a text nor an object with a text")
    if unknown := sorted(value.keys() - set(ANSWER)):
        raise ValueError(f"there is no such key: {', '.join(unknown)} (there are {', '.join(ANSWER)})")
    given = {name: found for name in ANSWER if (found := value.get(name)) is not None}
    for name, kind in (("model", str), ("adapter", str), ("sampling", Mapping), ("ended", bool)):
        if name in given and not isinstance(given[name], kind):
            raise TypeError(f"its {name} is a {type(given[name]).__name__}")
    return Candidate(
        given["text"], given.get("model", ""), given.get("adapter", ""), given.get("sampling", {}),
        given.get("ended", True),
    )  # fmt: skip
