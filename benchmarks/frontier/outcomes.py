"""Figures of the frontier, computed from finished runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align.__main__ import compose_config
from align.core.types import Conversation, Message
from align.data.sources import DataSource, read_source_prompts
from align.evals.suite.samples import Sample, read_samples
from align.evals.text import compute_distinct_n, find_most_risen_word
from align.models.load import choose_dtype
from align.ops.best_of_n import compute_kl_bound
from align.ops.intervals import mean_interval
from align.reward.build import load_reward_model
from align.run import read_manifest, resolve

Figures = dict[str, Any]
GOLD_PER_NAT = 0.03
"""Gold that a nat of KL costs when learning rates are compared: about what PPO gains by one nat between 3 and 7."""
BEST_OF = (4, 16, 64)


class Point(NamedTuple):
    """One policy of one seed on the frontier.

    Attributes:
        conversations: the held-out prompts, each with the policy's answer.
        scores: gold score of each answer.
        figures: gold, proxy, kl, distinct2, risen (the share of answers with the word whose frequency rose most), word,
            minutes. Figures that were not measured are missing.
    """

    conversations: list[Conversation]
    scores: list[float]
    figures: Figures


def load_policy_point(root: Path, name: str, minutes: float | None = None) -> Point:
    """Load the point of a method's policy from its evaluation.

    Args:
        minutes: processor time of the policy, if more than the run of this name trained it.
    """
    folder = root / "eval" / name
    samples = read_samples(folder / "artifact" / "samples.jsonl")
    metrics = read_manifest(folder).metrics
    scores = [sample.score_policy for sample in samples]
    figures = {
        "gold": sum(scores) / len(scores),
        "kl": metrics["kl"],
        "distinct2": metrics["distinct2"]["policy"],
        "risen": metrics["most_risen_word"]["policy"],
        "word": metrics["most_risen_word"]["word"],
        "minutes": read_minutes(root, name) if minutes is None else minutes,
    }
    return Point([append_answer(sample.prompt, sample.policy) for sample in samples], scores, figures)


def load_sft_point(root: Path, name: str) -> Point:
    """Load the supervised model's point from the evaluation of any method, whose reference it is."""
    folder = root / "eval" / name
    samples = read_samples(folder / "artifact" / "samples.jsonl")
    metrics = read_manifest(folder).metrics
    scores = [sample.score_ref for sample in samples]
    figures = {"gold": sum(scores) / len(scores), "kl": 0.0, "distinct2": metrics["distinct2"]["ref"]}
    return Point([append_answer(sample.prompt, sample.ref) for sample in samples], scores, figures)


def load_best_of_point(root: Path, name: str, samples: Sequence[Sample], n: int) -> Point:
    """Compute the point of best-of-n: of each prompt's first n answers, the one that the reward model scores highest.

    Its `kl` is the bound log n − (n − 1)/n.

    Args:
        name: of the run of `stage=sample`.
        samples: of an evaluation on the same prompts.
    """
    scores = []
    winners = []
    with (root / "sample" / name / "samples.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            best = max(row["answers"][:n], key=lambda answer: answer["score"])
            scores.append(best["gold"])
            winners.append(best["answer"])
    risen_word = find_most_risen_word([sample.ref for sample in samples], winners)
    figures = {
        "gold": sum(scores) / len(scores),
        "kl": compute_kl_bound(n),
        "distinct2": compute_distinct_n(winners, 2),
        "risen": risen_word.policy,
        "word": risen_word.word,
        "minutes": read_minutes(root, name) * n / max(BEST_OF),
    }
    conversations = [append_answer(sample.prompt, winner) for sample, winner in zip(samples, winners, strict=True)]
    return Point(conversations, scores, figures)


def append_answer(prompt: tuple[Message, ...], answer: str) -> Conversation:
    return Conversation((*prompt, Message("assistant", answer)))


def compute_proxy_scores(root: Path, points: Mapping[str, Point], dtype: str) -> dict[str, float]:
    """Return the reward model's mean score of each policy's answers, standardised by its scores of the supervised
    model's answers (`SFT`)."""
    cpu = torch.device("cpu")
    scorer = load_reward_model(resolve("reward:latest", root), cpu, choose_dtype(dtype, cpu), 64)

    def score(point: Point) -> Tensor:
        rows = point.conversations
        return torch.cat([scorer.score(rows[i : i + 64]) for i in range(0, len(rows), 64)])

    sft_scores = score(points["SFT"])
    return {name: float((score(point).mean() - sft_scores.mean()) / sft_scores.std()) for name, point in points.items()}


def read_minutes(root: Path, name: str) -> float:
    """Return the processor time of a run, in minutes."""
    return json.loads((root / "took" / f"{name}.json").read_text()) / 60


def compute_tuning_score(root: Path, name: str, excluded_prompts: set[str]) -> float:
    """Return the figure by which learning rates are chosen: mean gold, less `GOLD_PER_NAT` for each nat of KL.

    Args:
        excluded_prompts: prompts of the reported seeds' evaluations, see `find_evaluation_prompts`. They are left out.
    """
    samples = read_samples(root / "eval" / name / "artifact" / "samples.jsonl")
    tuning_samples = [sample for sample in samples if prompt_key(sample.prompt) not in excluded_prompts]
    assert tuning_samples, "every prompt is one of a reported seed"
    return sum(sample.score_policy - GOLD_PER_NAT * sample.kl for sample in tuning_samples) / len(tuning_samples)


def find_evaluation_prompts(overrides: Sequence[str]) -> set[str]:
    """Return the keys of the prompts on which an evaluation with these overrides measures."""
    config = compose_config(["stage=eval", *overrides])
    held_out = read_source_prompts(DataSource.from_settings(config.data), "test", config.seed)[: config.stage.prompts]
    return {prompt_key(prompt.messages) for prompt in held_out}


def prompt_key(messages: Sequence[Message]) -> str:
    return json.dumps([(message.role, message.content) for message in messages])


def pool_seeds(points: Sequence[Point]) -> Figures:
    """Pool the points of a policy over seeds: gold with an interval over all prompts, the mean of every other figure,
    and the words that rose."""
    interval = mean_interval([score for point in points for score in point.scores])
    first = points[0].figures
    numeric_keys = [key for key, value in first.items() if isinstance(value, float | int) and key != "gold"]
    means = {key: sum(point.figures[key] for point in points) / len(points) for key in numeric_keys}
    risen_words = {"words": [point.figures["word"] for point in points]} if "word" in first else {}
    return {
        "gold": interval.value,
        "low": interval.low,
        "high": interval.high,
        "golds": [point.figures["gold"] for point in points],
        **means,
        **risen_words,
    }


def format_cell(row: Figures, key: str) -> str:
    """Format a figure of a table's row."""
    if row.get(key) is None:
        return "–"
    if key == "gold":
        return f"{row['gold']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    if key == "risen":
        return f"{row['risen']:.2f} ({', '.join(dict.fromkeys(row['words']))})"
    digits = {"live_mb": 0, "minutes": 1}.get(key, 2)
    return f"{row[key]:.{digits}f}"
