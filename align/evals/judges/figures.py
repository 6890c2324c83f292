"""The figures of a judge's report: agreement with known verdicts, calibration, and accuracy by kind of example.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.evals.judges.examples import TIE, YES_AND_NO, AnswerExample, PairExample, Turns, turns_to_json
from align.evals.judges.opinions import JudgeOpinions
from align.evals.stats.judge_agreement import compute_agreement, compute_judge_statistics
from align.evals.stats.verdicts import compute_win_rate, merge_swapped_verdicts
from align.ops.calibration import bin_predictions, compute_brier_scores, compute_calibration_error, compute_log_losses
from align.ops.intervals import average_by_group, mean_interval, proportion_interval

REWARD_BENCH: Mapping[str, Sequence[str]] = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        *("mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor"),
        *("llmbar-adver-GPTInst", "llmbar-adver-GPTOut", "llmbar-adver-manual"),
    ),
    "Safety": (
        *("refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond", "donotanswer"),
    ),
    "Math": ("math-prm",),
    "Code": ("hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}
"""RewardBench's categories and their subsets (Lambert et al. 2024). It reports the mean of Math and Code as
Reasoning."""


LONGER = "longer"
SHORTER = "shorter"
EQUAL = "equal"


def measure_judge_on_pairs(
    pairs: Sequence[PairExample], opinions: JudgeOpinions, level: float = 0.95
) -> dict[str, Any]:
    """Compute a judge's agreement with labelled pairs, position bias, length bias and calibration, with confidence
    intervals over prompts.

    A missing verdict counts as wrong: it agrees with no verdict, not even a tie, is not consistent, and is not a tie of
    the judge.

    Returns:
        `agreement`, `swap`, `length_slope`, `reference_slope` and `n` of
        `align.evals.stats.judge_agreement.JudgeStatistics`;
        `accuracy` on the decided pairs, also `by_source`, `reward_bench` (its categories) and `by_length` (whether the
        better answer is the longer one);
        `ties`, of the reference and of the judge; `errors`, the number of missing verdicts; `best_of`, by number of
        answers; `calibration`; `between_people`.

    Raises:
        ValueError: there are no pairs, or the numbers of rows differ.
    """
    is_missing = np.array([bool(error) for error in opinions.errors])
    verdicts = (
        opinions.verdicts if opinions.swapped is None else merge_swapped_verdicts(opinions.verdicts, opinions.swapped)
    )
    verdicts = np.where(is_missing, np.nan, verdicts)  # nan equals no verdict of the reference, and is not a tie
    reference = [pair.verdict for pair in pairs]
    clusters = [pair.item.cluster for pair in pairs]
    first_lengths, second_lengths = zip(*(pair.lengths for pair in pairs), strict=True)
    statistics = compute_judge_statistics(
        opinions.verdicts, reference, opinions.swapped, (first_lengths, second_lengths), clusters, level, is_missing
    )
    figures = asdict(statistics)
    decided = [i for i, pair in enumerate(pairs) if not pair.is_tied]
    if decided:
        figures |= measure_accuracy([pairs[i] for i in decided], verdicts[decided], level)
    figures["ties"] = {
        "pairs": len(pairs) - len(decided),
        "judge": int((verdicts == TIE).sum()),
        "both": sum(pair.is_tied and verdict == TIE for pair, verdict in zip(pairs, verdicts.tolist(), strict=True)),
    }
    figures["errors"] = int(is_missing.sum())
    if credits := compute_best_answer_credits(pairs, verdicts):
        figures["best_of"] = {
            n: proportion_interval(values, level=level).as_dict() for n, values in sorted(credits.items())
        }
    figures |= measure_calibration([pairs[i] for i in decided], [opinions.log_odds[i] for i in decided], level)
    voted_clusters, equal_shares = measure_human_agreement(pairs)
    if equal_shares:
        figures["between_people"] = compute_win_rate(equal_shares, voted_clusters, level).as_dict()
    return figures


def measure_judge_on_answers(
    answers: Sequence[AnswerExample], opinions: JudgeOpinions, level: float = 0.95
) -> dict[str, Any]:
    """Compute a judge's agreement with labelled answers, overall and by label, and its calibration, with confidence
    intervals over prompts.

    Args:
        answers: some labelled yes and some no.

    Returns:
        `agreement` over all answers, where a missing verdict agrees with no label; `by_label`, `yes` and `no` → the
        share of the answers with this label to which the judge gives it (its sensitivity and specificity); `labels` and
        `said`, the number of each in the reference and by the judge; `errors`, the number of missing verdicts;
        `calibration`; `swap`, None.

    Raises:
        ValueError: there are no answers, or all have the same label.
    """
    labels = [answer.verdict for answer in answers]
    verdicts = [*opinions.verdicts]
    clusters = [answer.item.cluster for answer in answers]

    def measure_label(label: float) -> dict[str, Any]:
        rows = [i for i, row_label in enumerate(labels) if row_label == label]
        is_right = np.array([float(verdicts[i] == label) for i in rows])
        return compute_win_rate(is_right, [clusters[i] for i in rows], level).as_dict()

    return {
        "agreement": asdict(compute_agreement(verdicts, labels, clusters, level)),
        "swap": None,
        "by_label": {name: measure_label(label) for name, label in YES_AND_NO.items()},
        "labels": {name: labels.count(label) for name, label in YES_AND_NO.items()},
        "said": {name: verdicts.count(label) for name, label in YES_AND_NO.items()},
        "errors": sum(bool(error) for error in opinions.errors),
        **measure_calibration(answers, opinions.log_odds, level),
    }


def measure_accuracy(pairs: Sequence[PairExample], verdicts: NDArray[np.float64], level: float) -> dict[str, Any]:
    """Compute the share of pairs in which the judge prefers the better answer: `accuracy` over all pairs, `by_source`
    and `by_length`. A judge's tie or missing verdict (nan) counts as wrong."""
    is_right = verdicts == [pair.verdict for pair in pairs]

    def measure_rows(rows: Sequence[int]) -> dict[str, Any]:
        clusters = [pairs[i].item.cluster for i in rows]
        return compute_win_rate(is_right[[*rows]], clusters, level).as_dict()

    def measure_groups(key: Callable[[PairExample], str]) -> dict[str, Any]:
        keys = [key(pair) for pair in pairs]
        return {
            name: measure_rows([i for i, row_key in enumerate(keys) if row_key == name]) for name in sorted({*keys})
        }

    by_source = measure_groups(lambda pair: pair.item.category)
    rights_by_source: dict[str, list[bool]] = {}
    for pair, right in zip(pairs, is_right.tolist(), strict=True):
        rights_by_source.setdefault(pair.item.category, []).append(right)
    categories = compute_reward_bench_scores(rights_by_source)
    return {
        "accuracy": measure_rows(range(len(pairs))),
        "by_source": by_source,
        **({"reward_bench": categories} if categories else {}),
        "by_length": measure_groups(compare_length_of_better),
    }


def compute_reward_bench_scores(rights_by_source: Mapping[str, Sequence[bool]]) -> dict[str, float]:
    """Return the accuracy in each category of RewardBench, and their `mean` if all four are there.

    Categories of which a subset is missing are left out. The pairs of a category count alike; Math and Code count
    alike in Reasoning. The category Prior Sets is not computed.

    Args:
        rights_by_source: name of a subset → whether the judge prefers the better answer, for each of its pairs.
    """
    shares: dict[str, float] = {}
    for category, subsets in REWARD_BENCH.items():
        if all(subset in rights_by_source for subset in subsets):
            rights = [right for subset in subsets for right in rights_by_source[subset]]
            shares[category] = sum(rights) / len(rights)
    reasoning = [shares.pop(name, None) for name in ("Math", "Code")]
    if None not in reasoning:
        shares["Reasoning"] = sum(share for share in reasoning if share is not None) / 2
    if len(shares) == len(REWARD_BENCH) - 1:
        shares["mean"] = sum(shares.values()) / len(shares)
    return shares


def describe_reward_bench(figures: Mapping[str, Any]) -> list[str]:
    """Return a line on the accuracy in RewardBench's categories; none if it was not measured on RewardBench."""
    categories = figures.get("reward_bench")
    if not categories:
        return []
    return [f"RewardBench: {', '.join(f'{name} {share:.3f}' for name, share in categories.items())}"]


def compare_length_of_better(pair: PairExample) -> str:
    """Return `longer`, `shorter` or `equal`: the better answer's length in characters compared with the other's."""
    first, second = pair.lengths
    better, worse = (first, second) if pair.verdict == 1 else (second, first)
    if better == worse:
        return EQUAL
    return LONGER if better > worse else SHORTER


def compute_best_answer_credits(pairs: Sequence[PairExample], verdicts: NDArray[np.float64]) -> dict[str, list[float]]:
    """Return number of answers → credits of the judge on prompts with a known best answer, 1 if it prefers that answer
    to all others.

    The credit is 1 if the judge prefers the best answer to each other one, 1/k if it ranks k answers equally at the
    top, else 0. A judge that calls all answers equal has 1/n, which is chance level. A missing verdict (nan) has a
    credit of 0.
    """
    verdict_of = {pair.item.id: verdict for pair, verdict in zip(pairs, verdicts.tolist(), strict=True)}
    credits: dict[str, list[float]] = {}
    for own_pairs in find_pairs_with_best_answer(pairs).values():
        wins = [verdict_of[pair.item.id] if is_first else 1 - verdict_of[pair.item.id] for pair, is_first in own_pairs]
        credit = 1 / (1 + wins.count(TIE)) if all(win > 0 for win in wins) else 0.0
        credits.setdefault(str(len(own_pairs) + 1), []).append(credit)
    return credits


def measure_calibration(
    examples: Sequence[PairExample] | Sequence[AnswerExample], log_odds: Sequence[float | None], level: float
) -> dict[str, Any]:
    """Compute the Brier score and log loss of a judge's probabilities with intervals, and the expected calibration
    error over ten bins. They are under the key `calibration`: `brier`, `log_loss` and `ece`. Returns an empty mapping
    if the judge gives no probabilities."""
    rows = [i for i, odds in enumerate(log_odds) if odds is not None]
    if not rows:
        return {}
    clusters = [examples[i].item.cluster for i in rows]
    odds: ArrayLike = np.array([log_odds[i] for i in rows], dtype=np.float64)
    outcomes = np.array([examples[i].verdict for i in rows])
    bins = bin_predictions(np.exp(-np.logaddexp(0, -odds)).tolist(), outcomes.tolist(), clusters)
    return {
        "calibration": {
            "ece": compute_calibration_error(bins),
            "brier": mean_interval(
                average_by_group(clusters, compute_brier_scores(odds, outcomes))[0], level
            ).as_dict(),
            "log_loss": mean_interval(
                average_by_group(clusters, compute_log_losses(odds, outcomes))[0], level
            ).as_dict(),
        }
    }


class HumanAgreement(NamedTuple):
    """The agreement between people on the pairs that several people voted on.

    Attributes:
        clusters: the cluster of each pair.
        equal_shares: for each pair, the share of equal votes among all pairs of its votes.
    """

    clusters: list[str]
    equal_shares: list[float]


def measure_human_agreement(pairs: Sequence[PairExample]) -> HumanAgreement:
    """Compute for each answer pair with several votes the share of equal votes between two people."""
    several = [pair for pair in pairs if len(pair.votes) > 1]
    shares = []
    for pair in several:
        is_equal = [a == b for a, b in combinations(pair.votes, 2)]
        shares.append(sum(is_equal) / len(is_equal))
    return HumanAgreement([pair.item.cluster for pair in several], shares)


def find_pairs_with_best_answer(pairs: Sequence[PairExample]) -> dict[str, list[tuple[PairExample, bool]]]:
    """Find the prompts with three or more answers of which one won against all others, and return their pairs with the
    best answer.

    RewardBench 2 (Malik et al. 2025) has such prompts, with one right answer and three wrong ones. The other answers
    need not have been compared with each other.

    Returns:
        the id of the prompt → the pairs with the best answer, and whether it is the first of each.
    """
    pairs_by_prompt: dict[Turns, list[PairExample]] = {}
    for pair in pairs:
        pairs_by_prompt.setdefault(pair.item.prompt.messages, []).append(pair)
    best_answers: dict[str, list[tuple[PairExample, bool]]] = {}
    for prompt_pairs in pairs_by_prompt.values():
        answers = {side for pair in prompt_pairs for side in pair.answers}
        for answer in sorted(answers, key=turns_to_json):
            own_pairs = [(pair, pair.first == answer) for pair in prompt_pairs if answer in pair.answers]
            has_all = len(answers) > 2 and len(own_pairs) == len(answers) - 1
            if has_all and all(pair.verdict == float(is_first) for pair, is_first in own_pairs):
                best_answers[prompt_pairs[0].item.id] = own_pairs
    return best_answers
