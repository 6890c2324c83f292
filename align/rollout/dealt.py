"""An engine on several ranks: all have the whole rollout in the end, whoever samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from align import ranks
from align.core.types import Rollout
from align.models.actor import Actor
from align.rollout.engine import Engine, joined, rows_by_actor
from align.run import Base


@dataclass
class RankedEngine:
    """An engine that samples with another one, at its temperature."""

    engine: Engine

    @property
    def temperature(self) -> float:
        return self.engine.temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        self.engine.temperature = temperature


@dataclass
class DealtEngine(RankedEngine):
    """Each rank samples its share of the prompts.

    Attributes:
        engine: this rank's.
        batch_size: rows that it decodes at once. Chunks of so many are dealt, and smaller ones where there would not be
            one for each rank.
        pad_id: fills the rectangle.
        device: that rollouts lie on.
    """

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
            part = part.to(torch.device("cpu"))
        found = [(rows, each) for rows, each in ranks.of_all((share, part)) if each is not None]
        order = torch.tensor([row for rows, _ in found for row in rows])
        return joined([each for _, each in found], order, self.pad_id).to(self.device)


@dataclass
class FirstRankEngine(RankedEngine):
    """An engine that has servers, which batch by themselves: the first rank asks them for all prompts.

    Attributes:
        engine: the first rank's; that of the others is never asked, and has nothing.
        device: that rollouts lie on.
    """

    device: torch.device

    def load(self, base: Base, method: str, dtype: torch.dtype) -> None:
        if ranks.is_main():
            self.engine.load(base, method, dtype)

    def sync(self, actor: Actor) -> None:
        if ranks.is_main():
            self.engine.sync(actor)

    def close(self) -> None:
        if ranks.is_main():
            self.engine.close()

    def generate(
        self, prompts: Sequence[Sequence[int]], actor: Actor | Sequence[Actor], seeds: Sequence[int]
    ) -> Rollout:
        return self.shared(self.drawn(prompts, actor, seeds))

    def drawn(
        self, prompts: Sequence[Sequence[int]], actor: Actor | Sequence[Actor], seeds: Sequence[int]
    ) -> Rollout | None:
        """What the first rank was told, also in a thread; None on the others. `shared` gives it to all."""
        return self.engine.generate(prompts, actor, seeds) if ranks.is_main() else None

    def shared(self, rollout: Rollout | None) -> Rollout:
        held = ranks.from_main(rollout and rollout.to(torch.device("cpu")))
        assert held is not None, "the first rank has it"
        return held.to(self.device)
