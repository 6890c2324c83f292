"""A judge's opinions of labelled examples, which a run of `eval=judge` writes to `artifact/verdicts.jsonl`.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from align import ranks
from align.evals.judges.examples import AnswerExample, PairExample
from align.evals.judges.judge_verdict import FIRST, SECOND, AnswerPair
from align.evals.judges.llm_judge import GradedAnswer, LLMJudge
from align.evals.text import join_turns
from align.ops.calibration import compute_log_odds
from align.rollout.answer_cache import AnswerStore


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
