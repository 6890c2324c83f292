"""One module a stage, with its `inputs` and its `run`; `runner.py` runs one, on other ranks `worker_rank.py`."""

from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

from align.config.stages import STAGES


def load_stage(name: str) -> ModuleType:
    """Import the module of a stage, which does not import torch.

    `inputs(config)` finds what a run starts from, before the run has a name. `run(run, config, *rows)` does the work.
    `PRINTS` has the actions that are no runs. `PRELOAD` names modules with torch that `run` imports, for a process that
    is forked for several runs.
    """
    return import_module(f"align.stages.{STAGES[name].module}")


def preload(stages: Iterable[str]) -> None:
    """Import all that runs of these stages need, torch among it."""
    for stage in stages:
        for name in getattr(load_stage(stage), "PRELOAD", ()):
            import_module(name)
