"""What happens when, as functions of the update's number alone: nothing here has a state that a resume could lose."""

from __future__ import annotations

import math

import torch

from align.rollout.randomness import generator_for


def prompt_indices(update: int, batch_size: int, total: int, seed: int) -> list[int]:
    """Which prompts update number `update` (from 0) sees: each pass over all of them in a new random order.

    A batch that reaches the end of one pass goes on into the next.
    """
    chosen: list[int] = []
    position = update * batch_size
    while len(chosen) < batch_size:
        epoch, offset = divmod(position + len(chosen), total)
        order = torch.randperm(total, generator=generator_for(torch.device("cpu"), seed, "prompts", epoch))
        chosen += order[offset : offset + batch_size - len(chosen)].tolist()
    return chosen


def lr_factor(update: int, updates: int, warmup: float, schedule: str) -> float:
    """The factor of the learning rate at update number `update` (from 0): it rises over the first `warmup` share of the
    updates, then stays (`constant`), or falls to nearly 0 along a line (`linear`) or half a cosine (`cosine`)."""
    rising = int(updates * warmup)
    if update < rising:
        return (update + 1) / (rising + 1)
    progress = (update - rising) / (updates - rising)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[schedule]
