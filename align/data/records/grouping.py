"""Rows as the shapes need them: with the columns' names mapped, a table's cells as values, and read together where a
record stands in several.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.data.formats.rows import Row, placed_rows
from align.data.formats.tables import Cells
from align.data.records.bad_rows import BadRows
from align.data.records.column_rules import ColumnRules
from align.data.records.shapes import is_helpsteer
from align.data.records.trees import is_tree_message
from align.errors import InputError

BACK = 64
"""Rows before a place that are looked at, to know what its row goes on with; many times more where they are none."""
CELLS = Cells(
    lists=frozenset(
        [
            "messages",
            "conversations",
            "conversation_a",
            "conversation_b",
            "history",
            "answers",
            "completions",
            "choices",
            "options",
            "documents",
        ]
    ),
    messages=frozenset({"prompt", "completion", "response", "chosen", "rejected", "context"}),
    numbers=frozenset(
        [
            "helpfulness",
            "overall_preference",
            "preference_strength",
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
    path: str | Path, field: str, bad_rows: BadRows, rules: ColumnRules | None = None
) -> Iterator[list[Row]]:
    """The rows of a data set, those together that are read together. Rows that are none are handed to `bad_rows`."""
    for group in groups_of(path, field, rules):
        if group[0].error is None:
            yield group
        else:
            bad_rows.take(group[0].error)


def groups_of(
    path: str | Path, field: str, rules: ColumnRules | None = None, skip: int = 0, counts: Sequence[int] = ()
) -> Iterator[list[Row]]:
    """The rows of a data set, those together that are read together: HelpSteer's neighbours on one prompt, and the
    messages of a tree; others alone, those that are none among them. What is refused within a group stands behind it.

    Args:
        rules: what becomes of the columns; None gives rows as they stand in the files, as evaluation sets are read.
        skip: rows up to this number were read before, and with them the whole group that the last of them is in.
        counts: see `align.data.formats.rows.placed_rows`.
    """
    held, shared, refused = list[Row](), None, list[Row]()
    for row, key in keyed(path, field, rules, skip, counts):
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
    path: str | Path, field: str, rules: ColumnRules | None, skip: int, counts: Sequence[int]
) -> Iterator[tuple[Row, Any]]:
    """The rows behind `skip`, each with its key (`Neighbours`), but for those that go on with the group before them."""
    neighbours, unknown = Neighbours(), object()
    last: Any = unknown if skip else None
    for row in ready(placed_rows(path, field, skip, counts), rules):
        if row.error is not None:
            yield row, None
            continue
        key = neighbours.key(row.data)
        if key is not None and last is unknown:
            neighbours, last = before(path, field, rules, skip, counts)
            key = neighbours.key(row.data)
        if key is not None and key == last:
            continue
        last = None
        yield row, key


def before(
    path: str | Path, field: str, rules: ColumnRules | None, skip: int, counts: Sequence[int]
) -> tuple[Neighbours, Any]:
    """The key of the last row up to `skip` that is one, and what gives keys to the rows behind it."""
    back = BACK
    while True:
        neighbours, found, key = Neighbours(), False, None
        for row in ready(placed_rows(path, field, max(0, skip - back), counts), rules):
            if row.number > skip:
                break
            if row.error is None:
                found, key = True, neighbours.key(row.data)
        if found or back >= skip:
            return neighbours, key
        back *= BACK


def ready(rows: Iterator[Row], rules: ColumnRules | None) -> Iterator[Row]:
    """Yield rows with values in place of the texts of tables, and with `rules` applied to their columns. A row to which
    the rules cannot be applied has an error."""
    for row in rows:
        if row.error is not None or not (rules or row.texts):
            yield row
            continue
        try:
            if rules is None:
                yield row._replace(data=CELLS.typed(row.data))
            else:
                yield rules.apply(row, CELLS if row.texts else None)
        except InputError as error:
            yield row._replace(error=error)


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
