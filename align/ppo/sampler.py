"""Whether what answers is the policy, and answers that are drawn while the policy learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Thread

import torch
from torch import Tensor

from align.errors import require
from align.models.chunks import in_chunks
from align.ops.masking import masked_mean
from align.ppo.workers import Workers
from align.types import Rollout


def sampler_figures(
    workers: Workers, rollout: Rollout, old_logprobs_BT: Tensor, sampler: Sequence[Tensor], *,
    temperature: float, micro_batch: int, servers: int = 1,
) -> dict[str, float]:  # fmt: skip
    """How far what servers say that they drew with is from the policy that they were to draw with.

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
        with workers.as_was(sampler):
            logprobs_BT = in_chunks(
                lambda part: workers.roles.logprobs("policy", part, temperature).logprobs_BT, rollout, micro_batch
            )
    assert rollout.logprobs_BT is not None, "the engine says them"
    mask = rollout.response_mask_BT
    off = torch.where(mask, logprobs_BT - rollout.logprobs_BT, torch.zeros_like(logprobs_BT))
    each = range(min(servers, len(off)))
    gaps = torch.stack([masked_mean(off[server::servers].abs(), mask[server::servers]) for server in each])
    ratio = masked_mean(off.exp(), mask)
    return {"rollout_gap": float(gaps.max()), "rollout_ratio": float(ratio), "staleness": float(bool(sampler))}


def check_gap(figures: dict[str, float], bound: float) -> None:
    """
    Args:
        figures: of `sampler_figures`.
        bound: nats.

    Raises:
        InputError: what answers is not the policy.
    """
    gap = figures["rollout_gap"]
    require(
        gap <= bound, "rollout.engine", "vllm",
        f"what the server says it drew with lies {gap:.2g} nats a token from the policy (mean ratio "
        f"{figures['rollout_ratio']:.3g}; {bound:g} may be). Its adapter is not in force, it samples at another "
        "temperature, its logprobs are not those of the temperature, or it has another base",
        "See vllm.log, or start the server with --logprobs-mode processed_logprobs. The same command goes on from the "
        "last checkpoint; rollout.max_gap= is the bound.",
    )  # fmt: skip


def in_background(draw: Callable[[], Rollout | None]) -> Callable[[], Rollout | None]:
    """Begin to draw, in a thread. What is returned waits for it, and may be called again."""
    drawn: Future[Rollout | None] = Future()

    def work() -> None:
        try:
            drawn.set_result(draw())
        except BaseException as error:
            drawn.set_exception(error)

    Thread(target=work, name="rollout", daemon=True).start()  # nobody waits for it where the run ends
    return drawn.result
