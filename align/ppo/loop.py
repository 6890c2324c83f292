"""PPO on an adapter: policy, value, reward and reference are roles on one base.

    for each update:
        responses from the policy; a score for each; logprobs of policy and reference, values
        rewards = −kl_coef · KL at every token, + score at the last;  advantages by GAE
        for each epoch, each minibatch: one step on the clipped policy loss and the value loss

Ziegler et al. (2019); Huang et al., "The N+ implementation details of RLHF with PPO" (2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align import ranks
from align.annotate.store import Candidate
from align.core.errors import require
from align.core.types import Conversation, StageResult
from align.data.ngrams import compute_repetition
from align.models.forward import unwrap_model
from align.models.roles import CachedForward
from align.ops.kl import update_kl_coef
from align.ops.moments import Moments
from align.ppo.checkpoint import PpoState, restore_state, save_state
from align.ppo.experience import Experience, assemble_experience, compute_estimates
from align.ppo.monitor import (
    choose_best,
    compare_with_start,
    count_strikes,
    evaluate_held_out,
    find_crossed_wires,
    find_tripped_wires,
    get_needed_strikes,
    measure_answers,
    print_warnings,
    select_suspects,
)
from align.ppo.rollouts import (
    add_update_to_errors,
    choose_prompt_indices,
    compute_scores,
    require_policy_logprobs,
    sample_and_score,
    start_next_rollout,
)
from align.ppo.settings import PpoSettings
from align.ppo.update import compute_lr_factor, require_first_ratio, take_gradient_steps
from align.ppo.workers import Answers, Workers
from align.rollout.engine import build_generator, warn_about_cut_answers
from align.rollout.strip_reasoning import warn_about_empty_answers
from align.run import Run
from align.run.checkpoints import parse_step, remove_unusable_and_find_newest, write_checkpoint
from align.track import Clock, Tracker, last_updates, select_updates, show_progress

MEANS = ("score", "kl", "length", "eos_rate", "empty_rate", "entropy", "equal_groups")
"""Metrics of an update that are averaged over the last updates for the run's summary."""


@dataclass(frozen=True, slots=True)
class LoopResult:
    """The metrics, final state, tripped wires and suspicious answers of a PPO run.

    Attributes:
        rows: the rows of the metrics stream, one for each update.
        state: the state after the last update.
        tripped: the tripwires that ended the run early; empty if it ran to its end.
        suspects: prompts with suspicious answers, for a person to judge.
    """

    rows: list[dict[str, Any]]
    state: PpoState
    tripped: tuple[str, ...] = ()
    suspects: tuple[tuple[Conversation, list[Candidate]], ...] = ()


def train_policy(
    run: Run,
    workers: Workers,
    settings: PpoSettings,
    track: Callable[[int], AbstractContextManager[Tracker]],
    watch_variety: Callable[[Workers, Mapping[str, float]], dict[str, float]],
) -> LoopResult:
    """Train the policy with PPO, from the newest checkpoint if there is one, and return metrics, final state, tripped
    tripwires and suspicious answers. The module's docstring has the algorithm.

    Args:
        track: opens the metrics stream after a given step.
        watch_variety: measures how much the policy's greedy answers differ between held-out prompts, given the start's
            figures; with empty figures it measures the start.
    """
    roles = workers.roles
    groups = [{"params": roles.parameters_of(role)} for role in roles.trainable]
    optimiser = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    workers, moments = calibrate_scores(workers, settings)
    checkpoint = remove_unusable_and_find_newest(run)
    state = restore_state(checkpoint, roles, optimiser) if checkpoint else PpoState(settings.kl_coef, moments)
    resumed_step = parse_step(checkpoint)
    tripped: dict[str, str] = {}
    suspicious: list[tuple[Conversation, list[Candidate]]] = []
    next_rollout = None
    with track(resumed_step) as tracker, show_progress("ppo", settings.updates, resumed_step) as bar:
        if settings.eval_every and not resumed_step:
            state = replace(state, start_variety=watch_variety(workers, {}))
            tracker.log(0, {**measure_held_out(workers, moments, settings, 0, tracker), **state.start_variety})
        for number in range(resumed_step, settings.updates):
            step = number + 1
            is_last = step == settings.updates
            clock = Clock()
            answers, raw, figures = sample_and_score(workers, settings, number, next_rollout, state, clock)
            next_rollout, sampler = start_next_rollout(workers, settings, number)
            if settings.normalise == "running":
                state = replace(state, moments=state.moments.with_batch(raw))
            scores = compute_scores(workers, settings, answers, raw, state)
            clock.lap("score_s")

            batch, cached, experience_figures = build_experience(workers, settings, answers, scores, state, number)
            clock.lap("estimate_s")

            learning_figures = take_update_steps(
                run, workers, settings, optimiser, batch, cached, state.kl_coef, number
            )
            clock.lap("update_s")
            if next_rollout is not None:  # wait: an engine serves one caller at a time
                next_rollout()
                clock.lap("ahead_s")
            clock.rates(int(answers.rollout.lengths_B.sum()))
            figures |= {
                **experience_figures,
                **learning_figures,
                "raw_score": float(raw.mean()),
                "kl_coef": state.kl_coef,
            }
            figures["repetition"] = compute_repetition(answers.texts)

            is_measured = settings.eval_every is not None and (step % settings.eval_every == 0 or is_last)
            if is_measured:
                figures |= watch_variety(workers, state.start_variety)
            crossed = find_crossed_wires(figures, settings.wires)
            state = replace(state, strikes=count_strikes(state.strikes, crossed), sampler=sampler)
            patience = settings.patience
            tripped = {
                name: s for name, s in crossed.items() if state.strikes[name] >= get_needed_strikes(name, patience)
            }
            stops = bool(tripped) and settings.stops
            if is_measured or (stops and settings.eval_every is not None):
                measured = measure_held_out(workers, moments, settings, step, tracker)
                state = replace(state, best=choose_best(state.best, step, measured["held_out_objective"], workers))
                figures |= measured
                clock.lap("eval_s")
            if settings.kl_control == "adaptive":
                target = settings.kl_target, settings.kl_horizon, settings.batch_size
                state = replace(state, kl_coef=update_kl_coef(state.kl_coef, figures["kl"], *target))
            tracker.log(step, figures, clock.laps)
            bar.advance(step, score=figures["score"], kl=figures["kl"], length=figures["length"])
            print_warnings(tripped, step, state.strikes, patience)
            if stops:
                suspicious = find_suspects(run, workers, settings, tripped, answers, raw, scores, batch)
                break
            if step % settings.save_every == 0 and not is_last:
                files = partial(save_state, roles=roles, optimiser=optimiser, state=state)
                write_checkpoint(run, step, files, settings.checkpoints)
        rows = tracker.rows()
    if not settings.stops:
        tripped = {}
    return LoopResult(rows, state, tuple(tripped), tuple(suspicious))


def calibrate_scores(workers: Workers, settings: PpoSettings) -> tuple[Workers, Moments]:
    """Compute the mean and deviation of the reward's scores on samples of the reference, to standardise later scores.
    kl_coef then does not depend on the reward's unit.

    Raises:
        InputError: all samples have the same score.
    """
    indices = choose_prompt_indices(0, settings.normalise_on, len(workers.prompts), settings.seed + 1)
    prompts = [workers.prompts[i] for i in indices]
    ranks.record_position("update 0, reference answers")
    workers, moments = workers.calibrate_scorer(workers.sample("reference", prompts, "normalise"))
    if settings.normalise == "off":
        return workers, Moments(1, 0.0, 1.0)
    require(
        moments.deviations > 0,
        "reward",
        workers.scorer.name,
        "gives every reference answer the same score",
        "Train the reward model for longer, choose rules that tell answers apart, or set stage.normalise=off.",
    )
    return workers, moments


class BuiltExperience(NamedTuple):
    """The experience of an update, the forward passes that its first step can reuse, and the update's metrics."""

    batch: Experience
    cached: CachedForward | None
    figures: dict[str, float]


def build_experience(
    workers: Workers, settings: PpoSettings, answers: Answers, scores_B: Tensor, state: PpoState, number: int
) -> BuiltExperience:
    """Compute the logprobs, values and advantages of an update's answers for its gradient steps.

    Raises:
        InputError: servers sampled the answers, but not from the policy.
    """
    rollout = answers.rollout
    ranks.record_position(f"update {number + 1}, logprobs and values")
    estimates, cached = compute_estimates(
        workers.roles,
        rollout,
        temperature=settings.temperature,
        micro_batch=settings.micro_batch,
        minibatches=settings.minibatches,
        bootstrap=settings.bootstrap_truncated,
    )
    sampled = require_policy_logprobs(workers, settings, number, rollout, estimates.old_logprobs_BT, state.sampler)
    cap = settings.importance_cap if settings.servers else None
    arguments = settings.experience_arguments(state.kl_coef)
    batch, figures = assemble_experience(rollout, scores_B, *estimates, **arguments, importance_cap=cap)
    return BuiltExperience(batch, cached, {**figures, **sampled})


def take_update_steps(
    run: Run,
    workers: Workers,
    settings: PpoSettings,
    optimiser: torch.optim.Optimizer,
    batch: Experience,
    cached: CachedForward | None,
    kl_coef: float,
    number: int,
) -> dict[str, float]:
    """Set the learning rates of an update, train policy and value on its batch, and return metrics.

    The first update also checks that its initial ratio is 1.
    """
    factor = compute_lr_factor(number, settings.updates, settings.warmup, settings.schedule)
    rates = (settings.lr, settings.value_lr) if settings.estimator.has_critic else (settings.lr,)
    for group, lr in zip(optimiser.param_groups, rates, strict=True):
        assert lr is not None  # the configuration sets it
        group["lr"] = lr * factor
    with add_update_to_errors(number + 1, "gradient steps"):
        figures = take_gradient_steps(
            workers.roles,
            optimiser,
            batch,
            cached,
            epochs=settings.epochs,
            minibatch_count=settings.minibatches,
            max_grad_norm=settings.max_grad_norm,
            max_approx_kl=settings.max_approx_kl,
            generator=build_generator(torch.device("cpu"), settings.seed, "minibatches", number),
            micro_batch=settings.micro_batch,
            temperature=settings.temperature,
            losses=settings.losses_at(kl_coef),
        )
    if number == 0:
        model_type = unwrap_model(workers.roles.model).config.model_type
        require_first_ratio(figures, settings.first_ratio, run.base.id, model_type, settings.dtype)
    return figures


def measure_held_out(
    workers: Workers, moments: Moments, settings: PpoSettings, step: int, tracker: Tracker
) -> dict[str, float]:
    """Sample and score the policy's answers to the held-out prompts, log and print the first ones, and return the
    metrics.

    Args:
        moments: the run's initial moments, so that all updates are measured on the same scale.
        step: number of updates so far; 0 measures the start.
    """
    with add_update_to_errors(step, "held-out prompts"):
        answers = workers.sample("policy", workers.held_out, "held_out")
        figures, samples = evaluate_held_out(
            workers,
            answers,
            moments,
            settings.shaping,
            kl_coef=settings.kl_coef,
            temperature=settings.temperature,
            micro_batch=settings.micro_batch,
            sample_count=settings.shown,
        )
    score, kl, objective = (figures[f"held_out_{name}"] for name in ("score", "kl", "objective"))
    when = f"update {step}" if step else "the start"
    tracker.show(step, samples, f"{when}: held-out score {score:.2f}, KL {kl:.1f} nats, objective {objective:.2f}")
    return figures


def find_suspects(
    run: Run,
    workers: Workers,
    settings: PpoSettings,
    tripped: Mapping[str, str],
    answers: Answers,
    raw_B: Tensor,
    scores_B: Tensor,
    batch: Experience,
) -> list[tuple[Conversation, list[Candidate]]]:
    """Return the answers of an update that most likely tripped its wires, as pairs for annotators.

    Each is paired with a new sample of the reference. Must be called after the last update.
    """
    sizes = {"temperature": settings.temperature, "micro_batch": settings.micro_batch}
    figures = measure_answers(tripped, workers, answers, scores_B, batch, **sizes)
    return select_suspects(
        workers,
        answers,
        raw_B,
        figures,
        settings.suspects,
        digest=run.base.digest,
        run=run.name,
        temperature=settings.temperature,
    )


def build_result(
    trained: LoopResult,
    workers: Workers,
    settings: PpoSettings,
    known_metrics: Mapping[str, Any],
    peaks: Mapping[str, float],
) -> StageResult:
    """Return the summary metrics of a run and the lines to print. `last_…` are means over the last updates.

    Args:
        known_metrics: figures that were computed before the first update.
        peaks: measured and predicted peak memory.
    """
    updates = select_updates(trained.rows)
    last = last_updates(updates)
    best = trained.state.best if settings.publish == "best" else None
    published = best.update if best else len(updates)
    metrics: dict[str, Any] = {
        **{f"last_{name}": sum(row[name] for row in last) / len(last) for name in MEANS if name in last[0]},
        "updates": len(updates),
        "published_update": published,
        **compare_with_start(trained.rows, published),
        "tripped": find_tripped_wires(updates, settings.wires, settings.patience),
        **known_metrics,
        "quantised_layers": workers.roles.count_quantised_layers(),
        "score_mean": trained.state.moments.mean,
        "score_std": trained.state.moments.std,
        **peaks,
    }
    first = f"{updates[0]['score']:.2f} → " if len(updates) > 1 else ""
    line = f"score {first}{metrics['last_score']:.2f} at KL {metrics['last_kl']:.1f} nats"
    if trained.tripped:
        line += f"; stopped at update {len(updates)} by {', '.join(trained.tripped)}"
    cut = warn_about_cut_answers(1 - metrics["last_eos_rate"], settings.max_new_tokens)
    blank = warn_about_empty_answers(
        metrics.get("last_empty_rate", 0.0), hides_reasoning=True
    )  # only measured if reasoning is hidden
    return StageResult(metrics, (line, *cut, *blank, *describe_published(metrics, settings.publish)))


def describe_published(metrics: Mapping[str, Any], publish: str) -> list[str]:
    """Return lines that compare the published policy's held-out objective with that before the first update, or an
    empty list if that was not measured."""
    if "objective_after" not in metrics:
        return []
    after = metrics["objective_after"]
    before = metrics["objective_before"]
    lines = [f"update {metrics['published_update']} is published: held-out objective {after:.2f} (start {before:.2f})"]
    if not metrics["beats_start"]:
        what = "no update that was measured beats" if publish == "best" else "the last update does not beat"
        lines.append(f"WARNING: {what} the start on held-out prompts. Lower stage.lr, or raise stage.kl_coef.")
    return lines
