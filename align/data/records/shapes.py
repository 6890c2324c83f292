"""The shapes that rows come in: which columns each needs, and which is meant by a row's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple

from align.data.records.content import DOCUMENTS, FEEDBACK, PREFERENCES
from align.data.records.judged_pairs import VERDICTS, WINNERS, find_judged_columns
from align.data.records.labels import LABEL, read_label
from align.data.records.messages import SYSTEM
from align.data.records.tools import OFFERED
from align.data.records.trees import is_tree, is_tree_message
from align.errors import InputError

HELP = "docs/data-formats.md has every shape."


class Shape(NamedTuple):
    """What a row looks like.

    Attributes:
        name: for people.
        kind: of the records that it makes, see `align.data.records.content.kind_of`.
        needs: the columns that have to be there and not null.
        answers: the columns of which one holds the answer; none where `needs` has it, or a question may stand alone.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    answers: tuple[str, ...] = ()


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
LABELLED = Shape("an answer with a label (KTO)", FEEDBACK, ("prompt", "completion", "label"))
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
SHAPES_OF_DOCUMENTS = (*CONVERSATIONS, TEXT)
SHAPES = (
    HELPSTEER,
    HELPSTEER2,
    HELPSTEER3,
    RANKING,
    SCORED,
    ORCA,
    PAIRS,
    JUDGED,
    TREE_MESSAGE,
    LABELLED,
    *CONVERSATIONS,
    TEXT,
)
QUESTIONS = ("prompt", "question", "instruction", "query", "conversations", "messages")
"""Columns in which the question of a pair or of a ranking may stand. Of several the first counts that is not null."""
ANSWERS = {name for shape in CONVERSATIONS for name in shape.answers}
BESIDE_TURNS = ("completion", "response", "output", "answer")
"""Columns in which the answer to a conversation may stand that ends with the user's turn."""
USERS = ("user", "human", "prompter")
COLUMNS = frozenset(
    {name for shape in SHAPES for name in (*shape.needs, *shape.answers)} - {"label", *VERDICTS, *WINNERS}
    | {"input", "history", "replies", *SYSTEM, *OFFERED}
)
"""Columns that hold what a row says; `label` does where it is one, see `align.data.records.labels`."""


def shape_of(row: Mapping[str, Any]) -> str:
    """What people call a row's shape; nothing where it has none."""
    shape = recognised(row)
    return shape.name if shape else ""


def recognised(row: Mapping[str, Any]) -> Shape | None:
    """The shape of a row by its columns; None where they are no shape's, or may be several's."""
    if is_helpsteer(row):
        return HELPSTEER
    if is_tree(row):
        return TREE
    if is_tree_message(row):
        return TREE_MESSAGE
    there = tuple([name for name, value in row.items() if value is not None])
    return by_columns(there, read_label(row.get(LABEL)) is not None)


@lru_cache(4096)
def by_columns(names: tuple[str, ...], labelled: bool) -> Shape | None:
    """The same of the columns that are not null. Rows of a file have the same ones mostly.

    Args:
        labelled: `label` says yes or no.
    """
    there = {*names}
    for shape in (HELPSTEER2, HELPSTEER3, RANKING, ORCA, PAIRS):
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


def is_helpsteer(row: Mapping[str, Any]) -> bool:
    """Return whether a row is one answer to a prompt with a rating of its helpfulness."""
    return row.get("helpfulness") is not None and "prompt" in row and "response" in row


def question_column(row: Mapping[str, Any]) -> str:
    """Return the column that holds the question of a pair or of a ranking; empty if there is none."""
    return next((name for name in QUESTIONS if row.get(name) is not None), "")


def speaker(turn: Mapping[str, Any]) -> Any:
    return turn.get("role", turn.get("from"))


def ends_with_user(turns: Any) -> bool:
    """Return whether a list of turns ends with one of the user's."""
    return isinstance(turns, list) and bool(turns) and isinstance(turns[-1], Mapping) and speaker(turns[-1]) in USERS


def answers_beside(row: Mapping[str, Any], shape: Shape) -> list[str]:
    """Return the columns that hold the answer to a conversation which ends with the user's turn, mostly none."""
    if shape.kind == PREFERENCES:
        return []
    turns = next((row[name] for name in ("messages", "conversations") if row.get(name) is not None), None)
    return [name for name in BESIDE_TURNS if row.get(name) is not None] if ends_with_user(turns) else []


def unclear(row: Mapping[str, Any], where: str) -> InputError:
    """The error of a row without a shape: it names the columns, the nearest shape, and what that lacks."""
    columns = ", ".join(map(str, row)) or "(none)"
    problem = "there is nothing to learn from among them"
    return InputError(f"{where}, columns", columns, problem, nearest(row, (DOCUMENTS, PREFERENCES, FEEDBACK)) + HELP)


def nearest(row: Mapping[str, Any], kinds: tuple[str, ...]) -> str:
    """The shape that needs least besides a row's columns, as a sentence; nothing where no column is alike. A column
    that few shapes have says more than one that many have."""
    there = [name for name, value in row.items() if value is not None]
    best, most = "", 0.0
    for shape in SHAPES:
        wanted = wanted_by(shape)
        answered = any(name in there for name in shape.answers if name != "chosen")  # which half a pair has too
        lacking = [name for name in wanted if name not in there and not (answered and name in shape.answers)]
        alike = {name: get_close_matches(name, there, 1, 0.75) for name in lacking}
        shares = [WEIGHTS[name] * (1 if name not in alike else 0.3 * len(alike[name])) for name in wanted]
        score = sum(shares) / sum(WEIGHTS[name] for name in wanted)
        if shape.kind in kinds and lacking and score > most:
            told = [f"`{name}`" + (f" (is it `{found[0]}`?)" if found else "") for name, found in alike.items()]
            best, most = f"The nearest shape is {shape.name}, which also needs {' and '.join(told)}. ", score
    return best


def wanted_by(shape: Shape) -> tuple[str, ...]:
    """The columns of a shape, of those for an answer the first."""
    return (*shape.needs, *shape.answers[:1])


WEIGHTS = {name: 1 / count for name, count in Counter(name for shape in SHAPES for name in wanted_by(shape)).items()}
