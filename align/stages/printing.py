"""Actions of stages that are no runs: they print, and leave no folder. Nothing is imported but what one of them needs,
so that a question is answered at once."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

from align.config.plan import PlanKeys
from align.config.root import Config
from align.config.stages import STAGES
from align.run.files import storage_error


def prints(config: Config) -> bool:
    """Whether a configuration asks for such an action."""
    stage, action = question(config)
    return action in STAGES[stage].prints


def question(config: Config) -> tuple[str, str | None]:
    """The stage that is asked, and what: a plan is asked with the configuration of the stage that is planned."""
    if isinstance(config.stage, PlanKeys):
        return "plan", "plan"
    return config.stage.name, getattr(config.stage, "action", None)


def show(config: Config) -> int:
    """Print the lines of a question. Returns the exit status: 0, or what the lines' generator returned.

    Raises:
        AlignError: the user's input, a full disk or an unwritable folder among it.
    """
    stage, action = question(config)
    module = importlib.import_module(f"align.stages.{STAGES[stage].module}")
    try:
        return print_lines(module.PRINTS[action](config))
    except Exception as error:
        if found := storage_error(error, config.run.root):
            raise found from error
        raise


def print_lines(lines: Iterable[str]) -> int:
    iterator = iter(lines)
    while True:
        try:
            line = next(iterator)
        except StopIteration as end:
            return end.value or 0
        print(line, flush=True)
