"""Who answers: a model, and what on it is in force while it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
        """Whether it is the base as it is, which has no weights of its own to save."""
        ...

    def use(self) -> AbstractContextManager[Any]:
        """Make it the one that speaks, and give the model that it speaks by.

        Raises:
            InputError: the model has no such adapter.
        """
        ...

    def save(self, folder: Path, base: Base) -> None:
        """Write its own weights as they stand, for an engine in another process: an adapter in PEFT's format, or a
        whole model. Nobody asks this of a base alone."""
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
        adapters_off = self.base_alone and isinstance(self.model, PeftModel) and bool(self.model.peft_config)
        with self.model.disable_adapter() if adapters_off else nullcontext():
            yield self.model

    def save(self, folder: Path, base: Base) -> None:
        assert self.adapter is not None, "a base alone has no weights of its own"
        save_adapter(self.model, folder, base, self.adapter)
