"""Streams and lists of records: documents, preference pairs and feedback, from rows of every supported shape.

`iter_outcomes` streams the records of a data set in bounded memory. `read_documents`, `read_preferences` and
`read_feedback` return all records of one kind.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from align.core.errors import InputError, require
from align.core.types import Document, Feedback, Preference, Record
from align.data.read.column_rules import ColumnRules
from align.data.read.content import DOCUMENTS, FEEDBACK, PREFERENCES
from align.data.read.conversations import (
    DOCUMENT_SHAPES,
    LABELLED_HELP,
    find_shape_column,
    parse_document,
    parse_feedback,
)
from align.data.read.drops import BadRows, Drop, count_dropped
from align.data.read.message_trees import parse_tree_messages, parse_tree_row
from align.data.read.messages import Fields
from align.data.read.preferences import PAIR_HELP, parse_pairs
from align.data.read.rows import Row, build_row_id, iter_rows
from align.data.read.shapes import (
    CONTENT_COLUMNS,
    CONVERSATIONS,
    HELPSTEER,
    LABEL,
    LABELLED,
    PAIRS,
    TREE,
    TREE_MESSAGE,
    Shape,
    build_label_error,
    build_unknown_shape_error,
    find_shape,
    is_helpsteer,
    is_tree,
    is_tree_message,
)
from align.data.read.tables import CELL_TYPES
from align.data.read.unread_columns import TextSizes, UnreadColumns, find_unread_columns, measure_unread_texts

DEFAULT_RULES = ColumnRules()
LOOKBACK_ROWS = 64
"""Rows read before the resume point to find its group. Multiplied by 64 until a valid row or the first row is read."""
SCALAR_TYPES = {str, int, float, bool}
"""Types of scalars in rows. Readers of JSON, CSV and Arrow return no subclasses of them."""
NO_SIZES: TextSizes = MappingProxyType({})
RecordFields = tuple[Record, Fields, Fields, TextSizes]
"""A parsed record as (record, extra, metadata, sizes), see `ParsedRecord`."""


class ParsedRecord(NamedTuple):
    """A record of a data set, with its row's number, other columns and metadata.

    Attributes:
        number: number of its row, or of the last row of its group. Several records may share a number; numbers never
            decrease.
        record: the record.
        extra: texts, numbers and booleans in other columns of the row, such as `split` or `created_at`. Conversations
            of one tree have a `group_id`.
        metadata: all columns of the row that are not part of the record. A pair of two rows or list entries has their
            other fields under `chosen` and `rejected`.
        sizes: sizes of texts in unread columns, see `align.data.read.unread_columns.measure_unread_texts`. Only the
            first record of a row has them.
    """

    number: int
    record: Record
    extra: Fields
    metadata: Fields = MappingProxyType({})
    sizes: TextSizes = NO_SIZES


class RowOutcome(NamedTuple):
    """One result of parsing a row or a group of rows: a record, the reason why none exists, or the error that refuses
    the group.

    Attributes:
        first_row_number: number of the first row of the group.
        result: the record, drop or error.
    """

    first_row_number: int
    result: ParsedRecord | Drop | InputError


def iter_outcomes(
    path: str, field: str = "data.path", rules: ColumnRules = DEFAULT_RULES, skip: int = 0, counts: Sequence[int] = ()
) -> Iterator[RowOutcome]:
    """Parse the rows of a data set in any format, and yield each record, each Drop (the reason why there is no record)
    and each row's error.

    Args:
        path: the data set, see `align.data.read.files.list_data_files`.
        field: the setting that names it, for errors.
        rules: the user's settings for columns.
        skip: rows up to this number are skipped, with the rest of the group that this row belongs to.
        counts: see `align.data.read.rows.iter_rows`.

    Raises:
        InputError: a file does not exist or cannot be read.
        CorruptFile: a file is cut or damaged. The records before that are yielded first.
    """
    for group in iter_groups(path, field, rules, skip, counts):
        begin = group[0].number
        try:
            if group[0].error is not None:
                raise group[0].error
            records = [*parse_records(group, rules)]  # an error refuses the whole group
        except InputError as error:
            yield RowOutcome(begin, error)
            continue
        for record in records:
            yield RowOutcome(begin, record if isinstance(record, Drop) else ParsedRecord(group[-1].number, *record))


def parse_records(group: Sequence[Row], rules: ColumnRules = DEFAULT_RULES) -> Iterator[RecordFields | Drop]:
    """Yield the records of a group of rows, each with its row's other columns, metadata and text sizes, or a Drop, the
    reason why none exists.

    Raises:
        InputError: a row has no shape, or a value that cannot be kept.
    """
    row = group[0]
    shape = find_shape(row.data)
    if shape is not None and shape in (TREE, TREE_MESSAGE):
        yield from parse_tree_records(group, shape)
        return
    if len(group) > 1 and shape is not HELPSTEER:  # tree messages that also have the columns of pairs
        for row in group:
            yield from parse_records([row], rules)
        return
    extra = collect_scalar_columns({**row.data, **row.kept_as_metadata})
    if shape is not None and shape.kind == PREFERENCES:
        shared = {} if shape is HELPSTEER else find_unread_columns(row, shape)
        sizes = measure_group_texts(group, shape)
        for pair in parse_pairs(group):
            if isinstance(pair, Drop):
                yield pair
                continue
            yield pair[0], extra, {**shared, **pair[1]}, sizes
            sizes = NO_SIZES
        return
    with row.naming_errors():
        if shape is None:
            candidates = [shape for shape in CONVERSATIONS if row.data.get(shape.needs[0]) is not None]
            if len(candidates) > 1 and row.data.keys().isdisjoint(PAIRS.needs):
                rules.check_answer(row.data, candidates[0])
            raise build_unknown_shape_error(row.data, (DOCUMENTS, PREFERENCES, FEEDBACK))
        metadata = find_unread_columns(row, shape)
        if shape is LABELLED:
            extra.pop(LABEL, None)
            record: Record = parse_feedback(row.data, build_row_id(row))
        else:
            if row.data.get(LABEL) is not None:
                raise build_label_error(row.data, rules.suggest_metadata([LABEL]))
            rules.check_answer(row.data, shape)
            record = parse_document(row.data, build_row_id(row))
    yield record, extra, metadata, measure_unread_texts(row, shape, metadata)


def parse_tree_records(group: Sequence[Row], shape: Shape) -> Iterator[RecordFields | Drop]:
    """Yield each conversation of a message tree with its other columns, metadata and text sizes, or a Drop, the reason,
    for a path without an answer. The other fields of its last message are metadata."""
    row = group[0]
    tree = row.data.get("message_tree_id") or build_row_id(row)
    shared = collect_scalar_columns({**row.data, **row.kept_as_metadata}) if shape is TREE else {}
    tree_metadata = find_unread_columns(row, TREE) if shape is TREE else {}
    sizes = measure_group_texts(group, shape)
    for path in parse_tree(group):
        if isinstance(path, Drop):
            yield path
            continue
        conversation, last = path
        last_metadata = find_unread_columns(row._replace(data=dict(last)), TREE_MESSAGE)
        last_metadata = {
            name: value for name, value in last_metadata.items() if name not in ("replies", *tree_metadata)
        }
        extra = {**shared, **collect_scalar_columns(last), "group_id": str(tree)}
        yield conversation, extra, {**tree_metadata, **last_metadata}, sizes
        sizes = NO_SIZES


def parse_tree(group: Sequence[Row]) -> Iterator[Any]:
    """Yield a conversation for each path of a message tree, or a Drop, the reason, for a path without an answer. The
    tree is stored in one row or as one row per message."""
    return parse_tree_row(group[0]) if is_tree(group[0].data) else parse_tree_messages(group)


def measure_group_texts(group: Sequence[Row], shape: Shape) -> TextSizes:
    """Return the number and total characters of the texts in each unread column, summed over a group of rows of one
    format."""
    unread = UnreadColumns(DEFAULT_RULES)
    for row in group:
        unread.add_row(row, shape)
    return unread.sizes


def collect_scalar_columns(data: Fields) -> dict[str, Any]:
    """Return the columns of a row that hold a text, number or boolean and are no part of its content."""
    return {name: value for name, value in data.items() if name not in CONTENT_COLUMNS and type(value) in SCALAR_TYPES}


def iter_groups(
    path: str | Path, field: str, rules: ColumnRules | None = None, skip: int = 0, counts: Sequence[int] = ()
) -> Iterator[list[Row]]:
    """Yield the rows of a data set in groups that are parsed together: HelpSteer rows of one prompt, messages of one
    tree, or a single row. A row with an error is a group of its own. Rows with errors within a group follow it.

    Args:
        path: the data set.
        field: the setting that names it, for errors.
        rules: the user's settings for columns. If None, rows are left as they are in the files, as for evaluation sets.
        skip: rows up to this number are skipped, with the rest of the group that this row belongs to.
        counts: see `align.data.read.rows.iter_rows`.
    """
    group = list[Row]()
    bad_rows = list[Row]()
    group_keys = GroupKeys()
    group_key: Any = None
    not_looked_up = object()
    previous_key: Any = not_looked_up if skip else None
    for row in apply_rules(iter_rows(path, field, skip, counts), rules):
        key = None
        if row.error is None:
            key = group_keys.compute_key(row.data)
            if key is not None and previous_key is not_looked_up:
                group_keys, previous_key = find_previous_key(path, field, rules, skip, counts)
                key = group_keys.compute_key(row.data)
            if key is not None and key == previous_key:  # it continues a group that was read before
                continue
            previous_key = None
        else:
            bad_rows.append(row)
        if row.error is None and group and (key is None or key != group_key):
            yield group
            group = []
        if not group:
            yield from ([bad_row] for bad_row in bad_rows)
            bad_rows = []
        if row.error is None and key is None:
            yield [row]
        elif row.error is None:
            group.append(row)
            group_key = key
    if group:
        yield group
    yield from ([bad_row] for bad_row in bad_rows)


def find_previous_key(
    path: str | Path, field: str, rules: ColumnRules | None, skip: int, counts: Sequence[int]
) -> tuple[GroupKeys, Any]:
    """Read the rows before a resume point, and return the group key of the last valid row up to `skip`. Also returns
    the GroupKeys to use for the rows after it."""
    lookback = LOOKBACK_ROWS
    while True:
        group_keys = GroupKeys()
        key = not_found = object()
        for row in apply_rules(iter_rows(path, field, max(0, skip - lookback), counts), rules):
            if row.number > skip:
                break
            if row.error is None:
                key = group_keys.compute_key(row.data)
        if key is not not_found or lookback >= skip:
            return group_keys, key
        lookback *= LOOKBACK_ROWS


def apply_rules(rows: Iterator[Row], rules: ColumnRules | None) -> Iterator[Row]:
    """Yield each row with the user's column rules applied, or only with text cells of tables converted if `rules` is
    None. A row to which the rules cannot be applied gets an error."""
    for row in rows:
        if row.error is None and (rules or row.texts):
            try:
                row = rules.apply(row) if rules else row._replace(data=CELL_TYPES.convert_row(row.data))
            except InputError as error:
                row = row._replace(error=row.add_location(error))
        yield row


class GroupKeys:
    """The keys that consecutive rows of one group share, computed row by row. Messages without a tree id belong to the
    tree of the last root.

    Attributes:
        trees: number of roots counted.
    """

    def __init__(self) -> None:
        self.trees = 0

    def compute_key(self, row: Fields) -> Any:
        """Return the key that a row shares with its group: the prompt (HelpSteer) or the tree (OASST). Returns None for
        a row that is a group of its own."""
        if is_helpsteer(row):
            return "HelpSteer", json.dumps(row["prompt"])
        if is_tree_message(row):
            self.trees += row.get("parent_id") is None
            tree = row.get("message_tree_id")
            return "tree", self.trees if tree is None else str(tree)
        return None


def iter_valid_groups(
    path: str | Path, field: str, bad_rows: BadRows, rules: ColumnRules | None = None
) -> Iterator[list[Row]]:
    """Yield the groups of a data set's rows that are parsed together, and add the errors of unreadable rows to
    `bad_rows`."""
    for group in iter_groups(path, field, rules):
        if group[0].error is None:
            yield group
        else:
            bad_rows.add(group[0].error)


class ReadResult(NamedTuple):
    """The records of a data set, the number of its rows, and how often each Drop occurred."""

    records: list[Any]
    rows: int
    drops: Counter[Drop]


def read_all_records(
    path: str | Path,
    field: str,
    skip_bad_rows: bool,
    rules: ColumnRules,
    parse_group: Callable[[Sequence[Row], UnreadColumns], Iterator[Any]],
    keep_groups: bool = True,
    count_drops: bool = False,
) -> ReadResult:
    """Parse all rows of a data set with `parse_group`, and return the records in a list, with the number of rows and
    drops. Prints the columns that are kept as metadata.

    Args:
        path: the data set.
        field: the setting that names it, for errors.
        skip_bad_rows: leave refused rows out. If False, the data set is refused.
        rules: the user's settings for columns.
        parse_group: yields the records and drops of a group of rows.
        keep_groups: False parses rows one by one, except messages of a tree.
        count_drops: refused rows may be skipped even if the other rows only give drops.

    Raises:
        InputError: a file does not exist, a row is refused, or an unread column holds long texts.
        CorruptFile: a file is cut or damaged.
    """
    bad_rows = BadRows(skip_bad_rows)
    unread = UnreadColumns(rules)
    reading = ReadResult([], 0, Counter())
    row_count = 0
    for group in iter_valid_groups(path, field, bad_rows, rules):
        row_count += len(group)
        is_separate = not keep_groups and not is_tree_message(group[0].data)
        for part in [[row] for row in group] if is_separate else [group]:
            with bad_rows:
                parsed = list(parse_group(part, unread))  # an error refuses the whole group
                reading.drops.update(record for record in parsed if isinstance(record, Drop))
                reading.records.extend(record for record in parsed if not isinstance(record, Drop))
    bad_rows.report_refused_rows(path, len(reading.records) + (reading.drops.total() if count_drops else 0))
    unread.check(field, str(path))
    if unread.sizes:
        print(f"columns of {path} kept as metadata: {', '.join(unread.sizes)}")
    return reading._replace(rows=row_count)


def read_documents(
    path: str | Path,
    field: str = "data.path",
    skip_bad_rows: bool = False,
    requires_answer: bool = False,
    are_prompts: bool = False,
    rules: ColumnRules = DEFAULT_RULES,
) -> list[Document]:
    """Read the conversations and plain texts of a data set into a list, in the order of its rows, see
    `read_all_records`.

    Args:
        path: the data set.
        field: the setting that names it, for errors.
        skip_bad_rows: leave refused rows out.
        requires_answer: a question must have an answer column, which may be null. Otherwise a misspelt column would
            turn rows to train on into questions.
        are_prompts: conversations keep the other columns of their rows, for graders.
        rules: the user's settings for columns.

    Raises:
        InputError: as in `read_all_records`; or there is no row, or no row makes a document.
    """

    def parse_group(group: Sequence[Row], unread: UnreadColumns) -> Iterator[Document | Drop]:
        row = group[0]
        if is_tree_message(row.data) or is_tree(row.data):
            yield from (path if isinstance(path, Drop) else path[0] for path in parse_tree(group))
            for message in group:
                unread.add_row(message, TREE if is_tree(row.data) else TREE_MESSAGE)
            return
        with row.naming_errors():
            shape = DOCUMENT_SHAPES[find_shape_column(row.data)]
            if not are_prompts:
                rules.check_answer(row.data, shape)
            document = parse_document(row.data, build_row_id(row), requires_answer, are_prompts, row.kept_as_metadata)
        unread.add_row(row, shape, are_prompts)
        yield document

    reading = read_all_records(path, field, skip_bad_rows, rules, parse_group, keep_groups=False)
    require(bool(reading.records), field, str(path), "is empty", "Give at least one row.")
    for drop, count in reading.drops.items():
        print(f"left out {count} path{'s' if count > 1 else ''} of {path}: {drop.value}")
    return reading.records


def read_preferences(
    path: str | Path, field: str = "data.path", skip_bad_rows: bool = False, rules: ColumnRules = DEFAULT_RULES
) -> list[Preference]:
    """Read the preference pairs of a data set into a list, in the order of its rows, see `read_all_records`. Prints how
    many were dropped because neither answer is preferred.

    Raises:
        InputError: as in `read_all_records`; or there is no row, or no pair.
    """

    def parse_group(group: Sequence[Row], unread: UnreadColumns) -> Iterator[Preference | Drop]:
        yield from (pair if isinstance(pair, Drop) else pair[0] for pair in parse_pairs(group))
        for row in group:
            unread.add_row(row, find_shape(row.data) or PAIRS)

    pairs, rows, drops = read_all_records(path, field, skip_bad_rows, rules, parse_group, count_drops=True)
    require(rows > 0, field, str(path), "is empty", PAIR_HELP)
    problem = f"none of its {rows} rows holds a preference ({', '.join(drop.value for drop in drops)})"
    require(bool(pairs), field, str(path), problem, "Name a file in which one answer was preferred.")
    count_dropped("dropped_undecided", drops.total())
    if drops:
        print(f"{drops.total()} pairs of {path} are left out: their answers are equal, tied or alone")
    return pairs


def read_feedback(
    path: str | Path, field: str = "data.path", skip_bad_rows: bool = False, rules: ColumnRules = DEFAULT_RULES
) -> list[Feedback]:
    """Read the labelled answers (KTO) of a data set into a list, in the order of its rows, see `read_all_records`.
    Raises InputError if a row is something else."""

    def parse_group(group: Sequence[Row], unread: UnreadColumns) -> Iterator[Feedback | Drop]:
        for item in parse_records(group, rules):
            if isinstance(item, Drop):
                yield item
                continue
            record, extra, _, sizes = item
            unread.add(sizes)
            if not isinstance(record, Feedback):
                problem = "it is no answer with a label, true or false"
                raise InputError(f"{group[-1].where}, {LABEL}", extra.get(LABEL, "(none)"), problem, LABELLED_HELP)
            yield replace(record, id=str(extra["id"])) if "id" in extra else record

    answers = read_all_records(path, field, skip_bad_rows, rules, parse_group).records
    require(bool(answers), field, str(path), "holds no answer with a label", LABELLED_HELP)
    return answers
