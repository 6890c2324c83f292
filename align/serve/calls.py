"""Requests in progress, from their admission to the response in the form of OpenAI's two APIs. A `Call` is such a
request, and no call of a tool.

A response is one JSON body or a stream of server-sent events.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from prometheus_client import Histogram
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from align.core.errors import InputError, NonFiniteLogits
from align.rollout.detokenize import StopFinder, TextDecoder
from align.rollout.serving_engine import Completion, Output, QueueFull, Request
from align.serve.answer_constraints import GrammarFor, prepare_grammars
from align.serve.answers import Answers, ChatAnswers, TextAnswers
from align.serve.errors import SERVER, Refusal, as_refusal, internal_error, invalid_request, shutting_down
from align.serve.grammars import GrammarFailed
from align.serve.model_names import ChosenModel
from align.serve.prompts import (
    ChatBody,
    ChatFormat,
    CompletionBody,
    Prompt,
    build_prompts,
    choose_sampling,
    derive_seed,
)
from align.serve.rate_limits import Charge
from align.serve.request_log import RequestRecord
from align.serve.tenants import Tenant

if TYPE_CHECKING:
    from align.serve.app import Service

log = logging.getLogger(__name__)
T = TypeVar("T")
BUSY_S = 1
"""Seconds for `Retry-After` if the engine's queue is full."""
CLOSED = 499
"""Status code in the request log if the client disconnected, as in nginx."""
DONE = b"data: [DONE]\n\n"
SAFE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")
"""Characters of a label that a response header holds unchanged; others are percent-encoded."""


class Call:
    """A request in progress, from its admission until its answers have ended.

    Args:
        http: the HTTP request; its scope has the tenant and the request's record.

    Attributes:
        inbox: outputs of the engine with the number of their answer; a Refusal ends the call.
        received_tokens: completion tokens that the engine has posted so far.
    """

    def __init__(self, service: Service, http: Http) -> None:
        self.service = service
        self.record: RequestRecord = http.scope["record"]
        self.tenant: Tenant = http.scope["tenant"]
        self.receive = http.receive
        self.inbox = asyncio.Queue[tuple[int, Output] | Refusal]()
        self.received_tokens = 0
        self._completions: list[Completion] = []
        self._unfinished = 0
        self._charge: Charge | None = None
        self._stack = ExitStack()
        self._last_s = 0.0
        self._token_intervals: Histogram | None = None
        self._failed = False

    @contextmanager
    def admit(
        self, model: str, user: str | None, answer_count: int, min_tokens: int, asks_for_scores: bool = False
    ) -> Iterator[tuple[ChosenModel, Charge]]:
        """Yield the model chosen to answer a request and its Charge, or raise Refusal if it is not admitted.

        This happens before its prompt is tokenised. The weights stay loaded until the call is closed. An exception in
        the block closes the call.

        Args:
            model: name of the requested model.
            user: the tenant's user, who decides the arm of a model that has several.
            answer_count: number of answers.
            min_tokens: minimum number of tokens of all prompts and answers.
            asks_for_scores: whether the request asks for scores by a reward model.

        Raises:
            Refusal: the tenant has no such model, the model is a reward model where answers are requested or the
                other way round, the server is shutting down, or a limit of the tenant is used up.
        """
        service = self.service
        with service.hold_chosen_model(self.record, self.tenant, model, user) as chosen_model:
            is_reward_model = chosen_model.version is not None and chosen_model.version.is_reward_model
            if is_reward_model and not asks_for_scores:
                raise invalid_request("model", f"'{chosen_model.name}' is a reward model: use /v1/rewards.")
            if asks_for_scores and not is_reward_model:
                raise invalid_request("model", f"'{chosen_model.name}' is no reward model.")
            if service.is_draining:
                raise shutting_down()
            with translate_engine_errors():
                service.engine.engine.require_queue_room(self.tenant.name)
            service.answering.add(self)
            self._stack.callback(service.answering.discard, self)
            try:
                charge = service.limiter.admit(self.tenant, answer_count, min_tokens, self.record.id)
                self._charge = self._stack.enter_context(charge)
                yield chosen_model, self._charge
            except BaseException:
                self.close()
                raise

    async def run_in_turn(self, read_body: Callable[[], T]) -> T:
        """Run a slow function, such as tokenising a prompt, in a thread, after waiting for the tenant's semaphore.

        Use one call for all of a request's slow work: each switch of threads waits for the engine's thread.
        """
        async with self.service.readers.turn(self.tenant.name):
            return await run_in_threadpool(read_body)

    def submit(self, requests: Sequence[Request], prompt_tokens: int, is_stream: bool) -> None:
        """Reserve the maximum tokens of an admitted call from its tenant's limits, and queue its answers in the engine.

        Args:
            requests: one for each answer.
            prompt_tokens: tokens of the prompts, each counted once for all its answers.

        Raises:
            Refusal: the server is shutting down, a limit of the tenant is used up, or the engine refuses a request.
        """
        assert self._charge is not None
        self.record.stream = is_stream
        if self.service.is_draining:
            raise shutting_down()
        self.record.prompt_tokens = prompt_tokens
        if len(requests) == 1:
            self._token_intervals = self.service.metrics.get_token_intervals(self.record.answered)
        self._charge.reserve(prompt_tokens + sum(request.sampling.max_tokens for request in requests))
        with translate_engine_errors():
            for i, request in enumerate(requests):
                self._completions.append(self.service.engine.add(request, partial(self.service.queue_output, self, i)))
        self._unfinished = len(requests)

    def _count_used_tokens(self) -> tuple[int, int]:
        """Return the (prompt tokens, completion tokens) that the tenant is charged for this call.

        Prompts that only waited in the queue, or failed before any output, are free.
        """
        record = self.record
        if self._failed and not (record.completion_tokens or record.finish_reasons):
            return 0, 0
        return self.count_started_prompt_tokens(), record.completion_tokens

    def count_started_prompt_tokens(self) -> int:
        """Return the total tokens of the prompts that the engine has begun to process, each prompt counted once."""
        started = [completion.request.prompt_ids for completion in self._completions if completion.has_begun]
        return sum({id(prompt_ids): len(prompt_ids) for prompt_ids in started}.values())

    async def iter_outputs(self) -> AsyncIterator[list[tuple[int, Output]]]:
        """Yield lists of new outputs of the engine as (index of the answer, output), until all answers have ended.

        Raises:
            Refusal: an answer failed, or the call was ended.
        """
        while self._unfinished:
            messages = [await self.inbox.get()]
            while not self.inbox.empty():
                messages.append(self.inbox.get_nowait())
            outputs = []
            for message in messages:
                if isinstance(message, Refusal):
                    raise message
                self._record_output(message[1])
                outputs.append(message)
            yield outputs

    def _record_output(self, output: Output) -> None:
        """Add an output's token counts and times to the request's log entry, or raise Refusal if the answer failed."""
        record = self.record
        if output.finish_reason == "abort":
            raise shutting_down()
        if output.error is not None:
            self._failed = True
            digest = (record.adapter or record.base)[:12]
            log.error("%s failed on %s (%s): %s", record.id, record.answered, digest, output.error)
            raise error_to_refusal(output.error, record.answered)
        record.completion_tokens += len(output.tokens)
        record.cached_tokens = max(record.cached_tokens, output.cached_tokens)
        if output.tokens:
            now = record.measure_elapsed()
            if record.first_token_s is None:
                record.first_token_s = now
            elif self._token_intervals is not None:
                self._token_intervals.observe(now - self._last_s)
            self._last_s = now
        if output.finish_reason is not None:
            self._unfinished -= 1

    def end_with(self, refusal: Refusal) -> None:
        """Abort the answers, and send the client an error in their place. Must be called from the event loop."""
        self.inbox.put_nowait(refusal)
        self.abort()

    def abort(self) -> None:
        """Abort the answers that the engine has not finished."""
        for completion in self._completions:
            if completion.finished is None:
                self.service.engine.abort(completion)

    def close(self) -> None:
        """Abort unfinished answers and charge the tenant for the tokens used.

        Further calls do nothing.

        Raises:
            Refusal: the usage could not be recorded; the request must not be answered then.
        """
        self.abort()
        if self._charge is not None:
            self._charge.used = self._count_used_tokens()
            self.record.prompt_tokens = self._charge.used[0]
        self._stack.close()


def error_to_refusal(error: BaseException, model: str) -> Refusal:
    """Convert an exception in the engine to a Refusal: 422 for nan logits, 400 for a too costly grammar, else 500.

    Args:
        model: name of the model, for the message.
    """
    if isinstance(error, NonFiniteLogits):  # a retry fails too, so that the status is one that clients do not retry
        message = (
            f"The model '{model}' computed values that are nan or infinite on this prompt: its weights are too large "
            "for the precision that it is served in. Use another model, and report this to the server's operator."
        )
        return Refusal(422, message, param="model", code="model_not_finite")
    if isinstance(error, GrammarFailed):
        message = (
            "One step of constraining this answer to its schema, pattern or tools takes too long. Simplify it: fewer "
            "alternatives, and no repeats of repeats."
        )
        return invalid_request(None, message, "invalid_grammar")
    return internal_error()


@contextmanager
def translate_engine_errors() -> Iterator[None]:
    """Convert QueueFull and InputError raised in the block to a Refusal with status 429 or 400."""
    try:
        yield
    except QueueFull as error:
        message = "The server is busy: as many requests wait as may. Try again in a moment."
        kind = "rate_limit_error"
        raise Refusal(429, message, type=kind, code="queue_full", retry_after_s=BUSY_S) from error
    except InputError as error:
        raise as_refusal(error) from error


async def answer_request(call: Call, body: ChatBody | CompletionBody, logprobs_field: str) -> Response:
    """Answer a request for chat completions or completions, as one JSON response or as server-sent events.

    Args:
        logprobs_field: the parameter for the number of logprobs, for error messages.

    Raises:
        Refusal: the request is invalid, or was not admitted, or an answer failed.
    """
    service = call.service
    answer_count = body.prompt_count * body.n
    max_tokens = body.most_tokens
    min_tokens = body.prompt_count + answer_count * (1 if max_tokens is None else max_tokens)
    with call.admit(body.model, body.user, answer_count, min_tokens) as (model, charge):

        def read_body() -> tuple[ChatFormat, list[Prompt], GrammarFor | None]:
            form = service.format_of(model.version)
            prompts = build_prompts(form, body, service.vocabulary)
            return form, prompts, prepare_grammars(form, body, service.vocabulary) if body.constrains else None

        form, prompts, grammar_for = await call.run_in_turn(read_body)
        prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        max_answer_tokens = charge.compute_max_answer_tokens(prompt_tokens, body.n) if max_tokens is None else None
        if max_tokens is None and body.alternatives is not None:
            affordable_tokens = max(1, service.max_logprobs // (body.n * (body.alternatives + 1)))
            max_answer_tokens = min(affordable_tokens, max_answer_tokens or affordable_tokens)
        samplings = [choose_sampling(form, body, prompt, service.context, max_answer_tokens) for prompt in prompts]
        tokens = body.n * sum(sampling.max_tokens for sampling in samplings)
        if isinstance(body, CompletionBody) and body.echo:
            tokens += body.n * prompt_tokens
        refuse_many_logprobs(service, logprobs_field, body.alternatives, tokens)
        requests = [
            Request(
                prompt.ids,
                replace(sampling, seed=derive_seed(sampling.seed, i)),
                model.version.digest if model.version else None,
                call.tenant.name,
                grammar=None if grammar_for is None else grammar_for(prompt, sampling.max_tokens),
                ends=build_stop_finder(form, body, prompt) if body.stops else None,
            )
            for prompt, sampling in zip(prompts, samplings, strict=True)
            for i in range(body.n)
        ]
        answers: Answers
        if isinstance(body, ChatBody):
            answers = ChatAnswers(form, prompts, call.record, body)
        else:
            answers = TextAnswers(form, prompts, call.record, body)
        call.submit(requests, prompt_tokens, body.stream)
        if body.stream:
            return EventStream(call, answers, build_headers(call))
        return await respond_whole(call, answers, build_headers(call))


def build_stop_finder(form: ChatFormat, body: ChatBody | CompletionBody, prompt: Prompt) -> StopFinder:
    """Build the checker that ends an answer at one of the request's stop strings.

    A completion is decoded as a continuation of its prompt.
    """
    before = () if isinstance(body, ChatBody) else prompt.ids
    return StopFinder(TextDecoder(form.tokenizer, body.stops, before))


def refuse_many_logprobs(service: Service, param: str, alternatives: int | None, tokens: int) -> None:
    """Raise Refusal if the response to a request would hold more logprobs than `stage.max_logprobs`.

    Args:
        param: the parameter for the number of logprobs.
        alternatives: requested alternatives per token; None for no logprobs.
        tokens: maximum tokens of all answers, plus those of an echoed prompt for each answer.
    """
    limit = service.max_logprobs
    if alternatives is not None and tokens * (alternatives + 1) > limit:
        message = (
            f"{tokens} tokens with {alternatives} logprobs and their own make {tokens * (alternatives + 1):,} logprobs,"
            f" and an answer may have {limit:,} (stage.max_logprobs). Ask for fewer tokens, prompts or logprobs."
        )
        raise invalid_request(param, message, "too_many_logprobs")


def build_headers(call: Call) -> dict[str, str]:
    """Return `x-align-…` response headers with the digests of base and adapter, and the label of the chosen adapter."""
    record = call.record
    arm = percent_encode(record.arm)
    headers = {"x-align-base": record.base, "x-align-adapter": record.adapter, "x-align-arm": arm}
    return {name: value for name, value in headers.items() if value}


def percent_encode(label: str) -> str:
    """Percent-encode the characters of a label that a response header cannot hold."""
    return quote(label, safe=SAFE)


@asynccontextmanager
async def end_on_disconnect(call: Call) -> AsyncIterator[None]:
    """Abort a call if its client disconnects during the block, and close the call when the block ends."""

    async def watch() -> None:
        while (await call.receive())["type"] != "http.disconnect":
            pass
        call.end_with(Refusal(CLOSED, "The client has gone.", type=SERVER))

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        call.close()
        with suppress(asyncio.CancelledError):
            await watcher


async def respond_whole(call: Call, answers: Answers, headers: Mapping[str, str]) -> Response:
    """Wait until all answers of a call have ended, and return them as one JSON response.

    Raises:
        Refusal: an answer failed, or the client has disconnected.
    """
    async with end_on_disconnect(call):
        async for outputs in call.iter_outputs():
            for i, output in outputs:
                for _ in answers.add_output(i, output):
                    pass
    return JSONResponse(answers.to_response(), headers=dict(headers))


class EventStream(Response):
    """A response that streams the answers of a call as server-sent events, with an error as the last event.

    Calling it as an ASGI response only adds it to the scope's `streams`. `align.serve.app.ServerMiddleware` sends it
    after routing: otherwise each event would pass through twenty layers of middleware.
    """

    media_type = "text/event-stream"

    def __init__(self, call: Call, answers: Answers, headers: Mapping[str, str]) -> None:
        super().__init__(headers=dict(headers))
        del self.headers["content-length"]
        self.call = call
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["streams"].append(self)

    async def send_events(self, send: Send) -> None:
        """Send the response's head, then the answers as server-sent events until they end or fail."""
        record = self.call.record
        try:
            async with end_on_disconnect(self.call):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    async for part in self._iter_events():
                        await send({"type": "http.response.body", "body": part, "more_body": True})
                except Exception as error:
                    if not isinstance(error, Refusal):
                        log.exception("%s failed", record.id)
                        error = internal_error()
                    record.status = error.status
                    await send({"type": "http.response.body", "body": encode_event(error.body), "more_body": True})
        except Refusal as refusal:  # the usage could not be recorded, and the head of the response was sent already
            log.error("%s: %s", record.id, refusal.message)
            record.status = refusal.status
        await send({"type": "http.response.body", "body": b""})

    async def _iter_events(self) -> AsyncIterator[bytes]:
        if first := b"".join(map(encode_event, self.answers.iter_opening_chunks())):
            yield first
        async for outputs in self.call.iter_outputs():
            chunks = [chunk for i, output in outputs for chunk in self.answers.add_output(i, output)]
            if chunks:
                yield b"".join(map(encode_event, chunks))
        self.call.close()  # the usage is settled before the client receives the end of the stream
        yield (encode_event(self.answers.build_usage_chunk()) if self.answers.streams_usage else b"") + DONE


def encode_event(data: Any) -> bytes:
    return b"data: " + to_json(data) + b"\n\n"
