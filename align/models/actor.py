"""Actors: a model and the adapter on it that answers prompts."""

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
    """What answers prompts: an adapter on a model, a role of PPO, or a whole model."""

    @property
    def base_alone(self) -> bool:
        """Whether it is the base itself, which has no weights of its own to save."""
        ...

    def use(self) -> AbstractContextManager[Any]:
        """Activate it and return its model.

        Raises:
            InputError: the model has no such adapter.
        """
        ...

    def save(self, folder: Path, base: Base) -> None:
        """Save its own weights for an engine in another process: an adapter in PEFT's format, or a whole model.

        A base alone has none. If ranks share the weights, every rank must call it.
        """
        ...


@dataclass(frozen=True)
class ModelActor:
    """A model, and the adapter on it that answers; None for the base alone."""

    model: Any
    adapter: str | None = None

    @property
    def base_alone(self) -> bool:
        return self.adapter is None

    @contextmanager
    def use(self) -> Iterator[Any]:
        """Activate the adapter for sampling and logprobs, without gradients.

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
        finally:  # PEFT lets the active adapter train after this block
            self.model.set_requires_grad(self.model.active_adapters, False)

    def save(self, folder: Path, base: Base) -> None:
        assert self.adapter is not None, "a base alone has no weights of its own"
        save_adapter(self.model, folder, base, self.adapter)
