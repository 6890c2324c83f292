"""Memory of a CPU run: freed tensors are kept for the next of their size, compiled kernels only the last few, and of a
large buffer the pages that were written."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

M_TRIM_THRESHOLD = -1  # of glibc's malloc.h
M_TOP_PAD = -2
M_MMAP_THRESHOLD = -3
ONE_GIB = 1 << 30
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # oneDNN's own, and that of torch over it
KERNELS_KEPT = 64  # more than the shapes of one micro-batch, forward and backward


def keep_freed_memory() -> None:
    """Let glibc keep freed tensors instead of returning them to the kernel one by one. Does nothing with another C
    library.

    By default every activation above 128 KiB is mapped, faulted in page by page and unmapped again: on the built-in
    model a forward pass without gradients took 0.58 s so, and 0.31 s with the memory kept (32 × 50 tokens, NF4, one
    thread); the peak was the same.
    """
    settings = {M_MMAP_THRESHOLD: ONE_GIB, M_TRIM_THRESHOLD: ONE_GIB, M_TOP_PAD: 64 << 20}
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            for name, value in settings.items():
                ctypes.CDLL(None).mallopt(name, value)


def keep_few_kernels() -> None:
    """Let oneDNN keep the kernels of the last 64 shapes, in place of 1,024; a figure in the environment stands.

    Batches of real text are each of a length of their own, so a shape is used for one micro-batch and seldom again,
    while each kernel holds half a megabyte: 40 steps of the quickstart's SFT in bf16 peaked at 2,073 MB with the
    default, at 1,304 MB so, and took 36.7 and 36.1 s (2 threads). To be called before the first of them is made.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KERNELS_KEPT))


def return_freed_memory() -> None:
    """Return freed memory to the system once: after weights were laid out anew, no tensor of the old sizes will be
    made. On SmolLM2 these are 498 MB."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def reserve_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros that take no memory until they are written."""
    pages = mmap.mmap(-1, max(1, prod(shape)) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=prod(shape)).view(shape)
