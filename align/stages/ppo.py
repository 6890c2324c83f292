"""PPO on an adapter: policy, value, reward and reference are roles on one base.

    for each update:
        responses from the policy; a score for each; logprobs of policy and reference, values
        rewards = −kl_coef · KL at every token, + score at the last;  advantages by GAE
        for each epoch, each minibatch: one step on the clipped policy loss and the value loss

Ziegler et al. (2019); Huang et al., "The N+ implementation details of RLHF with PPO" (2024).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from align import ranks
from align.config.ppo import PpoConfig
from align.config.root import Config
from align.data.chat.encode import encode_prompts
from align.data.ngrams import repetition
from align.errors import require
from align.evals.collapse import MIN_PROMPTS, first_of_each_prompt, judge_collapse, measure_variety
from align.evals.comparison import prompt_text
from align.models.backbone import base_model
from align.models.load import (
    choose_checkpointing,
    choose_device,
    choose_dtype,
    name_of,
    save_tokenizer,
)
from align.models.roles import CachedForward, Role, Roles
from align.models.start import adapter_folder, frozen_as
from align.ops.kl import update_kl_coef
from align.ops.moments import Moments
from align.ppo.checkpoint import restore_state, save
from align.ppo.estimates import estimated
from align.ppo.experience import Experience, experience
from align.ppo.monitor import beside_start, better, evaluate, per_answer, suspects, warn
from align.ppo.schedule import lr_factor, prompt_indices
from align.ppo.state import State
from align.ppo.tripwires import crossed, strikes_after, strikes_needed, tripped_in
from align.ppo.update import check_first_ratio, update
from align.ppo.workers import Answers, Workers, roles_on, set_apart
from align.report.headlines import ending, updates_of
from align.report.words import counted
from align.reward.build import build_beside_policy
from align.reward.inputs import on_base
from align.rollout.answers_alone import empty_answers
from align.rollout.engine import cut_answers, divergence_as_input_error, greedily
from align.rollout.randomness import generator_for
from align.run import Artifact, Base, Run, json_digest
from align.run.checkpoints import newest_checkpoint, step_of, write_checkpoint
from align.stages.asking import asked, reading
from align.stages.execution import tracker
from align.stages.footprint import predicted_peak
from align.stages.ppo_arguments import (
    estimate_arguments,
    experience_arguments,
    losses_of,
    shaping_arguments,
    valued_by,
)
from align.stages.ppo_rollouts import (
    at_update,
    by_server,
    drawing_ahead,
    roll_out,
    sampled_by_policy,
    shaped,
    wait_for,
)
from align.stages.rollouts import engine_for
from align.stages.rows import open_store
from align.stages.starting import lora_of
from align.track import Clock, Tracker, peak_memory, progress
from align.types import Conversation, Result


def run(run: Run, config: Config, prompts: list[Conversation], measured_on: list[Conversation]) -> Result:
    with load_workers(run, config, prompts, measured_on) as workers:
        return optimise(run, config, workers)


def optimise(run: Run, config: Config, workers: Workers) -> Result:
    """The algorithm of this file's first lines, from the newest checkpoint on."""
    stage, roles = config.stage, workers.roles
    groups = [{"params": roles.parameters_of(role)} for role in roles.trainable]
    optimiser = torch.optim.AdamW(groups, weight_decay=stage.weight_decay)
    workers, moments = calibrate(workers, config)
    checkpoint = newest_checkpoint(run)
    state = restore_state(checkpoint, roles, optimiser) if checkpoint else State(stage.kl_coef, moments)
    done, tripped, stopped, draw = step_of(checkpoint), {}, None, None
    with tracker(run, config, done) as track, progress("ppo", stage.updates, done) as bar:
        if stage.eval_every and not done:
            state = replace(state, start_variety=watch_variety(workers, config, {}))
            track.log(0, {**measure(workers, moments, config, 0, track), **state.start_variety})
        for number in range(done, stage.updates):
            step, ends, clock = number + 1, number + 1 == stage.updates, Clock()
            answers, raw, figures = roll_out(workers, config, number, draw, state, clock)
            draw, sampler = drawing_ahead(workers, config, number)
            if stage.normalise == "running":
                state = replace(state, moments=state.moments.joined(raw))
            scores = shaped(workers, config, answers, raw, state)
            clock.lap("score_s")

            made, cached, described = experienced(workers, config, answers, scores, state, number)
            clock.lap("estimate_s")

            learned = learn(run, config, workers, optimiser, made, cached, state.kl_coef, number)
            clock.lap("update_s")
            wait_for(draw, clock)
            clock.rates(int(answers.rollout.lengths_B.sum()))
            figures |= {**described, **learned, "raw_score": float(raw.mean()), "kl_coef": state.kl_coef}
            figures["repetition"] = repetition(answers.texts)

            if stage.eval_every and (step % stage.eval_every == 0 or ends):
                figures |= watch_variety(workers, config, state.start_variety)
            signs = crossed(figures, stage.tripwires.limits())
            state = replace(state, strikes=strikes_after(state.strikes, signs), sampler=sampler)
            patience = stage.tripwires.patience
            tripped = {name: s for name, s in signs.items() if state.strikes[name] >= strikes_needed(name, patience)}
            stops = bool(tripped) and stage.tripwires.action == "stop"
            if stage.eval_every and (step % stage.eval_every == 0 or ends or stops):
                measured = measure(workers, moments, config, step, track)
                state = replace(state, best=better(state.best, step, measured["held_out_objective"], workers))
                figures |= measured
                clock.lap("eval_s")
            if stage.kl_control == "adaptive":
                target = stage.kl_target, stage.kl_horizon, stage.batch_size
                state = replace(state, kl_coef=update_kl_coef(state.kl_coef, figures["kl"], *target))
            track.log(step, figures, clock.laps)
            bar.advance(step, score=figures["score"], kl=figures["kl"], length=figures["length"])
            warn(tripped, step, state.strikes, stage.tripwires.patience)
            if stops:
                sizes = {"temperature": config.rollout.temperature, "micro_batch": stage.micro_batch}
                stopped = answers, raw, step, per_answer(tripped, workers, answers, scores, made, **sizes)
                break
            if step % stage.save_every == 0 and not ends:
                files = partial(save, roles=roles, optimiser=optimiser, state=state)
                write_checkpoint(run, step, files, stage.checkpoints)
        rows = track.rows()

    save_artifact(run, config, workers, state)
    if stopped:
        send_to_annotators(run, config, workers, *stopped)
    wires = tripped if stopped else ()
    return result_of(rows, summary(run, rows, state, config, workers), wires, stage, config.rollout.max_new_tokens)


def experienced(
    workers: Workers, config: Config, answers: Answers, scores_B: Tensor, state: State, number: int
) -> tuple[Experience, CachedForward | None, dict[str, float]]:
    """What an update learns from; the passes behind it that its first step can use; and the figures that describe it.

    Raises:
        InputError: a server drew the answers, and not by the policy.
    """
    stage, rollout = config.stage, answers.rollout
    ranks.at(f"update {number + 1}, logprobs and values")
    estimates, cached = estimated(workers.roles, rollout, **estimate_arguments(config))
    drawn = sampled_by_policy(workers, config, number, rollout, estimates.old_logprobs_BT, state.sampler)
    cap = stage.importance_cap if by_server(config) else None
    arguments = experience_arguments(stage, state.kl_coef)
    made, described = experience(rollout, scores_B, *estimates, **arguments, importance_cap=cap)
    return made, cached, {**described, **drawn}


def learn(
    run: Run, config: Config, workers: Workers, optimiser: torch.optim.Optimizer, made: Experience,
    cached: CachedForward | None, kl_coef: float, number: int,
) -> dict[str, float]:  # fmt: skip
    """The gradient steps of an update, at its learning rates; behind the first one, whether it began at ratio 1."""
    stage: PpoConfig = config.stage
    set_rates(optimiser, stage, number)
    with at_update(number + 1, "gradient steps"):
        learned = update(
            workers.roles, optimiser, made, cached, epochs=stage.epochs, minibatch_count=stage.minibatches,
            max_grad_norm=stage.max_grad_norm, max_approx_kl=stage.max_approx_kl,
            generator=generator_for(torch.device("cpu"), config.seed, "minibatches", number),
            micro_batch=stage.micro_batch, temperature=config.rollout.temperature, losses=losses_of(config, kl_coef),
        )  # fmt: skip
    if number == 0:
        dtype = name_of(choose_dtype(config.dtype, choose_device(config.device)))
        model_type = base_model(workers.roles.model).config.model_type
        check_first_ratio(learned, getattr(stage.first_ratio, dtype), run.base.id, model_type, dtype)
    return learned


def measure(workers: Workers, moments: Moments, config: Config, step: int, track: Tracker) -> dict[str, float]:
    """The policy on the held-out prompts, see `evaluate`; its first answers are shown.

    Args:
        moments: the run's first, so that all updates are measured on one scale.
        step: how many updates are behind it; 0 measures the start.
    """
    stage: PpoConfig = config.stage
    with at_update(step, "held-out prompts"):
        answers = workers.sample("policy", workers.held_out, "held_out")
        figures, samples = evaluate(
            workers, answers, moments, shaping_arguments(stage), kl_coef=stage.kl_coef,
            temperature=config.rollout.temperature, micro_batch=stage.micro_batch, shown=stage.shown,
        )  # fmt: skip
    score, kl, objective = (figures[f"held_out_{name}"] for name in ("score", "kl", "objective"))
    when = f"update {step}" if step else "the start"
    track.show(step, samples, f"{when}: held-out score {score:.2f}, KL {kl:.1f} nats, objective {objective:.2f}")
    return figures


def watch_variety(workers: Workers, config: Config, start: Mapping[str, float]) -> dict[str, float]:
    """Measure how much the policy's greedy answers differ between held-out prompts.

    Args:
        start: the same figures of the start; empty to measure the start itself.

    Returns:
        `greedy_distinct`, the number of different answers; `greedy_commonest`, the share of the commonest one; and
        `collapse`, 1 if the policy collapsed (`align.evals.collapse`), else 0. Nothing below 64 distinct prompts, and
        with reward=check.
    """
    asked = [prompt_text(prompt.conversation.messages) for prompt in workers.held_out]
    first = first_of_each_prompt(asked)
    closed = config.reward.name == "check"  # many prompts may share one right answer
    if closed or not config.stage.tripwires.collapse or len(first) < MIN_PROMPTS:
        return {}
    with greedily(workers.engine):
        answers = workers.sample("policy", workers.held_out, "held_out")
    variety = measure_variety([asked[i] for i in first], [answers.read[i] for i in first])
    figures = {"greedy_distinct": float(variety.distinct), "greedy_commonest": variety.commonest_share.value}
    if not start:
        return figures
    collapse = judge_collapse(variety, int(start["greedy_distinct"]), start["greedy_commonest"])
    return {**figures, "collapse": float(collapse.is_collapsed)}


def save_artifact(run: Run, config: Config, workers: Workers, state: State) -> None:
    """The policy that the run publishes, its critic as it stands, and the tokenizer."""
    if state.best and config.stage.publish == "best":
        workers.put_back(state.best.weights)
    if not ranks.is_main():
        return
    workers.roles.save_policy(run.artifact, run.base, choose_dtype(config.dtype, choose_device(config.device)))
    if config.stage.has_critic:
        workers.roles.save_critic(run.artifact / "value", run.base)
    save_tokenizer(workers.tokenizer, run.artifact)


def result_of(
    rows: list[dict[str, Any]], metrics: dict[str, Any], stopped_by: Iterable[str], stage: PpoConfig, limit: int
) -> Result:
    """The figures, and what is printed.

    Args:
        limit: tokens an answer.
    """
    updates = updates_of(rows)
    first = f"{updates[0]['score']:.2f} → " if len(updates) > 1 else ""
    line = f"score {first}{metrics['last_score']:.2f} at KL {metrics['last_kl']:.1f} nats"
    wires = ", ".join(stopped_by)
    line += f"; stopped at update {len(updates)} by {wires}" if wires else ""
    cut = cut_answers(1 - metrics["last_eos_rate"], limit)
    blank = empty_answers(metrics.get("last_empty_rate", 0.0), hides=True)  # which is known where reasoning is hidden
    return Result(metrics, (line, *cut, *blank, *held_out_lines(metrics, stage.publish)))


def held_out_lines(metrics: Mapping[str, Any], publish: str) -> list[str]:
    """Which update is published, and what it is worth beside the start; nothing where nothing was measured."""
    if "objective_after" not in metrics:
        return []
    after, before = metrics["objective_after"], metrics["objective_before"]
    lines = [f"update {metrics['published_update']} is published: held-out objective {after:.2f} (start {before:.2f})"]
    if not metrics["beats_start"]:
        what = "no update that was measured beats" if publish == "best" else "the last update does not beat"
        lines.append(f"WARNING: {what} the start on held-out prompts. Lower stage.lr, or raise stage.kl_coef.")
    return lines


@contextmanager
def load_workers(
    run: Run, config: Config, prompts: Sequence[Conversation], measured_on: Sequence[Conversation]
) -> Iterator[Workers]:
    """Load everybody; the engine is closed in the end.

    Args:
        measured_on: prompts of a file of their own; where there are none, some of `prompts` are kept for that.

    Raises:
        InputError: no prompt is left to train on.
    """
    stage: PpoConfig = config.stage
    base = run.base
    policy, tokenizer, found, room, dropped, reward, models = asked(run, config, prompts)
    n_eval = stage.eval_prompts if stage.eval_every else 0
    apart = encode_prompts(tokenizer, measured_on, room)[0] if measured_on else []
    training, held_out = set_apart(found, apart, n_eval)

    run.known_metrics = {"prompts": len(training), "dropped": dropped}
    run.known_metrics |= {"held_out_prompts": len(held_out)} if held_out else {}
    roles = load_roles(config, base, policy, models)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    scorer = build_beside_policy(reward, models, roles, base, stage.micro_batch, dtype, tokenizer)
    bases = "a policy of its own and a frozen base" if roles.policy is not None else "one base"
    measured = f", {len(held_out)} {'of data.eval_path' if apart else 'more'} to measure on" if held_out else ""
    print(
        f"{len(training)} prompts, {dropped} dropped as longer than {room} tokens{measured}; "
        f"{bases} with {roles.quantised_layers()} NF4 layers, reward: {scorer.name}{learning_by(stage)}"
    )

    def speaks(role: Role) -> AbstractContextManager[None]:
        lr = stage.lr if role == "policy" else None
        name = f"the {role}, which started from init={run.inputs['init'].ref}"
        return divergence_as_input_error(name, lr, config.dtype)

    kept = frozen_as(config.method.name), dtype
    with engine_for(run, config, base, *kept, tokenizer, roles.model.generation_config) as engine:
        read = reading(config, tokenizer, roles.model.generation_config)
        yield Workers(tokenizer, roles, engine, scorer, training, held_out, config.seed, speaks, read)


def learning_by(stage: PpoConfig) -> str:
    """How advantages are estimated, for the line that a run prints; nothing of PPO's own way."""
    return "" if stage.has_critic else f"; {stage.advantage}, {counted(stage.per_prompt, 'answer')} to each prompt"


def load_roles(config: Config, base: Base, artifact: Artifact, models: Sequence[Artifact]) -> Roles:
    """The roles of a run: policy and reference start from `artifact`, and those of `models` on its base score."""
    stage, method, device = config.stage, config.method, choose_device(config.device)
    roles = roles_on(
        base, adapter_folder(artifact), [m.path for m in on_base(models, base)], method=method.name,
        frozen=frozen_as(method.name), fresh=lora_of(config), value_backbone=valued_by(stage),
        device=device, dtype=choose_dtype(config.dtype, device), seed=config.seed,
    )  # fmt: skip
    if choose_checkpointing(stage.gradient_checkpointing, device):
        roles.recompute_layers()
    return roles


def calibrate(workers: Workers, config: Config) -> tuple[Workers, Moments]:
    """Scores are standardised on reference samples, so that kl_coef keeps its meaning.

    Raises:
        InputError: the reward tells none of them apart.
    """
    stage: PpoConfig = config.stage
    indices = prompt_indices(0, stage.normalise_on, len(workers.prompts), config.seed + 1)
    chosen = [workers.prompts[i] for i in indices]
    ranks.at("update 0, reference answers")
    workers, moments = workers.calibrated(workers.sample("reference", chosen, "normalise"))
    if stage.normalise == "off":
        return workers, Moments(1, 0.0, 1.0)
    require(
        moments.deviations > 0, "reward", workers.scorer.name, "gives every reference answer the same score",
        "Train the reward model for longer, choose rules that tell answers apart, or set stage.normalise=off.",
    )  # fmt: skip
    return workers, moments


def set_rates(optimiser: torch.optim.Optimizer, stage: PpoConfig, number: int) -> None:
    """The learning rates of policy and value at an update."""
    factor = lr_factor(number, stage.updates, stage.warmup, stage.schedule)
    rates = (stage.lr, stage.value_lr) if stage.has_critic else (stage.lr,)
    for group, lr in zip(optimiser.param_groups, rates, strict=True):
        assert lr is not None  # the configuration has chosen
        group["lr"] = lr * factor


def send_to_annotators(
    run: Run, config: Config, workers: Workers, answers: Answers, raw_B: Tensor, step: int,
    figures: Mapping[str, Sequence[float]],
) -> None:  # fmt: skip
    """Put what the tripwires suspect into the annotation store, see `suspects`."""
    pairs = suspects(
        workers, answers, raw_B, figures, config.stage.tripwires.suspects, digest=run.base.digest, run=run.name,
        temperature=config.rollout.temperature,
    )  # fmt: skip
    shown = [(asked, candidates) for asked, candidates in pairs if not asked.uses_tools]
    if len(shown) < len(pairs):
        print(f"{len(pairs) - len(shown)} suspicious answers are to prompts with tools, which nobody can be shown")
    if not ranks.is_main():
        return
    key = f"{run.name}/{json_digest(run.manifest.identity)[:8]}/{step}"  # another run of that name asks other things
    with open_store(config) as store, store.transaction():
        for k, (conversation, candidates) in enumerate(shown):
            store.add_item(config.project, f"{key}/suspect/{k}", conversation, candidates)
    print(f"{len(shown)} suspicious answers wait in project {config.project} for a person's verdict")


ENDING = ("score", "kl", "length", "eos_rate", "empty_rate", "entropy", "equal_groups")
"""Figures of an update whose means over the ending are the run's."""


def summary(run: Run, rows: list[dict[str, Any]], state: State, config: Config, workers: Workers) -> dict[str, Any]:
    """The run's headline figures; `last_…` are means over its `ending`."""
    updates, stage = updates_of(rows), config.stage
    last = ending(updates)
    best = state.best if stage.publish == "best" else None
    wires = stage.tripwires
    means = [k for k in ENDING if k in last[0]]
    return {
        **{f"last_{k}": sum(r[k] for r in last) / len(last) for k in means},
        "updates": len(updates), "published_update": (published := best.update if best else len(updates)),
        **beside_start(rows, published), "tripped": tripped_in(updates, wires.limits(), wires.patience),
        **run.known_metrics, "quantised_layers": workers.roles.quantised_layers(),
        "score_mean": state.moments.mean, "score_std": state.moments.std, **peak_memory(),
        **predicted_peak(config, run, max(len(prompt.input_ids) for prompt in workers.prompts)),
    }  # fmt: skip
