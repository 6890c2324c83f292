"""A server for many adapters on one base, and the tenants that may ask it."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

from align.config.root import Config
from align.config.serve import ServeConfig
from align.config.settings import changed
from align.core.aliases import parsed_aliases
from align.core.errors import AlignError, require
from align.core.files import user_path
from align.core.types import Result
from align.models.start import label
from align.run import Input, Run
from align.run.signing import public_key
from align.serve.alias_watcher import Following
from align.serve.engines import Ready, Room, VllmStart, own_engine, vllm_engine
from align.serve.rate_limits import Limiter, RequestLimits
from align.serve.request_log import operator_log, warn_if_stale
from align.serve.startup import Opened, opened
from align.serve.tenants import Keys, Limits, TenantKeys, change_tenant, read_key_file
from align.serve.usage import Accounting, Usage, Used, usage_beside, used_beside
from align.stages.starting import Inputs
from align.web.listening import listening, serve

TENANT_COLUMNS = (
    "tenant",
    "keys",
    "may ask for",
    "requests/min",
    "tokens/min",
    "concurrency",
    "requests",
    "tokens used",
    "token budget",
    "tokens left",
)
SHARED = 8
"""One slot in so many is for tenants who have none."""


def inputs(config: Config) -> Inputs:
    stage: ServeConfig = config.stage
    if stage.keys is not None:
        read_key_file(user_path(stage.keys, "stage.keys"))  # a mistake in it costs no seconds
    signer = None if config.export.verify is None else public_key(config.export.verify, "export.verify")
    found = opened(
        parsed_aliases(stage.adapters, "stage.adapters"), config.run.folder,
        path=config.model.path, revision=config.model.revision, method=config.method.name,
        roots=[user_path(root, "stage.roots").absolute() for root in stage.roots], signer=signer,
    )  # fmt: skip
    base, method = found.portfolio.base, found.portfolio.method
    config = changed(config, method=changed(config.method, name=method))
    records = {"base": Input(base.digest, ref=base.id)}
    if signer is not None:
        records["signer"] = Input(signer.fingerprint)
    records |= {f"adapters.{ref}": artifact.as_input() for ref, artifact in found.artifacts.items()}
    return Inputs(config, label(base, method), base, records, lambda: (found,), again=True)


def run(run: Run, config: Config, found: Opened) -> Result:
    """Args:
    found: what the server begins with.
    """
    stage: ServeConfig = config.stage
    url, others = origins(stage)
    listening(stage.host, stage.port).close()  # a port that is taken is said before any weights are loaded
    began = time.monotonic()
    print(f"loading base {found.portfolio.base_id} ({found.portfolio.base.digest[:12]}) …", flush=True)
    from align.serve.app import application  # some seconds, with what it imports

    with serving(run, config, found) as (service, why):
        lines = [
            *named(found), f"engine: {why}", *told_of_signer(found), told_of_keys(stage),
            f"ready after {time.monotonic() - began:.1f} s: open {url}, or set OPENAI_BASE_URL={url}/v1",
            "Ctrl+C ends it; SIGTERM lets it finish",
        ]  # fmt: skip
        app = application(service, [url, *others])

        def drain(at_once: bool) -> Awaitable[None]:
            return service.drain(0.0 if at_once else stage.drain_s)

        service.stopped = partial(signal.raise_signal, signal.SIGTERM)
        serve(app, stage.host, stage.port, lambda: print(*lines, sep="\n", flush=True), drain, (operator_log.name,))
        totals = service.totals
        if not service.engine.alive:
            raise AlignError(
                f"the engine has ended by itself. {run.folder} has logs that say why. Start the server again."
            )
    tokens = totals["completion_tokens"]
    requests = f"{totals['requests']:,} request{'s' * (totals['requests'] != 1)}"
    return Result(totals, (f"{requests}, answers of {tokens:,} tokens",))


@contextmanager
def serving(run: Run, config: Config, found: Opened) -> Iterator[tuple[Any, str]]:
    """The parts of a server, its engine at work; and which engine that is, and why."""
    from align.models.load import load_tokenizer
    from align.rollout.engine_thread import EngineThread
    from align.serve.metrics import Metrics
    from align.serve.prompts import ChatFormat, Formats
    from align.serve.request_log import AdapterLog, RequestLog
    from align.serve.service import Service

    stage, portfolio = config.stage, found.portfolio
    keys = None if stage.keys is None else user_path(stage.keys, "stage.keys")
    known = None if keys is None else Keys(keys)
    with ENGINES[config.serve.name](run, config, found) as ready:
        formats = Formats(lambda folder: ChatFormat.of(load_tokenizer(portfolio.base, folder), ready.generation))
        versions = portfolio.versions().values()
        for ref, artifact in found.artifacts.items():
            warn_if_stale(ref, artifact.path)
        if versions:
            print(f"reading {len(versions)} adapter{'s' * (len(versions) > 1)} …", flush=True)
        for version in versions:
            ready.check(version.folder)
            ready.engine.register(version.folder, version.digest)
            formats(version)
        thread, log = EngineThread(ready.engine), RequestLog(run.folder / "requests.jsonl")
        changes = AdapterLog(run.folder / "adapters.jsonl")
        portfolio.tell(changes.write)
        usage = None if keys is None else Usage(usage_beside(keys))
        thread.start()
        try:
            yield Service(
                engine=thread, portfolio=portfolio, format_of=formats, check=ready.check, log=log,
                created=int(time.time()),
                vocabulary=ready.vocabulary, metrics=Metrics(ready.engine.stats, lambda: thread.cpu_s),
                accounting=Accounting(Limiter(time.monotonic, stage.max_answers), usage),
                limits=RequestLimits(stage.max_prompts, stage.max_logprobs),
                keys=known, following=following(config, found),
            ), ready.why  # fmt: skip
        finally:
            thread.close(within_s=5)
            log.close()
            changes.close()
            if usage is not None:
                usage.close()


def following(config: Config, found: Opened) -> Following | None:
    """The names that mean what an alias means; None where none does."""
    dtypes = [artifact.dtype for artifact in found.artifacts.values()]
    root = config.run.folder
    return Following(root, found.following, found.portfolio, dtypes) if found.following else None


@contextmanager
def own(run: Run, config: Config, found: Opened) -> Iterator[Ready]:
    """align's own engine, on the base as its adapters know it: of NF4 the weights that the codes stand for, in fp32."""
    import torch

    from align.models.dequantised import dequantised
    from align.models.load import choose_device, choose_dtype, load_base
    from align.models.start import frozen_as

    device, base, method = choose_device(config.device), found.portfolio.base, found.portfolio.method
    dtype = choose_dtype(trained_in(config, found), device)
    model = load_base(base, frozen_as(method), device, dtype)
    yield own_engine(dequantised(model, torch.float32) if method == "qlora" else model, room(config.stage))


@contextmanager
def vllm(run: Run, config: Config, found: Opened) -> Iterator[Ready]:
    """vLLM. What it must say by the base and by each adapter is found before it starts, so that it has the memory of
    that."""
    from align.export.for_vllm import ForVllm
    from align.models.load import DTYPES, choose_device, choose_dtype, describe, load_tokenizer
    from align.rollout.engine_process import VLLM, engine_version, required_interpreter
    from align.rollout.vllm_adapters import adaptable_layers, room_for

    given, base, device = config.serve, found.portfolio.base, choose_device(config.device)
    python = required_interpreter(VLLM, given.python, "serve.python")
    adapters = {version.digest: version.folder for version in found.portfolio.versions().values()}
    layers, lowered = adaptable_layers(base), run.folder.absolute() / "vllm"
    rank = room_for([*adapters.values()], config.stage.max_rank, layers)
    dtype = choose_dtype(trained_in(config, found), device)
    shutil.rmtree(lowered, ignore_errors=True)  # of a server that was killed
    prepare = ForVllm(base, found.portfolio.method, device, dtype, load_tokenizer(base), lowered)
    folder = prepare.base_folder(config.run.folder / "bases", DTYPES[given.dtype])
    must_say, log = prepare.learn(adapters), run.folder / "vllm.log"
    prepare.device = choose_device("cpu")  # for adapters that are loaded later: vLLM has the memory of the other
    print(f"starting vLLM {engine_version(VLLM, python, 'serve.python')}; what it says is in {log}", flush=True)
    start = VllmStart(python, folder, base.digest, given.dtype, layers, given.words, given.start_s, log)
    try:
        with vllm_engine(start, room(config.stage), rank, prepare, must_say, describe(base)) as ready:
            yield ready
    finally:
        shutil.rmtree(lowered, ignore_errors=True)


ENGINES: dict[str, Callable[[Run, Config, Opened], AbstractContextManager[Ready]]] = {"align": own, "vllm": vllm}


def trained_in(config: Config, found: Opened) -> str:
    """The dtype in which the base is loaded: NF4 is quantised out of that of training.

    Raises:
        InputError: adapters were trained on codes that differ.
    """
    if found.portfolio.method != "qlora":
        return config.dtype
    trained = {artifact.dtype for artifact in found.artifacts.values() if artifact.dtype} - {"auto"}
    require(
        len(trained) < 2, "stage.adapters", sorted(trained),
        "were trained on NF4 codes of a base in different dtypes, which differ", "Serve them by a server each.",
    )  # fmt: skip
    return next(iter(trained), config.dtype)


def room(stage: ServeConfig) -> Room:
    reserve = stage.slots // SHARED if stage.keys is not None else 0
    return Room(
        stage.slots, reserve, stage.queue, stage.max_length, stage.resident, stage.max_rank,
        stage.prefix_cache_mb * 2**20,
    )  # fmt: skip


def named(found: Opened) -> list[str]:
    """The names of a server, and what each stands for."""
    from align.serve.model_names import Allowed

    said = []
    for name in found.portfolio.names(Allowed())[1:]:
        weight = (lambda arm: f"{arm.weight:g} of ") if len(name.arms) > 1 else (lambda arm: "")
        arms = [f"{weight(arm)}{arm.label} ({found.portfolio.digest_of(arm.version)[:12]})" for arm in name.arms]
        said.append(f"model {name.name}: {', '.join(arms)}")
    return said


def told_of_signer(found: Opened) -> list[str]:
    """Who has to have signed the adapters; nothing where nobody has to."""
    key = found.portfolio.signer
    return [] if key is None else [f"signatures: every adapter has to be signed by {key.fingerprint[:12]}"]


def told_of_keys(stage: ServeConfig) -> str:
    """Who may ask."""
    if stage.keys is None:
        return "keys: none, so whoever reaches this address may ask, load and unload (stage.keys=FILE)"
    count = len(read_key_file(user_path(stage.keys, "stage.keys")))
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
    keys = user_path(stage.keys, "stage.keys")
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
    yield describe_tenant(done.entry)


def listed(config: Config) -> Iterable[str]:
    stage: ServeConfig = config.stage
    assert stage.keys is not None
    keys = user_path(stage.keys, "stage.keys")
    tenants = read_key_file(keys)
    remedy = f"The tenants are {', '.join(sorted(tenants)) or '(none)'}."
    require(stage.tenant in (None, *tenants), "stage.tenant", stage.tenant, "there is no such tenant", remedy)
    shown = [entry for name, entry in sorted(tenants.items()) if stage.tenant in (None, name)]
    return format_tenant_table(shown, used_beside(keys, [entry.tenant.name for entry in shown]))


def describe_tenant(entry: TenantKeys) -> str:
    """Return a tenant's rights, limits and keys in one line."""
    tenant = entry.tenant
    names = tenant.allowed.names
    parts = ["every name" if names is None else "names " + (", ".join(sorted(names)) or "(none)")]
    limits = {field.name: getattr(tenant.limits, field.name) for field in fields(Limits)}
    parts += [f"{name} {value:,}" for name, value in limits.items() if value is not None]
    if tenant.admin:
        parts.append("may load and unload adapters")
    keys = ", ".join(f"{key.id} ({key.created_at})" for key in entry.keys) or "none"
    return f"tenant {tenant.name}: {'; '.join(parts)}; keys: {keys}"


def format_tenant_table(entries: Sequence[TenantKeys], used: Mapping[str, Used]) -> list[str]:
    """Return a header and one line for each tenant.

    Args:
        used: name of the tenant → its usage.
    """
    rows = [TENANT_COLUMNS, *(tenant_row(entry, used[entry.tenant.name]) for entry in entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]


def tenant_row(entry: TenantKeys, used: Used) -> tuple[str, ...]:
    tenant = entry.tenant
    limits = tenant.limits
    names = tenant.allowed.names
    allowed = "every name" if names is None else ", ".join(sorted(names)) or "nothing"
    figures = (
        limits.requests_per_minute,
        limits.tokens_per_minute,
        limits.concurrency,
        used.requests,
        used.tokens,
        limits.token_budget,
        None if limits.token_budget is None else used.left_of(limits.token_budget),
    )
    return (
        tenant.name,
        ", ".join(key.id for key in entry.keys) or "-",
        allowed + (" (admin)" if tenant.admin else ""),
        *("-" if figure is None else f"{figure:,}" for figure in figures),
    )


PRINTS: dict[str, Callable[[Config], Iterable[str]]] = {"key": keyed, "tenants": listed}
"""What is no run, by `stage.action`: the lines that it prints."""
