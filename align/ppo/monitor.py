"""What PPO looks at while it trains: held-out prompts, tripwires, and what a person should see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, tensor

from align.annotate.store import Candidate, storable
from align.core.types import Conversation, Rollout
from align.data.ngrams import repetition, words
from align.models.chunks import in_chunks
from align.ops.kl import kl_k1
from align.ops.moments import Moments
from align.ppo.checkpoint import Best
from align.ppo.experience import Experience, shaped_scores
from align.ppo.workers import Answers, Workers
from align.reward.combined import Ensemble
from align.rollout.strip_reasoning import sample_row


class Wire(NamedTuple):
    """One sign: the figure it reads, whether it is too high or too low that is suspicious, and what it says then."""

    figure: str
    too_high: bool
    meaning: str


WIRES = {
    "length_correlation": Wire("score_length_correlation", True, "the score follows the length of the answer"),
    "disagreement": Wire("disagreement", True, "the members of the ensemble contradict each other"),
    "kl": Wire("kl", True, "the policy has gone further from the reference than its budget"),
    "entropy": Wire("entropy", False, "the policy says nearly the same whatever is drawn"),
    "repetition": Wire("repetition", True, "answers repeat themselves"),
    "collapse": Wire("collapse", True, "greedy answers to held-out prompts are nearly alike"),
}
AT_ONCE = ("collapse",)
"""Wires that trip without patience: their figures are not measured at every update."""


def crossed(figures: Mapping[str, float], limits: Mapping[str, float | None]) -> dict[str, str]:
    """Which wires this update crosses, each with what to tell of it.

    Args:
        figures: of one update.
        limits: by the name of the wire; None where it is not stretched.
    """
    messages = {}
    for name, limit in limits.items():
        wire = WIRES[name]
        if limit is None or wire.figure not in figures:
            continue
        found = figures[wire.figure]
        if found > limit if wire.too_high else found < limit:
            side = "above" if wire.too_high else "below"
            messages[name] = f"{name} {found:.3g} is {side} {limit:g}: {wire.meaning}"
    return messages


def tripped_in(rows: Sequence[Mapping[str, float]], limits: Mapping[str, float | None], patience: int) -> list[str]:
    """Every wire that was crossed for `patience` updates in a row somewhere in these figures, one row an update."""
    strikes: dict[str, int] = {}
    found: set[str] = set()
    for row in rows:
        strikes = strikes_after(strikes, crossed(row, limits))
        found |= {name for name, count in strikes.items() if count >= strikes_needed(name, patience)}
    return sorted(found)


def strikes_needed(name: str, patience: int) -> int:
    """Return how many updates in a row must cross a wire before it trips."""
    return 1 if name in AT_ONCE else patience


def strikes_after(strikes: Mapping[str, int], crossed_now: Mapping[str, str]) -> dict[str, int]:
    """How many updates in a row each wire has been crossed."""
    return {name: strikes.get(name, 0) + 1 for name in crossed_now}


def evaluate(
    workers: Workers, answers: Answers, moments: Moments, shaping: Mapping[str, Any], *,
    kl_coef: float, temperature: float, micro_batch: int, shown: int,
) -> tuple[dict[str, float], list[dict[str, Any]]]:  # fmt: skip
    """The policy by its answers to the held-out prompts.

    Args:
        moments, shaping: what `shaped_scores` takes.

    Returns:
        `held_out_score`, `held_out_kl` and `held_out_objective`, which is the score less `kl_coef` times the KL; and
        the first `shown` answers.
    """

    def kl(part: Rollout) -> Tensor:
        own, ref = (workers.roles.logprobs(r, part, temperature).logprobs_BT for r in ("policy", "reference"))
        return kl_k1(own, ref).sum(-1)

    raw, _ = workers.score(answers)
    score = float(shaped_scores(raw, answers.rollout, moments, **shaping).mean())
    nats = float(in_chunks(kl, answers.rollout, micro_batch).mean())
    first = list(zip(answers.prompts, answers.read, answers.judged.reasoning, raw.tolist(), strict=True))[:shown]
    return (
        {"held_out_score": score, "held_out_kl": nats, "held_out_objective": score - kl_coef * nats},
        [sample_row(prompt.conversation, text, thought, score=s) for prompt, text, thought, s in first],
    )


def better(best: Best | None, step: int, objective: float, workers: Workers) -> Best:
    """The best policy so far, now that the present one has reached `objective`; its weights lie on the CPU."""
    if best and not objective > best.objective:
        return best
    return Best(step, objective, workers.policy())


def beside_start(rows: Iterable[Mapping[str, Any]], published: int) -> dict[str, Any]:
    """The published policy on the held-out prompts, beside the start; nothing where one of them was not measured.

    Args:
        rows: of the metrics stream.
        published: after how many updates it stood.
    """
    found = {row["step"]: row for row in rows if "held_out_objective" in row}
    if not {0, published} <= found.keys():
        return {}
    before, after = found[0], found[published]
    return {
        "objective_before": before["held_out_objective"], "objective_after": after["held_out_objective"],
        "beats_start": after["held_out_objective"] > before["held_out_objective"],
        "held_out_score_before": before["held_out_score"], "held_out_score_after": after["held_out_score"],
        "published_kl": after["held_out_kl"],
    }  # fmt: skip


def warn(tripped: Mapping[str, str], step: int, strikes: Mapping[str, int], patience: int) -> None:
    """Say what a wire has found, once, as its patience ends."""
    for name, figure in tripped.items():
        if name in AT_ONCE:
            print(f"update {step}: {figure}")
        elif strikes[name] == patience:
            print(f"update {step}: {figure}, for {strikes[name]} updates in a row")


def per_answer(
    wires: Iterable[str], workers: Workers, answers: Answers, scores_B: Tensor, made: Experience, *,
    temperature: float, micro_batch: int,
) -> dict[str, list[float]]:  # fmt: skip
    """What each answer adds to the figure that each of these wires reads. That figure is the mean over answers, but for
    two: `repetition` passes over answers of a word or two, which have 0 here; and the update measured the entropy token
    by token as the policy moved, where it is that of the present policy here.

    Args:
        scores_B: what the answers are worth, shaped.
        made: of these answers.
    """
    rollout = answers.rollout

    def entropy(part: Rollout) -> Tensor:
        output = workers.roles.logprobs("policy", part, temperature)
        return output.entropy_BT.sum(-1) / part.lengths_B

    def figure(wire: str) -> Tensor:
        match wire:
            case "length_correlation":
                pair = scores_B, rollout.lengths_B.float()
                score_B, length_B = (Moments.of(x).standardised(x) for x in pair)
                return (score_B * length_B).nan_to_num()  # where one of them does not vary, nothing follows it
            case "disagreement":
                assert isinstance(workers.scorer, Ensemble)  # nothing else measures it
                scores = workers.scorer.member_scores(answers.conversations, answers.judged.rollout)
                return scores.std(1, unbiased=False)
            case "kl":
                return kl_k1(made.old_logprobs_BT, made.ref_logprobs_BT).sum(-1)
            case "entropy":
                return in_chunks(entropy, rollout, micro_batch)
            case "repetition":
                return tensor([repetition([text]) for text in answers.texts])
            case "collapse":
                keys = [" ".join(words(text)) for text in answers.texts]
                counts = Counter(keys)
                return tensor([counts[key] / len(keys) for key in keys])
        raise ValueError(wire)

    return {wire: figure(wire).tolist() for wire in wires}


def ranked(figures: Mapping[str, Sequence[float]], scores: Sequence[float]) -> list[int]:
    """Answers, the most suspicious first: by the sum of their places under each wire, and by the score where that is
    equal.

    Args:
        figures: wire → its figure of each answer, which is suspicious on the wire's own side.
        scores: of the reward.
    """
    total = [0] * len(scores)
    for wire, found in figures.items():
        side = -1 if WIRES[wire].too_high else 1
        order = sorted(range(len(scores)), key=lambda i: (side * found[i], -scores[i]))
        for place, i in enumerate(order):
            total[i] += place
    return sorted(range(len(scores)), key=lambda i: (total[i], -scores[i]))


def suspects(
    workers: Workers, answers: Answers, raw_B: Tensor, figures: Mapping[str, Sequence[float]], count: int, *,
    digest: str, **sampling: Any,
) -> list[tuple[Conversation, list[Candidate]]]:  # fmt: skip
    """The answers of a batch that show most of what tripped its wires, each beside an answer of the reference to the
    same prompt: there the reward model is most likely wrong, and a person's verdict is the pair that it lacks.

    Args:
        raw_B: the scores of the reward.
        figures: what `per_answer` found.
        count: so many prompts at the most.
        digest: of the base.
        sampling: what every candidate says of how it came about.
    """
    order = ranked(figures, raw_B.tolist())
    worst_of = {answers.prompts[i].conversation: i for i in reversed(order)}  # of each prompt the worst alone
    chosen = sorted(worst_of.values(), key=order.index)[:count]
    before = workers.sample("reference", [answers.prompts[i] for i in chosen], "suspects")
    before_B, _ = workers.score(before)

    def candidate(given: Answers, scores_B: Tensor, i: int, **more: Any) -> Candidate:
        recorded = {**sampling, "score": float(scores_B[i]), **more}
        return Candidate(storable(given.read[i]), digest, sampling=recorded, ended=bool(given.rollout.ended_B[i]))

    pairs = []
    for k, i in enumerate(chosen):
        wires = {wire: found[i] for wire, found in figures.items()}
        policy = candidate(answers, raw_B, i, role="policy", wires=wires)
        asked = replace(answers.prompts[i].conversation, messages=answers.conversations[i].messages[:-1])
        pairs.append((asked, [policy, candidate(before, before_B, k, role="reference")]))
    return pairs
