"""What the runs of the frontier came to."""

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
from align.evals.text import distinct_n, most_risen
from align.models.load import choose_dtype
from align.ops.best_of_n import compute_kl_bound
from align.ops.intervals import mean_interval
from align.reward.build import load_reward_model
from align.run import read_manifest, resolve

Figures = dict[str, Any]
NAT = 0.03
"""Gold that a nat costs where learning rates are compared: about what PPO's line gains for one between 3 and 7 nats."""
BEST_OF = (4, 16, 64)


class Point(NamedTuple):
    """One policy of one seed.

    Attributes:
        answered: the held-out prompts, each with its answer.
        scores: gold of each.
        figures: gold, proxy, kl, distinct2, risen (the share of answers with the word that rose most), word, minutes;
            what was not measured is not there.
    """

    answered: list[Conversation]
    scores: list[float]
    figures: Figures


def of_policy(root: Path, name: str, minutes: float | None = None) -> Point:
    """Of the run of a method and its evaluation.

    Args:
        minutes: that the policy took, where they are not those of one run.
    """
    folder = root / "eval" / name
    samples, metrics = read_samples(folder / "artifact" / "samples.jsonl"), read_manifest(folder).metrics
    scores = [s.score_policy for s in samples]
    figures = {
        "gold": sum(scores) / len(scores), "kl": metrics["kl"], "distinct2": metrics["distinct2"]["policy"],
        "risen": metrics["most_risen_word"]["policy"], "word": metrics["most_risen_word"]["word"],
        "minutes": took(root, name) if minutes is None else minutes,
    }  # fmt: skip
    return Point([with_answer(s.prompt, s.policy) for s in samples], scores, figures)


def of_start(root: Path, name: str) -> Point:
    """Of the supervised model, as an evaluation of any method saw it."""
    folder = root / "eval" / name
    samples, metrics = read_samples(folder / "artifact" / "samples.jsonl"), read_manifest(folder).metrics
    scores = [s.score_ref for s in samples]
    figures = {"gold": sum(scores) / len(scores), "kl": 0.0, "distinct2": metrics["distinct2"]["ref"]}
    return Point([with_answer(s.prompt, s.ref) for s in samples], scores, figures)


def of_best(root: Path, name: str, samples: Sequence[Sample], n: int) -> Point:
    """Of the best of the first n answers of each prompt, by the reward model; its KL is the bound."""
    scores, winners = [], []
    with (root / "sample" / name / "samples.jsonl").open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            best = max(row["answers"][:n], key=lambda answer: answer["score"])
            scores.append(best["gold"])
            winners.append(best["answer"])
    risen = most_risen([s.ref for s in samples], winners)
    figures = {
        "gold": sum(scores) / len(scores), "kl": compute_kl_bound(n), "distinct2": distinct_n(winners, 2),
        "risen": risen.policy, "word": risen.word, "minutes": took(root, name) * n / max(BEST_OF),
    }  # fmt: skip
    return Point([with_answer(s.prompt, winner) for s, winner in zip(samples, winners, strict=True)], scores, figures)


def with_answer(prompt: tuple[Message, ...], answer: str) -> Conversation:
    return Conversation((*prompt, Message("assistant", answer)))


def proxies(root: Path, points: Mapping[str, Point], dtype: str) -> dict[str, float]:
    """The reward model's mean score of each policy's answers, in standard deviations of its scores of the supervised
    model's, and from their mean."""
    cpu = torch.device("cpu")
    scorer = load_reward_model(resolve("reward:latest", root), cpu, choose_dtype(dtype, cpu), 64)

    def scores(point: Point) -> Tensor:
        rows = point.answered
        return torch.cat([scorer.score(rows[i : i + 64]) for i in range(0, len(rows), 64)])

    start = scores(points["SFT"])
    return {name: float((scores(point).mean() - start.mean()) / start.std()) for name, point in points.items()}


def took(root: Path, name: str) -> float:
    """Minutes of the processor that a run took."""
    return json.loads((root / "took" / f"{name}.json").read_text()) / 60


def worth(root: Path, name: str, apart: set[str]) -> float:
    """What a learning rate is judged by: gold, less what its KL costs, on prompts that no reported seed measures on.

    Args:
        apart: these prompts, see `measured_on`.
    """
    samples = read_samples(root / "eval" / name / "artifact" / "samples.jsonl")
    own = [s for s in samples if told(s.prompt) not in apart]
    assert own, "every prompt is one of a reported seed"
    return sum(s.score_policy - NAT * s.kl for s in own) / len(own)


def measured_on(words: Sequence[str]) -> set[str]:
    """The prompts that evaluations with these words may ask, as `worth` compares them."""
    config = compose_config(["stage=eval", *words])
    asked = read_source_prompts(DataSource.from_settings(config.data), "test", config.seed)[: config.stage.prompts]
    return {told(prompt.messages) for prompt in asked}


def told(messages: Sequence[Message]) -> str:
    return json.dumps([(m.role, m.content) for m in messages])


def pooled(points: Sequence[Point]) -> Figures:
    """Over the seeds: gold with an interval over all prompts, means of the others, the words that rose."""
    interval = mean_interval([score for point in points for score in point.scores])
    first = points[0].figures
    numbers = [key for key, value in first.items() if isinstance(value, float | int) and key != "gold"]
    means = {key: sum(p.figures[key] for p in points) / len(points) for key in numbers}
    words = {"words": [p.figures["word"] for p in points]} if "word" in first else {}
    return {
        "gold": interval.value, "low": interval.low, "high": interval.high,
        "golds": [p.figures["gold"] for p in points], **means, **words,
    }  # fmt: skip


def cell(row: Figures, key: str) -> str:
    """A figure of a table's row."""
    if row.get(key) is None:
        return "–"
    if key == "gold":
        return f"{row['gold']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    if key == "risen":
        return f"{row['risen']:.2f} ({', '.join(dict.fromkeys(row['words']))})"
    return f"{row[key]:.{0 if key == 'live_mb' else 1 if key == 'minutes' else 2}f}"
