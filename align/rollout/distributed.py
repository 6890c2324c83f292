"""A rollout engine on several ranks: each samples a share, or the first samples all, and all get the whole rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from align import ranks
from align.core.types import Rollout
from align.models.actors import Actor
from align.rollout.engine import Engine, concatenate_rollouts, group_rows_by_actor
from align.run import Base


@dataclass
class DistributedEngine:
    """A rollout engine that distributes prompts over the engines of all ranks, and gathers the whole rollout on each.

    Attributes:
        engine: the engine of this rank.
        device: device of the rollouts.
        batch_size: rows that a rank decodes at once. The rows are distributed in chunks of this size, or smaller ones
            if there would be fewer chunks than ranks.
        pad_id: token id for padding.
        first_rank_only: whether the first rank samples everything: an engine of servers batches by itself. The engines
            of the other ranks are not loaded.
    """

    engine: Engine
    device: torch.device
    batch_size: int
    pad_id: int
    first_rank_only: bool = False

    @property
    def samples_here(self) -> bool:
        return ranks.is_main() or not self.first_rank_only

    @property
    def temperature(self) -> float:
        return self.engine.temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        self.engine.temperature = temperature

    def load(self, base: Base, method: str, dtype: torch.dtype) -> None:
        if self.samples_here:
            self.engine.load(base, method, dtype)

    def sync(self, actor: Actor) -> None:
        if self.samples_here:
            self.engine.sync(actor)

    def close(self) -> None:
        if self.samples_here:
            self.engine.close()

    def generate(
        self, prompts: Sequence[Sequence[int]], actor: Actor | Sequence[Actor], seeds: Sequence[int]
    ) -> Rollout:
        if self.first_rank_only:
            return self.broadcast_rollout(self.generate_on_first_rank(prompts, actor, seeds))
        size = min(self.batch_size, -(-len(prompts) // ranks.world_size()))
        lengths = torch.tensor([len(p) for p in prompts])
        chunks: list[list[int]] = []
        for rows in group_rows_by_actor(actor, len(prompts)).values():
            actor_rows = torch.tensor(rows)
            ordered = actor_rows[torch.argsort(lengths[actor_rows], stable=True)]
            chunks += [chunk.tolist() for chunk in ordered.split(size)]
        own_rows = [row for chunk in ranks.select_own_share(chunks) for row in chunk]
        part = None
        if own_rows:
            actors = [actor[row] for row in own_rows] if isinstance(actor, Sequence) else actor
            part = self.engine.generate([prompts[row] for row in own_rows], actors, [seeds[row] for row in own_rows])
            part = part.to(torch.device("cpu"))
        parts = [(rows, each) for rows, each in ranks.gather_all((own_rows, part)) if each is not None]
        order = torch.tensor([row for rows, _ in parts for row in rows])
        return concatenate_rollouts([each for _, each in parts], order, self.pad_id).to(self.device)

    def generate_on_first_rank(
        self, prompts: Sequence[Sequence[int]], actor: Actor | Sequence[Actor], seeds: Sequence[int]
    ) -> Rollout | None:
        """Sample all prompts on the first rank, and return None on the other ranks.

        May be called in a background thread: it does not communicate. `broadcast_rollout` sends the rollout to the
        other ranks.
        """
        return self.engine.generate(prompts, actor, seeds) if ranks.is_main() else None

    def broadcast_rollout(self, rollout: Rollout | None) -> Rollout:
        """Send the first rank's rollout to all ranks, and return it on `device`. Other ranks pass None."""
        shared_rollout = ranks.broadcast(rollout and rollout.to(torch.device("cpu")))
        assert shared_rollout is not None, "the first rank has sampled"
        return shared_rollout.to(self.device)
