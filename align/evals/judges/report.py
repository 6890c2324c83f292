"""The report of a judge (`card.json`): its agreement with known verdicts, and whether it may decide gates.

A judge answers one of two kinds of question: which of two answers is better, or a yes/no question about one answer. It
is measured on examples with known verdicts. An example counts once, with the majority's verdict if several people
judged it. Which answer of a pair is the first is drawn by a hash of the pair's id, so that good answers are equally
frequent in both positions. The verdicts are in `artifact/verdicts.jsonl` of a run of `eval=judge`. Imports no torch.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align import ranks
from align.core.errors import CorruptFile, InputError, require, require_schema_version
from align.core.types import Conversation, Feedback, Message, Preference
from align.data.read.content import encode_turn
from align.data.trained_ids import TrainedQuestions
from align.evals.judges.identity import JudgeIdentity, describe_judge_difference, list_differing_keys
from align.evals.judges.judge_verdict import FIRST, SECOND, AnswerPair
from align.evals.judges.llm_judge import GradedAnswer, LLMJudge
from align.evals.stats.judge import compute_agreement, compute_judge_statistics
from align.evals.stats.verdicts import compute_win_rate, merge_swapped_verdicts
from align.evals.suite.tasks import EvalItem, cluster_items
from align.evals.text import join_turns
from align.ops.calibration import (
    bin_predictions,
    compute_brier_scores,
    compute_calibration_error,
    compute_log_losses,
    compute_log_odds,
)
from align.ops.intervals import average_by_group, mean_interval, proportion_interval
from align.report.figure_text import format_interval, pluralize
from align.rollout.answer_cache import AnswerStore
from align.run import Input, file_digest, json_digest, read_json_object, resolve

Turns = tuple[Message, ...]
TIE = 0.5
FIELD = "stage.card"
FILE = "card.json"
SCHEMA = 1
LONGER = "longer"
SHORTER = "shorter"
EQUAL = "equal"
YES_AND_NO = {"yes": 1.0, "no": 0.0}
"""Labels of single answers, mapped to their verdicts."""
MIN_VERDICTS = 100
"""Minimum number of compared verdicts in the report of a judge that decides gates (`eval.gates`)."""
MIN_AGREEMENT = 0.6
MIN_LEVEL = 0.95
"""Minimum confidence level of the agreement's interval in the report of a judge that decides gates (`eval.gates`)."""
HOW_TO_MEASURE = "Measure the judge: python -m align stage=eval eval=judge reward=… data=annotations project=NAME."
HOW_TO_MEASURE_ANSWERS = (
    "Measure the judge: python -m align stage=eval eval=judge eval.asks=… stage.judge=… data=files data.path=LABELLED."
)


@dataclass(frozen=True, slots=True)
class PairExample:
    """Two answers to one prompt with a known verdict, on which a judge is measured.

    Attributes:
        item: the prompt, with its source as the category. Pairs that share a prompt or a group are one cluster.
        first, second: the turns of each answer, usually one.
        verdict: 1 if the first is better, 0 if the second is, ½ for a tie.
        votes: the verdicts of single people.
        ended: False if sampling cut the first, or the second, at its length limit.
    """

    item: EvalItem
    first: Turns
    second: Turns
    verdict: float
    votes: tuple[float, ...]
    ended: tuple[bool, bool] = (True, True)

    @property
    def is_tied(self) -> bool:
        return self.verdict == TIE

    @property
    def answers(self) -> tuple[Turns, Turns]:
        return self.first, self.second

    @property
    def conversations(self) -> tuple[Conversation, Conversation]:
        """Two conversations: the prompt followed by the first answer, and by the second."""
        first, second = (replace(self.item.prompt, messages=self.item.prompt.messages + side) for side in self.answers)
        return first, second

    @property
    def lengths(self) -> tuple[int, int]:
        """The number of characters of the first and of the second answer."""
        first, second = (sum(len(turn.content) for turn in side) for side in self.answers)
        return first, second

    def to_preference(self) -> Preference:
        """Return the pair as a preference with the better answer as the chosen one. Of a tie, the first answer is
        chosen."""
        is_first = self.verdict >= TIE
        chosen_turns, rejected_turns = self.answers if is_first else self.answers[::-1]
        chosen_ended, rejected_ended = self.ended if is_first else self.ended[::-1]
        return Preference(
            self.item.prompt.messages,
            chosen_turns,
            rejected_turns,
            self.item.id,
            self.item.cluster,
            source=self.item.category,
            tools=self.item.prompt.tools,
            chosen_ended=chosen_ended,
            rejected_ended=rejected_ended,
        )


@dataclass(frozen=True, slots=True)
class AnswerExample:
    """An answer with a known yes/no label, on which a judge is measured.

    Attributes:
        item: the prompt. Answers to one prompt are one cluster.
        answer: its turns, usually one.
        label: True if the question about the answer has a yes.
    """

    item: EvalItem
    answer: Turns
    label: bool

    @property
    def verdict(self) -> float:
        return float(self.label)


def build_pair_examples(
    decided: Sequence[Preference], tied: Sequence[Preference] = (), seed: int = 0
) -> list[PairExample]:
    """Build one example for each distinct answer pair, with the majority of its votes as its verdict. The examples
    are in the order of each pair's first vote.

    Args:
        decided: pairs whose chosen answer is the better one.
        tied: pairs whose answers are equally good.
        seed: decides which answer is the first.
    """
    votes_by_pair: dict[tuple[Turns, frozenset[Turns]], list[tuple[Preference, bool]]] = {}
    for prefs, is_tie in ((decided, False), (tied, True)):
        for pref in prefs:
            key = (pref.prompt, frozenset((pref.chosen, pref.rejected)))
            votes_by_pair.setdefault(key, []).append((pref, is_tie))
    ids = make_unique_ids([votes[0][0].id for votes in votes_by_pair.values()], "pair")
    pairs = [build_pair_example(id, votes, seed) for id, votes in zip(ids, votes_by_pair.values(), strict=True)]
    items = cluster_items([pair.item for pair in pairs])
    return [replace(pair, item=item) for item, pair in zip(items, pairs, strict=True)]


def build_pair_example(id: str, votes: Sequence[tuple[Preference, bool]], seed: int) -> PairExample:
    """Build the example of one answer pair with the majority verdict of its votes, each a (preference, True for a tie).
    `seed` decides which answer comes first."""
    pref = votes[0][0]
    sides = [(pref.chosen, pref.chosen_ended), (pref.rejected, pref.rejected_ended)]
    if hashlib.sha256(f"{seed} {id}".encode()).digest()[0] % 2 == 1:
        sides.reverse()
    (first, first_ended), (second, second_ended) = sides
    values = tuple(TIE if is_tie else float(vote.chosen == first) for vote, is_tie in votes)
    balance = sum(value - TIE for value in values)
    verdict = TIE if balance == 0 else float(balance > 0)
    item = EvalItem(id, pref.group_id or id, pref.source, Conversation(pref.prompt, id, pref.tools), None)
    return PairExample(item, first, second, verdict, values, (first_ended, second_ended))


class LabelledAnswers(NamedTuple):
    """Distinct answers with the label that most of their rows give.

    Attributes:
        examples: the answers, each once.
        left_out: number of answers left out because they have as many positive as negative labels.
    """

    examples: list[AnswerExample]
    left_out: int


def build_answer_examples(labelled: Sequence[Feedback]) -> LabelledAnswers:
    """Build one example for each distinct answer, with the majority of its labels. Answers with as many positive as
    negative labels are left out and counted."""
    labels_by_answer: dict[tuple[Turns, Turns], list[Feedback]] = {}
    for row in labelled:
        labels_by_answer.setdefault((row.prompt, row.completion), []).append(row)
    kept = [rows for rows in labels_by_answer.values() if 2 * sum(row.label for row in rows) != len(rows)]
    ids = make_unique_ids([rows[0].id for rows in kept], "answer")
    items = [
        EvalItem(id, id, "", Conversation(rows[0].prompt, id, rows[0].tools), None)
        for id, rows in zip(ids, kept, strict=True)
    ]
    examples = [
        AnswerExample(item, rows[0].completion, 2 * sum(row.label for row in rows) > len(rows))
        for item, rows in zip(cluster_items(items), kept, strict=True)
    ]
    return LabelledAnswers(examples, len(labels_by_answer) - len(kept))


def make_unique_ids(ids: Sequence[str], noun: str) -> list[str]:
    """Return unique ids in the same order: the second `x` becomes `x#2`, and an empty id becomes `noun` with its
    position (`pair 3`)."""
    counts = Counter[str]()
    unique = []
    for place, id_or_empty in enumerate(ids, 1):
        id = id_or_empty or f"{noun} {place}"
        counts[id] += 1
        unique.append(id if counts[id] == 1 else f"{id}#{counts[id]}")
    return unique


def drop_trained_pairs(
    pairs: Iterable[PairExample], trained_questions: Sequence[TrainedQuestions]
) -> list[PairExample]:
    """Return the pairs whose prompt is not in the training data of any of the judge's reward models."""
    return [pair for pair in pairs if not any(model.asks(pair.item.prompt.messages) for model in trained_questions)]


def digest_examples(examples: Sequence[PairExample] | Sequence[AnswerExample]) -> str:
    """Return the SHA-256, in hex, of the examples' prompts, answers and verdicts, independent of the order of examples
    and of answers."""

    def list_contents(example: PairExample | AnswerExample) -> list[object]:
        prompt = turns_to_json(example.item.prompt.messages)
        if isinstance(example, AnswerExample):
            return [prompt, turns_to_json(example.answer), example.label]
        verdicts = (example.verdict, 1 - example.verdict)
        sides = [[turns_to_json(side), verdict] for side, verdict in zip(example.answers, verdicts, strict=True)]
        return [prompt, *sorted(sides)]

    return json_digest(sorted(map(list_contents, examples), key=str))


def turns_to_json(turns: Turns) -> list[str]:
    return [encode_turn(turn) for turn in turns]


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


class JudgeOpinions(NamedTuple):
    """The verdicts, probabilities and errors of a judge on examples, one entry per example.

    Attributes:
        verdicts: on a pair, 1 if the judge prefers the first answer, 0 the second, ½ a tie; on an answer, 1 for yes and
            0 for no. A missing verdict is ½, see `errors`.
        swapped: the verdicts with the second answer shown first. None for a judge without an order.
        log_odds: of a verdict of 1, in nats. None if the judge gives no probability.
        errors: why a verdict is missing, in some order. Empty for a verdict that is not missing.
        scores: of the first and second answers. None for a judge that compares answers.
        probabilities: of yes, for a judge of single answers. None for a judge of pairs.
    """

    verdicts: Sequence[float]
    swapped: Sequence[float] | None
    log_odds: Sequence[float | None]
    errors: Sequence[str]
    scores: Sequence[tuple[float, float]] | None = None
    probabilities: Sequence[float | None] | None = None


# Figures


def measure_judge_on_pairs(
    pairs: Sequence[PairExample], opinions: JudgeOpinions, level: float = 0.95
) -> dict[str, Any]:
    """Compute a judge's agreement with labelled pairs, position bias, length bias and calibration, with confidence
    intervals over prompts.

    A missing verdict counts as wrong: it agrees with no verdict, not even a tie, is not consistent, and is not a tie of
    the judge.

    Returns:
        `agreement`, `swap`, `length_slope`, `reference_slope` and `n` of `align.evals.stats.judge.JudgeStatistics`;
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


# Opinions of a language model


def collect_pair_opinions(
    judge: LLMJudge, pairs: Sequence[PairExample], store: AnswerStore
) -> tuple[JudgeOpinions, list[str]]:
    """Ask an LLM judge to compare each pair in both orders, and return its verdicts with warnings about missing ones.
    Only the main rank asks, and broadcasts the verdicts to the other ranks."""
    answer_pairs = [AnswerPair(pair.item.id, pair.item.prompt, *map(join_turns, pair.answers)) for pair in pairs]
    verdicts = ranks.broadcast(judge.compare(answer_pairs, store) if ranks.is_main() else [])
    by_case = {(verdict.prompt, verdict.order): verdict for verdict in verdicts}
    first = [by_case[pair.item.id, FIRST] for pair in pairs]
    second = [by_case[pair.item.id, SECOND] for pair in pairs]
    odds = [
        compute_log_odds((verdict.p + swapped.p) / 2) if verdict.p is not None and swapped.p is not None else None
        for verdict, swapped in zip(first, second, strict=True)
    ]
    opinions = JudgeOpinions(
        [verdict.verdict for verdict in first],
        [verdict.verdict for verdict in second],
        odds,
        [verdict.error or swapped.error for verdict, swapped in zip(first, second, strict=True)],
    )
    return opinions, judge.describe_errors(verdicts, "wrong", "its card is meaningless")


def collect_answer_opinions(
    judge: LLMJudge, answers: Sequence[AnswerExample], store: AnswerStore
) -> tuple[JudgeOpinions, list[str]]:
    """Ask an LLM judge its yes/no question about each answer, and return its verdicts with warnings about missing ones.
    Only the main rank asks, and broadcasts the verdicts to the other ranks."""
    graded_answers = [GradedAnswer(answer.item.prompt, join_turns(answer.answer), answer.item.id) for answer in answers]
    verdicts = ranks.broadcast(judge.grade(graded_answers, store) if ranks.is_main() else [])
    opinions = JudgeOpinions(
        [verdict.verdict for verdict in verdicts],
        None,
        [None if verdict.p is None else compute_log_odds(verdict.p) for verdict in verdicts],
        [verdict.error for verdict in verdicts],
        probabilities=[verdict.p for verdict in verdicts],
    )
    return opinions, judge.describe_errors(verdicts)


def iter_judged_rows(
    examples: Sequence[PairExample] | Sequence[AnswerExample], opinions: JudgeOpinions
) -> Iterator[dict[str, Any]]:
    """Yield for each example the JSON object of a line in `verdicts.jsonl`: ids, the judge's verdict and the
    reference's. The texts are left out, since the data have them."""
    for i, example in enumerate(examples):
        row: dict[str, Any] = {"id": example.item.id, "cluster": example.item.cluster, "verdict": opinions.verdicts[i]}
        if isinstance(example, AnswerExample):
            row["label"] = example.label
            if opinions.probabilities is not None and opinions.probabilities[i] is not None:
                row["p"] = opinions.probabilities[i]
        else:
            row |= {"source": example.item.category, "reference": example.verdict, "votes": example.votes}
            row["characters"] = [*example.lengths]
        if opinions.swapped is not None:
            row["swapped"] = opinions.swapped[i]
        if opinions.errors[i]:
            row["error"] = opinions.errors[i]
        if opinions.scores is not None:
            row["scores"] = [*opinions.scores[i]]
        yield row


# The file


@dataclass(frozen=True, slots=True)
class JudgeReport:
    """The part of a judge's `card.json` that gates (`eval.gates`) need: identity, agreement, consistency and errors.

    Attributes:
        judge: the judge that was measured.
        digest: SHA-256 of the file.
        reference: name of the reference that it was compared with.
        agreement: `{value, low, high, n}`.
        chance: the lower end of kappa, the agreement beyond chance. None if kappa is undefined.
        verdicts: the number of compared verdicts.
        consistency: the share of verdicts that are the same in both orders. None for a judge without an order.
        level: of the intervals.
        by_label: for a judge of single answers, `yes` and `no` → its agreement on the answers with this label.
        errors: the number of missing verdicts among `verdicts`.
    """

    judge: JudgeIdentity
    digest: str
    reference: str
    agreement: dict[str, Any]
    chance: float | None
    verdicts: int
    consistency: float | None
    level: float
    by_label: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    errors: int = 0

    @property
    def summary(self) -> str:
        agreed = format_interval(self.agreement, ".2f")
        return f"agrees with {self.reference} on {agreed} of {pluralize(self.verdicts, 'verdict')}"

    def as_dict(self) -> dict[str, Any]:
        """Return the judge's title, agreement and report digest as the JSON object that a gate's verdict file
        contains."""
        values = {
            "judge": self.judge.title,
            "card": self.digest,
            "agreement": {**self.agreement, "with": self.reference},
        }
        if self.by_label:
            values |= {"asks": self.judge.asks, "agreement_by_label": {**self.by_label}}
        return values


def load_reports(card: Any, root: Path) -> tuple[Sequence[JudgeReport], dict[str, Input]]:
    """Load the judge reports of the runs that the setting `stage.card` names, and return them with the inputs to record
    in the manifest.

    Raises:
        InputError: `card` names no runs, or a run that measured no judge.
        MissingArtifact: there is no such run.
        CorruptFile: a file of the run was changed after it was published.
    """
    is_list = isinstance(card, list | tuple)
    refs = [*card] if is_list else [card]
    for ref in refs:
        is_ref = isinstance(ref, str) and (bool(ref) or not is_list)
        require(is_ref, FIELD, card, "names no run", "Write eval:NAME, or a list of such.")
    reports = []
    inputs = {}
    refs = [ref for ref in refs if ref]
    for i, ref in enumerate(refs):
        artifact = resolve(ref, root, field_name=FIELD)
        path = artifact.path / FILE
        require(path.is_file(), FIELD, ref, "is no run of eval=judge, so it has no card", HOW_TO_MEASURE)
        report = read_report(path)
        manifest = artifact.manifest
        stage, run_name = (manifest.stage, manifest.name) if manifest else ("", "")
        reports.append(report)
        key = "card" if len(refs) == 1 else f"card.{i}"
        inputs[key] = Input(report.digest, artifact.ref, str(artifact.path.absolute()), stage, run_name)
    return reports, inputs


def read_report(path: Path) -> JudgeReport:
    """Read a judge report from its `card.json`, and check its values and its judge's digest.

    Raises:
        CorruptFile: the file is not a valid report of a judge.
        InputError: another version wrote it.
    """
    values = read_json_object(path, FIELD, HOW_TO_MEASURE)
    require_schema_version(values.get("schema_version"), SCHEMA, FIELD, str(path), HOW_TO_MEASURE)
    try:
        judge = JudgeIdentity(str(values["judge"]["title"]), values["judge"]["made_of"])
        kappa = values["agreement"]["kappa"]
        swap = values["swap"]
        report = JudgeReport(
            judge,
            file_digest(path),
            str(values["reference"]),
            parse_interval(values["agreement"]["raw"]),
            None if kappa is None or kappa["low"] is None else float(kappa["low"]),
            int(values["agreement"]["verdicts"]),
            swap and float(swap["consistency"]["value"]),
            float(values["level"]),
            {label: parse_interval(values["by_label"][label]) for label in YES_AND_NO} if judge.asks else {},
            int(values["errors"]),
        )
        intervals = (report.agreement, *report.by_label.values())
        numbers = [number for interval in intervals for number in interval.values()]
        numbers += [report.level, report.consistency or 0.0, report.chance or 0.0]
        is_whole = values["judge"]["identity"] == judge.digest and all(map(math.isfinite, numbers))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CorruptFile(FIELD, str(path), "is not a judge's card", HOW_TO_MEASURE) from None
    if not is_whole:
        raise CorruptFile(FIELD, str(path), "is not a judge's card, or does not name its judge", HOW_TO_MEASURE)
    return report


def parse_interval(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys `value`, `low`, `high` and `n` of a JSON object as three floats and an int. Raises KeyError,
    TypeError or ValueError if one is missing or no number."""
    return {**{key: float(values[key]) for key in ("value", "low", "high")}, "n": int(values["n"])}


# Gates


def explain_shortfall(report: JudgeReport, min_agreement: float = MIN_AGREEMENT) -> str:
    """Return the reason for which a judge may not decide gates, such as a low agreement or too few examples.
    Returns an empty string if it may decide them.

    Args:
        min_agreement: bound that the lower end of the agreement has to exceed.
    """
    agreed = format_interval(report.agreement, ".2f")
    if report.errors >= report.verdicts:
        return "it gives no verdict"
    if report.consistency == 0:
        return "no verdict is the same in both orders of the two answers: it decides by their position"
    if report.verdicts < MIN_VERDICTS:
        return f"its card has {pluralize(report.verdicts, 'verdict')}, and {MIN_VERDICTS} are needed"
    if report.level < MIN_LEVEL:
        return f"its agreement has an interval at level {report.level:g}, and {MIN_LEVEL:g} is needed"
    for label, interval in report.by_label.items():
        label_agreement = (
            f"its agreement with {report.reference} on answers labelled {label} is {format_interval(interval, '.2f')}"
        )
        if interval["value"] == 0:
            return f"{label_agreement}: it never says {label} where it should"
        if interval["low"] <= min_agreement:
            return f"{label_agreement}, whose lower end is not above {min_agreement:g}"
    if not report.by_label and report.agreement["low"] <= min_agreement:
        return f"its agreement with {report.reference} is {agreed}, whose lower end is not above {min_agreement:g}"
    if report.chance is None or report.chance <= 0:  # a judge that calls all equal agrees with each tie
        problem = "not shown to be better than chance: see kappa in its card"
        return f"its agreement with {report.reference} is {agreed}, {problem}"
    return ""


def choose_report(
    gate: str, judge: JudgeIdentity, reports: Sequence[JudgeReport], card: Any, min_agreement: float = MIN_AGREEMENT
) -> JudgeReport:
    """Return the only report about a gate's judge, or raise InputError if there is not exactly one or its agreement is
    too low.

    Args:
        gate: its name.
        judge: the judge of the gate's task.
        reports: those that `stage.card` names.
        card: the value of `stage.card`, for errors.
        min_agreement: see `explain_shortfall`.

    Raises:
        InputError: there is no report, none or two of them are about this judge, or its agreement is too low.
    """
    decides = f"gate {gate} is decided by {judge.title}"
    how_to_measure = HOW_TO_MEASURE_ANSWERS if judge.asks else HOW_TO_MEASURE
    if not reports:
        problem = f"{decides}, and no card (stage.card) says how often it is right"
        raise InputError(FIELD, "(none)", problem, f"{how_to_measure} Then name its run.")
    own_reports = [report for report in reports if report.judge.digest == judge.digest]
    if not own_reports:
        nearest = min(reports, key=lambda report: len(list_differing_keys(judge, report.judge)))
        subject = "this card is" if len(reports) == 1 else f"even the nearest of these {len(reports)} cards is"
        difference = describe_judge_difference(judge, nearest.judge)
        problem = f"{decides}, and {subject} of another judge, {nearest.judge.title}: {difference}"
        raise InputError(FIELD, card, problem, how_to_measure)
    require(len(own_reports) == 1, FIELD, card, f"names {len(own_reports)} cards of {judge.title}", "Name one of them.")
    if why := explain_shortfall(own_reports[0], min_agreement):
        examples = "answers" if judge.asks else "pairs"
        raise InputError(FIELD, card, f"{decides}: {why}", f"Measure it on more {examples}, or name another judge.")
    return own_reports[0]
