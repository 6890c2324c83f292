"""Every shape of every kind: the records of a data set, one after another, in memory that does not grow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from align.data.formats.rows import Row
from align.data.records.bad_rows import BadRows
from align.data.records.column_rules import ColumnRules, Sizes, UnreadColumns, text_sizes, unread_columns
from align.data.records.content import PREFERENCES
from align.data.records.documents import OURS, count_unread, document_of, id_of
from align.data.records.drops import Drop
from align.data.records.feedback import feedback_of
from align.data.records.grouping import groups_of
from align.data.records.labels import LABEL, label_error
from align.data.records.preferences import parse
from align.data.records.shapes import (
    COLUMNS,
    CONVERSATIONS,
    HELPSTEER,
    LABELLED,
    PAIRS,
    TREE,
    TREE_MESSAGE,
    Shape,
    recognised,
    shape_of,
    unclear,
)
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
        metadata: all columns of the row that are no part of the record, whatever they hold. Of a pair of two rows, or
            of two entries of a list, what else each says of its answer, as `chosen` and `rejected`.
        sizes: texts in columns that nothing reads, of the first record of a row, see
            `align.data.records.column_rules.text_sizes`.
    """

    number: int
    record: Record
    extra: Mapping[str, Any]
    metadata: Mapping[str, Any] = MappingProxyType({})
    sizes: Sizes = MappingProxyType({})


ONE_VALUE = frozenset({str, int, float, bool})
"""What rows hold that were read: types as JSON, CSV and Arrow give them, of which none is a subclass."""
NONE: Sizes = MappingProxyType({})
Found = tuple[Record, Mapping[str, Any], Mapping[str, Any], Sizes]
"""A record, and what `Read` calls its extra, its metadata and its sizes."""


def read_records(
    path: str,
    *,
    field: str = "data.path",
    rules: ColumnRules = OURS,
    bad_rows: BadRows,
    skip: int = 0,
    drops: Counter[Drop] | None = None,
    reached: Callable[[int], None] = lambda row: None,
    counts: Sequence[int] = (),
) -> Iterator[Read]:
    """The records of a data set, whatever its formats and shapes are, see `align.data.formats.files.files_of`.

    Args:
        field: what the user calls the data set.
        rules: what the user says of columns.
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
    for group in groups_of(path, field, rules, skip, counts):
        reached(group[0].number)
        if group[0].error is not None:
            bad_rows.take(group[0].error)
            continue
        records: list[Found | Drop] = []
        with bad_rows:
            records = list(records_in(group, rules))  # all of a group, or nothing
        if drops is not None:
            drops.update(one for one in records if isinstance(one, Drop))
        for record in records:
            if not isinstance(record, Drop):
                yield Read(group[-1].number, *record)


def records_in(group: Sequence[Row], rules: ColumnRules = OURS) -> Iterator[Found | Drop]:
    """Yield the records of rows that are read together, each with what else its row has.

    Raises:
        InputError: a row has no shape, or says what cannot be kept.
    """
    row = group[0]
    shape = recognised(row.data)
    if shape is not None and shape in (TREE, TREE_MESSAGE):
        yield from tree_records(group, shape)
        return
    if len(group) > 1 and shape is not HELPSTEER:  # messages of a tree that are pairs besides
        for row in group:
            yield from records_in([row], rules)
        return
    if shape is None:
        asking = [one for one in CONVERSATIONS if row.data.get(one.needs[0]) is not None]
        if len(asking) > 1 and row.data.keys().isdisjoint(PAIRS.needs):
            rules.check_answer(row.data, asking[0], row.where)
        raise unclear(row.data, row.where)
    extra = extra_of(row)
    if shape.kind == PREFERENCES:
        shared = {} if shape is HELPSTEER else unread_columns(row, shape)
        sizes = sizes_in(group, shape)
        for pair in parse(group):
            if isinstance(pair, Drop):
                yield pair
                continue
            yield pair[0], extra, {**shared, **pair[1]}, sizes
            sizes = NONE
        return
    metadata = unread_columns(row, shape)
    sizes = text_sizes(row, shape, metadata) if metadata or row.aside else NONE
    if shape is LABELLED:
        extra.pop(LABEL, None)
        yield feedback_of(row.data, row.where, id_of(row)), extra, metadata, sizes
        return
    where = row.where
    if row.data.get(LABEL) is not None:
        raise label_error(row.data, where, rules.keep([LABEL]))
    rules.check_answer(row.data, shape, where)
    yield document_of(row.data, where, id_of(row)), extra, metadata, sizes


def tree_records(group: Sequence[Row], shape: Shape) -> Iterator[Found | Drop]:
    """Yield the conversations of a tree. What else the message says that a conversation ends with is its metadata."""
    row = group[0]
    tree = row.data.get("message_tree_id") or id_of(row)
    shared = extra_of(row) if shape is TREE else {}
    about = unread_columns(row, TREE) if shape is TREE else {}
    sizes = sizes_in(group, shape)
    for path in tree_of(row, id_of(row)) if shape is TREE else flat_tree_of(group, id_of):
        if isinstance(path, Drop):
            yield path
            continue
        conversation, last = path
        of_last = unread_columns(row._replace(data=last), TREE_MESSAGE)
        of_last = {name: value for name, value in of_last.items() if name not in ("replies", *about)}
        extra = {**shared, **one_values(last), "group_id": str(tree)}
        yield conversation, extra, {**about, **of_last}, sizes
        sizes = NONE


def sizes_in(group: Sequence[Row], shape: Shape) -> Sizes:
    """Return the sizes of texts in columns that nothing reads, of rows of one shape that are read together."""
    unread = UnreadColumns(OURS)
    for row in group:
        count_unread(unread, row, shape)
    return {name: (texts, characters) for name, (texts, characters) in unread.sizes.items()}


def extra_of(row: Row) -> dict[str, Any]:
    """Return the columns of a row that are no part of what it says, and hold one value."""
    return one_values({**row.data, **row.aside} if row.aside else row.data)


def one_values(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name not in COLUMNS and type(value) in ONE_VALUE}
