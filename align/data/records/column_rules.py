"""What becomes of each column of a row: it is read, put into the question, or kept as metadata. Nothing is dropped.

A row's shape says which columns are read (`align.data.records.shapes`). Of the others,

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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice, takewhile
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from align.data.formats.rows import Row, placed_rows
from align.data.formats.tables import Cells
from align.data.formats.values import check_values
from align.data.records.content import DOCUMENTS, PREFERENCES
from align.data.records.judged_pairs import ANSWER, VERDICTS, WINNERS, find_judged_columns
from align.data.records.messages import HELPSTEER_TURN, HH_TURN, NOT_READ_OF_ROWS, SYSTEM, TURN_FIELDS
from align.data.records.refusals import refused
from align.data.records.shapes import (
    ANSWERS,
    BESIDE_TURNS,
    COLUMNS,
    CONVERSATIONS,
    HELPSTEER,
    HELPSTEER2,
    HELPSTEER3,
    JUDGED,
    LABELLED,
    QUESTIONS,
    RANKING,
    SCORED,
    TEXT,
    TREE,
    TREE_MESSAGE,
    USERS,
    Shape,
    answers_beside,
    ends_with_user,
    question_column,
    recognised,
    speaker,
)
from align.data.records.tools import OFFERED, RESULTS, says_nothing
from align.errors import InputError

EVALUATED = "data.eval_path"
"""A file to which the settings of `data.path` apply too, and which may lack what that keeps as metadata."""
FIRST = 16
"""Rows whose columns are named if one is missing."""
LONGEST = 40
"""Characters that the texts of a column may average and still be metadata."""
CONTEXT = (
    "input",
    "inputs",
    "context",
    "contexts",
    "passage",
    "passages",
    "paragraph",
    "paragraphs",
    "document",
    "documents",
    "article",
    "articles",
    "background",
    "story",
    "premise",
    "hypothesis",
    "table",
    "schema",
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
REPLY_FIELDS = frozenset({"message", "finish_reason", "logprobs", "delta", "index"})
"""Fields of an answer as an API logs it, under `choices`."""
TITLES = ("title", "heading", "name")
BODIES = ("text", "content", "contents", "page_content", "passage", "body", "document", "paragraph", "snippet")
"""Fields of a document that is an object: its title, and its text."""
WRITTEN_FIELDS = frozenset({*TITLES, *BODIES, *OPTION_TEXTS, *OPTION_LABELS})
ASKS = frozenset({*QUESTIONS, "instructions", "problem", "code"})
"""Columns that ask, of which a row's shape reads one. Another one is refused however short its texts are."""
ALIASES = {
    "chosen_response": "chosen",
    "rejected_response": "rejected",
    "kto_tag": "label",
    "system_message": "system",
    "system prompt": "system",
    "system message": "system",
    "systemprompt": "system",
}
"""Other names of columns → ours."""
KNOWN = frozenset(
    {
        *COLUMNS,
        *CONTEXT,
        *CHOICES,
        *ALIASES,
        "label",
        "helpfulness",
        "overall_preference",
        "preference_strength",
        "margin",
        "deleted",
        "message_tree_id",
        "metadata",
        *VERDICTS,
        *WINNERS,
    }
)
"""Names that are found in other case too."""
OF_TURNS = "[]."
"""What stands in front of a field of turns, where it is named like a column: `messages[].mood`."""
WITHIN = "metadata."
"""What stands in front of a field of the object `metadata`, where it is named like a column."""
IDENTIFYING = frozenset(
    {
        "id",
        "uuid",
        "hash",
        "source",
        "dataset",
        "subset",
        "category",
        "language",
        "lang",
        "license",
        "licence",
        "url",
        "link",
        "model",
        "generator",
        "annotator",
        "author",
        "created_at",
        "timestamp",
        "date",
        "split",
        "tags",
        "meta",
    }
)
"""Columns that are metadata however long their texts are."""
COMMENTS: Mapping[Shape, frozenset[str]] = {
    HELPSTEER2: frozenset(
        {
            "preference_statement",
            "preference_elaboration",
            "three_most_similar_preferences",
            "all_preferences_unprocessed",
        }
    ),
    HELPSTEER3: frozenset({"individual_preference"}),
    SCORED: frozenset({"correct_answers", "incorrect_answers"}),
}
"""Columns of published data sets that comment on the answers: metadata too."""
CHECKED_BY = frozenset(
    {
        "answer",
        "answers",
        "expected",
        "reference",
        "references",
        "solution",
        "solutions",
        "target",
        "targets",
        "test",
        "tests",
        "check",
        "checks",
        "rubric",
        "ground_truth",
        "rejected",
        "chosen",
        "completion",
        "response",
        "output",
        "label",
    }
)
"""Columns that answers to a prompt are checked by. Where a row is asked and not imitated, they are kept for that."""
COMMENTING = CHECKED_BY | {
    "explanation",
    "explanations",
    "rationale",
    "rationales",
    "reason",
    "reasoning",
    "justification",
    "feedback",
    "critique",
    "comment",
    "comments",
}
"""Columns that would give the answer away, and are not offered as part of the question."""
NAMED_ANSWER = frozenset(
    {
        *ANSWERS,
        "answers",
        "answerkey",
        "answer_key",
        "correct_answer",
        "correct_answers",
        "best_answer",
        "preference",
    }
)
"""Columns that hold an answer, or say which is right."""
OF_SEVERAL = re.compile(r"(?:response|answer|completion|output)[ _-]?[abc0-3]|answers|correct_answers|preference")
"""Of those, the ones that hold one of several answers, or all, or say which is better."""
LABEL = re.compile(r"[(\[]?([A-Za-z]|\d{1,2})[)\].:]?")
"""An answer that names a choice."""
ANSWER_OF = {
    "messages": "completion",
    "conversations": "completion",
    "prompt": "completion",
    "instruction": "output",
    "question": "answer",
    "query": "response",
}
"""Column of a question → the column of its answer."""
ABOUT_PAIRS = frozenset(
    {
        "margin",
        "strength",
        "id",
        "group_id",
        "annotator",
        "source",
        "guideline_version",
        "created_at",
        "chosen_ended",
        "rejected_ended",
        "scorer",
    }
)
"""Columns that a preference pair keeps as attributes of its own."""
OURS = KNOWN | {"winner_tie"} | CHECKED_BY | ABOUT_PAIRS | IDENTIFYING | ASKS | {*ascii_lowercase}
"""What a column may be renamed to: a name that is read, or that says what the column is."""
ABOUT_TURNS = ("role", "from", "type", "id", "name", "tool_call_id")
"""Fields of a turn that are no text of it."""


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

    def apply(self, row: Row, cells: Cells | None) -> Row:
        """Return a row under our names, with what changes its question written below it.

        Args:
            cells: which columns of a table hold values; None if the row has values already.

        Raises:
            InputError: a column that is to be renamed is missing, or a context cannot be written below the question.
        """
        if not (self.columns or self.metadata or cells) and stands_as_it_is(row.data):
            return row
        where = row.where
        aside = self._metadata_of(row.data)
        data = {name: value for name, value in row.data.items() if name not in aside} if aside else row.data
        if self.columns:
            data, displaced = renamed(data, self.columns, where)
            aside |= displaced
        data = self._without_doubles(data, where)
        if names := known_names(tuple(data)):
            data = {names.get(name, name): value for name, value in data.items()}
        if cells is not None:
            data = cells.typed(data)
            check_values(data, where)
        data, several = with_first_answer(data)
        data = self.with_history(self.with_context(data, where), where)
        return row._replace(data=data, aside={**aside, **several})

    def _metadata_of(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns that the user keeps as metadata. A name in its own case is that column alone."""
        wanted = {name.strip().casefold() for name in self.metadata if name not in data}
        return {
            name: value
            for name, value in data.items()
            if name in self.metadata or (wanted and str(name).strip().casefold() in wanted)
        }

    def _without_doubles(self, data: dict[str, Any], where: str) -> dict[str, Any]:
        """Return a row without null columns that another column has the name of, in different case.

        Raises:
            InputError: neither of the two is null.
        """
        for ours, other in names_alike(tuple(data)):
            null = next((name for name in (other, ours) if data.get(name) is None), None)
            if null is None:
                problem = f"stands beside `{ours}`, and case does not tell columns apart"
                raise refused(where, other, data[other], problem, f"Rename one of the two. {self.keep([other])}")
            data = {name: value for name, value in data.items() if name != null}
        return data

    def keep(self, names: Iterable[str]) -> str:
        """Return the sentence that says how columns are kept as metadata: a setting to copy."""
        listed = "[" + ", ".join(map(quoted, [*self.metadata, *names])) + "]"
        if self.source:
            return f"To keep it as metadata, write {{path: …, metadata: {listed}}}."
        return f'To keep it as metadata: "data.metadata={listed}".'

    def use(self, name: str) -> str:
        """Return the sentence that says how a column becomes part of the question: a setting to copy."""
        ours = next((ours for ours in ("context", *CONTEXT) if ours not in self.columns), "context")
        return self._rename("If it belongs to the question", {ours: name})

    def _rename(self, condition: str, names: Mapping[str, str]) -> str:
        pairs = {**self.columns, **names}
        listed = "{" + ", ".join(f"{ours}: {quoted(theirs)}" for ours, theirs in pairs.items()) + "}"
        if self.source:
            return f"{condition}, write {{path: …, columns: {listed}}}."
        return f'{condition}: "data.columns={listed}".'

    def check_answer(self, row: Mapping[str, Any], shape: Shape, where: str) -> None:
        """Check that a row without an answer has none in a column that its shape does not read.

        Raises:
            InputError: a column has the name of an answer.
        """
        if shape is not TEXT and has_answer(row, shape):
            return
        beside = answers_beside(row, shape)
        names = [
            name for name, value in row.items() if value is not None and is_answer(str(name)) and name not in beside
        ]
        if not names:
            return
        name = names[0]
        remedy = self.keep(names)
        if isinstance(row[name], str) and not OF_SEVERAL.fullmatch(name.strip().casefold()):
            ours = {"question": "text", "answer": name} if shape is TEXT else {ANSWER_OF[shape.needs[0]]: name}
            remedy = f"{self._rename('If it is the answer', ours)} {remedy}"
        raise refused(where, name, row[name], "is named as an answer, and the row is read without one", remedy)

    def with_context(self, data: dict[str, Any], where: str) -> dict[str, Any]:
        """Return a row whose question has its context and its choices below it, a line each.

        The columns come in the order of `CONTEXT` and `CHOICES`; choices have letters. What the question says already
        is not written again. A conversation has to have one turn of the user's, below which they are written.

        Raises:
            InputError: a context is no text and no list of texts, or the row has no such turn.
        """
        there = context_columns(tuple(data))
        names = [name for name in there if not says_nothing(data[name])] if there else []
        if not names:
            return data
        row = dict(data)
        shape = recognised(row)
        asking = asking_columns(row, shape)
        if shape is None and not asking:  # its reader names the columns and the nearest shape
            return row
        if names == ["input"] and asking == ("instruction",) and (shape is None or shape.kind != PREFERENCES):
            return row  # Alpaca's reader writes it there, in the same way
        names = [name for name in names if name not in asking]
        said = [text for name in asking for text in spoken(row[name])]
        below = list[str]()
        for name, rendered in self._rendered(row, names, where):
            if rendered.labels:
                written = not self._are_choices_named(row, rendered, "\n".join(said), name, where)
            else:
                in_order = name not in CONTEXT
                written = not any(stands_in(rendered.parts, text, in_order) for text in said)
            if rendered.parts and written:
                below.append(rendered.text)
                at = name
        if not below:
            return row
        for name in asking:
            row[name] = self._written_below(row[name], "\n".join(below), where, name, at)
        if not asking:
            raise self._homeless(row, where, at, "stands beside no question that it could be part of")
        if "input" in names and "instruction" in asking:
            row["input"] = None
        return row

    def with_history(self, data: dict[str, Any], where: str) -> dict[str, Any]:
        """Return a row whose question has the turns of `history` before it. The reader of an `instruction` reads its
        history itself.

        Raises:
            InputError: the history is no list of pairs or turns, or the question is no text of one turn.
        """
        history = data.get("history")
        if says_nothing(history):
            return data
        shape = recognised(data)
        asking = asking_columns(data, shape)
        if asking == ("instruction",) or (shape is None and not asking):
            return data
        before = turns_before(history)
        if before is None:
            raise self._homeless(data, where, "history", "is no list of [question, answer]")
        question = data[asking[0]] if len(asking) == 1 else None
        if not isinstance(question, str) or HH_TURN.match(question.lstrip(" ")) or HELPSTEER_TURN.search(question):
            raise self._homeless(data, where, "history", "stands beside no question that is one text")
        return {**data, asking[0]: [*before, {"role": "user", "content": question}], "history": None}

    def _rendered(self, row: Mapping[str, Any], names: Sequence[str], where: str) -> Iterator[tuple[str, Rendered]]:
        lettered = [name for name in context_columns(tuple(row)) if name not in CONTEXT and name not in CHOICES]
        for name in (name for name in names if name not in lettered):
            if name == "choices" and are_replies(
                row[name], answered=any(row.get(one) is not None for one in CHECKED_BY)
            ):
                problem = "holds answers as an API logs them, and not what a question lets one choose from"
                remedy = f"Write the answer into a column `completion`. {self.keep([name])}"
                raise refused(where, name, row[name], problem, remedy)
            rendered = rendered_choices(row[name]) if name in CHOICES else rendered_context(row[name])
            if rendered is None and name in CHOICES:
                raise self._homeless(row, where, name, "holds a choice that is neither a text nor a number")
            if rendered is None:
                raise self._homeless(row, where, name, "is neither a text nor a list of texts")
            yield name, rendered
        if lettered:
            labels = [letter_in(name) for name in lettered]
            rendered = rendered_choices({"label": labels, "text": [row[name] for name in lettered]})
            if rendered is None:
                raise self._homeless(row, where, lettered[0], "is neither a text nor a number")
            yield lettered[0], rendered

    def _are_choices_named(self, row: Mapping[str, Any], choices: Rendered, text: str, name: str, where: str) -> bool:
        """Return whether the question names its choices already, so that the label of an answer means one of them.

        Raises:
            InputError: the answer is a label that means no choice, or one in the question and another in the column.
        """
        label = answer_label(row)
        asked = labels_in(choices.parts, text)
        own = {key.casefold(): part for key, part in zip(choices.labels, choices.parts, strict=True) if part}
        in_question = dict(zip(asked or (), filter(None, choices.parts), strict=False))
        meanings = {meaning[label].casefold() for meaning in (in_question, own) if label in meaning}
        is_text = label in [part.casefold() for part in choices.parts]
        if label is None or (is_text and not meanings):
            return asked is not None or stands_in([*filter(None, choices.parts)], text, in_order=True)
        meanings |= {label} if is_text else set()
        if len(meanings) == 1:
            return label in in_question
        labels = ", ".join(choices.labels)
        problem = f"is the label of no choice ({labels})"
        if meanings:
            problem = f"means several choices: {' and '.join(sorted(meanings))}"
        remedy = f"Write the text of the choice as the answer. {self.keep(choice_columns(row, name))}"
        raise refused(
            where, name, row.get(name), f"stands beside the answer {label.upper()!r}, which {problem}", remedy
        )

    def _written_below(self, value: Any, below: str, where: str, asking: str, at: str) -> Any:
        """Return the value of a question's column with more below the question."""
        if isinstance(value, str):
            if HH_TURN.match(value.lstrip(" ")) or HELPSTEER_TURN.search(value):
                raise self._homeless({at: below}, where, at, f"stands beside a transcript of several turns, `{asking}`")
            return f"{value}\n{below}"
        turns = value if isinstance(value, list) else []
        users = [i for i, turn in enumerate(turns) if isinstance(turn, Mapping) and speaker(turn) in USERS]
        problem = f"stands beside a conversation of {len(users)} turns of the user's, `{asking}`"
        if len(users) != 1:
            raise self._homeless({at: below}, where, at, problem)
        turn = turns[users[0]]
        content = "value" if "from" in turn else "content"
        text = turn.get(content)
        if isinstance(text, str):
            changed = {**turn, content: f"{text}\n{below}"}
        elif isinstance(text, list):
            changed = {**turn, content: [*text, {"type": "text", "text": f"\n{below}"}]}
        else:
            raise self._homeless({at: below}, where, at, problem)
        return [*turns[: users[0]], changed, *turns[users[0] + 1 :]]

    def _homeless(self, row: Mapping[str, Any], where: str, name: str, problem: str) -> InputError:
        remedy = f"Write it into the question. {self.keep(choice_columns(row, name))}"
        return refused(where, name, row[name], problem, remedy)


def quoted(name: str) -> str:
    """Return a column's name as a setting writes it: in quotes unless it is one word."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name):
        return name
    return "'" + name.replace("\\", "\\\\").replace("'", "\\'") + "'"


@lru_cache(4096)
def is_answer(name: str) -> bool:
    """Return whether a column has the name of an answer, or of one of two that are compared."""
    folded = name.strip().casefold()
    return folded in NAMED_ANSWER or OF_SEVERAL.fullmatch(folded) is not None


def has_answer(row: Mapping[str, Any], shape: Shape) -> bool:
    """Return whether a row that is a conversation holds an answer in what its shape reads."""
    if shape.answers:
        return any(row.get(name) is not None for name in shape.answers)
    turns = row.get(shape.needs[0])
    return not isinstance(turns, list) or not ends_with_user(turns)


@dataclass(frozen=True)
class Rendered:
    """A context as text, and the parts that are looked for in the question; of choices, the label of each."""

    text: str
    parts: Sequence[str]
    labels: Sequence[str] = ()


def stands_in(parts: Sequence[str], text: str, in_order: bool) -> bool:
    """Return whether a text holds all parts as whole words: `no` does not stand in `know`."""
    begin = 0
    for part in parts:
        found = re.compile(rf"(?<!\w){re.escape(part)}(?!\w)").search(text, begin)
        if found is None:
            return False
        begin = found.end() if in_order else 0
    return True


def stands_as_it_is(data: Mapping[str, Any]) -> bool:
    """Return whether a row needs no other names, no context and no answer out of several."""
    return keeps_names(tuple(data)) and isinstance(data.get("answer"), str | None)


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
        if (folded := str(name).strip().casefold()) in KNOWN:
            by_name.setdefault(folded, []).append(name)
    alike = (sorted(several, key=lambda name: name != ours) for ours, several in by_name.items())
    return [(first, other) for first, *others in alike for other in others]


@lru_cache(4096)
def known_names(names: tuple[str, ...]) -> Mapping[str, str]:
    """Return the columns that have one of our names in other case, or another name for the same, with our name."""
    taken = {*names}
    found = dict[str, str]()
    for name in names:
        ours = name if name in KNOWN else name.strip().casefold()
        if ours not in KNOWN:
            continue
        ours = ALIASES.get(ours, ours)
        if ours != name and ours not in taken:
            found[name] = ours
            taken.add(ours)
    return found


@lru_cache(4096)
def context_columns(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of a row's columns that change its question, in the order in which they are written below it."""
    there = {name.strip().casefold(): name for name in reversed(names)}
    several = sorted((name for name in there if LETTERED.fullmatch(name)), key=by_letter)
    run = takewhile(there.__contains__, ascii_lowercase)
    lettered = several if len(several) > 1 else [*run] if {"a", "b", "c"} <= there.keys() else []
    return (
        *(there[name] for name in (*CONTEXT, *CHOICES) if name in there),
        *(there[name] for name in lettered),
    )


def choice_columns(row: Mapping[str, Any], name: str) -> list[str]:
    """Return all columns of a row that hold one choice each if `name` is one of them, else `name` alone."""
    lettered = [one for one in context_columns(tuple(row)) if one not in CONTEXT and one not in CHOICES]
    return lettered if name in lettered else [name]


def letter_in(name: str) -> str:
    """Return the letter or number of the choice that a column holds."""
    lettered = LETTERED.fullmatch(name.strip().casefold())
    return (lettered[1] if lettered else name.strip()).upper()


def by_letter(name: str) -> tuple[int, str]:
    """Return what columns of choices are ordered by: 10 comes behind 9."""
    letter = letter_in(name)
    return (int(letter), "") if letter.isdecimal() else (0, letter)


def asking_columns(row: Mapping[str, Any], shape: Shape | None) -> tuple[str, ...]:
    """Return the columns that hold a row's question: mostly one, and both answers of a pair if they repeat it."""
    if shape in (TREE, TREE_MESSAGE, TEXT):
        return ()
    if shape is HELPSTEER3:
        return ("context",)
    if shape in (HELPSTEER, HELPSTEER2, RANKING):
        return ("prompt",)
    if shape is not None and shape.kind == PREFERENCES:
        named = question_column(row)
        if named and not repeats_question(row, named):
            return (named,)
        return (*([named] if named else []), *sides_of(row))
    names = (shape.needs[0] for shape in CONVERSATIONS if row.get(shape.needs[0]) is not None)
    return (*islice(names, 1),)


def sides_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the columns of a pair's answers."""
    columns = find_judged_columns(tuple([name for name, value in row.items() if value is not None]))
    return ("chosen", "rejected") if columns is None or row.get("chosen") is not None else columns.answers


def repeats_question(row: Mapping[str, Any], named: str) -> bool:
    """Return whether both answers of a pair are whole conversations, of which the question's column is a caption."""
    sides = [row.get(name) for name in sides_of(row)]
    return named != "conversations" and all(
        isinstance(side, list)
        and bool(side)
        and isinstance(side[0], Mapping)
        and speaker(side[0]) in (*USERS, "system")
        for side in sides
    )


def turns_before(history: Any) -> list[Any] | None:
    """Return the turns of a history: a list of [question, answer], or of turns as they are; None for anything else."""
    if not isinstance(history, list):
        return None
    if all(isinstance(turn, Mapping) and "role" in turn for turn in history):
        return history
    pairs = [pair for pair in history if isinstance(pair, list) and [*map(type, pair)] == [str, str]]
    if len(pairs) < len(history):
        return None
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def rendered_context(value: Any) -> Rendered | None:
    """Return a context as text: a text as it is, and the texts of a list with an empty line between them. Returns None
    for anything else."""
    if isinstance(value, str):
        return Rendered(value, [value.strip()])
    if not isinstance(value, list):
        return None
    parts = [document_text(one) for one in value]
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
    return "\n".join(text for text in (next(titles, ""), next(filter(None, bodies), "")) if text)


def are_replies(value: Any, answered: bool) -> bool:
    """Return whether a column `choices` holds answers as an API logs them: objects with fields of such, or objects
    without labels in a row that has no answer.

    Args:
        answered: the row has an answer elsewhere.
    """
    if not isinstance(value, list) or not value or not all(isinstance(one, Mapping) for one in value):
        return False
    labelled = all(field_of(one, OPTION_LABELS) is not None for one in value)
    return not labelled and (not answered or any(REPLY_FIELDS & one.keys() for one in value))


def field_of(value: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return the first of some fields that an object has; None if it has none."""
    return next((value[name] for name in names if value.get(name) is not None), None)


def rendered_choices(value: Any) -> Rendered | None:
    """Return choices as text, a line each: `A. …`. Labels that stand beside the choices take the place of letters. An
    empty choice keeps its letter, but for those at the end.

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
    if isinstance(texts, list) and texts and all(isinstance(one, Mapping) for one in texts):
        if not all(any(name in one for name in OPTION_TEXTS) for one in texts):
            return None
        labels = [field_of(one, OPTION_LABELS) for one in texts]
        if any(len(str(label)) > LONGEST_LABEL for label in labels):
            labels = ()
        texts = [field_of(one, OPTION_TEXTS) for one in texts]
    if not isinstance(texts, list) or not all(isinstance(one, str | int | float | None) for one in texts):
        return None
    if isinstance(labels, list) and labels and len(labels) != len(texts):
        return None
    names = own_labels(labels) or [letter_of(i) for i in range(len(texts))]
    written = [choice_text(text) for text in texts]
    while written and not written[-1]:
        written.pop()
    lines = [f"{name}. {text}".rstrip(" ") for name, text in zip(names, written, strict=False)]
    return Rendered("\n".join(lines), [text.strip() for text in written], names[: len(written)])


def labels_in(parts: Sequence[str], text: str) -> list[str] | None:
    """Return the labels that a text writes in front of its choices (`A) …`), of the choices that are not empty; None if
    one has no label, or two have the same."""
    labels = list[str]()
    for part in filter(None, parts):
        match = re.search(rf"(?<!\w)([A-Za-z]|\d{{1,2}})[)\].:]\s*{re.escape(part)}(?!\w)", text)
        if match is None:
            return None
        labels.append(match[1].casefold())
    return labels if labels and len({*labels}) == len(labels) else None


def answer_label(row: Mapping[str, Any]) -> str | None:
    """Return the answer of a row if it is a label such as `B`, `(b)` or `2.`; None if it says something else."""
    for name in (*BESIDE_TURNS, "chosen", "messages", "conversations"):
        value = row.get(name)
        if isinstance(value, list) and value and isinstance(value[-1], Mapping):
            value = value[-1].get("content", value[-1].get("value"))
        match = LABEL.fullmatch(value.strip()) if isinstance(value, str) else None
        if match:
            return match[1].casefold()
    return None


def own_labels(labels: Any) -> list[str] | None:
    """Return the labels of choices; None if they do not tell one from another, such as marks of the right choice."""
    if not isinstance(labels, list) or not all(labels):
        return None
    names = [str(label).strip() for label in labels]
    return names if len({*names}) == len(names) and all(names) else None


def choice_text(value: Any) -> str:
    """Return a choice as text: a truth value as JSON writes it, nothing as an empty text."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def holds_more(value: Any) -> bool:
    """Return whether a context or choices hold more than their rendering says, such as scores of documents."""
    if isinstance(value, str) or not isinstance(value, list | Mapping):
        return False
    objects = [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []
    if not objects and isinstance(value, list):
        return False
    if any(not WRITTEN_FIELDS.issuperset(one) for one in objects):
        return True
    rendered = [one.text for one in (rendered_context(value), rendered_choices(value)) if one is not None]
    return not any(all(text.strip() in one for text in leaves(value)) for one in rendered)


def leaves(value: Any) -> Iterator[str]:
    """Yield the texts, numbers and truth values within a value, as choices are written."""
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from leaves(inner)
    else:
        yield choice_text(value)


def letter_of(place: int) -> str:
    """Return the letter of a choice, and its number behind the alphabet."""
    return chr(ord("A") + place) if place < 26 else str(place + 1)


def renamed(data: Mapping[str, Any], columns: Mapping[str, str], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a row whose columns have our names, and the columns that had one of these names before.

    Raises:
        InputError: a column that is to be renamed is not there.
    """
    named = dict[str, str]()
    for ours, theirs in columns.items():
        name = ours.strip().casefold()
        if name not in OURS and not LETTERED.fullmatch(ours) and not ANSWER.fullmatch(name):
            there = ", ".join(map(str, data)) or "(none)"
            remedy = f"Write our name first. To keep {theirs} as metadata, leave it out of the setting."
            raise InputError(
                f"{where}, columns", there, f"none of them is read as {ours}, which {theirs} is to be", remedy
            )
        alike = [name for name in data if str(name).strip().casefold() == theirs.strip().casefold()]
        if theirs not in data and not alike:
            data = with_field_lifted(data, theirs)
        if theirs in data:
            named[ours] = theirs
        elif len(alike) == 1:
            named[ours] = alike[0]
        else:
            raise missing_column(data, ours, theirs, where)
    rest = {name: value for name, value in data.items() if name not in named.values()}
    there = {str(name).strip().casefold() for name, value in rest.items() if value is not None}
    for ours in [ours for ours in named if ours in CONTEXT and ours in there]:  # both are part of the question
        behind = CONTEXT[CONTEXT.index(ours) :]
        free = (name for name in (*behind, *CONTEXT) if name not in there and name not in named)
        named = {next(free, ours) if name == ours else name: theirs for name, theirs in named.items()}
    displaced = {name: rest.pop(name) for name in [*rest] if name in named}
    return {ours: data[theirs] for ours, theirs in named.items()} | rest, displaced


def with_field_lifted(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a row in which a field of the object `metadata` is a column of the name `metadata.FIELD`."""
    inner = metadata_within(data.get("metadata"))
    field = name.removeprefix(WITHIN)
    if field == name or field not in inner:
        return data
    rest = {other: value for other, value in inner.items() if other != field}
    return {**data, "metadata": rest, name: inner[field]}


def missing_column(data: Mapping[str, Any], ours: str, theirs: str, where: str) -> InputError:
    """Return the error of a column that is to be renamed and is not there."""
    names = {str(name).casefold(): str(name) for name in data}
    close = get_close_matches(theirs.casefold(), names, 1, 0.75)
    remedy = f"Did you mean {names[close[0]]}?" if close else "Give the name of a column that is there."
    problem = f"there is no {theirs} among them, which is to be {ours}"
    return InputError(f"{where}, columns", ", ".join(map(str, data)) or "(none)", problem, remedy)


# --- Columns that nothing reads.


FIRST_OF = ("answer", "answers")
"""Columns that may hold several answers to a question."""


def with_first_answer(data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a row whose answer is the first of several (SQuAD's, TriviaQA's, Natural Questions'), and the columns that
    hold all of them. An answer out of none is an empty text."""
    several = {
        name: data[name]
        for name in FIRST_OF
        if (answers := several_answers(data.get(name))) is not None and not has_scores(data, len(answers))
    }
    rest = {name: value for name, value in data.items() if name not in several}
    asking = next((shape.needs[0] for shape in CONVERSATIONS if rest.get(shape.needs[0]) is not None), "")
    if not several or not asking:
        return data, {}
    shape = recognised(rest)
    if shape is None or shape.kind == PREFERENCES or has_answer(rest, shape):
        return rest, several
    texts = several_answers(next(iter(several.values()))) or [""]
    return {**rest, ANSWER_OF[asking]: texts[0]}, several


OF_SPAN = {"text", "answer_start", "answer_end", "start", "end", "id", "answer_id"}
"""Fields of an answer that say where it stands, and not how good it is."""


def has_scores(data: Mapping[str, Any], count: int) -> bool:
    """Return whether a column has a number for each of several answers: then the first need not be the best."""
    return count > 1 and any(
        isinstance(values, list) and len(values) == count and all(isinstance(value, int | float) for value in values)
        for values in data.values()
    )


def several_answers(value: Any) -> list[str] | None:
    """Return the answers in a list of texts, a list of objects with a `text` and its place, or an object of `text` or
    `value`; None for anything else."""
    if isinstance(value, Mapping):
        value = value.get("text", value.get("value"))
        value = [value] if isinstance(value, str) else value
    if not isinstance(value, list):
        return None
    answers = list[str]()
    for entry in value:
        text = entry.get("text") if isinstance(entry, Mapping) and entry.keys() <= OF_SPAN else entry
        if not isinstance(text, str):
            return None
        if text.strip():
            answers.append(text)
    return answers


def columns_read(row: Mapping[str, Any], shape: Shape) -> frozenset[str]:
    """Return the columns that a row's reader reads, its context among them."""
    read = _columns_read(tuple([name for name, value in row.items() if value is not None]), shape)
    if below := context_columns(tuple(row)):
        asking = shape.needs if shape is HELPSTEER3 else ()
        read = (read | {*below}) - {name for name in below if name not in asking and holds_more(row[name])}
    if beside := answers_beside(row, shape):
        read |= {*beside}
    if shape.kind == PREFERENCES and (named := question_column(row)) and repeats_question(row, named):
        return read - {named}
    return read


@lru_cache(4096)
def _columns_read(names: tuple[str, ...], shape: Shape) -> frozenset[str]:
    there = dict.fromkeys(names, True)
    read = {*SYSTEM, *OFFERED, *NOT_READ_OF_ROWS, *context_columns(names)}
    if shape is TREE:
        return frozenset({"prompt", "replies", "role", "text", "deleted", *NOT_READ_OF_ROWS})
    if shape is TREE_MESSAGE:
        return frozenset({*shape.needs, "message_tree_id", "deleted", *NOT_READ_OF_ROWS})
    if shape.kind == PREFERENCES:
        asking = question_column(there)
        read |= {*ABOUT_PAIRS}
        if shape is JUDGED and (columns := find_judged_columns(names)) is not None:
            read |= {*columns.answers, *columns.verdict, *(("winner_tie",) if columns.verdict == WINNERS else ())}
        else:
            read |= {*shape.needs}
        if shape not in (HELPSTEER, HELPSTEER2, HELPSTEER3, RANKING):
            read = (read - {*QUESTIONS}) | {asking}
        return frozenset(read | ({"input", "history"} if asking == "instruction" else set()))
    if shape is TEXT:
        return frozenset(read | {"text"})
    of = next((of for of in CONVERSATIONS if there.get(of.needs[0])), shape)
    read |= {*of.needs, *of.answers, *(("input", "history") if of.needs[0] == "instruction" else ())}
    return frozenset(read | ({"label"} if shape is LABELLED else set()))


def unread_columns(row: Row, shape: Shape) -> dict[str, Any]:
    """Return the columns of a row that nothing reads: its metadata. Columns that are null are none."""
    read = columns_read(row.data, shape)
    unread, turns = dict[str, Any](), dict[str, Any]()
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


def metadata_json(metadata: Mapping[str, Any]) -> str | None:
    """Return metadata as JSON text; None if there is none."""
    if not metadata:
        return None
    try:
        return ENCODER.encode(metadata)
    except ValueError:  # numbers that JSON has not: nan and the infinities
        finite = json.loads(json.dumps(metadata, default=str), parse_constant=lambda name: None)
        return json.dumps(finite, ensure_ascii=False)


Sizes = Mapping[str, tuple[int, int]]
"""Column → how many texts of a row it holds, and their characters together."""


def text_sizes(row: Row, shape: Shape, unread: Mapping[str, Any], asked: bool = False) -> Sizes:
    """Return the sizes of texts in columns that nothing reads, which decide whether the data set is refused. A text
    that only repeats what the row says is not counted, nor one that is ASCII without a blank: an id, a hash, a URL.

    Args:
        asked: the row is asked, and answers to it may be checked by its other columns.
    """
    exempt = exempt_columns(tuple(row.data), shape, asked)
    found: dict[str, tuple[int, int]] = dict.fromkeys(map(str, row.aside), (0, 0))
    said: list[str] | None = None
    within = metadata_within(row.data.get("metadata")) if "metadata" in row.data else {}
    for column, value in unread.items():
        if column in row.aside:
            continue
        field = column.removeprefix(WITHIN).rpartition(OF_TURNS)[2]
        nested = field in within and (field != column or column not in row.data)
        name = f"{WITHIN}{field}" if nested else column
        metadata = exempt_columns((), shape, asked) if nested else exempt
        named = isinstance(value, int | float) or field in metadata or field.casefold() in metadata
        texts = [] if named else [text for text in spoken(value) if not is_identifier(text)]
        if not texts:
            found[name] = (0, 0)
            continue
        if said is None:
            read = columns_read(row.data, shape)
            said = [text for column in row.data if column in read for text in spoken(row.data[column])]
        new = [text for text in texts if not repeats(text, said)]
        found[name] = (len(new), sum(map(len, new)))
    return found


@lru_cache(4096)
def exempt_columns(names: tuple[str, ...], shape: Shape, asked: bool) -> frozenset[str]:
    """Return the names of columns whose texts are metadata however long they are, see `text_sizes`."""
    exempt = IDENTIFYING | COMMENTS.get(shape, frozenset()) | (CHECKED_BY if asked else frozenset())
    if shape.kind == DOCUMENTS and "chosen" in names:  # of a pair, of which the better answer is imitated
        exempt |= {"rejected"}
    exempt |= {*context_columns(names)}  # written already, but for fields of their objects
    return exempt | ASKS - {str(name).strip().casefold() for name in names}  # fields of `metadata`


def is_identifier(text: str) -> bool:
    """Return whether a long text is an id, a hash or a URL: ASCII without a blank."""
    return len(text) > LONGEST and text.isascii() and not any(sign.isspace() for sign in text)


def repeats(text: str, said: Sequence[str]) -> bool:
    """Return whether a text stands within one of a row's texts, or is a rendering: it holds all of them, and at most as
    much again."""
    whole = 2 * sum(map(len, said)) >= len(text)
    return any(text in one for one in said) or (whole and all(one in text for one in said))


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
    return OF_TURNS not in name and name.strip().casefold().removeprefix(WITHIN) not in COMMENTING


class UnreadColumns:
    """The columns of a data set that nothing reads, over all of its rows.

    Attributes:
        sizes: column → how many texts it holds, and their characters together.
    """

    def __init__(self, rules: ColumnRules, sizes: Mapping[str, Sequence[int]] | None = None) -> None:
        self.rules = rules
        self.sizes: dict[str, list[int]] = {name: [*size] for name, size in (sizes or {}).items()}

    def add(self, sizes: Mapping[str, Sequence[int]]) -> None:
        """Count the texts of a row, or of many."""
        for name, (texts, characters) in sizes.items():
            size = self.sizes.setdefault(str(name), [0, 0])
            size[0] += texts
            size[1] += characters

    def check(self, at: str, given: str) -> None:
        """Refuse the data set if a column holds long texts.

        Args:
            at: the setting that names the data set.
            given: its value.

        Raises:
            InputError: a column's texts average over `LONGEST` characters.
        """
        kept = {name.strip().casefold() for name in self.rules.metadata}
        absent = kept - {name.strip().casefold() for name in self.sizes}
        if absent and at != EVALUATED:
            self._refuse_absent(absent, given)
        long = {
            name: characters / texts
            for name, (texts, characters) in self.sizes.items()
            if texts
            and (characters > LONGEST * texts or name.strip().casefold() in ASKS)
            and name.strip().casefold() not in kept
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

    def _refuse_absent(self, absent: Collection[str], given: str) -> None:
        """Refuse columns that are to be metadata and that no row has, if there is any row."""
        there = dict.fromkeys(name for row in islice(placed_rows(given), FIRST) for name in row.data)
        name = next(name for name in self.rules.metadata if name.strip().casefold() in absent)
        if there:
            problem = f"there is no {name} among the columns, which is to be metadata"
            raise InputError(f"{given}, columns", ", ".join(there), problem, "Leave it out, or correct its name.")

    def tell(self, path: str | Path) -> None:
        """Print a line that names the columns which are kept as metadata, if there are any."""
        if self.sizes:
            print(f"columns of {path} kept as metadata: {', '.join(self.sizes)}")
