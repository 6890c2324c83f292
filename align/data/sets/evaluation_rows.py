"""Rows of evaluation sets, as benchmarks have them: which texts each is looked for by.

A row of questions stands in columns: a question, perhaps a passage that it is about, and choices or answers. A question
may hold its stem and its choices itself, as in the files of ARC, OpenBookQA and CommonsenseQA. A row gives

- the question; where it has a passage, behind that and never alone: many passages are asked for their main idea;
- the same with each choice or answer;
- each choice or answer of more than `FEW` words;
- all of them together, also with letters in front (`A. …`);
- a question that lists its choices itself also without them.

A shorter choice is never looked for alone: `yes` says nothing. A row that is a conversation, a pair or a tree is what
training rows are, and is compared as one.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from align.data.read.content import PREFERENCES, strings
from align.data.read.shapes import RANKING, TREE, TREE_MESSAGE, recognised
from align.errors import InputError

QUESTIONS = frozenset({
    "ctx", "goal", "input", "instruction", "problem", "prompt", "query", "question", "question_stem", "sentence",
    "statement", "stem", "text",
})  # fmt: skip
PASSAGES = frozenset({"article", "background", "context", "paragraph", "passage", "premise", "story", "support"})
"""What a question is about: alone, it asks something else."""
CHOICES = frozenset({
    "a", "aliases", "answer", "answers", "b", "best_answer", "c", "choice", "choices", "code", "completion",
    "continuation", "correct", "correct_answer", "correct_answers", "d", "distractor", "distractors", "e", "ending",
    "endings", "explanation", "f", "hypothesis", "incorrect_answer", "incorrect_answers", "mc1_targets", "mc2_targets",
    "option", "options", "output", "rationale", "reference", "references", "response", "canonical_solution", "sol",
    "solution", "solutions", "target", "targets",
})  # fmt: skip
FEW = 4
"""Words of a choice that is looked for alone: more than so many."""
LONGEST = 4000
"""Characters of a question up to which it is looked for with each of its choices."""
INNER = ("text", "choices")
"""Where an object holds choices beside their labels, or one choice beside its label: the field of the texts."""
NAME_THEM = "Name the columns to compare: {path: …, columns: [question, choices]}."


class Query(NamedTuple):
    """What one row is looked for by.

    Attributes:
        said: texts, each compared with all that a training row says.
        alone: choices, compared in the same way if they have more than `FEW` words.
        asked: texts, each compared with what a training row asks.
    """

    said: Sequence[str]
    alone: Sequence[str]
    asked: Sequence[str]


def is_columns(data: Mapping[str, Any]) -> bool:
    """Whether a row is read by its columns, and not as a record of the shapes that are trained on."""
    shape = recognised(data)
    if shape is None:
        return data.keys().isdisjoint({"messages", "conversations", "chosen", "rejected"})
    if shape is RANKING:
        return not holds_objects(data["answers"])
    if shape in (TREE, TREE_MESSAGE) or shape.kind == PREFERENCES or shape.needs[0] in ("messages", "conversations"):
        return False
    return not any(holds_objects(data.get(name)) for name in ("prompt", "completion", "response"))


def holds_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(one, Mapping) for one in value)


def kind_of_column(name: str, beside: Collection[str]) -> str:
    """`question`, `passage`, `choice`, or nothing for a column that says something else, by its name.

    Args:
        beside: the other columns' names: HellaSwag's `ctx_a` and `ctx_b` are parts of `ctx`.
    """
    plain = re.sub(r"[\W_]+", "_", name.casefold()).strip("_")
    if plain not in CHOICES:
        short = re.sub(r"_?\d+$|_[a-f]$", "", plain)
        if short != plain and short in beside:
            return ""
        plain = short
    kinds = {"question": QUESTIONS, "passage": PASSAGES, "choice": CHOICES}
    return next((kind for kind, names in kinds.items() if plain in names), "")


def looked_for(data: Mapping[str, Any], columns: Sequence[str], where: str) -> Query:
    """The texts of a row.

    Args:
        columns: those that are compared; none for all whose names say what they are.

    Raises:
        InputError: a column is not there, or none says what is asked.
    """
    for name in columns:
        if name not in data:
            seen = ", ".join(map(str, data)) or "(none)"
            raise InputError(f"{where}, columns", seen, f"there is no {name} among them", NAME_THEM)
    parts: dict[str, list[str]] = {"question": [], "passage": [], "choice": []}
    lists = dict[str, list[str]]()
    for name, value in unfolded({name: data[name] for name in columns or data}):
        kind, texts = kind_of_column(name, data.keys()), texts_of(value)
        if not kind and name in columns:
            kind = "question" if isinstance(value, str) else "choice"
        if kind:
            parts[kind] += texts
            if kind == "choice":
                lists.setdefault(re.sub(r"\d+$|_?[a-fA-F]$", "", name), []).extend(texts)
    if not any(parts.values()) or not (columns or parts["question"] or parts["passage"]):
        seen = ", ".join(map(str, data)) or "(none)"
        raise InputError(f"{where}, columns", seen, "no text among them is called a question", NAME_THEM)
    question, passage = "\n".join(parts["question"]), "\n".join(parts["passage"])
    return with_choices(question, passage, list(dict.fromkeys(parts["choice"])), list(lists.values()))


def with_choices(question: str, passage: str, choices: list[str], lists: list[list[str]]) -> Query:
    """See `Query`."""
    whole = "\n".join(filter(None, (passage, question)))
    if not whole:  # short choices say nothing together either: yes, no
        return Query([], choices, [])
    said = [whole]
    if len(whole) <= LONGEST:
        said += [f"{whole}\n{choice}" for choice in choices]
    for several in lists:
        if len(several) > 1:
            lettered = [f"{letter}. {one}" for letter, one in zip(string.ascii_uppercase, several, strict=False)]
            said += ["\n".join(filter(None, (whole, *form))) for form in (several, lettered)]
    if len(choices) > 1:
        said.append("\n".join(filter(None, (whole, *choices))))
    asked = [whole, f"{question}\n{passage}"] if passage and question else [whole, *stem_of(whole)]
    asked += ["\n".join((whole, *several)) for several in lists if len(several) > 1]
    return Query(said, choices, [*filter(None, asked)])


FIRST_CHOICE = re.compile(r"\s\(?[Aa][.):]\s(?=.*\s\(?[Bb][.):]\s)", re.DOTALL)


def stem_of(question: str) -> list[str]:
    """What a question asks before the choices that it lists itself: others may list them in another order. None if it
    lists no choices."""
    listed = FIRST_CHOICE.search(question)
    return [question[: listed.start()]] if listed and question[: listed.start()].strip() else []


def unfolded(data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Columns and what they hold; in place of a question that is an object with a question in it, its fields."""
    for name, value in data.items():
        held = from_json(value) if kind_of_column(name, data.keys()) == "question" else None
        if isinstance(held, Mapping) and any(kind_of_column(inner, held.keys()) == "question" for inner in held):
            yield from held.items()
        else:
            yield name, value


def texts_of(value: Any) -> list[str]:
    """The texts that a column holds, at any depth; of choices beside their labels the choices."""
    return [text for text in strings(without_labels(from_json(value))) if text.strip()]


def from_json(value: Any) -> Any:
    """A list or an object that a table holds as JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def without_labels(value: Any) -> Any:
    """Choices of which each, or all together, may stand beside labels."""
    if isinstance(value, list):
        return [without_labels(one) for one in value]
    if isinstance(value, Mapping) and (inner := next((name for name in INNER if value.get(name)), None)):
        return without_labels(value[inner])
    return value
