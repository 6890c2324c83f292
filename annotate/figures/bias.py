"""What sways annotators besides the answers: their place on the screen, and their length. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from align.annotate.figures.estimates import Figure, log_odds, share
from align.annotate.store import Vote


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

    @classmethod
    def of(cls, found: Figure) -> Bias:
        return cls(found, log_odds(found))


def position_bias(votes: Iterable[Vote]) -> Bias:
    """Towards the answer that stood earlier on the screen (of two, on the left).

    The interval is clustered by vote, see `share`: over several annotators it is of these, not of others like them.
    Votes without an order on a screen, such as simulated ones, do not count.
    """
    won, untied = [], []
    for vote in votes:
        place = {id: k for k, id in enumerate(vote.display_order)}
        seen = [place[better] < place[worse] for better, worse in vote.pairs if better in place and worse in place]
        won.append(sum(seen))
        untied.append(len(seen))
    return Bias.of(share(won, untied))


def length_bias(votes: Iterable[Vote], lengths: Mapping[str, int]) -> Bias:
    """Towards the longer answer; pairs of equal length do not count.

    The interval is clustered by item: whoever judges an item sees the same lengths. A share above ½ may also say that
    the longer answers were better.

    Args:
        lengths: by candidate id, in characters.
    """
    won, untied = Counter(), Counter()
    for vote in votes:
        for better, worse in vote.pairs:
            won[vote.item] += lengths[better] > lengths[worse]
            untied[vote.item] += lengths[better] != lengths[worse]
    return Bias.of(share([won[item] for item in untied], list(untied.values())))
