"""People as judges: the answer pairs that they see, the order in which both answers are shown, and their votes as
verdicts.

A pair becomes an item of an annotation project. The item does not say which system wrote which answer, so that only
those who have the answers themselves can tell. Imports no torch.
"""

from __future__ import annotations

import hmac
import random
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from align.annotate.store import AnnotationItem, Candidate, Vote, replace_unwritable
from align.core.chain import to_canonical_json
from align.core.types import Conversation
from align.evals.judges.judge_verdict import FIRST, SECOND, AnswerPair, JudgeVerdict
from align.report import format_interval
from align.report.figure_text import pluralize

PEOPLE = "people"
"""Value of `stage.judge` for people as judges."""
ONCE = 5
VOTES = 6
"""Of every 6 votes, 5 are first votes on a pair. The sixth is a second vote on a pair, from which the agreement of
people is estimated."""


class PairQuestion(NamedTuple):
    """A pair of answers for people to compare.

    Attributes:
        task: of the pair.
        other: the system that is compared with the first one.
        ended: of both answers, False if it was cut at its length limit, which the page shows.
    """

    task: str
    other: str
    pair: AnswerPair
    ended: tuple[bool, bool] = (True, True)

    @property
    def name(self) -> tuple[str, str, str]:
        return self.task, self.other, self.pair.id

    @property
    def prompt(self) -> Conversation:
        """The prompt as people see it, with U+FFFD for characters that a database cannot store."""
        prompt = self.pair.prompt
        return replace(
            prompt, messages=tuple(replace(m, content=replace_unwritable(m.content)) for m in prompt.messages)
        )

    @property
    def is_tie(self) -> bool:
        """True if both answers look the same to people."""
        return replace_unwritable(self.pair.first).strip() == replace_unwritable(self.pair.second).strip()

    def key(self, secret: bytes) -> str:
        """Return the pair's item id in the annotation project, an HMAC that reveals nothing without the project's
        secret."""
        return f"pair/{derive_bytes(secret, *self.name).hex()[:32]}"

    def draw(self, key: bytes) -> float:
        """Return a pseudorandom number in [0, 1) that orders the pairs. Pairs with the lowest numbers are shown to
        people.

        Args:
            key: see `derive_order_key`.
        """
        return int.from_bytes(derive_bytes(key, *self.name)[:6]) / 2**48

    def candidates(self, shows_first_system_first: bool) -> tuple[Candidate, Candidate]:
        """Return both answers as candidates for the annotation page, in the order in which they are shown.

        Args:
            shows_first_system_first: True if the first system's answer is shown first.
        """
        texts = (self.pair.first, self.pair.second)
        first, second = (
            Candidate(replace_unwritable(text), ended=end) for text, end in zip(texts, self.ended, strict=True)
        )
        return (first, second) if shows_first_system_first else (second, first)

    def find_first_answer(self, item: AnnotationItem) -> str | None:
        """Return the id of the first model's answer among an item's candidates. Returns None if the item has another
        prompt or other answers."""
        if item.prompt.as_dicts() != self.prompt.as_dicts():
            return None
        by_text = {candidate.text: candidate.id for candidate in item.candidates}
        first = replace_unwritable(self.pair.first)
        second = replace_unwritable(self.pair.second)
        return by_text[first] if by_text.keys() == {first, second} else None


class ProjectQuestion(NamedTuple):
    """A pair of answers that is an item of an annotation project.

    Attributes:
        question: the pair.
        first_answer_id: the id of the first system's answer in the item.
    """

    question: PairQuestion
    first_answer_id: str


def derive_bytes(secret: bytes, *parts: str | int) -> bytes:
    """Return the HMAC-SHA256 of `parts` under a secret, 32 bytes."""
    return hmac.digest(secret, to_canonical_json(parts).encode(), "sha256")


def derive_order_key(secret: bytes, seed: int) -> bytes:
    """Derive the key for the random order in which people see a project's pairs."""
    return derive_bytes(secret, "order", seed)


def derive_display_key(secret: bytes, seed: int, existing_pairs: int) -> bytes:
    """Derive the seed of the random display order of both answers, for pairs that are added to a project.

    Args:
        existing_pairs: number of pairs that the project has already.
    """
    return derive_bytes(secret, "sides", seed, existing_pairs)


def count_votes_to_ask(votes: int | None, pairs: int) -> int:
    """Return the number of votes to collect: `votes`, or by default one on each pair and a second one on every
    fifth."""
    return votes or pairs + -(-pairs * (VOTES - ONCE) // ONCE)


def choose_items(
    questions: Mapping[str, PairQuestion], existing_ids: Collection[str], votes: int, key: bytes
) -> list[str]:
    """Choose the item ids of the pairs that people vote on, in random order. Items that the project has already are
    always among them.

    Args:
        questions: by the id of their item, at least one.
        existing_ids: the ids of the project's items.
        votes: number of votes to collect.
        key: see `derive_order_key`.
    """
    count = max(1, -(-votes * ONCE // VOTES))
    ordered = sorted(questions, key=lambda id: (id not in existing_ids, questions[id].draw(key)))
    return ordered[: max(count, len(existing_ids))]


def draw_display_orders(groups: Sequence[Hashable], key: bytes, imbalance: int = 0) -> list[bool]:
    """Draw for each item whether people see the first model's answer first, balanced overall and within each group. The
    two cases differ by at most one.

    Args:
        groups: of each item, in the order in which they are asked. The first and second item of a group
            have opposite orders, so have the third and fourth, and so on.
        key: see `derive_display_key`.
        imbalance: among earlier items, the number with the first system's answer first, less the number of the others.
    """
    rng = random.Random(key)
    shows_first = [True] * len(groups)
    unpaired: dict[Hashable, int] = {}
    for i, group in enumerate(groups):
        if group not in unpaired:
            unpaired[group] = i
            continue
        partner = unpaired.pop(group)
        shows_first[partner] = rng.random() < 0.5
        shows_first[i] = not shows_first[partner]
    for i in unpaired.values():
        shows_first[i] = imbalance < 0 or (imbalance == 0 and rng.random() < 0.5)
        imbalance += 1 if shows_first[i] else -1
    return shows_first


def vote_to_verdict(vote: Vote, prompt: str, first_answer_id: str) -> JudgeVerdict:
    """Convert a person's vote to a verdict on its pair: 1 if the first model's answer won, ½ for a tie, 0 if it lost.

    Args:
        prompt: the pair's id.
        first_answer_id: the id of the first system's answer.
    """
    order = ""
    if first_answer_id in vote.display_order:
        order = FIRST if vote.display_order.index(first_answer_id) == 0 else SECOND
    verdict = 0.5 if len(vote.tiers) < 2 else float(first_answer_id in vote.tiers[0])
    return JudgeVerdict(prompt, order, verdict, by=vote.annotator)


def votes_to_verdicts(
    questions: Sequence[PairQuestion],
    question_by_item: Mapping[str, tuple[PairQuestion, str]],
    votes: Iterable[Vote],
    key: bytes,
) -> dict[tuple[str, str], list[JudgeVerdict]]:
    """Convert votes to verdicts, returned as (task, other model) → verdicts. Pairs without a vote have no verdict,
    except for equal answers that count as ties.

    Args:
        question_by_item: id of an item → its question, and the id of the first system's answer.
        votes: on these items.
        key: see `derive_order_key`.
    """
    verdicts: dict[tuple[str, str], list[JudgeVerdict]] = {(task, system): [] for task, system, *_ in questions}
    judged_names: set[tuple[str, str, str]] = set()
    for vote in votes:
        if vote.item in question_by_item:
            question, first_answer_id = question_by_item[vote.item]
            judged_names.add(question.name)
            verdicts[question.task, question.other].append(vote_to_verdict(vote, question.pair.id, first_answer_id))
    for question in select_counted_ties(questions, judged_names, key):
        verdicts[question.task, question.other].append(JudgeVerdict(question.pair.id, "", 0.5))
    return verdicts


def select_counted_ties(
    questions: Iterable[PairQuestion], judged_names: Collection[tuple[str, str, str]], key: bytes
) -> list[PairQuestion]:
    """Select the pairs of equal answers that count as ties without a vote, in the proportion in which the other pairs
    have a vote.

    People vote on a sample of the other pairs only, so counting all ties would bias every figure towards a tie. For
    each task and system, the share of ties that count is the share of the other pairs that were judged, rounded to a
    whole number of pairs; the first in the drawn order are selected. All count if there are no other pairs.

    Args:
        judged_names: names of pairs that have a vote.
        key: see `derive_order_key`.
    """
    groups: dict[tuple[str, str], tuple[list[PairQuestion], list[PairQuestion]]] = {}
    for question in questions:
        groups.setdefault((question.task, question.other), ([], []))[question.is_tie].append(question)
    selected = []
    for different, ties in groups.values():
        share = sum(question.name in judged_names for question in different) / len(different) if different else 1
        selected += sorted(ties, key=lambda question: question.draw(key))[: round(share * len(ties))]
    return selected


def describe_pairs_not_asked(counts: Mapping[str, int], ties: int) -> list[str]:
    """Return lines of text about the pairs that people do not vote on: equal answers, and pairs with tools.

    Args:
        counts: number of pairs of equal answers (`same_text`), and of pairs with tools (`with_tools`).
        ties: number of pairs of equal answers that count as ties.
    """
    lines = []
    if same := counts["same_text"]:
        remark = "" if ties == same else f"; {ties:,} of them count, in proportion to the pairs that were judged"
        lines.append(f"{pluralize(same, 'pair')} of the same answer twice: a tie, without a question{remark}")
    if counts["with_tools"]:
        lines.append(f"{pluralize(counts['with_tools'], 'pair')} with tools, which the page does not show: not asked")
    return lines


def describe_votes(figures: Mapping[str, Any], command: str, is_named: bool) -> Iterator[str]:
    """Yield console lines about the votes so far, and about the command that collects more.

    Args:
        command: starts the server on which people vote.
        is_named: True if the user named the run.
    """
    votes = figures["votes"]
    wanted_votes = figures["wanted"]
    people = sum(not person["quarantined"] for person in figures["people"])
    by = {0: "", 1: ", by 1 person"}.get(people, f", by {people:,} people")
    yield f"people: {votes:,} of {pluralize(wanted_votes, 'vote')} on {pluralize(figures['asked'], 'pair')}{by}"
    if votes:
        agreement = figures["agreement"]
        values = {
            "the same on a pair": agreement["raw"],
            "Krippendorff's alpha": agreement["alpha"],
            "known answers chosen": figures["gold"],
            "same answer on a repeat": figures["repeats"],
            "the answer shown first preferred": figures["shown_first"],
        }
        parts = [
            f"{name} {value if isinstance(value, str) else format_interval(value)}" for name, value in values.items()
        ]
        yield f"people: {', '.join(parts)}"
    if votes < wanted_votes:
        yield f"to ask for the votes: {command}"
        yield f"this command, given again{' with another run.name' if is_named else ''}, reads them"
