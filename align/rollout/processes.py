"""Programs run beside us, their output kept."""

from __future__ import annotations

import subprocess
from typing import Any

HOUR = 3600
LONGEST = 4 * HOUR
"""Seconds that an engine or a converter may take."""


def run_quietly(words: list[str], what: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A process whose output is kept. Raises: RuntimeError: it takes hours."""
    try:
        return subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=LONGEST, **options)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{what} took more than {LONGEST // HOUR} hours and was ended") from error


def last_words(output: str) -> str:
    """The last line that speaks of an error, or the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "error" in line.lower()), (lines or ["no reason given"])[-1])
