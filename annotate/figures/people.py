"""Summaries of annotators: number and duration of their votes, accuracy on known answers, consistency, and biases by an
answer's position on the screen and by its length."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from align.annotate.figures.agreement import compute_directions
from align.annotate.figures.estimates import Figure, Undefined, compute_share, to_log_odds
from align.annotate.store import Judgement, Vote
from align.annotate.store.records import SKIP_REASONS
from align.annotate.store.vote_selection import count_right_pairs

if TYPE_CHECKING:
    from align.annotate.figures.project import ProjectView


@dataclass(frozen=True, slots=True)
class BiasEstimate:
    """A bias towards one side of a pair, such as the longer answer.

    Attributes:
        share: share of the untied pairs won by that side; ½ is unbiased.
        log_odds: the same as ln(p / (1−p)), where 0 is unbiased. If the order on the screen is counterbalanced, so that
            the answers' quality cancels out, this is the intercept of a Bradley–Terry logit.
    """

    share: Figure
    log_odds: Figure


def compute_position_bias(votes: Iterable[Vote]) -> BiasEstimate:
    """Compute the share and log-odds of pairs won by the answer that came earlier on the screen (of two, on the left).

    The interval is clustered by vote, see `compute_share`. Over several annotators, it holds for these annotators, not
    for others. Votes without a display order, such as simulated ones, do not count.
    """
    earlier_wins = []
    untied_pairs = []
    for vote in votes:
        place_of = {id: k for k, id in enumerate(vote.display_order)}
        is_earlier_better = [
            place_of[better] < place_of[worse]
            for better, worse in vote.pairs
            if better in place_of and worse in place_of
        ]
        earlier_wins.append(sum(is_earlier_better))
        untied_pairs.append(len(is_earlier_better))
    earlier = compute_share(earlier_wins, untied_pairs)
    return BiasEstimate(earlier, to_log_odds(earlier))


def compute_length_bias(votes: Iterable[Vote], lengths: Mapping[str, int]) -> BiasEstimate:
    """Compute the share and log-odds of pairs won by the longer answer.

    Pairs of equal length do not count. The interval is clustered by item, because all annotators of an item see the
    same lengths. A share above ½ may also mean that the longer answers were better.

    Args:
        lengths: number of characters by candidate id.
    """
    longer_wins = Counter()
    untied_pairs = Counter()
    for vote in votes:
        for better, worse in vote.pairs:
            longer_wins[vote.item] += lengths[better] > lengths[worse]
            untied_pairs[vote.item] += lengths[better] != lengths[worse]
    longer = compute_share([longer_wins[item] for item in untied_pairs], list(untied_pairs.values()))
    return BiasEstimate(longer, to_log_odds(longer))


CEILING_S = 600.0
"""Maximum seconds of one vote that count as work, because a tab may stay open unused."""
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""First characters of a cell that a spreadsheet may run as a formula. Source: OWASP, "CSV Injection"."""
PLAIN_COLUMNS = (
    "pseudonym",
    "identity",
    "simulated",
    "rankings",
    "retracted",
    "quarantined",
    "flagged",
    "hours",
    "seconds",
    "first",
    "last",
    "gold_votes",
    "gold_right",
)
SHARE_COLUMNS = {
    "ties": "ties",
    "gold": "gold",
    "repeats": "repeats",
    "position": "position.share",
    "position_log_odds": "position.log_odds",
    "length": "length.share",
    "length_log_odds": "length.log_odds",
}
"""Name of a column with an interval → path of the attribute of `AnnotatorSummary`."""

UNMEASURED = Undefined("not measured")


@dataclass(frozen=True, slots=True)
class AnnotatorSummary:
    """A summary of one annotator's votes: counts, times, accuracy, consistency and biases.

    It counts votes that stand (not retracted, their item not erased), except that `retracted`, `hours`, `first` and
    `last` cover all of the annotator's votes.

    Attributes:
        pseudonym: in the ledger.
        identity: the annotator's name; None if it was erased.
        simulated: whether it is a simulated annotator.
        rankings: number of rankings, including gold items and repeats.
        skips: number of skips by reason.
        retracted: number of retracted votes.
        quarantined: whether the annotator is in quarantine.
        flagged: number of rankings and skips that flag something as harmful.
        ties: share of the pairs of their rankings that are tied.
        seconds: median of a ranking.
        hours: total time of their votes, each at most `CEILING_S`.
        first, last: time of the first and last vote, UTC, ISO 8601.
        gold: share of the known answers' untied pairs that they order the same way; a tie counts as wrong.
        gold_votes, gold_right: number of rankings of gold items with untied pairs, and of those with all pairs right.
        repeats: share of the pairs of repeated items that they judge as they did the first time.
        position, length: see `compute_position_bias` and `compute_length_bias`; over their work.
    """

    pseudonym: str
    identity: str | None
    simulated: bool
    rankings: int
    skips: Mapping[str, int]
    retracted: int
    quarantined: bool
    flagged: int
    ties: Figure
    seconds: float | Undefined
    hours: float
    first: str
    last: str
    gold: Figure
    gold_votes: int
    gold_right: int
    repeats: Figure
    position: BiasEstimate
    length: BiasEstimate


def summarize_annotators(view: ProjectView) -> list[AnnotatorSummary]:
    """Return a summary of every annotator who ever voted, sorted by number of rankings (descending) and first vote."""
    votes = group_by_annotator(view.votes)
    rankings = group_by_annotator(view.rankings)
    skips = group_by_annotator(view.skips)
    summaries = [
        summarize_annotator(pseudonym, view, votes[pseudonym], rankings[pseudonym], skips[pseudonym])
        for pseudonym in votes
    ]
    return sorted(summaries, key=lambda person: -person.rankings)


def group_by_annotator(votes: Iterable[Vote]) -> dict[str, list[Vote]]:
    groups = defaultdict(list)
    for vote in votes:
        groups[vote.annotator].append(vote)
    return groups


def summarize_annotator(
    pseudonym: str, view: ProjectView, votes: list[Vote], rankings: list[Vote], skips: list[Vote]
) -> AnnotatorSummary:
    work = [vote for vote in rankings if vote.purpose == "work"]
    gold_accuracy = compute_gold_accuracy(rankings, view.expected)
    seconds = [vote.seconds for vote in rankings if vote.seconds is not None]
    return AnnotatorSummary(
        pseudonym=pseudonym,
        identity=view.identities.get(pseudonym),
        simulated=all(vote.source == "simulated" for vote in votes),
        rankings=len(rankings),
        skips=count_skips(skips),
        retracted=sum(vote.seq in view.retracted for vote in votes),
        quarantined=pseudonym in view.quarantined,
        flagged=sum(bool(vote.flagged) for vote in (*rankings, *skips)),
        ties=compute_tie_share(rankings),
        seconds=median(seconds) if seconds else UNMEASURED,
        hours=sum(min(vote.seconds or 0.0, CEILING_S) for vote in votes) / 3600,
        first=votes[0].created_at,
        last=votes[-1].created_at,
        gold=gold_accuracy.pair_accuracy,
        gold_votes=gold_accuracy.votes,
        gold_right=gold_accuracy.correct_votes,
        repeats=compute_repeat_consistency(rankings),
        position=compute_position_bias(work),
        length=compute_length_bias(work, view.lengths),
    )


def count_skips(skips: Iterable[Vote]) -> dict[str, int]:
    """Return the number of skips for each of `SKIP_REASONS`: reason → number, which may be 0."""
    reasons = Counter(vote.skipped for vote in skips)
    return {reason: reasons[reason] for reason in SKIP_REASONS}


def compute_tie_share(rankings: Sequence[Vote]) -> Figure:
    """Compute the share of tied pairs, with an interval clustered by vote, see `compute_share`."""
    sizes = [sum(map(len, vote.tiers)) for vote in rankings]
    pairs = [k * (k - 1) // 2 for k in sizes]
    return compute_share([m - len(vote.pairs) for vote, m in zip(rankings, pairs, strict=True)], pairs)


class GoldAccuracy(NamedTuple):
    """The accuracy of rankings of gold items, which are items with a known right ranking.

    Attributes:
        pair_accuracy: share of the known answers' untied pairs that are ordered the same way, clustered by vote (see
            `compute_share`).
        votes: number of votes on gold items with such pairs.
        correct_votes: number of these votes that have all pairs right.
    """

    pair_accuracy: Figure
    votes: int
    correct_votes: int


def compute_gold_accuracy(
    rankings: Iterable[Vote], expected: Mapping[str, tuple[tuple[str, ...], ...]]
) -> GoldAccuracy:
    """Compute the accuracy of rankings of gold items: the share of answer pairs ordered as in the known right ranking.

    Args:
        expected: the known answer by item: tiers of candidate ids, best first.
    """
    correct_pairs = []
    known_pairs = []
    for vote in rankings:
        if vote.purpose == "gold":
            correct_pairs.append(count_right_pairs(vote, expected[vote.item]))
            known_pairs.append(len(Judgement(expected[vote.item]).pairs))
    counted = [(correct, total) for correct, total in zip(correct_pairs, known_pairs, strict=True) if total]
    accuracy = compute_share(correct_pairs, known_pairs)
    return GoldAccuracy(accuracy, len(counted), sum(correct == total for correct, total in counted))


def compute_repeat_consistency(rankings: Sequence[Vote]) -> Figure:
    """Compute the share of answer pairs that annotators judged equally when they ranked the same item a second time.

    The interval is clustered by vote.
    """
    first_rankings = {
        (vote.annotator, vote.item): vote for vote in rankings if vote.purpose not in ("repeat", "review")
    }
    equal_pairs = []
    pair_counts = []
    for repeat in rankings:
        first_ranking = first_rankings.get((repeat.annotator, repeat.item))
        if repeat.purpose == "repeat" and first_ranking is not None:
            ids = [id for tier in repeat.tiers for id in tier]
            ratings = list(zip(compute_directions(first_ranking, ids), compute_directions(repeat, ids), strict=True))
            equal_pairs.append(sum(first_rating == repeat_rating for first_rating, repeat_rating in ratings))
            pair_counts.append(len(ratings))
    return compute_share(equal_pairs, pair_counts)


# CSV


def to_csv(people: Sequence[AnnotatorSummary]) -> str:
    """Format summaries of annotators as CSV (RFC 4180), one row each.

    A figure with an interval has columns `_low`, `_high` and `_n` beside it. A text that a spreadsheet would run as a
    formula gets an apostrophe in front.
    """
    suffixes = ("", "_low", "_high", "_n")
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(
        [
            *PLAIN_COLUMNS,
            *(f"skips_{reason}" for reason in SKIP_REASONS),
            *(f"{name}{suffix}" for name in SHARE_COLUMNS for suffix in suffixes),
        ]
    )
    for person in people:
        row = [*(getattr(person, name) for name in PLAIN_COLUMNS), *(person.skips[reason] for reason in SKIP_REASONS)]
        for path in SHARE_COLUMNS.values():
            figure = attrgetter(path)(person)
            if isinstance(figure, Undefined):
                row += [figure, None, None, 0]
            else:
                row += [figure.value, figure.low, figure.high, figure.n]
        writer.writerow([f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell for cell in row])
    return file.getvalue()
