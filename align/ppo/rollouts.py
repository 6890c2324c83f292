"""The answers of each update of PPO: which prompts are asked, who samples, and what each answer earns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread

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
from align.rollout.engine import generator_for
from align.rollout.strip_reasoning import empty
from align.track import Clock

Sample = Callable[[], Rollout | None]
"""Waits for the responses of an update; None on a rank that asks no server."""
Scored = tuple[Answers, Tensor, dict[str, float]]
"""Answers, a raw score for each [B], and the scorer's figures."""
LARGEST = 1e15
"""Largest score of an answer. Whitening squares it and sums over a batch, in fp32."""


@contextmanager
def at_update(step: int, what: str) -> Iterator[None]:
    """Name the update in errors that the block raises, and tell the waiting ranks what this one does.

    Args:
        step: the update, from 1; 0 before the first.
    """
    ranks.set_position(f"update {step}, {what}")
    try:
        yield
    except InputError as error:
        problem = f"{f'update {step}' if step else 'before the first update'}: {error.problem}"
        raise type(error)(error.field, error.value, problem, error.remedy) from error


def prompt_indices(update: int, batch_size: int, total: int, seed: int) -> list[int]:
    """Return which prompts update number `update` (from 0) sees: each pass over all of them has a new random order.

    A batch that reaches the end of one pass goes on into the next. The result depends on the arguments alone, so that
    a resumed run asks the same prompts.
    """
    chosen: list[int] = []
    position = update * batch_size
    while len(chosen) < batch_size:
        epoch, offset = divmod(position + len(chosen), total)
        order = torch.randperm(total, generator=generator_for(torch.device("cpu"), seed, "prompts", epoch))
        chosen += order[offset : offset + batch_size - len(chosen)].tolist()
    return chosen


def select_prompts(
    workers: Workers, settings: PpoSettings, number: int, draw: int = 0, groups: int | None = None
) -> list[Prompt]:
    """Return the prompts of an update, each as often as it is answered.

    Args:
        draw: how often the update has asked before.
        groups: number of different prompts; a whole batch by default.
    """
    batch = settings.batch_size // settings.per_prompt
    indices = prompt_indices(number * settings.max_draws + draw, batch, len(workers.prompts), settings.seed)
    return [workers.prompts[i] for i in indices[:groups] for _ in range(settings.per_prompt)]


def start_rollout(workers: Workers, settings: PpoSettings, number: int, sampler: tuple[Tensor, ...]) -> Sample:
    """Give the engine the weights that answer an update, and return the call that samples the answers.

    Args:
        sampler: the weights that the policy answers with; empty for its present ones.
    """
    with at_update(number + 1, "rollout"), workers.using_weights(sampler):
        generate = workers.start_sampling("policy", select_prompts(workers, settings, number), "rollout", number)

    def sample() -> Rollout | None:
        with at_update(number + 1, "rollout"):
            return generate()

    return sample


def start_next_rollout(
    workers: Workers, settings: PpoSettings, number: int
) -> tuple[Sample | None, tuple[Tensor, ...]]:
    """Start sampling the next update's answers in a background thread.

    Returns:
        the call that waits for them, and the weights that sample them, which a resumed run needs to sample them again;
        None and no weights if `max_staleness` is 0.
    """
    if not settings.max_staleness or number + 1 == settings.updates:
        return None, ()
    return in_background(start_rollout(workers, settings, number + 1, ())), workers.policy()


def in_background(sample: Sample) -> Sample:
    """Start a call in a thread. The returned call waits for its result, and may be called again."""
    sampled: Future[Rollout | None] = Future()

    def work() -> None:
        try:
            sampled.set_result(sample())
        except BaseException as error:
            sampled.set_exception(error)

    Thread(target=work, name="rollout", daemon=True).start()  # a run that ends does not wait for it
    return sampled.result


def roll_out(
    workers: Workers, settings: PpoSettings, number: int, started: Sample | None, state: PpoState, clock: Clock
) -> Scored:
    """Return the policy's answers to the prompts of an update, their raw scores and the scorer's figures.

    Answers to one prompt stand together. If groups may be drawn again, those whose answers earn different scores come
    first, in the order of drawing; groups of equal scores fill up the batch if no more are drawn.

    Args:
        started: the rollout that runs already; None if this update's does not.
        state: which weights sample, and the scale of the scores.

    Returns:
        with several answers a prompt the figures include `equal_groups`, the share of prompts whose answers all earned
        the same, and `draws`, how often the update asked.
    """
    sample = started or start_rollout(workers, settings, number, state.sampler)
    draws = [score_answers(workers, settings, number, select_prompts(workers, settings, number), sample(), clock)]
    if settings.per_prompt == 1:
        return draws[0]
    groups = settings.batch_size // settings.per_prompt
    equal = [find_equal_groups(workers, settings, draws[0], state)]
    while (missing := groups - sum(flags.count(False) for flags in equal)) and len(draws) < settings.max_draws:
        draw = len(draws)
        prompts = select_prompts(workers, settings, number, draw, missing)
        with at_update(number + 1, "rollout"):
            rollout = workers.start_sampling("policy", prompts, "rollout", number, draw)()
        draws.append(score_answers(workers, settings, number, prompts, rollout, clock))
        equal.append(find_equal_groups(workers, settings, draws[-1], state))
    is_equal = [flag for flags in equal for flag in flags]
    chosen = sorted(range(len(is_equal)), key=is_equal.__getitem__)[:groups]  # a stable order
    rows = [group * settings.per_prompt + k for group in chosen for k in range(settings.per_prompt)]
    answers = join_answers([part for part, _, _ in draws], workers.tokenizer.pad_token_id)
    raw = torch.cat([scores for _, scores, _ in draws])
    figures = average_figures([(len(scores), own) for _, scores, own in draws])
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
    with at_update(number + 1, "scores"):
        raw, figures = workers.score(answers)
    clock.lap("score_s")
    if settings.hides_reasoning:
        figures = {**figures, "empty_rate": sum(map(empty, answers.judged_texts)) / len(answers.prompts)}
    return answers, raw, figures


def find_equal_groups(workers: Workers, settings: PpoSettings, scored: Scored, state: PpoState) -> list[bool]:
    """Return for each prompt whether its answers all earn the same. All ranks take the first rank's result, because it
    decides how often they ask."""
    answers, raw, _ = scored
    scores_B = compute_scores(workers, settings, answers, raw, state)
    return ranks.broadcast(mark_equal_groups(scores_B, settings.per_prompt).tolist())


def compute_scores(workers: Workers, settings: PpoSettings, answers: Answers, raw_B: Tensor, state: PpoState) -> Tensor:
    """Return what each answer earns [B], on the scale of `state`.

    Raises:
        InputError: a score is too large to be computed with.
    """
    scores_B = shape_scores(raw_B, answers.rollout, state.moments, **settings.shaping)
    largest = float(scores_B.abs().max())
    require(
        largest <= LARGEST,
        "reward",
        workers.scorer.name,
        f"gives scores up to ±{float(raw_B.abs().max()):.3g}, so that an answer earns ±{largest:.3g}. {LARGEST:g} is "
        "the most: fp32 cannot hold the squares of more",
        "Scale the reward down, or use stage.normalise=once.",
    )
    return scores_B


def average_figures(parts: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Return the means of several parts' figures, weighted by their answers."""
    total = sum(rows for rows, _ in parts)
    return {name: sum(rows * figures[name] for rows, figures in parts) / total for name in parts[0][1]}


def check_sampler(
    workers: Workers,
    settings: PpoSettings,
    number: int,
    rollout: Rollout,
    old_logprobs_BT: Tensor,
    sampler: tuple[Tensor, ...],
) -> dict[str, float]:
    """Return the figures of `sampler_figures` if servers sample; else none.

    Raises:
        InputError: the servers do not sample by the policy.
    """
    if not settings.servers:
        return {}
    with at_update(number + 1, "logprobs of the sampler"):
        figures = sampler_figures(
            workers,
            rollout,
            old_logprobs_BT,
            sampler,
            temperature=settings.temperature,
            micro_batch=settings.micro_batch,
            servers=settings.servers,
        )
        check_gap(figures, settings.max_gap)
    return figures


def sampler_figures(
    workers: Workers,
    rollout: Rollout,
    old_logprobs_BT: Tensor,
    sampler: Sequence[Tensor],
    *,
    temperature: float,
    micro_batch: int,
    servers: int = 1,
) -> dict[str, float]:
    """Compare the logprobs that servers report with those of the policy that they were to sample with.

    Args:
        old_logprobs_BT: by the policy as it is.
        sampler: the weights of an older policy, if that was to answer: the first `micro_batch` rows, and at least one
            of each server, are then read by it, so that its age is not taken for a fault.
        servers: row i is of server i modulo this number.

    Returns:
        `rollout_gap`, the mean of |log π − log p| in nats, of the server whose is largest; `rollout_ratio`, the mean of
        π / p; `staleness`, in updates.
    """
    logprobs_BT = old_logprobs_BT
    if sampler:
        rollout = rollout.rows(slice(0, max(micro_batch, servers)))
        with workers.using_weights(sampler):
            logprobs_BT = compute_in_chunks(
                lambda part: workers.roles.logprobs("policy", part, temperature).logprobs_BT, rollout, micro_batch
            )
    assert rollout.logprobs_BT is not None, "the engine reports them"
    mask = rollout.response_mask_BT
    off = torch.where(mask, logprobs_BT - rollout.logprobs_BT, torch.zeros_like(logprobs_BT))
    offsets = range(min(servers, len(off)))
    gaps = torch.stack([masked_mean(off[i::servers].abs(), mask[i::servers]) for i in offsets])
    ratio = masked_mean(off.exp(), mask)
    return {"rollout_gap": float(gaps.max()), "rollout_ratio": float(ratio), "staleness": float(bool(sampler))}


def check_gap(figures: dict[str, float], bound: float) -> None:
    """Raise InputError if the servers do not sample by the policy.

    Args:
        figures: of `sampler_figures`.
        bound: of `rollout_gap`, in nats.
    """
    gap = figures["rollout_gap"]
    require(
        gap <= bound,
        "rollout.engine",
        "vllm",
        f"what the server says it drew with lies {gap:.2g} nats a token from the policy (mean ratio "
        f"{figures['rollout_ratio']:.3g}; {bound:g} may be). Its adapter is not in force, it samples at another "
        "temperature, its logprobs are not those of the temperature, or it has another base",
        "See vllm.log, or start the server with --logprobs-mode processed_logprobs. The same command goes on from the "
        "last checkpoint; rollout.max_gap= is the bound.",
    )
