"""The bodies of responses to chat, completion and reward requests: one JSON object, or the chunks of a stream."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from align.rollout.detokenize import TextDecoder, TokenTexts
from align.rollout.serving_engine import Output, Token
from align.serve.answer_parser import AnswerParser, AnswerPart, ToolCall
from align.serve.prompts import ChatBody, ChatFormat, CompletionBody, Prompt
from align.serve.request_log import RequestRecord

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
