"""What a CPU run keeps in memory: freed tensors, for the next of their size; compiled kernels, only the last few; of a
large buffer, the pages that were written."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
ONE_GIB = 1 << 30
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and that of torch over it
KERNELS_KEPT = 64  # more than the shapes of one micro-batch, forward and backward


def keep_freed_memory() -> bool:
    """Tell glibc not to hand freed tensors back to the kernel one by one.

    By default every activation above 128 KiB is mapped, faulted in page by page and unmapped again: on the built-in
    model a forward pass without gradients took 0.58 s so, and 0.31 s with the memory kept (32 × 50 tokens, NF4, one
    thread); the peak was the same. Returns False where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = ((M_MMAP_THRESHOLD, ONE_GIB), (M_TRIM_THRESHOLD, ONE_GIB), (M_TOP_PAD, 64 << 20))
    taken = [mallopt(name, value) == 1 for name, value in settings]
    return all(taken)


def keep_few_kernels() -> None:
    """Let oneDNN keep the kernels of the last 64 shapes, in place of 1,024; a figure in the environment stands.

    Batches of real text are each of a length of their own, so a shape is used for one micro-batch and seldom again,
    while each kernel holds half a megabyte: 40 steps of the quickstart's SFT in bf16 peaked at 2,073 MB with the
    default, at 1,304 MB so, and took 36.7 and 36.1 s (2 threads). To be called before the first of them is made.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS_KEPT))


def hand_back_freed_memory() -> None:
    """Give what was freed to the system, once: after weights were laid out anew, what held the old ones is of no size
    that is asked for again. On SmolLM2 these are 498 MB."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written: room for as much as may come."""
    ours = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, max(1, prod(shape)) * dtype.itemsize, flags=ours)
    return torch.frombuffer(pages, dtype=dtype, count=prod(shape)).view(shape)
