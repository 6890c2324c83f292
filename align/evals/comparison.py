"""A policy against what it started from, on the same prompts: the record of each answer, and the figures over all.

`samples.jsonl` is the evidence and `metrics.json` follows from it: `summarise(read_samples(path))` gives the very same
figures again, so whoever doubts a win rate can recompute it, or read the answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from align.data.ngrams import repetition
from align.errors import CorruptFile, MissingArtifact
from align.evals.collapse import SystemAnswers, measure_collapse
from align.evals.stats import per_prompt, win_rate
from align.evals.text import distinct_n, most_risen
from align.files import has_file, open_text
from align.ops.intervals import mean, proportion
from align.outputs import atomic_file
from align.types import Message


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
        greedy_ref, greedy_policy: the two answers that take the likeliest token everywhere. None in older files.
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

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError(f"sample {self.prompt_id!r} has no prompt")
        for name in ("score_ref", "score_policy", "kl"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} of sample {self.prompt_id!r} is not finite")
        for name in ("length_ref", "length_policy"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} of sample {self.prompt_id!r} is negative")

    def as_dict(self) -> dict[str, Any]:
        """One object of `samples.jsonl`."""
        row = {f.name: getattr(self, f.name) for f in fields(self)} | {"prompt": [m.as_dict() for m in self.prompt]}
        return {name: value for name, value in row.items() if value is not None}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Sample:
        """The inverse of `as_dict`; types are coerced, so numpy and torch scalars may come in too.

        Raises:
            KeyError, TypeError, ValueError: a field is missing or holds something else.
        """
        return cls(
            prompt_id=str(record["prompt_id"]),
            prompt=tuple(map(Message.of, record["prompt"])),
            ref=str(record["ref"]),
            policy=str(record["policy"]),
            score_ref=float(record["score_ref"]),
            score_policy=float(record["score_policy"]),
            length_ref=int(record["length_ref"]),
            length_policy=int(record["length_policy"]),
            ended_ref=bool(record["ended_ref"]),
            ended_policy=bool(record["ended_policy"]),
            kl=float(record["kl"]),
            **{
                name: record.get(name)
                for name in ("reasoning_ref", "reasoning_policy", "seen", "greedy_ref", "greedy_policy")
            },
        )


def summarise(samples: Sequence[Sample], role: str = "gold") -> dict[str, Any]:
    """The layout of `metrics.json`.

    Each figure with an interval is a mean over prompts of the prompt's mean over its answers: the win rate has
    Wilson's, the others Student's, or none where all prompts have one value.

    Args:
        role: what the judge's scores are called, `gold` or `proxy`.

    Returns:
        `win_rate` and `gold.difference` (policy minus reference) as `{value, low, high, n}`; `gold`, `length` (mean
        tokens), `distinct1`, `distinct2`, `repetition`, `eos_rate` and `empty_rate` for `ref` and `policy`;
        `most_risen_word` with the share of answers that hold it; `kl`, the mean sequence KL in nats, and `kl_interval`;
        `variety` and `collapse`, see `compare_variety`. n counts prompts.

    Raises:
        ValueError: there are no samples.
    """
    if not samples:
        raise ValueError("no samples to summarise: at least one prompt must be answered")
    ids = [s.prompt_id for s in samples]
    score_ref = np.array([s.score_ref for s in samples])
    score_policy = np.array([s.score_policy for s in samples])

    won = proportion(per_prompt(ids, win_rate(score_policy, score_ref)))
    # Paired: a prompt's difficulty cancels out.
    gained = mean(per_prompt(ids, score_policy) - per_prompt(ids, score_ref))
    kl = mean(per_prompt(ids, [s.kl for s in samples]))

    def both(ref: Iterable[float], policy: Iterable[float]) -> dict[str, float]:
        means = (float(per_prompt(ids, list(values)).mean()) for values in (ref, policy))
        return dict(zip(("ref", "policy"), means, strict=True))

    return {
        "win_rate": won.as_dict(),
        role: both(score_ref, score_policy) | {"difference": gained.as_dict()},
        "kl": kl.value,
        "kl_interval": kl.as_dict(),
        "length": both((s.length_ref for s in samples), (s.length_policy for s in samples)),
        **{
            f"distinct{n}": {
                "ref": distinct_n([s.ref for s in samples], n),
                "policy": distinct_n([s.policy for s in samples], n),
            }
            for n in (1, 2)
        },
        "repetition": {"ref": repetition([s.ref for s in samples]), "policy": repetition([s.policy for s in samples])},
        "most_risen_word": asdict(most_risen([s.ref for s in samples], [s.policy for s in samples])),
        "eos_rate": both((s.ended_ref for s in samples), (s.ended_policy for s in samples)),
        "empty_rate": both((not s.ref.strip() for s in samples), (not s.policy.strip() for s in samples)),
        **compare_variety(samples),
    }


def prompt_text(messages: Iterable[Message]) -> str:
    """Return what a prompt says, system prompts left out."""
    return " ".join(message.content for message in messages if message.role != "system")


def compare_variety(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return how much both systems' answers vary between distinct prompts, greedy and sampled, and the verdict on the
    policy, see `align.evals.collapse.measure_collapse`. Nothing if there are no greedy answers."""
    rows = [sample for sample in samples if sample.greedy_policy is not None]
    if not rows:
        return {}
    policy = SystemAnswers([row.policy for row in rows], [row.greedy_policy or "" for row in rows])
    ref = SystemAnswers([row.ref for row in rows], [row.greedy_ref or "" for row in rows])
    return measure_collapse([prompt_text(row.prompt) for row in rows], policy, ref).as_dict()


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
    """The samples that `write_samples` wrote.

    Raises:
        MissingArtifact: there is no such file.
        CorruptFile: a line is not a sample; it is named by number.
    """
    if not has_file(path, "samples"):
        raise MissingArtifact("samples", str(path), "there is no such file", "Run `python -m align stage=eval` first.")
    samples = []
    # Lines end with "\n" alone: str.splitlines would also break at U+2028, which a model may well write.
    with open_text(path, errors="surrogatepass", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            try:
                samples.append(Sample.of(json.loads(line)))
            except (KeyError, TypeError, ValueError) as error:
                raise CorruptFile(
                    "samples",
                    f"{path}:{number}",
                    f"is not a sample ({type(error).__name__}: {error})",
                    "Evaluate again: python -m align stage=eval resume=never.",
                ) from error
    return samples
