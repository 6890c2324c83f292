"""What a run was computed by: the code, the packages, the checkout, the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from align.redaction import redacted
from align.run.digests import file_digest, json_digest

PACKAGES = ("align", "torch", "transformers", "peft", "bitsandbytes", "trl", "datasets", "accelerate")
DIFF_LIMIT = 1_000_000
OURS = ("align", "annotate", "reward", "conf")
"""The packages of this distribution, and its group files, beside each other in a checkout; in a wheel `conf` lies in
`align`."""


@cache
def code_digest() -> str:
    """sha256 over the names and contents of the installed code and group files, hex."""
    top = Path(__file__).resolve().parents[2]
    files = (p for name in OURS for kind in ("*.py", "*.yaml") for p in (top / name).rglob(kind))
    return json_digest({p.relative_to(top).as_posix(): file_digest(p) for p in sorted(files)})


def machine() -> dict[str, Any]:
    return {"machine": platform.machine(), "cpus": os.cpu_count(), "system": platform.platform()}


def package_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def git_state() -> dict[str, Any] | None:
    """Commit and uncommitted difference of the folder the command runs in; None where that is no git checkout."""

    def git(*arguments: str) -> str:
        ran = subprocess.run(("git", *arguments), capture_output=True, check=True, timeout=20)
        return ran.stdout.decode(errors="replace")

    try:
        commit, diff = git("rev-parse", "HEAD").strip(), git("diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    kept = diff if len(diff) <= DIFF_LIMIT else f"(left out: {len(diff)} characters, sha256 {json_digest(diff)})"
    return {"commit": commit, "diff": redacted(kept)} if diff else {"commit": commit}
