"""The rules by which columns that a row's shape does not name are renamed, set aside, or appended to the question.

`align.data.read.shapes` says which columns a shape needs, and which hold its question, its answer and comments on it. A
column that changes the question (`CONTEXT_COLUMNS`, `CHOICE_COLUMNS`, `option_a` …) is written below the question, see
`append_context`. For the columns that remain, see `align.data.read.unread_columns`.

Names are compared without regard to case.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from itertools import takewhile
from string import ascii_lowercase
from typing import Any, NamedTuple

from align.core.errors import InputError
from align.data.read.content import DOCUMENTS, PREFERENCES, split_names
from align.data.read.json_rows import check_json_values
from align.data.read.messages import HELPSTEER_TURN, HH_TURN, Fields, build_field_error, is_blank, pairs_to_turns
from align.data.read.rows import Row
from align.data.read.shapes import (
    ANSWER_COLUMN,
    ANSWERS_BESIDE_TURNS,
    CONTENT_COLUMNS,
    CONVERSATION_ANSWERS,
    CONVERSATION_COLUMNS,
    CONVERSATIONS,
    QUESTION_COLUMNS,
    TEXT,
    USER_SPEAKERS,
    VERDICT_COLUMNS,
    WINNER_COLUMNS,
    Shape,
    ends_with_user,
    find_answers_beside_turns,
    find_judged_columns_of_row,
    find_question_column,
    find_shape,
    get_speaker,
)
from align.data.read.tables import CELL_TYPES

CONTEXT_COLUMNS = split_names(
    "input inputs context contexts passage passages paragraph paragraphs document documents article "
    "articles background story premise hypothesis table schema"
)
"""Columns that belong to the question, in the order in which they are written below it."""
CHOICE_COLUMNS = ("choices", "options", "answer_choices", "endings")
"""Columns that list the choices of a question."""
CHOICE_COLUMN = re.compile(r"(?:option|choice|opt|op)[ _-]?([a-r]|\d{1,2})")
"""Name of a column with one choice. `a`, `b`, `c` … hold choices too if a row has these three."""
OPTION_TEXTS = ("text", "value", "content", "option")
OPTION_LABELS = ("label", "key", "id", "letter")
"""Fields of a choice that is an object: its text and its letter."""
MAX_LABEL_CHARACTERS = 3
"""Maximum characters of a choice's label. Longer ones are ids, which letters replace."""
REPLY_FIELDS = {"message", "finish_reason", "logprobs", "delta", "index"}
"""Fields of an entry of `choices` in a logged API response."""
TITLES = ("title", "heading", "name")
BODIES = ("text", "content", "contents", "page_content", "passage", "body", "document", "paragraph", "snippet")
"""Fields of a document that is an object: its title and its text."""
RENDERED_FIELDS = {*TITLES, *BODIES, *OPTION_TEXTS, *OPTION_LABELS}
QUESTION_NAMES = frozenset((*QUESTION_COLUMNS, "instructions", "problem", "code"))
"""Question columns, of which a row's shape reads one. A second one is refused, however short its texts are."""
ALIASES = {
    "chosen_response": "chosen",
    "rejected_response": "rejected",
    "kto_tag": "label",
    **dict.fromkeys(("system_message", "system prompt", "system message", "systemprompt"), "system"),
}
"""Alternative column name → the name that the row formats use."""
ATTRIBUTE_COLUMNS = split_names(
    "label helpfulness overall_preference preference_strength margin deleted message_tree_id metadata"
)
KNOWN_NAMES = frozenset(
    (
        *CONTENT_COLUMNS,
        *CONTEXT_COLUMNS,
        *CHOICE_COLUMNS,
        *ALIASES,
        *ATTRIBUTE_COLUMNS,
        *VERDICT_COLUMNS,
        *WINNER_COLUMNS,
    )
)
"""Column names that are matched in any case."""
METADATA_PREFIX = "metadata."
"""Prefix of the column name of a field of the object `metadata`."""
IDENTIFYING = frozenset(
    split_names(
        "id uuid hash source dataset subset category language lang license licence url link model generator "
        "annotator author created_at timestamp date split tags meta"
    )
)
"""Columns that are metadata, however long their texts are."""
REFERENCE_COLUMNS = frozenset(
    split_names(
        "answer answers expected reference references solution solutions target targets test tests check "
        "checks rubric ground_truth rejected chosen completion response output label"
    )
)
"""Columns that graders check answers against. They are kept with prompts, which are answered and not imitated."""
ANSWER_NAMES = CONVERSATION_ANSWERS.union(
    split_names("answers answerkey answer_key correct_answer correct_answers best_answer preference")
)
"""Columns that hold an answer, or say which one is right."""
ANSWER_OF_SEVERAL = re.compile(
    r"(?:response|answer|completion|output)[ _-]?[abc0-3]|answers|correct_answers|preference"
)
"""Answer columns that hold one of several answers, or all of them, or say which one is better."""
ANSWER_LABEL = re.compile(r"[(\[]?([A-Za-z]|\d{1,2})[)\].:]?")
"""Answer that is the label of a choice: `B`, `(b)` or `2.`."""
PAIR_ATTRIBUTES = split_names(
    "margin strength id group_id annotator source guideline_version created_at chosen_ended rejected_ended scorer"
)
"""Columns that become attributes of a preference pair."""
POSTERIOR = "posterior"
"""Column of a pair with `chosen` and `rejected`: the probability that the first is better."""
RENAME_TARGETS = {
    *KNOWN_NAMES,
    "winner_tie",
    *REFERENCE_COLUMNS,
    *PAIR_ATTRIBUTES,
    POSTERIOR,
    *IDENTIFYING,
    *QUESTION_NAMES,
    *ascii_lowercase,
}
"""Names that a column may be renamed to: names of columns that are read, or that identify metadata."""
TURN_ATTRIBUTES = ("role", "from", "type", "id", "name", "tool_call_id")
"""Fields of a turn that hold no text."""
SPAN_FIELDS = {"text", "answer_start", "answer_end", "start", "end", "id", "answer_id"}
"""Fields of an answer with its text and its position in the passage, but no score."""


def normalize_column_name(name: Any) -> str:
    """Return a column name stripped of outer blanks and case-folded, for comparison."""
    return str(name).strip().casefold()


@dataclass(frozen=True)
class ColumnRules:
    """The user's settings for a data set's columns: new names, and columns to keep as metadata.

    Attributes:
        columns: our name of a column → the data set's.
        metadata: the data set's names of columns that are kept as metadata, regardless of their content.
        source: the settings belong to one source of `stage=data`. If False, they are those of the group `data`.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    metadata: Sequence[str] = ()
    source: bool = False

    def apply(self, row: Row) -> Row:
        """Return a row with columns renamed, metadata columns set aside, and context and choices appended to the
        question. Text cells of tables are converted, and a list of answers is replaced by its first one.

        Raises:
            InputError: a column to be renamed is missing, or a context cannot be written below the question.
        """
        data: dict[str, Any] = row.data
        has_answer_list = not isinstance(data.get("answer"), str | None)
        if not (self.columns or self.metadata or row.texts or has_answer_list) and can_skip_rules(tuple(data)):
            return row
        folded_metadata = {normalize_column_name(name) for name in self.metadata if name not in data}
        metadata_columns = {
            name: value
            for name, value in data.items()
            if name in self.metadata or (folded_metadata and normalize_column_name(name) in folded_metadata)
        }
        if metadata_columns:
            data = {name: value for name, value in data.items() if name not in metadata_columns}
        if self.columns:
            data, displaced = rename_columns(data, self.columns)
            metadata_columns |= displaced
        for ours, theirs in find_case_conflicts(tuple(data)):
            null_name = next((name for name in (theirs, ours) if data.get(name) is None), None)
            if null_name is None:
                problem = f"differs from `{ours}` in case only, and case is ignored"
                raise build_field_error(
                    theirs, data[theirs], problem, f"Rename one of the two. {self.suggest_metadata([theirs])}"
                )
            data = {name: value for name, value in data.items() if name != null_name}
        if new_names := find_canonical_names(tuple(data)):
            data = {new_names.get(name, name): value for name, value in data.items()}
        if row.texts:
            data = CELL_TYPES.convert_row(data)
            check_json_values(data)
        data, answer_lists = select_first_answer(data)
        data = self.complete_question(data)
        return row._replace(data=data, kept_as_metadata={**metadata_columns, **answer_lists})

    def suggest_metadata(self, names: Iterable[str]) -> str:
        """Return the sentence of an error message that says how to keep columns as metadata, with the setting to
        copy."""
        return self._format_setting(
            "To keep it as metadata", "metadata", f"[{', '.join(map(quote_name, [*self.metadata, *names]))}]"
        )

    def suggest_context(self, name: str) -> str:
        """Return the sentence of an error message that says how to make a column part of the question, with the setting
        to copy."""
        ours = next((ours for ours in ("context", *CONTEXT_COLUMNS) if ours not in self.columns), "context")
        return self._suggest_renaming("If it belongs to the question", {ours: name})

    def _suggest_renaming(self, condition: str, names: Mapping[str, str]) -> str:
        pairs = ", ".join(f"{ours}: {quote_name(theirs)}" for ours, theirs in {**self.columns, **names}.items())
        return self._format_setting(condition, "columns", f"{{{pairs}}}")

    def _format_setting(self, condition: str, key: str, value: str) -> str:
        if self.source:
            return f"{condition}, write {{path: …, {key}: {value}}}."
        return f'{condition}: "data.{key}={value}".'

    def check_answer(self, row: Fields, shape: Shape) -> None:
        """Raise InputError if a row's format finds no answer in the row, but another non-null column is named like an
        answer, such as `correct_answer`.

        Raises:
            InputError: a column has the name of an answer.
        """
        if shape is not TEXT and has_answer(row, shape):
            return
        answer_columns = find_answers_beside_turns(row, shape)
        names = [
            name for name in row if row[name] is not None and is_answer_column(str(name)) and name not in answer_columns
        ]
        if not names:
            return
        name = names[0]
        remedy = self.suggest_metadata(names)
        if isinstance(row[name], str) and not ANSWER_OF_SEVERAL.fullmatch(normalize_column_name(name)):
            ours = {"question": "text", "answer": name} if shape is TEXT else {shape.default_answer: name}
            remedy = f"{self._suggest_renaming('If it is the answer', ours)} {remedy}"
        raise build_field_error(
            name, row[name], "has the name of an answer, but no answer is read from this row", remedy
        )

    def complete_question(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return a row with context and choice columns appended to its question, and the turns of `history` put before
        it. Returns the same row if it has neither.

        Raises:
            InputError: a context or the history cannot be part of the question.
        """
        names = [name for name in find_context_columns(tuple(data)) if not is_blank(data[name])]
        history = data.get("history")
        if not names and is_blank(history):
            return data
        shape = find_shape(data)
        question_columns = find_question_columns(data, shape)
        if shape is None and not question_columns:  # the row's parser raises the error
            return data
        data = self.append_context(data, names, question_columns, shape)
        if is_blank(history) or question_columns == ("instruction",):  # parsed with its history later
            return data
        earlier_turns = parse_history(history)
        if earlier_turns is None:
            raise self._build_context_error(data, "history", "is no list of [question, answer]")
        question = data[question_columns[0]] if len(question_columns) == 1 else None
        if not isinstance(question, str) or is_transcript(question):
            raise self._build_context_error(data, "history", "needs a question that is one text, and the row has none")
        return {**data, question_columns[0]: [*earlier_turns, {"role": "user", "content": question}], "history": None}

    def append_context(
        self, data: dict[str, Any], names: list[str], question_columns: Sequence[str], shape: Shape | None
    ) -> dict[str, Any]:
        """Return a row with the text of the context and choice columns `names` appended to its question, one per line.

        Columns come in the order of `CONTEXT_COLUMNS` and `CHOICE_COLUMNS`; choices get letters. Texts that the
        question already contains are not repeated. A conversation must have exactly one user turn, to which they are
        appended.

        Raises:
            InputError: a context is neither text nor a list of texts, or there is no such turn.
        """
        if names == ["input"] and question_columns == ("instruction",) and (shape is None or shape.kind != PREFERENCES):
            return data  # the Alpaca parser appends it in the same way
        names = [name for name in names if name not in question_columns]
        question_texts = [text for name in question_columns for text in iter_texts(data[name])]
        additions = list[str]()
        last_column = ""
        for name, rendered in self._iter_contexts(data, names):
            if rendered.labels:
                is_in_question = self._has_choices_in_question(data, rendered, "\n".join(question_texts), name)
            else:
                in_order = name not in CONTEXT_COLUMNS
                is_in_question = any(contains_parts(rendered.parts, text, in_order) for text in question_texts)
            if rendered.parts and not is_in_question:
                additions.append(rendered.text)
                last_column = name
        if not additions:
            return data
        if not question_columns:
            raise self._build_context_error(
                data, last_column, "needs a question that it belongs to, and the row has none"
            )
        row = dict(data)
        for name in question_columns:
            row[name] = self._append_to_question(row[name], "\n".join(additions), name, last_column)
        if "input" in names and "instruction" in question_columns:
            row["input"] = None
        return row

    def _iter_contexts(self, row: Fields, names: Sequence[str]) -> Iterator[tuple[str, RenderedContext]]:
        """Yield the name and the rendered text of each of the context and choice columns `names`. Columns with one
        choice each come last, as one entry. Raises InputError if a value cannot be rendered as text."""
        lettered_names = find_choice_columns(row)
        for name in names:
            if name in lettered_names:
                continue
            value = row[name]
            if name == "choices" and are_api_replies(
                value, has_other_answer=any(row.get(key) is not None for key in REFERENCE_COLUMNS)
            ):
                problem = "holds answers in an API's log format, not the choices of a question"
                remedy = f"Write the answer into a column `completion`. {self.suggest_metadata([name])}"
                raise build_field_error(name, value, problem, remedy)
            rendered = render_choices(value) if name in CHOICE_COLUMNS else render_context(value)
            if rendered is None:
                problem = "is neither a text nor a list of texts"
                if name in CHOICE_COLUMNS:
                    problem = "holds a choice that is neither a text nor a number"
                raise self._build_context_error(row, name, problem)
            yield name, rendered
        if lettered_names:
            labels = [parse_choice_letter(name) for name in lettered_names]
            rendered = render_choices({"label": labels, "text": [row[name] for name in lettered_names]})
            if rendered is None:
                raise self._build_context_error(row, lettered_names[0], "is neither a text nor a number")
            yield lettered_names[0], rendered

    def _has_choices_in_question(self, row: Fields, choices: RenderedContext, text: str, name: str) -> bool:
        """Return whether a question's text already lists its choices, so that they need not be appended. If the answer
        is only a label such as `B`, the question must list it.

        Raises:
            InputError: the answer is a label of no choice, or of different choices in the question and in the column.
        """
        label = parse_answer_label(row)
        parts = [*filter(None, choices.parts)]
        question_labels = find_choice_labels(parts, text)
        by_column_label = {
            key.casefold(): part for key, part in zip(choices.labels, choices.parts, strict=True) if part
        }
        by_question_label = dict(zip(question_labels or (), parts, strict=False))
        candidates = {
            by_label[label].casefold() for by_label in (by_question_label, by_column_label) if label in by_label
        }
        is_choice_text = label in [part.casefold() for part in choices.parts]
        if label is None or (is_choice_text and not candidates):
            return question_labels is not None or contains_parts(parts, text, must_be_in_order=True)
        if is_choice_text:
            candidates.add(label)
        if len(candidates) == 1:
            return label in by_question_label
        problem = f"is not the label of a choice ({', '.join(choices.labels)})"
        if candidates:
            problem = f"means several choices: {' and '.join(sorted(candidates))}"
        problem = f"stands beside the answer {label.upper()!r}, which {problem}"
        remedy = f"Write the text of the choice as the answer. {self.suggest_metadata(list_sibling_choices(row, name))}"
        raise build_field_error(name, row.get(name), problem, remedy)

    def _append_to_question(self, value: Any, addition: str, question_name: str, context_name: str) -> Any:
        """Return the question `value` with `addition` on new lines after its text; in a list of messages, after its
        only user turn. Raises InputError if it is a transcript, or has no or several user turns.

        Args:
            value: a text, or a list of messages.
            addition: the lines.
            question_name: the question column, for errors.
            context_name: the context column, for errors.
        """
        if isinstance(value, str):
            if is_transcript(value):
                problem = f"stands beside a transcript of several turns, `{question_name}`"
                raise self._build_context_error({context_name: addition}, context_name, problem)
            return f"{value}\n{addition}"
        turns = value if isinstance(value, list) else []
        user_indices = [
            i for i, turn in enumerate(turns) if isinstance(turn, Mapping) and get_speaker(turn) in USER_SPEAKERS
        ]
        turn = turns[user_indices[0]] if len(user_indices) == 1 else {}
        content_field = "value" if "from" in turn else "content"
        text = turn.get(content_field)
        if isinstance(text, str):
            text = f"{text}\n{addition}"
        elif isinstance(text, list):
            text = [*text, {"type": "text", "text": f"\n{addition}"}]
        else:
            problem = f"stands beside a conversation of {len(user_indices)} turns of the user's, `{question_name}`"
            raise self._build_context_error({context_name: addition}, context_name, problem)
        return [*turns[: user_indices[0]], {**turn, content_field: text}, *turns[user_indices[0] + 1 :]]

    def _build_context_error(self, row: Fields, name: str, problem: str) -> InputError:
        remedy = f"Write it into the question. {self.suggest_metadata(list_sibling_choices(row, name))}"
        return build_field_error(name, row[name], problem, remedy)


def quote_name(name: str) -> str:
    """Return a column name as it is written in a setting: in single quotes unless it is one plain word."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name):
        return name
    return "'" + name.replace("\\", "\\\\").replace("'", "\\'") + "'"


def is_transcript(text: str) -> bool:
    return bool(HH_TURN.match(text.lstrip(" ")) or HELPSTEER_TURN.search(text))


@lru_cache(4096)
def is_answer_column(name: str) -> bool:
    """Return whether a column is named like an answer, such as `correct_answer` or `response_a`."""
    return (
        normalize_column_name(name) in ANSWER_NAMES
        or ANSWER_OF_SEVERAL.fullmatch(normalize_column_name(name)) is not None
    )


def has_answer(row: Fields, shape: Shape) -> bool:
    """Return whether a row has an answer, in its format's answer columns or as the last turn of its messages. Messages
    have one unless they end with the user's turn."""
    if shape.answer_columns:
        return any(row.get(name) is not None for name in shape.answer_columns)
    turns = row.get(shape.needs[0])
    return not isinstance(turns, list) or not ends_with_user(turns)


class RenderedContext(NamedTuple):
    """The text of a context or choice column, ready to be appended to the question.

    Attributes:
        text: what is appended to the question.
        parts: the texts to look for in the question.
        labels: the label of each part, for choices.
    """

    text: str
    parts: Sequence[str]
    labels: Sequence[str] = ()


def contains_parts(parts: Sequence[str], text: str, must_be_in_order: bool) -> bool:
    """Return whether a text contains every string of `parts` as whole words: `no` is not found in `know`.

    Args:
        parts: what to look for.
        text: where to look.
        must_be_in_order: the parts must follow one another.
    """
    start = 0
    for part in parts:
        match = re.compile(rf"(?<!\w){re.escape(part)}(?!\w)").search(text, start)
        if match is None:
            return False
        start = match.end() if must_be_in_order else 0
    return True


@lru_cache(4096)
def can_skip_rules(names: tuple[str, ...]) -> bool:
    """Return whether rows with these column names have no column to rename, and no context, history or list of answers.
    `ColumnRules.apply` then has nothing to do."""
    special = "history" in names or "answers" in names
    return not (special or find_case_conflicts(names) or find_canonical_names(names) or find_context_columns(names))


@lru_cache(4096)
def find_case_conflicts(names: tuple[str, ...]) -> Sequence[tuple[str, str]]:
    """Return the pairs of column names that differ in case only, such as (`prompt`, `Prompt`). Only known names are
    compared; the known spelling comes first."""
    by_name = dict[str, list[str]]()
    for name in names:
        if normalize_column_name(name) in KNOWN_NAMES:
            by_name.setdefault(normalize_column_name(name), []).append(name)
    groups = (sorted(group, key=lambda name: name != known_name) for known_name, group in by_name.items())
    return [(first, variant) for first, *variants in groups for variant in variants]


@lru_cache(4096)
def find_canonical_names(names: tuple[str, ...]) -> Mapping[str, str]:
    """Return column → standard name for columns with a standard name in other case or an alias of one, such as `Prompt`
    → `prompt`. A column is left out if the row has a column of the standard name."""
    used_names = {*names}
    new_names = dict[str, str]()
    for name in names:
        ours = name if name in KNOWN_NAMES else normalize_column_name(name)
        ours = ALIASES.get(ours, ours)
        if ours in KNOWN_NAMES and ours not in used_names:
            new_names[name] = ours
            used_names.add(ours)
    return new_names


@lru_cache(4096)
def find_context_columns(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the context and choice columns among `names`, in the order in which they are appended to the question."""
    by_folded_name = {normalize_column_name(name): name for name in reversed(names)}
    choice_names = sorted(filter(CHOICE_COLUMN.fullmatch, by_folded_name), key=choice_sort_key)
    if len(choice_names) < 2:
        choice_names = []
        if {"a", "b", "c"} <= by_folded_name.keys():
            choice_names = [*takewhile(by_folded_name.__contains__, ascii_lowercase)]
    return tuple(
        by_folded_name[name] for name in (*CONTEXT_COLUMNS, *CHOICE_COLUMNS, *choice_names) if name in by_folded_name
    )


def find_choice_columns(row: Fields) -> list[str]:
    """Return the columns of a row that hold one choice each, such as `option_a` and `option_b`."""
    return [
        name for name in find_context_columns(tuple(row)) if name not in CONTEXT_COLUMNS and name not in CHOICE_COLUMNS
    ]


def list_sibling_choices(row: Fields, name: str) -> list[str]:
    """Return all columns of a row that hold one choice each if `name` is one of them, otherwise `name` alone."""
    names = find_choice_columns(row)
    return names if name in names else [name]


def parse_choice_letter(name: str) -> str:
    """Return the upper-case letter or the number in a choice column's name, such as `B` for `option_b`."""
    match = CHOICE_COLUMN.fullmatch(normalize_column_name(name))
    return (match[1] if match else name.strip()).upper()


def choice_sort_key(name: str) -> tuple[int, str]:
    """Return the sort key of a choice column: its number, so that 10 comes after 9, or its letter."""
    letter = parse_choice_letter(name)
    return (int(letter), "") if letter.isdecimal() else (0, letter)


def find_question_columns(row: Fields, shape: Shape | None) -> tuple[str, ...]:
    """Return the columns that hold a row's question: its question column, and the answer columns of a pair if both
    answers include the question."""
    name = find_question_column(row, CONVERSATION_COLUMNS if shape is None else shape.question_columns)
    names = (name,) if name else ()
    if shape is None or shape.kind != PREFERENCES or (name and not is_question_in_answers(row, name)):
        return names
    return (*names, *find_answer_columns(row))


def find_answer_columns(row: Fields) -> tuple[str, str]:
    """Return the names of a pair's two answer columns: `chosen` and `rejected`, or a judged pair's, such as
    `response_a` and `response_b`."""
    columns = find_judged_columns_of_row(row)
    return ("chosen", "rejected") if columns is None or row.get("chosen") is not None else columns.answers


def is_question_in_answers(row: Fields, question_name: str) -> bool:
    """Return whether both answers of a pair are message lists that begin with the question, that is, with a user or
    system turn. Returns False if the question column is `conversations`.

    Args:
        row: the pair.
        question_name: its question column.
    """
    return question_name != "conversations" and all(
        isinstance(side, list)
        and bool(side)
        and isinstance(side[0], Mapping)
        and get_speaker(side[0]) in (*USER_SPEAKERS, "system")
        for side in map(row.get, find_answer_columns(row))
    )


def parse_history(history: Any) -> list[Any] | None:
    """Convert the value of `history`, a list of [question, answer] or of messages, to a list of messages. Returns None
    for anything else."""
    if not isinstance(history, list):
        return None
    if all(isinstance(turn, Mapping) and "role" in turn for turn in history):
        return history
    are_pairs = all(isinstance(pair, list) and [*map(type, pair)] == [str, str] for pair in history)
    return pairs_to_turns(history) if are_pairs else None


def render_context(value: Any) -> RenderedContext | None:
    """Render the value of a context column as text: a text as it is, and a list of texts or documents joined by empty
    lines. Returns None for anything else."""
    if isinstance(value, str):
        return RenderedContext(value, [value.strip()])
    parts = [render_document(entry) for entry in value] if isinstance(value, list) else [None]
    texts = [part for part in parts if part]
    return RenderedContext("\n\n".join(texts), [part.strip() for part in texts]) if None not in parts else None


def render_document(value: Any) -> str | None:
    """Render a document, an object with fields such as `title` and `text`, as its title on one line and its text below.
    A text is returned as it is, and null as an empty text. Returns None for anything else."""
    if isinstance(value, str | None):
        return value or ""
    if not isinstance(value, Mapping):
        return None
    bodies = [value[name] for name in BODIES if isinstance(value.get(name), str)]
    titles = (value[name] for name in TITLES if isinstance(value.get(name), str) and value[name])
    if not bodies:
        return None
    return "\n".join(filter(None, (next(titles, ""), next(filter(None, bodies), ""))))


def are_api_replies(value: Any, has_other_answer: bool) -> bool:
    """Return whether a column `choices` holds a logged API response, not the choices of a question. Its entries are
    objects, not all with a label; if the row has another answer, one must have a field of a response.

    Args:
        value: the column's value.
        has_other_answer: the row has an answer in another column.
    """
    if not isinstance(value, list) or not value or not all(isinstance(entry, Mapping) for entry in value):
        return False
    have_labels = all(get_first_field(entry, OPTION_LABELS) is not None for entry in value)
    return not have_labels and (not has_other_answer or any(REPLY_FIELDS & entry.keys() for entry in value))


def get_first_field(fields: Fields, names: Sequence[str]) -> Any:
    """Return the value of the first of the fields `names` that is not null, or None if all are."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def render_choices(value: Any) -> RenderedContext | None:
    """Render the choices of a question as lines such as `A. Oslo`. Labels of the choices are used in place of letters
    if they are short and distinct. An empty choice keeps its letter, except at the end.

    Returns None if a choice is neither text nor number, is an object without a text, or if there are more or fewer
    labels than choices.
    """
    labels: Any = ()
    texts = value
    if isinstance(value, str):
        return RenderedContext(value, [value.strip()])
    if isinstance(value, Mapping):
        texts = value.get("text", value.get("choices"))
        labels = value.get("label", value.get("labels", ()))
        if texts is None:
            labels = [*value]
            texts = [*value.values()]
    if isinstance(texts, list) and texts and all(isinstance(entry, Mapping) for entry in texts):
        if not all(any(name in entry for name in OPTION_TEXTS) for entry in texts):
            return None
        labels = [get_first_field(entry, OPTION_LABELS) for entry in texts]
        if any(len(str(label)) > MAX_LABEL_CHARACTERS for label in labels):
            labels = ()
        texts = [get_first_field(entry, OPTION_TEXTS) for entry in texts]
    if not isinstance(texts, list) or not all(isinstance(entry, str | int | float | None) for entry in texts):
        return None
    if isinstance(labels, list) and labels and len(labels) != len(texts):
        return None
    names = [str(label).strip() for label in labels] if isinstance(labels, list) and all(labels) else []
    if not names or not all(names) or len({*names}) < len(names):
        names = [ascii_lowercase[i].upper() if i < 26 else str(i + 1) for i in range(len(texts))]
    choices = [format_choice(text) for text in texts]
    while choices and not choices[-1]:
        choices.pop()
    lines = [f"{name}. {text}".rstrip(" ") for name, text in zip(names, choices, strict=False)]
    return RenderedContext("\n".join(lines), [text.strip() for text in choices], names[: len(choices)])


def find_choice_labels(parts: Sequence[str], text: str) -> list[str] | None:
    """Return the lower-case labels, such as `a` in `A) Oslo`, that a text writes before the choices `parts`. Returns
    None if one has no label, or two have the same."""
    labels = list[str]()
    for part in parts:
        match = re.search(rf"(?<!\w)([A-Za-z]|\d{{1,2}})[)\].:]\s*{re.escape(part)}(?!\w)", text)
        if match is None:
            return None
        labels.append(match[1].casefold())
    return labels if labels and len({*labels}) == len(labels) else None


def parse_answer_label(row: Fields) -> str | None:
    """Return the lower-case label, such as `b`, if a row's answer is only a choice's label: `B`, `(b)`, `b.` or `2.`.
    Returns None for other answers."""
    for name in (*ANSWERS_BESIDE_TURNS, "chosen", "messages", "conversations"):
        value = row.get(name)
        if isinstance(value, list) and value and isinstance(value[-1], Mapping):
            value = value[-1].get("content", value[-1].get("value"))
        if isinstance(value, str) and (match := ANSWER_LABEL.fullmatch(value.strip())):
            return match[1].casefold()
    return None


def format_choice(value: Any) -> str:
    """Return a choice as text, with booleans as in JSON and null as an empty text."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def has_unrendered_fields(value: Any) -> bool:
    """Return whether a context or choice value holds data that its rendered text does not show, such as scores of
    documents."""
    objects = [entry for entry in value if isinstance(entry, Mapping)] if isinstance(value, list) else []
    if not objects and not isinstance(value, Mapping):
        return False
    if any(not RENDERED_FIELDS.issuperset(entry) for entry in objects):
        return True
    rendered = [text.text for text in (render_context(value), render_choices(value)) if text is not None]
    return not any(all(text.strip() in rendering for text in iter_leaves(value)) for rendering in rendered)


def iter_leaves(value: Any) -> Iterator[str]:
    """Yield every text, number, boolean and null nested within a JSON value as text, see `format_choice`."""
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from iter_leaves(inner)
    else:
        yield format_choice(value)


def rename_columns(data: Fields, columns: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rename columns of a row, and return the row and the columns that had the new names before. `columns` maps new
    names to old ones. A field of the object `metadata` can be renamed as `metadata.FIELD`.

    Raises:
        InputError: a column to be renamed is missing, or its new name is not read.
    """
    sources = dict[str, str]()
    for ours, theirs in columns.items():
        column_list = ", ".join(map(str, data)) or "(none)"
        if (
            normalize_column_name(ours) not in RENAME_TARGETS
            and not CHOICE_COLUMN.fullmatch(ours)
            and not ANSWER_COLUMN.fullmatch(normalize_column_name(ours))
        ):
            problem = f"{theirs} cannot be renamed to {ours}, which is no name of a column that is read"
            remedy = f"Write our name first. To keep {theirs} as metadata, leave it out of the setting."
            raise InputError("columns", column_list, problem, remedy)
        matches = [name for name in data if normalize_column_name(name) == normalize_column_name(theirs)]
        if theirs not in data and not matches:
            inner = parse_metadata(data.get("metadata"))
            key = theirs.removeprefix(METADATA_PREFIX)
            if key != theirs and key in inner:
                data = {**data, theirs: inner.pop(key), "metadata": inner}
        if theirs in data:
            sources[ours] = theirs
        elif len(matches) == 1:
            sources[ours] = matches[0]
        else:
            by_folded_name = {str(name).casefold(): str(name) for name in data}
            suggestions = get_close_matches(theirs.casefold(), by_folded_name, 1, 0.75)
            remedy = "Give the name of a column that is there."
            if suggestions:
                remedy = f"Did you mean {by_folded_name[suggestions[0]]}?"
            problem = f"there is no {theirs} among them to rename to {ours}"
            raise InputError("columns", column_list, problem, remedy)
    remaining = {name: value for name, value in data.items() if name not in sources.values()}
    taken = {normalize_column_name(name) for name, value in remaining.items() if value is not None}
    for ours in [
        ours for ours in sources if ours in CONTEXT_COLUMNS and ours in taken
    ]:  # both columns belong to the question
        later_names = CONTEXT_COLUMNS[CONTEXT_COLUMNS.index(ours) :]
        free_names = (name for name in (*later_names, *CONTEXT_COLUMNS) if name not in taken and name not in sources)
        sources = {next(free_names, ours) if name == ours else name: theirs for name, theirs in sources.items()}
    displaced = {name: remaining.pop(name) for name in [*remaining] if name in sources}
    return {ours: data[theirs] for ours, theirs in sources.items()} | remaining, displaced


def select_first_answer(data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a row with its list of answers (SQuAD, TriviaQA, Natural Questions) replaced by the first one, and the
    columns that held the list. An empty list gives an empty text. Returns the same row and {} if there is no such
    list."""
    answer_lists = {
        name: texts for name in ("answer", "answers") if (texts := parse_answer_list(data.get(name))) is not None
    }
    # A list with one number per answer may hold scores: then the first answer need not be the best.
    score_counts = {
        len(values)
        for values in data.values()
        if isinstance(values, list) and len(values) > 1 and all(isinstance(value, int | float) for value in values)
    }
    list_columns = {name: data[name] for name, texts in answer_lists.items() if len(texts) not in score_counts}
    remaining = {name: value for name, value in data.items() if name not in list_columns}
    question_shape = next((shape for shape in CONVERSATIONS if remaining.get(shape.needs[0]) is not None), None)
    if not list_columns or question_shape is None:
        return data, {}
    shape = find_shape(remaining)
    if shape is None or shape.kind != DOCUMENTS or has_answer(remaining, shape):
        return remaining, list_columns
    texts = answer_lists[next(iter(list_columns))] or [""]
    return {**remaining, question_shape.default_answer: texts[0]}, list_columns


def parse_answer_list(value: Any) -> list[str] | None:
    """Extract the answers from a list of texts, a list of objects with `text` and position, or an object with `text` or
    `value`. Blank answers are left out. Returns None for anything else."""
    if isinstance(value, Mapping):
        value = value.get("text", value.get("value"))
        value = [value] if isinstance(value, str) else value
    if not isinstance(value, list):
        return None
    answers: list[Any] = [
        entry.get("text") if isinstance(entry, Mapping) and entry.keys() <= SPAN_FIELDS else entry for entry in value
    ]
    return [text for text in answers if text.strip()] if all(isinstance(text, str) for text in answers) else None


def parse_metadata(value: Any) -> dict[str, Any]:
    """Return the fields of the column `metadata`, which may be an object or its JSON text. Any other value is returned
    under the key `metadata`, and null as an empty dict."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {"metadata": value}
    if isinstance(value, Mapping):
        return dict(value)
    return {} if value is None else {"metadata": value}


def iter_texts(value: Any) -> Iterator[str]:
    """Yield the texts nested within a value, stripped, leaving out blank ones and the roles, ids and names of turns."""
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if name not in TURN_ATTRIBUTES:
                yield from iter_texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from iter_texts(inner)
