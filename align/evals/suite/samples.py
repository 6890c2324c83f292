"""Samples of a policy and its reference model on the same prompts, and the figures computed from them.

All figures of `metrics.json` can be recomputed from `samples.jsonl`, exactly: `summarise_samples(read_samples(path))`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from align.core.files import open_text
from align.core.outputs import open_atomic_file
from align.core.types import Message, Rollout
from align.data.ngrams import compute_repetition
from align.data.trained_ids import TrainedQuestions
from align.evals.stats.verdicts import compute_wins
from align.evals.suite.answers import Sampling, TaskAnswers, load_actors
from align.evals.suite.results import ScoredTask
from align.evals.suite.systems import System
from align.evals.text import compute_distinct_n, find_most_risen_word
from align.models.finite_checks import build_divergence_error
from align.models.forward import compute_in_chunks, compute_response_logprobs
from align.ops.finite import count_not_finite
from align.ops.intervals import average_by_group, mean_interval, proportion_interval

CHUNK_SIZE = 32
SIDES = ("ref", "policy")


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt with the answers of the reference model and of the policy, both scored by the judge.

    Attributes:
        prompt_id: of the prompt in its data set. Answers with the same id count as one piece of evidence.
        prompt: the conversation up to the answer.
        ref, policy: the two answers, without any template, as the judge reads them.
        score_ref, score_policy: the judge's scores, higher is better.
        length_ref, length_policy: tokens of the answer, its stop token included.
        ended_ref, ended_policy: True if the answer ended with a stop token, False if it was cut.
        kl: one-sample estimate of the sequence KL(policy || ref) on the policy's own answer, in nats: the sum over its
            response tokens of logp_policy - logp_ref. It is unbiased, and may be negative for single answers.
        reasoning_ref, reasoning_policy: the parts of the answers that were hidden from the judge. None if nothing was.
        seen: True if the policy was trained on this prompt. None if it was not, or if that is unknown.
        greedy_ref, greedy_policy: the two answers by greedy decoding. None for a prompt that was not asked so.
    """

    prompt_id: str
    prompt: tuple[Message, ...]
    ref: str
    policy: str
    score_ref: float
    score_policy: float
    length_ref: int
    length_policy: int
    ended_ref: bool
    ended_policy: bool
    kl: float
    reasoning_ref: str | None = None
    reasoning_policy: str | None = None
    seen: bool | None = None
    greedy_ref: str | None = None
    greedy_policy: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the sample as the JSON object of a line in `samples.jsonl`. Fields that are `None` are left out."""
        row = {field.name: getattr(self, field.name) for field in fields(self)} | {
            "prompt": [message.as_dict() for message in self.prompt]
        }
        return {name: value for name, value in row.items() if value is not None}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Sample:
        """Build a sample from the JSON object of a line in `samples.jsonl`."""
        return cls(**{**record, "prompt": tuple(map(Message.from_dict, record["prompt"]))})


def summarise_samples(samples: Sequence[Sample], role: str = "gold") -> dict[str, Any]:
    """Compute a policy's win rate, mean scores, KL, lengths and diversity against its reference model, as in
    `metrics.json`.

    Each figure with an interval is a mean over prompts of the prompt's mean over its answers. The win rate has Wilson's
    interval, the others have Student's, or none if all prompts have the same value.

    Args:
        role: the key of the judge's scores, `gold` or `proxy`.

    Returns:
        `win_rate` and `gold.difference` (policy minus reference) as `{value, low, high, n}`; `gold`, `length` (mean
        tokens), `distinct1`, `distinct2`, `repetition`, `eos_rate` and `empty_rate` for `ref` and `policy`;
        `most_risen_word` with the share of answers that hold it; `kl`, the mean sequence KL in nats, and `kl_interval`.
        n counts prompts.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("no samples to summarise: at least one prompt must be answered")
    ids = [sample.prompt_id for sample in samples]
    texts = {side: [getattr(sample, side) for sample in samples] for side in SIDES}

    def average_prompts(values: Sequence[float]) -> NDArray[np.float64]:
        """Return the mean over each prompt's answers."""
        return average_by_group(ids, values)[0]

    def get_column(name: str, side: str) -> list[float]:
        return [getattr(sample, f"{name}_{side}") for sample in samples]

    def average_sides(name: str) -> dict[str, float]:
        return {side: float(average_prompts(get_column(name, side)).mean()) for side in SIDES}

    ref_scores, policy_scores = (get_column("score", side) for side in SIDES)
    # Paired by prompt, so that its difficulty cancels out.
    difference = mean_interval(average_prompts(policy_scores) - average_prompts(ref_scores))
    kl = mean_interval(average_prompts([sample.kl for sample in samples]))
    empty = {side: float(average_prompts([not text.strip() for text in texts[side]]).mean()) for side in SIDES}
    return {
        "win_rate": proportion_interval(average_prompts(compute_wins(policy_scores, ref_scores).tolist())).as_dict(),
        role: average_sides("score") | {"difference": difference.as_dict()},
        "kl": kl.value,
        "kl_interval": kl.as_dict(),
        "length": average_sides("length"),
        **{f"distinct{n}": {side: compute_distinct_n(texts[side], n) for side in SIDES} for n in (1, 2)},
        "repetition": {side: compute_repetition(texts[side]) for side in SIDES},
        "most_risen_word": asdict(find_most_risen_word(*texts.values())),
        "eos_rate": average_sides("ended"),
        "empty_rate": empty,
    }


def measure_kl(sampling: Sampling, policy: System, ref: System, rollout: Rollout) -> list[float]:
    """Compute a one-sample estimate of the sequence KL(policy || ref) for each of the policy's answers, log π − log
    π_ref in nats.

    Raises:
        InputError: a logprob is not finite.
    """
    assert policy.base is not None
    assert ref.base is not None
    share_base = (policy.base.digest, policy.method) == (ref.base.digest, ref.method)
    logprobs: dict[str, torch.Tensor] = {}
    for system in (ref, policy):
        actors = load_actors(sampling, [policy, ref] if share_base else [system])
        with torch.no_grad(), actors[system.name].use() as model:
            moved_rollout = rollout.to(next(model.parameters()).device)
            logprobs[system.name] = compute_in_chunks(
                lambda part, model=model: compute_response_logprobs(model, part, sampling.temperature)[0].sum(-1),
                moved_rollout,
                CHUNK_SIZE,
            )
        if count := count_not_finite(logprobs[system.name]):
            problem = f"{count} answers have logprobs that are not finite under {system.field}"
            raise build_divergence_error(problem, None, sampling.dtype_setting)
    return (logprobs[policy.name] - logprobs[ref.name]).tolist()


def build_samples(task: TaskAnswers, scored: ScoredTask, kl: Sequence[float], seen: TrainedQuestions) -> list[Sample]:
    """Build one sample for each prompt of a task, from the scored answers of the policy and of its reference.

    Args:
        kl: of each of the policy's answers, see `measure_kl`.
        seen: the prompts that the policy was trained on.
    """
    names = dict(zip(SIDES, reversed([*scored.answers]), strict=True))
    lengths = {name: rollout.lengths_B.tolist() for name, rollout in task.rollouts.items()}
    samples: list[Sample] = []
    for i, item in enumerate(task.items):
        answers: dict[str, Any] = {}
        for side, name in names.items():
            answer = scored.answers[name][i]
            greedy = task.greedy[name][i] if name in task.greedy else None
            answers |= {side: answer.text, f"score_{side}": answer.score, f"length_{side}": lengths[name][i]}
            answers |= {
                f"ended_{side}": bool(answer.ended),
                f"reasoning_{side}": answer.reasoning,
                f"greedy_{side}": greedy,
            }
        prompt = item.prompt.messages
        samples.append(Sample(item.cluster, prompt, kl=kl[i], seen=seen.asks(prompt) or None, **answers))
    return samples


def summarise_unseen(samples: Sequence[Sample], role: str) -> dict[str, Any]:
    """Compute the win rate and score gain on the prompts that the policy was not trained on, and count the others.

    Returns an empty mapping if the policy was trained on none of the prompts, and the number alone if it was trained on
    all of them.
    """
    unseen = [sample for sample in samples if not sample.seen]
    if len(unseen) == len(samples):
        return {}
    summary = summarise_samples(unseen, role) if unseen else {}
    figures = {"unseen": {"win_rate": summary["win_rate"], "gain": summary[role]["difference"]}} if unseen else {}
    return {"seen": len(samples) - len(unseen), **figures}


def write_samples(path: Path, samples: Iterable[Sample]) -> Path:
    """Write the samples to a JSON Lines file, one per line, and replace the file atomically.

    Floats keep every digit (`repr`), so that recomputed figures are exact.
    """
    with open_atomic_file(path) as file:
        for sample in samples:
            line = json.dumps(sample.as_dict(), ensure_ascii=False, allow_nan=False) + "\n"
            # Lone surrogates, which a broken tokenizer can emit, are kept.
            file.write(line.encode("utf-8", "surrogatepass"))
    return path


def read_samples(path: Path) -> list[Sample]:
    """Read the samples of a file that `write_samples` wrote."""
    # Lines end with "\n" alone: str.splitlines would also break at U+2028, which a model may well write.
    with open_text(path, errors="surrogatepass", newline="\n") as lines:
        return [Sample.from_json(json.loads(line)) for line in lines]
