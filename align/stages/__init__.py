"""The stages of the command line, such as SFT, PPO and evaluation: one module for each (a package for
evaluation), with `inputs` and `run`.

`runner.py` runs a stage on the first rank, and `worker_rank.py` on the others.
"""

from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

from align.config.stages import STAGES


def load_stage(name: str) -> ModuleType:
    """Import and return the module that implements a stage, such as `align.stages.ppo`. This does not import torch.

    The module has `inputs(config)`, which resolves the run's inputs before the run has a name, and
    `run(run, config, *rows)`, which does the work. `PRINTS`, if it is there, holds the actions that print and make no
    run. `PRELOAD`, if it is there, names the modules with torch that `run` imports, for a process that is forked for
    several runs.
    """
    return import_module(f"align.stages.{STAGES[name].module}")


def preload(stages: Iterable[str]) -> None:
    """Import the modules listed in `PRELOAD` of each stage, torch included, so that forked processes share them."""
    for stage in stages:
        for name in getattr(load_stage(stage), "PRELOAD", ()):
            import_module(name)
