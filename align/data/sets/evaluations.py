"""Evaluation sets in files: which they are, and the texts that their rows are looked for by.

A row of questions stands in columns: a question, perhaps a passage that it is about, and choices or answers. A question
may hold its stem and its choices itself, as in the files of ARC, OpenBookQA and CommonsenseQA. A row gives

- the question; if it has a passage, behind that and never alone: many passages are asked for their main idea;
- the same with each choice or answer;
- each choice or answer of more than `FEW` words;
- all of them together, also with letters in front (`A. …`);
- a question that lists its choices itself also without them.

A shorter choice is never looked for alone: `yes` says nothing. A row that is a conversation, a pair or a tree is what
training rows are, and is compared as one.
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
from align.data.dedup.shingles import word_counts
from align.data.read.columns import RANKING, TREE, TREE_MESSAGE, find_shape
from align.data.read.content import PREFERENCES, get_record_kind, iter_strings, list_texts, split_names
from align.data.read.drops import BadRows, Drop
from align.data.read.records import iter_valid_groups, parse_records
from align.data.read.rows import Row
from align.data.sets.record_columns import columns_of, texts_of

FIELD = "stage.contamination.against"
HELP = 'Write "stage.contamination.against=[a.jsonl, {path: b.parquet, columns: [question, choices]}]".'
PARTS_AT_ONCE = 4096
"""Largest number of parts of rows that are held as Python objects while a set is read."""
CHARACTERS_AT_ONCE = 32 * 2**20
"""Largest number of characters in these parts."""
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
"""What a column holds → its names. A passage is what a question is about: alone, it asks something else."""
FEW = 4
"""Words of a choice that is looked for alone: more than so many."""
LONGEST = 4000
"""Characters of a question up to which it is looked for with each of its choices."""
INNER = ("text", "choices")
"""If an object holds choices beside their labels, or one choice beside its label: the field of the texts."""
FIRST_CHOICE = re.compile(r"\s\(?[Aa][.):]\s(?=.*\s\(?[Bb][.):]\s)", re.DOTALL)
FORMULA = re.compile(r"\d\s*[^\w\s,.]+\s*\w|\w\s*[^\w\s,.]+\s*\d")
NOT_WORDS = re.compile(r"(?<!\d)\.|\.(?!\d)|[^\w\s.]+")
"""Punctuation. The point of `1.5` stays: `15` is another number."""


class EvaluationSet(NamedTuple):
    """A file of an evaluation set, or several.

    Attributes:
        path: see `align.data.read`.
        columns: those that are compared; none for all whose names say what they are.
    """

    path: str
    columns: tuple[str, ...] = ()


class Query(NamedTuple):
    """What one row is looked for by.

    Attributes:
        said: texts, each compared with all that a training row says.
        alone: choices, compared in the same way if they have more than `FEW` words.
        asked: texts, each compared with what a training row asks.
    """

    said: Sequence[str]
    alone: Sequence[str]
    asked: Sequence[str]


def parsed_sets(given: Any) -> list[EvaluationSet]:
    """Return the sets of the setting: paths, or mappings with `path` and `columns`.

    Raises:
        InputError: one is neither.
    """
    listed = [given] if isinstance(given, str | Mapping) else given
    require(isinstance(listed, list | tuple), FIELD, given, "is no list of evaluation sets", HELP)
    sets = []
    for i, entry in enumerate(listed):
        at = f"{FIELD}[{i}]"
        about = {"path": entry} if isinstance(entry, str) else entry
        known = isinstance(about, Mapping) and about.keys() <= {"path", "columns"}
        named = known and isinstance(about.get("path"), str) and about["path"] != ""
        require(named, at, entry, "names no file", HELP)
        columns = about.get("columns") or []
        columns = [columns] if isinstance(columns, str) else columns
        named = isinstance(columns, list | tuple) and all(isinstance(name, str) for name in columns)
        require(named, f"{at}.columns", columns, "is no list of columns", HELP)
        sets.append(EvaluationSet(about["path"], tuple(columns)))
    return sets


def read_sets(sets: Sequence[EvaluationSet]) -> list[EvaluationTexts]:
    """Return the texts of each set.

    Raises:
        InputError: a file cannot be read, has no row, or rows in which no text is called a question.
    """
    return [read_set(evaluation_set, f"{FIELD}[{i}]") for i, evaluation_set in enumerate(sets)]


def read_set(given: EvaluationSet, field: str) -> EvaluationTexts:
    bad_rows = BadRows()
    batches = list[EvaluationTexts]()
    numbers = list[int]()
    parts = list[Query | Record]()
    rows = characters = 0
    for group in iter_valid_groups(given.path, field, bad_rows):
        of_group: Sequence[Query | Record] = ()
        with bad_rows:
            of_group = parts_of(group, given.columns)
        rows += len(of_group)
        parts += of_group
        numbers += [group[-1].number - 1] * len(of_group)
        characters += sum(map(len, (text for part in of_group for text in texts_to_find(part))))
        if len(parts) >= PARTS_AT_ONCE or characters > CHARACTERS_AT_ONCE:
            batches.append(collect_texts(parts, numbers))
            numbers = []
            parts = []
            characters = 0
    bad_rows.finish_file(given.path, rows)
    require(rows > 0, field, given.path, "is empty", "Give at least one row.")
    if parts:
        batches.append(collect_texts(parts, numbers))
    return EvaluationTexts(
        pa.chunked_array([chunk for batch in batches for chunk in batch.said.chunks], pa.string()),
        pa.chunked_array([chunk for batch in batches for chunk in batch.asked.chunks], pa.string()),
        np.concatenate([batch.said_by for batch in batches]),
        np.concatenate([batch.asked_by for batch in batches]),
    )


def texts_to_find(part: Query | Record) -> Sequence[str]:
    return part.said if isinstance(part, Query) else list_texts(part)


def collect_texts(parts: Sequence[Query | Record], numbers: Sequence[int]) -> EvaluationTexts:
    """Return the texts of some rows.

    Args:
        numbers: the row of each part, from 0.
    """
    queries = as_queries(parts)
    said = [[*query.said, *query.alone] for query in queries]
    asked = [[*query.asked, *(form for text in query.asked for form in without_operators(text))] for query in queries]
    column = as_column(said)
    is_short = np.array(
        [alone for query in queries for alone in [False] * len(query.said) + [True] * len(query.alone)], bool
    )
    kept = ~is_short | (word_counts(column) > FEW)
    said_by, asked_by = (np.repeat(np.array(numbers, np.int64), [*map(len, several)]) for several in (said, asked))
    return EvaluationTexts(column.filter(pa.array(kept)), as_column(asked), said_by[kept], asked_by)


def as_column(texts: Sequence[Sequence[str]]) -> pa.ChunkedArray:
    """Return lists of texts, one behind the other."""
    return pa.table({"text": pa.array([text for several in texts for text in several], pa.string())})["text"]


def without_operators(question: str) -> list[str]:
    """Return what is left of a question with a formula if punctuation is removed or made blank: `7/8` is `78` then, or
    `7 8`. No forms of other questions, whose operators do not count."""
    if not FORMULA.search(question):
        return []
    return [NOT_WORDS.sub(instead, question) for instead in ("", " ")]


def parts_of(group: Sequence[Row], columns: Sequence[str]) -> list[Query | Record]:
    """Return what rows that are read together say: records, or what their columns are looked for by."""
    if not columns and (len(group) > 1 or not is_columns(group[0].data)):
        return [found[0] for found in parse_records(group) if not isinstance(found, Drop)]
    queries = list[Query | Record]()
    for row in group:
        with row.naming_errors():
            queries.append(query_of(row.data, columns))
    return queries


def as_queries(parts: Sequence[Query | Record]) -> list[Query]:
    """Return records as what they are looked for by: all that they say, and what they ask."""
    queries: dict[int, Query] = {i: part for i, part in enumerate(parts) if isinstance(part, Query)}
    records = {i: part for i, part in enumerate(parts) if not isinstance(part, Query)}
    for kind in {*map(get_record_kind, records.values())}:
        alike = [i for i, record in records.items() if get_record_kind(record) == kind]
        batch = pa.RecordBatch.from_pydict(columns_of(kind, [records[i] for i in alike]))
        both = zip(texts_of(kind, batch).to_pylist(), texts_of(kind, batch, "prompts").to_pylist(), strict=True)
        queries |= {i: Query([said], [], [asked]) for i, (said, asked) in zip(alike, both, strict=True)}
    return [queries[i] for i in range(len(parts))]


def is_columns(data: Mapping[str, Any]) -> bool:
    """Return whether a row is read by its columns, and not as a record of the shapes that are trained on."""
    shape = find_shape(data)
    if shape is None:
        return data.keys().isdisjoint({"messages", "conversations", "chosen", "rejected"})
    if shape is RANKING:
        return not holds_objects(data["answers"])
    if shape in (TREE, TREE_MESSAGE) or shape.kind == PREFERENCES or shape.needs[0] in ("messages", "conversations"):
        return False
    return not any(holds_objects(data.get(name)) for name in ("prompt", "completion", "response"))


def holds_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value)


def kind_of_column(name: str, beside: Collection[str]) -> str:
    """Return `question`, `passage`, `choice`, or an empty text for a column that says something else, by its name.

    Args:
        beside: the other columns' names: HellaSwag's `ctx_a` and `ctx_b` are parts of `ctx`.
    """
    plain = re.sub(r"[\W_]+", "_", name.casefold()).strip("_")
    if plain not in NAMES["choice"]:
        short = re.sub(r"_?\d+$|_[a-f]$", "", plain)
        if short != plain and short in beside:
            return ""
        plain = short
    return next((kind for kind, names in NAMES.items() if plain in names), "")


def query_of(data: Mapping[str, Any], columns: Sequence[str]) -> Query:
    """Return the texts of a row.

    Args:
        columns: those that are compared; none for all whose names say what they are.

    Raises:
        InputError: a column is not there, or none says what is asked.
    """

    def fail(problem: str) -> InputError:
        remedy = "Name the columns to compare: {path: …, columns: [question, choices]}."
        return InputError("columns", ", ".join(map(str, data)) or "(none)", problem, remedy)

    for name in columns:
        if name not in data:
            raise fail(f"there is no {name} among them")
    parts: dict[str, list[str]] = {kind: [] for kind in NAMES}
    lists = dict[str, list[str]]()
    for name, value in unfold({name: data[name] for name in columns or data}):
        kind = kind_of_column(name, data.keys())
        # Choices of which each, or all together, may stand beside labels.
        found = [text for text in iter_strings(without_labels(from_json(value))) if text.strip()]
        if not kind and name in columns:
            kind = "question" if isinstance(value, str) else "choice"
        if kind:
            parts[kind] += found
        if kind == "choice":
            lists.setdefault(re.sub(r"\d+$|_?[a-fA-F]$", "", name), []).extend(found)
    if not any(parts.values()) or not (columns or parts["question"] or parts["passage"]):
        raise fail("no text among them is called a question")
    question = "\n".join(parts["question"])
    passage = "\n".join(parts["passage"])
    return with_choices(question, passage, list(dict.fromkeys(parts["choice"])), list(lists.values()))


def with_choices(question: str, passage: str, choices: list[str], lists: list[list[str]]) -> Query:
    """Return what a question is looked for by.

    Args:
        lists: the choices of each column, or of columns of one name.
    """
    whole = "\n".join(filter(None, (passage, question)))
    if not whole:  # short choices say nothing together either: yes, no
        return Query([], choices, [])
    said = [whole]
    if len(whole) <= LONGEST:
        said += [f"{whole}\n{choice}" for choice in choices]
    lists = [several for several in lists if len(several) > 1]
    for several in lists:
        lettered = [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, several, strict=False)]
        said += ["\n".join((whole, *form)) for form in (several, lettered)]
    if len(choices) > 1:
        said.append("\n".join((whole, *choices)))
    asked = [whole]
    if passage and question:
        asked.append(f"{question}\n{passage}")
    elif (listed := FIRST_CHOICE.search(whole)) and whole[: listed.start()].strip():
        asked.append(whole[: listed.start()])  # what is asked before choices, which others may list in another order
    asked += ["\n".join((whole, *several)) for several in lists]
    return Query(said, choices, asked)


def unfold(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield columns and what they hold; in place of a question that is an object with a question in it, its fields."""
    for name, value in data.items():
        held = from_json(value) if kind_of_column(name, data.keys()) == "question" else None
        if isinstance(held, Mapping) and any(kind_of_column(inner, held.keys()) == "question" for inner in held):
            yield from held.items()
        else:
            yield name, value


def from_json(value: Any) -> Any:
    """Return a list or an object that a table holds as JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def without_labels(value: Any) -> Any:
    """Return choices without the labels that stand beside them."""
    if isinstance(value, list):
        return [without_labels(entry) for entry in value]
    if isinstance(value, Mapping) and (inner := next((name for name in INNER if value.get(name)), None)):
        return without_labels(value[inner])
    return value
