"""Answers with a known label, on which a grader is measured: whether a question about the answer has a yes. Imports no
torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from align.data.records.content import turn_json
from align.evals.known_pairs import unlike
from align.evals.tasks import Item, clustered
from align.run import json_digest
from align.types import Conversation, Feedback, Message


@dataclass(frozen=True, slots=True)
class KnownAnswer:
    """An answer and its label.

    Attributes:
        item: the prompt. Answers to one prompt are one cluster.
        answer: its turns, usually one.
        label: True for yes.
    """

    item: Item
    answer: tuple[Message, ...]
    label: bool


def known_answers(labelled: Sequence[Feedback]) -> tuple[list[KnownAnswer], int]:
    """The answers that were labelled, in order, each once, by what most of its labels say; and how many are left out
    because as many labels say yes as no."""
    by_answer: dict[tuple[tuple[Message, ...], tuple[Message, ...]], list[Feedback]] = {}
    for one in labelled:
        by_answer.setdefault((one.prompt, one.completion), []).append(one)
    kept = [found for found in by_answer.values() if 2 * sum(one.label for one in found) != len(found)]
    ids = unlike([found[0].id for found in kept], "answer")
    items = clustered(
        [
            Item(id, id, "", Conversation(found[0].prompt, id, found[0].tools), None)
            for id, found in zip(ids, kept, strict=True)
        ]
    )
    answers = [
        KnownAnswer(item, found[0].completion, 2 * sum(one.label for one in found) > len(found))
        for item, found in zip(items, kept, strict=True)
    ]
    return answers, len(by_answer) - len(kept)


def counted_labels(answers: Sequence[KnownAnswer]) -> Counter[bool]:
    """How many answers are labelled yes, and how many no."""
    return Counter(answer.label for answer in answers)


def answers_digest(answers: Sequence[KnownAnswer]) -> str:
    """SHA-256 over prompts, answers and labels, hex, whatever their order."""
    rows = [
        [[turn_json(turn) for turn in turns] for turns in (one.item.prompt.messages, one.answer)] + [one.label]
        for one in answers
    ]
    return json_digest(sorted(rows, key=str))
