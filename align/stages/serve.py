"""A server for many adapters on one base, and the tenants that may ask it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from align.config.root import Config
from align.config.serve import ServeConfig
from align.errors import require
from align.run import Run
from align.run.weights import brings_scores
from align.serve import events
from align.serve.accounting import Accounting
from align.serve.keys import Keys, change_tenant, in_words, read_accounts
from align.serve.limits import Limiter
from align.serve.opening import Opened
from align.serve.tenant_table import as_table
from align.serve.usage import Usage, usage_beside, used_beside
from align.types import Result
from align.web.listening import listening, serve

SHARED = 8
"""One slot in so many is for tenants who have none."""


def run(run: Run, config: Config, found: Opened) -> Result:
    """Args:
    found: what the server begins with.
    """
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

        serve(app, stage.host, stage.port, lambda: print(*lines, sep="\n", flush=True), drain, (events.log.name,))
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
    model = servable(config, found)
    vocabulary, generation = model.get_input_embeddings().weight.shape[0], model.generation_config
    engine, check, why = engine_for(config, model)
    del model  # the engine may have laid out its weights anew
    formats = Formats(lambda folder: ChatFormat.of(load_tokenizer(portfolio.base, folder), generation))
    for version in portfolio.versions().values():
        check(version.folder)
        engine.register(version.folder, version.digest)
        formats(version)
    thread, log = EngineThread(engine), RequestLog(run.folder / "requests.jsonl")
    usage = None if keys is None else Usage(usage_beside(keys))
    thread.start()
    try:
        yield Service(
            engine=thread, portfolio=portfolio, format_of=formats, check=check, log=log,
            created=int(time.time()),
            vocabulary=vocabulary, metrics=Metrics(engine.stats, lambda: thread.cpu_s),
            accounting=Accounting(Limiter(time.monotonic), usage), keys=known,
        ), why  # fmt: skip
    finally:
        thread.close(within_s=5)
        log.close()
        if usage is not None:
            usage.close()


def servable(config: Config, found: Opened) -> Any:
    """The base as its adapters know it: of NF4 the weights that the codes stand for, in fp32."""
    import torch

    from align.models.dequantised import dequantised
    from align.models.load import choose_device, choose_dtype, load_base
    from align.models.start import frozen_as

    device, base = choose_device(config.device), found.portfolio.base
    trained = {artifact.dtype for artifact in found.artifacts.values() if artifact.dtype} - {"auto"}
    if found.portfolio.method != "qlora":
        return load_base(base, frozen_as(found.portfolio.method), device, choose_dtype(config.dtype, device))
    require(
        len(trained) < 2, "stage.adapters", sorted(trained),
        "were trained on NF4 codes of a base in different dtypes, which differ", "Serve them by a server each.",
    )  # fmt: skip
    quantised = choose_dtype(next(iter(trained), config.dtype), device)
    return dequantised(load_base(base, "qlora", device, quantised), torch.float32)


def engine_for(config: Config, model: Any) -> tuple[Any, Callable[[Path], object], str]:
    """The engine that serves a model, what it asks of an adapter before it takes it, and why it is this engine. The
    model is consumed."""
    from align.models.adapter_files import adaptable, adapter_config, check_targets, read_adapter
    from align.models.bank import lowered
    from align.models.fastpath.mixed import MixedDecoder
    from align.models.fastpath.weights import NotPlainError
    from align.models.load import context_length
    from align.rollout.continuous import ContinuousBatch
    from align.rollout.one_at_a_time import OneAtATime

    stage: ServeConfig = config.stage
    context = min(context_length(model), stage.max_length or context_length(model))
    why = "the model is on a GPU, where batches were never measured"
    if model.device.type == "cpu":
        try:
            decoder = MixedDecoder(model, stage.slots, context, stage.resident, stage.max_rank)
        except NotPlainError as error:
            why = f"{model.config.model_type} is not on the fast path ({error})"
        else:
            reserve = stage.slots // SHARED if stage.keys is not None else 0
            batch = ContinuousBatch(decoder, context, stage.queue, stage.prefix_cache_mb * 2**20, reserve=reserve)
            check = partial(lowered, sites=decoder.bank.sites, max_rank=stage.max_rank)
            return batch, check, in_batches(stage, decoder.exact)

    layers = adaptable(model)

    def plain(folder: Path) -> None:
        problem = "is a reward model, and those are served on the fast path alone"
        require(not brings_scores(folder), "stage.adapters", folder.name, problem, "Score by it with stage=eval.")
        check_targets(adapter_config(folder), read_adapter(folder).ranks, layers)

    return OneAtATime(model, context, stage.queue, stage.resident), plain, f"one request at a time: {why}"


def in_batches(stage: ServeConfig, exact: bool) -> str:
    """Which engine it is; and where this machine's products do not agree, that answers can differ in last bits."""
    said = f"continuous batching of {stage.slots} rows, {stage.resident} adapters in memory"
    return said if exact else f"{said}; on this machine an answer's last bits can change with its neighbours"


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


def keyed(config: Config) -> Iterable[str]:
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
    if done.key is not None:
        yield f"the key, shown once: {done.key}"
    if done.revoked:
        yield f"revoked: {', '.join(done.revoked)}"
    yield in_words(done.account)


def listed(config: Config) -> Iterable[str]:
    stage: ServeConfig = config.stage
    assert stage.keys is not None
    keys = Path(stage.keys).expanduser()
    accounts = read_accounts(keys)
    remedy = f"The tenants are {', '.join(sorted(accounts)) or '(none)'}."
    require(stage.tenant in (None, *accounts), "stage.tenant", stage.tenant, "there is no such tenant", remedy)
    shown = [account for name, account in sorted(accounts.items()) if stage.tenant in (None, name)]
    return as_table(shown, used_beside(keys, [account.tenant.name for account in shown]))


PRINTS: dict[str, Callable[[Config], Iterable[str]]] = {"key": keyed, "tenants": listed}
"""What is no run, by `stage.action`: the lines that it prints."""
