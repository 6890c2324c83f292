"""An engine on several ranks: all have the whole rollout in the end, whichever rank samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from align import ranks
from align.core.types import Rollout
from align.models.actors import Actor
from align.rollout.engine import Engine, joined, rows_by_actor
from align.run import Base


@dataclass
class DistributedEngine:
    """An engine that samples with another one, at its temperature.

    Attributes:
        engine: of this rank.
        device: that rollouts lie on.
        batch_size: rows that a rank decodes at once. Chunks of so many are dealt, and smaller ones if there would not
            be one for each rank.
        pad_id: fills the rectangle.
        first_rank_only: the engine has servers, which batch by themselves: the first rank asks them for all prompts.
            The engines of the other ranks are never asked, and have nothing.
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
            return self.share(self.generate_here(prompts, actor, seeds))
        size = min(self.batch_size, -(-len(prompts) // ranks.world_size()))
        lengths = torch.tensor([len(p) for p in prompts])
        chunks: list[list[int]] = []
        for rows in rows_by_actor(actor, len(prompts)).values():
            actor_rows = torch.tensor(rows)
            ordered = actor_rows[torch.argsort(lengths[actor_rows], stable=True)]
            chunks += [chunk.tolist() for chunk in ordered.split(size)]
        share = [row for chunk in ranks.own_share(chunks) for row in chunk]
        part = None
        if share:
            actors = [actor[row] for row in share] if isinstance(actor, Sequence) else actor
            part = self.engine.generate([prompts[row] for row in share], actors, [seeds[row] for row in share])
            part = part.to(torch.device("cpu"))
        parts = [(rows, each) for rows, each in ranks.gather_all((share, part)) if each is not None]
        order = torch.tensor([row for rows, _ in parts for row in rows])
        return joined([each for _, each in parts], order, self.pad_id).to(self.device)

    def generate_here(
        self, prompts: Sequence[Sequence[int]], actor: Actor | Sequence[Actor], seeds: Sequence[int]
    ) -> Rollout | None:
        """Sample everything on the first rank, also in a thread. Returns None on the others; `share` gives the rollout
        to all."""
        return self.engine.generate(prompts, actor, seeds) if ranks.is_main() else None

    def share(self, rollout: Rollout | None) -> Rollout:
        shared = ranks.broadcast(rollout and rollout.to(torch.device("cpu")))
        assert shared is not None, "the first rank has it"
        return shared.to(self.device)
