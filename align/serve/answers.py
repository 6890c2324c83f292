"""The answers to one request, parted into reasoning, text and calls of tools, and shaped as OpenAI's two APIs have
them: whole, or in chunks while they are made.

Reasoning is what stands between `<think>` and `</think>` at the beginning, as `align.data.chat.reasoning` parts it. A
call of a tool is JSON with `name` and `arguments` (or `parameters`), between `<tool_call>` and `</tool_call>` (Hermes,
Qwen) or as the whole answer (Llama 3). JSON that calls none of the tools offered is text.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from align.data.chat.reasoning import CLOSE, OPEN
from align.rollout.detokenize import TextDecoder, TokenTexts, beginning_at_end
from align.rollout.requests import Output, Token
from align.serve.prompts import ChatFormat, Prompt, finite
from align.serve.request_log import Record

CALL, CALLED = "<tool_call>", "</tool_call>"


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
        self.tools, self.most_calls, self.calls = tools, most_calls, 0
        self._state: Literal["start", "opened", "reasoning", "between", "behind", "content", "call", "json"]
        self._state, self._text = "opened" if opened else "start", ""

    def take(self, text: str, last: bool = False) -> list[Part]:
        """The parts that are sure with this text.

        Args:
            last: nothing follows.
        """
        if self._state == "content" and not self.tools:  # nothing more can come of it
            return [Part("content", text)] if text else []
        self._text += text
        parts, before = [], None
        while before != (self._state, self._text):
            before = self._state, self._text
            parts += getattr(self, f"_{self._state}")(last)
        return joined(parts)

    def _start(self, last: bool) -> Iterator[Part]:
        """Before anything is known."""
        begun = self._text.lstrip()
        if begun.startswith(OPEN):
            self._state, self._text = "opened", begun.removeprefix(OPEN)
        elif last or not OPEN.startswith(begun):
            self._state = "behind"
        yield from ()

    def _opened(self, last: bool) -> Iterator[Part]:
        """Before the first word of the reasoning: blanks are nobody's."""
        self._text = self._text.lstrip()
        if self._text:
            self._state = "reasoning"
        yield from ()

    def _reasoning(self, last: bool) -> Iterator[Part]:
        thought, closed, behind = self._text.partition(CLOSE)
        if closed:
            self._state, self._text = "between", behind
            yield Part("reasoning", thought.rstrip())
        elif last:
            self._text = ""
            yield Part("reasoning", thought.rstrip())
        else:
            # Blanks before the end belong to it.
            kept = max(beginning_at_end(thought, CLOSE), len(thought) - len(thought.rstrip()))
            bare = thought[: len(thought) - kept]
            sure = len(bare.rstrip()) if kept else len(bare)
            self._text = thought[sure:]
            yield Part("reasoning", thought[:sure])

    def _between(self, last: bool) -> Iterator[Part]:
        """Behind the reasoning: blanks are nobody's."""
        self._text = self._text.lstrip()
        if self._text:
            self._state = "behind"
        yield from ()

    def _behind(self, last: bool) -> Iterator[Part]:
        """At the beginning of what is said."""
        begun = self._text.lstrip()
        if not begun and not last:
            return
        self._state = "json" if self.tools and begun[:1] in ("{", "[") else "content"
        yield from ()

    def _content(self, last: bool) -> Iterator[Part]:
        said, called, behind = self._text.partition(CALL) if self.tools else (self._text, "", "")
        if called:
            self._state, self._text = "call", behind
            yield from self._said(said.rstrip())
            return
        # Blanks before a call are not said.
        kept = 0 if last or not self.tools else max(beginning_at_end(said, CALL), len(said) - len(said.rstrip()))
        sure = len(said) - kept if not kept else len(said[: len(said) - kept].rstrip())
        self._text = said[sure:]
        yield from self._said(said[:sure])

    def _call(self, last: bool) -> Iterator[Part]:
        inside, closed, behind = self._text.partition(CALLED)
        if closed or last:
            calls = calls_in(inside, self.tools)
            self._state, self._text = "content", behind.lstrip() if calls else behind
            yield from self._made(calls) if calls else self._said(f"{CALL}{inside}{closed}")

    def _json(self, last: bool) -> Iterator[Part]:
        """The answer may be a call and nothing else."""
        if last:
            calls, text = calls_in(self._text, self.tools), self._text
            self._state, self._text = "content", ""
            yield from self._made(calls) if calls else self._said(text)

    def _said(self, text: str) -> Iterator[Part]:
        if text:
            yield Part("content", text)

    def _made(self, calls: list[ToolCall]) -> Iterator[Part]:
        for call in calls:
            if self.most_calls is None or self.calls < self.most_calls:
                self.calls += 1
                yield Part("call", call=call)


def joined(parts: list[Part]) -> list[Part]:
    """Texts of one kind in a row as one; none that is empty."""
    made: list[Part] = []
    for part in parts:
        if part.call is None and made and made[-1].kind == part.kind:
            made[-1] = Part(part.kind, made[-1].text + part.text)
        elif part.text or part.call:
            made.append(part)
    return made


def calls_in(text: str, tools: Collection[str]) -> list[ToolCall]:
    """The calls that a text is; none where it is anything else, or calls what was not offered."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = [call_of(one, tools) for one in (found if isinstance(found, list) else [found])]
    return [] if None in calls else [call for call in calls if call]


def call_of(value: Any, tools: Collection[str]) -> ToolCall | None:
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping) or value.get("name") not in tools:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(value["name"], written, f"call_{secrets.token_hex(12)}")


Json = dict[str, Any]


class Answers(Protocol):
    """The answers to one request while they are made."""

    def first(self) -> Iterator[Json]:
        """The chunks that come before any token."""
        ...

    def take(self, i: int, output: Output) -> Iterator[Json]:
        """The chunks of what the engine says of answer `i`. They have to be taken for `whole` to know of them."""
        ...

    def whole(self) -> Json:
        """All answers, once they have ended."""
        ...

    def usage_chunk(self) -> Json: ...


@dataclass(slots=True)
class Envelope:
    """What stands around the choices. It is made when the record says what answers.

    Attributes:
        kind: `chat.completion` or `text_completion`; of the chunks, as they are called.
        usage: streams end with a chunk that says it.
    """

    record: Record
    prefix: str
    kind: str
    chunk_kind: str
    usage: bool
    head: Json = field(init=False)

    def __post_init__(self) -> None:
        record = self.record
        self.head = {
            "id": record.id.replace("req", self.prefix, 1), "object": self.chunk_kind, "created": int(time.time()),
            "model": record.answered, "system_fingerprint": fingerprint(record),
        }  # fmt: skip

    def around(self, choices: Sequence[Json], kind: str) -> Json:
        return {**self.head, "object": kind, "choices": choices}

    def chunk(self, choice: Json) -> Json:
        made = self.around([choice], self.chunk_kind)
        return made | {"usage": None} if self.usage else made

    def whole(self, choices: Sequence[Json]) -> Json:
        return self.around(choices, self.kind) | {"usage": usage(self.record)}

    def usage_chunk(self) -> Json:
        return self.around([], self.chunk_kind) | {"usage": usage(self.record)}


def fingerprint(record: Record) -> str:
    """OpenAI's name for what an answer was made by: the base, and the adapter on it."""
    return "fp_" + record.base[:12] + (f"_{record.adapter[:12]}" if record.adapter else "")


def usage(record: Record) -> Json:
    return {
        "prompt_tokens": record.prompt_tokens, "completion_tokens": record.completion_tokens,
        "total_tokens": record.prompt_tokens + record.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
    }  # fmt: skip


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
        made: Json = {"role": "assistant", "content": self.said["content"], "refusal": None}
        if self.said["reasoning"]:
            made["reasoning_content"] = self.said["reasoning"]
        if self.calls:
            made["tool_calls"] = [call.as_dict() for call in self.calls]
            made["content"] = made["content"] or None
        return made

    def delta(self, part: Part) -> Json:
        """A part as a stream says it, kept for `message`."""
        if part.call is not None:
            self.calls.append(part.call)
            return {"tool_calls": [{"index": len(self.calls) - 1, **part.call.as_dict()}]}
        self.said[part.kind] += part.text
        return {"reasoning_content" if part.kind == "reasoning" else "content": part.text}


class ChatAnswers:
    """See `Answers`.

    Args:
        tools: names of those that were offered.
        most_calls: of one answer.
        logprobs: whether they are told.
    """

    def __init__(
        self, form: ChatFormat, prompt: Prompt, record: Record, number: int, stops: Sequence[str],
        tools: Sequence[str], most_calls: int | None, logprobs: bool, usage: bool,
    ) -> None:  # fmt: skip
        self.form, self.logprobs = form, logprobs
        self.envelope = Envelope(record, "chatcmpl", "chat.completion", "chat.completion.chunk", usage)
        self.usage_chunk = self.envelope.usage_chunk
        self.choices = [
            ChatChoice(TextDecoder(form.tokenizer, stops), PartedAnswer(prompt.opens_reasoning, tools, most_calls))
            for _ in range(number)
        ]

    def first(self) -> Iterator[Json]:
        for i in range(len(self.choices)):
            yield self._chunk(i, {"role": "assistant", "content": ""})

    def take(self, i: int, output: Output) -> Iterator[Json]:
        choice = self.choices[i]
        text = text_of(choice.decoder, self.form.stop_ids, output)
        told = [chat_logprob(self.form.texts, token) for token in output.tokens] if self.logprobs else []
        choice.logprobs += told
        deltas = [choice.delta(part) for part in choice.parted.take(text, last=output.finish_reason is not None)]
        for n, delta in enumerate(deltas or ([{"content": ""}] if told else [])):
            yield self._chunk(i, delta, told if n == 0 else [])
        if output.finish_reason is not None:
            called = choice.calls and output.finish_reason == "stop"
            choice.finish_reason = "tool_calls" if called else output.finish_reason
            self.envelope.record.finish_reasons.append(choice.finish_reason)
            yield self._chunk(i, {}, [], choice.finish_reason)

    def whole(self) -> Json:
        return self.envelope.whole([
            {
                "index": i, "message": choice.message(), "finish_reason": choice.finish_reason,
                "logprobs": {"content": choice.logprobs, "refusal": None} if self.logprobs else None,
            }
            for i, choice in enumerate(self.choices)
        ])  # fmt: skip

    def _chunk(self, i: int, delta: Json, logprobs: Sequence[Json] = (), finish_reason: str | None = None) -> Json:
        told = {"content": list(logprobs), "refusal": None} if logprobs else None
        return self.envelope.chunk({"index": i, "delta": delta, "logprobs": told, "finish_reason": finish_reason})


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
    begun: something was taken already.
    """

    decoder: TextDecoder
    prompt: Prompt
    text: str = ""
    begun: bool = False
    logprobs: Json = field(
        default_factory=lambda: {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    )
    finish_reason: str | None = None


class TextAnswers:
    """See `Answers`.

    Args:
        number: of answers to each prompt.
        echo: the prompt stands in front of each.
        logprobs: how many alternatives are told; None for no logprobs.
    """

    def __init__(
        self, form: ChatFormat, prompts: Sequence[Prompt], record: Record, number: int, stops: Sequence[str],
        echo: bool, logprobs: int | None, usage: bool,
    ) -> None:  # fmt: skip
        self.form, self.echo, self.logprobs = form, echo, logprobs
        self.envelope = Envelope(record, "cmpl", "text_completion", "text_completion", usage)
        self.usage_chunk = self.envelope.usage_chunk
        self.choices = [
            TextChoice(TextDecoder(form.tokenizer, stops, before=prompt.ids), prompt)
            for prompt in prompts
            for _ in range(number)
        ]

    def first(self) -> Iterator[Json]:
        yield from ()

    def take(self, i: int, output: Output) -> Iterator[Json]:
        choice = self.choices[i]
        before = None if self.logprobs is None else {name: len(told) for name, told in choice.logprobs.items()}
        text = self._echoed(choice, output.prompt_logprobs) if self.echo and not choice.begun else ""
        if self.logprobs is not None:
            for token in output.tokens:
                self._tell(choice, token, len(choice.text) + len(text))
        text += text_of(choice.decoder, self.form.stop_ids, output)
        choice.text += text
        choice.begun = True
        choice.finish_reason = output.finish_reason
        if output.finish_reason is not None:
            self.envelope.record.finish_reasons.append(output.finish_reason)
        told = {} if before is None else {name: values[before[name] :] for name, values in choice.logprobs.items()}
        if text or told.get("tokens") or choice.finish_reason:
            yield self.envelope.chunk(self._choice(i, text, told))

    def whole(self) -> Json:
        return self.envelope.whole([self._choice(i, c.text, c.logprobs) for i, c in enumerate(self.choices)])

    def _choice(self, i: int, text: str, logprobs: Json) -> Json:
        told = None if self.logprobs is None else logprobs
        return {"index": i, "text": text, "logprobs": told, "finish_reason": self.choices[i].finish_reason}

    def _echoed(self, choice: TextChoice, prompt_logprobs: Sequence[Token | None] | None) -> str:
        """The prompt as text, and its tokens in the logprobs."""
        ids, decoder = choice.prompt.ids, TextDecoder(self.form.tokenizer)
        text = ""
        for id, token in zip(ids, prompt_logprobs or [None] * len(ids), strict=True):
            if self.logprobs is not None:
                self._tell(choice, token or Token(id, float("nan")), len(text), known=token is not None)
            text += decoder.take(id)
        return choice.prompt.text if choice.prompt.text is not None else text + decoder.rest()

    def _tell(self, choice: TextChoice, token: Token, offset: int, known: bool = True) -> None:
        """Adds a token. The alternatives are by their text; of two with one text the likelier is told."""
        texts, told = self.form.texts, choice.logprobs
        told["tokens"].append(texts.text(token.id))
        told["text_offset"].append(offset)
        told["token_logprobs"].append(finite(token.logprob) if known else None)
        rising = sorted([*token.top, (token.id, token.logprob)], key=lambda each: each[1])
        best = {texts.text(id): finite(logprob) for id, logprob in rising}
        told["top_logprobs"].append(best if known else None)
