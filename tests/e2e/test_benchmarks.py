"""Benchmarks that no other test runs still run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_without_a_gpu():
    sizes = ["--sizes", "tiny", "--device", "cpu", "--batch", "8", "--micro-batch", "4", "--tokens", "16"]
    command = [str(ROOT / "benchmarks" / "gpu.sh"), *sizes]
    done = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    name, *figures = done.stdout.splitlines()[-1].split()
    assert name == "tiny"
    assert all(float(figure) >= 0 for figure in figures)
    assert float(figures[0]) > 0
