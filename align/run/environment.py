"""What a run was computed by: the code, the packages, the checkout, the machine."""

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
from align.core.redaction import redacted
from align.run.digests import file_digest, json_digest

PACKAGES = (DISTRIBUTION, "torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate")
DIFF_LIMIT = 1_000_000
THREADS = "OMP_NUM_THREADS"
"""The variable that sets them; where it is empty, torch takes one a core."""
ONEDNN_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""The variables that limit oneDNN to an instruction set, the first of them first."""
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
"""Flags of a processor that decide which kernel sums, and so its last bits, as Linux calls them."""
TOP = Path(__file__).resolve().parents[2]
"""The folder that holds the package `align`."""
CODE = ("align", "align/annotate", "align/reward", "align/conf")
"""Folders of code and group files. In a checkout all but the first lie beside `align`, where links lead to the
second and the third."""


@cache
def code_digest() -> str:
    """Return the sha256 over the names and contents of the installed code and group files, in hex. A checkout and the
    wheel that was built from it have the same digest."""
    digests = {}
    for name in CODE:
        folder = TOP / name if (TOP / name).is_dir() else TOP / Path(name).name
        for pattern in ("*.py", "*.yaml"):
            for path in folder.rglob(pattern):
                digests[f"{name}/{path.relative_to(folder).as_posix()}"] = file_digest(path)
    return json_digest(dict(sorted(digests.items())))


def machine() -> dict[str, Any]:
    """What decides the last bits of a sum: the processor and the threads among it, as far as the environment says."""
    return {
        "machine": platform.machine(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "instructions": instructions(),
        "onednn_max_cpu_isa": next((os.environ[name] for name in ONEDNN_LIMITS if os.environ.get(name)), ""),
        "threads": os.environ.get(THREADS, ""),
        "system": platform.platform(),
    }


def describe_processor(hardware: Mapping[str, Any]) -> str:
    """Return the processor's model and the newest instruction set that kernels may use, of a manifest's `hardware`."""
    newest = hardware["onednn_max_cpu_isa"] or (hardware["instructions"].split() or [hardware["machine"]])[-1]
    return f"{hardware['processor'] or 'unknown processor'}, {newest}"


@cache
def cpuinfo() -> dict[str, str]:
    """Return what Linux says of the first processor; empty on another system."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        pairs = (line.partition(":") for line in reversed(lines))
        return {key.strip(): value.strip() for key, _, value in pairs}
    return {}


def instructions() -> str:
    """Return the instruction sets of the processor among which oneDNN and torch choose their kernels; empty if the
    system does not list them."""
    flags = (cpuinfo().get("flags") or cpuinfo().get("Features", "")).split()
    return " ".join(name for name in INSTRUCTIONS if name in flags)


def processor() -> str:
    """Return the processor's model; empty if the system does not say."""
    return cpuinfo().get("model name", "")


def package_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def git(folder: Path, *arguments: str) -> str:
    """What git says of a folder.

    Raises:
        OSError, SubprocessError: there is no git, or no checkout.
    """
    ran = subprocess.run(("git", "-C", str(folder), *arguments), capture_output=True, check=True, timeout=20)
    return ran.stdout.decode(errors="replace")


def own_commit(top: Path = TOP) -> str:
    """Commit of the checkout that this code lies in, with a `+` behind it where the code has changes that are not
    committed; empty where it lies in none, as an installed wheel does.

    Args:
        top: the folder that holds the packages.
    """
    try:
        if Path(git(top, "rev-parse", "--show-toplevel").strip()).resolve() != top:  # a wheel in somebody's checkout
            return ""
        changed = git(top, "status", "--porcelain", "--", *(Path(name).name for name in CODE))
        return git(top, "rev-parse", "HEAD").strip() + ("+" if changed.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def git_state() -> dict[str, Any] | None:
    """Commit and uncommitted difference of the folder the command runs in; None where that is no git checkout."""
    here = Path()
    try:
        commit, diff = git(here, "rev-parse", "HEAD").strip(), git(here, "diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    kept = diff if len(diff) <= DIFF_LIMIT else f"(left out: {len(diff)} characters, sha256 {json_digest(diff)})"
    return {"commit": commit, "diff": redacted(kept)} if diff else {"commit": commit}
