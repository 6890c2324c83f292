"""What a judge's verdicts on known pairs come to: the figures of its card. Imports no torch.

`artifact/verdicts.jsonl` of a run of `eval=judge` is the evidence; this is arithmetic on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.evals.known_pairs import KnownPair, best_of, between_people
from align.evals.stats import judge_card, per_prompt, surviving
from align.ops.calibration import brier_scores, calibration_bins, expected_calibration_error, log_losses
from align.ops.intervals import mean, proportion

LONGER, SHORTER, EQUAL = "longer", "shorter", "equal"


def card_figures(
    pairs: Sequence[KnownPair], verdicts: Sequence[float], swapped: Sequence[float] | None = None,
    log_odds: Sequence[float | None] | None = None, level: float = 0.95, failed: Sequence[bool] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The figures of a judge on pairs, each with its interval over prompts.

    Args:
        verdicts: of the judge: 1 where it finds the first answer better, 0 the second, ½ for a tie.
        swapped: the same with the second answer shown first; None of a judge that sees no order. What counts is then
            what survives the swap.
        log_odds: that the first answer is the better one, in nats; None where the judge says nothing of odds.
        level: of the intervals.
        failed: True for a pair on which the judge gave no verdict, or only in one order. It counts as wrong: it agrees
            with no verdict, not even a tie, survives no swap, and is no tie of the judge.

    Returns:
        `agreement`, `swap`, `length_slope`, `reference_slope` and `n` of `align.evals.stats.Card`; `accuracy` on pairs
        that were decided, also `by_source` and `by_length` (whether the better answer is the longer one); `ties`, of
        the reference and of the judge; `errors`, how many pairs failed; `best_of`, by number of answers; `calibration`;
        `between_people`.

    Raises:
        ValueError: there are no pairs, or numbers of rows that differ.
    """
    none = np.zeros(len(pairs), dtype=bool) if failed is None else np.asarray(failed, dtype=bool)
    # nan equals nothing: no verdict of the reference, no tie.
    settled = np.where(none, np.nan, verdicts if swapped is None else surviving(verdicts, swapped))
    reference = [pair.verdict for pair in pairs]
    clusters, lengths = [pair.item.cluster for pair in pairs], [*zip(*(pair.lengths for pair in pairs), strict=True)]
    found = judge_card(verdicts, reference, swapped, (lengths[0], lengths[1]), clusters, level, none).as_dict()
    decided = [i for i, pair in enumerate(pairs) if not pair.tied]
    if decided:
        found |= of_decided([pairs[i] for i in decided], settled[decided], level)
    found["ties"] = {
        "pairs": len(pairs) - len(decided), "judge": int((settled == 0.5).sum()),
        "both": sum(pair.tied and said == 0.5 for pair, said in zip(pairs, settled.tolist(), strict=True)),
    }  # fmt: skip
    found["errors"] = int(none.sum())
    if best := credits(pairs, settled):
        found["best_of"] = {n: proportion(values, level=level).as_dict() for n, values in sorted(best.items())}
    told = [
        (pairs[i].item.cluster, pairs[i].verdict, odds)
        for i in decided if log_odds is not None and (odds := log_odds[i]) is not None
    ]  # fmt: skip
    if told:
        clusters, outcomes, odds = zip(*told, strict=True)
        found["calibration"] = calibration(clusters, outcomes, odds, level)
    of, same = between_people(pairs)
    if same:
        found["between_people"] = proportion(per_prompt(of, same), level=level).as_dict()
    return found


def of_decided(pairs: Sequence[KnownPair], verdicts: NDArray[np.float64], level: float) -> dict[str, Any]:
    """How often the judge prefers the better answer, of all pairs, by source and by length. A tie of the judge is no
    preference, and neither is nan, no verdict."""
    right = verdicts == [pair.verdict for pair in pairs]

    def accuracy(rows: Iterable[int]) -> dict[str, Any]:
        of = [*rows]
        return proportion(per_prompt([pairs[i].item.cluster for i in of], right[of]), level=level).as_dict()

    def each(key: Callable[[KnownPair], str]) -> dict[str, Any]:
        keys = [key(pair) for pair in pairs]
        return {one: accuracy(i for i, k in enumerate(keys) if k == one) for one in dict.fromkeys(sorted(keys))}

    return {
        "accuracy": accuracy(range(len(pairs))),
        "by_source": each(lambda pair: pair.item.category),
        "by_length": each(length_of_better),
    }


def length_of_better(pair: KnownPair) -> str:
    """Whether the better answer is the longer one, in characters."""
    first, second = pair.lengths
    better, worse = (first, second) if pair.verdict == 1 else (second, first)
    return EQUAL if better == worse else LONGER if better > worse else SHORTER


def credits(pairs: Sequence[KnownPair], verdicts: NDArray[np.float64]) -> dict[str, list[float]]:
    """Of prompts whose best answer is known among n: n → 1 where the judge prefers it to each other one, 1/k where it
    puts k answers level at the top, else 0. A judge that calls everything equal has 1/n, as chance has. One with no
    verdict, nan, on some of them has 0."""
    said = {pair.item.id: verdict for pair, verdict in zip(pairs, verdicts.tolist(), strict=True)}
    found: dict[str, list[float]] = {}
    for won in best_of(pairs).values():
        for_best = [said[pair.item.id] if first else 1 - said[pair.item.id] for pair, first in won]
        credit = 1 / (1 + for_best.count(0.5)) if all(won > 0 for won in for_best) else 0.0
        found.setdefault(str(len(won) + 1), []).append(credit)
    return found


def calibration(
    clusters: Sequence[str], outcomes: Sequence[float], log_odds: ArrayLike, level: float
) -> dict[str, Any]:
    """How far the judge's probabilities can be taken for such: `brier` and `log_loss` with intervals, `ece` over ten
    bins.

    Args:
        outcomes: 1 where that came true whose odds these are, else 0.
        log_odds: in nats.
    """
    odds, came = np.asarray(log_odds, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    bins = calibration_bins(np.exp(-np.logaddexp(0, -odds)).tolist(), came.tolist(), clusters)
    return {
        "ece": expected_calibration_error(bins),
        "brier": mean(per_prompt(clusters, brier_scores(odds, came)), level).as_dict(),
        "log_loss": mean(per_prompt(clusters, log_losses(odds, came)), level).as_dict(),
    }
