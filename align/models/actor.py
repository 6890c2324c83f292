"""Who answers: a model, and what on it is in force while it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from peft import PeftModel

from align.models.adapters import save_adapter
from align.models.fastpath.lora import require_known
from align.run import Base


class Actor(Protocol):
    """Somebody who answers prompts: an adapter on a model, a role of PPO, a whole model."""

    @property
    def base_alone(self) -> bool:
        """Whether it is the base that its engine was loaded on, which has no weights of its own to save."""
        ...

    def use(self) -> AbstractContextManager[Any]:
        """Make it the one that speaks, and give the model that it speaks by.

        Raises:
            InputError: the model has no such adapter.
        """
        ...

    def save(self, folder: Path, base: Base) -> None:
        """Write its own weights as they stand, for an engine with weights of its own: an adapter in PEFT's format, or a
        whole model. Nobody asks this of a base alone. Where ranks share the weights, all of them ask it."""
        ...


@dataclass(frozen=True)
class ModelActor:
    """A model that is complete in itself, and the adapter on it that speaks (None: the base by itself)."""

    model: Any
    adapter: str | None = None

    @property
    def base_alone(self) -> bool:
        return self.adapter is None

    @contextmanager
    def use(self) -> Iterator[Any]:
        """For sampling and logprobs; nothing trains.

        Raises:
            InputError: the model has no such adapter.
        """
        if self.adapter is not None:
            require_known([self.adapter], getattr(self.model, "peft_config", ()))
            self.model.set_adapter(self.adapter, inference_mode=True)
        if self.adapter is not None or not isinstance(self.model, PeftModel):
            yield self.model
            return
        try:
            with self.model.disable_adapter():
                yield self.model
        finally:  # which PEFT lets train from here on
            self.model.set_requires_grad(self.model.active_adapters, False)

    def save(self, folder: Path, base: Base) -> None:
        assert self.adapter is not None, "a base alone has no weights of its own"
        save_adapter(self.model, folder, base, self.adapter)
