"""PPO on an adapter: policy, value, reward and reference are four adapters on one base.

    for each update:
        responses from the policy; a score for each; logprobs of policy and reference, values
        rewards = −kl_coef · KL at every token, + score at the last;  advantages by GAE
        for each epoch, each minibatch: one step on the clipped policy loss and the value loss

Ziegler et al. (2019); Huang et al., "The N+ implementation details of RLHF with PPO" (2024).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.config.ppo import PpoConfig
from align.config.root import Config
from align.data.chat import Prompt, encode_prompts, stop_token_ids
from align.data.sources import data_record, prompts
from align.errors import InputError, require
from align.models.adapters import save_adapter
from align.models.load import choose_device, choose_dtype, context_length, load_base, save_tokenizer
from align.models.roles import Roles
from align.ops.kl import adapted
from align.ppo.experience import experience
from align.ppo.schedule import prompt_indices, warmed_up
from align.ppo.update import update
from align.report import Report, curves
from align.rollout.chunks import in_chunks
from align.rollout.hf import HfEngine
from align.rollout.randomness import generator_for
from align.run import Base, Run, resolve
from align.stages import Inputs, tracker
from align.stages.lineage import adapter_folder, label, method_of, start, tokenizer_of
from align.track import peak_rss_mb, progress
from align.types import Result, Rollout


def inputs(config: Config) -> Inputs:
    artifact, base = start(config)
    root = Path(config.run.root).expanduser()
    reward = resolve(config.reward.ref, root, base.digest, "reward.ref")
    if reward.whole or (reward.base is not None and reward.base.digest != base.digest):
        raise InputError(
            "reward.ref", reward.ref, f"is no reward adapter on the base of {artifact.ref}",
            "Name a reward model that was trained from it: stage=reward with the same init=.",
        )  # fmt: skip
    method_of(reward, config.method.name, "reward.ref")
    records = {"init": artifact.record(), "reward": reward.record(), "data": data_record(config.data)}
    return Inputs(label(base, config), base, records)


def run(run: Run, config: Config) -> Result:
    stage: PpoConfig = config.stage
    device, temperature = choose_device(config.device), config.rollout.temperature
    base = Base(**run.manifest["base"])
    tokenizer, roles, engine, found, dropped = cast(run, config, base, device)
    policy = {"params": roles.parameters_of("policy"), "lr": stage.lr}
    value = {"params": roles.parameters_of("value"), "lr": stage.value_lr}
    optimiser = torch.optim.AdamW([policy, value], weight_decay=stage.weight_decay)

    def score(rollout: Rollout) -> Tensor:
        return in_chunks(roles.scores, rollout, stage.micro_batch)

    def sample(role: Any, chosen: list[int], *where: str | int) -> Rollout:
        with roles.use(role):
            return engine.generate([found[i].input_ids for i in chosen], generator_for(device, config.seed, *where))

    # Scores are standardised once, on reference samples, so that kl_coef keeps its meaning.
    chosen = prompt_indices(0, stage.normalise_on, len(found), config.seed + 1)
    reference_scores = score(sample("reference", chosen, "normalise"))
    shift, scale = reference_scores.mean(), reference_scores.std(unbiased=False)
    require(
        float(scale) > 0, "reward.ref", config.reward.ref, "gives every reference answer the same score",
        "Train the reward model for longer, or on more pairs.",
    )  # fmt: skip

    kl_coef = stage.kl_coef
    with tracker(run, config) as track, progress("ppo", stage.updates) as bar:
        for number in range(stage.updates):
            clock = Clock()

            # Roll out and score.
            chosen = prompt_indices(number, stage.batch_size, len(found), config.seed)
            rollout = sample("policy", chosen, "rollout", number)
            clock.lap("rollout_s")
            raw = score(rollout)
            scores = stage.score_scale * (raw - shift) / scale
            scores = scores - stage.missing_eos_penalty * (~rollout.ended_B).float()

            # Estimate.
            def logprobs_of(role: Any, rollout: Rollout = rollout) -> Tensor:
                return in_chunks(lambda part: roles.logprobs(role, part, temperature)[0], rollout, stage.micro_batch)

            made, figures = experience(
                rollout, scores, logprobs_of("policy"), logprobs_of("reference"),
                in_chunks(roles.values, rollout, stage.micro_batch),
                kl_coef=kl_coef, kl_estimator=stage.kl_estimator, kl_in_reward=stage.kl_in == "reward",
                gamma=stage.gamma, lam=stage.lam, whiten_rewards=stage.whiten_rewards,
                bootstrap_truncated=stage.bootstrap_truncated,
            )  # fmt: skip
            clock.lap("estimate_s")

            # Update.
            factor = warmed_up(number, stage.updates, stage.warmup)
            for group, lr in zip(optimiser.param_groups, (stage.lr, stage.value_lr), strict=True):
                group["lr"] = lr * factor
            learned = update(
                roles, optimiser, made, epochs=stage.epochs, minibatch_count=stage.minibatches,
                max_grad_norm=stage.max_grad_norm,
                generator=generator_for(torch.device("cpu"), config.seed, "minibatches", number),
                micro_batch=stage.micro_batch, temperature=temperature, clip_range=stage.clip_range,
                value_clip_range=stage.value_clip_range,
                kl_loss_coef=kl_coef if stage.kl_in == "loss" else 0.0, kl_estimator=stage.kl_estimator,
            )  # fmt: skip
            clock.lap("update_s")
            track.log(
                number + 1, {**figures, **learned, "raw_score": float(raw.mean()), "kl_coef": kl_coef}, clock.laps
            )
            bar.advance(number + 1, score=figures["score"], kl=figures["kl"], length=figures["length"])
            if stage.kl_control == "adaptive":
                kl_coef = adapted(kl_coef, figures["kl"], stage.kl_target, stage.kl_horizon, stage.batch_size)
        rows = track.rows()

    save_adapter(roles.model, run.artifact, base, "policy")
    save_tokenizer(tokenizer, run.artifact)
    last = rows[-10:]
    metrics = {
        **{f"last_{k}": sum(r[k] for r in last) / len(last) for k in ("score", "kl", "length", "eos_rate", "entropy")},
        "updates": stage.updates, "prompts": len(found), "dropped": dropped,
        "quantised_layers": roles.quantised_layers(),
        "score_mean": float(shift), "score_std": float(scale), "peak_rss_mb": peak_rss_mb(),
    }  # fmt: skip
    draw(run, config, rows, metrics)
    first = rows[0]
    line = f"score {first['score']:.2f} → {metrics['last_score']:.2f} at KL {metrics['last_kl']:.1f} nats"
    return Result(metrics, (line,))


def cast(run: Run, config: Config, base: Base, device: torch.device) -> tuple[Any, Roles, HfEngine, list[Prompt], int]:
    """One base and its four roles, with what they work on.

    Returns:
        tokenizer, roles, the engine that samples from them, the prompts, and how many were dropped as too long.
    """
    artifact, _ = start(config, run.inputs["init"]["path"])
    tokenizer = tokenizer_of(artifact, base, config.data.template)
    model = load_base(base, config.method.name, device, choose_dtype(config.dtype, device))
    stops = stop_token_ids(tokenizer, model.generation_config)
    room = min(config.data.max_length, context_length(model) - config.rollout.max_new_tokens)
    found, dropped = encode_prompts(tokenizer, prompts(config.data, "train", config.seed), room)
    torch.manual_seed(config.seed)  # a fresh adapter's lora_A is random
    reward = Path(run.inputs["reward"]["path"])
    roles = Roles(model, adapter_folder(artifact), reward, (config.method.r, config.method.alpha))
    if config.method.name == "qlora":
        assert roles.quantised_layers() > 0, "the base is not NF4"
    engine = HfEngine(
        roles.model, stops, tokenizer.pad_token_id, config.rollout.max_new_tokens, config.rollout.temperature,
        config.rollout.batch_size,
    )  # fmt: skip
    print(
        f"{len(found)} prompts, {dropped} dropped as longer than {room} tokens; "
        f"one base with {roles.quantised_layers()} NF4 layers, four roles"
    )
    return tokenizer, roles, engine, found, dropped


def draw(run: Run, config: Config, rows: list[dict[str, Any]], metrics: dict[str, Any]) -> None:
    """The report: figures, and how they came about over the updates."""
    report = Report(f"ppo: {run.manifest['name']}", f"from {run.inputs['init']['ref']}, against {config.reward.ref}")
    report.figures_table(metrics)
    for keys, caption in (
        (("score",), "Score (standardised, scaled, less the penalty for no EOS)."),
        (("kl",), "KL to the reference, nats a response."),
        (("length",), "Length of the responses, tokens."),
        (("entropy",), "Entropy, nats a token."),
        (("explained_variance",), "Explained variance of the values."),
        (("clip_fraction", "approx_kl"), "Clip fraction and approx-KL of the steps."),
    ):
        report.plot(curves(rows, keys), caption, f"{', '.join(keys)} over updates")
    report.write(run.folder / "report.html")


class Clock:
    """Seconds a phase."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = round(now - self._last, 4), now
