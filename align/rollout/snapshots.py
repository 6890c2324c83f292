"""What engines with weights of their own share: they answer with snapshots of the actors' adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from align.core.errors import require
from align.models.actor import Actor
from align.models.adapter_pool import snapshot
from align.rollout.engine import rows_by_actor
from align.run import Base


class SnapshotEngine:
    """The part of an engine with weights of its own that knows which snapshot of an actor's adapter answers.

    Attributes:
        name: of the engine, as `rollout.engine` has it.
        base, snapshots: the base, and the folder of snapshots, once it is loaded.
        digests: actor → digest of its snapshot; None for the base.
    """

    name: ClassVar[str]
    base: Base
    snapshots: Path
    digests: dict[Actor, str | None]

    def sync(self, actor: Actor) -> None:
        """Answer from now on with this actor's weights as they stand.

        Raises:
            InputError: the actor is no plain adapter.
        """
        folder = None
        if not actor.base_alone:
            folder = snapshot(actor, self.base, self.snapshots)
            is_adapter = (folder / "adapter_config.json").is_file()
            require(is_adapter, "rollout.engine", self.name, "answers by adapters alone", "Use rollout=hf.")
        self.load_snapshot(actor, folder)
        before = self.digests.get(actor)
        self.digests[actor] = None if folder is None else folder.name
        if before is not None and before not in self.digests.values():
            self.drop_snapshot(before)

    def load_snapshot(self, actor: Actor, folder: Path | None) -> None:
        """Get ready to answer by a snapshot, or by the base if `folder` is None."""
        raise NotImplementedError

    def drop_snapshot(self, digest: str) -> None:
        raise NotImplementedError

    def digests_of_rows(self, actor: Actor | Sequence[Actor], rows: int) -> list[str | None]:
        """Return whose snapshot answers each row."""
        actors = actor if isinstance(actor, Sequence) else [actor] * rows
        for each in rows_by_actor(actor, rows):
            if each not in self.digests:
                self.sync(each)
        return [self.digests[each] for each in actors]
