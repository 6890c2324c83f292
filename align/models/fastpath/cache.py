"""A key-value cache that is reserved once, for a number of columns that is known beforehand.

transformers' dynamic cache concatenates at every token, which copies all that is there and asks the allocator for a
larger piece each time. docs/decisions.md says what it costs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class ReservedLayer(DynamicLayer):
    """Keys and values [B, heads, columns so far, D] of one layer, as the front of a buffer."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.used = columns, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device, self.is_initialized = key_states.device, True
        self._keys, self._values = (
            torch.empty(*states.shape[:2], self.columns, states.shape[3], dtype=states.dtype, device=states.device)
            for states in (key_states, value_states)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, self.used = self.used, self.used + key_states.shape[2]
        self._keys[:, :, first : self.used] = key_states
        self._values[:, :, first : self.used] = value_states
        return self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows; the buffer stays where it is."""
        for buffer in (self._keys, self._values):
            buffer[: len(indices), :, : self.used] = buffer[indices, :, : self.used]
        self._keys, self._values = self._keys[: len(indices)], self._values[: len(indices)]
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._keys[:, :, : self.used], self._values[:, :, : self.used]
        return self.keys, self.values


class ReservedCache(Cache):
    """An empty cache with room for `columns` tokens a row.

    Attributes:
        decoder: the weights, ready for many tokens, where the short forward filled the cache: they do not change while
            it is in use. None where it is empty, or the model's own forward filled it.
    """

    def __init__(self, columns: int) -> None:
        super().__init__(layer_class_to_replicate=partial(ReservedLayer, columns))  # pyright: ignore[reportArgumentType]
        self.decoder: Any = None

    @property
    def groups(self) -> int:
        """Heads of the keys of a layer that has some."""
        layer: Any = self.layers[0]
        return layer.keys.shape[1]
