"""What a grader's yes and no to labelled answers come to: the figures of its card. Imports no torch.

`artifact/verdicts.jsonl` of a run of `eval=judge` with `eval.asks` is the evidence; this is arithmetic on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from align.evals.judge_card import calibration
from align.evals.known_answers import KnownAnswer
from align.evals.llm_grader import Grade
from align.evals.stats import agreement, per_prompt
from align.ops.calibration import log_odds
from align.ops.intervals import proportion


def grader_figures(answers: Sequence[KnownAnswer], grades: Sequence[Grade], level: float = 0.95) -> dict[str, Any]:
    """The figures of a grader, each with its interval over prompts.

    Args:
        answers: some labelled yes and some no.
        level: of the intervals.

    Returns:
        `agreement` of `align.evals.stats.Card`, over all answers, where a grade that is none agrees with no label;
        `by_label`, `yes` and `no` → the share of the answers with this label that the grader gives it: its sensitivity
        and its specificity; `labels` and `said`, how often each; `errors`, how many grades are none; `calibration`;
        `swap`, None: it sees one answer.

    Raises:
        ValueError: there are no answers, or none with one of the labels.
    """
    labels, scores = [float(one.label) for one in answers], [grade.score for grade in grades]
    clusters = [one.item.cluster for one in answers]
    found: dict[str, Any] = {
        "agreement": asdict(agreement(scores, labels, clusters, level)), "swap": None,
        "by_label": {name: of_label(clusters, labels, scores, of, level) for name, of in (("yes", 1.0), ("no", 0.0))},
        "labels": {"yes": labels.count(1.0), "no": labels.count(0.0)},
        "said": {"yes": scores.count(1.0), "no": scores.count(0.0)},
        "errors": sum(bool(grade.error) for grade in grades),
    }  # fmt: skip
    told = [(i, log_odds(grade.p)) for i, grade in enumerate(grades) if grade.p is not None]
    if told:
        rows, odds = zip(*told, strict=True)
        found["calibration"] = calibration([clusters[i] for i in rows], [labels[i] for i in rows], odds, level)
    return found


def of_label(
    clusters: Sequence[str], labels: Sequence[float], scores: Sequence[float], label: float, level: float
) -> dict[str, Any]:
    """How often the grader gives this label to answers that have it."""
    rows = [i for i, one in enumerate(labels) if one == label]
    right = np.array([float(scores[i] == label) for i in rows])
    return proportion(per_prompt([clusters[i] for i in rows], right), level=level).as_dict()
