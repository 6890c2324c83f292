"""Every shape of every kind: the records of a data set, one after another, in memory that does not grow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from align.data.formats.rows import Row
from align.data.records.bad_rows import BadRows
from align.data.records.content import PREFERENCES
from align.data.records.documents import document_of, id_of
from align.data.records.drops import Drop
from align.data.records.feedback import feedback_of
from align.data.records.grouping import groups_of
from align.data.records.preferences import parse
from align.data.records.shapes import COLUMNS, HELPSTEER, LABELLED, TREE, TREE_MESSAGE, recognised, shape_of, unclear
from align.data.records.trees import flat_tree_of, tree_of
from align.types import Record

__all__ = ["Read", "read_records", "shape_of"]


class Read(NamedTuple):
    """One record of a data set.

    Attributes:
        number: of the row that it was read from, the last one where it was read from several. Several records may have
            one number, none a lower one than those before it.
        record: what it says.
        extra: the texts, numbers and flags that the row has in other columns, such as `split` or `created_at`.
            Conversations of one tree have a `group_id`.
    """

    number: int
    record: Record
    extra: Mapping[str, Any]


ONE_VALUE = frozenset({str, int, float, bool})
"""What rows hold that were read: types as JSON, CSV and Arrow give them, of which none is a subclass."""
Found = tuple[Record, Mapping[str, Any]]


def read_records(
    path: str,
    *,
    field: str = "data.path",
    columns: Mapping[str, str] | None = None,
    bad_rows: BadRows,
    skip: int = 0,
    drops: Counter[Drop] | None = None,
    reached: Callable[[int], None] = lambda row: None,
    counts: Sequence[int] = (),
) -> Iterator[Read]:
    """The records of a data set, whatever its formats and shapes are, see `align.data.formats.files.files_of`.

    Args:
        field: what the user calls the data set.
        columns: our name of a column → the data set's.
        bad_rows: is told of rows that are refused; `settle` it when all is read.
        skip: rows up to this number are not read again, nor what else belongs to the record that they end with.
        drops: is told how often what makes no record was left out.
        reached: is told the number of the row with which each record begins, and each row that makes none, before
            anything else is said of it.
        counts: see `align.data.formats.rows.placed_rows`.

    Raises:
        InputError: there is no such file, or it cannot be read.
        CorruptFile: it was cut or is damaged. The records before that are given first.
    """
    for group in groups_of(path, field, columns, skip, counts):
        reached(group[0].number)
        if group[0].error is not None:
            bad_rows.take(group[0].error)
            continue
        found: list[Found | Drop] = []
        with bad_rows:
            found = list(records_in(group))  # all of a group, or nothing
        if drops is not None:
            drops.update(one for one in found if isinstance(one, Drop))
        for one in found:
            if not isinstance(one, Drop):
                yield Read(group[-1].number, *one)


def records_in(group: Sequence[Row]) -> Iterator[Found | Drop]:
    """The records of rows that are read together, each with what else its row has.

    Raises:
        InputError: a row has no shape, or says what cannot be kept.
    """
    row, shape = group[0], recognised(group[0].data)
    if shape in (TREE, TREE_MESSAGE):
        tree = row.data.get("message_tree_id") or id_of(row)
        shared = extra_of(row.data) if shape is TREE else {}
        for found in tree_of(row, id_of(row)) if shape is TREE else flat_tree_of(group, id_of):
            if isinstance(found, Drop):
                yield found
            else:
                yield found[0], {**shared, **extra_of(found[1]), "group_id": str(tree)}
        return
    if len(group) > 1 and shape is not HELPSTEER:  # messages of a tree that are pairs besides
        for row in group:
            yield from records_in([row])
        return
    extra = extra_of(row.data)
    if shape is None:
        raise unclear(row.data, row.where)
    if shape.kind == PREFERENCES:
        yield from (pair if isinstance(pair, Drop) else (pair, extra) for pair in parse(group))
    elif shape is LABELLED:
        del extra["label"]
        yield feedback_of(row.data, row.where, id_of(row)), extra
    else:
        yield document_of(row.data, row.where, id_of(row)), extra


def extra_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that are no part of what it says, and hold one value."""
    return {name: value for name, value in data.items() if name not in COLUMNS and type(value) in ONE_VALUE}
