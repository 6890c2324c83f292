"""Import of prompts with candidate answers from files, in any format that `align.data.read` reads.

    {"prompt": "How are you?", "answers": ["Fine!", "Go away."]}
    {"id": "greet-2", "prompt": [{"role": "user", "content": "Hi"}], "answers": [{"text": "Hello", "model": "a"}, …],
     "priority": 0.7, "expected": [[0], [1, 2]]}

All rows are checked before the first is added, and importing a file again adds nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from align.annotate.store import Candidate, Store
from align.annotate.store.records import MAX_ANSWERS, check_text
from align.core.chain import to_canonical_json
from align.core.errors import InputError, require
from align.core.types import Conversation, Message
from align.data.read.messages import build_field_error, parse_messages
from align.data.read.rows import iter_valid_rows, strip_endings
from align.data.read.tables import CellTypes

REMEDY = 'Write {"prompt": "…", "answers": ["…", "…"]} in each row, and "expected": [[0], [1]] if the answer is known.'
COLUMNS = ("id", "prompt", "answers", "priority", "expected")
CELLS = CellTypes(("answers", "expected"), ("prompt",), ("priority",))
ITEMS_PER_TRANSACTION = 200
"""Number of items in one transaction."""
TOOLS_PROBLEM = "calls tools, which the annotation page does not show, so people could not judge it"
ANSWER_KEYS = ("text", "model", "adapter", "sampling", "ended")


@dataclass(frozen=True, slots=True)
class ImportRow:
    """A row of an import file after its checks: a prompt with candidate answers.

    Attributes:
        where: file and row number, for messages.
        id: the row's own id, or None.
        key: idempotency key of the item.
    """

    where: str
    id: Any
    key: str
    prompt: Conversation
    answers: tuple[Candidate, ...]
    priority: float
    expected: list[list[int]] | None


class ImportCounts(NamedTuple):
    """The numbers of rows and of new items of an import.

    Attributes:
        rows: rows of the file.
        added: items that are new in the project.
    """

    rows: int
    added: int


def import_items(store: Store, project: str, path: Path, source: str = "") -> ImportCounts:
    """Read a file and add each row to a project as an item with a prompt and candidate answers, after checking all.

    Args:
        source: name of the rows' source, by default the file's. An item is identified by project, source and the row's
            `id` or number. The store keeps a digest of these, not the words.

    Raises:
        InputError: no such file, or a bad row; the message has file, row (from 1) and column. Nothing was added, except
            if a row's id exists with other answers: then the rows before it were.
    """
    items = read_item_rows(path, source)
    added = 0
    # Several transactions do not block votes for long.
    for start in range(0, len(items), ITEMS_PER_TRANSACTION):
        with store.transaction():
            head = store.head().seq
            for item in items[start : start + ITEMS_PER_TRANSACTION]:
                add_row(store, project, item)
            added += store.head().seq - head
    return ImportCounts(len(items), added)


def read_item_rows(path: Path, source: str = "", field: str = "stage.path") -> list[ImportRow]:
    """Read the rows of a file, and return them as checked prompts with candidate answers.

    Args:
        source: see `import_items`.
        field: the setting that names the file, for messages.

    Raises:
        InputError: see `import_items`.
    """
    source = source or strip_endings(path)
    items = list[ImportRow]()
    row_of_key = dict[str, int]()
    for row in iter_valid_rows(path, field):
        data = CELLS.convert_row(row.data) if row.texts else row.data
        values = {name: value for name, value in data.items() if value is not None}
        item = parse_row(row.where, source, row.number, values)
        if (earlier_row := row_of_key.setdefault(item.key, row.number)) != row.number:
            where = f"{path}, row {row.number}, id"
            raise InputError(
                where, item.id, f"row {earlier_row} has it too", "Give every row an id of its own, or none."
            )
        items.append(item)
    require(bool(items), field, str(path), "is empty", REMEDY)
    return items


def parse_row(where: str, source: str, number: int, row: Mapping[str, Any]) -> ImportRow:
    """Convert a row of an import file to a prompt with answers, or raise InputError with the column at fault.

    Args:
        where: file and row number, for messages.
        source: name of the rows' source, see `import_items`.
        number: the row's number, which identifies a row without an id.

    Raises:
        InputError: a column is unknown, missing or has a wrong value.
    """

    def build_column_error(column: str, problem: str, value: Any = None) -> InputError:
        return build_field_error(f"{where}, {column}", row.get(column) if value is None else value, problem, REMEDY)

    for column in sorted(row.keys() - set(COLUMNS)):
        raise build_column_error(column, f"there is no such column (there are {', '.join(COLUMNS)})")
    answers = row.get("answers")
    if not isinstance(answers, list) or not 2 <= len(answers) <= MAX_ANSWERS:
        raise build_column_error("answers", f"not a list of 2 to {MAX_ANSWERS} answers")
    priority = row.get("priority", 0.0)
    if isinstance(priority, bool) or not isinstance(priority, int | float) or not abs(priority) < 1e300:
        raise build_column_error("priority", "not a finite number")
    if isinstance(row.get("id"), bool) or not isinstance(row.get("id", ""), str | int):
        raise build_column_error("id", "neither a text nor a whole number")
    try:
        prompt = parse_prompt(row.get("prompt"), where)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise build_column_error(
            "prompt", f"neither a text nor a list of messages that ends with the user ({error})"
        ) from error
    candidates = []
    for k, answer in enumerate(answers):
        try:
            candidates.append(parse_candidate(answer))
        except (TypeError, ValueError) as error:
            raise build_column_error(f"answers[{k}]", str(error), answer) from error
    expected = row.get("expected")
    if expected is not None and not is_tier_order(expected, len(answers)):
        raise build_column_error("expected", "not every answer's position once, in a list of tiers")
    name = ["id", row["id"]] if "id" in row else ["row", number]
    key = f"import/{hashlib.sha256(to_canonical_json([source, *name]).encode()).hexdigest()[:32]}"
    return ImportRow(where, row.get("id"), key, prompt, tuple(candidates), float(priority), expected)


def is_tier_order(tiers: Any, k: int) -> bool:
    """Return whether a value is a list of lists, none empty, that together hold each position from 0 to k-1 once."""
    if not isinstance(tiers, list) or not all(isinstance(tier, list) and tier for tier in tiers):
        return False
    positions = [position for tier in tiers for position in tier]
    return all(type(position) is int for position in positions) and sorted(positions) == list(range(k))


def add_row(store: Store, project: str, row: ImportRow) -> None:
    try:
        store.add_item(project, row.key, row.prompt, row.answers, priority=row.priority, expected=row.expected)
    except InputError as error:
        if error.field != "key":
            raise InputError(f"{row.where}, {error.field}", error.value, error.problem, error.remedy) from error
        problem = "a row with this id or number was imported before, with other content"
        remedy = "Give each row an id of its own, or name the file's source: stage.source=NAME."
        raise InputError(f"{row.where}, id", row.id, problem, remedy) from error


def parse_prompt(value: Any, where: str) -> Conversation:
    turns = (Message("user", value),) if isinstance(value, str) else parse_messages(value, f"{where}, prompt")
    prompt = Conversation(turns)
    if prompt.uses_tools:
        raise build_field_error(
            f"{where}, prompt", "(with tools)", TOOLS_PROBLEM, "Give prompts without calls of tools and their results."
        )
    if not prompt.messages[-1].content.strip():
        raise ValueError("its last turn is empty")
    if prompt.messages[-1].role != "user":
        raise ValueError(f"its last turn is the {prompt.messages[-1].role}'s")
    for turn in prompt.messages:
        check_text("prompt", turn.content)
    return prompt


def parse_candidate(value: Any) -> Candidate:
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("text"), str):
        raise TypeError("neither a text nor an object with a text")
    if unknown_keys := sorted(value.keys() - set(ANSWER_KEYS)):
        raise ValueError(f"there is no such key: {', '.join(unknown_keys)} (there are {', '.join(ANSWER_KEYS)})")
    fields = {name: value[name] for name in ANSWER_KEYS if value.get(name) is not None}
    for name, kind in (("model", str), ("adapter", str), ("sampling", Mapping), ("ended", bool)):
        if name in fields and not isinstance(fields[name], kind):
            raise TypeError(f"its {name} is a {type(fields[name]).__name__}")
    check_text("text", fields["text"])
    for name in ("model", "adapter"):
        check_text(name, fields.get(name, ""), 200)
    to_canonical_json(dict(fields.get("sampling", {})))  # raises an error for values that JSON cannot represent
    return Candidate(
        text=fields["text"],
        model_digest=fields.get("model", ""),
        adapter_digest=fields.get("adapter", ""),
        sampling=fields.get("sampling", {}),
        ended=fields.get("ended", True),
    )
