"""A server for many adapters on one base, and the tenants that may ask it."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from align.config.addresses import list_origins
from align.config.root import Config
from align.config.serve import ServeConfig
from align.config.settings import replace_values
from align.core.aliases import parse_aliases
from align.core.errors import AlignError, require
from align.core.files import parse_user_path
from align.core.types import StageResult
from align.models.base import label
from align.report.figure_text import align_columns
from align.run import Input, Run
from align.run.signing import load_public_key
from align.run.weights import is_reward_adapter
from align.serve import operator_log
from align.serve.adapter_folders import warn_if_stale
from align.serve.alias_watcher import Following
from align.serve.rate_limits import Limiter
from align.serve.startup import Opened, open_portfolio
from align.serve.tenants import Keys, Limits, TenantKeys, change_tenant, read_key_file
from align.serve.usage import Usage, Used, read_usage_beside, usage_beside
from align.stages.runner import Inputs
from align.web.server import listening, serve

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
RANK = 256
"""The highest rank of an adapter, unless stage.max_rank says otherwise."""
SHARED = 8
"""One slot in so many is for tenants who have none."""


def inputs(config: Config) -> Inputs:
    stage: ServeConfig = config.stage
    if stage.keys is not None:
        read_key_file(parse_user_path(stage.keys, "stage.keys"))  # a mistake in it costs no seconds
    signer = None if config.export.verify is None else load_public_key(config.export.verify, "export.verify")
    found = open_portfolio(
        parse_aliases(stage.adapters, "stage.adapters"), config.run.folder,
        path=config.model.path, revision=config.model.revision, method=config.method.name,
        roots=[parse_user_path(root, "stage.roots").absolute() for root in stage.roots], signer=signer,
    )  # fmt: skip
    base, method = found.portfolio.base, found.portfolio.method
    config = replace_values(config, method=replace_values(config.method, name=method))
    records = {"base": Input(base.digest, ref=base.id)}
    if signer is not None:
        records["signer"] = Input(signer.fingerprint)
    records |= {f"adapters.{ref}": artifact.as_input() for ref, artifact in found.artifacts.items()}
    return Inputs(config, label(base, method), base, records, lambda: (found,), again=True)


def run(run: Run, config: Config, found: Opened) -> StageResult:
    """Args:
    found: what the server begins with.
    """
    stage: ServeConfig = config.stage
    url, others = list_origins(stage.host, stage.port, stage.url)
    if others:
        others.append(f"http://127.0.0.1:{stage.port}")
    listening(stage.host, stage.port).close()  # a port that is taken is said before any weights are loaded
    began = time.monotonic()
    print(f"loading base {found.portfolio.base_id} ({found.portfolio.base.digest[:12]}) …", flush=True)
    from align.serve.app import application  # some seconds, with what it imports

    with serving(run, config, found) as (service, why):
        portfolio = found.portfolio
        lines = [
            *(f"model {name}: {portfolio.describe(name)}" for name in [*portfolio.names()][1:]),
            f"engine: {why}",
            *describe_access(found, stage),
            f"ready after {time.monotonic() - began:.1f} s: open {url}, or set OPENAI_BASE_URL={url}/v1",
            "Ctrl+C ends it; SIGTERM lets it finish",
        ]
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
    return StageResult(totals, (f"{requests}, answers of {tokens:,} tokens",))


@contextmanager
def serving(run: Run, config: Config, found: Opened) -> Iterator[tuple[Any, str]]:
    """The parts of a server, its engine at work; and which engine that is, and why."""
    from align.models.load import load_tokenizer
    from align.rollout.serving_engine import EngineThread
    from align.serve.app import Service
    from align.serve.prompts import ChatFormat, Formats
    from align.serve.request_log import AdapterLog, Metrics, RequestLog

    stage, portfolio = config.stage, found.portfolio
    keys = None if stage.keys is None else parse_user_path(stage.keys, "stage.keys")
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
        portfolio.report_changes(changes.write)
        usage = None if keys is None else Usage(usage_beside(keys))
        thread.start()
        try:
            following = None
            if found.following:
                dtypes = [artifact.dtype for artifact in found.artifacts.values()]
                following = Following(config.run.folder, found.following, portfolio, dtypes)
            service = Service(
                engine=thread,
                portfolio=portfolio,
                format_of=formats,
                vocabulary=ready.vocabulary,
                check=ready.check,
                created=int(time.time()),
                log=log,
                metrics=Metrics(ready.engine.stats, lambda: thread.cpu_s),
                limiter=Limiter(time.monotonic, stage.max_answers, usage),
                max_prompts=stage.max_prompts,
                max_logprobs=stage.max_logprobs,
                keys=None if keys is None else Keys(keys),
                following=following,
            )
            yield service, ready.description
        finally:
            thread.close(within_s=5)
            log.close()
            changes.close()
            if usage is not None:
                usage.close()


class Ready(NamedTuple):
    """An engine, and what a server has to know of it.

    Attributes:
        check: raises InputError if the adapter in a folder cannot be served.
        description: which engine it is, and why.
        vocabulary: rows of the base's embedding.
        generation: the base's generation config.
    """

    engine: ServingEngine
    check: Callable[[Path], object]
    description: str
    vocabulary: int
    generation: Any


@contextmanager
def own_engine(run: Run, config: Config, found: Opened) -> Iterator[Ready]:
    """Load align's own engine on the base as its adapters know it: for NF4, the dequantised weights in fp32.

    It answers in continuous batches if the model is on the fast path, and one request after another otherwise.
    """
    import torch

    from align.models.adapters import adaptable_modules, check_targets, read_adapter
    from align.models.base import frozen_method
    from align.models.dequantised import dequantise
    from align.models.fastpath.adapter_bank import load_for_bank
    from align.models.fastpath.decoder import NotPlainError
    from align.models.fastpath.mixed import MixedDecoder
    from align.models.load import choose_device, choose_dtype, load_base
    from align.rollout.continuous import ContinuousBatch
    from align.rollout.one_at_a_time import OneAtATime

    stage: ServeConfig = config.stage
    method = found.portfolio.method
    device = choose_device(config.device)
    dtype = choose_dtype(trained_in(config, found), device)
    model: Any = load_base(found.portfolio.base, frozen_method(method), device, dtype)
    if method == "qlora":
        model = dequantise(model, torch.float32)
    context = served_context(model, stage)
    known = model.get_input_embeddings().weight.shape[0], model.generation_config
    why = "the model is on a GPU, where batches were never measured"
    if model.device.type == "cpu":
        rank = stage.max_rank or RANK
        try:
            decoder = MixedDecoder(model, stage.slots, context, stage.resident, rank)
        except NotPlainError as error:
            why = f"{model.config.model_type} is not on the fast path ({error})"
        else:
            prefix_bytes = stage.prefix_cache_mb * 2**20
            batch = ContinuousBatch(decoder, context, stage.queue, prefix_bytes, reserve=reserved_slots(stage))
            check = partial(load_for_bank, sites=decoder.bank.sites, max_rank=rank)
            yield Ready(batch, check, describe_batches(stage, decoder.exact), *known)
            return
    layers = adaptable_modules(model)

    def check_adapter(folder: Path) -> None:
        problem = "is a reward model, and those are served on the fast path alone"
        require(not is_reward_adapter(folder), "stage.adapters", folder.name, problem, "Score by it with stage=eval.")
        adapter = read_adapter(folder, alone=False)
        check_targets(adapter.config, adapter.ranks, layers)

    engine = OneAtATime(model, context, stage.queue, stage.resident)
    yield Ready(engine, check_adapter, f"one request at a time: {why}", *known)


@contextmanager
def vllm_engine(run: Run, config: Config, found: Opened) -> Iterator[Ready]:
    """Start vLLM, in a process that ends with the block. What it must say by the base and by each adapter is found
    before, so that it has the memory of that.

    Raises:
        InputError: it does not start, or does not serve the base as it is.
    """
    from align.export.vllm_adapters import VllmAdapters
    from align.models.load import DTYPES, choose_device, choose_dtype, describe, load_tokenizer
    from align.rollout.engine_process import VLLM, engine_version, required_interpreter
    from align.rollout.vllm_engine import VllmEngine
    from align.rollout.vllm_server import (
        STOPPING_S,
        VllmProcess,
        VllmServer,
        adaptable_layers,
        check_servable,
        max_lora_rank,
        serve_arguments,
    )

    stage: ServeConfig = config.stage
    settings = config.serve
    base = found.portfolio.base
    device = choose_device(config.device)
    python = required_interpreter(VLLM, settings.python, "serve.python")
    adapters = {version.digest: version.folder for version in found.portfolio.versions().values()}
    layers = adaptable_layers(base)
    rank = max_lora_rank([*adapters.values()], stage.max_rank, layers)
    copies = run.folder.absolute() / "vllm"
    shutil.rmtree(copies, ignore_errors=True)  # of a server that was killed
    dtype = choose_dtype(trained_in(config, found), device)
    prepare = VllmAdapters(base, found.portfolio.method, device, dtype, load_tokenizer(base), copies)
    folder = prepare.base_folder(config.run.folder / "bases", DTYPES[settings.dtype])
    must_say = prepare.learn(adapters)
    prepare.device = choose_device("cpu")  # for adapters that are loaded later: vLLM has the memory of the other
    described = describe(base)
    context = served_context(described, stage)
    log = run.folder / "vllm.log"

    def start() -> VllmProcess:
        arguments = serve_arguments(
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

    print(f"starting vLLM {engine_version(VLLM, python, 'serve.python')}; what it says is in {log}", flush=True)
    remedy = "vllm.log, in the run's folder, says why."
    server = VllmServer("serve.python", python, settings.start_s, remedy, start)
    engine = None
    try:
        server.bring_up()
        engine = VllmEngine(
            server, prepare, must_say, settings.dtype, context, stage.queue, stage.slots, reserved_slots(stage)
        )
        check = partial(check_servable, most=rank, layers=layers)
        description = f"vLLM in {settings.dtype}, {stage.slots} requests at once, {stage.resident} adapters in a batch"
        vocabulary = int(described.config.get_text_config().vocab_size)
        yield Ready(engine, check, description, vocabulary, described.generation_config)
    finally:
        if engine is None:
            server.close()
        else:
            engine.close(STOPPING_S)
        shutil.rmtree(copies, ignore_errors=True)


ENGINES: dict[str, Callable[[Run, Config, Opened], AbstractContextManager[Ready]]] = {
    "align": own_engine,
    "vllm": vllm_engine,
}


def served_context(model: Any, stage: ServeConfig) -> int:
    """Return the tokens that a prompt and its answer may have together."""
    from align.models.load import context_length

    longest = context_length(model)
    return min(longest, stage.max_length or longest)


def reserved_slots(stage: ServeConfig) -> int:
    """Return how many slots are for tenants who have none."""
    return stage.slots // SHARED if stage.keys is not None else 0


def describe_batches(stage: ServeConfig, is_exact: bool) -> str:
    """Say which engine it is; and if products do not agree on this machine, that answers can differ in last bits."""
    batches = f"continuous batching of {stage.slots} rows, {stage.resident} adapters in memory"
    if is_exact:
        return batches
    return f"{batches}; on this machine an answer's last bits can change with its neighbours"


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


def describe_access(found: Opened, stage: ServeConfig) -> Iterator[str]:
    """Say who has to have signed the adapters, and who may ask."""
    if found.portfolio.signer is not None:
        yield f"signatures: every adapter has to be signed by {found.portfolio.signer.fingerprint[:12]}"
    if stage.keys is None:
        yield "keys: none, so whoever reaches this address may ask, load and unload (stage.keys=FILE)"
    else:
        count = len(read_key_file(parse_user_path(stage.keys, "stage.keys")))
        yield f"keys: {count} tenant{'s' * (count != 1)} in {stage.keys}"


def keyed(config: Config) -> Iterable[str]:
    stage: ServeConfig = config.stage
    assert stage.keys is not None and stage.tenant is not None  # noqa: PT018 (the configuration says so)
    keys = parse_user_path(stage.keys, "stage.keys")
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
    keys = parse_user_path(stage.keys, "stage.keys")
    tenants = read_key_file(keys)
    remedy = f"The tenants are {', '.join(sorted(tenants)) or '(none)'}."
    require(stage.tenant in (None, *tenants), "stage.tenant", stage.tenant, "there is no such tenant", remedy)
    shown = [entry for name, entry in sorted(tenants.items()) if stage.tenant in (None, name)]
    return format_tenant_table(shown, read_usage_beside(keys, [entry.tenant.name for entry in shown]))


def describe_tenant(entry: TenantKeys) -> str:
    """Return a tenant's rights, limits and keys in one line."""
    tenant = entry.tenant
    allow = tenant.allow
    parts = ["every name" if allow is None else "names " + (", ".join(sorted(allow)) or "(none)")]
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
    return [*align_columns([TENANT_COLUMNS, *(tenant_row(entry, used[entry.tenant.name]) for entry in entries)])]


def tenant_row(entry: TenantKeys, used: Used) -> tuple[str, ...]:
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
