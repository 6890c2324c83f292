"""Answers with a label, KTO's: `prompt`, `completion` and a `label`, or a whole conversation of
any shape whose last answer the label is about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.data.records.documents import placed_of, shape_column
from align.data.records.labels import LABEL, read_label
from align.data.records.messages import with_system_column
from align.data.records.refusals import refused
from align.data.records.shapes import ANSWERS
from align.data.records.tools import check_calls, tools_of
from align.errors import require
from align.types import Feedback


def feedback_of(row: Mapping[str, Any], where: str, id: str) -> Feedback:
    """One row. The answer may be empty: models give such answers, and people refuse them.

    Raises:
        InputError: there is no question, or no answer to it.
    """
    placed = placed_of(row, where, shape_column(row, where))
    named = (i for i, (place, _) in enumerate(placed) if place.partition("[")[0] in ANSWERS)
    start = next(named, len(placed) - 1)
    asked, answered = (tuple(message for _, message in part) for part in (placed[:start], placed[start:]))
    place, last = placed[-1]
    if last.role != "assistant":
        problem = f"it ends with a {last.role} turn, so there is no answer that the label is about"
        raise refused(where, place, last.content, problem, "End with the answer, or leave the row out.")
    asked = with_system_column(asked, row, where)
    said = any(message.role == "user" and message.content.strip() for message in asked)
    require(said, f"{where}, {placed[0][0]}", "(empty)", "it holds no question to answer", "Give its text.")
    tools = tools_of(row, where)
    check_calls(placed, tools, where)
    return Feedback(asked, answered, bool(read_label(row[LABEL])), id, tools)
