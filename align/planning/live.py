"""The bytes of tensors that are alive, counted as they are made and freed: what a prediction is compared with."""

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
    """Counts the storages of all tensors that an operation makes while it is entered, each once, until it is freed.

    Inside one operation nothing is seen: what a kernel needs for itself is not counted.

    Args:
        there: modules whose tensors are alive already.

    Attributes:
        now: bytes that are alive.
    """

    def __init__(self, there: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.now, self._peak, self._sizes = 0, 0, dict[int, int]()
        for module in there:
            for tensor in (*module.parameters(), *module.buffers()):
                self._see(tensor)
                state = getattr(tensor, "quant_state", None)
                for each in tensors_in(state):
                    self._see(each)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def lap(self) -> int:
        """The most that was alive at once since the last lap."""
        found, self._peak = self._peak, self.now
        return found

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return
        whole: Any = tensor if tensor.is_mkldnn else tensor.untyped_storage()  # an opaque tensor has no storage
        key = id(whole)
        size = tensor.numel() * tensor.itemsize if tensor.is_mkldnn else whole.nbytes()
        if key in self._sizes:
            self.now += size - self._sizes[key]  # resized in place
        else:
            weakref.finalize(whole, self._gone, key).atexit = False
            self.now += size
        self._sizes[key] = size
        self._peak = max(self._peak, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def tensors_in(state: Any) -> Iterable[Tensor]:
    """The tensors of a quantised weight's state, nested ones too."""
    for value in vars(state).values() if state is not None else ():
        if isinstance(value, Tensor):
            yield value
        elif hasattr(value, "__dict__"):
            yield from tensors_in(value)


@contextmanager
def watch_live_bytes(device: torch.device, *models: nn.Module | None) -> Iterator[Callable[[], int]]:
    """Give a function that returns the most bytes that were alive since its last call, on a GPU as its allocator says.

    Args:
        models: whose tensors are alive already.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

        def lap() -> int:
            most = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            return most

        yield lap
        return
    with LiveBytes(model for model in models if model is not None) as live:
        yield live.lap
