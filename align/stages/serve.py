"""A server for many adapters on one base, and the tenants that may ask it."""

from __future__ import annotations

from collections.abc import Callable

from align.config.root import Config
from align.config.serve import ServeConfig
from align.run import Run
from align.types import Result


def run(run: Run, config: Config) -> Result:
    stage: ServeConfig = config.stage
    return DO[stage.action](run, config)


DO: dict[str, Callable[[Run, Config], Result]] = {}
