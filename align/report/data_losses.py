"""Warnings of steps that removed much of a source: the step, the share, examples and the setting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.report.words import percent

WIDTH = 160
"""Characters of an example."""
SETTINGS = {
    "refused": ("rows that cannot be read", "data.on_bad_row=skip leaves them out"),
    "undecided": ("pairs without a decision", "their answers are equal, tied or alone"),
    "after_score": ("dropped by score", "stage.score.keep, stage.score.least and stage.score.most cut there"),
    "after_decontamination": (
        "like evaluation rows",
        "stage.contamination.action=report keeps them, stage.contamination.near says how similar they are",
    ),
    "after_exact_dedup": (
        "exact duplicates",
        "stage.duplicates.exact=false keeps them, stage.duplicates.over says of what",
    ),
    "after_near_dedup": (
        "near-duplicates",
        "stage.duplicates.near=null keeps them, a higher stage.duplicates.near those that are less similar",
    ),
    "after_caps": ("over the cap", "the source's cap in stage.sources"),
    "after_test_decontamination": ("like test rows", "stage.contamination.test=false keeps them"),
}
"""Step → what it removes, and the setting that decides."""


def headline(loss: Mapping[str, Any]) -> str:
    """Return the warning without its examples."""
    step = loss["step"]
    if step.startswith("clean: "):
        what = f"step {step.removeprefix('clean: ')} of stage.clean"
        setting = "loosen the step, or take it out of stage.clean"
    else:
        what, setting = SETTINGS[step]
    share = percent(loss["removed"] / loss["of"])
    return (
        f"warning: {loss['source']}: {what} removed {loss['removed']:,} of {loss['of']:,} rows ({share}). "
        f"Setting: {setting}"
    )


def lines_of_loss(loss: Mapping[str, Any]) -> list[str]:
    """Return the warning, a line an example behind it."""
    return [headline(loss), *(f"  for example: {shorten(text)}" for text in loss["examples"])]


def shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"
