"""What a batch is learned from besides its scores: logprobs of policy and reference, values."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor

from align.models.chunks import in_chunks, several_in_chunks
from align.models.roles import CachedForward, Roles
from align.types import Rollout


class Estimates(NamedTuple):
    """Each [B, T] or [B], without a gradient; values where there is a critic, and `behind_B` where responses that were
    cut are to be valued."""

    old_logprobs_BT: Tensor
    ref_logprobs_BT: Tensor
    values_BT: Tensor | None
    behind_B: Tensor | None


def estimated(
    roles: Roles, rollout: Rollout, *, temperature: float, micro_batch: int, minibatches: int, bootstrap: bool = False
) -> tuple[Estimates, CachedForward | None]:
    """The estimates of a batch; and the passes behind them, where they serve the first gradient step too.

    Before that step the policy is still the one that sampled. Where the whole batch is one minibatch and one
    micro-batch, the pass that gives the old logprobs is therefore the pass that is learned from, and likewise the
    values': their graphs are kept until then, and two passes are saved.

    Args:
        bootstrap: value the states behind the responses too, in a pass of their own.
    """
    behind = in_chunks(roles.values_behind, rollout, micro_batch) if bootstrap else None
    if minibatches > 1 or micro_batch < len(rollout.ended_B):
        estimates = partial(roles.estimates, temperature=temperature)
        old, reference, *values = several_in_chunks(estimates, rollout, micro_batch)
        return Estimates(old, reference, values[0] if values else None, behind), None
    cached = roles.cached_forward(rollout, temperature)
    reference = in_chunks(lambda part: roles.logprobs("reference", part, temperature)[0], rollout, micro_batch)
    values_BT = None if cached.values_BT is None else cached.values_BT.detach()
    return Estimates(cached.output.logprobs_BT.detach(), reference, values_BT, behind), cached
