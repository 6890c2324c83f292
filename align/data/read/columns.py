"""The shapes that rows come in, and what becomes of each column: it is read, put into the question, or kept as
metadata. Nothing is dropped.

One table (`Shape`) says which columns a shape needs, where its question and its answer stand, and which columns comment
on it. Of the other columns of a row,

- a column that changes the question (`CONTEXT`, `CHOICES`, `option_a` …) is written below the question, see
  `with_context`;
- a text that averages over `LONGEST` characters is refused, once for the whole data set: the user says whether it is
  part of the question or metadata;
- everything else is metadata.

Names are compared without regard to case.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice, takewhile
from string import ascii_lowercase
from typing import Any, NamedTuple

from align.core.errors import InputError
from align.data.read.content import DOCUMENTS, FEEDBACK, PREFERENCES, split_names
from align.data.read.messages import (
    HELPSTEER_TURN,
    HH_TURN,
    NOT_READ_OF_ROWS,
    OFFERED,
    RESULTS,
    SYSTEM,
    TURN_FIELDS,
    Fields,
    as_turns,
    refused,
    says_nothing,
)
from align.data.read.rows import CELLS, Row, check_values, placed_rows

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


QUESTIONS = ("prompt", "question", "instruction", "query", "conversations", "messages")
"""Columns in which the question of a pair or of a ranking may stand. Of several the first counts that is not null."""


class Shape(NamedTuple):
    """What a row looks like.

    Attributes:
        name: for people.
        kind: of the records that it makes, see `align.data.read.content.kind_of`.
        needs: the columns that have to be there and not null.
        answers: the columns of which one holds the answer; none if `needs` has it, or a question may stand alone.
        asks: the columns in which its question may stand, of which the first counts that is not null; none if nothing
            can be written below it.
        comments: columns of published data sets that comment on the answers: metadata, however long they are.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    answers: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()
    comments: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """The column that the answer to a question is called by first."""
        return (*self.answers, "completion")[0]


HELPSTEER = Shape("HelpSteer", PREFERENCES, ("prompt", "response", "helpfulness"), asks=("prompt",))
HELPSTEER3 = Shape(
    "HelpSteer3",
    PREFERENCES,
    ("context", "response1", "response2", "overall_preference"),
    asks=("context",),
    comments=("individual_preference",),
)
HELPSTEER2 = Shape(
    "HelpSteer2's preferences",
    PREFERENCES,
    ("prompt", "response_1", "response_2", "preference_strength"),
    asks=("prompt",),
    comments=split_names(
        "preference_statement preference_elaboration three_most_similar_preferences all_preferences_unprocessed"
    ),
)
RANKING = Shape("a ranking (Nectar)", PREFERENCES, ("prompt", "answers"), asks=("prompt",))
SCORED = Shape(
    "completions with scores (UltraFeedback)",
    PREFERENCES,
    ("instruction", "completions"),
    asks=QUESTIONS,
    comments=("correct_answers", "incorrect_answers"),
)
ORCA = Shape("Orca pairs", PREFERENCES, ("question", "chosen", "rejected"), asks=QUESTIONS)
PAIRS = Shape("preference pairs", PREFERENCES, ("chosen", "rejected"), asks=QUESTIONS)
JUDGED = Shape(
    "two answers and a verdict", PREFERENCES, ("prompt", "response_a", "response_b", "winner"), asks=QUESTIONS
)
TREE = Shape("a tree of messages (OASST)", DOCUMENTS, ("prompt",))
TREE_MESSAGE = Shape("a message of a tree (OASST)", DOCUMENTS, ("message_id", "parent_id", "role", "text"))
TEXT = Shape("plain text", DOCUMENTS, ("text",))
CONVERSATIONS = tuple(
    Shape(name, DOCUMENTS, (column,), split_names(answers), asks=(column,))
    for column, name, answers in (
        ("messages", "messages (OpenAI)", ""),
        ("conversations", "ShareGPT", ""),
        ("prompt", "a prompt and its completion", "completion response chosen"),
        ("instruction", "Alpaca", "output response"),
        ("question", "a question and its answer", "answer response completion chosen"),
        ("query", "a query and its response", "response answer completion chosen"),
    )
)
"""Of several the first counts: data sets fill the columns of other rows with null."""
CONVERSATION_COLUMNS = tuple(shape.needs[0] for shape in CONVERSATIONS)
LABELLED = Shape("an answer with a label (KTO)", FEEDBACK, ("prompt", "completion", LABEL), asks=CONVERSATION_COLUMNS)
PAIR_SHAPES = (HELPSTEER2, HELPSTEER3, RANKING, ORCA, PAIRS)
"""Shapes that are known by the columns that they need."""
SHAPES = (HELPSTEER, *PAIR_SHAPES[:3], SCORED, ORCA, PAIRS, JUDGED, TREE_MESSAGE, LABELLED, *CONVERSATIONS, TEXT)
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


def question_column(row: Fields, asks: Sequence[str] = QUESTIONS) -> str:
    """Return the first of some columns that is not null, or the only one; empty if there is none."""
    return next((name for name in asks if row.get(name) is not None), asks[0] if len(asks) == 1 else "")


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


EVALUATED = "data.eval_path"
"""A file to which the settings of `data.path` apply too, and which may lack what that keeps as metadata."""
FIRST = 16
"""Rows whose columns are named if one is missing."""
LONGEST = 40
"""Characters that the texts of a column may average and still be metadata."""
CONTEXT = split_names(
    "input inputs context contexts passage passages paragraph paragraphs document documents article "
    "articles background story premise hypothesis table schema"
)
"""Columns without which a question is another one, in the order in which they are written below it."""
CHOICES = ("choices", "options", "answer_choices", "endings")
"""Columns that list what a question lets one choose from."""
LETTERED = re.compile(r"(?:option|choice|opt|op)[ _-]?([a-r]|\d{1,2})")
"""A column that holds one choice. The columns `a`, `b`, `c` … of a row that has the first three are such too."""
OPTION_TEXTS = ("text", "value", "content", "option")
OPTION_LABELS = ("label", "key", "id", "letter")
"""Fields of a choice that is an object: its text, and its letter."""
LONGEST_LABEL = 3
"""Characters of the label of a choice that is an object. What is longer is an id, and letters are written."""
REPLY_FIELDS = {"message", "finish_reason", "logprobs", "delta", "index"}
"""Fields of an answer as an API logs it, under `choices`."""
TITLES = ("title", "heading", "name")
BODIES = ("text", "content", "contents", "page_content", "passage", "body", "document", "paragraph", "snippet")
"""Fields of a document that is an object: its title, and its text."""
WRITTEN_FIELDS = {*TITLES, *BODIES, *OPTION_TEXTS, *OPTION_LABELS}
ASKS = frozenset((*QUESTIONS, "instructions", "problem", "code"))
"""Columns that ask, of which a row's shape reads one. Another one is refused however short its texts are."""
ALIASES = {
    "chosen_response": "chosen",
    "rejected_response": "rejected",
    "kto_tag": "label",
    **dict.fromkeys(("system_message", "system prompt", "system message", "systemprompt"), "system"),
}
"""Other names of columns → ours."""
OTHERS_READ = split_names(
    "label helpfulness overall_preference preference_strength margin deleted message_tree_id metadata"
)
KNOWN = frozenset((*COLUMNS, *CONTEXT, *CHOICES, *ALIASES, *OTHERS_READ, *VERDICTS, *WINNERS))
"""Names that are found in other case too."""
OF_TURNS = "[]."
"""What stands in front of a field of turns, where it is named like a column: `messages[].mood`."""
WITHIN = "metadata."
"""What stands in front of a field of the object `metadata`, where it is named like a column."""
IDENTIFYING = frozenset(
    split_names(
        "id uuid hash source dataset subset category language lang license licence url link model generator "
        "annotator author created_at timestamp date split tags meta"
    )
)
"""Columns that are metadata however long their texts are."""
CHECKED_BY = frozenset(
    split_names(
        "answer answers expected reference references solution solutions target targets test tests check "
        "checks rubric ground_truth rejected chosen completion response output label"
    )
)
"""Columns that answers to a prompt are checked by. If a row is asked and not imitated, they are kept for that."""
COMMENTING = CHECKED_BY.union(
    split_names(
        "explanation explanations rationale rationales reason reasoning justification feedback critique "
        "comment comments"
    )
)
"""Columns that would give the answer away, and are not offered as part of the question."""
NAMED_ANSWER = ANSWERS.union(
    split_names("answers answerkey answer_key correct_answer correct_answers best_answer preference")
)
"""Columns that hold an answer, or say which is right."""
OF_SEVERAL = re.compile(r"(?:response|answer|completion|output)[ _-]?[abc0-3]|answers|correct_answers|preference")
"""Of those, the ones that hold one of several answers, or all, or say which is better."""
ANSWER_LABEL = re.compile(r"[(\[]?([A-Za-z]|\d{1,2})[)\].:]?")
"""An answer that names a choice."""
ABOUT_PAIRS = split_names(
    "margin strength id group_id annotator source guideline_version created_at chosen_ended rejected_ended scorer"
)
"""Columns that a preference pair keeps as attributes of its own."""
OURS = {*KNOWN, "winner_tie", *CHECKED_BY, *ABOUT_PAIRS, *IDENTIFYING, *ASKS, *ascii_lowercase}
"""What a column may be renamed to: a name that is read, or that says what the column is."""
ABOUT_TURNS = ("role", "from", "type", "id", "name", "tool_call_id")
"""Fields of a turn that are no text of it."""
OF_SPAN = {"text", "answer_start", "answer_end", "start", "end", "id", "answer_id"}
"""Fields of an answer that say where it stands, and not how good it is."""


def fold(name: Any) -> str:
    """Return the name of a column as names are compared."""
    return str(name).strip().casefold()


@dataclass(frozen=True)
class ColumnRules:
    """What a user says of the columns of a data set.

    Attributes:
        columns: our name of a column → the data set's.
        metadata: the data set's names of columns that are kept as metadata, whatever they hold.
        source: a source of `stage=data` is read, which has settings of its own; else the group `data`.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    metadata: Sequence[str] = ()
    source: bool = False

    def apply(self, row: Row) -> Row:
        """Return a row under our names, with what changes its question written below it.

        Raises:
            InputError: a column that is to be renamed is missing, or a context cannot be written below the question.
        """
        data: dict[str, Any] = row.data
        has_several = not isinstance(data.get("answer"), str | None)
        if not (self.columns or self.metadata or row.texts or has_several) and keeps_names(tuple(data)):
            return row
        wanted = {fold(name) for name in self.metadata if name not in data}
        aside = {name: data[name] for name in data if name in self.metadata or (wanted and fold(name) in wanted)}
        if aside:
            data = {name: value for name, value in data.items() if name not in aside}
        if self.columns:
            data, displaced = renamed(data, self.columns)
            aside |= displaced
        for ours, other in names_alike(tuple(data)):
            null = next((name for name in (other, ours) if data.get(name) is None), None)
            if null is None:
                problem = f"stands beside `{ours}`, and case does not tell columns apart"
                raise refused(other, data[other], problem, f"Rename one of the two. {self.keep([other])}")
            data = {name: value for name, value in data.items() if name != null}
        if names := known_names(tuple(data)):
            data = {names.get(name, name): value for name, value in data.items()}
        if row.texts:
            data = CELLS.typed(data)
            check_values(data)
        data, several = with_first_answer(data)
        data = self.with_whole_question(data)
        return row._replace(data=data, aside={**aside, **several})

    def keep(self, names: Iterable[str]) -> str:
        """Return the sentence that says how columns are kept as metadata: a setting to copy."""
        return self._setting(
            "To keep it as metadata", "metadata", f"[{', '.join(map(quoted, [*self.metadata, *names]))}]"
        )

    def use(self, name: str) -> str:
        """Return the sentence that says how a column becomes part of the question: a setting to copy."""
        ours = next((ours for ours in ("context", *CONTEXT) if ours not in self.columns), "context")
        return self._rename("If it belongs to the question", {ours: name})

    def _rename(self, condition: str, names: Mapping[str, str]) -> str:
        pairs = ", ".join(f"{ours}: {quoted(theirs)}" for ours, theirs in {**self.columns, **names}.items())
        return self._setting(condition, "columns", f"{{{pairs}}}")

    def _setting(self, condition: str, key: str, value: str) -> str:
        if self.source:
            return f"{condition}, write {{path: …, {key}: {value}}}."
        return f'{condition}: "data.{key}={value}".'

    def check_answer(self, row: Fields, shape: Shape) -> None:
        """Check that a row without an answer has none in a column that its shape does not read.

        Raises:
            InputError: a column has the name of an answer.
        """
        if shape is not TEXT and has_answer(row, shape):
            return
        beside = answers_beside(row, shape)
        names = [name for name in row if row[name] is not None and is_answer(str(name)) and name not in beside]
        if not names:
            return
        name = names[0]
        remedy = self.keep(names)
        if isinstance(row[name], str) and not OF_SEVERAL.fullmatch(fold(name)):
            ours = {"question": "text", "answer": name} if shape is TEXT else {shape.answer: name}
            remedy = f"{self._rename('If it is the answer', ours)} {remedy}"
        raise refused(name, row[name], "is named as an answer, and the row is read without one", remedy)

    def with_whole_question(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return a row whose question has its context and its choices below it, and the turns of `history` before it.

        Raises:
            InputError: a context or the history cannot be part of the question.
        """
        names = [name for name in context_columns(tuple(data)) if not says_nothing(data[name])]
        history = data.get("history")
        if not names and says_nothing(history):
            return data
        shape = recognised(data)
        asking = asking_columns(data, shape)
        if shape is None and not asking:  # its reader names the columns and the nearest shape
            return data
        data = self.with_context(data, names, asking, shape)
        if says_nothing(history) or asking == ("instruction",):  # whose reader reads its history itself
            return data
        before = turns_before(history)
        if before is None:
            raise self._homeless(data, "history", "is no list of [question, answer]")
        question = data[asking[0]] if len(asking) == 1 else None
        if not isinstance(question, str) or is_transcript(question):
            raise self._homeless(data, "history", "stands beside no question that is one text")
        return {**data, asking[0]: [*before, {"role": "user", "content": question}], "history": None}

    def with_context(
        self, data: dict[str, Any], names: list[str], asking: Sequence[str], shape: Shape | None
    ) -> dict[str, Any]:
        """Return a row whose question has its context and its choices below it, a line each.

        The columns come in the order of `CONTEXT` and `CHOICES`; choices have letters. What the question says already
        is not written again. A conversation has to have one turn of the user's, below which they are written.

        Raises:
            InputError: a context is no text and no list of texts, or the row has no such turn.
        """
        if names == ["input"] and asking == ("instruction",) and (shape is None or shape.kind != PREFERENCES):
            return data  # Alpaca's reader writes it there, in the same way
        names = [name for name in names if name not in asking]
        asked = [text for name in asking for text in spoken(data[name])]
        below = list[str]()
        at = ""
        for name, rendered in self._rendered(data, names):
            if rendered.labels:
                named = self._are_choices_named(data, rendered, "\n".join(asked), name)
            else:
                named = any(stands_in(rendered.parts, text, in_order=name not in CONTEXT) for text in asked)
            if rendered.parts and not named:
                below.append(rendered.text)
                at = name
        if not below:
            return data
        if not asking:
            raise self._homeless(data, at, "stands beside no question that it could be part of")
        row = dict(data)
        for name in asking:
            row[name] = self._written_below(row[name], "\n".join(below), name, at)
        if "input" in names and "instruction" in asking:
            row["input"] = None
        return row

    def _rendered(self, row: Fields, names: Sequence[str]) -> Iterator[tuple[str, Rendered]]:
        lettered = lettered_columns(row)
        for name in names:
            if name in lettered:
                continue
            value = row[name]
            if name == "choices" and are_replies(value, answered=any(row.get(key) is not None for key in CHECKED_BY)):
                problem = "holds answers as an API logs them, and not what a question lets one choose from"
                remedy = f"Write the answer into a column `completion`. {self.keep([name])}"
                raise refused(name, value, problem, remedy)
            rendered = rendered_choices(value) if name in CHOICES else rendered_context(value)
            if rendered is None:
                problem = "is neither a text nor a list of texts"
                if name in CHOICES:
                    problem = "holds a choice that is neither a text nor a number"
                raise self._homeless(row, name, problem)
            yield name, rendered
        if lettered:
            labels = [letter_in(name) for name in lettered]
            rendered = rendered_choices({"label": labels, "text": [row[name] for name in lettered]})
            if rendered is None:
                raise self._homeless(row, lettered[0], "is neither a text nor a number")
            yield lettered[0], rendered

    def _are_choices_named(self, row: Fields, choices: Rendered, text: str, name: str) -> bool:
        """Return whether the question names its choices already, so that the label of an answer means one of them.

        Raises:
            InputError: the answer is a label that means no choice, or one in the question and another in the column.
        """
        label = answer_label(row)
        parts = [*filter(None, choices.parts)]
        asked = labels_in(parts, text)
        own = {key.casefold(): part for key, part in zip(choices.labels, choices.parts, strict=True) if part}
        in_question = dict(zip(asked or (), parts, strict=False))
        meanings = {meaning[label].casefold() for meaning in (in_question, own) if label in meaning}
        is_text = label in [part.casefold() for part in choices.parts]
        if label is None or (is_text and not meanings):
            return asked is not None or stands_in(parts, text, in_order=True)
        if is_text:
            meanings.add(label)
        if len(meanings) == 1:
            return label in in_question
        problem = f"is the label of no choice ({', '.join(choices.labels)})"
        if meanings:
            problem = f"means several choices: {' and '.join(sorted(meanings))}"
        problem = f"stands beside the answer {label.upper()!r}, which {problem}"
        remedy = f"Write the text of the choice as the answer. {self.keep(choice_columns(row, name))}"
        raise refused(name, row.get(name), problem, remedy)

    def _written_below(self, value: Any, below: str, asking: str, at: str) -> Any:
        """Return the value of a question's column with more below the question."""
        if isinstance(value, str):
            if is_transcript(value):
                raise self._homeless({at: below}, at, f"stands beside a transcript of several turns, `{asking}`")
            return f"{value}\n{below}"
        turns = value if isinstance(value, list) else []
        users = [i for i, turn in enumerate(turns) if isinstance(turn, Mapping) and speaker(turn) in USERS]
        turn = turns[users[0]] if len(users) == 1 else {}
        content = "value" if "from" in turn else "content"
        text = turn.get(content)
        if isinstance(text, str):
            text = f"{text}\n{below}"
        elif isinstance(text, list):
            text = [*text, {"type": "text", "text": f"\n{below}"}]
        else:
            problem = f"stands beside a conversation of {len(users)} turns of the user's, `{asking}`"
            raise self._homeless({at: below}, at, problem)
        return [*turns[: users[0]], {**turn, content: text}, *turns[users[0] + 1 :]]

    def _homeless(self, row: Fields, name: str, problem: str) -> InputError:
        remedy = f"Write it into the question. {self.keep(choice_columns(row, name))}"
        return refused(name, row[name], problem, remedy)


def quoted(name: str) -> str:
    """Return a column's name as a setting writes it: in quotes unless it is one word."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name):
        return name
    return "'" + name.replace("\\", "\\\\").replace("'", "\\'") + "'"


def is_transcript(text: str) -> bool:
    return bool(HH_TURN.match(text.lstrip(" ")) or HELPSTEER_TURN.search(text))


@lru_cache(4096)
def is_answer(name: str) -> bool:
    """Return whether a column has the name of an answer, or of one of two that are compared."""
    return fold(name) in NAMED_ANSWER or OF_SEVERAL.fullmatch(fold(name)) is not None


def has_answer(row: Fields, shape: Shape) -> bool:
    """Return whether a row that is a conversation holds an answer in what its shape reads."""
    if shape.answers:
        return any(row.get(name) is not None for name in shape.answers)
    turns = row.get(shape.needs[0])
    return not isinstance(turns, list) or not ends_with_user(turns)


class Rendered(NamedTuple):
    """A context as text, and the parts that are looked for in the question; of choices, the label of each."""

    text: str
    parts: Sequence[str]
    labels: Sequence[str] = ()


def stands_in(parts: Sequence[str], text: str, in_order: bool) -> bool:
    """Return whether a text holds all parts as whole words: `no` does not stand in `know`."""
    begin = 0
    for part in parts:
        match = re.compile(rf"(?<!\w){re.escape(part)}(?!\w)").search(text, begin)
        if match is None:
            return False
        begin = match.end() if in_order else 0
    return True


@lru_cache(4096)
def keeps_names(names: tuple[str, ...]) -> bool:
    """Return whether columns have our names, and none changes the question, stands in front of it or has answers."""
    special = "history" in names or "answers" in names
    return not (special or names_alike(names) or known_names(names) or context_columns(names))


@lru_cache(4096)
def names_alike(names: tuple[str, ...]) -> Sequence[tuple[str, str]]:
    """Return the columns that have one of our names, each with another one that has it in different case."""
    by_name = dict[str, list[str]]()
    for name in names:
        if fold(name) in KNOWN:
            by_name.setdefault(fold(name), []).append(name)
    alike = (sorted(several, key=lambda name: name != ours) for ours, several in by_name.items())
    return [(first, other) for first, *others in alike for other in others]


@lru_cache(4096)
def known_names(names: tuple[str, ...]) -> Mapping[str, str]:
    """Return the columns that have one of our names in other case, or another name for the same, with our name."""
    taken = {*names}
    known = dict[str, str]()
    for name in names:
        ours = name if name in KNOWN else fold(name)
        ours = ALIASES.get(ours, ours)
        if ours in KNOWN and ours not in taken:
            known[name] = ours
            taken.add(ours)
    return known


@lru_cache(4096)
def context_columns(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of a row's columns that change its question, in the order in which they are written below it."""
    there = {fold(name): name for name in reversed(names)}
    lettered = sorted(filter(LETTERED.fullmatch, there), key=by_letter)
    if len(lettered) < 2:
        lettered = [*takewhile(there.__contains__, ascii_lowercase)] if {"a", "b", "c"} <= there.keys() else []
    return tuple(there[name] for name in (*CONTEXT, *CHOICES, *lettered) if name in there)


def lettered_columns(row: Fields) -> list[str]:
    """Return the columns of a row that hold one choice each."""
    return [name for name in context_columns(tuple(row)) if name not in CONTEXT and name not in CHOICES]


def choice_columns(row: Fields, name: str) -> list[str]:
    """Return all columns of a row that hold one choice each if `name` is one of them, else `name` alone."""
    lettered = lettered_columns(row)
    return lettered if name in lettered else [name]


def letter_in(name: str) -> str:
    """Return the letter or number of the choice that a column holds."""
    lettered = LETTERED.fullmatch(fold(name))
    return (lettered[1] if lettered else name.strip()).upper()


def by_letter(name: str) -> tuple[int, str]:
    """Return what columns of choices are ordered by: 10 comes behind 9."""
    letter = letter_in(name)
    return (int(letter), "") if letter.isdecimal() else (0, letter)


def asking_columns(row: Fields, shape: Shape | None) -> tuple[str, ...]:
    """Return the columns that hold a row's question: mostly one, and both answers of a pair if they repeat it."""
    asking = question_column(row, CONVERSATION_COLUMNS if shape is None else shape.asks)
    named = (asking,) if asking else ()
    if shape is None or shape.kind != PREFERENCES or (asking and not repeats_question(row, asking)):
        return named
    return (*named, *sides_of(row))


def sides_of(row: Fields) -> tuple[str, str]:
    """Return the columns of a pair's answers."""
    columns = judged_columns_of(row)
    return ("chosen", "rejected") if columns is None or row.get("chosen") is not None else columns.answers


def repeats_question(row: Fields, named: str) -> bool:
    """Return whether both answers of a pair are whole conversations, of which the question's column is a caption."""
    return named != "conversations" and all(
        isinstance(side, list)
        and bool(side)
        and isinstance(side[0], Mapping)
        and speaker(side[0]) in (*USERS, "system")
        for side in map(row.get, sides_of(row))
    )


def turns_before(history: Any) -> list[Any] | None:
    """Return the turns of a history: a list of [question, answer], or of turns as they are; None for anything else."""
    if not isinstance(history, list):
        return None
    if all(isinstance(turn, Mapping) and "role" in turn for turn in history):
        return history
    pairs = all(isinstance(pair, list) and [*map(type, pair)] == [str, str] for pair in history)
    return as_turns(history) if pairs else None


def rendered_context(value: Any) -> Rendered | None:
    """Return a context as text: a text as it is, and the texts of a list with an empty line between them. Returns None
    for anything else."""
    if isinstance(value, str):
        return Rendered(value, [value.strip()])
    parts = [document_text(entry) for entry in value] if isinstance(value, list) else [None]
    texts = [part for part in parts if part]
    return Rendered("\n\n".join(texts), [part.strip() for part in texts]) if None not in parts else None


def document_text(value: Any) -> str | None:
    """Return a document as text: its title on a line of its own, and its text."""
    if isinstance(value, str | None):
        return value or ""
    if not isinstance(value, Mapping):
        return None
    bodies = [value[name] for name in BODIES if isinstance(value.get(name), str)]
    titles = (value[name] for name in TITLES if isinstance(value.get(name), str) and value[name])
    if not bodies:
        return None
    return "\n".join(filter(None, (next(titles, ""), next(filter(None, bodies), ""))))


def are_replies(value: Any, answered: bool) -> bool:
    """Return whether a column `choices` holds answers as an API logs them: objects with fields of such, or objects
    without labels in a row that has no answer.

    Args:
        answered: the row has an answer elsewhere.
    """
    if not isinstance(value, list) or not value or not all(isinstance(entry, Mapping) for entry in value):
        return False
    labelled = all(field_of(entry, OPTION_LABELS) is not None for entry in value)
    return not labelled and (not answered or any(REPLY_FIELDS & entry.keys() for entry in value))


def field_of(value: Fields, names: Sequence[str]) -> Any:
    """Return the first of some fields that an object has; None if it has none."""
    return next((value[name] for name in names if value.get(name) is not None), None)


def rendered_choices(value: Any) -> Rendered | None:
    """Return choices as text, a line each: `A. …`. Labels that stand beside the choices take the place of letters,
    unless they do not tell one from another, such as marks of the right choice. An empty choice keeps its letter, but
    for those at the end.

    Returns None if a choice is neither a text nor a number, or an object without one, or if labels are not as many.
    """
    labels: Any = ()
    texts = value
    if isinstance(value, str):
        return Rendered(value, [value.strip()])
    if isinstance(value, Mapping):
        texts = value.get("text", value.get("choices"))
        labels = value.get("label", value.get("labels", ()))
        if texts is None:
            labels = [*value]
            texts = [*value.values()]
    if isinstance(texts, list) and texts and all(isinstance(entry, Mapping) for entry in texts):
        if not all(any(name in entry for name in OPTION_TEXTS) for entry in texts):
            return None
        labels = [field_of(entry, OPTION_LABELS) for entry in texts]
        if any(len(str(label)) > LONGEST_LABEL for label in labels):
            labels = ()
        texts = [field_of(entry, OPTION_TEXTS) for entry in texts]
    if not isinstance(texts, list) or not all(isinstance(entry, str | int | float | None) for entry in texts):
        return None
    if isinstance(labels, list) and labels and len(labels) != len(texts):
        return None
    names = [str(label).strip() for label in labels] if isinstance(labels, list) and all(labels) else []
    if not names or not all(names) or len({*names}) < len(names):
        names = [ascii_lowercase[i].upper() if i < 26 else str(i + 1) for i in range(len(texts))]
    written = [choice_text(text) for text in texts]
    while written and not written[-1]:
        written.pop()
    lines = [f"{name}. {text}".rstrip(" ") for name, text in zip(names, written, strict=False)]
    return Rendered("\n".join(lines), [text.strip() for text in written], names[: len(written)])


def labels_in(parts: Sequence[str], text: str) -> list[str] | None:
    """Return the labels that a text writes in front of some choices (`A) …`); None if one has no label, or two have the
    same."""
    labels = list[str]()
    for part in parts:
        match = re.search(rf"(?<!\w)([A-Za-z]|\d{{1,2}})[)\].:]\s*{re.escape(part)}(?!\w)", text)
        if match is None:
            return None
        labels.append(match[1].casefold())
    return labels if labels and len({*labels}) == len(labels) else None


def answer_label(row: Fields) -> str | None:
    """Return the answer of a row if it is a label such as `B`, `(b)` or `2.`; None if it says something else."""
    for name in (*BESIDE_TURNS, "chosen", "messages", "conversations"):
        value = row.get(name)
        if isinstance(value, list) and value and isinstance(value[-1], Mapping):
            value = value[-1].get("content", value[-1].get("value"))
        if isinstance(value, str) and (match := ANSWER_LABEL.fullmatch(value.strip())):
            return match[1].casefold()
    return None


def choice_text(value: Any) -> str:
    """Return a choice as text: a truth value as JSON writes it, nothing as an empty text."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def holds_more(value: Any) -> bool:
    """Return whether a context or choices hold more than their rendering says, such as scores of documents."""
    objects = [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []
    if not objects and not isinstance(value, Mapping):
        return False
    if any(not WRITTEN_FIELDS.issuperset(entry) for entry in objects):
        return True
    rendered = [text.text for text in (rendered_context(value), rendered_choices(value)) if text is not None]
    return not any(all(text.strip() in whole for text in leaves(value)) for whole in rendered)


def leaves(value: Any) -> Iterator[str]:
    """Yield the texts, numbers and truth values within a value, as choices are written."""
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from leaves(inner)
    else:
        yield choice_text(value)


def renamed(data: Fields, columns: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a row whose columns have our names, and the columns that had one of these names before. A field of the
    object `metadata` is a column of the name `metadata.FIELD` here.

    Raises:
        InputError: a column that is to be renamed is not there.
    """
    named = dict[str, str]()
    for ours, theirs in columns.items():
        listed = ", ".join(map(str, data)) or "(none)"
        if fold(ours) not in OURS and not LETTERED.fullmatch(ours) and not ANSWER.fullmatch(fold(ours)):
            problem = f"none of them is read as {ours}, which {theirs} is to be"
            remedy = f"Write our name first. To keep {theirs} as metadata, leave it out of the setting."
            raise InputError("columns", listed, problem, remedy)
        alike = [name for name in data if fold(name) == fold(theirs)]
        if theirs not in data and not alike:
            inner = metadata_within(data.get("metadata"))
            key = theirs.removeprefix(WITHIN)
            if key != theirs and key in inner:
                data = {**data, theirs: inner.pop(key), "metadata": inner}
        if theirs in data:
            named[ours] = theirs
        elif len(alike) == 1:
            named[ours] = alike[0]
        else:
            names = {str(name).casefold(): str(name) for name in data}
            close = get_close_matches(theirs.casefold(), names, 1, 0.75)
            remedy = f"Did you mean {names[close[0]]}?" if close else "Give the name of a column that is there."
            problem = f"there is no {theirs} among them, which is to be {ours}"
            raise InputError("columns", listed, problem, remedy)
    rest = {name: value for name, value in data.items() if name not in named.values()}
    there = {fold(name) for name, value in rest.items() if value is not None}
    for ours in [ours for ours in named if ours in CONTEXT and ours in there]:  # both are part of the question
        behind = CONTEXT[CONTEXT.index(ours) :]
        free = (name for name in (*behind, *CONTEXT) if name not in there and name not in named)
        named = {next(free, ours) if name == ours else name: theirs for name, theirs in named.items()}
    displaced = {name: rest.pop(name) for name in [*rest] if name in named}
    return {ours: data[theirs] for ours, theirs in named.items()} | rest, displaced


def with_first_answer(data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a row whose answer is the first of several (SQuAD's, TriviaQA's, Natural Questions'), and the columns that
    hold all of them. An answer out of none is an empty text."""
    answers = {name: texts for name in ("answer", "answers") if (texts := several_answers(data.get(name))) is not None}
    # A number for each of several answers: then the first need not be the best.
    scored = {
        len(values)
        for values in data.values()
        if isinstance(values, list) and len(values) > 1 and all(isinstance(value, int | float) for value in values)
    }
    several = {name: data[name] for name, texts in answers.items() if len(texts) not in scored}
    rest = {name: value for name, value in data.items() if name not in several}
    asking = next((shape for shape in CONVERSATIONS if rest.get(shape.needs[0]) is not None), None)
    if not several or asking is None:
        return data, {}
    shape = recognised(rest)
    if shape is None or shape.kind == PREFERENCES or has_answer(rest, shape):
        return rest, several
    texts = answers[next(iter(several))] or [""]
    return {**rest, asking.answer: texts[0]}, several


def several_answers(value: Any) -> list[str] | None:
    """Return the answers in a list of texts, a list of objects with a `text` and its place, or an object of `text` or
    `value`; None for anything else."""
    if isinstance(value, Mapping):
        value = value.get("text", value.get("value"))
        value = [value] if isinstance(value, str) else value
    if not isinstance(value, list):
        return None
    answers: list[Any] = [
        entry.get("text") if isinstance(entry, Mapping) and entry.keys() <= OF_SPAN else entry for entry in value
    ]
    return [text for text in answers if text.strip()] if all(isinstance(text, str) for text in answers) else None


def columns_read(row: Fields, shape: Shape) -> frozenset[str]:
    """Return the columns that a row's reader reads, its context among them."""
    read = columns_of_shape(tuple([name for name, value in row.items() if value is not None]), shape)
    if below := context_columns(tuple(row)):
        read = (read | {*below}) - {name for name in below if name not in shape.asks and holds_more(row[name])}
    if beside := answers_beside(row, shape):
        read |= {*beside}
    asking = question_column(row, shape.asks) if shape.kind == PREFERENCES else ""
    return read - {asking} if asking and repeats_question(row, asking) else read


@lru_cache(4096)
def columns_of_shape(names: tuple[str, ...], shape: Shape) -> frozenset[str]:
    if shape is TREE:
        return frozenset(("prompt", "replies", "role", "text", "deleted", *NOT_READ_OF_ROWS))
    if shape is TREE_MESSAGE:
        return frozenset((*shape.needs, "message_tree_id", "deleted", *NOT_READ_OF_ROWS))
    asking = question_column(dict.fromkeys(names, True), shape.asks)
    read = {*SYSTEM, *OFFERED, *NOT_READ_OF_ROWS, *context_columns(names)}
    if asking:
        read.add(asking)
    if shape is JUDGED and (columns := find_judged_columns(names)) is not None:
        ties = ["winner_tie"] if columns.verdict == WINNERS else []
        read |= {*ABOUT_PAIRS, *columns.answers, *columns.verdict, *ties}
    elif shape.kind == PREFERENCES:
        read |= {*ABOUT_PAIRS, *shape.needs} - {*QUESTIONS}
    elif shape is LABELLED:
        of = next(of for of in CONVERSATIONS if of.needs[0] == asking)
        read |= {*of.answers, LABEL}
    else:
        read |= {*shape.needs, *shape.answers}
    return frozenset(read | ({"input", "history"} if asking == "instruction" else set()))


def unread_columns(row: Row, shape: Shape) -> dict[str, Any]:
    """Return the columns of a row that nothing reads: its metadata. Columns that are null are none."""
    read = columns_read(row.data, shape)
    unread = dict[str, Any]()
    turns = dict[str, Any]()
    for name, value in row.data.items():
        if name not in read:
            if value is not None:
                unread[name] = value
        elif type(value) in (list, dict):
            turns |= turn_fields(name, value)
    if "metadata" in unread:
        inner = metadata_within(unread.pop("metadata"))
        unread |= {f"{WITHIN}{name}" if name in row.data else name: value for name, value in inner.items()}
    unread |= turns
    if row.aside:
        unread |= {name: value for name, value in row.aside.items() if value is not None}
    return unread


def turn_fields(column: str, value: Any) -> dict[str, list[Any]]:
    """Return the fields of turns that nothing reads, by names such as `messages[].mood`, each with a value a turn."""
    turns = [value] if isinstance(value, dict) else value
    fields = dict[str, list[Any]]()
    for place, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or len(turn) == 2 or speaker(turn) is None:
            continue
        for name, field_value in turn.items():
            known = name in TURN_FIELDS or (name == "name" and speaker(turn) in RESULTS)
            if not known and field_value not in (None, "", [], {}):
                fields.setdefault(f"{column}{OF_TURNS}{name}", [None] * len(turns))[place] = field_value
    return fields


def metadata_within(value: Any) -> dict[str, Any]:
    """Return what a column `metadata` holds: the fields of an object, which may stand as its JSON text."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {"metadata": value}
    if isinstance(value, Mapping):
        return dict(value)
    return {} if value is None else {"metadata": value}


ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=str)
"""`json.dumps` makes a new one for every row."""


def metadata_json(metadata: Fields) -> str | None:
    """Return metadata as JSON text; None if there is none."""
    if not metadata:
        return None
    try:
        return ENCODER.encode(metadata)
    except ValueError:  # numbers that JSON has not: nan and the infinities
        finite = json.loads(json.dumps(metadata, default=str), parse_constant=lambda name: None)
        return json.dumps(finite, ensure_ascii=False)


Sizes = Mapping[str, Sequence[int]]
"""Column → how many texts of a row it holds, and their characters together."""


def text_sizes(row: Row, shape: Shape, unread: Fields, asked: bool = False) -> Sizes:
    """Return the sizes of texts in columns that nothing reads, which decide whether the data set is refused. A text
    that only repeats what the row says is not counted, nor one that is ASCII without a blank: an id, a hash, a URL.

    Args:
        asked: the row is asked, and answers to it may be checked by its other columns.
    """
    sizes: dict[str, Sequence[int]] = dict.fromkeys(map(str, row.aside), (0, 0))
    if not unread:
        return sizes
    exempt = exempt_columns(tuple(row.data), shape, asked)
    said: list[str] | None = None
    within = metadata_within(row.data.get("metadata")) if "metadata" in row.data else {}
    for column, value in unread.items():
        if column in row.aside:
            continue
        key = column.removeprefix(WITHIN).rpartition(OF_TURNS)[2]
        nested = key in within and (key != column or column not in row.data)
        name = f"{WITHIN}{key}" if nested else column
        metadata = exempt_columns((), shape, asked) if nested else exempt
        counts = not isinstance(value, int | float) and key not in metadata and key.casefold() not in metadata
        texts = [text for text in spoken(value) if not is_identifier(text)] if counts else []
        if texts:
            if said is None:
                read = columns_read(row.data, shape)
                said = [text for column in row.data if column in read for text in spoken(row.data[column])]
            texts = [text for text in texts if not repeats(text, said)]
        sizes[name] = (len(texts), sum(map(len, texts)))
    return sizes


@lru_cache(4096)
def exempt_columns(names: tuple[str, ...], shape: Shape, asked: bool) -> frozenset[str]:
    """Return the names of columns whose texts are metadata however long they are, see `text_sizes`."""
    exempt = {*IDENTIFYING, *shape.comments, *(CHECKED_BY if asked else ())}
    if shape.kind == DOCUMENTS and "chosen" in names:  # of a pair, of which the better answer is imitated
        exempt.add("rejected")
    exempt |= {*context_columns(names)}  # written already, but for fields of their objects
    return frozenset(exempt | ASKS - {*map(fold, names)})  # fields of `metadata`


def is_identifier(text: str) -> bool:
    """Return whether a long text is an id, a hash or a URL: ASCII without a blank."""
    return len(text) > LONGEST and text.isascii() and not any(sign.isspace() for sign in text)


def repeats(text: str, said: Sequence[str]) -> bool:
    """Return whether a text stands within one of a row's texts, or is a rendering: it holds all of them, and at most as
    much again."""
    whole = 2 * sum(map(len, said)) >= len(text)
    return any(text in other for other in said) or (whole and all(other in text for other in said))


def spoken(value: Any) -> Iterator[str]:
    """Yield the texts within a value, without those that say who speaks."""
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in ABOUT_TURNS:
                yield from spoken(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from spoken(inner)


def may_be_asked(name: str) -> bool:
    """Return whether a column that nothing reads may be written below the question: it gives no answer away, and is no
    field of turns."""
    return OF_TURNS not in name and fold(name).removeprefix(WITHIN) not in COMMENTING


class UnreadColumns:
    """The columns of a data set that nothing reads, over all of its rows.

    Attributes:
        sizes: column → how many texts it holds, and their characters together.
    """

    def __init__(self, rules: ColumnRules) -> None:
        self.rules = rules
        self.sizes: dict[str, list[int]] = {}

    def add(self, sizes: Sizes) -> None:
        """Count the texts of a row, or of many."""
        for name, (texts, characters) in sizes.items():
            size = self.sizes.setdefault(str(name), [0, 0])
            size[0] += texts
            size[1] += characters

    def add_row(self, row: Row, shape: Shape, asked: bool = False) -> None:
        """Count the texts of a row, see `text_sizes`."""
        self.add(text_sizes(row, shape, unread_columns(row, shape), asked))

    def check(self, at: str, given: str) -> None:
        """Refuse the data set if a column holds long texts, or if a column that is to be metadata is in no row.

        Args:
            at: the setting that names the data set.
            given: its value.

        Raises:
            InputError: a column's texts average over `LONGEST` characters.
        """
        kept = {*map(fold, self.rules.metadata)}
        absent = kept - {*map(fold, self.sizes)}
        if absent and at != EVALUATED:
            there = dict.fromkeys(name for row in islice(placed_rows(given), FIRST) for name in row.data)
            name = next(name for name in self.rules.metadata if fold(name) in absent)
            if there:
                problem = f"there is no {name} among the columns, which is to be metadata"
                raise InputError(f"{given}, columns", ", ".join(there), problem, "Leave it out, or correct its name.")
        long = {
            name: characters / texts
            for name, (texts, characters) in self.sizes.items()
            if texts and (characters > LONGEST * texts or fold(name) in ASKS) and fold(name) not in kept
        }
        if not long:
            return
        first = next(filter(may_be_asked, long), next(iter(long)))
        problem = f"column {first!r} holds text ({long[first]:.0f} characters on average) that nothing reads"
        if len(long) > 1:
            problem += f", as do {', '.join(map(repr, [*long][1:]))}"
        remedy = self.rules.keep(long)
        if may_be_asked(first):
            remedy = f"{self.rules.use(first)} {remedy}"
        raise InputError(at, given, problem, remedy)
