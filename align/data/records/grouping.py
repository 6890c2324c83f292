"""Rows as the shapes need them: with the columns' names mapped, a table's cells as values, and read together where a
record stands in several.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from align.data.formats.rows import Row, placed_rows
from align.data.formats.tables import Cells
from align.data.records.bad_rows import BadRows
from align.errors import InputError

BACK = 64
"""Rows before a place that are looked at, to know what its row goes on with; many times more where they are none."""
CELLS = Cells(
    lists=frozenset({"messages", "conversations", "history", "answers"}),
    messages=frozenset({"prompt", "completion", "response", "chosen", "rejected", "context"}),
    numbers=frozenset(
        [
            "helpfulness",
            "overall_preference",
            "margin",
            "score_chosen",
            "score_rejected",
            "strength",
            "label",
            "weight",
            "train",
            "training",
            "chosen_ended",
            "rejected_ended",
            "deleted",
        ]
    ),
)


def grouped_rows(
    path: str | Path, field: str, bad_rows: BadRows, columns: Mapping[str, str] | None = None
) -> Iterator[list[Row]]:
    """The rows of a data set, those together that are read together. Rows that are none are handed to `bad_rows`."""
    for group in groups_of(path, field, columns):
        if group[0].error is None:
            yield group
        else:
            bad_rows.take(group[0].error)


def groups_of(
    path: str | Path, field: str, columns: Mapping[str, str] | None = None, skip: int = 0, counts: Sequence[int] = ()
) -> Iterator[list[Row]]:
    """The rows of a data set, those together that are read together: HelpSteer's neighbours on one prompt, and the
    messages of a tree; others alone, those that are none among them. What is refused within a group stands behind it.

    Args:
        columns: our name of a column → the data set's.
        skip: rows up to this number were read before, and with them the whole group that the last of them is in.
        counts: see `align.data.formats.rows.placed_rows`.
    """
    held, shared, refused = list[Row](), None, list[Row]()
    for row, key in keyed(path, field, columns or {}, skip, counts):
        if row.error is not None:
            refused.append(row)
        elif held and (key is None or key != shared):
            yield held
            held = []
        if not held:
            yield from ([one] for one in refused)
            refused = []
        if row.error is None and key is None:
            yield [row]
        elif row.error is None:
            held.append(row)
            shared = key
    if held:
        yield held
    yield from ([one] for one in refused)


def keyed(
    path: str | Path, field: str, columns: Mapping[str, str], skip: int, counts: Sequence[int]
) -> Iterator[tuple[Row, Any]]:
    """The rows behind `skip`, each with its key (`Neighbours`), but for those that go on with the group before them."""
    neighbours, unknown = Neighbours(), object()
    last: Any = unknown if skip else None
    for row in ready(placed_rows(path, field, skip, counts), columns):
        if row.error is not None:
            yield row, None
            continue
        key = neighbours.key(row.data)
        if key is not None and last is unknown:
            neighbours, last = before(path, field, columns, skip, counts)
            key = neighbours.key(row.data)
        if key is not None and key == last:
            continue
        last = None
        yield row, key


def before(
    path: str | Path, field: str, columns: Mapping[str, str], skip: int, counts: Sequence[int]
) -> tuple[Neighbours, Any]:
    """The key of the last row up to `skip` that is one, and what gives keys to the rows behind it."""
    back = BACK
    while True:
        neighbours, found, key = Neighbours(), False, None
        for row in ready(placed_rows(path, field, max(0, skip - back), counts), columns):
            if row.number > skip:
                break
            if row.error is None:
                found, key = True, neighbours.key(row.data)
        if found or back >= skip:
            return neighbours, key
        back *= BACK


def ready(rows: Iterator[Row], columns: Mapping[str, str]) -> Iterator[Row]:
    """Rows with our names of columns, and with values; those that cannot be given such with an error."""
    for row in rows:
        if row.error is not None or not (columns or row.texts):
            yield row
            continue
        try:
            data = renamed(row.data, columns, row.where) if columns else row.data
            yield row._replace(data=CELLS.typed(data) if row.texts else data)
        except InputError as error:
            yield row._replace(error=error)


def renamed(data: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """A row whose columns have our names. What had one of these names before is left out.

    Raises:
        InputError: a column that is to be renamed is not there.
    """
    for ours, theirs in columns.items():
        if theirs not in data:
            seen, problem = (
                ", ".join(map(str, data)) or "(none)",
                f"there is no {theirs} among them, which is to be {ours}",
            )
            close = get_close_matches(theirs.casefold(), {name.casefold(): name for name in map(str, data)}, 1, 0.75)
            meant = next((name for name in map(str, data) if name.casefold() in close), "")
            remedy = f"Did you mean {meant}?" if meant else "Give the name of a column that is there."
            raise InputError(f"{where}, columns", seen, problem, remedy)
    taken = {*columns, *columns.values()}
    kept = {name: value for name, value in data.items() if name not in taken}
    return {ours: data[theirs] for ours, theirs in columns.items()} | kept


class Neighbours:
    """What rows behind one another share where they are read together; None for a row that stands alone."""

    def __init__(self) -> None:
        self.trees = 0

    def key(self, row: Mapping[str, Any]) -> Any:
        if is_helpsteer(row):
            return "HelpSteer", json.dumps(row["prompt"])
        if is_tree_message(row):
            self.trees += row.get("parent_id") is None
            tree = row.get("message_tree_id")
            return "tree", self.trees if tree is None else str(tree)
        return None


def is_helpsteer(row: Mapping[str, Any]) -> bool:
    """Whether a row is one answer to a prompt with a figure of how good it is."""
    return row.get("helpfulness") is not None and "prompt" in row and "response" in row


def is_tree_message(row: Mapping[str, Any]) -> bool:
    """Whether a row is one message of a tree, as OASST's flat files have them."""
    named = "message_id" in row and ("parent_id" in row or "message_tree_id" in row)
    return named and "role" in row and "text" in row
