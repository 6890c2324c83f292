"""Evaluation sets in files, and the texts by which their rows are searched in training data.

A row has columns: a question, perhaps a passage that it refers to, and choices or answers. A question may contain its
stem and its choices, as in the files of ARC, OpenBookQA and CommonsenseQA. The texts of a row are

- the question, with its passage in front if it has one, because the main idea of many passages is asked for;
- the same followed by each choice or answer;
- each choice or answer of more than `SHORT_CHOICE` words;
- the question with all choices, also with letters in front (`A. …`);
- a question that lists its choices, also without them.

A shorter choice such as `yes` is never searched on its own. A conversation, a preference pair or a tree is compared
like a training row.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from align.core.errors import InputError, require
from align.core.types import Record
from align.data.dedup.questions import EvaluationTexts
from align.data.dedup.shingles import count_words
from align.data.read.content import PREFERENCES, get_record_kind, iter_strings, list_texts, split_names
from align.data.read.drops import BadRows, Drop
from align.data.read.records import iter_valid_groups, parse_records
from align.data.read.rows import Row
from align.data.read.shapes import RANKING, TREE, TREE_MESSAGE, find_shape
from align.data.sets.record_columns import join_record_texts, records_to_columns

FIELD = "stage.contamination.against"
HELP = 'Write "stage.contamination.against=[a.jsonl, {path: b.parquet, columns: [question, choices]}]".'
PARTS_AT_ONCE = 4096
"""Maximum number of parts of rows that are held as Python objects while a set is read."""
CHARACTERS_AT_ONCE = 32 * 2**20
"""Maximum number of characters in these parts."""
NAMES: Mapping[str, Collection[str]] = {
    "question": split_names(
        "ctx goal input instruction problem prompt query question question_stem sentence statement stem text"
    ),
    "passage": split_names("article background context paragraph passage premise story support"),
    "choice": split_names(
        "a aliases answer answers b best_answer c choice choices code completion continuation correct correct_answer "
        "correct_answers d distractor distractors e ending endings explanation f hypothesis incorrect_answer "
        "incorrect_answers mc1_targets mc2_targets option options output rationale reference references response "
        "canonical_solution sol solution solutions target targets"
    ),
}
"""Role of a column in an evaluation row → its possible names. A passage is the text that a question refers to."""
SHORT_CHOICE = 4
"""Number of words above which a choice is searched on its own."""
MAX_QUESTION_LENGTH = 4000
"""Maximum number of characters of a question that is searched with each of its choices."""
TEXT_FIELDS = ("text", "choices")
"""Names of the field of texts in an object of labels and choices, or of one label and its choice."""
FIRST_CHOICE = re.compile(r"\s\(?[Aa][.):]\s(?=.*\s\(?[Bb][.):]\s)", re.DOTALL)
FORMULA = re.compile(r"\d\s*[^\w\s,.]+\s*\w|\w\s*[^\w\s,.]+\s*\d")
NOT_WORDS = re.compile(r"(?<!\d)\.|\.(?!\d)|[^\w\s.]+")
"""Pattern of punctuation, except for the point of `1.5`: `15` is another number."""


class EvaluationSet(NamedTuple):
    """The path of an evaluation set, and its columns to compare with training rows.

    Attributes:
        path: see `align.data.read`.
        columns: columns to compare. If empty, all columns with names in `NAMES`.
    """

    path: str
    columns: tuple[str, ...] = ()


class Query(NamedTuple):
    """The texts of one evaluation row that are searched in training rows.

    Attributes:
        texts: texts that are compared with the whole text of a training row.
        choices: choices that are compared in the same way if they have more than `SHORT_CHOICE` words.
        questions: texts that are compared with the prompt of a training row.
    """

    texts: Sequence[str]
    choices: Sequence[str]
    questions: Sequence[str]


def parse_evaluation_sets(setting: Any) -> list[EvaluationSet]:
    """Parse the setting of evaluation sets, a list of paths or of mappings with `path` and `columns`.

    Raises:
        InputError: An entry is neither.
    """
    entries = [setting] if isinstance(setting, str | Mapping) else setting
    require(isinstance(entries, list | tuple), FIELD, setting, "is no list of evaluation sets", HELP)
    sets = []
    for i, entry in enumerate(entries):
        field = f"{FIELD}[{i}]"
        values = {"path": entry} if isinstance(entry, str) else entry
        is_valid = isinstance(values, Mapping) and values.keys() <= {"path", "columns"}
        has_path = is_valid and isinstance(values.get("path"), str) and values["path"] != ""
        require(has_path, field, entry, "names no file", HELP)
        columns = values.get("columns") or []
        columns = [columns] if isinstance(columns, str) else columns
        is_valid = isinstance(columns, list | tuple) and all(isinstance(name, str) for name in columns)
        require(is_valid, f"{field}.columns", columns, "is no list of columns", HELP)
        sets.append(EvaluationSet(values["path"], tuple(columns)))
    return sets


def read_evaluation_sets(sets: Sequence[EvaluationSet]) -> list[EvaluationTexts]:
    """Read the texts and questions of each evaluation set from its files.

    Raises:
        InputError: A file cannot be read, has no row, or has rows without a column of questions.
    """
    return [read_evaluation_set(evaluation_set, f"{FIELD}[{i}]") for i, evaluation_set in enumerate(sets)]


def read_evaluation_set(evaluation_set: EvaluationSet, field: str) -> EvaluationTexts:
    """Read the rows of one evaluation set from its files, and return their texts and questions.

    Args:
        field: name of the setting in errors.
    """
    bad_rows = BadRows()
    batches = list[EvaluationTexts]()
    numbers = list[int]()
    parts = list[Query | Record]()
    rows = characters = 0
    for group in iter_valid_groups(evaluation_set.path, field, bad_rows):
        group_parts: Sequence[Query | Record] = ()
        with bad_rows:
            group_parts = parse_rows(group, evaluation_set.columns)
        rows += len(group_parts)
        parts += group_parts
        numbers += [group[-1].number - 1] * len(group_parts)
        characters += sum(map(len, (text for part in group_parts for text in list_part_texts(part))))
        if len(parts) >= PARTS_AT_ONCE or characters > CHARACTERS_AT_ONCE:
            batches.append(collect_evaluation_texts(parts, numbers))
            numbers = []
            parts = []
            characters = 0
    bad_rows.report_refused_rows(evaluation_set.path, rows)
    require(rows > 0, field, evaluation_set.path, "is empty", "Give at least one row.")
    if parts:
        batches.append(collect_evaluation_texts(parts, numbers))
    return EvaluationTexts(
        pa.chunked_array([chunk for batch in batches for chunk in batch.texts.chunks], pa.string()),
        pa.chunked_array([chunk for batch in batches for chunk in batch.questions.chunks], pa.string()),
        np.concatenate([batch.text_rows for batch in batches]),
        np.concatenate([batch.question_rows for batch in batches]),
    )


def list_part_texts(part: Query | Record) -> Sequence[str]:
    return part.texts if isinstance(part, Query) else list_texts(part)


def collect_evaluation_texts(parts: Sequence[Query | Record], numbers: Sequence[int]) -> EvaluationTexts:
    """Return the texts and questions of parsed evaluation rows as columns. Short choices are left out.

    Args:
        numbers: number of the row of each part, from 0.
    """
    queries = build_queries(parts)
    row_texts = [[*query.texts, *query.choices] for query in queries]
    row_questions = [
        [*query.questions, *(form for text in query.questions for form in remove_operators(text))] for query in queries
    ]
    column = concatenate_texts(row_texts)
    is_choice = np.array(
        [flag for query in queries for flag in [False] * len(query.texts) + [True] * len(query.choices)], bool
    )
    is_kept = ~is_choice | (count_words(column) > SHORT_CHOICE)
    text_rows = np.repeat(np.array(numbers, np.int64), [*map(len, row_texts)])
    question_rows = np.repeat(np.array(numbers, np.int64), [*map(len, row_questions)])
    return EvaluationTexts(
        column.filter(pa.array(is_kept)), concatenate_texts(row_questions), text_rows[is_kept], question_rows
    )


def concatenate_texts(texts: Sequence[Sequence[str]]) -> pa.ChunkedArray:
    """Return lists of texts as one column of strings."""
    return pa.table({"text": pa.array([text for row_texts in texts for text in row_texts], pa.string())})["text"]


def remove_operators(question: str) -> list[str]:
    """Return a question with punctuation removed, and with blanks in place of it: `7/8` becomes `78` and `7 8`.

    Returns an empty list for a question without a formula, whose operators do not count.
    """
    if not FORMULA.search(question):
        return []
    return [NOT_WORDS.sub(replacement, question) for replacement in ("", " ")]


def parse_rows(group: Sequence[Row], columns: Sequence[str]) -> list[Query | Record]:
    """Parse rows that are read together to records, or to queries if they are read by the names of their columns."""
    if not columns and (len(group) > 1 or not is_read_by_columns(group[0].data)):
        return [result[0] for result in parse_records(group) if not isinstance(result, Drop)]
    queries = list[Query | Record]()
    for row in group:
        with row.naming_errors():
            queries.append(build_query(row.data, columns))
    return queries


def build_queries(parts: Sequence[Query | Record]) -> list[Query]:
    """Return one query per part: a query as it is, and a record as its whole text, with its prompt as the question."""
    queries: dict[int, Query] = {i: part for i, part in enumerate(parts) if isinstance(part, Query)}
    records = {i: part for i, part in enumerate(parts) if not isinstance(part, Query)}
    for kind in {*map(get_record_kind, records.values())}:
        indexes = [i for i, record in records.items() if get_record_kind(record) == kind]
        batch = pa.RecordBatch.from_pydict(records_to_columns(kind, [records[i] for i in indexes]))
        full_texts = join_record_texts(kind, batch).to_pylist()
        prompts = join_record_texts(kind, batch, "prompts").to_pylist()
        queries |= {
            i: Query([text], [], [prompt]) for i, text, prompt in zip(indexes, full_texts, prompts, strict=True)
        }
    return [queries[i] for i in range(len(parts))]


def is_read_by_columns(data: Mapping[str, Any]) -> bool:
    """Return whether an evaluation row is read by the names of its columns, and not as a record such as a
    conversation."""
    shape = find_shape(data)
    if shape is None:
        return data.keys().isdisjoint({"messages", "conversations", "chosen", "rejected"})
    if shape is RANKING:
        return not has_objects(data["answers"])
    if shape in (TREE, TREE_MESSAGE) or shape.kind == PREFERENCES or shape.needs[0] in ("messages", "conversations"):
        return False
    return not any(has_objects(data.get(name)) for name in ("prompt", "completion", "response"))


def has_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value)


def classify_column(name: str, column_names: Collection[str]) -> str:
    """Return the role of a column by its name: `question`, `passage`, `choice`, or an empty text for other columns.

    Args:
        column_names: names of all columns. HellaSwag's `ctx_a` and `ctx_b` are parts of `ctx`, and are not read again.
    """
    normalized = re.sub(r"[\W_]+", "_", name.casefold()).strip("_")
    if normalized not in NAMES["choice"]:
        base_name = re.sub(r"_?\d+$|_[a-f]$", "", normalized)
        if base_name != normalized and base_name in column_names:
            return ""
        normalized = base_name
    return next((kind for kind, names in NAMES.items() if normalized in names), "")


def build_query(data: Mapping[str, Any], columns: Sequence[str]) -> Query:
    """Build the texts by which an evaluation row is searched from its question, passage and choice columns.

    Args:
        columns: columns to compare. If empty, all columns with names in `NAMES`.

    Raises:
        InputError: A column is missing, or no column is a question.
    """

    def fail(problem: str) -> InputError:
        remedy = "Name the columns to compare: {path: …, columns: [question, choices]}."
        return InputError("columns", ", ".join(map(str, data)) or "(none)", problem, remedy)

    for name in columns:
        if name not in data:
            raise fail(f"there is no {name} among them")
    parts: dict[str, list[str]] = {kind: [] for kind in NAMES}
    lists = dict[str, list[str]]()
    for name, value in unfold_columns({name: data[name] for name in columns or data}):
        kind = classify_column(name, data.keys())
        # Choices may have labels, each one or all together.
        column_texts = [text for text in iter_strings(remove_labels(parse_json_container(value))) if text.strip()]
        if not kind and name in columns:
            kind = "question" if isinstance(value, str) else "choice"
        if kind:
            parts[kind] += column_texts
        if kind == "choice":
            lists.setdefault(re.sub(r"\d+$|_?[a-fA-F]$", "", name), []).extend(column_texts)
    if not any(parts.values()) or not (columns or parts["question"] or parts["passage"]):
        raise fail("none of its text columns has the name of a question")
    question = "\n".join(parts["question"])
    passage = "\n".join(parts["passage"])
    return combine_choices(question, passage, list(dict.fromkeys(parts["choice"])), list(lists.values()))


def combine_choices(question: str, passage: str, choices: list[str], choice_lists: list[list[str]]) -> Query:
    """Build the texts by which a question is searched: alone, with its passage, and with its choices in several forms.

    Args:
        choices: all different choices.
        choice_lists: choices of each column, or of numbered columns with the same name.
    """
    prompt = "\n".join(filter(None, (passage, question)))
    if not prompt:  # all choices together are not searched either: yes, no
        return Query([], choices, [])
    texts = [prompt]
    if len(prompt) <= MAX_QUESTION_LENGTH:
        texts += [f"{prompt}\n{choice}" for choice in choices]
    choice_lists = [options for options in choice_lists if len(options) > 1]
    for options in choice_lists:
        lettered = [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, options, strict=False)]
        texts += ["\n".join((prompt, *form)) for form in (options, lettered)]
    if len(choices) > 1:
        texts.append("\n".join((prompt, *choices)))
    questions = [prompt]
    if passage and question:
        questions.append(f"{question}\n{passage}")
    elif (first_choice := FIRST_CHOICE.search(prompt)) and prompt[: first_choice.start()].strip():
        questions.append(prompt[: first_choice.start()])  # a training row may list the choices in another order
    questions += ["\n".join((prompt, *options)) for options in choice_lists]
    return Query(texts, choices, questions)


def unfold_columns(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name and value of each column, with a question that is an object replaced by its fields. This applies
    only if one of the fields is a question."""
    for name, value in data.items():
        inner_columns = parse_json_container(value) if classify_column(name, data.keys()) == "question" else None
        if isinstance(inner_columns, Mapping) and any(
            classify_column(inner, inner_columns.keys()) == "question" for inner in inner_columns
        ):
            yield from inner_columns.items()
        else:
            yield name, value


def parse_json_container(value: Any) -> Any:
    """Parse a text that is a list or an object in JSON, and return any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def remove_labels(value: Any) -> Any:
    """Return choices without their labels: an object of labels and texts is replaced by its texts."""
    if isinstance(value, list):
        return [remove_labels(entry) for entry in value]
    if isinstance(value, Mapping) and (inner := next((name for name in TEXT_FIELDS if value.get(name)), None)):
        return remove_labels(value[inner])
    return value
