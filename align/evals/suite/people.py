"""People as judges: which pairs of answers they are asked about, where each answer stands, and the verdicts that their
votes are.

A pair becomes an item of an annotation project. Nothing in the item says which system wrote which answer: whoever has
both answers finds that out by their texts, and nobody else does. Imports no torch.
"""

from __future__ import annotations

import hmac
import random
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from align.annotate.store import Candidate, Item, Vote, storable
from align.core.chain import to_canonical_json
from align.core.types import Conversation
from align.evals.judges.judge_verdict import FIRST, SECOND, JudgeVerdict, Pair
from align.report import in_words
from align.report.figure_text import counted

PEOPLE = "people"
"""People, as `stage.judge` calls them."""
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
    def name(self) -> tuple[str, str, str]:
        return self.task, self.other, self.pair.id

    @property
    def prompt(self) -> Conversation:
        """As people are shown it, with the characters alone that a database keeps."""
        prompt = self.pair.prompt
        return replace(prompt, messages=tuple(replace(m, content=storable(m.content)) for m in prompt.messages))

    @property
    def alike(self) -> bool:
        """Whether people would see the same answer twice."""
        return storable(self.pair.first).strip() == storable(self.pair.second).strip()

    def key(self, secret: bytes) -> str:
        """What the project knows it by. Without the project's key it says nothing, and cannot be guessed."""
        return f"pair/{keyed(secret, *self.name).hex()[:32]}"

    def draw(self, key: bytes) -> float:
        """When it is asked, drawn from [0, 1): the lowest is the first.

        Args:
            key: see `order_key`.
        """
        return int.from_bytes(keyed(key, *self.name)[:6]) / 2**48

    def candidates(self, first_first: bool) -> tuple[Candidate, Candidate]:
        """Both answers in the order in which they are shown.

        Args:
            first_first: whether the first system's answer stands first.
        """
        texts = (self.pair.first, self.pair.second)
        first, second = (Candidate(storable(text), ended=end) for text, end in zip(texts, self.ended, strict=True))
        return (first, second) if first_first else (second, first)

    def first_in(self, item: Item) -> str | None:
        """The id of the first system's answer; None where the item holds another prompt or other answers."""
        if item.prompt.as_dicts() != self.prompt.as_dicts():
            return None
        by_text = {candidate.text: candidate.id for candidate in item.candidates}
        first, second = storable(self.pair.first), storable(self.pair.second)
        return by_text[first] if by_text.keys() == {first, second} else None


def keyed(secret: bytes, *what: str | int) -> bytes:
    """32 bytes that these words decide, and that nobody can tell who has no secret."""
    return hmac.digest(secret, to_canonical_json(what).encode(), "sha256")


def order_key(secret: bytes, seed: int) -> bytes:
    """What decides the order in which a project's pairs are asked."""
    return keyed(secret, "order", seed)


def sides_key(secret: bytes, seed: int, there: int) -> bytes:
    """What decides the sides of the pairs that a project is given beside those that are there."""
    return keyed(secret, "sides", seed, there)


def votes_asked(votes: int | None, pairs: int) -> int:
    """How many votes are wanted of so many pairs: those that are asked for, or one of each pair and some more."""
    return votes or pairs + -(-pairs * (VOTES - ONCE) // ONCE)


def chosen(questions: Mapping[str, Question], there: Collection[str], votes: int, key: bytes) -> list[str]:
    """The items that so many votes are to be on, in the order in which they are asked; those that the project has are
    among them.

    Args:
        questions: by the id of their item; there are some.
        there: the ids of those that the project has.
        key: see `order_key`.
    """
    enough = max(1, -(-votes * ONCE // VOTES))
    drawn = sorted(questions, key=lambda id: (id not in there, questions[id].draw(key)))
    return drawn[: max(enough, len(there))]


def drawn_sides(groups: Sequence[Hashable], key: bytes, ahead: int = 0) -> list[bool]:
    """Of each item whether the first system's answer stands first: balanced within one over all items, and within one
    in each group.

    Args:
        groups: of each item, in the order in which they are asked. Two in a row of one group stand either way.
        key: see `sides_key`.
        ahead: how many more of the items before them have the first system's answer first, less those that have not.
    """
    rng = random.Random(key)
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


def verdict_of(vote: Vote, prompt: str, first: str) -> JudgeVerdict:
    """What a vote says of a pair.

    Args:
        prompt: the pair's id.
        first: the id of the first system's answer.
    """
    shown = vote.display_order
    order = "" if first not in shown else FIRST if shown.index(first) == 0 else SECOND
    won = 0.5 if len(vote.tiers) < 2 else float(first in vote.tiers[0])
    return JudgeVerdict(prompt, order, won, by=vote.annotator)


def verdicts_of(
    questions: Sequence[Question], asked: Mapping[str, tuple[Question, str]], votes: Iterable[Vote], key: bytes
) -> dict[tuple[str, str], list[JudgeVerdict]]:
    """The verdicts by task and other system. Of a pair that nobody judged there is none.

    Args:
        asked: item of the project → the question, and the id of the first system's answer.
        votes: on these items.
        key: see `order_key`.
    """
    found: dict[tuple[str, str], list[JudgeVerdict]] = {(task, other): [] for task, other, *_ in questions}
    judged = set[tuple[str, str, str]]()
    for vote in votes:
        if vote.item in asked:
            question, first = asked[vote.item]
            judged.add(question.name)
            found[question.task, question.other].append(verdict_of(vote, question.pair.id, first))
    for question in alike_counted(questions, judged, key):
        found[question.task, question.other].append(JudgeVerdict(question.pair.id, "", 0.5))
    return found


def alike_counted(
    questions: Iterable[Question], judged: Collection[tuple[str, str, str]], key: bytes
) -> list[Question]:
    """The pairs of the same text twice that count as ties. People are asked about a sample of the other pairs, and with
    all of the ties beside it every figure would be drawn to a tie. So as large a share of them counts as was judged of
    the other pairs of the same task and systems, to the nearest number: the first ones by their draw. Where there are
    no other pairs, all count.

    Args:
        judged: names of pairs that have a vote.
        key: see `order_key`.
    """
    groups: dict[tuple[str, str], tuple[list[Question], list[Question]]] = {}
    for question in questions:
        groups.setdefault((question.task, question.other), ([], []))[question.alike].append(question)
    found = []
    for others, alike in groups.values():
        share = sum(question.name in judged for question in others) / len(others) if others else 1
        found += sorted(alike, key=lambda question: question.draw(key))[: round(share * len(alike))]
    return found


def describe_pairs_not_asked(counts: Mapping[str, int], ties: int) -> list[str]:
    """Return notes on pairs that nobody is asked about.

    Args:
        counts: of pairs of the same answer twice (`same_text`), and of pairs with tools.
        ties: how many pairs of the same answer twice count.
    """
    lines = []
    if same := counts["same_text"]:
        some = "" if ties == same else f"; {ties:,} of them count, in proportion to the pairs that were judged"
        lines.append(f"{counted(same, 'pair')} of the same answer twice: a tie, without a question{some}")
    if counts["with_tools"]:
        lines.append(f"{counted(counts['with_tools'], 'pair')} with tools, which the page does not show: not asked")
    return lines


def describe_votes(figures: Mapping[str, Any], command: str, named: bool) -> Iterator[str]:
    """Yield what people said so far, and how to ask them.

    Args:
        command: serves the project to people.
        named: the run has a name of the user's.
    """
    votes, wanted, people = figures["votes"], figures["wanted"], len(figures["people"])
    by = {0: "", 1: ", by 1 person"}.get(people, f", by {people:,} people")
    yield f"people: {votes:,} of {counted(wanted, 'vote')} on {counted(figures['asked'], 'pair')}{by}"
    if votes:
        agreement = figures["agreement"]
        shown = {
            "the same on a pair": agreement["raw"],
            "Krippendorff's alpha": agreement["alpha"],
            "known answers met": figures["gold"],
            "the same on a repeat": figures["repeats"],
            "the answer shown first preferred": figures["shown_first"],
        }
        parts = [f"{name} {value if isinstance(value, str) else in_words(value)}" for name, value in shown.items()]
        yield f"people: {', '.join(parts)}"
    if votes < wanted:
        yield f"to ask for the votes: {command}"
        yield f"this command, given again{' with another run.name' if named else ''}, reads them"
