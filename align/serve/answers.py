"""Requests in progress, from their admission to the response in the form of OpenAI's two APIs.

A response is one JSON body or a stream of server-sent events.

The text of an answer is split into reasoning, content and tool calls. Reasoning is the text between `<think>` and
`</think>` at the beginning, as in `align.data.chat.reasoning`. A tool call is JSON with `name` and `arguments` (or
`parameters`), between `<tool_call>` and `</tool_call>` (Hermes, Qwen) or as the whole answer (Llama 3). JSON that calls
a tool which was not offered is content.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar
from urllib.parse import quote

from prometheus_client import Histogram
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from align.core.errors import InputError, NonFiniteLogits
from align.data.chat.reasoning import CLOSE, OPEN
from align.rollout.detokenize import StopFinder, TextDecoder, TokenTexts, count_prefix_at_end
from align.rollout.serving_engine import Completion, Output, QueueFull, Request, Token
from align.serve.answer_constraints import GrammarFor, prepare_grammars
from align.serve.errors import SERVER, Refusal, as_refusal, internal_error, invalid_request, shutting_down
from align.serve.grammars import GrammarFailed
from align.serve.model_names import ChosenModel
from align.serve.prompts import (
    CALL_END,
    CALL_START,
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


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that the model made in its answer.

    Attributes:
        arguments: JSON.
    """

    name: str
    arguments: str
    id: str

    def as_dict(self) -> dict[str, Any]:
        """Return the call as an entry of `tool_calls` in OpenAI's form of a message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class AnswerPart(NamedTuple):
    """A piece of an answer: text of one kind, or a tool call."""

    kind: Literal["reasoning", "content", "call"]
    text: str = ""
    call: ToolCall | None = None


class AnswerParser:
    """A parser that splits the text of an answer into reasoning, content and tool calls while it is generated.

    Args:
        begins_in_reasoning: whether the prompt ends with `<think>`, so that the answer begins with reasoning.
        tools: names of the offered tools.
        max_calls: maximum number of calls; further ones are dropped.

    Attributes:
        calls: number of calls so far.
    """

    def __init__(
        self, begins_in_reasoning: bool = False, tools: Collection[str] = (), max_calls: int | None = None
    ) -> None:
        self.tools = tools
        self.max_calls = max_calls
        self.calls = 0
        self._state = "opened" if begins_in_reasoning else "start"
        self._text = ""

    def feed(self, text: str, is_last: bool = False) -> list[AnswerPart]:
        """Add the next text of an answer, and return the parts that can be sent now.

        Args:
            is_last: whether this is the end of the answer.
        """
        if self._state == "content" and not self.tools:  # the rest of the answer is content
            return [AnswerPart("content", text)] if text else []
        self._text += text
        parts = list[AnswerPart]()
        while (next_parts := self._advance(is_last)) is not None:
            parts += next_parts
        return join_parts(parts)

    def _advance(self, is_last: bool) -> list[AnswerPart] | None:
        """Consume buffered text up to the next state, and return its complete parts, or None if more text is needed."""
        text = self._text
        stripped = text.lstrip()
        match self._state:
            case "start":  # reasoning may open
                if stripped.startswith(OPEN):
                    return self._enter_state("opened", stripped.removeprefix(OPEN))
                return self._enter_state("answer", text) if is_last or not OPEN.startswith(stripped) else None
            case "opened" | "closed":  # whitespace around the reasoning is dropped
                self._text = stripped
                if not stripped:
                    return None
                return self._enter_state("reasoning" if self._state == "opened" else "answer", stripped)
            case "reasoning":
                reasoning, closing_tag, remainder = text.partition(CLOSE)
                if closing_tag:
                    return self._enter_state("closed", remainder, [AnswerPart("reasoning", reasoning.rstrip())])
                length = len(reasoning.rstrip()) if is_last else count_sendable_characters(reasoning, CLOSE)
                if not length:
                    return None
                return self._enter_state("reasoning", reasoning[length:], [AnswerPart("reasoning", reasoning[:length])])
            case "answer":  # the whole answer may be a call in JSON
                if not stripped and not is_last:
                    return None
                return self._enter_state("json" if self.tools and stripped[:1] in ("{", "[") else "content", text)
            case "json":
                if not is_last:
                    return None
                return self._enter_state("content", "", self._take_calls(text) or [AnswerPart("content", text)])
            case "call":
                call_text, closing_tag, remainder = text.partition(CALL_END)
                if not closing_tag and not is_last:
                    return None
                if parts := self._take_calls(call_text):
                    return self._enter_state("content", remainder.lstrip(), parts)
                return self._enter_state(
                    "content", remainder, [AnswerPart("content", f"{CALL_START}{call_text}{closing_tag}")]
                )
            case _:
                content, opening_tag, remainder = text.partition(CALL_START) if self.tools else (text, "", "")
                if opening_tag:
                    return self._enter_state("call", remainder, [AnswerPart("content", content.rstrip())])
                length = len(content) if is_last or not self.tools else count_sendable_characters(content, CALL_START)
                if not length:
                    return None
                return self._enter_state("content", content[length:], [AnswerPart("content", content[:length])])

    def _enter_state(self, state: str, text: str, parts: Sequence[AnswerPart] = ()) -> list[AnswerPart]:
        self._state = state
        self._text = text
        return [*parts]

    def _take_calls(self, text: str) -> list[AnswerPart]:
        """Parse a text as tool calls, count them in `calls`, and return a part for each one up to `max_calls` in all.

        Returns an empty part if all its calls are beyond the maximum, and no parts if the text is not a call.
        """
        calls = parse_tool_calls(text, self.tools)
        if not calls:
            return []
        if self.max_calls is not None:
            calls = calls[: max(0, self.max_calls - self.calls)]
        self.calls += len(calls)
        return [AnswerPart("call", call=call) for call in calls] or [AnswerPart("content")]


def count_sendable_characters(text: str, tag: str) -> int:
    """Return the number of leading characters of a text that can be sent before the text after it is known.

    A possible beginning of `tag` at its end, and the whitespace before that, have to wait.
    """
    pending = max(count_prefix_at_end(text, tag), len(text) - len(text.rstrip()))
    return len(text[: len(text) - pending].rstrip()) if pending else len(text)


def join_parts(parts: list[AnswerPart]) -> list[AnswerPart]:
    """Merge consecutive text parts of one kind, and drop empty parts."""
    merged: list[AnswerPart] = []
    for part in parts:
        if part.call is None and merged and merged[-1].kind == part.kind:
            merged[-1] = AnswerPart(part.kind, merged[-1].text + part.text)
        elif part.text or part.call:
            merged.append(part)
    return merged


def parse_tool_calls(text: str, tools: Collection[str]) -> list[ToolCall]:
    """Parse a text as JSON of one or more tool calls, or return [] if it is anything else or calls an unknown tool."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = [parse_tool_call(item, tools) for item in (value if isinstance(value, list) else [value])]
    return [] if None in calls else [call for call in calls if call]


def parse_tool_call(value: Any, tools: Collection[str]) -> ToolCall | None:
    """Convert a JSON value to a tool call with a new random id, or return None if it calls none of the `tools`."""
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping) or value.get("name") not in tools:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    arguments_text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(value["name"], arguments_text, f"call_{secrets.token_hex(12)}")


Json = dict[str, Any]


class Answers:
    """The base class that collects the answers to one request, and builds the response and its streamed chunks.

    It is created after the record names the model that answers.

    Args:
        streams_usage: whether a stream ends with a chunk that holds the usage.

    Attributes:
        prefix: prefix of the response's id.
        kind, chunk_kind: `object` of a response, and of a chunk.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, record: RequestRecord, streams_usage: bool = False) -> None:
        self.record = record
        self.streams_usage = streams_usage
        self.head = {
            "id": record.id.replace("req", self.prefix, 1),
            "object": self.chunk_kind,
            "created": int(time.time()),
            "model": record.answered,
            "system_fingerprint": build_fingerprint(record),
        }

    def iter_opening_chunks(self) -> Iterator[Json]:
        """Yield the chunks that a stream begins with, before any token is generated."""
        yield from ()

    def add_output(self, i: int, output: Output) -> Iterator[Json]:
        """Add new tokens from the engine to answer `i`, and yield the chunks to stream for them.

        The caller must consume the iterator: the answer is extended as it runs.
        """
        raise NotImplementedError

    def list_choices(self) -> list[Json]:
        """Return the response's `choices`, one for each answer, after all answers have ended."""
        raise NotImplementedError

    def to_response(self) -> Json:
        """Return the JSON body of a response that is not streamed, after all answers have ended."""
        return {**self.head, "object": self.kind, "choices": self.list_choices(), "usage": usage_to_json(self.record)}

    def build_chunk(self, choice: Json) -> Json:
        """Wrap a choice in a chunk of the stream, with the response's id, time and model."""
        chunk = {**self.head, "choices": [choice]}
        return chunk | {"usage": None} if self.streams_usage else chunk

    def build_usage_chunk(self) -> Json:
        """Return the last chunk of a stream, which holds the token usage and no choice."""
        return {**self.head, "choices": [], "usage": usage_to_json(self.record)}


def build_fingerprint(record: RequestRecord) -> str:
    """Return the response's `system_fingerprint`: the first 12 digits of the digests of base and adapter."""
    return "fp_" + record.base[:12] + (f"_{record.adapter[:12]}" if record.adapter else "")


def usage_to_json(record: RequestRecord) -> Json:
    return {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "total_tokens": record.prompt_tokens + record.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
    }


@dataclass
class ChatChoice:
    """One answer to a chat while it is generated: its texts, tool calls and logprobs so far.

    Attributes:
        texts: kind of text → the text so far.
        calls: tool calls so far.
    """

    decoder: TextDecoder
    parser: AnswerParser
    texts: dict[str, str] = field(default_factory=lambda: {"content": "", "reasoning": ""})
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)
    finish_reason: str | None = None

    def to_message(self) -> Json:
        """Return the answer as the `message` of a chat completion in OpenAI's form."""
        message: Json = {"role": "assistant", "content": self.texts["content"], "refusal": None}
        if self.texts["reasoning"]:
            message["reasoning_content"] = self.texts["reasoning"]
        if self.calls:
            message["tool_calls"] = [call.as_dict() for call in self.calls]
            message["content"] = message["content"] or None
        return message

    def add_part(self, part: AnswerPart) -> Json:
        """Add a text or tool call to the answer, and return it as the `delta` of a streamed chunk."""
        if part.call is not None:
            self.calls.append(part.call)
            return {"tool_calls": [{"index": len(self.calls) - 1, **part.call.as_dict()}]}
        self.texts[part.kind] += part.text
        return {"reasoning_content" if part.kind == "reasoning" else "content": part.text}


class ChatAnswers(Answers):
    """The answers to one request of `/v1/chat/completions`, in OpenAI's form."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, form: ChatFormat, prompts: Sequence[Prompt], record: RequestRecord, body: ChatBody) -> None:
        super().__init__(record, body.stream_options.include_usage)
        self.form = form
        self.logprobs = body.logprobs
        tools = [tool.function.name for tool in body.tools] if body.tool_choice != "none" else []
        max_calls = None if body.parallel_tool_calls else 1
        self.choices = [
            ChatChoice(TextDecoder(form.tokenizer, body.stops), AnswerParser(prompt.opens_reasoning, tools, max_calls))
            for prompt in prompts
            for _ in range(body.n)
        ]

    def iter_opening_chunks(self) -> Iterator[Json]:
        for i in range(len(self.choices)):
            yield self._build_choice_chunk(i, {"role": "assistant", "content": ""})

    def add_output(self, i: int, output: Output) -> Iterator[Json]:
        choice = self.choices[i]
        text = decode_output(choice.decoder, self.form.stop_ids, output)
        entries = [chat_logprob_to_json(self.form.texts, token) for token in output.tokens] if self.logprobs else []
        choice.logprobs += entries
        deltas = [choice.add_part(part) for part in choice.parser.feed(text, is_last=output.finish_reason is not None)]
        for n, delta in enumerate(deltas or ([{"content": ""}] if entries else [])):
            yield self._build_choice_chunk(i, delta, entries if n == 0 else [])
        if output.finish_reason is not None:
            is_call = choice.calls and output.finish_reason == "stop"
            choice.finish_reason = "tool_calls" if is_call else output.finish_reason
            self.record.finish_reasons.append(choice.finish_reason)
            yield self._build_choice_chunk(i, {}, [], choice.finish_reason)

    def list_choices(self) -> list[Json]:
        return [
            {
                "index": i,
                "message": choice.to_message(),
                "finish_reason": choice.finish_reason,
                "logprobs": {"content": choice.logprobs, "refusal": None} if self.logprobs else None,
            }
            for i, choice in enumerate(self.choices)
        ]

    def _build_choice_chunk(
        self, i: int, delta: Json, logprobs: Sequence[Json] = (), finish_reason: str | None = None
    ) -> Json:
        content = {"content": list(logprobs), "refusal": None} if logprobs else None
        return self.build_chunk({"index": i, "delta": delta, "logprobs": content, "finish_reason": finish_reason})


def logprob_to_json(logprob: float) -> float:
    """Return a logprob for JSON, with -9999 in place of infinite values and nan, as in OpenAI's API."""
    return logprob if math.isfinite(logprob) else -9999.0


def decode_output(decoder: TextDecoder, stop_ids: Sequence[int], output: Output) -> str:
    """Decode an output's new tokens, without a stop token at the end, and return the text that is complete now."""
    ids = [token.id for token in output.tokens]
    if output.finish_reason == "stop" and ids and ids[-1] in stop_ids:
        ids.pop()
    text = "".join(map(decoder.add_token, ids))
    return text + decoder.finish() if output.finish_reason is not None else text


def chat_logprob_to_json(texts: TokenTexts, token: Token) -> Json:
    """Convert a token with its logprob and alternatives to an entry of `logprobs.content` in a chat completion."""

    def describe_token(id: int, logprob: float) -> Json:
        return {"token": texts.text(id), "logprob": logprob_to_json(logprob), "bytes": list(texts.bytes_of(id))}

    alternatives = [describe_token(id, logprob) for id, logprob in token.top]
    return describe_token(token.id, token.logprob) | {"top_logprobs": alternatives}


@dataclass
class TextChoice:
    """One answer of `/v1/completions` while it is generated: its text and logprobs so far.

    Attributes:
        has_begun: whether an output was added already.
    """

    decoder: TextDecoder
    prompt: Prompt
    text: str = ""
    has_begun: bool = False
    logprobs: Json = field(
        default_factory=lambda: {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    )
    finish_reason: str | None = None


class TextAnswers(Answers):
    """The answers to one request of `/v1/completions`, in OpenAI's form."""

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(
        self, form: ChatFormat, prompts: Sequence[Prompt], record: RequestRecord, body: CompletionBody
    ) -> None:
        super().__init__(record, body.stream_options.include_usage)
        self.form = form
        self.echo = body.echo
        self.logprobs = body.logprobs
        self.choices = [
            TextChoice(TextDecoder(form.tokenizer, body.stops, before=prompt.ids), prompt)
            for prompt in prompts
            for _ in range(body.n)
        ]

    def add_output(self, i: int, output: Output) -> Iterator[Json]:
        choice = self.choices[i]
        before = None if self.logprobs is None else {name: len(entries) for name, entries in choice.logprobs.items()}
        text = self._echo_prompt(choice, output.prompt_logprobs) if self.echo and not choice.has_begun else ""
        if self.logprobs is not None:
            for token in output.tokens:
                self._add_logprobs(choice, token, len(choice.text) + len(text))
        text += decode_output(choice.decoder, self.form.stop_ids, output)
        choice.text += text
        choice.has_begun = True
        choice.finish_reason = output.finish_reason
        if output.finish_reason is not None:
            self.record.finish_reasons.append(output.finish_reason)
        entries = {} if before is None else {name: values[before[name] :] for name, values in choice.logprobs.items()}
        if text or entries.get("tokens") or choice.finish_reason:
            yield self.build_chunk(self._build_choice(i, text, entries))

    def list_choices(self) -> list[Json]:
        return [self._build_choice(i, choice.text, choice.logprobs) for i, choice in enumerate(self.choices)]

    def _build_choice(self, i: int, text: str, logprobs: Json) -> Json:
        shown_logprobs = None if self.logprobs is None else logprobs
        return {"index": i, "text": text, "logprobs": shown_logprobs, "finish_reason": self.choices[i].finish_reason}

    def _echo_prompt(self, choice: TextChoice, prompt_logprobs: Sequence[Token | None] | None) -> str:
        """Return the text of an answer's prompt, and add the prompt's tokens to the answer's logprobs."""
        ids = choice.prompt.ids
        decoder = TextDecoder(self.form.tokenizer)
        text = ""
        for id, token in zip(ids, prompt_logprobs or [None] * len(ids), strict=True):
            if self.logprobs is not None:
                self._add_logprobs(choice, token or Token(id, float("nan")), len(text), has_logprob=token is not None)
            text += decoder.add_token(id)
        return choice.prompt.text if choice.prompt.text is not None else text + decoder.finish()

    def _add_logprobs(self, choice: TextChoice, token: Token, offset: int, has_logprob: bool = True) -> None:
        """Append a token with its logprob and alternatives to an answer's logprobs in place.

        Its alternatives are keyed by their text; of two with one text the likelier is kept.

        Args:
            offset: characters of the answer before the token.
        """
        texts = self.form.texts
        columns = choice.logprobs
        columns["tokens"].append(texts.text(token.id))
        columns["text_offset"].append(offset)
        columns["token_logprobs"].append(logprob_to_json(token.logprob) if has_logprob else None)
        ascending = sorted([*token.top, (token.id, token.logprob)], key=lambda each: each[1])
        logprob_by_text = {texts.text(id): logprob_to_json(logprob) for id, logprob in ascending}
        columns["top_logprobs"].append(logprob_by_text if has_logprob else None)


class RewardAnswers(Answers):
    """The reward model's scores for one request of `/v1/rewards`, which are not streamed."""

    prefix = "reward"
    kind = chunk_kind = "list"

    def __init__(self, record: RequestRecord, conversation_count: int) -> None:
        super().__init__(record)
        self.scores: list[float | None] = [None] * conversation_count

    def add_output(self, i: int, output: Output) -> Iterator[Json]:
        if output.finish_reason is not None:
            self.scores[i] = output.score
            self.record.finish_reasons.append(output.finish_reason)
        yield from ()

    def to_response(self) -> Json:
        tokens = self.record.prompt_tokens
        return {
            "id": self.head["id"],
            "object": self.kind,
            "model": self.record.answered,
            "data": [{"object": "reward", "index": i, "reward": score} for i, score in enumerate(self.scores)],
            "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
        }


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
