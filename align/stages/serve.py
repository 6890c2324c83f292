"""A server for many adapters on one base, and the tenants that may ask it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.config.root import Config
from align.config.serve import ServeConfig
from align.run import Run
from align.serve.keys import change_tenant, in_words
from align.serve.usage import Usage, usage_beside
from align.types import Result


def run(run: Run, config: Config, *found: Any) -> Result:
    """Args:
    found: of `serve`, the portfolio that the server begins with.
    """
    stage: ServeConfig = config.stage
    return DO[stage.action](run, config, *found)


def keyed(run: Run, config: Config) -> Result:
    stage: ServeConfig = config.stage
    assert stage.keys is not None and stage.tenant is not None  # noqa: PT018 (the configuration says so)
    keys = Path(stage.keys).expanduser()
    limits = {
        "requests_per_minute": stage.requests_per_minute, "tokens_per_minute": stage.tokens_per_minute,
        "concurrency": stage.concurrency, "token_budget": stage.token_budget,
    }  # fmt: skip
    done = change_tenant(
        keys, stage.tenant, admin=stage.admin, allow=stage.allow, limits=limits, lift=stage.lift, revoke=stage.revoke
    )
    if done.key is not None:  # printed, and not in the run's folder, which others may read
        print(f"the key, shown once: {done.key}")
    with Usage(usage_beside(keys)) as usage:
        used = usage.used(stage.tenant)
    words = f"{used.requests:,} requests with {used.tokens:,} tokens were counted"
    revoked = (f"revoked: {', '.join(done.revoked)}",) if done.revoked else ()
    return Result({}, (*revoked, in_words(done.account), words))


DO: dict[str, Callable[..., Result]] = {"key": keyed}
