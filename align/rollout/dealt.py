"""An engine on several ranks: each samples its share of the prompts, and all have the whole rollout in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from align import ranks
from align.models.actor import Actor
from align.rollout.engine import Engine, joined, rows_by_actor
from align.run import Base
from align.types import Rollout


@dataclass(frozen=True)
class DealtEngine:
    """Attributes:
    engine: this rank's.
    batch_size: rows that it decodes at once. Chunks of so many are dealt, and smaller ones where there would not be one
        for each rank.
    pad_id: fills the rectangle.
    device: that rollouts lie on.
    """

    engine: Engine
    batch_size: int
    pad_id: int
    device: torch.device

    def load(self, base: Base, method: str, dtype: torch.dtype) -> None:
        self.engine.load(base, method, dtype)

    def sync(self, actor: Actor) -> None:
        self.engine.sync(actor)

    def close(self) -> None:
        self.engine.close()

    def generate(
        self, prompts: Sequence[Sequence[int]], actor: Actor | Sequence[Actor], seeds: Sequence[int]
    ) -> Rollout:
        size = min(self.batch_size, -(-len(prompts) // ranks.world()))
        lengths = torch.tensor([len(p) for p in prompts])
        chunks: list[list[int]] = []
        for rows in rows_by_actor(actor, len(prompts)).values():
            mine = torch.tensor(rows)
            ordered = mine[torch.argsort(lengths[mine], stable=True)]
            chunks += [chunk.tolist() for chunk in ordered.split(size)]
        share = [row for chunk in ranks.dealt(chunks) for row in chunk]
        part = None
        if share:
            speakers = [actor[row] for row in share] if isinstance(actor, Sequence) else actor
            part = self.engine.generate([prompts[row] for row in share], speakers, [seeds[row] for row in share])
            part = moved(part, torch.device("cpu"))
        found = [(rows, each) for rows, each in ranks.of_all((share, part)) if each is not None]
        order = torch.tensor([row for rows, _ in found for row in rows])
        return moved(joined([each for _, each in found], order, self.pad_id), self.device)


def moved(rollout: Rollout, device: torch.device) -> Rollout:
    sampled = rollout.logprobs_BT
    return replace(
        rollout, tokens_BS=rollout.tokens_BS.to(device), mask_BS=rollout.mask_BS.to(device),
        ended_B=rollout.ended_B.to(device), logprobs_BT=None if sampled is None else sampled.to(device),
    )  # fmt: skip
