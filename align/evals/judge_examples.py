"""Examples with a known verdict, on which a judge is measured: pairs of answers, and single answers with a label.

An example counts once, however many people judged it: its verdict is the majority's. Which answer of a pair is the
first is drawn from a hash of the pair's id, so that neither place has more good answers. Imports no torch.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from align.core.types import Conversation, Feedback, Message, Preference
from align.data.read.content import turn_json
from align.data.trained_ids import Seen
from align.evals.suite.tasks import Item, clustered
from align.run import json_digest

Turns = tuple[Message, ...]
TIE = 0.5


@dataclass(frozen=True, slots=True)
class PairExample:
    """Two answers to one prompt.

    Attributes:
        item: the prompt, with its source as the category. Pairs that share a prompt or a group are one cluster.
        first, second: the turns of each answer, usually one.
        verdict: 1 if the first is better, 0 if the second is, ½ for a tie.
        votes: the same of each person.
        ended: False if sampling cut the first, or the second, at its length limit.
    """

    item: Item
    first: Turns
    second: Turns
    verdict: float
    votes: tuple[float, ...]
    ended: tuple[bool, bool] = (True, True)

    @property
    def is_tied(self) -> bool:
        return self.verdict == TIE

    @property
    def sides(self) -> tuple[Turns, Turns]:
        return self.first, self.second

    @property
    def conversations(self) -> tuple[Conversation, Conversation]:
        """The prompt with either answer."""
        first, second = (replace(self.item.prompt, messages=self.item.prompt.messages + side) for side in self.sides)
        return first, second

    @property
    def lengths(self) -> tuple[int, int]:
        """Characters of the answers."""
        first, second = (sum(len(turn.content) for turn in side) for side in self.sides)
        return first, second

    def to_preference(self) -> Preference:
        """Return the pair with the better answer as the chosen one; of a tie, the first."""
        is_first = self.verdict >= TIE
        chosen, rejected = self.sides if is_first else self.sides[::-1]
        chosen_ended, rejected_ended = self.ended if is_first else self.ended[::-1]
        return Preference(
            self.item.prompt.messages,
            chosen,
            rejected,
            self.item.id,
            self.item.cluster,
            source=self.item.category,
            tools=self.item.prompt.tools,
            chosen_ended=chosen_ended,
            rejected_ended=rejected_ended,
        )


@dataclass(frozen=True, slots=True)
class AnswerExample:
    """An answer and its label.

    Attributes:
        item: the prompt. Answers to one prompt are one cluster.
        answer: its turns, usually one.
        label: True if the question about the answer has a yes.
    """

    item: Item
    answer: Turns
    label: bool

    @property
    def verdict(self) -> float:
        return float(self.label)


def build_pair_examples(
    decided: Sequence[Preference], tied: Sequence[Preference] = (), seed: int = 0
) -> list[PairExample]:
    """Return the judged pairs in order, each once.

    Args:
        decided: pairs whose chosen answer is the better one.
        tied: pairs whose answers are equally good.
        seed: of the draw which answer is the first.
    """
    votes_by_pair: dict[tuple[Turns, frozenset[Turns]], list[tuple[Preference, bool]]] = {}
    for prefs, is_tie in ((decided, False), (tied, True)):
        for pref in prefs:
            key = (pref.prompt, frozenset((pref.chosen, pref.rejected)))
            votes_by_pair.setdefault(key, []).append((pref, is_tie))
    ids = make_unique([votes[0][0].id for votes in votes_by_pair.values()], "pair")
    pairs = [count_votes(id, votes, seed) for id, votes in zip(ids, votes_by_pair.values(), strict=True)]
    items = clustered([pair.item for pair in pairs])
    return [replace(pair, item=item) for item, pair in zip(items, pairs, strict=True)]


def count_votes(id: str, votes: Sequence[tuple[Preference, bool]], seed: int) -> PairExample:
    """Return the example of one pair. Each vote is a preference and whether it calls the answers equal."""
    pref = votes[0][0]
    sides = [(pref.chosen, pref.chosen_ended), (pref.rejected, pref.rejected_ended)]
    if hashlib.sha256(f"{seed} {id}".encode()).digest()[0] % 2 == 1:
        sides.reverse()
    (first, first_ended), (second, second_ended) = sides
    values = tuple(TIE if is_tie else float(vote.chosen == first) for vote, is_tie in votes)
    balance = sum(value - TIE for value in values)
    verdict = TIE if balance == 0 else float(balance > 0)
    item = Item(id, pref.group_id or id, pref.source, Conversation(pref.prompt, id, pref.tools), None)
    return PairExample(item, first, second, verdict, values, (first_ended, second_ended))


def build_answer_examples(labelled: Sequence[Feedback]) -> tuple[list[AnswerExample], int]:
    """Return the labelled answers in order, each once, and how many were left out because as many labels say yes as
    no."""
    labels_by_answer: dict[tuple[Turns, Turns], list[Feedback]] = {}
    for row in labelled:
        labels_by_answer.setdefault((row.prompt, row.completion), []).append(row)
    kept = [rows for rows in labels_by_answer.values() if 2 * sum(row.label for row in rows) != len(rows)]
    ids = make_unique([rows[0].id for rows in kept], "answer")
    items = [
        Item(id, id, "", Conversation(rows[0].prompt, id, rows[0].tools), None)
        for id, rows in zip(ids, kept, strict=True)
    ]
    examples = [
        AnswerExample(item, rows[0].completion, 2 * sum(row.label for row in rows) > len(rows))
        for item, rows in zip(clustered(items), kept, strict=True)
    ]
    return examples, len(labels_by_answer) - len(kept)


def make_unique(ids: Sequence[str], noun: str) -> list[str]:
    """Return the ids, a repeated one with its number (`x#2`) and an empty one as the noun with its place (`pair 3`)."""
    counts = Counter[str]()
    unique = []
    for place, given in enumerate(ids, 1):
        id = given or f"{noun} {place}"
        counts[id] += 1
        unique.append(id if counts[id] == 1 else f"{id}#{counts[id]}")
    return unique


def drop_learned(pairs: Iterable[PairExample], seen: Sequence[Seen]) -> list[PairExample]:
    """Return the pairs whose prompt no reward model of the judge learned from."""
    return [pair for pair in pairs if not any(model.asks(pair.item.prompt.messages) for model in seen)]


def digest_examples(examples: Sequence[PairExample] | Sequence[AnswerExample]) -> str:
    """Return SHA-256, in hex, over prompts, answers and verdicts, in whatever order they stand."""
    return json_digest(sorted((list_contents(example) for example in examples), key=str))


def list_contents(example: PairExample | AnswerExample) -> list[object]:
    prompt = turns_to_json(example.item.prompt.messages)
    if isinstance(example, AnswerExample):
        return [prompt, turns_to_json(example.answer), example.label]
    verdicts = (example.verdict, 1 - example.verdict)
    sides = [[turns_to_json(side), verdict] for side, verdict in zip(example.sides, verdicts, strict=True)]
    return [prompt, *sorted(sides)]


def turns_to_json(turns: Turns) -> list[str]:
    return [turn_json(turn) for turn in turns]


def measure_human_agreement(pairs: Sequence[PairExample]) -> tuple[list[str], list[float]]:
    """Return, of the pairs that several people judged, the clusters and the share of two votes that are equal."""
    several = [pair for pair in pairs if len(pair.votes) > 1]
    shares = []
    for pair in several:
        is_equal = [a == b for a, b in combinations(pair.votes, 2)]
        shares.append(sum(is_equal) / len(is_equal))
    return [pair.item.cluster for pair in several], shares


def find_best_answers(pairs: Sequence[PairExample]) -> dict[str, list[tuple[PairExample, bool]]]:
    """Return the prompts with one answer that was preferred to each other one, of which there are two or more: the id
    of the prompt → the pairs with that answer, and whether it is the first of each. The other answers need not have
    been compared.

    RewardBench 2 (Malik et al. 2025) has such prompts, with one right answer and three wrong ones.
    """
    pairs_by_prompt: dict[Turns, list[PairExample]] = {}
    for pair in pairs:
        pairs_by_prompt.setdefault(pair.item.prompt.messages, []).append(pair)
    best_answers: dict[str, list[tuple[PairExample, bool]]] = {}
    for prompt_pairs in pairs_by_prompt.values():
        answers = {side for pair in prompt_pairs for side in pair.sides}
        for answer in sorted(answers, key=turns_to_json):
            own = [(pair, pair.first == answer) for pair in prompt_pairs if answer in pair.sides]
            has_all = len(answers) > 2 and len(own) == len(answers) - 1
            if has_all and all(pair.verdict == float(is_first) for pair, is_first in own):
                best_answers[prompt_pairs[0].item.id] = own
    return best_answers
