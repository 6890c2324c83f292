"""The supported shapes of rows: the columns that a shape needs, and those of its question and its answer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple

from align.core.errors import InputError
from align.data.read.content import DOCUMENTS, FEEDBACK, PREFERENCES, split_names
from align.data.read.messages import SYSTEM_COLUMNS, TOOL_COLUMNS, Fields, build_field_error

HELP = "docs/data-formats.md has every shape."
LABEL = "label"
"""Name of the column that says whether an answer is desirable (KTO)."""
ANSWER_COLUMN = re.compile(r"((?:response|answer|completion|output|conversation)[ _-]?)([a-z0-9])")
"""Pattern for the name of a column with one of two compared answers, such as `response_a`. Its groups are the stem and
the ending."""
ANSWER_ENDINGS = (("a", "b"), ("1", "2"), ("0", "1"))
VERDICT_COLUMNS = ("winner", "preference", "preferred", "better_response_id", "choice", LABEL)
"""Columns that say which answer is better. The first one present is read, the others are metadata."""
WINNER_COLUMNS = ("winner_model_a", "winner_model_b")
"""Columns with a flag for each answer. Both are 0 if neither answer is better."""
QUESTION_COLUMNS = ("prompt", "question", "instruction", "query", "conversations", "messages")
"""Columns that may hold the question of a pair or of a ranking. The first one that is not null is read."""


class Shape(NamedTuple):
    """A supported row format, with the names of its required, question, answer and comment columns.

    Attributes:
        name: for messages to the user.
        kind: kind of its records, see `align.data.read.content.get_record_kind`.
        needs: columns that must be present and not null.
        answer_columns: columns that may hold the answer. Empty if the answer is in `needs`, or a question alone is
            valid.
        question_columns: columns that may hold the question; the first one that is not null is read. Empty if nothing
            can be written below the question.
        comment_columns: columns of published data sets that comment on the answers. They are metadata, however long
            they are.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    answer_columns: tuple[str, ...] = ()
    question_columns: tuple[str, ...] = ()
    comment_columns: tuple[str, ...] = ()

    @property
    def default_answer(self) -> str:
        """The name of the format's first answer column, or `completion` if it has no answer columns."""
        return (*self.answer_columns, "completion")[0]


HELPSTEER = Shape("HelpSteer", PREFERENCES, ("prompt", "response", "helpfulness"), question_columns=("prompt",))
HELPSTEER3 = Shape(
    "HelpSteer3",
    PREFERENCES,
    ("context", "response1", "response2", "overall_preference"),
    question_columns=("context",),
    comment_columns=("individual_preference",),
)
HELPSTEER2 = Shape(
    "HelpSteer2's preferences",
    PREFERENCES,
    ("prompt", "response_1", "response_2", "preference_strength"),
    question_columns=("prompt",),
    comment_columns=split_names(
        "preference_statement preference_elaboration three_most_similar_preferences all_preferences_unprocessed"
    ),
)
RANKING = Shape("a ranking (Nectar)", PREFERENCES, ("prompt", "answers"), question_columns=("prompt",))
SCORED = Shape(
    "completions with scores (UltraFeedback)",
    PREFERENCES,
    ("instruction", "completions"),
    question_columns=QUESTION_COLUMNS,
    comment_columns=("correct_answers", "incorrect_answers"),
)
ORCA = Shape("Orca pairs", PREFERENCES, ("question", "chosen", "rejected"), question_columns=QUESTION_COLUMNS)
PAIRS = Shape("preference pairs", PREFERENCES, ("chosen", "rejected"), question_columns=QUESTION_COLUMNS)
JUDGED = Shape(
    "two answers and a verdict",
    PREFERENCES,
    ("prompt", "response_a", "response_b", "winner"),
    question_columns=QUESTION_COLUMNS,
)
TREE = Shape("a tree of messages (OASST)", DOCUMENTS, ("prompt",))
TREE_MESSAGE = Shape("a message of a tree (OASST)", DOCUMENTS, ("message_id", "parent_id", "role", "text"))
TEXT = Shape("plain text", DOCUMENTS, ("text",))
CONVERSATIONS = tuple(
    Shape(name, DOCUMENTS, (column,), split_names(answers), question_columns=(column,))
    for column, name, answers in (
        ("messages", "messages (OpenAI)", ""),
        ("conversations", "ShareGPT", ""),
        ("prompt", "a prompt and its completion", "completion response chosen"),
        ("instruction", "Alpaca", "output response"),
        ("question", "a question and its answer", "answer response completion chosen"),
        ("query", "a query and its response", "response answer completion chosen"),
    )
)
"""Shapes of conversations by priority: the first one whose column is not null applies."""
CONVERSATION_COLUMNS = tuple(shape.needs[0] for shape in CONVERSATIONS)
LABELLED = Shape(
    "an answer with a label (KTO)", FEEDBACK, ("prompt", "completion", LABEL), question_columns=CONVERSATION_COLUMNS
)
PAIR_SHAPES = (HELPSTEER2, HELPSTEER3, RANKING, ORCA, PAIRS)
"""Shapes that are identified by the columns that they need."""
SHAPES = (HELPSTEER, *PAIR_SHAPES[:3], SCORED, ORCA, PAIRS, JUDGED, TREE_MESSAGE, LABELLED, *CONVERSATIONS, TEXT)
CONVERSATION_ANSWERS = {name for shape in CONVERSATIONS for name in shape.answer_columns}
ANSWERS_BESIDE_TURNS = ("completion", "response", "output", "answer")
"""Columns that may hold the answer if a conversation ends with the user's turn."""
USER_SPEAKERS = ("user", "human", "prompter")
CONTENT_COLUMNS = frozenset(
    {name for shape in SHAPES for name in (*shape.needs, *shape.answer_columns)} - {*VERDICT_COLUMNS, *WINNER_COLUMNS}
    | {"input", "history", "replies", *SYSTEM_COLUMNS, *TOOL_COLUMNS}
)
"""Columns that hold the content of a row. `label` is one only if its value is a label, see `parse_label`."""


def find_shape_name(row: Fields) -> str:
    """Return the name of the supported format, such as `Alpaca`, that a row's columns fit. Returns an empty text if
    `find_shape` returns None."""
    shape = find_shape(row)
    return shape.name if shape else ""


def find_shape(row: Fields) -> Shape | None:
    """Recognise the supported format of a row, such as Alpaca or HelpSteer, by its columns. Returns None if no format
    fits, or if the row holds half a pair or the answer column of another format."""
    if is_helpsteer(row):
        return HELPSTEER
    if is_tree(row):
        return TREE
    if is_tree_message(row):
        return TREE_MESSAGE
    names = tuple([name for name, value in row.items() if value is not None])
    return find_shape_of_columns(names, parse_label(row.get(LABEL)) is not None)


@lru_cache(4096)
def find_shape_of_columns(names: tuple[str, ...], has_label: bool) -> Shape | None:
    """Return the row format that a set of non-null column names fits, or None. HelpSteer and message trees are not
    recognised here, see `find_shape`. Cached, as most rows of a file have the same columns.

    Args:
        names: the columns.
        has_label: the value of `label` is a label.
    """
    present = {*names}
    for shape in PAIR_SHAPES:
        if present.issuperset(shape.needs):
            return shape
    if find_judged_columns(names) is not None:
        return JUDGED
    if "completions" in present and present.intersection(QUESTION_COLUMNS):
        return SCORED
    if "chosen" in present or "rejected" in present:  # half a pair, which must not be imitated
        return None
    for shape in CONVERSATIONS:
        if present.issuperset(shape.needs):
            has_answer_column = bool(present.intersection(shape.answer_columns)) or not shape.answer_columns
            if not has_answer_column and present & CONVERSATION_ANSWERS:  # the answer column belongs to another shape
                return None
            return LABELLED if has_label and has_answer_column else shape
    return TEXT if "text" in present else None


def is_helpsteer(row: Fields) -> bool:
    """Return whether a row has HelpSteer's format: one answer to a prompt, with a rating of its helpfulness."""
    return row.get("helpfulness") is not None and "prompt" in row and "response" in row


def is_tree(row: Fields) -> bool:
    """Return whether a row holds a whole message tree (OASST): a message with nested `replies`, in the row itself or in
    its column `prompt`."""
    root = row if "replies" in row else row.get("prompt")
    return isinstance(root, dict) and {"replies", "role", "text"} <= root.keys()


def is_tree_message(row: Fields) -> bool:
    """Return whether a row is one message of a tree, with its id and that of its parent or tree, as in OASST's flat
    files."""
    has_ids = "message_id" in row and ("parent_id" in row or "message_tree_id" in row)
    return has_ids and "role" in row and "text" in row


class JudgedColumns(NamedTuple):
    """The names of a row's two answer columns, and of the column or columns that say which answer is better.

    Attributes:
        answers: the two answer columns.
        endings: endings of their names: a and b, 1 and 2, or 0 and 1.
        verdict: one column, or `WINNER_COLUMNS`.
    """

    answers: tuple[str, str]
    endings: tuple[str, str]
    verdict: tuple[str, ...]


@lru_cache(4096)
def find_judged_columns(names: tuple[str, ...]) -> JudgedColumns | None:
    """Find two answer columns, such as `response_a` and `response_b`, and the column that says which is better, among
    non-null column names of a row. Returns None if either is missing."""
    verdict = (
        WINNER_COLUMNS
        if {*names}.issuperset(WINNER_COLUMNS)
        else (*(name for name in VERDICT_COLUMNS if name in names),)[:1]
    )
    if not verdict:
        return None
    by_parts = {match.groups(): name for name in names if (match := ANSWER_COLUMN.fullmatch(name.casefold()))}
    stems = [stem for stem, _ in by_parts]
    for (stem, ending), name in by_parts.items():
        if stems.count(stem) != 2:  # more than two answers, such as choices
            continue
        for first, second in ANSWER_ENDINGS:
            if ending == first and (stem, second) in by_parts:
                return JudgedColumns((name, by_parts[stem, second]), (first, second), verdict)
    return None


def find_judged_columns_of_row(row: Fields) -> JudgedColumns | None:
    """Find a row's two answer columns and the column that says which answer is better, or return None if either is
    missing. Columns that are null are left out."""
    return find_judged_columns(tuple([name for name, value in row.items() if value is not None]))


LABEL_WORDS: Mapping[str, bool] = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


def parse_label(value: Any) -> bool | None:
    """Return a label as a boolean, given as true or false, 1 or 0, yes or no, as a value or as text in any case.
    Returns None for anything else."""
    if isinstance(value, str):
        return LABEL_WORDS.get(value.strip().casefold())
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    return None


def build_label_error(row: Fields, remedy: str) -> InputError:
    """Return the InputError for a row whose `label` cannot be parsed, or that has no question and answer to label.

    Args:
        row: the row.
        remedy: how to keep the column as metadata, see `align.data.read.column_rules.ColumnRules`.
    """
    value = row[LABEL]
    if parse_label(value) is None:
        problem = "is no label: true and false, yes and no, 1 and 0 are"
        return build_field_error(LABEL, value, problem, f"Correct it. {remedy}")
    problem = "is a label in a row without a question and its answer, so there is nothing that it labels"
    return build_field_error(LABEL, value, problem, f"Give `prompt` and `completion`. {remedy}")


def find_question_column(row: Fields, names: Sequence[str] = QUESTION_COLUMNS) -> str:
    """Return the first of the columns `names` that is not null in a row. If all are null, returns the name if there is
    only one, and an empty text otherwise."""
    return next((name for name in names if row.get(name) is not None), names[0] if len(names) == 1 else "")


def get_speaker(turn: Fields) -> Any:
    return turn.get("role", turn.get("from"))


def ends_with_user(turns: Any) -> bool:
    """Return whether a value is a list of turns whose last turn is the user's."""
    return (
        isinstance(turns, list)
        and bool(turns)
        and isinstance(turns[-1], Mapping)
        and get_speaker(turns[-1]) in USER_SPEAKERS
    )


def find_answers_beside_turns(row: Fields, shape: Shape) -> list[str]:
    """Return the non-null answer columns, such as `completion`, beside a conversation that ends with a user turn.
    Returns an empty list for any other row, and for preference pairs."""
    if shape.kind == PREFERENCES:
        return []
    turns = next((row[name] for name in ("messages", "conversations") if row.get(name) is not None), None)
    return [name for name in ANSWERS_BESIDE_TURNS if row.get(name) is not None] if ends_with_user(turns) else []


def build_unknown_shape_error(row: Fields, kinds: tuple[str, ...], remedy: str = HELP) -> InputError:
    """Return the InputError for a row that fits no supported format. It lists the row's columns, and the columns that
    the nearest format also needs."""
    columns = ", ".join(map(str, row)) or "(none)"
    problem = "no row of a supported shape can be read from them"
    return InputError("columns", columns, problem, describe_nearest_shape(row, kinds) + remedy)


def describe_nearest_shape(row: Fields, kinds: tuple[str, ...]) -> str:
    """Return a sentence that names the row format nearest to a row's columns, and the columns that it also needs. Only
    formats of `kinds` are considered. Returns an empty text if no column is similar. A column weighs more the fewer
    formats have it."""
    present = [name for name, value in row.items() if value is not None]
    description = ""
    best_score = 0.0
    for shape in SHAPES:
        columns = list_required_columns(shape)
        # `chosen` does not count, as it may be half a pair.
        has_answer_column = any(name in present for name in shape.answer_columns if name != "chosen")
        missing = [
            name for name in columns if name not in present and not (has_answer_column and name in shape.answer_columns)
        ]
        similar = {name: get_close_matches(name, present, 1, 0.75) for name in missing}
        weights = [COLUMN_WEIGHTS[name] * (1 if name not in similar else 0.3 * len(similar[name])) for name in columns]
        score = sum(weights) / sum(COLUMN_WEIGHTS[name] for name in columns)
        if shape.kind in kinds and missing and score > best_score:
            needs = [
                f"`{name}`" + (f" (is it `{close_names[0]}`?)" if close_names else "")
                for name, close_names in similar.items()
            ]
            description = f"The nearest shape is {shape.name}, which also needs {' and '.join(needs)}. "
            best_score = score
    return description


def list_required_columns(shape: Shape) -> tuple[str, ...]:
    """Return a row format's required columns, followed by the first of its answer columns. Any other answer column will
    do as well."""
    return (*shape.needs, *shape.answer_columns[:1])


COLUMN_WEIGHTS = {
    name: 1 / count
    for name, count in Counter(name for shape in SHAPES for name in list_required_columns(shape)).items()
}
