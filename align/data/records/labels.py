"""Labels of answers: whether an answer was wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.data.records.refusals import refused
from align.errors import InputError

LABEL = "label"
WORDS: Mapping[str, bool] = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


def read_label(value: Any) -> bool | None:
    """Return the label that a value writes: true or false, 1 or 0, yes or no, as a value or as text in any case.
    Returns None for anything else."""
    if isinstance(value, str):
        return WORDS.get(value.strip().casefold())
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    return None


def label_error(row: Mapping[str, Any], where: str, remedy: str) -> InputError:
    """Return the error of a row whose label cannot be read, or is about no answer.

    Args:
        remedy: how to keep the column as metadata, see `align.data.records.column_rules.ColumnRules`.
    """
    value = row[LABEL]
    if read_label(value) is None:
        problem = "is no label: true and false, yes and no, 1 and 0 are"
        return refused(where, LABEL, value, problem, f"Correct it. {remedy}")
    problem = "stands in a row without a question and its answer, so there is no answer that the label is about"
    return refused(where, LABEL, value, problem, f"Give `prompt` and `completion`. {remedy}")
