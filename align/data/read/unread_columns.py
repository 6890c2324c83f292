"""The columns that no shape and no rule reads. No column is dropped: they are kept as metadata.

A column whose texts have more than `MAX_METADATA_CHARACTERS` characters on average is refused, once for the whole data
set: the user must say whether it is part of the question or metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

from align.core.errors import InputError
from align.data.read.column_rules import (
    IDENTIFYING,
    METADATA_PREFIX,
    PAIR_ATTRIBUTES,
    POSTERIOR,
    QUESTION_NAMES,
    REFERENCE_COLUMNS,
    ColumnRules,
    find_context_columns,
    has_unrendered_fields,
    is_question_in_answers,
    iter_texts,
    normalize_column_name,
    parse_metadata,
)
from align.data.read.content import DOCUMENTS, PREFERENCES, split_names
from align.data.read.messages import (
    RESULT_ROLES,
    SYSTEM_COLUMNS,
    TOOL_COLUMNS,
    TURN_FIELDS,
    UNSUPPORTED_COLUMNS,
    Fields,
)
from align.data.read.rows import Row, iter_rows
from align.data.read.shapes import (
    CONVERSATIONS,
    JUDGED,
    LABEL,
    LABELLED,
    ORCA,
    PAIRS,
    QUESTION_COLUMNS,
    TREE,
    TREE_MESSAGE,
    WINNER_COLUMNS,
    Shape,
    find_answers_beside_turns,
    find_judged_columns,
    find_question_column,
    get_speaker,
)

ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=str)
"""JSON encoder of metadata. Shared, because `json.dumps` with options makes a new encoder for every row."""
TextSizes = Mapping[str, Sequence[int]]
"""Column → (number of its texts in a row, their total characters)."""


EVAL_PATH = "data.eval_path"
"""Setting of a second file with the same column rules. It may lack columns that are kept as metadata."""
ROWS_TO_LIST = 16
"""Rows whose columns are listed if one is missing."""
MAX_METADATA_CHARACTERS = 40
"""Maximum mean length, in characters, of the texts of an unread column that no setting keeps as metadata."""
TURN_FIELD_INFIX = "[]."
"""Infix of a turn field's column name: `messages[].mood`."""
REVEALING_COLUMNS = REFERENCE_COLUMNS.union(
    split_names(
        "explanation explanations rationale rationales reason reasoning justification feedback critique "
        "comment comments"
    )
)
"""Columns that would reveal the answer, so that errors do not suggest them as part of the question."""


def list_read_columns(row: Fields, shape: Shape) -> frozenset[str]:
    """Return the names of a row's columns that its format's parser reads, including context columns."""
    names = list_columns_of_shape(tuple([name for name, value in row.items() if value is not None]), shape)
    if context_names := find_context_columns(tuple(row)):
        names = (names | {*context_names}) - {
            name for name in context_names if name not in shape.question_columns and has_unrendered_fields(row[name])
        }
    if answer_names := find_answers_beside_turns(row, shape):
        names |= {*answer_names}
    question_name = find_question_column(row, shape.question_columns) if shape.kind == PREFERENCES else ""
    return names - {question_name} if question_name and is_question_in_answers(row, question_name) else names


@lru_cache(4096)
def list_columns_of_shape(names: tuple[str, ...], shape: Shape) -> frozenset[str]:
    """Return the names of all columns that the parser of a row format reads, given the row's non-null column names."""
    if shape is TREE:
        return frozenset(("prompt", "replies", "role", "text", "deleted", *UNSUPPORTED_COLUMNS))
    if shape is TREE_MESSAGE:
        return frozenset((*shape.needs, "message_tree_id", "deleted", *UNSUPPORTED_COLUMNS))
    question_name = find_question_column(dict.fromkeys(names, True), shape.question_columns)
    read = {*SYSTEM_COLUMNS, *TOOL_COLUMNS, *UNSUPPORTED_COLUMNS, *find_context_columns(names)}
    if question_name:
        read.add(question_name)
    if shape is JUDGED and (columns := find_judged_columns(names)) is not None:
        ties = ["winner_tie"] if columns.verdict == WINNER_COLUMNS else []
        read |= {*PAIR_ATTRIBUTES, *columns.answers, *columns.verdict, *ties}
    elif shape.kind == PREFERENCES:
        read |= {*PAIR_ATTRIBUTES, *shape.needs} - {*QUESTION_COLUMNS}
        if shape in (PAIRS, ORCA):
            read.add(POSTERIOR)
    elif shape is LABELLED:
        conversation = next(conversation for conversation in CONVERSATIONS if conversation.needs[0] == question_name)
        read |= {*conversation.answer_columns, LABEL}
    else:
        read |= {*shape.needs, *shape.answer_columns}
    return frozenset(read | ({"input", "history"} if question_name == "instruction" else set()))


def find_unread_columns(row: Row, shape: Shape) -> dict[str, Any]:
    """Return a row's metadata as column → value: all columns that no parser reads and that are not null. It includes
    unread fields of turns and of the object `metadata`."""
    read_names = list_read_columns(row.data, shape)
    unread = dict[str, Any]()
    turns = dict[str, Any]()
    for name, value in row.data.items():
        if name not in read_names:
            if value is not None:
                unread[name] = value
        elif type(value) in (list, dict):
            turns |= find_unread_turn_fields(name, value)
    if "metadata" in unread:
        inner = parse_metadata(unread.pop("metadata"))
        unread |= {f"{METADATA_PREFIX}{name}" if name in row.data else name: value for name, value in inner.items()}
    unread |= turns
    if row.kept_as_metadata:
        unread |= {name: value for name, value in row.kept_as_metadata.items() if value is not None}
    return unread


def find_unread_turn_fields(column: str, value: Any) -> dict[str, list[Any]]:
    """Return the fields of turns that no parser reads: a name such as `messages[].mood` → one value per turn, None if
    the turn lacks it."""
    turns = [value] if isinstance(value, dict) else value
    fields = dict[str, list[Any]]()
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or len(turn) == 2 or get_speaker(turn) is None:
            continue
        for name, field_value in turn.items():
            is_read = name in TURN_FIELDS or (name == "name" and get_speaker(turn) in RESULT_ROLES)
            if not is_read and field_value not in (None, "", [], {}):
                fields.setdefault(f"{column}{TURN_FIELD_INFIX}{name}", [None] * len(turns))[i] = field_value
    return fields


def encode_metadata(metadata: Fields) -> str | None:
    """Return metadata as JSON text, or None if it is empty. NaN and the infinities become null."""
    if not metadata:
        return None
    try:
        return ENCODER.encode(metadata)
    except ValueError:  # nan and the infinities are not JSON; they become null
        finite = json.loads(json.dumps(metadata, default=str), parse_constant=lambda name: None)
        return json.dumps(finite, ensure_ascii=False)


def measure_unread_texts(row: Row, shape: Shape, unread: Fields, is_prompt: bool = False) -> TextSizes:
    """Count the texts in each of a row's `unread` columns, and return column → (number of texts, number of characters).
    `UnreadColumns.check` refuses a data set by them. Texts that repeat the row's content are not counted, nor are ids,
    hashes and URLs.

    Args:
        row: the row.
        shape: its shape.
        unread: its metadata, see `find_unread_columns`.
        is_prompt: the row is a prompt, and other columns may serve to check answers.
    """
    sizes: dict[str, Sequence[int]] = dict.fromkeys(map(str, row.kept_as_metadata), (0, 0))
    if not unread:
        return sizes
    exempt = list_exempt_columns(tuple(row.data), shape, is_prompt)
    content_texts: list[str] | None = None
    metadata_fields = parse_metadata(row.data.get("metadata")) if "metadata" in row.data else {}
    for column, value in unread.items():
        if column in row.kept_as_metadata:
            continue
        key = column.removeprefix(METADATA_PREFIX).rpartition(TURN_FIELD_INFIX)[2]
        is_nested = key in metadata_fields and (key != column or column not in row.data)
        name = f"{METADATA_PREFIX}{key}" if is_nested else column
        exempt_names = list_exempt_columns((), shape, is_prompt) if is_nested else exempt
        is_counted = (
            not isinstance(value, int | float) and key not in exempt_names and key.casefold() not in exempt_names
        )
        texts = [text for text in iter_texts(value) if not is_identifier(text)] if is_counted else []
        if texts:
            if content_texts is None:
                read_names = list_read_columns(row.data, shape)
                content_texts = [
                    text for column in row.data if column in read_names for text in iter_texts(row.data[column])
                ]
            texts = [text for text in texts if not is_repetition(text, content_texts)]
        sizes[name] = (len(texts), sum(map(len, texts)))
    return sizes


@lru_cache(4096)
def list_exempt_columns(names: tuple[str, ...], shape: Shape, is_prompt: bool) -> frozenset[str]:
    """Return the names of unread columns whose texts may be long and are kept as metadata all the same, such as `id` or
    `source`."""
    exempt = {*IDENTIFYING, *shape.comment_columns, *(REFERENCE_COLUMNS if is_prompt else ())}
    if shape.kind == DOCUMENTS and "chosen" in names:  # the better answer of a pair is imitated
        exempt.add("rejected")
    exempt |= {*find_context_columns(names)}  # already in the question, except for fields that are not rendered
    return frozenset(exempt | QUESTION_NAMES - {*map(normalize_column_name, names)})  # for fields of `metadata`


def is_identifier(text: str) -> bool:
    """Return whether a text is an id, a hash or a URL: long, ASCII and without blanks."""
    return len(text) > MAX_METADATA_CHARACTERS and text.isascii() and not any(character.isspace() for character in text)


def is_repetition(text: str, content_texts: Sequence[str]) -> bool:
    """Return whether a text only repeats `content_texts`: it is part of one, or contains all and is at most twice as
    long."""
    may_be_rendering = 2 * sum(map(len, content_texts)) >= len(text)
    if any(text in content for content in content_texts):
        return True
    return may_be_rendering and all(content in text for content in content_texts)


def can_be_context(name: str) -> bool:
    """Return whether an error may suggest to make an unread column part of the question. It may unless the column
    reveals the answer or is a field of turns."""
    return (
        TURN_FIELD_INFIX not in name
        and normalize_column_name(name).removeprefix(METADATA_PREFIX) not in REVEALING_COLUMNS
    )


class UnreadColumns:
    """The sizes of texts in columns that no parser reads, summed over the rows of a data set.

    Attributes:
        rules: the user's settings for columns.
        sizes: column → [number of texts, their total characters].
    """

    def __init__(self, rules: ColumnRules) -> None:
        self.rules = rules
        self.sizes: dict[str, list[int]] = {}

    def add(self, sizes: TextSizes) -> None:
        """Add text sizes of one or more rows, column → (texts, characters), to the sums."""
        for name, (text_count, character_count) in sizes.items():
            size = self.sizes.setdefault(str(name), [0, 0])
            size[0] += text_count
            size[1] += character_count

    def add_row(self, row: Row, shape: Shape, is_prompt: bool = False) -> None:
        """Measure the texts in a row's unread columns and add their sizes to the sums, see `measure_unread_texts`."""
        self.add(measure_unread_texts(row, shape, find_unread_columns(row, shape), is_prompt))

    def check(self, setting: str, path: str) -> None:
        """Raise InputError if a column that is not read holds long texts, or if no row has a column that `rules` lists
        as metadata.

        Args:
            setting: the setting that names the data set.
            path: its value.

        Raises:
            InputError: a column has more than `MAX_METADATA_CHARACTERS` characters on average, or a metadata column is
                missing.
        """
        metadata_names = {*map(normalize_column_name, self.rules.metadata)}
        missing = metadata_names - {*map(normalize_column_name, self.sizes)}
        if missing and setting != EVAL_PATH:
            present = dict.fromkeys(name for row in islice(iter_rows(path), ROWS_TO_LIST) for name in row.data)
            name = next(name for name in self.rules.metadata if normalize_column_name(name) in missing)
            if present:
                problem = f"there is no column {name}, which data.metadata names"
                raise InputError(f"{path}, columns", ", ".join(present), problem, "Leave it out, or correct its name.")
        mean_lengths = {
            name: characters / texts
            for name, (texts, characters) in self.sizes.items()
            if texts
            and (characters > MAX_METADATA_CHARACTERS * texts or normalize_column_name(name) in QUESTION_NAMES)
            and normalize_column_name(name) not in metadata_names
        }
        if not mean_lengths:
            return
        first = next(filter(can_be_context, mean_lengths), next(iter(mean_lengths)))
        problem = f"column {first!r} holds text ({mean_lengths[first]:.0f} characters on average) that is not read"
        if len(mean_lengths) > 1:
            problem += f", as do {', '.join(map(repr, [*mean_lengths][1:]))}"
        remedy = self.rules.suggest_metadata(mean_lengths)
        if can_be_context(first):
            remedy = f"{self.rules.suggest_context(first)} {remedy}"
        raise InputError(setting, path, problem, remedy)
