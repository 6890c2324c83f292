"""Counting of the bytes of live tensors as they are allocated and freed, to compare them with a memory prediction."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """A torch dispatch mode that counts the bytes of all storages created while it is active, until each is freed.
    Tensors that share a storage count once.

    Memory that a kernel uses inside an operation is not counted.

    Args:
        models: modules whose tensors exist already, and are counted too.

    Attributes:
        now: present bytes of live tensors.
    """

    def __init__(self, models: Iterable[nn.Module | None] = ()) -> None:
        super().__init__()
        self.now = 0
        self._peak = 0
        self._sizes: dict[int, int] = {}
        for model in filter(None, models):
            for tensor in (*model.parameters(), *model.buffers()):
                self._count(tensor)
                for part in iter_tensors(getattr(tensor, "quant_state", None)):
                    self._count(part)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out

    def lap(self) -> int:
        """Return the peak bytes of live tensors since the last call, and start a new peak at the present bytes."""
        peak = self._peak
        self._peak = self.now
        return peak

    def _count(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return
        owner: Any = tensor if tensor.is_mkldnn else tensor.untyped_storage()  # an opaque tensor has no storage
        key = id(owner)
        size = tensor.numel() * tensor.itemsize if tensor.is_mkldnn else owner.nbytes()
        if key in self._sizes:
            self.now += size - self._sizes[key]  # resized in place
        else:
            weakref.finalize(owner, self._free, key).atexit = False
            self.now += size
        self._sizes[key] = size
        self._peak = max(self._peak, self.now)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def iter_tensors(state: Any) -> Iterable[Tensor]:
    """Yield the tensors in the attributes of a bitsandbytes quantisation state, including nested states; nothing for
    None."""
    for value in vars(state).values() if state is not None else ():
        if isinstance(value, Tensor):
            yield value
        elif hasattr(value, "__dict__"):
            yield from iter_tensors(value)


@contextmanager
def watch_live_bytes(device: torch.device, *models: nn.Module | None) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the peak bytes of live tensors since its last call. On a GPU it asks the CUDA
    allocator; elsewhere it counts tensor storages.

    Args:
        models: modules whose tensors exist already.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

        def lap() -> int:
            most = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            return most

        yield lap
        return
    with LiveBytes(models) as live:
        yield live.lap
