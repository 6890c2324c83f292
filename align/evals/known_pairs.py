"""Pairs of answers with a known verdict, on which a judge is measured. Imports no torch.

A pair counts once, whoever judged it: the verdict of several people is that of most of them. Which answer is called the
first is drawn from a hash of the pair's id, so that neither place has more good answers.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from align.data.records.content import turn_json
from align.data.trained_ids import Seen
from align.evals.tasks import Item, clustered
from align.run import json_digest
from align.types import Conversation, Message, Preference

Turns = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class KnownPair:
    """Two answers to one prompt.

    Attributes:
        item: the prompt, with its source as the category. What shares a prompt or a group is one cluster.
        first, second: the turns of the answers, usually one.
        verdict: 1 where the first is better, 0 where the second is, ½ for a tie.
        votes: the same of each who judged.
        ended: False where sampling cut an answer at its length limit, of the first and the second.
    """

    item: Item
    first: Turns
    second: Turns
    verdict: float
    votes: tuple[float, ...]
    ended: tuple[bool, bool] = (True, True)

    @property
    def tied(self) -> bool:
        return self.verdict == 0.5

    @property
    def conversations(self) -> tuple[Conversation, Conversation]:
        """The prompt with either answer."""
        first, second = (replace(self.item.prompt, messages=self.item.prompt.messages + side) for side in self.sides)
        return first, second

    @property
    def sides(self) -> tuple[Turns, Turns]:
        return self.first, self.second

    @property
    def lengths(self) -> tuple[int, int]:
        """Characters of the answers."""
        first, second = (sum(len(turn.content) for turn in side) for side in self.sides)
        return first, second

    def as_preference(self) -> Preference:
        """The better answer as the chosen one. Of a tie it is the first."""
        better = self.verdict >= 0.5
        (chosen, worse), ends = (self.sides, self.ended) if better else (self.sides[::-1], self.ended[::-1])
        prompt = self.item.prompt
        return Preference(
            prompt.messages, chosen, worse, self.item.id, self.item.cluster, source=self.item.category,
            tools=prompt.tools, chosen_ended=ends[0], rejected_ended=ends[1],
        )  # fmt: skip


def known_pairs(decided: Sequence[Preference], tied: Sequence[Preference] = (), seed: int = 0) -> list[KnownPair]:
    """The pairs that were judged, in order, each once.

    Args:
        decided: pairs whose chosen answer is the better one.
        tied: pairs whose answers are equally good.
        seed: of the draw which answer is the first.
    """
    by_pair: dict[tuple[Turns, frozenset[Turns]], list[tuple[Preference, bool]]] = {}
    for prefs, equal in ((decided, False), (tied, True)):
        for pref in prefs:
            by_pair.setdefault((pref.prompt, frozenset((pref.chosen, pref.rejected))), []).append((pref, equal))
    ids = unlike([found[0][0].id for found in by_pair.values()])
    pairs = [of_votes(id, found, seed) for id, found in zip(ids, by_pair.values(), strict=True)]
    items = clustered([pair.item for pair in pairs])
    return [replace(pair, item=item) for item, pair in zip(items, pairs, strict=True)]


def of_votes(id: str, found: Sequence[tuple[Preference, bool]], seed: int) -> KnownPair:
    """One pair, by all that was said of it."""
    pref = found[0][0]
    flipped = hashlib.sha256(f"{seed} {id}".encode()).digest()[0] % 2 == 1
    sides = (pref.chosen, pref.chosen_ended), (pref.rejected, pref.rejected_ended)
    (first, first_ended), (second, second_ended) = sides[::-1] if flipped else sides
    votes = tuple(0.5 if equal else float(vote.chosen == first) for vote, equal in found)
    more = sum(vote - 0.5 for vote in votes)
    item = Item(id, pref.group_id or id, pref.source, Conversation(pref.prompt, id, pref.tools), None)
    verdict = 0.5 if more == 0 else float(more > 0)
    return KnownPair(item, first, second, verdict, votes, (first_ended, second_ended))


def unlike(ids: Sequence[str], what: str = "pair") -> list[str]:
    """The ids, those that stand there again with a number behind them, and a number for those that are empty.

    Args:
        what: they are of.
    """
    count, found = Counter[str](), list[str]()
    for i, given in enumerate(ids, 1):
        id = given or f"{what} {i}"
        count[id] += 1
        found.append(id if count[id] == 1 else f"{id}#{count[id]}")
    return found


def unlearned(pairs: Iterable[KnownPair], seen: Sequence[Seen]) -> list[KnownPair]:
    """The pairs whose prompt no reward model of the judge learned from."""
    return [pair for pair in pairs if not any(one.asks(pair.item.prompt.messages) for one in seen)]


def pairs_digest(pairs: Sequence[KnownPair]) -> str:
    """SHA-256 over prompts, answers and verdicts, hex; whatever their order, and whichever answer is the first."""

    def row(pair: KnownPair) -> list[object]:
        sides = [*zip(map(as_json, pair.sides), (pair.verdict, 1 - pair.verdict), strict=True)]
        return [as_json(pair.item.prompt.messages), *map(list, sorted(sides))]

    return json_digest(sorted(map(row, pairs)))


def as_json(turns: Turns) -> list[str]:
    return [turn_json(turn) for turn in turns]


def between_people(pairs: Sequence[KnownPair]) -> tuple[list[str], list[float]]:
    """Of pairs that several people judged, their clusters, and the share of two votes that are the same."""
    several = [pair for pair in pairs if len(pair.votes) > 1]
    return [pair.item.cluster for pair in several], [alike(pair.votes) for pair in several]


def alike(votes: Sequence[float]) -> float:
    both = [a == b for a, b in combinations(votes, 2)]
    return sum(both) / len(both)


def best_of(pairs: Sequence[KnownPair]) -> dict[str, list[tuple[KnownPair, bool]]]:
    """Where one answer of a prompt was preferred to each other one, and these are two or more: prompt → the pairs with
    it, and whether it is the first of each. The others need not have been compared.

    RewardBench 2 (Malik et al. 2025) has such prompts, of one right answer and three wrong ones.
    """
    by_prompt: dict[Turns, list[KnownPair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.item.prompt.messages, []).append(pair)
    found: dict[str, list[tuple[KnownPair, bool]]] = {}
    for prompt in by_prompt.values():
        answers = {side for pair in prompt for side in pair.sides}
        for best in sorted(answers, key=as_json):
            won = [(pair, pair.first == best) for pair in prompt if best in pair.sides]
            if len(answers) > 2 and len(won) == len(answers) - 1 and all(p.verdict == float(f) for p, f in won):
                found[prompt[0].item.id] = won
    return found
