"""`stage=serve`: serve many adapters on one base behind an OpenAI API, and manage the tenants and their keys.

resolve the adapters and their base
open the engine, align's own or vLLM, and register the adapters
serve until a signal, then drain
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from align.config.addresses import build_server_urls
from align.config.root import Config
from align.config.serve import ServeConfig
from align.config.settings import replace_values
from align.core.aliases import parse_aliases
from align.core.errors import AlignError, require
from align.core.files import parse_user_path
from align.core.types import StageResult
from align.models.base import build_run_label
from align.report.figure_text import align_columns
from align.run import Input, Run
from align.run.signing import load_public_key
from align.run.weights import is_reward_adapter
from align.serve import operator_log
from align.serve.adapter_folders import warn_if_stale
from align.serve.alias_watcher import AliasWatcher
from align.serve.rate_limits import RateLimiter
from align.serve.startup import ResolvedNames, open_portfolio
from align.serve.tenants import KeyFile, Limits, TenantKeys, change_tenant, read_key_file
from align.serve.usage import TenantUsage, UsageDatabase, build_usage_path, read_usage_of_tenants
from align.stages.runner import StageInputs
from align.web.server import open_listener, serve_app

if TYPE_CHECKING:
    from align.rollout.serving_engine import ServingEngine

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
MAX_RANK = 256
"""Default maximum LoRA rank of a served adapter, if `stage.max_rank` is not set."""
SLOTS_PER_RESERVED = 8
"""Number of batch slots per slot that is reserved for tenants without a running request."""


def inputs(config: Config) -> StageInputs:
    """Resolve the base model and the adapters to serve, and load the public key that must have signed the adapters."""
    stage: ServeConfig = config.stage
    if stage.keys is not None:
        read_key_file(parse_user_path(stage.keys, "stage.keys"))  # so that a mistake in it is reported at once
    signer = None if config.export.verify is None else load_public_key(config.export.verify, "export.verify")
    startup = open_portfolio(
        parse_aliases(stage.adapters, "stage.adapters"),
        config.run.folder,
        path=config.model.path,
        revision=config.model.revision,
        method=config.method.name,
        roots=[parse_user_path(root, "stage.roots").absolute() for root in stage.roots],
        signer=signer,
    )
    base = startup.portfolio.base
    method = startup.portfolio.method
    config = replace_values(config, method=replace_values(config.method, name=method))
    records = {"base": Input(base.digest, ref=base.id)}
    if signer is not None:
        records["signer"] = Input(signer.fingerprint)
    records |= {f"adapters.{ref}": artifact.as_input() for ref, artifact in startup.artifacts.items()}
    return StageInputs(config, build_run_label(base, method), base, records, lambda: (startup,), again=True)


def run(run: Run, config: Config, startup: ResolvedNames) -> StageResult:
    """Serve the base and its adapters over OpenAI's API until the process receives a signal.

    Args:
        startup: the base and the adapters to serve at the start.
    """
    stage: ServeConfig = config.stage
    portfolio = startup.portfolio
    url, other_origins = build_server_urls(stage.host, stage.port, stage.url)
    if other_origins:
        other_origins.append(f"http://127.0.0.1:{stage.port}")
    open_listener(stage.host, stage.port).close()  # raises InputError for a used port before any weights are loaded
    start_time = time.monotonic()
    print(f"loading base {portfolio.base_id} ({portfolio.base.digest[:12]}) …", flush=True)
    from align.serve.app import build_application  # its imports take seconds

    with open_service(run, config, startup) as (service, engine_description):
        lines = [
            *(f"model {name}: {portfolio.describe(name)}" for name in [*portfolio.names()][1:]),
            f"engine: {engine_description}",
            *describe_access(startup, stage),
            f"ready after {time.monotonic() - start_time:.1f} s: open {url}, or set OPENAI_BASE_URL={url}/v1",
            "Ctrl+C ends it; SIGTERM lets it finish",
        ]
        app = build_application(service, [url, *other_origins])

        def drain(at_once: bool) -> Awaitable[None]:
            return service.drain(0.0 if at_once else stage.drain_s)

        service.stopped = partial(signal.raise_signal, signal.SIGTERM)
        serve_app(app, stage.host, stage.port, lambda: print(*lines, sep="\n", flush=True), drain, (operator_log.name,))
        totals = service.totals
        if not service.engine.alive:
            raise AlignError(
                f"the engine ended unexpectedly. The logs in {run.folder} have the reason. Start the server again."
            )
    tokens = totals["completion_tokens"]
    requests = f"{totals['requests']:,} request{'s' * (totals['requests'] != 1)}"
    return StageResult(totals, (f"{requests}, answers of {tokens:,} tokens",))


class OpenedService(NamedTuple):
    """The service that answers requests, with its engine running, and a description of the engine.

    Attributes:
        service: the `align.serve.app.Service` that answers requests.
        engine_description: one line about the engine, for people.
    """

    service: Any
    engine_description: str


@contextmanager
def open_service(run: Run, config: Config, startup: ResolvedNames) -> Iterator[OpenedService]:
    """Load the base model and the adapters, start the engine's thread, and yield the service that answers requests.

    The engine, the request logs and the usage database are closed as the block ends.
    """
    from align.models.load import load_tokenizer
    from align.rollout.serving_engine import EngineThread
    from align.serve.app import Service
    from align.serve.prompts import ChatFormat, Formats
    from align.serve.request_log import AdapterLog, Metrics, RequestLog

    stage: ServeConfig = config.stage
    portfolio = startup.portfolio
    keys = None if stage.keys is None else parse_user_path(stage.keys, "stage.keys")
    with ENGINES[config.serve.name](run, config, startup) as loaded:
        formats = Formats(
            lambda folder: ChatFormat.from_tokenizer(load_tokenizer(portfolio.base, folder), loaded.generation)
        )
        versions = portfolio.versions().values()
        for ref, artifact in startup.artifacts.items():
            warn_if_stale(ref, artifact.path)
        if versions:
            print(f"reading {len(versions)} adapter{'s' * (len(versions) > 1)} …", flush=True)
        for version in versions:
            loaded.check(version.folder)
            loaded.engine.register(version.folder, version.digest)
            formats(version)
        thread = EngineThread(loaded.engine)
        request_log = RequestLog(run.folder / "requests.jsonl")
        adapter_log = AdapterLog(run.folder / "adapters.jsonl")
        portfolio.report_changes(adapter_log.write)
        usage = None if keys is None else UsageDatabase(build_usage_path(keys))
        thread.start()
        try:
            alias_watcher = None
            if startup.following:
                dtypes = [artifact.dtype for artifact in startup.artifacts.values()]
                alias_watcher = AliasWatcher(config.run.folder, startup.following, portfolio, dtypes)
            service = Service(
                engine=thread,
                portfolio=portfolio,
                format_of=formats,
                vocabulary=loaded.vocabulary,
                check=loaded.check,
                created=int(time.time()),
                log=request_log,
                metrics=Metrics(loaded.engine.stats, lambda: thread.cpu_s),
                limiter=RateLimiter(time.monotonic, stage.max_answers, usage),
                max_prompts=stage.max_prompts,
                max_logprobs=stage.max_logprobs,
                keys=None if keys is None else KeyFile(keys),
                following=alias_watcher,
            )
            yield OpenedService(service, loaded.description)
        finally:
            thread.close(within_s=5)
            request_log.close()
            adapter_log.close()
            if usage is not None:
                usage.close()


class LoadedEngine(NamedTuple):
    """A serving engine with its base model loaded, and a function that checks adapters for it.

    Attributes:
        check: raises InputError if the adapter in a folder cannot be served.
        description: name of the engine, how it batches, and the reason for it.
        vocabulary: number of rows of the base's embedding.
        generation: the base's generation config.
    """

    engine: ServingEngine
    check: Callable[[Path], object]
    description: str
    vocabulary: int
    generation: Any


@contextmanager
def open_own_engine(run: Run, config: Config, startup: ResolvedNames) -> Iterator[LoadedEngine]:
    """Load the base model that the adapters were trained on into align's own serving engine, and yield the engine.

    For NF4 these are the dequantised weights in fp32.

    It answers in continuous batches if the model is on the fast path, and one request after another otherwise.
    """
    import torch

    from align.models.adapters import list_adaptable_modules, read_adapter, require_configured_modules
    from align.models.base import choose_frozen_method
    from align.models.dequantised import dequantise_in_place
    from align.models.fastpath.adapter_bank import load_bank_adapter
    from align.models.fastpath.decoder import NotPlainError
    from align.models.fastpath.mixed import MixedDecoder
    from align.models.load import choose_device, choose_dtype, load_base
    from align.rollout.continuous import ContinuousBatch
    from align.rollout.one_at_a_time import OneAtATime

    stage: ServeConfig = config.stage
    method = startup.portfolio.method
    device = choose_device(config.device)
    dtype = choose_dtype(find_base_dtype(config, startup), device)
    model: Any = load_base(startup.portfolio.base, choose_frozen_method(method), device, dtype)
    if method == "qlora":
        model = dequantise_in_place(model, torch.float32)
    context = compute_context_length(model, stage)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generation = model.generation_config
    reason = "the model is on a GPU, on which batches were not tested"
    if model.device.type == "cpu":
        rank = stage.max_rank or MAX_RANK
        try:
            decoder = MixedDecoder(model, stage.slots, context, stage.resident, rank)
        except NotPlainError as error:
            reason = f"{model.config.model_type} is not on the fast path ({error})"
        else:
            prefix_bytes = stage.prefix_cache_mb * 2**20
            reserve = count_reserved_slots(stage)
            engine = ContinuousBatch(decoder, context, stage.queue, prefix_bytes, reserve=reserve)
            check = partial(load_bank_adapter, sites=decoder.bank.sites, max_rank=rank)
            yield LoadedEngine(engine, check, describe_batches(stage, decoder.exact), vocabulary, generation)
            return
    layers = list_adaptable_modules(model)

    def check_adapter(folder: Path) -> None:
        problem = "is a reward model, and reward models are served on the fast path only"
        require(not is_reward_adapter(folder), "stage.adapters", folder.name, problem, "Use it with stage=eval.")
        adapter = read_adapter(folder, is_only_adapter=False)
        require_configured_modules(adapter.config, adapter.ranks, layers)

    engine = OneAtATime(model, context, stage.queue, stage.resident)
    yield LoadedEngine(engine, check_adapter, f"one request at a time: {reason}", vocabulary, generation)


@contextmanager
def open_vllm_engine(run: Run, config: Config, startup: ResolvedNames) -> Iterator[LoadedEngine]:
    """Start vLLM as a server in a child process, yield an engine that sends requests to it, and stop it as the block
    ends.

    The probes that vLLM has to reproduce with the base and with each adapter are computed before it starts, so that
    their memory is free again by then.

    Raises:
        InputError: vLLM does not start, or it does not reproduce the base's probes.
    """
    from align.export.vllm_adapters import VllmAdapters
    from align.models.load import DTYPES, choose_device, choose_dtype, load_tokenizer, read_configurations
    from align.rollout.engine_process import VLLM, find_engine_version, require_interpreter
    from align.rollout.vllm_engine import VllmEngine
    from align.rollout.vllm_server import (
        STOPPING_S,
        VllmProcess,
        VllmServer,
        build_serve_arguments,
        choose_max_lora_rank,
        list_adaptable_layers,
        read_servable_rank,
    )

    stage: ServeConfig = config.stage
    settings = config.serve
    base = startup.portfolio.base
    device = choose_device(config.device)
    python = require_interpreter(VLLM, settings.python, "serve.python")
    adapters = {version.digest: version.folder for version in startup.portfolio.versions().values()}
    layers = list_adaptable_layers(base)
    rank = choose_max_lora_rank([*adapters.values()], stage.max_rank, layers)
    copies = run.folder.absolute() / "vllm"
    shutil.rmtree(copies, ignore_errors=True)  # of a server that was killed
    dtype = choose_dtype(find_base_dtype(config, startup), device)
    vllm_adapters = VllmAdapters(base, startup.portfolio.method, device, dtype, load_tokenizer(base), copies)
    folder = vllm_adapters.prepare_base_folder(config.run.folder / "bases", DTYPES[settings.dtype])
    base_probes = vllm_adapters.load_probes(adapters)
    vllm_adapters.device = choose_device("cpu")  # for adapters that are loaded later, when vLLM has the GPU's memory
    description = read_configurations(base)
    context = compute_context_length(description, stage)
    log = run.folder / "vllm.log"

    def start() -> VllmProcess:
        arguments = build_serve_arguments(
            base.digest,
            settings.dtype,
            layers=layers,
            rank=rank,
            adapters=stage.resident,
            slots=stage.slots,
            context=context,
            prefixes=stage.prefix_cache_mb > 0,
        )
        return VllmProcess(python, folder, [*arguments, *settings.words], log)

    print(f"starting vLLM {find_engine_version(VLLM, python, 'serve.python')}; its output is in {log}", flush=True)
    remedy = "vllm.log, in the run's folder, says why."
    server = VllmServer("serve.python", python, settings.start_s, remedy, start)
    engine = None
    try:
        server.start_or_connect()
        engine = VllmEngine(
            server,
            vllm_adapters,
            base_probes,
            settings.dtype,
            context,
            stage.queue,
            stage.slots,
            count_reserved_slots(stage),
        )
        check = partial(read_servable_rank, max_rank=rank, layers=layers)
        title = f"vLLM in {settings.dtype}, {stage.slots} requests at once, {stage.resident} adapters in a batch"
        vocabulary = int(description.config.get_text_config().vocab_size)
        yield LoadedEngine(engine, check, title, vocabulary, description.generation_config)
    finally:
        if engine is None:
            server.close()
        else:
            engine.close(STOPPING_S)
        shutil.rmtree(copies, ignore_errors=True)


ENGINES: dict[str, Callable[[Run, Config, ResolvedNames], AbstractContextManager[LoadedEngine]]] = {
    "align": open_own_engine,
    "vllm": open_vllm_engine,
}


def compute_context_length(model: Any, stage: ServeConfig) -> int:
    """Return the maximum number of tokens of a prompt plus its answer: the model's, or `stage.max_length` if lower."""
    from align.models.load import get_context_length

    model_length = get_context_length(model)
    return min(model_length, stage.max_length or model_length)


def count_reserved_slots(stage: ServeConfig) -> int:
    """Return the number of batch slots kept free for tenants without a running request; 0 without `stage.keys`."""
    return stage.slots // SLOTS_PER_RESERVED if stage.keys is not None else 0


def describe_batches(stage: ServeConfig, is_exact: bool) -> str:
    """Return a phrase for the console about continuous batching: the numbers of slots and of adapters in memory.

    Args:
        is_exact: True if matrix products of batches of different sizes agree to the last bit on this machine.
    """
    batches = f"continuous batching of {stage.slots} rows, {stage.resident} adapters in memory"
    if is_exact:
        return batches
    return (
        f"{batches}; on this machine, the last bits of an answer's logprobs can depend on the other requests in "
        f"its batch"
    )


def find_base_dtype(config: Config, startup: ResolvedNames) -> str:
    """Return the dtype in which to load the served base model: `dtype=`, or for QLoRA adapters that of their training.

    Their NF4 codes were quantised from it.

    Raises:
        InputError: QLoRA adapters were trained in different dtypes, and so on different NF4 codes.
    """
    if startup.portfolio.method != "qlora":
        return config.dtype
    dtypes = {artifact.dtype for artifact in startup.artifacts.values() if artifact.dtype} - {"auto"}
    problem = "were trained on NF4 codes that were made from different dtypes of the base, so they need different bases"
    require(len(dtypes) < 2, "stage.adapters", sorted(dtypes), problem, "Start one server for each.")
    return next(iter(dtypes), config.dtype)


def describe_access(startup: ResolvedNames, stage: ServeConfig) -> Iterator[str]:
    """Yield lines for the console on the signing key of the adapters, if any, and on the tenants in `stage.keys`."""
    if startup.portfolio.signer is not None:
        yield f"signatures: every adapter has to be signed by {startup.portfolio.signer.fingerprint[:12]}"
    if stage.keys is None:
        yield (
            "keys: none, so anyone who reaches this address may send requests and load or unload adapters (to "
            "prevent it: stage.keys=FILE)"
        )
    else:
        count = len(read_key_file(parse_user_path(stage.keys, "stage.keys")))
        yield f"keys: {count} tenant{'s' * (count != 1)} in {stage.keys}"


def update_tenant(config: Config) -> Iterable[str]:
    """Change a tenant's rights, limits or API keys in the key file, or add the tenant with a first key.

    Yields a new key, if one was made, and a description of the tenant.
    """
    stage: ServeConfig = config.stage
    assert stage.keys is not None and stage.tenant is not None  # noqa: PT018 (the configuration has checked it)
    keys = parse_user_path(stage.keys, "stage.keys")
    limits = {
        "requests_per_minute": stage.requests_per_minute,
        "tokens_per_minute": stage.tokens_per_minute,
        "concurrency": stage.concurrency,
        "token_budget": stage.token_budget,
    }
    change = change_tenant(
        keys, stage.tenant, admin=stage.admin, allow=stage.allow, limits=limits, lift=stage.lift, revoke=stage.revoke
    )
    if change.key is not None:
        yield f"the key, shown once: {change.key}"
    if change.revoked:
        yield f"revoked: {', '.join(change.revoked)}"
    yield describe_tenant(change.entry)


def list_tenants(config: Config) -> Iterable[str]:
    """Return the lines of a text table of the tenants in the key file, with their limits and usage."""
    stage: ServeConfig = config.stage
    assert stage.keys is not None
    keys = parse_user_path(stage.keys, "stage.keys")
    tenants = read_key_file(keys)
    remedy = f"The tenants are {', '.join(sorted(tenants)) or '(none)'}."
    require(stage.tenant in (None, *tenants), "stage.tenant", stage.tenant, "there is no such tenant", remedy)
    entries = [entry for name, entry in sorted(tenants.items()) if stage.tenant in (None, name)]
    usage = read_usage_of_tenants(keys, [entry.tenant.name for entry in entries])
    rows = [build_tenant_row(entry, usage[entry.tenant.name]) for entry in entries]
    return [*align_columns([TENANT_COLUMNS, *rows])]


def describe_tenant(entry: TenantKeys) -> str:
    """Return one line of text about a tenant's allowed models, limits and API keys."""
    tenant = entry.tenant
    allow = tenant.allow
    parts = ["every name" if allow is None else "names " + (", ".join(sorted(allow)) or "(none)")]
    limits = {field.name: getattr(tenant.limits, field.name) for field in fields(Limits)}
    parts += [f"{name} {value:,}" for name, value in limits.items() if value is not None]
    if tenant.admin:
        parts.append("may load and unload adapters")
    keys = ", ".join(f"{key.id} ({key.created_at})" for key in entry.keys) or "none"
    return f"tenant {tenant.name}: {'; '.join(parts)}; keys: {keys}"


def build_tenant_row(entry: TenantKeys, used: TenantUsage) -> tuple[str, ...]:
    """Return the table cells of a tenant as text, in the order of `TENANT_COLUMNS`; `-` if there is no limit."""
    tenant = entry.tenant
    limits = tenant.limits
    allow = tenant.allow
    allowed = "every name" if allow is None else ", ".join(sorted(allow)) or "nothing"
    figures = (
        limits.requests_per_minute,
        limits.tokens_per_minute,
        limits.concurrency,
        used.requests,
        used.tokens,
        limits.token_budget,
        None if limits.token_budget is None else used.compute_remaining(limits.token_budget),
    )
    return (
        tenant.name,
        ", ".join(key.id for key in entry.keys) or "-",
        allowed + (" (admin)" if tenant.admin else ""),
        *("-" if figure is None else f"{figure:,}" for figure in figures),
    )


PRINTS: dict[str, Callable[[Config], Iterable[str]]] = {"key": update_tenant, "tenants": list_tenants}
"""Value of `stage.action` → function that yields the lines to print, for actions that make no run."""
