"""Two answers to one prompt and a verdict on them, as arenas, judges and annotators write them.

prompt response_a response_b winner             also answer_, completion_, output_, conversation_; _1 _2; _0 _1
conversation_a conversation_b winner            LMSYS's arena: whole conversations
prompt response_a response_b winner_model_a winner_model_b winner_tie    its Kaggle form: lists of texts
prompt response_0 response_1 better_response_id     PKU-SafeRLHF
instruction output_1 output_2 preference            AlpacaFarm
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from align.data.records.labels import read_label

ANSWER = re.compile(r"((?:response|answer|completion|output|conversation)[ _-]?)([a-z0-9])")
"""A column that holds one of the answers: its stem, and its ending."""
ENDINGS = (("a", "b"), ("1", "2"), ("0", "1"))
VERDICTS = ("winner", "preference", "preferred", "better_response_id", "choice", "label")
"""Columns that say which answer is better. Of several the first counts, and the others are metadata."""
WINNERS = ("winner_model_a", "winner_model_b")
"""Columns of which one is 1, or none if neither answer is better."""
TIES = frozenset({"tie", "tied", "tie_(bothbad)", "both_bad", "bothbad", "both", "draw", "neither", "equal", "none"})
NAMED = re.compile(r"(?:model|response|answer|completion|output|conversation|assistant)_")
"""What may stand in front of an ending in a verdict: `model_a`."""
WRITE = 'Write "{}" or "{}" for the better answer, or "tie".'


class JudgedColumns(NamedTuple):
    """The columns of two answers, in their order, and of the verdict on them.

    Attributes:
        endings: of the columns: a and b, 1 and 2, or 0 and 1.
        verdict: one column, or `WINNERS`.
    """

    answers: tuple[str, str]
    endings: tuple[str, str]
    verdict: tuple[str, ...]


@lru_cache(4096)
def find_judged_columns(names: tuple[str, ...]) -> JudgedColumns | None:
    """Return the columns of two answers and of a verdict among the columns of a row that are not null; None if it has
    no such columns."""
    verdict = WINNERS if {*names}.issuperset(WINNERS) else (*(name for name in VERDICTS if name in names),)[:1]
    if not verdict:
        return None
    by_parts = {match.groups(): name for name in names if (match := ANSWER.fullmatch(name.casefold()))}
    stems = [stem for stem, _ in by_parts]
    for (stem, ending), name in by_parts.items():
        if stems.count(stem) != 2:  # one of many choices
            continue
        for first, second in ENDINGS:
            if ending == first and (stem, second) in by_parts:
                return JudgedColumns((name, by_parts[stem, second]), (first, second), verdict)
    return None


def read_verdict(row: Mapping[str, Any], columns: JudgedColumns) -> int | None:
    """Return which answer is better: -1 the first, 1 the second, 0 neither; None if that cannot be read.

    A number names the column that ends with it. Answers a and b are 1 and 2.
    """
    if columns.verdict == WINNERS:
        first, second = (read_label(row[name]) for name in WINNERS)
        tie = read_label(row.get("winner_tie", False))
        if None in (first, second, tie) or bool(first) + bool(second) + bool(tie) > 1:
            return None
        return bool(second) - bool(first)
    value = row[columns.verdict[0]]
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return read_words(value, row, columns)
    return read_number(value, columns)


def is_unclear_code(row: Mapping[str, Any], columns: JudgedColumns) -> bool:
    """Return whether a verdict is a number that can be a code of another kind: 0 may be the first of two answers, or a
    tie, and a negative number a degree."""
    value = row[columns.verdict[0]]
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return number <= 0 and columns.endings != ("0", "1") and columns.verdict != WINNERS


def read_number(value: Any, columns: JudgedColumns) -> int | None:
    """Return which answer a number names; 1.5 is in the middle of 1 and 2."""
    places = {0.0: -1, 1.0: 1} if columns.endings == ("0", "1") else {1.0: -1, 1.5: 0, 2.0: 1}
    try:
        return places.get(float(value))
    except (TypeError, ValueError, OverflowError):
        return None


def read_words(text: str, row: Mapping[str, Any], columns: JudgedColumns) -> int | None:
    """Return what a verdict says that is a text: an ending, a column, a model's name, or a tie."""
    models = [row.get("model_a"), row.get("model_b")]
    if text in models and models[0] != models[1]:
        return -1 if text == models[0] else 1
    words = re.sub(r"[ -]", "_", text.strip().strip("[]").casefold())
    if words in TIES:
        return 0
    ending = NAMED.sub("", words)
    if ending in columns.endings:
        return -1 if ending == columns.endings[0] else 1
    return read_number(ending, columns)


def apply_verdict(row: Mapping[str, Any], columns: JudgedColumns, better: int) -> dict[str, Any]:
    """Return a row with the better answer as `chosen` and the other one as `rejected`.

    Args:
        better: 0 if the first answer is better, 1 if the second is.

    Raises:
        ValueError: prompt and answers are lists of different lengths.
    """
    first, second = columns.answers
    pair = {name: value for name, value in row.items() if name not in columns.answers}
    answers: list[Any] = [row[first], row[second]]
    turns = [parse_texts(value) for value in (row.get("prompt"), *answers)]
    if columns.verdict == WINNERS and all(turns):  # the Kaggle form of LMSYS's arena
        asked, *several = turns
        pair.pop("prompt")
        answers = [interleave(asked, texts) for texts in several]
    return {**pair, "chosen": answers[better], "rejected": answers[1 - better]}


def parse_texts(value: Any) -> list[str]:
    """Return a list of texts, which may stand as its JSON text; an empty list for anything else. A null is an empty
    text."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    if not isinstance(value, list) or not all(isinstance(one, str | None) for one in value):
        return []
    return [one or "" for one in value]


def interleave(asked: Sequence[str], answered: Sequence[str]) -> list[dict[str, str]]:
    """Return the turns of a conversation."""
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for texts in zip(asked, answered, strict=True)
        for role, text in zip(roles, texts, strict=True)
    ]
