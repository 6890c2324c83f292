"""The ASGI application of the server: its state, background tasks, routes and outermost middleware.

The middleware authenticates requests, limits the size of bodies, adds headers and writes the request log.

Without a key file the server listens on the loopback interface only, where a page of another site in a local browser
could still reach it: other host names (DNS rebinding) and other origins are refused. With a key file, requests need a
key.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, FastAPI
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from align.core.errors import InputError, make_printable
from align.rollout.serving_engine import EngineThread, Output, Request, SamplingParams
from align.serve import operator_log
from align.serve.adapter_folders import warn_if_stale
from align.serve.alias_watcher import AliasWatcher
from align.serve.answers import CLOSED, Call, RewardAnswers, answer_request, build_headers, respond_whole
from align.serve.errors import (
    KeysUnreadable,
    Refusal,
    UnknownModel,
    UsageUnwritable,
    internal_error,
    invalid_request,
    shutting_down,
)
from align.serve.model_names import Arm, ChosenModel, Portfolio, Version
from align.serve.prompts import (
    ChatBody,
    CompletionBody,
    ErrorBody,
    Formats,
    LoadAdapter,
    RewardBody,
    UnloadAdapter,
    build_reward_prompts,
)
from align.serve.rate_limits import RateLimiter, ReadTurns, RefusalPacer
from align.serve.request_log import Metrics, RequestLog, RequestRecord
from align.serve.tenants import LOCAL, KeyFile, Tenant
from align.web.auth import HEADERS

log = logging.getLogger(__name__)
PostedOutput = tuple[Call, int, Output]
"""A request in progress, the index of one of its answers, and a new output of the engine for that answer."""
TRIES = 5
"""Maximum number of lookups of a model name if its weights are unloaded during the lookup."""
LOOK_S = 1.0
"""Seconds between two checks that the engine's thread is alive."""
KEYS_S = 0.4
"""Seconds between two checks of the file of API keys for changes."""
ALIASES_S = 0.5
"""Seconds between two checks of the registry aliases for changes."""
UNREADABLE = "unreadable_body"
ROUTING = {
    400: (UNREADABLE, "The body cannot be read. Send JSON in UTF-8."),
    404: ("not_found", "There is nothing at this address."),
    405: ("method_not_allowed", "This address takes another method."),
}
"""HTTP status → error code and message for a request without a route, or with an unreadable body."""
CODES = {"too_long": "array_above_max_length", "string_too_long": "string_above_max_length"}
"""Type of a pydantic validation error → OpenAI's error code."""
STATIC = Path(__file__).parent / "static"
WITHOUT_SECRETS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/rewards"})
"""URL paths that are logged as they are: a search for secrets in them would read the whole environment."""
OPEN = re.compile(r"/|/health|/ready|/static/[\w.-]+")
"""Pattern of the URL paths that need no API key, since they serve no tenant's data."""
BODY_LIMIT = 1_000_000
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
NEEDS_ADMIN = "This needs the key of an administrator."
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request is invalid, or its body cannot be read."},
    401: {"description": "There is no key, or one that is not known."},
    403: {"description": "The key does not allow it."},
    404: {"description": "There is no such model, adapter, tenant or address."},
    413: {"description": "The body is too large."},
    421: {"description": "The server is known by another name."},
    422: {"description": "The model computed values that are not finite."},
    429: {"description": "A limit, a budget or the queue is used up for now."},
    500: {"description": "The server failed; its log has the error."},
    503: {"description": "The server is shutting down, or cannot record usage."},
}
for _response in ERRORS.values():
    _response["model"] = ErrorBody
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""OpenAPI's description of a streamed response."""


@dataclass
class Service:
    """The state of a server that its routes and background tasks share: engine, model names, limits and logs.

    Attributes:
        format_of: returns the tokenizer and template of a version; of the base for None.
        vocabulary: rows of the base's embedding.
        check: raises InputError if the engine cannot load the adapter in a folder.
        created: Unix time of the server's start, in seconds.
        max_prompts, max_logprobs: limits of one request.
        keys: the tenants' keys; None if every client may do everything.
        following: updates the names that follow aliases; None if there are no such names.
        ending: set when the server stops taking new requests.
        stopped: called after the engine's thread has died and the calls were ended.
        answering: the calls in progress.
        loop: the event loop that answers requests.
        posted: outputs of the engine that were not delivered to their calls yet.
        is_woken: whether the loop has been asked to deliver them.
    """

    engine: EngineThread
    portfolio: Portfolio
    format_of: Formats
    vocabulary: int
    check: Callable[[Path], object]
    created: int
    log: RequestLog
    metrics: Metrics
    limiter: RateLimiter
    max_prompts: int
    max_logprobs: int
    keys: KeyFile | None = None
    following: AliasWatcher | None = None
    ending: asyncio.Event = field(default_factory=asyncio.Event)
    readers: ReadTurns = field(default_factory=ReadTurns)
    stopped: Callable[[], object] = lambda: None
    answering: set[Call] = field(default_factory=set)
    loop: asyncio.AbstractEventLoop = field(init=False)
    posted: list[PostedOutput] = field(default_factory=list)
    is_woken: bool = False
    totals: dict[str, int] = field(default_factory=lambda: {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0})

    def __post_init__(self) -> None:
        self.portfolio.on_new_version = self.register
        self.portfolio.on_unused_version = self.unregister

    @property
    def context(self) -> int:
        """Maximum tokens of a prompt and its answer together."""
        return self.engine.engine.context

    @property
    def is_draining(self) -> bool:
        """True if new requests are refused because the server shuts down."""
        return self.ending.is_set()

    @property
    def is_ready(self) -> bool:
        """True if the engine is alive and the server does not shut down, so that new requests are answered."""
        return self.engine.alive and not self.is_draining

    @contextmanager
    def hold_chosen_model(
        self, record: RequestRecord, tenant: Tenant, model: str, user: str | None
    ) -> Iterator[ChosenModel]:
        """Yield the weights chosen to answer a request, note them in its log entry, and keep them loaded in the block.

        They stay loaded even if the adapter is unloaded.

        Raises:
            Refusal: the tenant has no such model.
        """
        adapters = self.engine.engine.known
        for _ in range(TRIES):
            choice = self.portfolio.choose(model, tenant, user)
            try:
                if choice.version is not None:
                    adapters.hold(choice.version.digest)
                break
            except InputError:  # it was unloaded since: the name refers to something else by now, or to nothing
                continue
        else:
            log.error("the weights of '%s' are not in the engine", model)
            raise internal_error()
        try:
            record.asked = model
            record.answered = choice.name
            record.arm = choice.arm
            record.base = self.portfolio.base.digest
            record.adapter = choice.version.digest if choice.version else ""
            yield choice
        finally:
            if choice.version is not None:
                adapters.release(choice.version.digest)

    def load_adapter(self, name: str, folder: str, allow_replace: bool, who: str) -> Version:
        """Serve the adapter in a folder under a name, and log that for the operator.

        Args:
            allow_replace: whether to replace an adapter of that name.
            who: name of the tenant, for the log.

        Raises:
            Refusal: the name is taken, and `allow_replace` is False.
            InputError: see `align.serve.model_names.Portfolio.load`; or the adapter's tensors do not fit the base.
        """
        if self.portfolio.arms(name) and not allow_replace:
            message = f"The lora adapter '{name}' has already been loaded. Send load_inplace=true to replace it."
            raise Refusal(400, message, param="lora_name", code="already_loaded")
        version = self.portfolio.load(name, folder)
        operator_log.info("%s loaded %s (%s)", who, name, version.digest[:12])
        warn_if_stale(name, version.folder)
        return version

    def unload_adapter(self, name: str, who: str) -> None:
        """Stop serving a model name, and log that for the operator.

        Args:
            who: name of the tenant, for the log.

        Raises:
            Refusal, InputError: see `align.serve.model_names.Portfolio.unload`.
        """
        digests = ", ".join(self.portfolio.get_digest(arm.version)[:12] for arm in self.portfolio.arms(name))
        self.portfolio.unload(name)
        operator_log.info("%s unloaded %s (%s)", who, name, digests)

    def register(self, version: Version) -> None:
        """Check that the engine can load an adapter version, cache its tokenizer, and register it in the engine."""
        self.check(version.folder)
        self.format_of.forget(version)
        self.format_of(version)
        self.engine.engine.register(version.folder, version.digest)  # last: it is not undone if a later step fails

    def unregister(self, version: Version) -> None:
        """Remove an adapter version from the engine, which keeps its weights until no request uses them."""
        self.engine.engine.unregister(version.digest)

    def record_finished(self, record: RequestRecord) -> None:
        """Add an ended request to the totals, the metrics and the request log."""
        self.totals["requests"] += 1
        self.totals["prompt_tokens"] += record.prompt_tokens
        self.totals["completion_tokens"] += record.completion_tokens
        self.metrics.observe(record)
        self.log.write(record)

    def queue_output(self, call: Call, i: int, output: Output) -> None:
        """Queue the engine's output for answer `i` of a call, and wake the event loop to deliver it.

        Called in the engine's thread. Waking the loop writes to a pipe, so that it is done once for each step of the
        engine rather than for each row.
        """
        self.posted.append((call, i, output))
        if not self.is_woken:
            self.is_woken = True
            with suppress(RuntimeError):  # the loop is closed, and no call waits any more
                self.loop.call_soon_threadsafe(self._deliver_outputs)

    def _deliver_outputs(self) -> None:
        """Record the token usage of streamed answers, then put all queued outputs into the inboxes of their calls.

        If the usage cannot be recorded, all these calls are ended with an error.
        """
        self.is_woken = False  # set before the queue is emptied: outputs from now on wake the loop again
        deliveries = self.posted
        self.posted = []
        token_counts: dict[str, tuple[int, int]] = {}
        for call, _, output in deliveries:
            call.received_tokens += len(output.tokens)
            if call.record.stream and has_client_output(output):
                token_counts[call.record.id] = call.count_started_prompt_tokens(), call.received_tokens
        try:
            if (usage := self.limiter.usage) is not None and token_counts:
                usage.record_sent(token_counts)
        except UsageUnwritable:
            for call in {call for call, _, _ in deliveries}:
                call.end_with(UsageUnwritable())  # one exception object for each call
        else:
            for call, i, output in deliveries:
                call.inbox.put_nowait((i, output))

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, wait up to `timeout_s` seconds for requests in progress, and end the remaining ones."""
        self.ending.set()
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self.answering and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        for call in list(self.answering):
            call.end_with(shutting_down())
        while self.answering and asyncio.get_running_loop().time() < deadline + LOOK_S:
            await asyncio.sleep(0.02)


def has_client_output(output: Output) -> bool:
    """Return whether an output of the engine holds tokens, prompt logprobs or a regular end, to send to the client.

    A prompt that failed before its first such output is not charged.
    """
    return bool(output.tokens) or output.prompt_logprobs is not None or output.finish_reason in ("stop", "length")


async def run_background_tasks(service: Service) -> None:
    """Watch the engine's thread, the file of API keys and the registry aliases, until cancelled."""
    await asyncio.gather(watch_engine(service), watch_keys(service), watch_aliases(service))


async def watch_engine(service: Service) -> None:
    """Wait until the engine's thread dies, then end all requests and stop the server.

    A supervisor then restarts the server.
    """
    while service.engine.alive:
        await asyncio.sleep(LOOK_S)
    operator_log.error("the engine has stopped: no request is answered any more")
    for call in list(service.answering):
        call.end_with(internal_error())
    await asyncio.sleep(LOOK_S)
    service.stopped()


async def watch_aliases(service: Service) -> None:
    """Update the model names that refer to registry aliases every `ALIASES_S` seconds, until the server shuts down."""
    while service.following is not None and not service.is_draining:
        await asyncio.to_thread(service.following.update)
        await asyncio.sleep(ALIASES_S)


async def watch_keys(service: Service) -> None:
    """Reload the file of API keys when it changes, and end requests whose key was revoked, until cancelled.

    Also warns about tenants whose keys allow names that are not served.
    """
    reads = 0
    reported = set[str]()
    while service.keys is not None:
        with suppress(KeysUnreadable):  # `KeyFile` logs it
            await asyncio.to_thread(service.keys.reload_if_changed)
            for call in list(service.answering):
                if not service.keys.has_key(call.tenant.key):
                    call.end_with(Refusal(401, "This key was revoked.", code="invalid_api_key"))
            if reads != service.keys.reads:
                reads = service.keys.reads
                served = [*service.portfolio.names()]
                lines = describe_unserved_names(service.keys.tenants.values(), served)
                for line in lines:
                    if line not in reported:
                        operator_log.warning("%s", line)
                reported = set(lines)
        await asyncio.sleep(KEYS_S)


def describe_unserved_names(tenants: Iterable[Tenant], served: Collection[str]) -> list[str]:
    """Return a warning for each tenant that may use model names which are not served, with similar served names."""
    lines = []
    for tenant in tenants:
        unserved = []
        for name in sorted((tenant.allow or frozenset()) - set(served)):
            similar = difflib.get_close_matches(name, served, n=1)
            unserved.append(f"{name} (did you mean {similar[0]}?)" if similar else name)
        if unserved:
            lines.append(f"tenant {tenant.name} may ask for models that are not served: {', '.join(unserved)}")
    return lines


def build_application(service: Service, origins: Sequence[str]) -> ASGIApp:
    """Build the server's ASGI application, with its middleware, routes and background tasks.

    Args:
        service: the server's state.
        origins: see `ServerMiddleware`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.loop = asyncio.get_running_loop()
        tasks = asyncio.create_task(run_background_tasks(service))
        yield
        tasks.cancel()

    app = FastAPI(title="align", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.include_router(build_router(service))
    app.mount("/static", StaticFiles(directory=STATIC))
    app.add_api_route("/", send_chat_page, include_in_schema=False)
    for kind in (Refusal, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, respond_to_error)
    return ServerMiddleware(app, service, origins)


async def send_chat_page() -> Response:
    return FileResponse(STATIC / "index.html")


async def respond_to_error(_: Http, error: Exception) -> Response:
    """Convert an exception of a route to an error response in OpenAI's form.

    It is a Refusal, an invalid body, a request without a route, or an internal error, which `ServerMiddleware` logs.
    """
    if isinstance(error, RequestValidationError):
        return explain_body_error(error).response()
    if isinstance(error, HTTPException):
        code, message = ROUTING.get(error.status_code, (None, str(error.detail)))
        response = Refusal(error.status_code, message, code=code).response()
        response.headers.update(error.headers or {})
        return response
    return (error if isinstance(error, Refusal) else internal_error()).response()


def explain_body_error(error: RequestValidationError) -> Refusal:
    """Convert pydantic's errors about a request body to a Refusal that names the parameter at fault.

    The message does not repeat the values that were sent.
    """
    errors = error.errors()
    # If a field takes several types, pick the error about the type that was sent.
    field_errors = [each for each in errors if each["loc"][:2] == errors[0]["loc"][:2]]
    best = next((each for each in field_errors if not each["type"].endswith("_type")), errors[0])
    param = ".".join(str(part) for part in best["loc"] if part != "body" and not is_union_member(part))
    if best["type"] == "json_invalid":
        return invalid_request(None, "The body is no JSON.", UNREADABLE)
    if not param and best["type"] in ("missing", "model_attributes_type", "dict_type"):
        return invalid_request(
            None, "The body is no JSON object. Send one, with Content-Type: application/json.", UNREADABLE
        )
    message = best["msg"][:1].upper() + best["msg"][1:]
    return invalid_request(param or None, f"{param or 'The body'}: {message}.", CODES.get(best["type"]))


def is_union_member(part: Any) -> bool:
    """Return whether a part of a pydantic error's `loc` names a type, such as `list[constrained-str]`, and no field."""
    return isinstance(part, str) and (not part.isidentifier() or part in ("str", "int", "float", "bool"))


class ClientGone(Exception):
    """An exception for a client that disconnected before its request was read."""


class ServerMiddleware:
    """The outermost ASGI middleware: authentication, the limit on the body's size, headers and the request log.

    It adds to the scope of a request its `tenant`, its `record`, and `streams`, a list to which an
    `align.serve.answers.EventStream` adds itself if it is the response.

    Args:
        origins: allowed values of the `Origin` header, which also give the allowed hosts; used without a key file.
        body_limit: maximum size of a body in bytes.
    """

    def __init__(self, app: ASGIApp, service: Service, origins: Sequence[str], body_limit: int = BODY_LIMIT) -> None:
        self.app = app
        self.service = service
        self.body_limit = body_limit
        self.refusal_pacer = RefusalPacer(time.monotonic)
        self.origins = {origin.lower() for origin in origins}
        self.hosts = {urlsplit(origin).netloc for origin in self.origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._respond(scope, receive, send)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["path"] in WITHOUT_SECRETS else make_printable(scope["path"][:100])
        record = RequestRecord(f"req-{secrets.token_hex(12)}", path)
        scope["record"] = record
        scope["streams"] = list[Any]()
        is_counted = scope["path"].startswith("/v1/") and scope["method"] == "POST"

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] == 429:
                    with self.refusal_pacer.hold(record.tenant) as wait, suppress(TimeoutError):
                        if wait > 0:  # the wait ends early when the server shuts down
                            await asyncio.wait_for(self.service.ending.wait(), wait)
                record.status = record.status or message["status"]
                headers = [*message.get("headers", []), *HEADERS, (b"content-security-policy", POLICY.encode())]
                if record.tenant and is_counted:
                    limits = self.service.limiter.headers(scope["tenant"])
                    headers += [(name.encode(), value.encode()) for name, value in limits.items()]
                message = {**message, "headers": [*headers, (b"x-request-id", record.id.encode())]}
            await send(message)

        try:
            headers = Headers(scope=scope)
            scope["tenant"] = tenant = self._find_tenant(scope["path"], headers)
            record.tenant = tenant.name if tenant else ""
            receive_body = make_body_receiver(await self._read_body(headers, receive), receive)
            await self.app(scope, receive_body, send_with_headers)
            for stream in scope["streams"]:
                await stream.send_events(send_with_headers)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send_with_headers)
        except ClientGone:
            record.status = CLOSED
        except Exception:
            log.exception("%s failed", record.id)
            if not record.status:
                await internal_error().response()(scope, receive, send_with_headers)
        finally:
            record.seconds = record.measure_elapsed()
            if is_counted:
                self.service.record_finished(record)

    def _find_tenant(self, path: str, headers: Headers) -> Tenant | None:
        """Return the tenant that a request's API key belongs to, or None if it has no valid key and needs none.

        Raises:
            Refusal: the key is missing or unknown, or the host or origin is not allowed.
        """
        if self.service.keys is None:
            if headers.get("host", "").lower() not in self.hosts:
                raise Refusal(421, "This server is known by another name.")
            if headers.get("origin", "").lower() not in {"", *self.origins}:
                raise Refusal(403, "Another page asks.")
            return LOCAL
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not key:
            if OPEN.fullmatch(path):
                return None
            raise Refusal(401, "Send your key: Authorization: Bearer KEY.", code="missing_api_key")
        tenant = self.service.keys.find_tenant(key.strip())
        if tenant is None and not OPEN.fullmatch(path):
            raise Refusal(401, "This key is not known here.", code="invalid_api_key")
        return tenant

    async def _read_body(self, headers: Headers, receive: Receive) -> bytes:
        """Read the complete body of a request, or raise Refusal (413) if it is larger than `body_limit`.

        Raises:
            Refusal: it is larger than `body_limit`.
            ClientGone: the client disconnected before it had sent the body.
        """
        length = headers.get("content-length", "0")
        parts: list[bytes] = []
        size = int(length) if length.isdigit() else 0
        while size <= self.body_limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            size = max(size, sum(map(len, parts)))
            if not message.get("more_body", False):
                return b"".join(parts)
        # uvicorn reads the rest until its deadline: a client that is cut off while sending would not read the response.
        raise Refusal(413, f"Send at most {self.body_limit:,} bytes.", code="request_too_large")


def make_body_receiver(body: bytes, receive: Receive) -> Receive:
    """Return an ASGI `receive` callable that first returns the given body, and then the messages of `receive`."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_next() -> Message:
        return messages.pop() if messages else await receive()

    return receive_next


def build_router(service: Service) -> APIRouter:
    """Build the routes of the API: models and usage, completions and rewards, adapters, health and metrics."""
    router = APIRouter(responses=ERRORS)

    # Models and usage

    @router.get("/v1/models")
    async def models(http: Http) -> Any:
        names = service.portfolio.names(http.scope["tenant"])
        return {"object": "list", "data": [describe_model(service, name, arms) for name, arms in names.items()]}

    @router.get("/v1/models/{model:path}")
    async def model(http: Http, model: str) -> Any:
        names = service.portfolio.names(http.scope["tenant"])
        if model not in names:
            raise UnknownModel(model)
        return describe_model(service, model, names[model])

    @router.get("/v1/usage")
    async def usage(http: Http, tenant: str | None = None) -> Any:
        caller: Tenant = http.scope["tenant"]
        usage_file = service.limiter.usage
        if service.keys is None or usage_file is None:
            raise Refusal(404, "This server has no key file, and does not record usage.", code="not_found")
        target = caller if tenant in (None, caller.name) else service.keys.tenants.get(tenant or "")
        if target is not caller and not caller.admin:
            raise Refusal(403, NEEDS_ADMIN, param="tenant", code="insufficient_permissions")
        if target is None:
            raise Refusal(404, "There is no such tenant.", param="tenant", code="not_found")
        return await run_in_threadpool(service.limiter.usage_to_json, target, usage_file)

    # Completions and scores

    @router.post("/v1/chat/completions", responses=STREAMED)
    async def chat(http: Http, body: ChatBody) -> Response:
        body.refuse_unsupported("echo", False, "is not supported here: use /v1/completions")
        if body.top_logprobs and not body.logprobs:
            raise invalid_request("top_logprobs", "It needs logprobs=true.")
        return await answer_request(Call(service, http), body, "top_logprobs")

    @router.post("/v1/completions", responses=STREAMED)
    async def completions(http: Http, body: CompletionBody) -> Response:
        body.refuse_unsupported("tools", [], "is not supported here: use /v1/chat/completions")
        refuse_many_prompts(service, "prompt", body.prompt_count)
        return await answer_request(Call(service, http), body, "logprobs")

    @router.post("/v1/rewards")
    async def rewards(http: Http, body: RewardBody) -> Response:
        call = Call(service, http)
        count = len(body.conversations)
        refuse_many_prompts(service, "messages", count)
        with call.admit(body.model, body.user, count, min_tokens=count, asks_for_scores=True) as (model, _):
            version = model.version
            assert version is not None
            prompts = await call.run_in_turn(
                lambda: build_reward_prompts(service.format_of(version), body, version.hides_reasoning, service.context)
            )
            requests = [
                Request(prompt.ids, SamplingParams(0), version.digest, call.tenant.name, scored=True)
                for prompt in prompts
            ]
            call.submit(requests, sum(len(prompt.ids) for prompt in prompts), is_stream=False)
            return await respond_whole(call, RewardAnswers(call.record, count), build_headers(call))

    # Operation of the server

    @router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
    async def load(http: Http, body: LoadAdapter) -> Response:
        tenant = require_admin(http)
        if not service.portfolio.roots:
            message = "This server loads no adapters while it runs. Start it with stage.roots=[FOLDER]."
            raise Refusal(403, message, param="lora_path", code="loading_disabled")
        record = http.scope["record"]
        record.asked = make_printable(body.lora_name)
        try:
            version = await run_in_threadpool(
                service.load_adapter, body.lora_name, body.lora_path, body.load_inplace, tenant.name
            )
        except InputError as error:
            message = f"'{body.lora_name}' was not loaded. {error.field}: {error.problem}. {error.remedy}"
            raise invalid_request(error.field, message) from error
        except Refusal:
            raise
        except Exception as error:  # a wrong value in adapter_config.json may raise any exception
            log.warning("'%s' was not loaded", body.lora_name, exc_info=error)
            problem = f"its files cannot be read as an adapter ({type(error).__name__})"
            raise invalid_request("lora_path", f"'{body.lora_name}' was not loaded: {problem}.") from error
        record.base = service.portfolio.base.digest
        record.adapter = version.digest
        message = f"Success: LoRA adapter '{body.lora_name}' added successfully."
        return PlainTextResponse(message, headers={"x-align-adapter": version.digest})

    @router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
    async def unload(http: Http, body: UnloadAdapter) -> Response:
        tenant = require_admin(http)
        http.scope["record"].asked = make_printable(body.lora_name)
        try:
            await run_in_threadpool(service.unload_adapter, body.lora_name, tenant.name)
        except InputError as error:
            raise invalid_request(error.field, f"'{body.lora_name}' {error.problem}. {error.remedy}") from error
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @router.get("/health")
    async def health() -> Response:
        alive = service.engine.alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    @router.get("/ready")
    async def ready() -> Response:
        status = "ready" if service.is_ready else "draining" if service.engine.alive else "the engine has stopped"
        return JSONResponse({"status": status}, 200 if service.is_ready else 503)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics(http: Http) -> Response:
        require_admin(http)
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router


def require_admin(http: Http) -> Tenant:
    """Return the tenant of a request, or raise Refusal (403) if it is no administrator."""
    tenant: Tenant = http.scope["tenant"]
    if not tenant.admin:
        raise Refusal(403, NEEDS_ADMIN, code="insufficient_permissions")
    return tenant


def describe_model(service: Service, name: str, arms: Sequence[Arm]) -> dict[str, Any]:
    """Return a model name's entry in `/v1/models`, in vLLM's form, with the digests of its base and adapters."""
    arm_entries = [
        {"arm": arm.label, "weight": arm.weight, "adapter": arm.version.digest if arm.version else None} for arm in arms
    ]
    base_id = service.portfolio.base_id
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "align",
        "root": name,
        "parent": None if name == base_id else base_id,
        "max_model_len": service.context,
        "base": service.portfolio.base.digest,
        "scores": any(arm.version is not None and arm.version.is_reward_model for arm in arms),
        "adapter": arm_entries[0]["adapter"] if len(arms) == 1 else None,
        "arms": arm_entries if len(arms) > 1 else None,
    }


def refuse_many_prompts(service: Service, param: str, prompt_count: int) -> None:
    """Raise Refusal if `prompt_count` exceeds the server's limit `stage.max_prompts`."""
    limit = service.max_prompts
    if prompt_count > limit:
        message = (
            f"The request has {prompt_count} prompts, and may have {limit} (stage.max_prompts). Send several requests."
        )
        raise invalid_request(param, message, "too_many_prompts")
