"""The environment of a run: code, packages, git checkout and machine."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from align.core.distribution import DISTRIBUTION
from align.core.redaction import redact
from align.run.digests import file_digest, json_digest

PACKAGES = (DISTRIBUTION, "torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate")
DIFF_LIMIT = 1_000_000
THREADS = "OMP_NUM_THREADS"
"""Environment variable that sets the number of CPU threads. If it is empty, torch uses one per core."""
ONEDNN_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables that limit oneDNN to an instruction set, in order of precedence."""
INSTRUCTIONS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "bf16",
    "sve",
    "sve2",
)
"""CPU flags as in /proc/cpuinfo that decide which kernels torch uses, and so the last bits of a result."""
TOP = Path(__file__).resolve().parents[2]
"""Folder that contains the package `align`: the checkout, or `site-packages`."""
CODE = ("align", "align/annotate", "align/reward", "align/conf")
"""Folders of Python code and configuration files, relative to the installed package's parent. In a checkout all but
the first lie beside `align`, where links lead to the second and the third."""


@cache
def code_digest() -> str:
    """Return the SHA-256 in hex over the names and contents of all installed `.py` and `.yaml` files of align.

    A checkout and the wheel that was built from it have the same digest.
    """
    digests = {}
    for name in CODE:
        folder = TOP / name if (TOP / name).is_dir() else TOP / Path(name).name
        for pattern in ("*.py", "*.yaml"):
            for path in folder.rglob(pattern):
                digests[f"{name}/{path.relative_to(folder).as_posix()}"] = file_digest(path)
    return json_digest(dict(sorted(digests.items())))


def describe_machine() -> dict[str, Any]:
    """Return a mapping of CPU model, instruction sets, thread count and operating system, for a run's manifest.

    They decide the last bits of a floating-point sum.
    """
    return {
        "machine": platform.machine(),
        "processor": read_processor_model(),
        "cpus": os.cpu_count(),
        "instructions": list_instructions(),
        "onednn_max_cpu_isa": next((os.environ[name] for name in ONEDNN_LIMITS if os.environ.get(name)), ""),
        "threads": os.environ.get(THREADS, ""),
        "system": platform.platform(),
    }


def describe_processor(hardware: Mapping[str, Any]) -> str:
    """Return the CPU model and the newest instruction set that kernels may use as text, from a manifest's `hardware`.

    Args:
        hardware: the mapping that `describe_machine` returns.
    """
    newest = hardware["onednn_max_cpu_isa"] or (hardware["instructions"].split() or [hardware["machine"]])[-1]
    return f"{hardware['processor'] or 'unknown processor'}, {newest}"


@cache
def read_cpuinfo() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo by name. Empty on systems other than Linux."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        pairs = (line.partition(":") for line in reversed(lines))
        return {key.strip(): value.strip() for key, _, value in pairs}
    return {}


def list_instructions() -> str:
    """Return the CPU's instruction sets that matter to oneDNN and torch, separated by spaces. Empty if unknown."""
    flags = (read_cpuinfo().get("flags") or read_cpuinfo().get("Features", "")).split()
    return " ".join(name for name in INSTRUCTIONS if name in flags)


def read_processor_model() -> str:
    return read_cpuinfo().get("model name", "")


def package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def run_git(folder: Path, *arguments: str) -> str:
    """Run a git command in a folder and return its standard output as text.

    Raises:
        OSError, SubprocessError: git is not installed, or the folder is not in a checkout.
    """
    process = subprocess.run(("git", "-C", str(folder), *arguments), capture_output=True, check=True, timeout=20)
    return process.stdout.decode(errors="replace")


def read_own_commit(top: Path = TOP) -> str:
    """Return the git commit of align's own checkout, with a `+` if its code has uncommitted changes; empty if none.

    Returns an empty text if the code is not in a checkout of its own, as in an installed wheel.

    Args:
        top: the folder that holds the packages.
    """
    try:
        checkout = Path(run_git(top, "rev-parse", "--show-toplevel").strip()).resolve()
        if checkout != top:  # installed inside another project's checkout
            return ""
        changed = run_git(top, "status", "--porcelain", "--", *(Path(name).name for name in CODE))
        return run_git(top, "rev-parse", "HEAD").strip() + ("+" if changed.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def read_git_state() -> dict[str, Any] | None:
    """Return the git `commit` and the redacted uncommitted `diff` of the working folder, or None outside a checkout.

    Without uncommitted changes there is no `diff`. A long one is replaced by its digest.
    """
    try:
        commit = run_git(Path(), "rev-parse", "HEAD").strip()
        diff = run_git(Path(), "diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    if len(diff) > DIFF_LIMIT:
        diff = f"(left out: {len(diff)} characters, sha256 {json_digest(diff)})"
    return {"commit": commit, "diff": redact(diff)} if diff else {"commit": commit}
