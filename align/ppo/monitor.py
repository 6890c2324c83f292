"""Monitoring of a PPO run: held-out prompts, tripwires on its metrics, and suspicious answers for annotators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, tensor

from align.annotate.store import Candidate, replace_unwritable
from align.core.types import Conversation, Rollout
from align.data.ngrams import compute_repetition, tokenize_words
from align.models.forward import compute_in_chunks
from align.ops.kl import kl_k1
from align.ops.moments import Moments
from align.ppo.checkpoint import Best
from align.ppo.experience import Experience, shape_scores
from align.ppo.workers import Answers, Workers
from align.reward.combined import Ensemble
from align.rollout.strip_reasoning import build_sample_row


class Wire(NamedTuple):
    """A tripwire: a metric that is suspicious above or below a limit, with its meaning.

    Attributes:
        figure: name of the figure that it reads.
        too_high: whether high values are suspicious; else low ones are.
        meaning: what crossing it says about the run.
    """

    figure: str
    too_high: bool
    meaning: str


WIRES = {
    "length_correlation": Wire("score_length_correlation", True, "the score follows the length of the answer"),
    "disagreement": Wire("disagreement", True, "the members of the ensemble disagree"),
    "kl": Wire("kl", True, "the policy is further from the reference than stage.tripwires.kl allows"),
    "entropy": Wire("entropy", False, "the policy's answers to a prompt are nearly the same"),
    "repetition": Wire("repetition", True, "answers repeat themselves"),
    "collapse": Wire("collapse", True, "greedy answers to held-out prompts are nearly alike"),
}
AT_ONCE = ("collapse",)
"""Tripwires that trip at once instead of after several updates, because their metrics are not measured at every
update."""


def find_crossed_wires(figures: Mapping[str, float], limits: Mapping[str, float | None]) -> dict[str, str]:
    """Return a message for each tripwire whose limit an update's metrics cross, as tripwire → message.

    Args:
        figures: of one update.
        limits: wire → limit; None for a wire that is not checked.
    """
    messages = {}
    for name, limit in limits.items():
        wire = WIRES[name]
        if limit is None or wire.figure not in figures:
            continue
        value = figures[wire.figure]
        if value > limit if wire.too_high else value < limit:
            side = "above" if wire.too_high else "below"
            messages[name] = f"{name} {value:.3g} is {side} {limit:g}: {wire.meaning}"
    return messages


def find_tripped_wires(
    rows: Sequence[Mapping[str, float]], limits: Mapping[str, float | None], patience: int
) -> list[str]:
    """Return the sorted names of the tripwires that tripped at any update of a run. A tripwire trips when its limit is
    crossed in enough consecutive updates."""
    strikes: dict[str, int] = {}
    tripped: set[str] = set()
    for row in rows:
        strikes = count_strikes(strikes, find_crossed_wires(row, limits))
        tripped |= {name for name, count in strikes.items() if count >= get_needed_strikes(name, patience)}
    return sorted(tripped)


def get_needed_strikes(name: str, patience: int) -> int:
    """Return how many consecutive updates must cross a tripwire's limit before it trips: 1 for those in `AT_ONCE`, else
    `patience`."""
    return 1 if name in AT_ONCE else patience


def count_strikes(strikes: Mapping[str, int], crossed: Iterable[str]) -> dict[str, int]:
    """Add one to the count of consecutive updates of each tripwire in `crossed`, and drop the other tripwires.

    Args:
        strikes: the counts before this update.
    """
    return {name: strikes.get(name, 0) + 1 for name in crossed}


def evaluate_held_out(
    workers: Workers,
    answers: Answers,
    moments: Moments,
    shaping: Mapping[str, Any],
    *,
    kl_coef: float,
    temperature: float,
    micro_batch: int,
    sample_count: int,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the policy's mean score, KL and objective on its answers to the held-out prompts, and sample rows to
    display.

    Args:
        moments, shaping: arguments of `shape_scores`.

    Returns:
        `held_out_score`, `held_out_kl` in nats, and `held_out_objective`, the score less `kl_coef` times the KL; and
        the first `sample_count` answers.
    """

    def kl_of(part: Rollout) -> Tensor:
        logprobs_BT = workers.roles.logprobs("policy", part, temperature).logprobs_BT
        ref_logprobs_BT = workers.roles.logprobs("reference", part, temperature).logprobs_BT
        return kl_k1(logprobs_BT, ref_logprobs_BT).sum(-1)

    raw_B, _ = workers.score(answers)
    score = float(shape_scores(raw_B, answers.rollout, moments, **shaping).mean())
    kl = float(compute_in_chunks(kl_of, answers.rollout, micro_batch).mean())
    columns = answers.prompts, answers.judged_texts, answers.judged.reasoning, raw_B.tolist()
    samples = [
        build_sample_row(prompt.conversation, text, reasoning, score=raw)
        for prompt, text, reasoning, raw in list(zip(*columns, strict=True))[:sample_count]
    ]
    return {"held_out_score": score, "held_out_kl": kl, "held_out_objective": score - kl_coef * kl}, samples


def choose_best(best: Best | None, step: int, objective: float, workers: Workers) -> Best:
    """Return the best policy so far, or a copy of the current one if its held-out `objective` is higher or there is
    none yet."""
    if best and not objective > best.objective:
        return best
    return Best(step, objective, workers.copy_policy_weights())


def compare_with_start(rows: Iterable[Mapping[str, Any]], published: int) -> dict[str, Any]:
    """Return held-out metrics of the published policy and of the policy before the first update, for comparison.

    Returns nothing if one of them was not measured.

    Args:
        rows: of the metrics stream.
        published: number of updates before the published policy.
    """
    measured = {row["step"]: row for row in rows if "held_out_objective" in row}
    if not {0, published} <= measured.keys():
        return {}
    before = measured[0]
    after = measured[published]
    return {
        "objective_before": before["held_out_objective"],
        "objective_after": after["held_out_objective"],
        "beats_start": after["held_out_objective"] > before["held_out_objective"],
        "held_out_score_before": before["held_out_score"],
        "held_out_score_after": after["held_out_score"],
        "published_kl": after["held_out_kl"],
    }


def print_warnings(tripped: Mapping[str, str], step: int, strikes: Mapping[str, int], patience: int) -> None:
    """Print a warning for each tripwire at the update at which it trips, and not again at later updates in a row."""
    for name, message in tripped.items():
        if name in AT_ONCE:
            print(f"update {step}: {message}")
        elif strikes[name] == patience:
            print(f"update {step}: {message}, for {strikes[name]} updates in a row")


def measure_answers(
    wires: Iterable[str],
    workers: Workers,
    answers: Answers,
    scores_B: Tensor,
    experience: Experience,
    *,
    temperature: float,
    micro_batch: int,
) -> dict[str, list[float]]:
    """Measure how much each answer contributes to the metric of each tripwire, as tripwire → one value per answer.

    The figure is the mean over the answers, with two exceptions: `repetition` leaves out answers of a word or two,
    which have 0 here; and the entropy is that of the present policy, while the update measured it as the policy moved.

    Args:
        scores_B: the shaped scores of the answers.
        experience: of these answers.
    """
    rollout = answers.rollout

    def entropy_of(part: Rollout) -> Tensor:
        output = workers.roles.logprobs("policy", part, temperature)
        return output.entropy_BT.sum(-1) / part.lengths_B

    def measure(wire: str) -> Tensor:
        match wire:
            case "length_correlation":
                lengths_B = rollout.lengths_B.float()
                score_B = Moments.from_values(scores_B).standardise(scores_B)
                length_B = Moments.from_values(lengths_B).standardise(lengths_B)
                return (score_B * length_B).nan_to_num()  # a constant correlates with nothing
            case "disagreement":
                assert isinstance(workers.scorer, Ensemble)  # no other scorer has the figure
                scores = workers.scorer.member_scores(answers.conversations, answers.judged.rollout)
                return scores.std(1, unbiased=False)
            case "kl":
                return kl_k1(experience.old_logprobs_BT, experience.ref_logprobs_BT).sum(-1)
            case "entropy":
                return compute_in_chunks(entropy_of, rollout, micro_batch)
            case "repetition":
                return tensor([compute_repetition([text]) for text in answers.texts])
            case "collapse":
                keys = [" ".join(tokenize_words(text)) for text in answers.texts]
                counts = Counter(keys)
                return tensor([counts[key] / len(keys) for key in keys])
        raise ValueError(wire)

    return {wire: measure(wire).tolist() for wire in wires}


def rank_answers(figures: Mapping[str, Sequence[float]], scores: Sequence[float]) -> list[int]:
    """Return the indices of the answers, the most suspicious first. They are ordered by the sum of their ranks under
    each tripwire, then by score, highest first.

    Args:
        figures: wire → figure of each answer.
        scores: of the reward.
    """
    total = [0] * len(scores)
    for wire, values in figures.items():
        sign = -1 if WIRES[wire].too_high else 1
        order = sorted(range(len(scores)), key=lambda i: (sign * values[i], -scores[i]))
        for rank, i in enumerate(order):
            total[i] += rank
    return sorted(range(len(scores)), key=lambda i: (total[i], -scores[i]))


def select_suspects(
    workers: Workers,
    answers: Answers,
    raw_B: Tensor,
    figures: Mapping[str, Sequence[float]],
    count: int,
    *,
    digest: str,
    **sampling: Any,
) -> list[tuple[Conversation, list[Candidate]]]:
    """Return pairs for annotators of the most suspicious policy answers, each with the reference's answer to the same
    prompt.

    The reward model is most likely wrong about these pairs, so that a person's judgement of them is what it lacks.

    Args:
        raw_B: the scores of the reward.
        figures: result of `measure_answers`.
        count: largest number of prompts.
        digest: of the base.
        sampling: recorded with every candidate.
    """
    order = rank_answers(figures, raw_B.tolist())
    worst_of = {answers.prompts[i].conversation: i for i in reversed(order)}  # one answer a prompt
    suspects = sorted(worst_of.values(), key=order.index)[:count]
    references = workers.sample("reference", [answers.prompts[i] for i in suspects], "suspects")
    reference_B, _ = workers.score(references)

    def build_candidate(source: Answers, scores_B: Tensor, i: int, **more: Any) -> Candidate:
        recorded = {**sampling, "score": float(scores_B[i]), **more}
        text = replace_unwritable(source.judged_texts[i])
        return Candidate(text, digest, sampling=recorded, ended=bool(source.rollout.ended_B[i]))

    pairs = []
    for k, i in enumerate(suspects):
        wires = {wire: values[i] for wire, values in figures.items()}
        policy = build_candidate(answers, raw_B, i, role="policy", wires=wires)
        prompt = replace(answers.prompts[i].conversation, messages=answers.conversations[i].messages[:-1])
        pairs.append((prompt, [policy, build_candidate(references, reference_B, k, role="reference")]))
    return pairs
