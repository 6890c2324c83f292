"""The shapes that rows come in: which columns each needs, and which is meant by a row's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple

from align.core.errors import InputError
from align.data.read.content import DOCUMENTS, FEEDBACK, PREFERENCES
from align.data.read.messages import OFFERED, SYSTEM, Fields, refused

HELP = "docs/data-formats.md has every shape."
LABEL = "label"
"""The column that says whether an answer was wanted."""
ANSWER = re.compile(r"((?:response|answer|completion|output|conversation)[ _-]?)([a-z0-9])")
"""A column that holds one of two answers: its stem, and its ending."""
ENDINGS = (("a", "b"), ("1", "2"), ("0", "1"))
VERDICTS = ("winner", "preference", "preferred", "better_response_id", "choice", LABEL)
"""Columns that say which answer is better. Of several the first counts, and the others are metadata."""
WINNERS = ("winner_model_a", "winner_model_b")
"""Columns of which one is 1, or none if neither answer is better."""


class Shape(NamedTuple):
    """What a row looks like.

    Attributes:
        name: for people.
        kind: of the records that it makes, see `align.data.read.content.kind_of`.
        needs: the columns that have to be there and not null.
        answers: the columns of which one holds the answer; none if `needs` has it, or a question may stand alone.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    answers: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """The column that the answer to a question is called by first."""
        return (*self.answers, "completion")[0]


HELPSTEER = Shape("HelpSteer", PREFERENCES, ("prompt", "response", "helpfulness"))
HELPSTEER3 = Shape("HelpSteer3", PREFERENCES, ("context", "response1", "response2", "overall_preference"))
HELPSTEER2 = Shape(
    "HelpSteer2's preferences", PREFERENCES, ("prompt", "response_1", "response_2", "preference_strength")
)
RANKING = Shape("a ranking (Nectar)", PREFERENCES, ("prompt", "answers"))
SCORED = Shape("completions with scores (UltraFeedback)", PREFERENCES, ("instruction", "completions"))
ORCA = Shape("Orca pairs", PREFERENCES, ("question", "chosen", "rejected"))
PAIRS = Shape("preference pairs", PREFERENCES, ("chosen", "rejected"))
JUDGED = Shape("two answers and a verdict", PREFERENCES, ("prompt", "response_a", "response_b", "winner"))
TREE = Shape("a tree of messages (OASST)", DOCUMENTS, ("prompt",))
TREE_MESSAGE = Shape("a message of a tree (OASST)", DOCUMENTS, ("message_id", "parent_id", "role", "text"))
LABELLED = Shape("an answer with a label (KTO)", FEEDBACK, ("prompt", "completion", LABEL))
TEXT = Shape("plain text", DOCUMENTS, ("text",))
CONVERSATIONS: tuple[Shape, ...] = (
    Shape("messages (OpenAI)", DOCUMENTS, ("messages",)),
    Shape("ShareGPT", DOCUMENTS, ("conversations",)),
    Shape("a prompt and its completion", DOCUMENTS, ("prompt",), ("completion", "response", "chosen")),
    Shape("Alpaca", DOCUMENTS, ("instruction",), ("output", "response")),
    Shape("a question and its answer", DOCUMENTS, ("question",), ("answer", "response", "completion", "chosen")),
    Shape("a query and its response", DOCUMENTS, ("query",), ("response", "answer", "completion", "chosen")),
)
"""Of several the first counts: data sets fill the columns of other rows with null."""
FIXED = (HELPSTEER, HELPSTEER2, HELPSTEER3, RANKING)
"""Shapes of pairs whose question stands in the first column that they need, and in no other."""
PAIR_SHAPES = (HELPSTEER2, HELPSTEER3, RANKING, ORCA, PAIRS)
"""Shapes that are known by the columns that they need."""
SHAPES = (HELPSTEER, *PAIR_SHAPES[:3], SCORED, ORCA, PAIRS, JUDGED, TREE_MESSAGE, LABELLED, *CONVERSATIONS, TEXT)
QUESTIONS = ("prompt", "question", "instruction", "query", "conversations", "messages")
"""Columns in which the question of a pair or of a ranking may stand. Of several the first counts that is not null."""
ANSWERS = {name for shape in CONVERSATIONS for name in shape.answers}
BESIDE_TURNS = ("completion", "response", "output", "answer")
"""Columns in which the answer to a conversation may stand that ends with the user's turn."""
USERS = ("user", "human", "prompter")
COLUMNS = frozenset(
    {name for shape in SHAPES for name in (*shape.needs, *shape.answers)} - {*VERDICTS, *WINNERS}
    | {"input", "history", "replies", *SYSTEM, *OFFERED}
)
"""Columns that hold what a row says; `label` does if it is one, see `read_label`."""


def shape_of(row: Fields) -> str:
    """Return what people call a row's shape; an empty text if it has none."""
    shape = recognised(row)
    return shape.name if shape else ""


def recognised(row: Fields) -> Shape | None:
    """Return the shape of a row by its columns; None if they are no shape's, or may be several's."""
    if is_helpsteer(row):
        return HELPSTEER
    if is_tree(row):
        return TREE
    if is_tree_message(row):
        return TREE_MESSAGE
    there = tuple([name for name, value in row.items() if value is not None])
    return shape_of_columns(there, read_label(row.get(LABEL)) is not None)


@lru_cache(4096)
def shape_of_columns(names: tuple[str, ...], labelled: bool) -> Shape | None:
    """Return the shape of a row by its columns that are not null. Rows of a file have the same ones mostly.

    Args:
        labelled: `label` says yes or no.
    """
    there = {*names}
    for shape in PAIR_SHAPES:
        if there.issuperset(shape.needs):
            return shape
    if find_judged_columns(names) is not None:
        return JUDGED
    if "completions" in there and there.intersection(QUESTIONS):
        return SCORED
    if "chosen" in there or "rejected" in there:  # a pair that lacks its other answer would pass for one to imitate
        return None
    for shape in CONVERSATIONS:
        if there.issuperset(shape.needs):
            answered = bool(there.intersection(shape.answers)) or not shape.answers
            if not answered and there & ANSWERS:  # the answer has a name that goes with another question's
                return None
            return LABELLED if labelled and answered else shape
    return TEXT if "text" in there else None


def is_helpsteer(row: Fields) -> bool:
    """Return whether a row is one answer to a prompt with a rating of its helpfulness."""
    return row.get("helpfulness") is not None and "prompt" in row and "response" in row


def is_tree(row: Fields) -> bool:
    """Return whether a row is a whole tree of messages."""
    root = row if "replies" in row else row.get("prompt")
    return isinstance(root, dict) and {"replies", "role", "text"} <= root.keys()


def is_tree_message(row: Fields) -> bool:
    """Return whether a row is one message of a tree, as OASST's flat files have them."""
    named = "message_id" in row and ("parent_id" in row or "message_tree_id" in row)
    return named and "role" in row and "text" in row


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


def judged_columns_of(row: Fields) -> JudgedColumns | None:
    return find_judged_columns(tuple([name for name, value in row.items() if value is not None]))


WORDS: Mapping[str, bool] = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}


def read_label(value: Any) -> bool | None:
    """Return the label that a value writes: true or false, 1 or 0, yes or no, as a value or as text in any case.
    Returns None for anything else."""
    if isinstance(value, str):
        return WORDS.get(value.strip().casefold())
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    return None


def label_error(row: Fields, remedy: str) -> InputError:
    """Return the error of a row whose label cannot be read, or is about no answer.

    Args:
        remedy: how to keep the column as metadata, see `align.data.read.columns.ColumnRules`.
    """
    value = row[LABEL]
    if read_label(value) is None:
        problem = "is no label: true and false, yes and no, 1 and 0 are"
        return refused(LABEL, value, problem, f"Correct it. {remedy}")
    problem = "stands in a row without a question and its answer, so there is no answer that the label is about"
    return refused(LABEL, value, problem, f"Give `prompt` and `completion`. {remedy}")


def question_column(row: Fields) -> str:
    """Return the column that holds the question of a pair or of a ranking; empty if there is none."""
    return next((name for name in QUESTIONS if row.get(name) is not None), "")


def speaker(turn: Fields) -> Any:
    return turn.get("role", turn.get("from"))


def ends_with_user(turns: Any) -> bool:
    """Return whether a list of turns ends with one of the user's."""
    return isinstance(turns, list) and bool(turns) and isinstance(turns[-1], Mapping) and speaker(turns[-1]) in USERS


def answers_beside(row: Fields, shape: Shape) -> list[str]:
    """Return the columns that hold the answer to a conversation which ends with the user's turn, mostly none."""
    if shape.kind == PREFERENCES:
        return []
    turns = next((row[name] for name in ("messages", "conversations") if row.get(name) is not None), None)
    return [name for name in BESIDE_TURNS if row.get(name) is not None] if ends_with_user(turns) else []


def unclear(row: Fields, kinds: tuple[str, ...], remedy: str = HELP) -> InputError:
    """Return the error of a row without a shape: it names the columns, the nearest shape, and what that lacks."""
    columns = ", ".join(map(str, row)) or "(none)"
    problem = "there is nothing to learn from among them"
    return InputError("columns", columns, problem, nearest_shape(row, kinds) + remedy)


def nearest_shape(row: Fields, kinds: tuple[str, ...]) -> str:
    """Return the shape that needs least besides a row's columns, as a sentence; an empty text if no column is alike. A
    column that few shapes have says more than one that many have."""
    there = [name for name, value in row.items() if value is not None]
    best = ""
    most = 0.0
    for shape in SHAPES:
        wanted = columns_wanted(shape)
        answered = any(name in there for name in shape.answers if name != "chosen")  # which half a pair has too
        lacking = [name for name in wanted if name not in there and not (answered and name in shape.answers)]
        alike = {name: get_close_matches(name, there, 1, 0.75) for name in lacking}
        shares = [WEIGHTS[name] * (1 if name not in alike else 0.3 * len(alike[name])) for name in wanted]
        score = sum(shares) / sum(WEIGHTS[name] for name in wanted)
        if shape.kind in kinds and lacking and score > most:
            needs = [f"`{name}`" + (f" (is it `{other[0]}`?)" if other else "") for name, other in alike.items()]
            best = f"The nearest shape is {shape.name}, which also needs {' and '.join(needs)}. "
            most = score
    return best


def columns_wanted(shape: Shape) -> tuple[str, ...]:
    """Return the columns of a shape, of those for an answer the first."""
    return (*shape.needs, *shape.answers[:1])


WEIGHTS = {
    name: 1 / count for name, count in Counter(name for shape in SHAPES for name in columns_wanted(shape)).items()
}
