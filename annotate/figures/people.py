"""A row an annotator: what they did, how long it took, how well it fits what is known, and what sways them besides the
answers: their place on the screen, and their length."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import median
from typing import TYPE_CHECKING

from align.annotate.figures.agreement import directions
from align.annotate.figures.estimates import Figure, Undefined, log_odds, share
from align.annotate.store import Judgement, Vote
from align.annotate.store.records import SKIPS

if TYPE_CHECKING:
    from align.annotate.figures.project import View


@dataclass(frozen=True, slots=True)
class Bias:
    """A leaning.

    Attributes:
        share: of the untied pairs, those won by the side in question; ½ is no bias.
        log_odds: the same as ln(p / (1−p)): the intercept of a Bradley–Terry logit, where the order on the screen is
            counterbalanced, so that the answers' own worth cancels out; 0 is no bias.
    """

    share: Figure
    log_odds: Figure


def position_bias(votes: Iterable[Vote]) -> Bias:
    """Measure the leaning towards the answer that stood earlier on the screen (of two, on the left).

    The interval is clustered by vote, see `share`: over several annotators it is of these, not of others like them.
    Votes without an order on a screen, such as simulated ones, do not count.
    """
    won = []
    untied = []
    for vote in votes:
        place = {id: k for k, id in enumerate(vote.display_order)}
        seen = [place[better] < place[worse] for better, worse in vote.pairs if better in place and worse in place]
        won.append(sum(seen))
        untied.append(len(seen))
    earlier = share(won, untied)
    return Bias(earlier, log_odds(earlier))


def length_bias(votes: Iterable[Vote], lengths: Mapping[str, int]) -> Bias:
    """Measure the leaning towards the longer answer; pairs of equal length do not count.

    The interval is clustered by item: whoever judges an item sees the same lengths. A share above ½ may also say that
    the longer answers were better.

    Args:
        lengths: by candidate id, in characters.
    """
    won = Counter()
    untied = Counter()
    for vote in votes:
        for better, worse in vote.pairs:
            won[vote.item] += lengths[better] > lengths[worse]
            untied[vote.item] += lengths[better] != lengths[worse]
    longer = share([won[item] for item in untied], list(untied.values()))
    return Bias(longer, log_odds(longer))


CEILING_S = 600.0
"""Seconds of one vote that count as work at most: a tab stays open over lunch."""
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""How a cell begins that a spreadsheet may run. Source: OWASP, "CSV Injection"."""
PLAIN = (
    "pseudonym",
    "identity",
    "simulated",
    "rankings",
    "retracted",
    "flagged",
    "hours",
    "seconds",
    "first",
    "last",
    "gold_votes",
    "gold_right",
)
SHARES = {
    "ties": "ties",
    "gold": "gold",
    "repeats": "repeats",
    "position": "position.share",
    "position_log_odds": "position.log_odds",
    "length": "length.share",
    "length_log_odds": "length.log_odds",
}
"""Columns of the table that have an interval, and where a `Person` has them."""

UNMEASURED = Undefined("not measured")


@dataclass(frozen=True, slots=True)
class Person:
    """What one annotator did.

    What counts is what stands (no retracted vote, no erased item), but for `retracted`, `hours`, `first` and `last`,
    which are of all of their votes, for the time was spent.

    Attributes:
        pseudonym: in the ledger.
        identity: None of an annotator who was erased.
        simulated: whether it is the stand-in for a person.
        rankings: gold items and repeats among them.
        skips: how many, by reason.
        retracted: votes taken back.
        flagged: rankings and skips that call something harmful.
        ties: share of the pairs of their rankings that are tied.
        seconds: median of a ranking.
        hours: their votes' seconds, `CEILING_S` each at most.
        first, last: when they voted, UTC, ISO 8601.
        gold: share of the untied pairs of the known answers that they order the same way; a tie does not.
        gold_votes, gold_right: rankings of gold items with such pairs; those in which all of these are right.
        repeats: share of pairs of which they say, of an item given again, what they said the first time.
        position, length: see `bias`; over their work.
    """

    pseudonym: str
    identity: str | None
    simulated: bool
    rankings: int
    skips: Mapping[str, int]
    retracted: int
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
    position: Bias
    length: Bias


def people(view: View) -> list[Person]:
    """Return everyone who ever voted, those with the most rankings first; of as many, who voted first."""
    votes = group_by_annotator(view.votes)
    rankings = group_by_annotator(view.rankings)
    skips = group_by_annotator(view.skips)
    everyone = [describe_person(who, view, votes[who], rankings[who], skips[who]) for who in votes]
    return sorted(everyone, key=lambda person: -person.rankings)


def group_by_annotator(votes: Iterable[Vote]) -> dict[str, list[Vote]]:
    groups = defaultdict(list)
    for vote in votes:
        groups[vote.annotator].append(vote)
    return groups


def describe_person(who: str, view: View, votes: list[Vote], rankings: list[Vote], skips: list[Vote]) -> Person:
    work = [vote for vote in rankings if vote.purpose == "work"]
    gold, gold_votes, gold_right = gold_accuracy(rankings, view.expected)
    taken = [vote.seconds for vote in rankings if vote.seconds is not None]
    return Person(
        pseudonym=who,
        identity=view.identities.get(who),
        simulated=all(vote.source == "simulated" for vote in votes),
        rankings=len(rankings),
        skips=skipped(skips),
        retracted=sum(vote.seq in view.retracted for vote in votes),
        flagged=sum(bool(vote.flagged) for vote in (*rankings, *skips)),
        ties=ties(rankings),
        seconds=median(taken) if taken else UNMEASURED,
        hours=sum(min(vote.seconds or 0.0, CEILING_S) for vote in votes) / 3600,
        first=votes[0].created_at,
        last=votes[-1].created_at,
        gold=gold,
        gold_votes=gold_votes,
        gold_right=gold_right,
        repeats=consistency(rankings),
        position=position_bias(work),
        length=length_bias(work, view.lengths),
    )


def skipped(skips: Iterable[Vote]) -> dict[str, int]:
    """Count skips by reason, all reasons named."""
    reasons = Counter(vote.skipped for vote in skips)
    return {reason: reasons[reason] for reason in SKIPS}


def ties(rankings: Sequence[Vote]) -> Figure:
    """Compute the share of tied pairs; its interval is clustered by vote, see `share`."""
    sizes = [sum(map(len, vote.tiers)) for vote in rankings]
    pairs = [k * (k - 1) // 2 for k in sizes]
    return share([m - len(vote.pairs) for vote, m in zip(rankings, pairs, strict=True)], pairs)


def gold_accuracy(
    rankings: Iterable[Vote], expected: Mapping[str, tuple[tuple[str, ...], ...]]
) -> tuple[Figure, int, int]:
    """Compute the share of the known answers' untied pairs that are ordered the same way, clustered by vote (see
    `share`), the number of votes on such pairs, and of those that had all of them right."""
    right = []
    known = []
    for vote in rankings:
        if vote.purpose == "gold":
            answer = Judgement(expected[vote.item]).pairs
            right.append(len(set(answer) & set(vote.pairs)))
            known.append(len(answer))
    asked = [(x, m) for x, m in zip(right, known, strict=True) if m]
    return share(right, known), len(asked), sum(x == m for x, m in asked)


def consistency(rankings: Sequence[Vote]) -> Figure:
    """Compute the share of pairs, over all repeats, of which both rankings of the annotator say the
    same; clustered by vote."""
    first = {(vote.annotator, vote.item): vote for vote in rankings if vote.purpose not in ("repeat", "review")}
    same = []
    pairs = []
    for again in rankings:
        before = first.get((again.annotator, again.item))
        if again.purpose == "repeat" and before is not None:
            ids = [id for tier in again.tiers for id in tier]
            both = list(zip(directions(before, ids), directions(again, ids), strict=True))
            same.append(sum(then == now for then, now in both))
            pairs.append(len(both))
    return share(same, pairs)


# As a table


def as_csv(people: Sequence[Person]) -> str:
    """Return the rows as CSV (RFC 4180). What has an interval has `_low`, `_high` and `_n` beside it; a text that a
    spreadsheet would run gets an apostrophe in front."""
    ends = ("", "_low", "_high", "_n")
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow([*PLAIN, *(f"skips_{reason}" for reason in SKIPS), *(f"{n}{end}" for n in SHARES for end in ends)])
    for person in people:
        row = [*(getattr(person, name) for name in PLAIN), *(person.skips[reason] for reason in SKIPS)]
        for path in SHARES.values():
            figure = attrgetter(path)(person)
            if isinstance(figure, Undefined):
                row += [figure, None, None, 0]
            else:
                row += [figure.value, figure.low, figure.high, figure.n]
        writer.writerow([f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell for cell in row])
    return file.getvalue()
