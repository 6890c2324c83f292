"""Rollouts for each PPO update: choosing prompts, sampling answers and scoring them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread
from typing import NamedTuple

import torch
from torch import Tensor

from align import ranks
from align.core.errors import InputError, require
from align.core.types import Rollout
from align.data.chat.encode import Prompt
from align.models.forward import compute_in_chunks
from align.ops.advantages import mark_equal_groups
from align.ops.masking import masked_mean
from align.ppo.checkpoint import PpoState
from align.ppo.experience import shape_scores
from align.ppo.settings import PpoSettings
from align.ppo.workers import Answers, Workers, join_answers
from align.rollout.engine import build_generator
from align.rollout.strip_reasoning import is_empty_answer
from align.track import Clock

Sample = Callable[[], Rollout | None]
"""Waits for the rollout of an update and returns it, or None on a rank that sends no requests to servers."""
Scored = tuple[Answers, Tensor, dict[str, float]]
"""Answers, their raw scores [B], and the scorer's metrics."""
LARGEST = 1e15
"""Largest absolute reward of an answer. Whitening squares it and sums over a batch, in fp32."""


@contextmanager
def add_update_to_errors(step: int, activity: str) -> Iterator[None]:
    """Prefix the message of an InputError in the `with` block with the update's number, and record `activity` as this
    rank's current work.

    Args:
        step: the update, from 1; 0 before the first.
    """
    ranks.record_position(f"update {step}, {activity}")
    try:
        yield
    except InputError as error:
        problem = f"{f'update {step}' if step else 'before the first update'}: {error.problem}"
        raise type(error)(error.field, error.value, problem, error.remedy) from error


def choose_prompt_indices(update: int, batch_size: int, total: int, seed: int) -> list[int]:
    """Choose the indices of an update's prompts by going through a new random order of all prompts in each epoch.
    Updates are counted from 0.

    A batch that reaches the end of one epoch goes on into the next. The result depends on the arguments alone, so that
    a resumed run asks the same prompts.
    """
    indices: list[int] = []
    position = update * batch_size
    while len(indices) < batch_size:
        epoch, offset = divmod(position + len(indices), total)
        order = torch.randperm(total, generator=build_generator(torch.device("cpu"), seed, "prompts", epoch))
        indices += order[offset : offset + batch_size - len(indices)].tolist()
    return indices


def select_prompts(
    workers: Workers, settings: PpoSettings, number: int, draw: int = 0, groups: int | None = None
) -> list[Prompt]:
    """Return the prompts of an update, each repeated once for every answer that is sampled to it.

    Args:
        draw: number of earlier draws of this update.
        groups: number of different prompts; a whole batch by default.
    """
    batch = settings.batch_size // settings.per_prompt
    indices = choose_prompt_indices(number * settings.max_draws + draw, batch, len(workers.prompts), settings.seed)
    return [workers.prompts[i] for i in indices[:groups] for _ in range(settings.per_prompt)]


def sync_and_prepare_rollout(
    workers: Workers, settings: PpoSettings, number: int, sampling_weights: tuple[Tensor, ...]
) -> Sample:
    """Give the engine the weights to sample with, and return a function that samples the answers of an update.

    Args:
        sampling_weights: the policy's weights for sampling; empty for its present ones.
    """
    with add_update_to_errors(number + 1, "rollout"), workers.using_weights(sampling_weights):
        generate = workers.start_sampling("policy", select_prompts(workers, settings, number), "rollout", number)

    def sample() -> Rollout | None:
        with add_update_to_errors(number + 1, "rollout"):
            return generate()

    return sample


class StartedRollout(NamedTuple):
    """A rollout that is being sampled in a background thread: the function that waits for it, and the weights that
    sample it.

    Attributes:
        wait: the call that waits for the answers; None if no rollout was started.
        sampler: the policy's weights that sample them, which a resumed run needs to sample them again; empty if no
            rollout was started.
    """

    wait: Sample | None
    sampler: tuple[Tensor, ...]


def start_next_rollout(workers: Workers, settings: PpoSettings, number: int) -> StartedRollout:
    """Start sampling the next update's answers with the current policy in a background thread, and return a handle for
    it.

    Starts none if `max_staleness` is 0, or after the last update.
    """
    if not settings.max_staleness or number + 1 == settings.updates:
        return StartedRollout(None, ())
    return StartedRollout(
        run_in_background(sync_and_prepare_rollout(workers, settings, number + 1, ())), workers.copy_policy_weights()
    )


def run_in_background(sample: Sample) -> Sample:
    """Start a call in a daemon thread, and return a function that waits for its result or raises its exception. It may
    be called again."""
    sampled: Future[Rollout | None] = Future()

    def work() -> None:
        try:
            sampled.set_result(sample())
        except BaseException as error:
            sampled.set_exception(error)

    Thread(target=work, name="rollout", daemon=True).start()  # a daemon: the end of the run does not wait for it
    return sampled.result


def sample_and_score(
    workers: Workers, settings: PpoSettings, number: int, started: Sample | None, state: PpoState, clock: Clock
) -> Scored:
    """Sample the policy's answers to the prompts of an update, or wait for a rollout that was started before, and score
    them. Returns the answers, their raw scores and metrics.

    Answers to one prompt are consecutive. If groups may be drawn again, groups with different scores come first, in the
    order of drawing; groups with equal scores fill up the batch if no more are drawn.

    Args:
        started: the call that waits for a rollout which was started before; None if it was not.
        state: has the weights for sampling, and the scale of the scores.

    Returns:
        With several answers for each prompt, the figures include `equal_groups`, the share of prompts whose answers all
        have the same score, and `draws`, the number of draws of the update.
    """
    sample = started or sync_and_prepare_rollout(workers, settings, number, state.sampler)
    draws = [score_answers(workers, settings, number, select_prompts(workers, settings, number), sample(), clock)]
    if settings.per_prompt == 1:
        return draws[0]
    groups = settings.batch_size // settings.per_prompt
    equal = [find_equal_groups(workers, settings, draws[0], state)]
    while (missing := groups - sum(flags.count(False) for flags in equal)) and len(draws) < settings.max_draws:
        draw = len(draws)
        prompts = select_prompts(workers, settings, number, draw, missing)
        with add_update_to_errors(number + 1, "rollout"):
            rollout = workers.start_sampling("policy", prompts, "rollout", number, draw)()
        draws.append(score_answers(workers, settings, number, prompts, rollout, clock))
        equal.append(find_equal_groups(workers, settings, draws[-1], state))
    is_equal = [flag for flags in equal for flag in flags]
    selected = sorted(range(len(is_equal)), key=is_equal.__getitem__)[:groups]  # a stable order
    rows = [group * settings.per_prompt + k for group in selected for k in range(settings.per_prompt)]
    answers = join_answers([part for part, _, _ in draws], workers.tokenizer.pad_token_id)
    raw = torch.cat([scores for _, scores, _ in draws])
    figures = average_figures([(len(scores), part_figures) for _, scores, part_figures in draws])
    figures |= {"equal_groups": sum(is_equal) / len(is_equal), "draws": float(len(draws))}
    if rows == list(range(len(raw))):
        return answers, raw, figures
    return answers.rows(rows), raw[torch.tensor(rows, device=raw.device)], figures


def score_answers(
    workers: Workers,
    settings: PpoSettings,
    number: int,
    prompts: Sequence[Prompt],
    rollout: Rollout | None,
    clock: Clock,
) -> Scored:
    answers = workers.collect_answers(prompts, rollout)
    clock.lap("rollout_s")
    with add_update_to_errors(number + 1, "scores"):
        raw, figures = workers.score(answers)
    clock.lap("score_s")
    if settings.hides_reasoning:
        figures = {**figures, "empty_rate": sum(map(is_empty_answer, answers.judged_texts)) / len(answers.prompts)}
    return answers, raw, figures


def find_equal_groups(workers: Workers, settings: PpoSettings, scored: Scored, state: PpoState) -> list[bool]:
    """Return for each prompt whether all its answers have the same score. All ranks use the first rank's result,
    because it decides the number of draws."""
    answers, raw, _ = scored
    scores_B = compute_scores(workers, settings, answers, raw, state)
    return ranks.broadcast(mark_equal_groups(scores_B, settings.per_prompt).tolist())


def compute_scores(workers: Workers, settings: PpoSettings, answers: Answers, raw_B: Tensor, state: PpoState) -> Tensor:
    """Return the standardised, clipped and scaled score of each answer [B], or raise InputError if one is too large for
    fp32.

    Raises:
        InputError: a score is too large for fp32.
    """
    scores_B = shape_scores(raw_B, answers.rollout, state.moments, **settings.shaping)
    largest = float(scores_B.abs().max())
    require(
        largest <= LARGEST,
        "reward",
        workers.scorer.name,
        f"gives scores up to ±{float(raw_B.abs().max()):.3g}, so that an answer's reward is up to ±{largest:.3g}. At "
        f"most {LARGEST:g} is allowed: fp32 cannot hold the squares of larger rewards",
        "Scale the reward down, or use stage.normalise=once.",
    )
    return scores_B


def average_figures(parts: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Return the mean of each metric over several parts of a batch, weighted by their numbers of answers."""
    total = sum(rows for rows, _ in parts)
    return {name: sum(rows * figures[name] for rows, figures in parts) / total for name in parts[0][1]}


def require_policy_logprobs(
    workers: Workers,
    settings: PpoSettings,
    number: int,
    rollout: Rollout,
    old_logprobs_BT: Tensor,
    sampling_weights: tuple[Tensor, ...],
) -> dict[str, float]:
    """Check that the servers sampled a rollout from the policy, and return the differences between their logprobs and
    the policy's as metrics.

    Returns no metrics if the learner samples itself.

    Raises:
        InputError: the servers do not sample from the policy.
    """
    if not settings.servers:
        return {}
    with add_update_to_errors(number + 1, "logprobs of the sampler"):
        figures = compute_sampler_figures(
            workers,
            rollout,
            old_logprobs_BT,
            sampling_weights,
            temperature=settings.temperature,
            micro_batch=settings.micro_batch,
            servers=settings.servers,
        )
        require_small_gap(figures, settings.max_gap)
    return figures


def compute_sampler_figures(
    workers: Workers,
    rollout: Rollout,
    old_logprobs_BT: Tensor,
    sampling_weights: Sequence[Tensor],
    *,
    temperature: float,
    micro_batch: int,
    servers: int = 1,
) -> dict[str, float]:
    """Compare the logprobs that servers reported for a rollout with those of the policy they should have sampled from,
    and return the differences as metrics.

    Args:
        old_logprobs_BT: logprobs of the present policy.
        sampling_weights: the weights of an older policy, if that was to be sampled: the first `micro_batch` rows, and
            at least one row of each server, are then compared with the older policy, so that its age does not count as
            a fault.
        servers: number of servers; row i came from server i modulo this number.

    Returns:
        `rollout_gap`, the mean of |log π − log p| in nats, the largest of all servers; `rollout_ratio`, the mean of
        π / p; `staleness`, in updates.
    """
    logprobs_BT = old_logprobs_BT
    if sampling_weights:
        rollout = rollout.rows(slice(0, max(micro_batch, servers)))
        with workers.using_weights(sampling_weights):
            logprobs_BT = compute_in_chunks(
                lambda part: workers.roles.logprobs("policy", part, temperature).logprobs_BT, rollout, micro_batch
            )
    assert rollout.logprobs_BT is not None, "the engine reports them"
    mask = rollout.response_mask_BT
    off = torch.where(mask, logprobs_BT - rollout.logprobs_BT, torch.zeros_like(logprobs_BT))
    offsets = range(min(servers, len(off)))
    gaps = torch.stack([masked_mean(off[i::servers].abs(), mask[i::servers]) for i in offsets])
    ratio = masked_mean(off.exp(), mask)
    return {"rollout_gap": float(gaps.max()), "rollout_ratio": float(ratio), "staleness": float(bool(sampling_weights))}


def require_small_gap(figures: dict[str, float], max_gap: float) -> None:
    """Raise InputError if the servers' logprobs differ from the policy's by more than `max_gap` nats per token on
    average.

    Args:
        figures: result of `compute_sampler_figures`.
        max_gap: limit of `rollout_gap` in nats.
    """
    gap = figures["rollout_gap"]
    require(
        gap <= max_gap,
        "rollout.engine",
        "vllm",
        f"the server's logprobs of its own tokens are {gap:.2g} nats per token from the policy's (mean ratio "
        f"{figures['rollout_ratio']:.3g}; the limit is {max_gap:g}). Possible causes: it does not apply the adapter, "
        f"samples at another temperature, reports logprobs without the temperature, or has another base",
        "See vllm.log, or start the server with --logprobs-mode processed_logprobs. The same command goes on from the "
        "last checkpoint; rollout.max_gap= is the bound.",
    )
