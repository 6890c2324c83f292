"""Prompts of requests: a chat by the model's template, or texts and token ids; and the sampling of their answers."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from align.core.errors import InputError, half_character
from align.data.chat.encode import stop_token_ids
from align.data.chat.reasoning import OPEN, with_reasoning
from align.data.chat.tokens import beginning_ids, text_ids
from align.data.chat.tools import rendered, takes_tools, tool_prompt_ids
from align.rollout.detokenize import TokenTexts
from align.rollout.requests import SamplingParams
from align.run.weights import tokenizer_digest
from align.serve.errors import Refusal, invalid, unsupported
from align.serve.grammars import Grammars
from align.serve.model_names import Version
from align.serve.schemas import MOST_ANSWERS, ChatBody, ChatMessage, CompletionBody, Sampled

WRITTEN_CALL = re.compile(r'(<tool_call>\s*)?\{"name": ?"f", ?"(arguments|parameters)": ?\{\}\}(\s*</tool_call>)?')
"""A call of a tool f, as templates write it."""


@dataclass(frozen=True)
class ChatFormat:
    """Attributes:
    stop_ids: tokens that end an answer.
    """

    tokenizer: Any
    stop_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, generation_config: Any) -> ChatFormat:
        return cls(tokenizer, stop_token_ids(tokenizer, generation_config))

    @cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(self.tokenizer)

    @cached_property
    def takes_tools(self) -> bool:
        return takes_tools(self.tokenizer)

    @cached_property
    def begins_with(self) -> list[int]:
        """See `align.data.chat.tokens.beginning_ids`."""
        return beginning_ids(self.tokenizer)

    @cached_property
    def calls(self) -> tuple[str, str, str]:
        """How the template writes a call: what is before its JSON, the name of the arguments, what is behind it."""
        call = {"type": "function", "id": "call_1", "function": {"name": "f", "arguments": {}}}
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            found = WRITTEN_CALL.search(rendered(self.tokenizer, chat, ()))
        except InputError:
            found = None
        return (found[1] or "", found[2], found[3] or "") if found else ("", "arguments", "")

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.stop_ids)

    def opens_reasoning(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the header of the answer opens its reasoning."""
        return self.tokenizer.decode(prompt_ids[-8:]).rstrip().endswith(OPEN)


class Formats:
    """Tokenizers with their templates: one for all adapters that have equal ones, for as long as anybody holds a
    version of these adapters.

    Args:
        read: the format in a folder; None for the base's.
    """

    def __init__(self, read: Callable[[Path | None], ChatFormat]) -> None:
        self.read, self._base = read, read(None)
        self._known = WeakValueDictionary[str, ChatFormat]()
        self._of_version = WeakKeyDictionary[Version, ChatFormat]()

    def forget(self, version: Version) -> None:
        """Read the format of a version anew: its template may have been changed beside the same weights."""
        self._of_version.pop(version, None)

    def __call__(self, version: Version | None) -> ChatFormat:
        """Of the base where an adapter brings none."""
        if version is None:
            return self._base
        if (form := self._of_version.get(version)) is None:
            form = self._of_version[version] = self._in(version.folder)
        return form

    def _in(self, folder: Path) -> ChatFormat:
        if not (folder / "tokenizer_config.json").is_file():
            return self._base
        digest = tokenizer_digest(folder)
        if (form := self._known.get(digest)) is None:
            form = self._known[digest] = self.read(folder)
        return form


@dataclass(frozen=True, slots=True)
class Prompt:
    """Attributes:
    ids: at least one token.
    text: as it was given; None where tokens were.
    opens_reasoning: see `ChatFormat.opens_reasoning`.
    """

    ids: tuple[int, ...]
    text: str | None = None
    opens_reasoning: bool = False


def chat_prompt(form: ChatFormat, body: ChatBody) -> Prompt:
    """The chat as its template writes it.

    Raises:
        Refusal: a message or a tool is not taken by this model, or by this server.
    """
    if not form.tokenizer.chat_template:
        raise invalid("model", "This model has no chat template: use /v1/completions.")
    tools = tools_of(form, body)
    messages = [as_template_reads(message, i) for i, message in enumerate(body.messages)]
    try:
        ids = tool_prompt_ids(form.tokenizer, messages, tools)
    except InputError as error:
        raise invalid(error.field, f"{error.problem}. {error.remedy}") from error
    return Prompt(tuple(ids), opens_reasoning=form.opens_reasoning(ids))


def tools_of(form: ChatFormat, body: ChatBody) -> list[dict[str, Any]]:
    """The tools that are offered.

    Raises:
        Refusal: they cannot be, or a call is demanded and there are none.
    """
    if not body.tools and body.tool_choice not in ("none", "auto"):
        raise invalid("tool_choice", "tool_choice demands a call, and there are no tools.")
    if not body.tools or body.tool_choice == "none":
        return []
    if not form.takes_tools:
        raise unsupported("tools", "This model's chat template takes no tools.")
    return [tool.model_dump(exclude_none=True, exclude_unset=False) for tool in body.tools]


def as_template_reads(message: ChatMessage, i: int) -> dict[str, Any]:
    """A message as chat templates read it: its text whole, reasoning in front of it, arguments of calls as objects.

    Raises:
        Refusal: it holds what is no text, or nothing.
    """
    where = f"messages.{i}"
    for name in ("audio", "function_call", "images", "refusal"):
        if (message.model_extra or {}).get(name):
            raise unsupported(f"{where}.{name}", f"The field '{name}' of a message is not supported.")
    text = text_of(message.content, where)
    if text is None and not message.tool_calls:
        raise invalid(f"{where}.content", "A message needs content.")
    if message.role == "assistant" and message.reasoning_content:
        text = with_reasoning(text or "", message.reasoning_content)
    role = "system" if message.role == "developer" else message.role
    made: dict[str, Any] = {"role": role, "content": text or ""}
    if message.role == "assistant" and message.tool_calls:
        made["tool_calls"] = [
            {**({"id": call.id} if call.id else {}), "type": "function", "function": {
                "name": call.function.name, "arguments": arguments_of(call.function.arguments)}}
            for call in message.tool_calls
        ]  # fmt: skip
    if message.role == "tool":  # as `align.core.types.Message.as_dict`
        given = {"name": (message.model_extra or {}).get("name"), "tool_call_id": message.tool_call_id}
        made |= {name: value for name, value in given.items() if isinstance(value, str) and value}
    return made


def text_of(content: Any, where: str) -> str | None:
    """The text of a content, whose parts are lines."""
    if content is None or isinstance(content, str):
        return content
    texts = []
    for part in content:
        if part.get("type") not in ("text", "refusal"):
            message = f"Parts of type '{str(part.get('type'))[:40]}' are not supported: this is a model of text."
            raise unsupported(f"{where}.content", message)
        text = part.get(str(part["type"]))
        if not isinstance(text, str):
            raise invalid(f"{where}.content", "A part of type 'text' needs a text.")
        texts.append(text)
    return "\n".join(texts)


def arguments_of(written: str) -> Any:
    """The arguments of a call as an object, which templates write as JSON of their own; as text where they are none."""
    try:
        found = json.loads(written)
    except (ValueError, RecursionError):
        return written
    return found if isinstance(found, dict) else written


def completion_prompts(form: ChatFormat, body: CompletionBody, vocabulary: int) -> list[Prompt]:
    """The texts or tokens to go on with. A text is content: special tokens that it spells out are text.

    Args:
        vocabulary: rows of the base's embedding.

    Raises:
        Refusal: there is none, there are too many, or an id is no token.
    """
    prompts = body.prompts
    if len(prompts) * body.n > MOST_ANSWERS:
        raise invalid("prompt", f"At most {MOST_ANSWERS} answers may be asked for at once.")
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            if half := half_character(prompt):
                raise invalid("prompt", f"It has {half}, half a character.")
            found.append(Prompt((*form.begins_with, *text_ids(form.tokenizer, prompt)), prompt))
        else:
            if any(not 0 <= id < vocabulary for id in prompt):
                raise invalid("prompt", f"A token id is not between 0 and {vocabulary - 1}.")
            found.append(Prompt(tuple(prompt)))
    if not all(prompt.ids for prompt in found):
        raise invalid("prompt", "A prompt has no tokens.")
    return found


def samplings(
    form: ChatFormat, body: Sampled, prompt: Prompt, most: int | None, context: int,
    logprobs: int | None = None, prompt_logprobs: int | None = None, left: int | None = None,
) -> list[SamplingParams]:  # fmt: skip
    """How each of the `n` answers to a prompt is drawn.

    Args:
        most: tokens of an answer; None for as many as there is room for.
        left: where `most` is None, as many as the tenant has left; None for as many as it likes.

    Raises:
        Refusal: the prompt leaves no room for an answer.
    """
    room = context - len(prompt.ids)
    if room < (1 if most is None else most):
        message = f"The context is {context} tokens. The prompt has {len(prompt.ids)}"
        message += "." if most is None else f", and {most} are asked for."
        given = "messages" if isinstance(body, ChatBody) else "prompt"
        raise Refusal(400, message, param="max_tokens" if room > 0 else given, code="context_length_exceeded")
    seed = secrets.randbits(63) if body.seed is None else body.seed
    most = min(room, left or room) if most is None else most
    return [
        SamplingParams(
            max_tokens=most, temperature=body.temperature, top_p=body.top_p,
            seed=derived_seed(seed, i), stop_ids=() if body.ignore_eos else form.stop_ids, logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        for i in range(body.n)
    ]  # fmt: skip


def derived_seed(seed: int, i: int) -> int:
    """The seed of answer `i`: of the first the request's own, so that it is the answer that one alone would be."""
    if i == 0:
        return seed
    return int.from_bytes(sha256(f"{seed}:{i}".encode()).digest()[:8], "big", signed=True)


def finite(logprob: float) -> float:
    """A logprob as JSON has it: OpenAI writes -9999 where it is too low to say."""
    return logprob if math.isfinite(logprob) else -9999.0
