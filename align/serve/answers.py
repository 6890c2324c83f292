"""Requests for answers while they are under way: from their admission to the outputs of the engine, and these in the
form of OpenAI's two APIs, whole or as server-sent events.

The text of an answer is parted into reasoning, text and calls of tools. Reasoning is what stands between `<think>` and
`</think>` at the beginning, as `align.data.chat.reasoning` parts it. A call of a tool is JSON with `name` and
`arguments` (or `parameters`), between `<tool_call>` and `</tool_call>` (Hermes, Qwen) or as the whole answer (Llama 3).
JSON that calls none of the tools offered is text.
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

from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from align.core.errors import InputError, NonFiniteLogits
from align.data.chat.reasoning import CLOSE, OPEN
from align.rollout.detokenize import StopFinder, TextDecoder, TokenTexts, beginning_at_end
from align.rollout.serving_engine import Completion, Output, QueueFull, Request, Token
from align.serve.answer_constraints import GrammarFor, grammars_for
from align.serve.errors import SERVER, Refusal, as_refusal, draining, fault, invalid
from align.serve.grammars import GrammarFailed
from align.serve.model_names import Chosen
from align.serve.prompts import (
    CALL,
    CALLED,
    ChatBody,
    ChatFormat,
    CompletionBody,
    Prompt,
    choose_sampling,
    derive_seed,
    prompts_of,
)
from align.serve.rate_limits import Charge
from align.serve.request_log import Record
from align.serve.tenants import Tenant

if TYPE_CHECKING:
    from align.serve.app import Service

log = logging.getLogger(__name__)
T = TypeVar("T")
BUSY_S = 1
"""Seconds after which clients may try again that a full queue refuses."""
CLOSED = 499
"""The status in the log of a request whose client has gone (nginx's)."""
DONE = b"data: [DONE]\n\n"
SAFE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")
"""Characters of an arm's label that stand in a header as they are; others are percent-encoded."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """Attributes:
    arguments: JSON.
    """

    name: str
    arguments: str
    id: str

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class Part(NamedTuple):
    """A piece of an answer: text of one kind, or a call."""

    kind: Literal["reasoning", "content", "call"]
    text: str = ""
    call: ToolCall | None = None


class PartedAnswer:
    """Parts the text of an answer as it comes.

    Args:
        opened: the prompt ends with `<think>`.
        tools: names of the tools that were offered.
        most_calls: further ones are left out.

    Attributes:
        calls: how many calls were found.
    """

    def __init__(self, opened: bool = False, tools: Collection[str] = (), most_calls: int | None = None) -> None:
        self.tools = tools
        self.most_calls = most_calls
        self.calls = 0
        self._state = "opened" if opened else "start"
        self._text = ""

    def take(self, text: str, last: bool = False) -> list[Part]:
        """Return the parts that are sure with this text.

        Args:
            last: nothing follows.
        """
        if self._state == "content" and not self.tools:  # nothing more can come of it
            return [Part("content", text)] if text else []
        self._text += text
        parts = list[Part]()
        while (more := self._step(last)) is not None:
            parts += more
        return join_parts(parts)

    def _step(self, last: bool) -> list[Part] | None:
        """Read on, from one state to the next. Returns the parts in between; None if that needs more text."""
        text = self._text
        begun = text.lstrip()
        match self._state:
            case "start":  # reasoning may open
                if begun.startswith(OPEN):
                    return self._go_on("opened", begun.removeprefix(OPEN))
                return self._go_on("behind", text) if last or not OPEN.startswith(begun) else None
            case "opened" | "closed":  # blanks beside the reasoning are left out
                self._text = begun
                return self._go_on("reasoning" if self._state == "opened" else "behind", begun) if begun else None
            case "reasoning":
                thought, closed, behind = text.partition(CLOSE)
                if closed:
                    return self._go_on("closed", behind, [Part("reasoning", thought.rstrip())])
                sure = len(thought.rstrip()) if last else sure_length(thought, CLOSE)
                return self._go_on("reasoning", thought[sure:], [Part("reasoning", thought[:sure])]) if sure else None
            case "behind":  # the answer begins, which may be a call and nothing else
                if not begun and not last:
                    return None
                return self._go_on("json" if self.tools and begun[:1] in ("{", "[") else "content", text)
            case "json":
                return self._go_on("content", "", self._call_parts(text) or [Part("content", text)]) if last else None
            case "call":
                inside, closed, behind = text.partition(CALLED)
                if not closed and not last:
                    return None
                if parts := self._call_parts(inside):
                    return self._go_on("content", behind.lstrip(), parts)
                return self._go_on("content", behind, [Part("content", f"{CALL}{inside}{closed}")])
            case _:
                said, called, behind = text.partition(CALL) if self.tools else (text, "", "")
                if called:
                    return self._go_on("call", behind, [Part("content", said.rstrip())])
                sure = len(said) if last or not self.tools else sure_length(said, CALL)
                return self._go_on("content", said[sure:], [Part("content", said[:sure])]) if sure else None

    def _go_on(self, state: str, text: str, parts: Sequence[Part] = ()) -> list[Part]:
        self._state = state
        self._text = text
        return [*parts]

    def _call_parts(self, text: str) -> list[Part]:
        """Return the calls that a text is, without those beyond the most; an empty part if all are; nothing if it is no
        call."""
        calls = calls_in(text, self.tools)
        left = len(calls) if self.most_calls is None else max(0, self.most_calls - self.calls)
        self.calls += len(calls[:left])
        return [Part("call", call=call) for call in calls[:left]] or ([Part("content")] if calls else [])


def sure_length(text: str, mark: str) -> int:
    """Return how many characters of a text are sure: all before what may be the beginning of a mark, and before blanks
    in front of that."""
    kept = max(beginning_at_end(text, mark), len(text) - len(text.rstrip()))
    return len(text[: len(text) - kept].rstrip()) if kept else len(text)


def join_parts(parts: list[Part]) -> list[Part]:
    """Join texts of one kind in a row, and leave out empty ones."""
    merged: list[Part] = []
    for part in parts:
        if part.call is None and merged and merged[-1].kind == part.kind:
            merged[-1] = Part(part.kind, merged[-1].text + part.text)
        elif part.text or part.call:
            merged.append(part)
    return merged


def calls_in(text: str, tools: Collection[str]) -> list[ToolCall]:
    """Return the calls that a text is; none if it is anything else, or calls what was not offered."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = [call_of(one, tools) for one in (value if isinstance(value, list) else [value])]
    return [] if None in calls else [call for call in calls if call]


def call_of(value: Any, tools: Collection[str]) -> ToolCall | None:
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping) or value.get("name") not in tools:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    arguments_text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(value["name"], arguments_text, f"call_{secrets.token_hex(12)}")


Json = dict[str, Any]


class Answers:
    """The answers to one request while they are made, in the envelope of one of OpenAI's APIs. It is made once the
    record says what answers.

    Args:
        streams_usage: streams end with a chunk that holds the usage.

    Attributes:
        prefix: of the response's id.
        kind, chunk_kind: the `object` of a whole response, and of a chunk.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, record: Record, streams_usage: bool = False) -> None:
        self.record = record
        self.streams_usage = streams_usage
        self.head = {
            "id": record.id.replace("req", self.prefix, 1),
            "object": self.chunk_kind,
            "created": int(time.time()),
            "model": record.answered,
            "system_fingerprint": fingerprint(record),
        }

    def first(self) -> Iterator[Json]:
        """Yield the chunks that come before any token."""
        yield from ()

    def take(self, i: int, output: Output) -> Iterator[Json]:
        """Yield the chunks of what the engine says of answer `i`. They have to be taken for `whole` to know of them."""
        raise NotImplementedError

    def list_choices(self) -> list[Json]:
        """Return all answers, once they have ended."""
        raise NotImplementedError

    def whole(self) -> Json:
        """Return the response with all answers, once they have ended."""
        return {**self.head, "object": self.kind, "choices": self.list_choices(), "usage": usage(self.record)}

    def chunk(self, choice: Json) -> Json:
        chunk = {**self.head, "choices": [choice]}
        return chunk | {"usage": None} if self.streams_usage else chunk

    def usage_chunk(self) -> Json:
        return {**self.head, "choices": [], "usage": usage(self.record)}


def fingerprint(record: Record) -> str:
    """OpenAI's name for what an answer was made by: the base, and the adapter on it."""
    return "fp_" + record.base[:12] + (f"_{record.adapter[:12]}" if record.adapter else "")


def usage(record: Record) -> Json:
    return {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "total_tokens": record.prompt_tokens + record.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
    }


@dataclass
class ChatChoice:
    """Attributes:
    calls: that were made so far.
    """

    decoder: TextDecoder
    parted: PartedAnswer
    said: dict[str, str] = field(default_factory=lambda: {"content": "", "reasoning": ""})
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)
    finish_reason: str | None = None

    def message(self) -> Json:
        message: Json = {"role": "assistant", "content": self.said["content"], "refusal": None}
        if self.said["reasoning"]:
            message["reasoning_content"] = self.said["reasoning"]
        if self.calls:
            message["tool_calls"] = [call.as_dict() for call in self.calls]
            message["content"] = message["content"] or None
        return message

    def delta(self, part: Part) -> Json:
        """Return a part as a stream has it, and keep it for `message`."""
        if part.call is not None:
            self.calls.append(part.call)
            return {"tool_calls": [{"index": len(self.calls) - 1, **part.call.as_dict()}]}
        self.said[part.kind] += part.text
        return {"reasoning_content" if part.kind == "reasoning" else "content": part.text}


class ChatAnswers(Answers):
    """The answers to a chat."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, form: ChatFormat, prompts: Sequence[Prompt], record: Record, body: ChatBody) -> None:
        super().__init__(record, body.stream_options.include_usage)
        self.form = form
        self.logprobs = body.logprobs
        tools = [tool.function.name for tool in body.tools] if body.tool_choice != "none" else []
        most_calls = None if body.parallel_tool_calls else 1
        self.choices = [
            ChatChoice(TextDecoder(form.tokenizer, body.stops), PartedAnswer(prompt.opens_reasoning, tools, most_calls))
            for prompt in prompts
            for _ in range(body.n)
        ]

    def first(self) -> Iterator[Json]:
        for i in range(len(self.choices)):
            yield self._chunk(i, {"role": "assistant", "content": ""})

    def take(self, i: int, output: Output) -> Iterator[Json]:
        choice = self.choices[i]
        text = text_of(choice.decoder, self.form.stop_ids, output)
        entries = [chat_logprob(self.form.texts, token) for token in output.tokens] if self.logprobs else []
        choice.logprobs += entries
        deltas = [choice.delta(part) for part in choice.parted.take(text, last=output.finish_reason is not None)]
        for n, delta in enumerate(deltas or ([{"content": ""}] if entries else [])):
            yield self._chunk(i, delta, entries if n == 0 else [])
        if output.finish_reason is not None:
            called = choice.calls and output.finish_reason == "stop"
            choice.finish_reason = "tool_calls" if called else output.finish_reason
            self.record.finish_reasons.append(choice.finish_reason)
            yield self._chunk(i, {}, [], choice.finish_reason)

    def list_choices(self) -> list[Json]:
        return [
            {
                "index": i,
                "message": choice.message(),
                "finish_reason": choice.finish_reason,
                "logprobs": {"content": choice.logprobs, "refusal": None} if self.logprobs else None,
            }
            for i, choice in enumerate(self.choices)
        ]

    def _chunk(self, i: int, delta: Json, logprobs: Sequence[Json] = (), finish_reason: str | None = None) -> Json:
        content = {"content": list(logprobs), "refusal": None} if logprobs else None
        return self.chunk({"index": i, "delta": delta, "logprobs": content, "finish_reason": finish_reason})


def finite(logprob: float) -> float:
    """Return a logprob as JSON has it: OpenAI writes -9999 if it is too low to say."""
    return logprob if math.isfinite(logprob) else -9999.0


def text_of(decoder: TextDecoder, stop_ids: Sequence[int], output: Output) -> str:
    """The text that is sure with an output; the token that ended the answer has none."""
    ids = [token.id for token in output.tokens]
    if output.finish_reason == "stop" and ids and ids[-1] in stop_ids:
        ids.pop()
    text = "".join(map(decoder.take, ids))
    return text + decoder.rest() if output.finish_reason is not None else text


def chat_logprob(texts: TokenTexts, token: Token) -> Json:
    def told(id: int, logprob: float) -> Json:
        return {"token": texts.text(id), "logprob": finite(logprob), "bytes": list(texts.bytes_of(id))}

    return told(token.id, token.logprob) | {"top_logprobs": [told(*each) for each in token.top]}


@dataclass
class TextChoice:
    """Attributes:
    has_begun: something was taken already.
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
    """The answers to texts or tokens."""

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(self, form: ChatFormat, prompts: Sequence[Prompt], record: Record, body: CompletionBody) -> None:
        super().__init__(record, body.stream_options.include_usage)
        self.form = form
        self.echo = body.echo
        self.logprobs = body.logprobs
        self.choices = [
            TextChoice(TextDecoder(form.tokenizer, body.stops, before=prompt.ids), prompt)
            for prompt in prompts
            for _ in range(body.n)
        ]

    def take(self, i: int, output: Output) -> Iterator[Json]:
        choice = self.choices[i]
        before = None if self.logprobs is None else {name: len(entries) for name, entries in choice.logprobs.items()}
        text = self._echoed(choice, output.prompt_logprobs) if self.echo and not choice.has_begun else ""
        if self.logprobs is not None:
            for token in output.tokens:
                self._tell(choice, token, len(choice.text) + len(text))
        text += text_of(choice.decoder, self.form.stop_ids, output)
        choice.text += text
        choice.has_begun = True
        choice.finish_reason = output.finish_reason
        if output.finish_reason is not None:
            self.record.finish_reasons.append(output.finish_reason)
        entries = {} if before is None else {name: values[before[name] :] for name, values in choice.logprobs.items()}
        if text or entries.get("tokens") or choice.finish_reason:
            yield self.chunk(self._choice(i, text, entries))

    def list_choices(self) -> list[Json]:
        return [self._choice(i, choice.text, choice.logprobs) for i, choice in enumerate(self.choices)]

    def _choice(self, i: int, text: str, logprobs: Json) -> Json:
        shown_logprobs = None if self.logprobs is None else logprobs
        return {"index": i, "text": text, "logprobs": shown_logprobs, "finish_reason": self.choices[i].finish_reason}

    def _echoed(self, choice: TextChoice, prompt_logprobs: Sequence[Token | None] | None) -> str:
        """The prompt as text, and its tokens in the logprobs."""
        ids = choice.prompt.ids
        decoder = TextDecoder(self.form.tokenizer)
        text = ""
        for id, token in zip(ids, prompt_logprobs or [None] * len(ids), strict=True):
            if self.logprobs is not None:
                self._tell(choice, token or Token(id, float("nan")), len(text), known=token is not None)
            text += decoder.take(id)
        return choice.prompt.text if choice.prompt.text is not None else text + decoder.rest()

    def _tell(self, choice: TextChoice, token: Token, offset: int, known: bool = True) -> None:
        """Adds a token. The alternatives are by their text; of two with one text the likelier is kept."""
        texts = self.form.texts
        columns = choice.logprobs
        columns["tokens"].append(texts.text(token.id))
        columns["text_offset"].append(offset)
        columns["token_logprobs"].append(finite(token.logprob) if known else None)
        rising = sorted([*token.top, (token.id, token.logprob)], key=lambda each: each[1])
        best = {texts.text(id): finite(logprob) for id, logprob in rising}
        columns["top_logprobs"].append(best if known else None)


class Rewards(Answers):
    """Scores of conversations by a reward model. They come whole."""

    prefix = "reward"
    kind = chunk_kind = "list"

    def __init__(self, record: Record, number: int) -> None:
        super().__init__(record)
        self.scores: list[float | None] = [None] * number

    def take(self, i: int, output: Output) -> Iterator[Json]:
        if output.finish_reason is not None:
            self.scores[i] = output.score
            self.record.finish_reasons.append(output.finish_reason)
        yield from ()

    def whole(self) -> Json:
        tokens = self.record.prompt_tokens
        return {
            "id": self.head["id"],
            "object": self.kind,
            "model": self.record.answered,
            "data": [{"object": "reward", "index": i, "reward": score} for i, score in enumerate(self.scores)],
            "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
        }


class Call:
    """A request while its answers are made.

    Args:
        http: its scope has the tenant, and the record of what comes of it.
    """

    def __init__(self, service: Service, http: Http) -> None:
        self.service = service
        self.record: Record = http.scope["record"]
        self.tenant: Tenant = http.scope["tenant"]
        self.receive = http.receive
        self.inbox = asyncio.Queue[tuple[int, Output] | Refusal]()
        self.heard_tokens = 0
        self._completions: list[Completion] = []
        self._unfinished = 0
        self._charge: Charge | None = None
        self._stack = ExitStack()
        self._last_s = 0.0
        self._between = None
        self._failed = False

    @contextmanager
    def admit(
        self, model: str, user: str | None, answers: int, least: int, scores: bool = False
    ) -> Iterator[tuple[Chosen, Charge]]:
        """Choose the weights that answer, and let the request in by the limits of its tenant, before its prompt is
        tokenised. What goes wrong in the block ends the call.

        Args:
            answers: that are asked for.
            least: tokens that they will have at the least, with their prompts.
            scores: a reward model is asked.

        Raises:
            Refusal: there are no such weights for the tenant, or they give scores where answers are wanted, or the
                other way; the server is ending; or the tenant has used up its share.
        """
        service = self.service
        with service.choose(self.record, self.tenant, model, user) as chosen:
            is_reward_model = chosen.version is not None and chosen.version.scores
            if is_reward_model and not scores:
                raise invalid("model", f"'{chosen.name}' is a reward model: ask it by /v1/rewards.")
            if scores and not is_reward_model:
                raise invalid("model", f"'{chosen.name}' is no reward model.")
            if service.draining:
                raise draining()
            with refuse_by_engine():
                service.engine.engine.check_queue(self.tenant.name)
            service.answering.add(self)
            self._stack.callback(service.answering.discard, self)
            try:
                charge = service.limiter.enter(self.tenant, answers, least, self.record.id)
                self._charge = self._stack.enter_context(charge)
                yield chosen, self._charge
            except BaseException:
                self.close()
                raise

    async def read(self, work: Callable[[], T]) -> T:
        """Do what takes time of a request, in another thread, when it is its tenant's turn. It is done at one go: each
        way to another thread and back waits for the engine's."""
        async with self.service.readers.turn(self.tenant.name):
            return await run_in_threadpool(work)

    def begin(self, requests: Sequence[Request], prompt_tokens: int, is_stream: bool) -> None:
        """Have the answers made. The request was let in.

        Args:
            prompt_tokens: that are counted; answers to one prompt share them.

        Raises:
            Refusal: the server is ending, the tenant has used up its share, or the engine does not take it.
        """
        assert self._charge is not None
        self.record.stream = is_stream
        if self.service.draining:
            raise draining()
        self.record.prompt_tokens = prompt_tokens
        if len(requests) == 1:
            self._between = self.service.metrics.between_tokens(self.record.answered)
        self._charge.reserve(prompt_tokens + sum(request.sampling.max_tokens for request in requests))
        with refuse_by_engine():
            for i, request in enumerate(requests):
                self._completions.append(self.service.engine.add(request, partial(self.service.post, self, i)))
        self._unfinished = len(requests)

    def _used(self) -> tuple[int, int]:
        """Return the tokens of the prompts that the engine has begun to read, and of the answers. Prompts that only
        waited, or failed before anything came of them, count nothing."""
        record = self.record
        if self._failed and not (record.completion_tokens or record.finish_reasons):
            return 0, 0
        return self.begun_tokens(), record.completion_tokens

    def begun_tokens(self) -> int:
        """Return the tokens of the prompts that the engine has begun to read, each once."""
        prompts = {
            id(ids): len(ids) for each in self._completions if each.has_begun for ids in [each.request.prompt_ids]
        }
        return sum(prompts.values())

    async def outputs(self) -> AsyncIterator[list[tuple[int, Output]]]:
        """Yield what the engine says of the answers, until all have ended: at a time all that it has said since.

        Raises:
            Refusal: one failed, or the call was ended.
        """
        while self._unfinished:
            heard = [await self.inbox.get()]
            while not self.inbox.empty():
                heard.append(self.inbox.get_nowait())
            outputs = []
            for each in heard:
                if isinstance(each, Refusal):
                    raise each
                self._record_output(each[1])
                outputs.append(each)
            yield outputs

    def _record_output(self, output: Output) -> None:
        record = self.record
        if output.finish_reason == "abort":
            raise draining()
        if output.error is not None:
            self._failed = True
            digest = (record.adapter or record.base)[:12]
            log.error("%s failed on %s (%s): %s", record.id, record.answered, digest, output.error)
            raise refusal_of(output.error, record.answered)
        record.completion_tokens += len(output.tokens)
        record.cached_tokens = max(record.cached_tokens, output.cached_tokens)
        if output.tokens:
            now = record.elapsed()
            if record.first_token_s is None:
                record.first_token_s = now
            elif self._between is not None:
                self._between.observe(now - self._last_s)
            self._last_s = now
        if output.finish_reason is not None:
            self._unfinished -= 1

    def end(self, why: Refusal) -> None:
        """End it before its time, from the event loop."""
        self.inbox.put_nowait(why)
        self.abort()

    def abort(self) -> None:
        for completion in self._completions:
            if completion.finished is None:
                self.service.engine.abort(completion)

    def close(self) -> None:
        """End what still goes on, and account for it. May be called again.

        Raises:
            Refusal: what was used could not be counted; nothing is answered then.
        """
        self.abort()
        if self._charge is not None:
            self._charge.used = self._used()
            self.record.prompt_tokens = self._charge.used[0]
        self._stack.close()


def refusal_of(error: BaseException, model: str) -> Refusal:
    """Return the refusal of a request whose answer the engine could not go on with."""
    if isinstance(error, NonFiniteLogits):  # another try comes to the same: no status at which clients try again
        message = (
            f"The model '{model}' came to values that are nan or infinite on this prompt: its weights are too large "
            "for the precision that it is served in. Ask another model, and tell whoever runs the server."
        )
        return Refusal(422, message, param="model", code="model_not_finite")
    if isinstance(error, GrammarFailed):
        message = (
            "A step of this answer by its schema, pattern or tools costs more than a step may. Simplify it: fewer "
            "alternatives, and no repeats of repeats."
        )
        return invalid(None, message, "invalid_grammar")
    return fault()


@contextmanager
def refuse_by_engine() -> Iterator[None]:
    """Raise what the engine does not take as a refusal."""
    try:
        yield
    except QueueFull as error:
        message = "The server is busy: as many requests wait as may. Try again in a moment."
        kind = "rate_limit_error"
        raise Refusal(429, message, type=kind, code="queue_full", retry_after_s=BUSY_S) from error
    except InputError as error:
        raise as_refusal(error) from error


async def complete(call: Call, body: ChatBody | CompletionBody, logprobs_field: str) -> Response:
    """Answer a chat, texts or tokens.

    Args:
        logprobs_field: the parameter that asks for logprobs.

    Raises:
        Refusal
    """
    service = call.service
    number = body.prompt_count * body.n
    most = body.most_tokens
    least = body.prompt_count + number * (1 if most is None else most)
    with call.admit(body.model, body.user, number, least) as (chosen, charge):

        def read_body() -> tuple[ChatFormat, list[Prompt], GrammarFor | None]:
            form = service.format_of(chosen.version)
            prompts = prompts_of(form, body, service.vocabulary)
            return form, prompts, grammars_for(form, body, service.vocabulary) if body.constrains else None

        form, prompts, grammar_for = await call.read(read_body)
        prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        left = charge.room(prompt_tokens, body.n) if most is None else None
        if most is None and body.alternatives is not None:
            fits = max(1, service.max_logprobs // (body.n * (body.alternatives + 1)))
            left = min(fits, left or fits)
        samplings = [choose_sampling(form, body, prompt, service.context, left) for prompt in prompts]
        tokens = body.n * sum(sampling.max_tokens for sampling in samplings)
        if isinstance(body, CompletionBody) and body.echo:
            tokens += body.n * prompt_tokens
        refuse_many_logprobs(service, logprobs_field, body.alternatives, tokens)
        requests = [
            Request(
                prompt.ids,
                replace(sampling, seed=derive_seed(sampling.seed, i)),
                chosen.version.digest if chosen.version else None,
                call.tenant.name,
                grammar=None if grammar_for is None else grammar_for(prompt, sampling.max_tokens),
                ends=find_stops(form, body, prompt) if body.stops else None,
            )
            for prompt, sampling in zip(prompts, samplings, strict=True)
            for i in range(body.n)
        ]
        answers: Answers
        if isinstance(body, ChatBody):
            answers = ChatAnswers(form, prompts, call.record, body)
        else:
            answers = TextAnswers(form, prompts, call.record, body)
        call.begin(requests, prompt_tokens, body.stream)
        if body.stream:
            return EventStream(call, answers, headers_of(call))
        return await respond_whole(call, answers, headers_of(call))


def find_stops(form: ChatFormat, body: ChatBody | CompletionBody, prompt: Prompt) -> StopFinder:
    """Return what ends an answer at the first of its stop strings. A completion goes on with the prompt's text."""
    before = () if isinstance(body, ChatBody) else prompt.ids
    return StopFinder(TextDecoder(form.tokenizer, body.stops, before))


def refuse_many_logprobs(service: Service, param: str, alternatives: int | None, tokens: int) -> None:
    """Refuse an answer that would have too many logprobs, before anything of it is computed.

    Args:
        alternatives: likeliest tokens that are asked for at each place; None for no logprobs.
        tokens: that all answers may have, and those of the prompts that are echoed, once for each answer.
    """
    most = service.max_logprobs
    if alternatives is not None and tokens * (alternatives + 1) > most:
        message = (
            f"{tokens} tokens with {alternatives} logprobs and their own make {tokens * (alternatives + 1):,} logprobs,"
            f" and an answer may have {most:,} (stage.max_logprobs). Ask for fewer tokens, prompts or logprobs."
        )
        raise invalid(param, message, "too_many_logprobs")


def headers_of(call: Call) -> dict[str, str]:
    record = call.record
    arm = percent_encode(record.arm)
    headers = {"x-align-base": record.base, "x-align-adapter": record.adapter, "x-align-arm": arm}
    return {name: value for name, value in headers.items() if value}


def percent_encode(label: str) -> str:
    return quote(label, safe=SAFE)


@asynccontextmanager
async def end_on_disconnect(call: Call) -> AsyncIterator[None]:
    """End the call, and free its slot, if the client goes while the block lasts."""

    async def watch() -> None:
        while (await call.receive())["type"] != "http.disconnect":
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


async def respond_whole(call: Call, answers: Answers, headers: Mapping[str, str]) -> Response:
    """Return all answers at once.

    Raises:
        Refusal: one of them failed, or the client has gone.
    """
    async with end_on_disconnect(call):
        async for heard in call.outputs():
            for i, output in heard:
                for _ in answers.take(i, output):
                    pass
    return JSONResponse(answers.whole(), headers=dict(headers))


class EventStream(Response):
    """Answers in chunks, while they are made. An error on the way is an event of its own, and the last.

    As a response it only adds itself to the scope's `streams`. `align.serve.app.ServerMiddleware` sends it when
    routing is done: otherwise each piece would pass through twenty layers.
    """

    media_type = "text/event-stream"

    def __init__(self, call: Call, answers: Answers, headers: Mapping[str, str]) -> None:
        super().__init__(headers=dict(headers))
        del self.headers["content-length"]
        self.call = call
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["streams"].append(self)

    async def answer(self, send: Send) -> None:
        record = self.call.record
        try:
            async with end_on_disconnect(self.call):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    async for part in self._events():
                        await send({"type": "http.response.body", "body": part, "more_body": True})
                except Exception as error:
                    if not isinstance(error, Refusal):
                        log.exception("%s failed", record.id)
                        error = fault()
                    record.status = error.status
                    await send({"type": "http.response.body", "body": encode_event(error.body), "more_body": True})
        except Refusal as refusal:  # what was used could not be counted: the head has gone, and the log says why
            log.error("%s: %s", record.id, refusal.message)
            record.status = refusal.status
        await send({"type": "http.response.body", "body": b""})

    async def _events(self) -> AsyncIterator[bytes]:
        if first := b"".join(map(encode_event, self.answers.first())):
            yield first
        async for heard in self.call.outputs():
            if chunks := b"".join(encode_event(chunk) for i, output in heard for chunk in self.answers.take(i, output)):
                yield chunks
        self.call.close()  # what was used is settled before the client hears that it has all of it
        yield (encode_event(self.answers.usage_chunk()) if self.answers.streams_usage else b"") + DONE


def encode_event(data: Any) -> bytes:
    return b"data: " + to_json(data) + b"\n\n"
