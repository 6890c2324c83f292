"""People as judges: which pairs of answers they are asked about, where each answer stands, and the verdicts that their
votes are.

A pair becomes an item of an annotation project. Nothing in the item says which system wrote which answer: whoever has
both answers finds that out by their texts, and nobody else does. Imports no torch.
"""

from __future__ import annotations

import hmac
import random
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

from align.chain import canonical
from align.evals.verdicts import FIRST, SECOND, Pair, Verdict
from annotate.store import Candidate, Item, Vote, storable
from annotate.store.records import shuffle_of

ONCE, VOTES = 5, 6
"""Of so many votes, those on pairs that nobody has judged: the others are a second person's, and show how far people
agree."""


class Question(NamedTuple):
    """A pair of answers that people are asked about.

    Attributes:
        task: of the pair.
        other: the system that is compared with the first one.
        ended: False where an answer was cut at its length limit, which people are told; of both answers.
    """

    task: str
    other: str
    pair: Pair
    ended: tuple[bool, bool] = (True, True)

    @property
    def name(self) -> list[str]:
        return [self.task, self.other, self.pair.id]

    @property
    def alike(self) -> bool:
        """Whether people would see the same answer twice."""
        return storable(self.pair.first).strip() == storable(self.pair.second).strip()

    def key(self, secret: bytes) -> str:
        """What the project knows it by. Without the project's key it says nothing, and cannot be guessed."""
        return f"pair/{hmac.digest(secret, canonical(self.name).encode(), 'sha256').hex()[:32]}"

    def draw(self, seed: int) -> float:
        """When it is asked, drawn from [0, 1): the lowest is the first."""
        return shuffle_of(canonical([seed, *self.name]))

    def candidates(self, first_first: bool) -> tuple[Candidate, Candidate]:
        """Both answers in the order in which they are shown.

        Args:
            first_first: whether the first system's answer stands first.
        """
        texts = (self.pair.first, self.pair.second)
        first, second = (Candidate(storable(text), ended=end) for text, end in zip(texts, self.ended, strict=True))
        return (first, second) if first_first else (second, first)

    def first_in(self, item: Item) -> str | None:
        """The id of the first system's answer; None where the item holds other answers."""
        by_text = {candidate.text: candidate.id for candidate in item.candidates}
        first, second = storable(self.pair.first), storable(self.pair.second)
        return by_text[first] if by_text.keys() == {first, second} else None


def votes_asked(votes: int | None, pairs: int) -> int:
    """How many votes are wanted of so many pairs: those that are asked for, or one of each pair and some more."""
    return votes or pairs + -(-pairs * (VOTES - ONCE) // ONCE)


def chosen(questions: Mapping[str, Question], there: Collection[str], votes: int, seed: int) -> list[str]:
    """The items that so many votes are to be on, in the order in which they are asked; those that the project has are
    among them.

    Args:
        questions: by the id of their item; there are some.
        there: the ids of those that the project has.
    """
    enough = max(1, -(-votes * ONCE // VOTES))
    drawn = sorted(questions, key=lambda id: (id not in there, questions[id].draw(seed)))
    return drawn[: max(enough, len(there))]


def drawn_sides(groups: Sequence[Hashable], seed: int, ahead: int = 0) -> list[bool]:
    """Of each item whether the first system's answer stands first: balanced within one over all items, and within one
    in each group.

    Args:
        groups: of each item, in the order in which they are asked. Two in a row of one group stand either way.
        ahead: how many more of the items before them have the first system's answer first, less those that have not.
    """
    rng = random.Random(f"sides/{seed}")
    sides, waiting = [True] * len(groups), dict[Hashable, int]()
    for i, group in enumerate(groups):
        if group not in waiting:
            waiting[group] = i
            continue
        before = waiting.pop(group)
        sides[before] = rng.random() < 0.5
        sides[i] = not sides[before]
    for i in waiting.values():
        sides[i] = ahead < 0 or (ahead == 0 and rng.random() < 0.5)
        ahead += 1 if sides[i] else -1
    return sides


def verdict_of(vote: Vote, prompt: str, first: str) -> Verdict:
    """What a vote says of a pair.

    Args:
        prompt: the pair's id.
        first: the id of the first system's answer.
    """
    shown = vote.display_order
    order = "" if first not in shown else FIRST if shown.index(first) == 0 else SECOND
    won = 0.5 if len(vote.tiers) < 2 else float(first in vote.tiers[0])
    return Verdict(prompt, order, won, by=vote.annotator)


def verdicts_of(
    questions: Iterable[Question], asked: Mapping[str, tuple[Question, str]], votes: Iterable[Vote]
) -> dict[tuple[str, str], list[Verdict]]:
    """The verdicts by task and other system. A pair of the same text twice is a tie that nobody is asked about; of one
    that nobody judged there is none.

    Args:
        asked: item of the project → the question, and the id of the first system's answer.
        votes: on these items.
    """
    found: dict[tuple[str, str], list[Verdict]] = {}
    for question in questions:
        same = [Verdict(question.pair.id, "", 0.5)] if question.alike else []
        found.setdefault((question.task, question.other), []).extend(same)
    for vote in votes:
        if vote.item in asked:
            question, first = asked[vote.item]
            found[question.task, question.other].append(verdict_of(vote, question.pair.id, first))
    return found
