"""What PPO looks at while it trains: held-out prompts, tripwires, and what it hands to a person."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, tensor

from align.config.ppo import PpoConfig, TripwireConfig
from align.config.root import Config
from align.evals.text import repetition
from align.models.chunks import in_chunks
from align.ops.kl import kl_k1
from align.ops.moments import Moments
from align.ppo.experience import Experience, shaped_scores
from align.ppo.state import Best
from align.ppo.tripwires import WIRES
from align.run import Run, json_digest
from align.stages import open_store
from align.stages.actors import Actors, Answers
from align.types import Rollout
from annotate.store import Candidate, storable
from reward.combined import Ensemble


def evaluate(
    actors: Actors, answers: Answers, moments: Moments, stage: PpoConfig, temperature: float, shaping: Mapping[str, Any]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The policy by its answers to the held-out prompts.

    Returns:
        `held_out_score`, `held_out_kl` and `held_out_objective`, which is the score less the run's first `kl_coef`
        times the KL; and the first few answers.
    """

    def kl(part: Rollout) -> Tensor:
        own, ref = (actors.roles.logprobs(r, part, temperature).logprobs_BT for r in ("policy", "reference"))
        return kl_k1(own, ref).sum(-1)

    raw, _ = actors.score(answers)
    score = float(shaped_scores(raw, answers.rollout, moments, **shaping).mean())
    nats = float(in_chunks(kl, answers.rollout, stage.micro_batch).mean())
    shown = list(zip(answers.prompts, answers.texts, raw.tolist(), strict=True))[: stage.shown]
    return (
        {"held_out_score": score, "held_out_kl": nats, "held_out_objective": score - stage.kl_coef * nats},
        [{"prompt": p.conversation.messages[-1].content, "answer": text, "score": s} for p, text, s in shown],
    )


def better(best: Best | None, step: int, objective: float, actors: Actors) -> Best:
    """The best policy so far, now that the present one has reached `objective`."""
    if best and not objective > best.objective:
        return best
    return Best(step, objective, tuple(p.detach().clone() for p in actors.roles.parameters_of("policy")))


def stops(tripped: Mapping[str, str], stage: PpoConfig) -> bool:
    """Whether what was tripped ends the run."""
    return bool(tripped) and stage.tripwires.action == "stop"


def warn(tripped: Mapping[str, str], step: int, strikes: Mapping[str, int], wires: TripwireConfig) -> None:
    """Say what a wire has found, once, as its patience ends."""
    for name, told in tripped.items():
        if strikes[name] == wires.patience:
            print(f"update {step}: {told}, for {strikes[name]} updates in a row")


def per_answer(
    wires: Iterable[str], actors: Actors, answers: Answers, scores_B: Tensor, made: Experience, config: Config
) -> dict[str, list[float]]:
    """What each answer adds to the figure that each of these wires reads. That figure is the mean over answers, but for
    two: `repetition` passes over answers of a word or two, which have 0 here; and the update measured the entropy token
    by token as the policy moved, where it is that of the present policy here.

    Args:
        scores_B: what the answers are worth, shaped.
        made: of these answers.
    """
    rollout = answers.rollout

    def entropy(part: Rollout) -> Tensor:
        output = actors.roles.logprobs("policy", part, config.rollout.temperature)
        return output.entropy_BT.sum(-1) / part.lengths_B

    def figure(wire: str) -> Tensor:
        match wire:
            case "length_correlation":
                pair = scores_B, rollout.lengths_B.float()
                score_B, length_B = (Moments.of(x).standardised(x) for x in pair)
                return (score_B * length_B).nan_to_num()  # where one of them does not vary, nothing follows it
            case "disagreement":
                assert isinstance(actors.scorer, Ensemble)  # nothing else measures it
                return actors.scorer.member_scores(answers.conversations, rollout).std(1, unbiased=False)
            case "kl":
                return kl_k1(made.old_logprobs_BT, made.ref_logprobs_BT).sum(-1)
            case "entropy":
                return in_chunks(entropy, rollout, config.stage.micro_batch)
            case "repetition":
                return tensor([repetition([text]) for text in answers.texts])
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


def send_to_annotators(
    run: Run, config: Config, actors: Actors, answers: Answers, raw_B: Tensor, step: int,
    figures: Mapping[str, Sequence[float]],
) -> None:  # fmt: skip
    """Put the answers of a batch that show most of what tripped its wires into the annotation store, each beside an
    answer of the reference to the same prompt: there the reward model is most likely wrong, and a person's verdict is
    the pair that it lacks.

    Args:
        raw_B: the scores of the reward.
        figures: what `per_answer` found.
    """
    order = ranked(figures, raw_B.tolist())
    worst_of = {answers.prompts[i].conversation: i for i in reversed(order)}  # of each prompt the worst alone
    chosen = sorted(worst_of.values(), key=order.index)[: config.stage.tripwires.suspects]
    before = actors.sample("reference", [answers.prompts[i] for i in chosen], "suspects")
    before_B, _ = actors.score(before)
    name, digest = run.name, run.base.digest
    key = f"{name}/{json_digest(run.manifest.identity)[:8]}/{step}"  # another run of that name asks other things

    def candidate(given: Answers, scores_B: Tensor, i: int, **told: Any) -> Candidate:
        sampling = {"run": name, "temperature": config.rollout.temperature, "score": float(scores_B[i]), **told}
        return Candidate(storable(given.texts[i]), digest, sampling=sampling, ended=bool(given.rollout.ended_B[i]))

    with open_store(config) as store, store.transaction():
        for k, i in enumerate(chosen):
            wires = {wire: found[i] for wire, found in figures.items()}
            pair = [
                candidate(answers, raw_B, i, role="policy", wires=wires),
                candidate(before, before_B, k, role="reference"),
            ]
            store.add_item(config.project, f"{key}/suspect/{k}", answers.prompts[i].conversation, pair)
    print(f"{len(chosen)} suspicious answers wait in project {config.project} for a person's verdict")
