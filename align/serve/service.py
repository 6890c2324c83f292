"""A server's parts, and the requests that are under way: answers come from the engine's thread, and leave whole or as
server-sent events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic_core import to_json
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from align.core.errors import InputError, NotFinite
from align.rollout.request_queue import EngineThread
from align.rollout.requests import Output, Pending, Request
from align.serve import operator_log
from align.serve.adapter_folders import warn_if_stale
from align.serve.alias_watcher import Following
from align.serve.answers import Answers
from align.serve.errors import (
    SERVER,
    Refusal,
    as_refusal,
    draining,
    fault,
    grammar_failed,
    not_finite,
    uncounted,
    unknown_model,
)
from align.serve.grammars import GrammarFailed
from align.serve.model_names import Chosen, Portfolio, UnknownModel, Version
from align.serve.prompts import Formats
from align.serve.rate_limits import Charge, Limiter, ReadTurns
from align.serve.request_log import Metrics, Record, RequestLog, Stopwatch
from align.serve.tenants import Keys, Tenant
from align.serve.usage import UsageUnwritable

log = logging.getLogger(__name__)
PostedOutput = tuple["Call", int, Output]
"""A call, the number of its answer, and what the engine says of it."""
TRIES = 5
"""How often a name is looked up whose weights are gone again: as often as it was replaced meanwhile."""
LOOK_S = 1.0
"""How often it is looked whether the engine's thread still runs."""


@dataclass
class Service:
    """Attributes:
    format_of: tokenizer and template of a version; of the base for None.
    vocabulary: rows of the base's embedding.
    check: raises InputError where the engine cannot answer by the adapter in a folder.
    created: when the server began, in seconds since 1970.
    max_prompts, max_logprobs: that one request may ask for.
    keys: None: whoever reaches the server may do everything.
    following: the names that mean what an alias means.
    ending: set once nothing new is taken.
    stopped: is called when the engine has ended by itself, and clients were told.
    answering: the calls that are under way.
    loop: the event loop that answers.
    posted: what the engine said and no call was handed yet.
    is_woken: whether the loop is going to hand it over.
    """

    engine: EngineThread
    portfolio: Portfolio
    format_of: Formats
    vocabulary: int
    check: Callable[[Path], object]
    created: int
    log: RequestLog
    metrics: Metrics
    limiter: Limiter
    max_prompts: int
    max_logprobs: int
    keys: Keys | None = None
    following: Following | None = None
    ending: asyncio.Event = field(default_factory=asyncio.Event)
    readers: ReadTurns = field(default_factory=ReadTurns)
    stopped: Callable[[], object] = lambda: None
    answering: set[Call] = field(default_factory=set)
    loop: asyncio.AbstractEventLoop = field(init=False)
    posted: list[PostedOutput] = field(default_factory=list)
    is_woken: bool = False
    totals: dict[str, int] = field(default_factory=lambda: {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0})

    @property
    def context(self) -> int:
        return self.engine.engine.context

    @property
    def draining(self) -> bool:
        return self.ending.is_set()

    @property
    def ready(self) -> bool:
        return self.engine.alive and not self.draining

    @contextmanager
    def chosen(self, record: Record, tenant: Tenant, model: str, user: str | None) -> Iterator[Chosen]:
        """Which weights answer; the record says so. They are there until the block ends, whatever is unloaded.

        Raises:
            Refusal: there is no such model for them.
        """
        known = self.engine.engine.known
        for _ in range(TRIES):
            try:
                chosen = self.portfolio.choose(model, tenant.name, tenant.allowed, user)
            except UnknownModel as error:
                raise unknown_model(model) from error
            try:
                if chosen.version is not None:
                    known.hold(chosen.version.digest)
                break
            except InputError:  # it was unloaded meanwhile: the name stands for something else by now, or for nothing
                continue
        else:
            log.error("the weights that '%s' stands for are not in the engine", model)
            raise fault()
        try:
            record.asked = model
            record.answered = chosen.name
            record.arm = chosen.arm
            record.base = self.portfolio.base.digest
            record.adapter = chosen.version.digest if chosen.version else ""
            yield chosen
        finally:
            if chosen.version is not None:
                known.release(chosen.version.digest)

    def load(self, name: str, folder: str, replace: bool, who: str) -> Version:
        """Let a name stand for the adapter in a folder.

        Args:
            who: asks for it, for the log.

        Raises:
            Refusal: the name is taken; it may be replaced where that is asked for.
            InputError: see `align.serve.model_names.Portfolio.load`; or its tensors do not fit the base.
        """
        if self.portfolio.arms(name) and not replace:
            message = f"The lora adapter '{name}' has already been loaded. Send load_inplace=true to replace it."
            raise Refusal(400, message, param="lora_name", code="already_loaded")
        version = self.portfolio.load(name, folder, self.register, self.unregister)
        operator_log.info("%s loaded %s (%s)", who, name, version.digest[:12])
        warn_if_stale(name, version.folder)
        return version

    def unload(self, name: str, who: str) -> None:
        """Take a name away.

        Raises:
            UnknownModel, InputError: see `align.serve.model_names.Portfolio.unload`.
        """
        digests = ", ".join(self.portfolio.digest_of(arm.version)[:12] for arm in self.portfolio.arms(name))
        self.portfolio.unload(name, self.unregister)
        operator_log.info("%s unloaded %s (%s)", who, name, digests)

    def register(self, version: Version) -> None:
        self.check(version.folder)
        self.format_of.forget(version)
        self.format_of(version)
        self.engine.engine.register(version.folder, version.digest)  # last: what fails after it would stay there

    def unregister(self, version: Version) -> None:
        self.engine.engine.unregister(version.digest)

    def done(self, record: Record) -> None:
        """A request has ended."""
        self.totals["requests"] += 1
        self.totals["prompt_tokens"] += record.prompt_tokens
        self.totals["completion_tokens"] += record.completion_tokens
        self.metrics.observe(record)
        self.log.write(record)

    def opened(self) -> None:
        """Begin to answer in the event loop that is running."""
        self.loop = asyncio.get_running_loop()

    def post(self, call: Call, i: int, output: Output) -> None:
        """Take what the engine says of answer `i` of a call, in the engine's thread. Waking a loop writes to a pipe: it
        is done once for a step of the engine, and not once for each row of it."""
        self.posted.append((call, i, output))
        if not self.is_woken:
            self.is_woken = True
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        """Hand outputs to their calls. What a client may receive is recorded before: once for all of them."""
        self.is_woken = False  # before anything is taken out: what comes now wakes the loop again
        letters = self.posted
        self.posted = []
        counts: dict[str, tuple[int, int]] = {}
        for call, _, output in letters:
            call.heard_tokens += len(output.tokens)
            if call.record.stream and is_use(output):
                counts[call.record.id] = call.begun_tokens(), call.heard_tokens
        try:
            if (usage := self.limiter.usage) is not None and counts:
                usage.sent(counts)
        except UsageUnwritable as error:
            for call in {call for call, _, _ in letters}:
                call.end(uncounted(error))
        else:
            for call, i, output in letters:
                call.inbox.put_nowait((i, output))

    async def drain(self, within_s: float) -> None:
        """Take nothing new, and wait for what is under way; what is not done in time is ended."""
        self.ending.set()
        until = asyncio.get_running_loop().time() + within_s
        while self.answering and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.02)
        for call in list(self.answering):
            call.end(draining())
        while self.answering and asyncio.get_running_loop().time() < until + LOOK_S:
            await asyncio.sleep(0.02)


def is_use(output: Output) -> bool:
    """Whether a client has something of an output: a tenant pays for no prompt that failed before that."""
    return bool(output.tokens) or output.prompt_logprobs is not None or output.finish_reason in ("stop", "length")


class Call:
    """One request while its answers are made.

    Args:
        record: is told what comes of it.
        watch: since the request came.
        tenant: who asks.
    """

    def __init__(self, service: Service, record: Record, watch: Stopwatch, tenant: Tenant) -> None:
        self.service = service
        self.record = record
        self.tenant = tenant
        self._watch = watch
        self.inbox = asyncio.Queue[tuple[int, Output] | Refusal]()
        self.heard_tokens = 0
        self._pending: dict[int, Pending] = {}
        self._added: list[Pending] = []
        self._charge: Charge | None = None
        self._stack = ExitStack()
        self._last_s = 0.0
        self._between = None
        self._failed = False

    @contextmanager
    def let_in(self, answers: int, least: int) -> Iterator[Charge]:
        """Around what is made of the request, its prompt's tokens to begin with. What goes wrong there ends the call.

        Args:
            answers: that are asked for.
            least: tokens that they will have at the least, with their prompts.

        Raises:
            Refusal: the server is ending, or the tenant has used up its share.
        """
        service, record = self.service, self.record
        if service.draining:
            raise draining()
        with refusing():
            service.engine.engine.check_queue(self.tenant.name)
        service.answering.add(self)
        self._stack.callback(service.answering.discard, self)
        try:
            with refusing():
                entering = service.limiter.enter(self.tenant, answers, least, record.id)
                self._charge = self._stack.enter_context(entering)
            yield self._charge
        except BaseException:
            self.close()
            raise

    def begin(self, requests: Sequence[Request], prompt_tokens: int) -> None:
        """Have the answers made. It was let in.

        Args:
            prompt_tokens: that are counted; answers to one prompt share them.

        Raises:
            Refusal: the server is ending, the tenant has used up its share, or the engine does not take it.
        """
        assert self._charge is not None
        if self.service.draining:
            raise draining()
        self.record.prompt_tokens = prompt_tokens
        if len(requests) == 1:
            self._between = self.service.metrics.between_tokens(self.record.answered)
        with refusing():
            self._charge.reserve(prompt_tokens + sum(request.sampling.max_tokens for request in requests))
            for i, request in enumerate(requests):
                self._pending[i] = self.service.engine.add(request, partial(self.service.post, self, i))
                self._added.append(self._pending[i])

    def _used(self) -> tuple[int, int]:
        """Tokens of the prompts that the engine has begun to read, and of the answers. Of prompts that only waited, or
        failed before anything came of them, there are none."""
        record = self.record
        if self._failed and not (record.completion_tokens or record.finish_reasons):
            return 0, 0
        return self.begun_tokens(), record.completion_tokens

    def begun_tokens(self) -> int:
        """Of the prompts that the engine has begun to read, each once."""
        prompts = {id(ids): len(ids) for p in self._added if p.begun for ids in [p.request.prompt_ids]}
        return sum(prompts.values())

    async def outputs(self) -> AsyncIterator[list[tuple[int, Output]]]:
        """What the engine says of the answers, until all have ended: at a time all that it has said since.

        Raises:
            Refusal: one failed, or the call was ended.
        """
        while self._pending:
            heard = [await self.inbox.get()]
            while not self.inbox.empty():
                heard.append(self.inbox.get_nowait())
            yield [self._check_output(each) for each in heard]

    def _check_output(self, heard: tuple[int, Output] | Refusal) -> tuple[int, Output]:
        if isinstance(heard, Refusal):
            raise heard
        i, output = heard
        if output.finish_reason == "abort":
            raise draining()
        if output.error is not None:
            self._failed = True
            digest = (self.record.adapter or self.record.base)[:12]
            log.error("%s failed on %s (%s): %s", self.record.id, self.record.answered, digest, output.error)
            raise refusal_of(output.error, self.record.answered)
        self._added[i].begun = True
        self._count(output)
        if output.finish_reason is not None:
            del self._pending[i]
        return heard

    def _count(self, output: Output) -> None:
        record, now = self.record, self._watch()
        record.completion_tokens += len(output.tokens)
        record.cached_tokens = max(record.cached_tokens, output.cached_tokens)
        if output.tokens:
            if record.first_token_s is None:
                record.first_token_s = now
            elif self._between is not None:
                self._between.observe(now - self._last_s)
            self._last_s = now

    def end(self, why: Refusal) -> None:
        """End it before its time, from the event loop."""
        self.inbox.put_nowait(why)
        self.abort()

    def abort(self) -> None:
        for pending in self._pending.values():
            self.service.engine.abort(pending)

    def close(self) -> None:
        """Whatever came of it: nothing of it goes on, and it is accounted for. May be called again.

        Raises:
            Refusal: what was used could not be counted; nothing is answered then.
        """
        self.abort()
        if self._charge is not None:
            self._charge.used = self._used()
            self.record.prompt_tokens = self._charge.used[0]
        with refusing():
            self._stack.close()


def refusal_of(error: BaseException, model: str) -> Refusal:
    """Return what a client is told of an answer that the engine could not go on with."""
    if isinstance(error, NotFinite):
        return not_finite(model)
    return grammar_failed() if isinstance(error, GrammarFailed) else fault()


CLOSED = 499
"""The status in the log of a request whose client has gone (nginx's)."""


@contextmanager
def refusing() -> Iterator[None]:
    """Around what a tenant or a request may be refused for: the error as clients read it."""
    try:
        yield
    except InputError as error:
        raise as_refusal(error) from error
    except UsageUnwritable as error:
        raise uncounted(error) from error


DONE = b"data: [DONE]\n\n"


def encode_event(data: Any) -> bytes:
    return b"data: " + to_json(data) + b"\n\n"


@asynccontextmanager
async def end_on_disconnect(call: Call, receive: Receive) -> AsyncIterator[None]:
    """For as long as a call is under way: if the client goes, the call ends, and its slot is free."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        call.end(Refusal(CLOSED, "The client has gone.", type=SERVER))

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        call.close()
        with suppress(asyncio.CancelledError):
            await watching


async def respond_whole(call: Call, answers: Answers, receive: Receive, headers: Mapping[str, str]) -> Response:
    """All answers at once.

    Raises:
        Refusal: one of them failed, or the client has gone.
    """
    async with end_on_disconnect(call, receive):
        async for heard in call.outputs():
            for i, output in heard:
                for _ in answers.take(i, output):
                    pass
    return JSONResponse(answers.whole(), headers=dict(headers))


class EventStream(Response):
    """The answers in chunks, while they are made. An error on the way is an event of its own, and the last.

    As a response it only adds itself to the scope's `streams`. `align.serve.middleware.ServerMiddleware` sends it when
    routing is done: otherwise each piece would pass through twenty layers.
    """

    media_type = "text/event-stream"

    def __init__(self, call: Call, answers: Answers, usage: bool, headers: Mapping[str, str]) -> None:
        super().__init__(headers=dict(headers))
        del self.headers["content-length"]
        self.call, self.answers, self.usage = call, answers, usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["streams"].append(self)

    async def answer(self, receive: Receive, send: Send) -> None:
        try:
            await self._answer(receive, send)
        except Refusal as refusal:  # what was used could not be counted: the head has gone, and the log says why
            log.error("%s: %s", self.call.record.id, refusal.message)
            self.call.record.status = refusal.status
        await send({"type": "http.response.body", "body": b""})

    async def _answer(self, receive: Receive, send: Send) -> None:
        async with end_on_disconnect(self.call, receive):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for part in self._events():
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            except Refusal as refusal:
                await self._fail(refusal, send)
            except Exception:
                log.exception("%s failed", self.call.record.id)
                await self._fail(fault(), send)

    async def _events(self) -> AsyncIterator[bytes]:
        if first := b"".join(map(encode_event, self.answers.first())):
            yield first
        async for heard in self.call.outputs():
            if chunks := b"".join(encode_event(chunk) for i, output in heard for chunk in self.answers.take(i, output)):
                yield chunks
        self.call.close()  # what was used is settled before the client hears that it has all of it
        yield (encode_event(self.answers.usage_chunk()) if self.usage else b"") + DONE

    async def _fail(self, refusal: Refusal, send: Send) -> None:
        self.call.record.status = refusal.status
        await send({"type": "http.response.body", "body": encode_event(refusal.body), "more_body": True})
