"""The name of the distribution on PyPI, and the commands that install its extras."""

from __future__ import annotations

DISTRIBUTION = "align-rlhf"


def install_command(extra: str) -> str:
    """Return the shell command that adds an extra to this environment."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"
