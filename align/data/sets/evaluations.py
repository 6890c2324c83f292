"""Evaluation sets in files: which they are, and the texts that their rows are looked for by, see `evaluation_rows`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from align.data.dedup.words import word_counts
from align.data.read.content import kind_of, texts
from align.data.read.drops import BadRows, Drop
from align.data.read.records import grouped_rows, records_in
from align.data.read.rows import Row
from align.data.sets.columns import columns_of, texts_of
from align.data.sets.evaluation_rows import FEW, Query, is_columns, looked_for
from align.errors import require
from align.types import Record

FIELD = "stage.contamination.against"
HELP = 'Write "stage.contamination.against=[a.jsonl, {path: b.parquet, columns: [question, choices]}]".'
AT_ONCE, HEAVY = 4096, 32 * 2**20
"""Rows that are read together at most, and characters of text from which on they are fewer."""


@dataclass(frozen=True, slots=True)
class EvaluationSet:
    """A file of an evaluation set, or several.

    Attributes:
        path: see `align.data.read`.
        columns: those that are compared; none for all whose names say what they are.
    """

    path: str
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Texts:
    """What rows are compared with.

    Attributes:
        said, asked: texts, compared with all that a row says and with what it asks.
        said_by, asked_by: the number of the row of each, from 0, int64, ascending.
    """

    said: pa.ChunkedArray
    asked: pa.ChunkedArray
    said_by: np.ndarray
    asked_by: np.ndarray

    @classmethod
    def of_rows(cls, said: pa.ChunkedArray, asked: pa.ChunkedArray) -> Texts:
        """Of rows that have one text of each."""
        return cls(said, asked, np.arange(len(said)), np.arange(len(asked)))


def parsed_sets(given: Any) -> list[EvaluationSet]:
    """The sets of the setting: paths, or mappings with `path` and `columns`.

    Raises:
        InputError: one is neither.
    """
    listed = [given] if isinstance(given, str | Mapping) else given
    require(isinstance(listed, list | tuple), FIELD, given, "is no list of evaluation sets", HELP)
    found = []
    for i, one in enumerate(listed):
        at, about = f"{FIELD}[{i}]", {"path": one} if isinstance(one, str) else one
        known = isinstance(about, Mapping) and about.keys() <= {"path", "columns"}
        require(known and isinstance(about.get("path"), str) and about["path"] != "", at, one, "names no file", HELP)
        columns = about.get("columns") or []
        columns = [columns] if isinstance(columns, str) else columns
        named = isinstance(columns, list | tuple) and all(isinstance(name, str) for name in columns)
        require(named, f"{at}.columns", columns, "is no list of columns", HELP)
        found.append(EvaluationSet(about["path"], tuple(columns)))
    return found


def read_sets(sets: Sequence[EvaluationSet]) -> list[Texts]:
    """The texts of each set.

    Raises:
        InputError: a file cannot be read, has no row, or rows in which no text is called a question.
    """
    return [read_set(one, f"{FIELD}[{i}]") for i, one in enumerate(sets)]


def read_set(given: EvaluationSet, field: str) -> Texts:
    bad_rows, said, asked, rows = BadRows(skips=False), Side(), Side(), 0
    for numbers, looked in looked_up(given, field, bad_rows):
        rows += len(numbers)
        counts = word_counts(pa.array([text for one in looked for text in one.alone], pa.string())).tolist()
        for number, one in zip(numbers, looked, strict=True):
            here, counts = counts[: len(one.alone)], counts[len(one.alone) :]
            long = [text for text, words in zip(one.alone, here, strict=True) if words > FEW]
            said.add([*one.said, *long], number)
            asked.add([*one.asked, *(form for text in one.asked for form in without_operators(text))], number)
        said.settle()
        asked.settle()
    bad_rows.settle(given.path, rows)
    require(rows > 0, field, given.path, "is empty", "Give at least one row.")
    return Texts(said.together(), asked.together(), np.array(said.rows, np.int64), np.array(asked.rows, np.int64))


FORMULA = re.compile(r"\d\s*[^\w\s,.]+\s*\w|\w\s*[^\w\s,.]+\s*\d")
NOT_WORDS = re.compile(r"(?<!\d)\.|\.(?!\d)|[^\w\s.]+")
"""Punctuation. The point of `1.5` stays: `15` is another number."""


def without_operators(question: str) -> list[str]:
    """Return what is left of a question with a formula where punctuation was removed or made blank: `7/8` is `78` then,
    or `7 8`. No forms of other questions, whose operators do not count."""
    if not FORMULA.search(question):
        return []
    return [NOT_WORDS.sub(instead, question) for instead in ("", " ")]


class Side:
    """Texts as they come in, and the row of each."""

    def __init__(self) -> None:
        self.rows, self.chunks, self.held = list[int](), list[pa.Array](), list[str]()

    def add(self, texts: Sequence[str], row: int) -> None:
        self.held += texts
        self.rows += [row] * len(texts)

    def settle(self) -> None:
        self.chunks.append(pa.array(self.held, pa.string()))
        self.held = []

    def together(self) -> pa.ChunkedArray:
        return pa.chunked_array(self.chunks, pa.string())


def looked_up(given: EvaluationSet, field: str, bad_rows: BadRows) -> Iterator[tuple[list[int], list[Query]]]:
    """Rows (from 0) and what each is looked for by, some at a time."""
    numbers, held, size = list[int](), list[Query | Record](), 0
    for group in grouped_rows(given.path, field, bad_rows):
        found: Sequence[Query | Record] = ()
        with bad_rows:
            found = parts_of(group, given.columns)
        for one in found:
            numbers.append(group[-1].number - 1)
            held.append(one)
            size += sum(map(len, one.said if isinstance(one, Query) else texts(one)))
        if len(held) >= AT_ONCE or size > HEAVY:
            yield numbers, settled(held)
            numbers, held, size = [], [], 0
    if held:
        yield numbers, settled(held)


def parts_of(group: Sequence[Row], columns: Sequence[str]) -> list[Query | Record]:
    """What rows that are read together say: records, or what their columns are looked for by."""
    first = group[0]
    if columns or (len(group) == 1 and is_columns(first.data)):
        return [looked_for(row.data, columns, row.where) for row in group]
    return [found[0] for found in records_in(group) if not isinstance(found, Drop)]


def settled(held: Sequence[Query | Record]) -> list[Query]:
    """Records as what they are looked for by: all that they say, and what they ask."""
    made: dict[int, Query] = {i: one for i, one in enumerate(held) if isinstance(one, Query)}
    records = [(i, one) for i, one in enumerate(held) if not isinstance(one, Query)]
    for kind in {kind_of(record) for _, record in records}:
        alike = [(i, record) for i, record in records if kind_of(record) == kind]
        batch = pa.RecordBatch.from_pydict(columns_of(kind, [record for _, record in alike]))
        both = zip(texts_of(kind, batch).to_pylist(), texts_of(kind, batch, "prompts").to_pylist(), strict=True)
        made |= {i: Query([said], [], [asked]) for (i, _), (said, asked) in zip(alike, both, strict=True)}
    return [made[i] for i in range(len(held))]
