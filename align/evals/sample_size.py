"""Says when an evaluation has too few prompts to decide anything, and which setting is the cause."""

from __future__ import annotations

from align.config.groups import DataConfig
from align.report.words import counted

ENOUGH = 64
"""Prompts: at 64, a win rate's 95 % interval is about 0.12 to each side of it."""


def explain_few_prompts(measured: int, data: DataConfig, most: int, *, seen: int = 0, too_long: int = 0) -> str:
    """Return a sentence on an evaluation with fewer than `ENOUGH` prompts: that it decides nothing, and the setting
    that is the cause. Returns an empty text for a larger one.

    Args:
        measured: prompts that were asked.
        data: the settings of the data.
        most: `stage.prompts`.
        seen: prompts that were left out because training saw them.
        too_long: prompts that were left out because they are too long.
    """
    if measured >= ENOUGH:
        return ""
    before = measured + too_long
    if before == most:
        cause = f"stage.prompts={most} asks no more. Raise it"
    elif before == data.limit:
        cause = f"data.limit={data.limit} reads no more. Raise it, or leave it out"
    elif before >= ENOUGH:
        cause = (
            f"{counted(too_long, 'prompt')} did not fit. Raise data.max_length={data.max_length}, or lower "
            "rollout.max_new_tokens"
        )
    elif before + seen >= ENOUGH:
        cause = (
            f"stage.seen=drop left out {counted(seen, 'prompt')} that training saw. Measure on other prompts: "
            "data.eval_path=FILE"
        )
    else:
        cause = explain_small_data(data)
    return f"this result decides nothing: it is of {counted(measured, 'prompt')}, and {ENOUGH} are the least; {cause}"


def explain_small_data(data: DataConfig) -> str:
    """Return which setting of the data gives more prompts to measure on."""
    if data.eval_path is not None:
        return f"data.eval_path={data.eval_path} has no more. Give a larger file"
    if data.name == "manifest":
        return (
            f"the data set {data.path} holds out no more. Make it again with more held out (stage=data "
            "data.held_out=SHARE)"
        )
    if data.name == "annotations":
        return "the project's held-out questions are no more. Measure on a file: data=jsonl data.path=FILE"
    return (
        f"data.held_out={data.held_out:g} holds out no more of {data.path or data.name}. Raise it before training "
        "(data.held_out=0.3), or measure on a file of its own: data.eval_path=FILE"
    )
