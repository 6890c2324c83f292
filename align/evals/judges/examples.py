"""Labelled examples, on which a judge is measured: pairs of answers, or single answers to a yes/no question.

An example counts once, with the majority's verdict if several people judged it. Which answer of a pair is the first is
drawn by a hash of the pair's id, so that good answers are equally frequent in both positions. Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from align.core.types import Conversation, Feedback, Message, Preference
from align.data.read.content import encode_turn
from align.data.trained_ids import TrainedQuestions
from align.evals.suite.tasks import EvalItem, cluster_items
from align.run import json_digest

Turns = tuple[Message, ...]
TIE = 0.5
YES_AND_NO = {"yes": 1.0, "no": 0.0}
"""Labels of single answers, mapped to their verdicts."""


@dataclass(frozen=True, slots=True)
class PairExample:
    """Two answers to one prompt with a known verdict, on which a judge is measured.

    Attributes:
        item: the prompt, with its source as the category. Pairs that share a prompt or a group are one cluster.
        first, second: the turns of each answer, usually one.
        verdict: 1 if the first is better, 0 if the second is, ½ for a tie.
        votes: the verdicts of single people.
        ended: False if sampling cut the first, or the second, at its length limit.
    """

    item: EvalItem
    first: Turns
    second: Turns
    verdict: float
    votes: tuple[float, ...]
    ended: tuple[bool, bool] = (True, True)

    @property
    def is_tied(self) -> bool:
        return self.verdict == TIE

    @property
    def answers(self) -> tuple[Turns, Turns]:
        return self.first, self.second

    @property
    def conversations(self) -> tuple[Conversation, Conversation]:
        """Two conversations: the prompt followed by the first answer, and by the second."""
        first, second = (replace(self.item.prompt, messages=self.item.prompt.messages + side) for side in self.answers)
        return first, second

    @property
    def lengths(self) -> tuple[int, int]:
        """The number of characters of the first and of the second answer."""
        first, second = (sum(len(turn.content) for turn in side) for side in self.answers)
        return first, second

    def to_preference(self) -> Preference:
        """Return the pair as a preference with the better answer as the chosen one. Of a tie, the first answer is
        chosen."""
        is_first = self.verdict >= TIE
        chosen_turns, rejected_turns = self.answers if is_first else self.answers[::-1]
        chosen_ended, rejected_ended = self.ended if is_first else self.ended[::-1]
        return Preference(
            self.item.prompt.messages,
            chosen_turns,
            rejected_turns,
            self.item.id,
            self.item.cluster,
            source=self.item.category,
            tools=self.item.prompt.tools,
            chosen_ended=chosen_ended,
            rejected_ended=rejected_ended,
        )


@dataclass(frozen=True, slots=True)
class AnswerExample:
    """An answer with a known yes/no label, on which a judge is measured.

    Attributes:
        item: the prompt. Answers to one prompt are one cluster.
        answer: its turns, usually one.
        label: True if the question about the answer has a yes.
    """

    item: EvalItem
    answer: Turns
    label: bool

    @property
    def verdict(self) -> float:
        return float(self.label)


def build_pair_examples(
    decided: Sequence[Preference], tied: Sequence[Preference] = (), seed: int = 0
) -> list[PairExample]:
    """Build one example for each distinct answer pair, with the majority of its votes as its verdict. The examples
    are in the order of each pair's first vote.

    Args:
        decided: pairs whose chosen answer is the better one.
        tied: pairs whose answers are equally good.
        seed: decides which answer is the first.
    """
    votes_by_pair: dict[tuple[Turns, frozenset[Turns]], list[tuple[Preference, bool]]] = {}
    for prefs, is_tie in ((decided, False), (tied, True)):
        for pref in prefs:
            key = (pref.prompt, frozenset((pref.chosen, pref.rejected)))
            votes_by_pair.setdefault(key, []).append((pref, is_tie))
    ids = make_unique_ids([votes[0][0].id for votes in votes_by_pair.values()], "pair")
    pairs = [build_pair_example(id, votes, seed) for id, votes in zip(ids, votes_by_pair.values(), strict=True)]
    items = cluster_items([pair.item for pair in pairs])
    return [replace(pair, item=item) for item, pair in zip(items, pairs, strict=True)]


def build_pair_example(id: str, votes: Sequence[tuple[Preference, bool]], seed: int) -> PairExample:
    """Build the example of one answer pair with the majority verdict of its votes, each a (preference, True for a tie).
    `seed` decides which answer comes first."""
    pref = votes[0][0]
    sides = [(pref.chosen, pref.chosen_ended), (pref.rejected, pref.rejected_ended)]
    if hashlib.sha256(f"{seed} {id}".encode()).digest()[0] % 2 == 1:
        sides.reverse()
    (first, first_ended), (second, second_ended) = sides
    values = tuple(TIE if is_tie else float(vote.chosen == first) for vote, is_tie in votes)
    balance = sum(value - TIE for value in values)
    verdict = TIE if balance == 0 else float(balance > 0)
    item = EvalItem(id, pref.group_id or id, pref.source, Conversation(pref.prompt, id, pref.tools), None)
    return PairExample(item, first, second, verdict, values, (first_ended, second_ended))


class LabelledAnswers(NamedTuple):
    """Distinct answers with the label that most of their rows give.

    Attributes:
        examples: the answers, each once.
        left_out: number of answers left out because they have as many positive as negative labels.
    """

    examples: list[AnswerExample]
    left_out: int


def build_answer_examples(labelled: Sequence[Feedback]) -> LabelledAnswers:
    """Build one example for each distinct answer, with the majority of its labels. Answers with as many positive as
    negative labels are left out and counted."""
    labels_by_answer: dict[tuple[Turns, Turns], list[Feedback]] = {}
    for row in labelled:
        labels_by_answer.setdefault((row.prompt, row.completion), []).append(row)
    kept = [rows for rows in labels_by_answer.values() if 2 * sum(row.label for row in rows) != len(rows)]
    ids = make_unique_ids([rows[0].id for rows in kept], "answer")
    items = [
        EvalItem(id, id, "", Conversation(rows[0].prompt, id, rows[0].tools), None)
        for id, rows in zip(ids, kept, strict=True)
    ]
    examples = [
        AnswerExample(item, rows[0].completion, 2 * sum(row.label for row in rows) > len(rows))
        for item, rows in zip(cluster_items(items), kept, strict=True)
    ]
    return LabelledAnswers(examples, len(labels_by_answer) - len(kept))


def make_unique_ids(ids: Sequence[str], noun: str) -> list[str]:
    """Return unique ids in the same order: the second `x` becomes `x#2`, and an empty id becomes `noun` with its
    position (`pair 3`)."""
    counts = Counter[str]()
    unique = []
    for place, id_or_empty in enumerate(ids, 1):
        id = id_or_empty or f"{noun} {place}"
        counts[id] += 1
        unique.append(id if counts[id] == 1 else f"{id}#{counts[id]}")
    return unique


def drop_trained_pairs(
    pairs: Iterable[PairExample], trained_questions: Sequence[TrainedQuestions]
) -> list[PairExample]:
    """Return the pairs whose prompt is not in the training data of any of the judge's reward models."""
    return [pair for pair in pairs if not any(model.asks(pair.item.prompt.messages) for model in trained_questions)]


def digest_examples(examples: Sequence[PairExample] | Sequence[AnswerExample]) -> str:
    """Return the SHA-256, in hex, of the examples' prompts, answers and verdicts, independent of the order of examples
    and of answers."""

    def list_contents(example: PairExample | AnswerExample) -> list[object]:
        prompt = turns_to_json(example.item.prompt.messages)
        if isinstance(example, AnswerExample):
            return [prompt, turns_to_json(example.answer), example.label]
        verdicts = (example.verdict, 1 - example.verdict)
        sides = [[turns_to_json(side), verdict] for side, verdict in zip(example.answers, verdicts, strict=True)]
        return [prompt, *sorted(sides)]

    return json_digest(sorted(map(list_contents, examples), key=str))


def turns_to_json(turns: Turns) -> list[str]:
    return [encode_turn(turn) for turn in turns]
