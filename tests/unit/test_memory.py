"""Memory of a CPU run, measured in separate processes: each setting is read once per process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from align.models.cpu_memory import KERNEL_CACHES

GLIBC = "import ctypes; assert ctypes.CDLL(None).mallinfo2"
KERNELS = """
import ctypes, os, torch
from align.models.cpu_memory import limit_kernel_cache

class Mallinfo2(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in "arena o s h hblkhd u f uordblks fordblks keepcost".split()]

glibc = ctypes.CDLL(None)
glibc.mallinfo2.restype = Mallinfo2

def used():
    info = glibc.mallinfo2()
    return info.uordblks + info.hblkhd

def measure():
    torch.set_num_threads(1)
    weight = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    before = used()
    for length in range(1, 301):
        hidden = torch.randn(4, length, 32, dtype=torch.bfloat16, requires_grad=True)
        torch.nn.functional.linear(hidden, weight).sum().backward()
    print((used() - before) / 2**20, flush=True)

for setting in (limit_kernel_cache, lambda: None):  # torch is imported once: it reads the setting at its first kernel
    if not os.fork():
        setting()
        measure()
        os._exit(0)
    assert os.wait()[1] == 0
"""


def run_script(script: str, **environment: str) -> str:
    # An earlier command in this process may have set the variables.
    inherited = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES}
    process = subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    return process.stdout.strip()


def has_mallinfo2() -> bool:
    return subprocess.run([sys.executable, "-c", GLIBC], capture_output=True).returncode == 0


@pytest.mark.skipif(not has_mallinfo2(), reason="needs glibc 2.33 or newer, to ask malloc what is in use")
def test_kernels_of_shapes_gone_by_are_not_kept() -> None:
    limited_mib, unlimited_mib = map(float, run_script(KERNELS).split())
    assert limited_mib < 60, "MiB after 300 shapes"
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # elsewhere bf16 does not run in oneDNN
        assert unlimited_mib > 2 * limited_mib


def test_the_users_own_cache_size_stands() -> None:
    script = (
        "import os; from align.models.cpu_memory import *; limit_kernel_cache(); print(*map(os.getenv, KERNEL_CACHES))"
    )
    assert run_script(script, ONEDNN_PRIMITIVE_CACHE_CAPACITY="512") == "512 64"
