"""Samples of two systems, a policy and its start, on the same prompts, and the figures over them.

`samples.jsonl` is the evidence for `metrics.json`: `summarise(read_samples(path))` gives the very same figures again.
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
from align.core.outputs import atomic_file
from align.core.types import Message, Rollout
from align.data.ngrams import compute_repetition
from align.data.trained_ids import TrainedQuestions
from align.evals.stats import win_rate
from align.evals.suite.answers import Sampling, TaskAnswers, load_actors
from align.evals.suite.results import Scored
from align.evals.suite.systems import System
from align.evals.text import distinct_n, most_risen
from align.models.finite_checks import diverged
from align.models.forward import compute_in_chunks, response_logprobs
from align.ops.finite import count_not_finite
from align.ops.intervals import average_by_group, mean_interval, proportion_interval

MEASURED_AT_ONCE = 32
SIDES = ("ref", "policy")


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt answered by the reference and by the policy, both scored by the judge.

    Attributes:
        prompt_id: of the prompt in its data set; answers that share it count as one piece of evidence.
        prompt: the conversation up to the answer, as both were asked.
        ref, policy: the two answers, without any template, as the judge reads them.
        score_ref, score_policy: the judge's scores, higher is better.
        length_ref, length_policy: tokens of the answer, its stop token included.
        ended_ref, ended_policy: True where the answer ended with a stop token, False where it was cut.
        kl: one-sample estimate of the sequence KL(policy || ref) on the policy's own answer, in nats: the sum over its
            response tokens of logp_policy - logp_ref. Unbiased, and negative for single answers.
        reasoning_ref, reasoning_policy: what the judge did not read of the answers; None where it read all of them.
        seen: True where the policy was trained on this prompt; None where it was not, or nobody knows.
        greedy_ref, greedy_policy: the two answers that take the likeliest token everywhere. None of a prompt that was
            not asked so.
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
        """One object of `samples.jsonl`."""
        row = {f.name: getattr(self, f.name) for f in fields(self)} | {"prompt": [m.as_dict() for m in self.prompt]}
        return {name: value for name, value in row.items() if value is not None}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Sample:
        """Return the sample of a line of `samples.jsonl`."""
        return cls(**{**record, "prompt": tuple(map(Message.from_dict, record["prompt"]))})


def summarise(samples: Sequence[Sample], role: str = "gold") -> dict[str, Any]:
    """The layout of `metrics.json`.

    Each figure with an interval is a mean over prompts of the prompt's mean over its answers: the win rate has
    Wilson's, the others Student's, or none where all prompts have one value.

    Args:
        role: what the judge's scores are called, `gold` or `proxy`.

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
    ids = [s.prompt_id for s in samples]
    texts = {who: [getattr(s, who) for s in samples] for who in SIDES}

    def average(values: Sequence[float]) -> NDArray[np.float64]:
        """Return the mean of each prompt's answers."""
        return average_by_group(ids, values)[0]

    def column(name: str, who: str) -> list[float]:
        return [getattr(s, f"{name}_{who}") for s in samples]

    def both(name: str) -> dict[str, float]:
        return {who: float(average(column(name, who)).mean()) for who in SIDES}

    ref, policy = (column("score", who) for who in SIDES)
    gained = mean_interval(average(policy) - average(ref))  # paired: a prompt's difficulty cancels out
    kl = mean_interval(average([s.kl for s in samples]))
    empty = {who: float(average([not text.strip() for text in texts[who]]).mean()) for who in SIDES}
    return {
        "win_rate": proportion_interval(average(win_rate(policy, ref).tolist())).as_dict(),
        role: both("score") | {"difference": gained.as_dict()},
        "kl": kl.value,
        "kl_interval": kl.as_dict(),
        "length": both("length"),
        **{f"distinct{n}": {who: distinct_n(texts[who], n) for who in SIDES} for n in (1, 2)},
        "repetition": {who: compute_repetition(texts[who]) for who in SIDES},
        "most_risen_word": asdict(most_risen(*texts.values())),
        "eos_rate": both("ended"),
        "empty_rate": empty,
    }


def measure_kl(sampling: Sampling, policy: System, ref: System, rollout: Rollout) -> list[float]:
    """Return the one-sample estimate of the sequence KL(policy || ref) of each of the policy's answers, in nats.

    Raises:
        InputError: a logprob is not finite.
    """
    assert policy.base is not None
    assert ref.base is not None
    on_one_base = (policy.base.digest, policy.method) == (ref.base.digest, ref.method)
    logprobs: dict[str, torch.Tensor] = {}
    for system in (ref, policy):
        actors = load_actors(sampling, [policy, ref] if on_one_base else [system])
        with torch.no_grad(), actors[system.name].use() as model:
            there = rollout.to(next(model.parameters()).device)
            logprobs[system.name] = compute_in_chunks(
                lambda part, model=model: response_logprobs(model, part, sampling.temperature)[0].sum(-1),
                there,
                MEASURED_AT_ONCE,
            )
        if count := count_not_finite(logprobs[system.name]):
            problem = f"{count} answers have logprobs that are no numbers under {system.field}"
            raise diverged(problem, None, sampling.dtype_setting)
    return (logprobs[policy.name] - logprobs[ref.name]).tolist()


def build_samples(task: TaskAnswers, scored: Scored, kl: Sequence[float], seen: TrainedQuestions) -> list[Sample]:
    """Return both answers to every prompt with their scores.

    Args:
        kl: of each of the policy's answers, see `measure_kl`.
        seen: what the policy was trained on.
    """
    names = dict(zip(SIDES, reversed([*scored.said]), strict=True))
    lengths = {name: rollout.lengths_B.tolist() for name, rollout in task.rollouts.items()}
    samples: list[Sample] = []
    for i, item in enumerate(task.items):
        answers: dict[str, Any] = {}
        for who, name in names.items():
            said = scored.said[name][i]
            greedy = task.greedy[name][i] if name in task.greedy else None
            answers |= {who: said.text, f"score_{who}": said.score, f"length_{who}": lengths[name][i]}
            answers |= {f"ended_{who}": bool(said.ended), f"reasoning_{who}": said.reasoning, f"greedy_{who}": greedy}
        asked = item.prompt.messages
        samples.append(Sample(item.cluster, asked, kl=kl[i], seen=seen.asks(asked) or None, **answers))
    return samples


def summarise_unseen(samples: Sequence[Sample], role: str) -> dict[str, Any]:
    """Return how many prompts training saw, and the figures of a gain on the others. Empty if it saw none."""
    unseen = [sample for sample in samples if not sample.seen]
    if len(unseen) == len(samples):
        return {}
    summary = summarise(unseen, role) if unseen else {}
    figures = {"unseen": {"win_rate": summary["win_rate"], "gain": summary[role]["difference"]}} if unseen else {}
    return {"seen": len(samples) - len(unseen), **figures}


def write_samples(path: Path, samples: Iterable[Sample]) -> Path:
    """One JSON object a line, in order, written at once.

    Floats keep every digit (`repr`), which is what makes the recomputed figures exact.
    """
    with atomic_file(path) as file:
        for sample in samples:
            line = json.dumps(sample.as_dict(), ensure_ascii=False, allow_nan=False) + "\n"
            # Lone surrogates, which a broken tokenizer can emit, must survive the round trip.
            file.write(line.encode("utf-8", "surrogatepass"))
    return path


def read_samples(path: Path) -> list[Sample]:
    """Read the samples that `write_samples` wrote."""
    # Lines end with "\n" alone: str.splitlines would also break at U+2028, which a model may well write.
    with open_text(path, errors="surrogatepass", newline="\n") as lines:
        return [Sample.of(json.loads(line)) for line in lines]
