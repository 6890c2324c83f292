"""Every shape of every kind: the records of a data set, one after another, in memory that does not grow; or all those
of one kind at once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from align.core.errors import InputError, require
from align.core.types import Document, Feedback, Preference, Record
from align.data.read.columns import ColumnRules, Sizes, UnreadColumns, text_sizes, unread_columns
from align.data.read.content import DOCUMENTS, FEEDBACK, PREFERENCES
from align.data.read.documents import SHAPES, document_of, feedback_of, flat_tree_of, id_of, shape_column, tree_of
from align.data.read.drops import BadRows, Drop, tally
from align.data.read.messages import Fields
from align.data.read.preferences import HELP, parse
from align.data.read.rows import Row, placed_rows
from align.data.read.shapes import (
    COLUMNS,
    CONVERSATIONS,
    HELPSTEER,
    LABEL,
    LABELLED,
    PAIRS,
    TREE,
    TREE_MESSAGE,
    Shape,
    is_helpsteer,
    is_tree,
    is_tree_message,
    label_error,
    recognised,
    unclear,
)
from align.data.read.text_formats import CELLS

T = TypeVar("T")
OURS = ColumnRules()
BACK = 64
"""Rows before a place that are looked at, to know what its row goes on with; many times more if they are none."""
ONE_VALUE = {str, int, float, bool}
"""Types of values of rows that were read, as JSON, CSV and Arrow give them: none is a subclass."""
NONE: Sizes = MappingProxyType({})
Found = tuple[Record, Fields, Fields, Sizes]
"""A record, and what `Read` calls its extra, its metadata and its sizes."""
LABELLED_HELP = 'A row holds {"prompt": "…", "completion": "…", "label": true}.'


class Read(NamedTuple):
    """One record of a data set.

    Attributes:
        number: of the row that it was read from, the last one if it was read from several. Several records may have
            one number, none a lower one than those before it.
        extra: the texts, numbers and flags that the row has in other columns, such as `split` or `created_at`.
            Conversations of one tree have a `group_id`.
        metadata: all columns of the row that are no part of the record, whatever they hold. Of a pair of two rows, or
            of two entries of a list, what else each says of its answer, as `chosen` and `rejected`.
        sizes: texts in columns that nothing reads, of the first record of a row, see
            `align.data.read.columns.text_sizes`.
    """

    number: int
    record: Record
    extra: Fields
    metadata: Fields = MappingProxyType({})
    sizes: Sizes = NONE


class Outcome(NamedTuple):
    """What became of a row, or of several that are read together: a record of theirs, or why there is none, or why they
    are refused.

    Attributes:
        begin: the number of the first of these rows.
    """

    begin: int
    result: Read | Drop | InputError


def read_outcomes(
    path: str, field: str = "data.path", rules: ColumnRules = OURS, skip: int = 0, counts: Sequence[int] = ()
) -> Iterator[Outcome]:
    """Yield what becomes of the rows of a data set, whatever its formats and shapes are, see
    `align.data.read.files.files_of`.

    Args:
        field: what the user calls the data set.
        rules: what the user says of columns.
        skip: rows up to this number are not read again, nor what else belongs to the record that they end with.
        counts: see `align.data.read.rows.placed_rows`.

    Raises:
        InputError: there is no such file, or it cannot be read.
        CorruptFile: it was cut or is damaged. The records before that are given first.
    """
    for group in groups_of(path, field, rules, skip, counts):
        begin = group[0].number
        try:
            if group[0].error is not None:
                raise group[0].error
            records = [*records_in(group, rules)]  # all of a group, or nothing
        except InputError as error:
            yield Outcome(begin, error)
            continue
        for record in records:
            yield Outcome(begin, record if isinstance(record, Drop) else Read(group[-1].number, *record))


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
    extra = extra_of({**row.data, **row.aside})
    if shape is not None and shape.kind == PREFERENCES:
        shared = {} if shape is HELPSTEER else unread_columns(row, shape)
        sizes = sizes_in(group, shape)
        for pair in parse(group):
            if isinstance(pair, Drop):
                yield pair
                continue
            yield pair[0], extra, {**shared, **pair[1]}, sizes
            sizes = NONE
        return
    with row.naming_errors():
        if shape is None:
            asking = [shape for shape in CONVERSATIONS if row.data.get(shape.needs[0]) is not None]
            if len(asking) > 1 and row.data.keys().isdisjoint(PAIRS.needs):
                rules.check_answer(row.data, asking[0])
            raise unclear(row.data, (DOCUMENTS, PREFERENCES, FEEDBACK))
        metadata = unread_columns(row, shape)
        if shape is LABELLED:
            extra.pop(LABEL, None)
            record: Record = feedback_of(row.data, id_of(row))
        else:
            if row.data.get(LABEL) is not None:
                raise label_error(row.data, rules.keep([LABEL]))
            rules.check_answer(row.data, shape)
            record = document_of(row.data, id_of(row))
    yield record, extra, metadata, text_sizes(row, shape, metadata)


def tree_records(group: Sequence[Row], shape: Shape) -> Iterator[Found | Drop]:
    """Yield the conversations of a tree. What else the message says that a conversation ends with is its metadata."""
    row = group[0]
    tree = row.data.get("message_tree_id") or id_of(row)
    shared = extra_of({**row.data, **row.aside}) if shape is TREE else {}
    about = unread_columns(row, TREE) if shape is TREE else {}
    sizes = sizes_in(group, shape)
    for path in paths_of(group):
        if isinstance(path, Drop):
            yield path
            continue
        conversation, last = path
        of_last = unread_columns(row._replace(data=dict(last)), TREE_MESSAGE)
        of_last = {name: value for name, value in of_last.items() if name not in ("replies", *about)}
        extra = {**shared, **extra_of(last), "group_id": str(tree)}
        yield conversation, extra, {**about, **of_last}, sizes
        sizes = NONE


def paths_of(group: Sequence[Row]) -> Iterator[Any]:
    """Yield the conversations of a tree that is one row, or several."""
    return tree_of(group[0]) if is_tree(group[0].data) else flat_tree_of(group)


def sizes_in(group: Sequence[Row], shape: Shape) -> Sizes:
    """Return the sizes of texts in columns that nothing reads, of rows of one shape that are read together."""
    unread = UnreadColumns(OURS)
    for row in group:
        unread.add_row(row, shape)
    return unread.sizes


def extra_of(data: Fields) -> dict[str, Any]:
    """Return the columns of a row that are no part of what it says, and hold one value."""
    return {name: value for name, value in data.items() if name not in COLUMNS and type(value) in ONE_VALUE}


# --- Rows as the shapes need them: with the columns' names mapped, a table's cells as values, and read together if a
# record stands in several.


def groups_of(
    path: str | Path, field: str, rules: ColumnRules | None = None, skip: int = 0, counts: Sequence[int] = ()
) -> Iterator[list[Row]]:
    """Yield the rows of a data set, those together that are read together: HelpSteer's neighbours on one prompt, and
    the messages of a tree; others alone, those that are none among them. What is refused within a group stands behind
    it.

    Args:
        rules: what becomes of the columns; None gives rows as they stand in the files, as evaluation sets are read.
        skip: rows up to this number were read before, and with them the whole group that the last of them is in.
        counts: see `align.data.read.rows.placed_rows`.
    """
    held = list[Row]()
    shared: Any = None
    refused = list[Row]()
    for row, key in keyed_rows(path, field, rules, skip, counts):
        if row.error is not None:
            refused.append(row)
        elif held and (key is None or key != shared):
            yield held
            held = []
        if not held:
            yield from ([other] for other in refused)
            refused = []
        if row.error is None and key is None:
            yield [row]
        elif row.error is None:
            held.append(row)
            shared = key
    if held:
        yield held
    yield from ([other] for other in refused)


def keyed_rows(
    path: str | Path, field: str, rules: ColumnRules | None, skip: int, counts: Sequence[int]
) -> Iterator[tuple[Row, Any]]:
    """Yield the rows behind `skip`, each with its key (`Neighbours`), but for those that go on with the group before
    them."""
    neighbours = Neighbours()
    unknown = object()
    last: Any = unknown if skip else None
    for row in ready_rows(placed_rows(path, field, skip, counts), rules):
        if row.error is not None:
            yield row, None
            continue
        key = neighbours.key(row.data)
        if key is not None and last is unknown:
            neighbours, last = key_before(path, field, rules, skip, counts)
            key = neighbours.key(row.data)
        if key is not None and key == last:
            continue
        last = None
        yield row, key


def key_before(
    path: str | Path, field: str, rules: ColumnRules | None, skip: int, counts: Sequence[int]
) -> tuple[Neighbours, Any]:
    """Return what gives keys to the rows behind `skip`, and the key of the last row up to there that is one."""
    back = BACK
    while True:
        neighbours = Neighbours()
        key = unknown = object()
        for row in ready_rows(placed_rows(path, field, max(0, skip - back), counts), rules):
            if row.number > skip:
                break
            if row.error is None:
                key = neighbours.key(row.data)
        if key is not unknown or back >= skip:
            return neighbours, key
        back *= BACK


def ready_rows(rows: Iterator[Row], rules: ColumnRules | None) -> Iterator[Row]:
    """Yield rows with values in place of the texts of tables, and with `rules` applied to their columns. A row to which
    the rules cannot be applied has an error."""
    for row in rows:
        if row.error is None and (rules or row.texts):
            try:
                row = rules.apply(row) if rules else row._replace(data=CELLS.typed(row.data))
            except InputError as error:
                row = row._replace(error=row.located(error))
        yield row


class Neighbours:
    """What rows behind one another share if they are read together; None for a row that stands alone."""

    def __init__(self) -> None:
        self.trees = 0

    def key(self, row: Fields) -> Any:
        if is_helpsteer(row):
            return "HelpSteer", json.dumps(row["prompt"])
        if is_tree_message(row):
            self.trees += row.get("parent_id") is None
            tree = row.get("message_tree_id")
            return "tree", self.trees if tree is None else str(tree)
        return None


# --- All records of one kind.


def grouped_rows(
    path: str | Path, field: str, bad_rows: BadRows, rules: ColumnRules | None = None
) -> Iterator[list[Row]]:
    """Yield the rows of a data set, those together that are read together. `bad_rows` gets rows that are none."""
    for group in groups_of(path, field, rules):
        if group[0].error is None:
            yield group
        else:
            bad_rows.take(group[0].error)


class Reading(NamedTuple):
    """The records of a data set that were read at once, how many rows there were, and what made no record."""

    records: list[Any]
    rows: int
    drops: Counter[Drop]


def read_all(
    path: str | Path,
    field: str,
    skips: bool,
    rules: ColumnRules,
    parse_group: Callable[[Sequence[Row], UnreadColumns], Iterator[Any]],
    together: bool = True,
    drops_count: bool = False,
) -> Reading:
    """Read all records of a data set.

    Args:
        field: what the user calls the data set.
        skips: rows that are refused are left out. Without, the data set is refused.
        rules: what the user says of columns.
        parse_group: yields the records of rows that are read together, or why they make none.
        together: False if neighbours on one prompt are read alone.
        drops_count: a data set of drops alone is no data set of refused rows.

    Raises:
        InputError: there is no such file, a row is refused, or a column holds texts that nothing reads.
        CorruptFile: a file was cut or is damaged.
    """
    bad_rows = BadRows(skips)
    unread = UnreadColumns(rules)
    reading = Reading([], 0, Counter())
    count = 0
    for group in grouped_rows(path, field, bad_rows, rules):
        count += len(group)
        alone = not together and not is_tree_message(group[0].data)
        for part in [[row] for row in group] if alone else [group]:
            with bad_rows:
                parsed = list(parse_group(part, unread))  # all of a group, or nothing
                reading.drops.update(record for record in parsed if isinstance(record, Drop))
                reading.records.extend(record for record in parsed if not isinstance(record, Drop))
    bad_rows.settle(path, len(reading.records) + (reading.drops.total() if drops_count else 0))
    unread.check(field, str(path))
    if unread.sizes:
        print(f"columns of {path} kept as metadata: {', '.join(unread.sizes)}")
    return reading._replace(rows=count)


def read_documents(
    path: str | Path,
    field: str = "data.path",
    skips: bool = False,
    answered: bool = False,
    rows: bool = False,
    rules: ColumnRules = OURS,
) -> list[Document]:
    """Return the documents of a data set, in its order, see `read_all`.

    Args:
        answered: a question has to have an answer beside it, in a column that may be null: without, a misspelt column
            would make questions of rows to train on.
        rows: conversations keep the other columns of their rows, for what checks answers.

    Raises:
        InputError: as `read_all`; or there is no row, or rows say nothing to learn from.
    """

    def parse_group(group: Sequence[Row], unread: UnreadColumns) -> Iterator[Document | Drop]:
        row = group[0]
        if is_tree_message(row.data) or is_tree(row.data):
            yield from (path if isinstance(path, Drop) else path[0] for path in paths_of(group))
            for message in group:
                unread.add_row(message, TREE if is_tree(row.data) else TREE_MESSAGE)
            return
        with row.naming_errors():
            shape = SHAPES[shape_column(row.data)]
            if not rows:
                rules.check_answer(row.data, shape)
            document = document_of(row.data, id_of(row), answered, rows, row.aside)
        unread.add_row(row, shape, rows)
        yield document

    reading = read_all(path, field, skips, rules, parse_group, together=False)
    require(bool(reading.records), field, str(path), "is empty", "Give at least one row.")
    for drop, count in reading.drops.items():
        print(f"left out {count} path{'s' if count > 1 else ''} of {path}: {drop.value}")
    return reading.records


def read_preferences(
    path: str | Path, field: str = "data.path", skips: bool = False, rules: ColumnRules = OURS
) -> list[Preference]:
    """Return the pairs of a data set in its order, see `read_all`. Prints how many were left out because no answer of
    theirs is preferred.

    Raises:
        InputError: as `read_all`; or there is no row, or no pair.
    """

    def parse_group(group: Sequence[Row], unread: UnreadColumns) -> Iterator[Preference | Drop]:
        yield from (pair if isinstance(pair, Drop) else pair[0] for pair in parse(group))
        for row in group:
            unread.add_row(row, recognised(row.data) or PAIRS)

    pairs, rows, drops = read_all(path, field, skips, rules, parse_group, drops_count=True)
    require(rows > 0, field, str(path), "is empty", HELP)
    problem = f"none of its {rows} rows holds a preference ({', '.join(drop.value for drop in drops)})"
    require(bool(pairs), field, str(path), problem, "Name a file in which one answer was preferred.")
    tally("dropped_undecided", drops.total())
    if drops:
        print(f"{drops.total()} pairs of {path} are left out: their answers are equal, tied or alone")
    return pairs


def answers_of_file(
    path: str | Path, field: str = "data.path", skips: bool = False, rules: ColumnRules = OURS
) -> list[Feedback]:
    """Return the answers with a label of a file, see `read_all`. Raises InputError if a row is something else."""

    def parse_group(group: Sequence[Row], unread: UnreadColumns) -> Iterator[Feedback | Drop]:
        for found in records_in(group, rules):
            if isinstance(found, Drop):
                yield found
                continue
            record, extra, _, sizes = found
            unread.add(sizes)
            if not isinstance(record, Feedback):
                problem = "it is no answer with a label, true or false"
                raise InputError(f"{group[-1].where}, {LABEL}", extra.get(LABEL, "(none)"), problem, LABELLED_HELP)
            yield replace(record, id=str(extra["id"])) if "id" in extra else record

    answers = read_all(path, field, skips, rules, parse_group).records
    require(bool(answers), field, str(path), "holds no answer with a label", LABELLED_HELP)
    return answers
