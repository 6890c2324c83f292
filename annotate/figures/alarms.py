"""Traits of annotators that a model finds in their rankings, and alarms about those who may not judge the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from align.annotate.figures.people import GoldAccuracy, compute_gold_accuracy, group_by_annotator
from align.annotate.posteriors import build_ranked_blocks
from align.annotate.store import Vote
from align.ops.annotator_tests import AttentionTests, apply_attention_tests, compute_tail
from align.ops.annotators import Traits, draw_normals

if TYPE_CHECKING:
    from align.annotate.figures.project import ProjectView

READING_LIMIT = 100.0
"""Characters a second above which answers cannot have been read. Adults read English at 238 words, some 24 characters a
second, on average. Source: Brysbaert 2019, "How many words do we read per minute?"."""
GOLD_LEVEL = 0.01
"""Probability of an alarm about gold items for an annotator who is as accurate as the others."""
MIN_TIMES = 10
"""Number of timed rankings below which no annotator is too fast."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """A sign that an annotator may not judge the answers.

    Attributes:
        kind: one of `ALARMS`.
        evidence: a text with the figure and its limit.
    """

    kind: str
    evidence: str


ALARMS = {
    "fast": "ranks faster than the answers can be read",
    "side": "prefers one side of the screen",
    "copies": "repeats the first ranking of the item",
    "gold": "misses known answers more often than the others",
    "disagrees": "disagrees with the others, as at random",
}


@dataclass(frozen=True, slots=True)
class AnnotatorAssessment:
    """The estimated traits of an annotator, and the alarms.

    Attributes:
        pseudonym: in the ledger.
        rankings: number of rankings for training that stand.
        accuracy: estimated probability that the annotator orders two random answers as their strengths do, from ½,
            without ties and the bias by position.
        first_share: estimated probability that the annotator prefers the first answer on the screen to an equal one
            that comes last, without ties; ½ is unbiased.
        tie_share: estimated probability of a tie between two equal answers.
        alarms: those that are raised.
    """

    pseudonym: str
    rankings: int
    accuracy: float
    first_share: float
    tie_share: float
    alarms: tuple[Alarm, ...]


def assess_annotators(view: ProjectView) -> list[AnnotatorAssessment]:
    """Fit the model of annotators to a project's rankings, and raise alarms; the annotators with alarms come first.

    Annotators in quarantine, and those without rankings for training that stand, are left out.
    """
    votes = group_by_annotator(view.work)
    if not votes:
        return []
    blocks = build_ranked_blocks(view.work, list(votes))
    tests = apply_attention_tests([block.ranked for block in blocks], len(votes))
    traits = tests.fit.traits
    accuracy_A = compute_accuracies(traits)
    first_share_A = 1 / (1 + np.exp(-traits.position_A))
    nu_A = np.exp(traits.log_nu_A)
    alarms = {annotator: list_model_alarms(tests, number) for number, annotator in enumerate(votes)}
    for annotator, evidence in find_fast_annotators(votes, view.lengths).items():
        alarms[annotator].append(Alarm("fast", evidence))
    for annotator, evidence in find_gold_misses(view).items():
        if annotator in alarms:
            alarms[annotator].append(Alarm("gold", evidence))
    assessments = [
        AnnotatorAssessment(
            pseudonym=annotator,
            rankings=len(rankings),
            accuracy=float(accuracy_A[number]),
            first_share=float(first_share_A[number]),
            tie_share=float(nu_A[number] / (2 + nu_A[number])),
            alarms=tuple(alarms[annotator]),
        )
        for number, (annotator, rankings) in enumerate(votes.items())
    ]
    return sorted(assessments, key=lambda assessment: (not assessment.alarms, -assessment.rankings))


def compute_accuracies(traits: Traits) -> np.ndarray:
    """Return the accuracy of each annotator, see `AnnotatorAssessment`, [A]."""
    differences_D = np.abs(draw_normals(1024, 2) @ np.array([1.0, -1.0]))
    return (1 / (1 + np.exp(-traits.ability_A[:, None] * differences_D))).mean(axis=1)


def list_model_alarms(tests: AttentionTests, number: int) -> list[Alarm]:
    alarms = []
    if tests.prefers_side_A[number]:
        side = "first" if tests.side_A[number] > 0 else "last"
        evidence = f"what comes {side}, {abs(tests.side_A[number]):.1f} standard deviations from an attentive annotator"
        alarms.append(Alarm("side", evidence))
    if tests.copies_A[number]:
        alarms.append(Alarm("copies", f"p = {tests.copy_p_A[number]:.2g} by chance"))
    if tests.disagrees_A[number]:
        below = f"{-tests.agreement_A[number]:.1f} standard deviations below the median annotator"
        alarms.append(Alarm("disagrees", below))
    return alarms


def find_fast_annotators(votes: Mapping[str, Sequence[Vote]], lengths: Mapping[str, int]) -> dict[str, str]:
    """Return annotator → evidence, for annotators whose median reading speed is above `READING_LIMIT`.

    Args:
        votes: rankings by annotator.
        lengths: number of characters by candidate id.
    """
    evidence = {}
    for annotator, rankings in votes.items():
        timed = [vote for vote in rankings if vote.seconds is not None]
        if len(timed) >= MIN_TIMES:
            speed = median(
                sum(lengths[id] for tier in vote.tiers for id in tier) / max(vote.seconds or 0.0, 1e-3)
                for vote in timed
            )
            if speed > READING_LIMIT:
                evidence[annotator] = f"{speed:,.0f} characters a second, above {READING_LIMIT:.0f}"
    return evidence


def find_gold_misses(view: ProjectView) -> dict[str, str]:
    """Return annotator → evidence, for annotators who rank fewer gold items rightly than chance allows at the accuracy
    of the others."""
    gold_rankings = [vote for vote in view.counted_rankings if vote.purpose == "gold"]
    accuracies: dict[str, GoldAccuracy] = {
        annotator: compute_gold_accuracy(votes, view.expected)
        for annotator, votes in group_by_annotator(gold_rankings).items()
    }
    total = sum(accuracy.votes for accuracy in accuracies.values())
    right = sum(accuracy.correct_votes for accuracy in accuracies.values())
    evidence = {}
    for annotator, accuracy in accuracies.items():
        others_total = total - accuracy.votes
        others_right = right - accuracy.correct_votes
        if accuracy.votes and others_total:
            p_value = compute_gold_p_value(accuracy.correct_votes, accuracy.votes, others_right, others_total)
            if p_value < GOLD_LEVEL:
                others_share = others_right / others_total
                evidence[annotator] = (
                    f"{accuracy.correct_votes} of {accuracy.votes} right, {others_share:.0%} of the others'; "
                    f"p = {p_value:.2g}"
                )
    return evidence


def compute_gold_p_value(right: int, total: int, others_right: int, others_total: int) -> float:
    """Return the binomial probability of at most `right` of `total` known answers, at the accuracy of the others. One
    right and one wrong are added to the others', so that their accuracy is neither 0 nor 1."""
    miss_share = 1 - (others_right + 1) / (others_total + 2)
    return compute_tail(np.full(total, miss_share), total - right)
