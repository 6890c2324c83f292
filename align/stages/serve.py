"""A server for many adapters on one base, and the tenants that may ask it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.config.root import Config
from align.config.serve import ServeConfig
from align.run import Run
from align.serve.keys import Keys, change_tenant, in_words, read_accounts
from align.serve.limits import Limiter
from align.serve.opening import Opened
from align.serve.usage import Usage, usage_beside
from align.stages.serve_engines import ENGINES
from align.types import Result
from align.web.listening import listening, serve


def run(run: Run, config: Config, *found: Any) -> Result:
    """Args:
    found: of `serve`, what the server begins with.
    """
    stage: ServeConfig = config.stage
    return DO[stage.action](run, config, *found)


def served(run: Run, config: Config, found: Opened) -> Result:
    from align.serve.app import application

    stage: ServeConfig = config.stage
    url, others = origins(stage)
    listening(stage.host, stage.port).close()  # a port that is taken is said before any weights are loaded
    with serving(run, config, found) as (service, why):
        lines = [
            f"base {found.portfolio.base_id} ({found.portfolio.base.digest[:12]})", *named(found),
            f"engine: {why}", told_of_keys(stage),
            f"open {url}, or set OPENAI_BASE_URL={url}/v1", "Ctrl+C ends it; SIGTERM lets it finish",
        ]  # fmt: skip
        app = application(service, [url, *others])

        def drain(at_once: bool) -> Awaitable[None]:
            return service.drain(0.0 if at_once else stage.drain_s)

        serve(app, stage.host, stage.port, lambda: print(*lines, sep="\n", flush=True), drain)
        totals = service.totals
    tokens = totals["completion_tokens"]
    return Result(totals, (f"{totals['requests']:,} requests, answers of {tokens:,} tokens",))


@contextmanager
def serving(run: Run, config: Config, found: Opened) -> Iterator[tuple[Any, str]]:
    """The parts of a server, its engine at work; and which engine that is, and why."""
    from align.models.load import load_tokenizer
    from align.rollout.engine_thread import EngineThread
    from align.serve.formats import ChatFormat, Formats
    from align.serve.metrics import Metrics
    from align.serve.records import RequestLog
    from align.serve.service import Service

    stage, portfolio = config.stage, found.portfolio
    keys = None if stage.keys is None else Path(stage.keys).expanduser()
    known = None if keys is None else Keys(keys)
    with ENGINES[config.serve.name](run, config, found) as ready:
        formats = Formats(lambda folder: ChatFormat.of(load_tokenizer(portfolio.base, folder), ready.generation))
        formats(None)
        for version in portfolio.versions().values():
            ready.check(version.folder)
            ready.engine.register(version.folder, version.digest)
            formats(version)
        thread, log = EngineThread(ready.engine), RequestLog(run.folder / "requests.jsonl")
        usage = None if keys is None else Usage(usage_beside(keys))
        thread.start()
        try:
            yield Service(
                engine=thread, portfolio=portfolio, format_of=formats, check=ready.check, log=log,
                created=int(time.time()),
                vocabulary=ready.vocabulary, metrics=Metrics(ready.engine.stats, lambda: thread.cpu_s),
                limits=Limiter(time.monotonic), keys=known, usage=usage,
            ), ready.why  # fmt: skip
        finally:
            thread.close(within_s=5)
            log.close()
            if usage is not None:
                usage.close()


def named(found: Opened) -> list[str]:
    """The names of a server, and what each stands for."""
    from align.serve.identity import Allowed

    said = []
    for name in found.portfolio.names(Allowed())[1:]:
        weight = (lambda arm: f"{arm.weight:g} of ") if len(name.arms) > 1 else (lambda arm: "")
        arms = [f"{weight(arm)}{arm.label} ({found.portfolio.digest_of(arm.version)[:12]})" for arm in name.arms]
        said.append(f"model {name.name}: {', '.join(arms)}")
    return said


def told_of_keys(stage: ServeConfig) -> str:
    """Who may ask."""
    if stage.keys is None:
        return "keys: none, so whoever reaches this address may ask, load and unload (stage.keys=FILE)"
    count = len(read_accounts(Path(stage.keys).expanduser()))
    return f"keys: {count} tenant{'s' * (count != 1)} in {stage.keys}"


def origins(stage: ServeConfig) -> tuple[str, list[str]]:
    """Under which addresses clients know the server: the one that is told to people, and further ones."""
    if stage.url is not None:
        return stage.url.lower().rstrip("/"), []
    host = f"[{stage.host}]" if ":" in stage.host else stage.host
    return f"http://{host}:{stage.port}", [f"http://localhost:{stage.port}", f"http://127.0.0.1:{stage.port}"]


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


DO: dict[str, Callable[..., Result]] = {"serve": served, "key": keyed}
