"""What PPO looks at while it trains: held-out prompts, tripwires, and what it hands to a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from align.config.ppo import PpoConfig, TripwireConfig
from align.config.root import Config
from align.models.chunks import in_chunks
from align.ops.kl import kl_k1
from align.ops.moments import Moments
from align.ppo.experience import earned
from align.ppo.state import Best
from align.run import Run, json_digest
from align.stages import open_store
from align.stages.cast import Answers, Cast
from align.types import Rollout
from annotate.store import Candidate


def evaluate(
    players: Cast, answers: Answers, moments: Moments, stage: PpoConfig, temperature: float, price: Mapping[str, Any]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The policy by its answers to the held-out prompts.

    Returns:
        `held_out_score`, `held_out_kl` and `held_out_objective`, which is the score less the run's first `kl_coef`
        times the KL; and the first few answers.
    """

    def kl(part: Rollout) -> Tensor:
        own, ref = (players.roles.logprobs(r, part, temperature).logprobs_BT for r in ("policy", "reference"))
        return kl_k1(own, ref).sum(-1)

    raw, _ = players.judge(answers)
    score = float(earned(raw, answers.rollout, moments, **price).mean())
    nats = float(in_chunks(kl, answers.rollout, stage.micro_batch).mean())
    shown = list(zip(answers.prompts, answers.texts, raw.tolist(), strict=True))[: stage.shown]
    return (
        {"held_out_score": score, "held_out_kl": nats, "held_out_objective": score - stage.kl_coef * nats},
        [{"prompt": p.conversation.messages[-1].content, "answer": text, "score": s} for p, text, s in shown],
    )


def better(best: Best | None, step: int, objective: float, players: Cast) -> Best:
    """The best policy so far, now that the present one has reached `objective`."""
    if best and not objective > best.objective:
        return best
    return Best(step, objective, tuple(p.detach().clone() for p in players.roles.parameters_of("policy")))


def stops(tripped: Mapping[str, str], stage: PpoConfig) -> bool:
    """Whether what was tripped ends the run."""
    return bool(tripped) and stage.tripwires.action == "stop"


def warn(tripped: Mapping[str, str], step: int, strikes: Mapping[str, int], wires: TripwireConfig) -> None:
    """Say what a wire has found, once, as its patience ends."""
    for name, told in tripped.items():
        if strikes[name] == wires.patience:
            print(f"update {step}: {told}, for {strikes[name]} updates in a row")


def hand_over(run: Run, config: Config, players: Cast, answers: Answers, raw_B: Tensor, step: int, most: int) -> None:
    """Put the most highly scored answers of a batch into the annotation store, each beside an answer of the reference
    to the same prompt: what the reward model likes most is where it is most likely wrong, and a person's verdict on
    it is the pair that it lacks."""
    ranked = raw_B.argsort(descending=True, stable=True).tolist()
    best_of = {answers.prompts[i].conversation: i for i in reversed(ranked)}  # of each prompt the highest alone
    chosen = sorted(best_of.values(), key=ranked.index)[:most]
    before = players.sample("reference", [answers.prompts[i] for i in chosen], "suspects")
    name, digest = run.manifest["name"], run.manifest["base"]["digest"]
    key = f"{name}/{json_digest(run.manifest['identity'])[:8]}/{step}"  # another run of that name asks other things

    def candidate(given: Answers, i: int, role: str) -> Candidate:
        sampling = {"run": name, "role": role, "temperature": config.rollout.temperature}
        return Candidate(given.texts[i], digest, sampling=sampling, ended=bool(given.rollout.ended_B[i]))

    with open_store(config) as store, store.transaction():
        for k, i in enumerate(chosen):
            pair = [candidate(answers, i, "policy"), candidate(before, k, "reference")]
            store.add_item(config.project, f"{key}/suspect/{k}", answers.prompts[i].conversation, pair)
    print(f"{len(chosen)} suspicious answers wait in project {config.project} for a person's verdict")
