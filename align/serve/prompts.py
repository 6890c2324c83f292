"""Request bodies, and the prompts and sampling parameters that are built from them.

The bodies are those of OpenAI's chat completions and completions, and of vLLM's loading of adapters. A null means the
default, as in OpenAI's API. A field that is not declared here is looked up in `NOT_SUPPORTED`; any other field does not
change the answer, and is ignored.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from align.core.errors import InputError, find_lone_surrogate
from align.core.types import Conversation, Message
from align.data.chat.encode import encode_for_reward_model, find_stop_token_ids
from align.data.chat.reasoning import OPEN, prepend_reasoning, strip_all_reasoning, strip_reasoning
from align.data.chat.tokens import find_leading_token_ids, tokenize_text
from align.data.chat.tools import encode_tool_prompt, render_messages, supports_tools
from align.rollout.detokenize import TokenTexts
from align.rollout.serving_engine import SamplingParams
from align.run.weights import tokenizer_digest
from align.serve.errors import Refusal, invalid_request, not_supported
from align.serve.grammars import GrammarCache
from align.serve.model_names import Version

MOST_ANSWERS = 128
MOST_STOPS = 4
LONGEST_STOP = 256
MOST_LOGPROBS = 20
SEEDS = 2**63
FEW = Field(max_length=MOST_ANSWERS, fail_fast=True)
SHORT = Field(max_length=2048, fail_fast=True)
IDS = Field(max_length=2**20, fail_fast=True)
"""Limits of lists of prompts, messages and token ids. Validation stops at the first invalid element: a body with a
million of them is refused at once."""
AT_LEAST_ONE = Field(min_length=1)
MOST_CHOICES = 1000
RENAMED = "is deprecated and not supported: use structured_outputs"

NOT_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True, False),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "suffix": ("",),
    "top_k": (-1, 0),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}
"""Parameter of OpenAI or vLLM that is not supported → its values that change nothing, and so are accepted."""
ADVICE = {
    "audio": "is not supported: models of text answer in text",
    "best_of": "is not supported: ask for n answers",
    "chat_template": "is not supported: the model's own template is used",
    "chat_template_kwargs": "is not supported: arguments of the template are set in training",
    "function_call": "is deprecated and not supported: use tool_choice",
    "functions": "is deprecated and not supported: use tools",
    "guided_choice": RENAMED,
    "guided_grammar": RENAMED,
    "guided_json": RENAMED,
    "guided_regex": RENAMED,
    "modalities": "is not supported: models of text answer in text",
    "prompt_logprobs": "is not supported: use echo with logprobs, in /v1/completions",
    "stop_token_ids": "is not supported: use stop",
    "top_k": "is not supported: use top_p",
}
"""Unsupported parameter → end of its error message; without an entry here, it is "is not supported"."""


class Body(BaseModel):
    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, data: Any) -> Any:
        """Remove null fields from a JSON body before validation, since null means the default."""
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class ErrorContent(BaseModel):
    """The `error` object in an error response of OpenAI's form: message, type, parameter and code."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of an error response, in OpenAI's form."""

    error: ErrorContent


class StreamOptions(Body):
    include_usage: bool = False


class JsonSchema(Body):
    """A JSON schema in `response_format`, in OpenAI's form.

    Attributes:
        strict: accepted and ignored: answers always follow the schema.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    of: dict[str, Any] = Field(alias="schema")
    strict: bool = False


class ResponseFormat(Body):
    """The `response_format` of a request: free text, any JSON object, or JSON of a schema.

    https://platform.openai.com/docs/guides/structured-outputs
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def require_schema(self) -> ResponseFormat:
        """Raise ValueError if `type` is `json_schema` and no schema is given; return the format otherwise."""
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("the type json_schema needs json_schema")
        return self


class StructuredOutputs(Body):
    """vLLM's parameter `structured_outputs`, which constrains answers to JSON, a regular expression or given texts.

    One of its fields is set.
    """

    of: dict[str, Any] | str | None = Field(None, alias="json", description="A schema, or one as text.")
    regex: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    choice: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(min_length=1, max_length=MOST_CHOICES)
        ]
        | None
    ) = None
    json_object: bool = False


class SampledBody(Body):
    """The request fields that chat completions and completions share, such as the sampling parameters."""

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1, le=MOST_ANSWERS)
    seed: int | None = Field(None, ge=-SEEDS, lt=SEEDS)
    stop: (
        Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]], Field(max_length=MOST_STOPS)]
    ) = []
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    user: str | None = None
    response_format: ResponseFormat = ResponseFormat(type="text")
    structured_outputs: StructuredOutputs | None = None
    ignore_eos: bool = Field(False, description="vLLM's: no token ends the answer, for measuring.")

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings at which an answer ends, as a tuple also if `stop` is a single one."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def constrains(self) -> bool:
        """True if answers may have to follow a grammar, since the request asks for JSON, a pattern or given texts."""
        return self.response_format.type != "text" or self.structured_outputs is not None

    def refuse_unsupported(self, other_parameter: str, neutral: Any, advice: str) -> None:
        """Raise Refusal if the request sets an unsupported parameter to a value that would change the answer.

        Args:
            other_parameter: a parameter of the other API.
            neutral: its value that changes nothing.
            advice: end of the message if it is refused.
        """
        neutral_values = {**NOT_SUPPORTED, other_parameter: (neutral,)}
        for name, value in (self.model_extra or {}).items():
            if name in neutral_values and not any(is_same_value(value, each) for each in neutral_values[name]):
                reason = advice if name == other_parameter else ADVICE.get(name, "is not supported")
                raise not_supported(name, f"The parameter '{name}' {reason}.")


def is_same_value(value: Any, neutral: Any) -> bool:
    """Return whether two JSON values are equal, where True differs from 1 and False from 0."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


class CalledFunction(Body):
    name: str
    arguments: str = "{}"


class MessageToolCall(Body):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[dict[str, JsonValue]], SHORT] | None = None
    tool_calls: Annotated[list[MessageToolCall], SHORT] = []
    tool_call_id: str = ""
    reasoning_content: str | None = None


class Function(Body):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function


class ChatBody(SampledBody):
    """The request body of `/v1/chat/completions`, in OpenAI's form.

    https://platform.openai.com/docs/api-reference/chat/create
    """

    messages: Annotated[list[ChatMessage], SHORT] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, description="Deprecated name of max_completion_tokens.")
    max_completion_tokens: int | None = Field(None, ge=1, description="Not given: as many as the context has room for.")
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_LOGPROBS)
    tools: list[Tool] = Field([], max_length=128)
    tool_choice: str | dict[str, JsonValue] = "auto"
    parallel_tool_calls: bool = True

    @property
    def constrains(self) -> bool:
        return super().constrains or (bool(self.tools) and self.tool_choice != "none")

    @property
    def prompt_count(self) -> int:
        return 1

    @property
    def most_tokens(self) -> int | None:
        """Maximum tokens of an answer; None for as many as fit into the context."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """The number of alternatives returned with each token's logprob; None if no logprobs are requested."""
        return self.top_logprobs if self.logprobs else None


class CompletionBody(SampledBody):
    """The request body of `/v1/completions`, in OpenAI's form.

    https://platform.openai.com/docs/api-reference/completions/create
    """

    prompt: (
        str | Annotated[list[str], FEW] | Annotated[list[int], IDS] | Annotated[list[Annotated[list[int], IDS]], FEW]
    ) = Field("", description="Texts or token ids.")
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool = False

    @property
    def prompt_count(self) -> int:
        return len(self.prompts)

    @property
    def most_tokens(self) -> int:
        """Maximum tokens of an answer."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as texts or lists of token ids, in a list also if the request holds only one."""
        prompt: Any = self.prompt
        is_list_of_prompts = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
        return prompt if is_list_of_prompts else [prompt]


class RewardBody(Body):
    """The request body of `/v1/rewards`: conversations, each with a last answer for a reward model to score."""

    model: str
    messages: (
        Annotated[list[ChatMessage], SHORT, AT_LEAST_ONE]
        | Annotated[list[Annotated[list[ChatMessage], SHORT]], FEW, AT_LEAST_ONE]
    ) = Field(description="One conversation, or a list of them.")
    user: str | None = None

    @property
    def conversations(self) -> list[list[ChatMessage]]:
        """The conversations, in a list also if the request holds only one."""
        several = [each for each in self.messages if isinstance(each, list)]
        return several or [[each for each in self.messages if isinstance(each, ChatMessage)]]


class LoadAdapter(Body):
    """The request body of vLLM's `/v1/load_lora_adapter`."""

    lora_name: str = Field(min_length=1, max_length=64)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = Field(False, description="Replace the adapter that has this name.")


class UnloadAdapter(Body):
    lora_name: str = Field(min_length=1, max_length=64)


CALL_START = "<tool_call>"
CALL_END = "</tool_call>"
WRITTEN_CALL = re.compile(r'(<tool_call>\s*)?\{"name": ?"f", ?"(arguments|parameters)": ?\{\}\}(\s*</tool_call>)?')
"""Pattern of a call of a tool `f` as chat templates render it, to detect a template's form of tool calls."""


class ToolCallFormat(NamedTuple):
    """The form in which a chat template renders a tool call.

    Attributes:
        prefix, suffix: text before and after the call's JSON.
        arguments_key: key of the arguments in that JSON.
    """

    prefix: str
    arguments_key: str
    suffix: str


@dataclass(frozen=True)
class ChatFormat:
    """A tokenizer with its chat template and the tokens that end an answer.

    Attributes:
        stop_ids: tokens that end an answer.
    """

    tokenizer: Any
    stop_ids: tuple[int, ...]

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, generation_config: Any) -> ChatFormat:
        """Build the ChatFormat of a tokenizer, with the stop tokens of the tokenizer and the generation config."""
        return cls(tokenizer, find_stop_token_ids(tokenizer, generation_config))

    @cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(self.tokenizer)

    @cached_property
    def takes_tools(self) -> bool:
        """True if the chat template renders the definitions of tools."""
        return supports_tools(self.tokenizer)

    @cached_property
    def leading_token_ids(self) -> list[int]:
        """Ids of the special tokens, such as BOS, that the tokenizer puts before every text."""
        return find_leading_token_ids(self.tokenizer)

    @cached_property
    def tool_call_format(self) -> ToolCallFormat:
        """The form in which the chat template renders a tool call; plain JSON if it renders none."""
        call = {"type": "function", "id": "call_1", "function": {"name": "f", "arguments": {}}}
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            match = WRITTEN_CALL.search(render_messages(self.tokenizer, chat, ()))
        except InputError:
            match = None
        if match is None:
            return ToolCallFormat("", "arguments", "")
        return ToolCallFormat(match[1] or "", match[2], match[3] or "")

    @cached_property
    def grammars(self) -> GrammarCache:
        return GrammarCache(self.tokenizer, self.stop_ids)

    def opens_reasoning(self, prompt_ids: Sequence[int]) -> bool:
        """Return whether a prompt's tokens end with `<think>`, so that the answer starts with reasoning."""
        return self.tokenizer.decode(prompt_ids[-8:]).rstrip().endswith(OPEN)


class Formats:
    """A cache of each adapter's tokenizer and chat template, shared between adapters with equal tokenizer files.

    An entry is dropped when no version of these adapters is in use any more.

    Args:
        read_format: reads the tokenizer and template in a folder; those of the base for None.
    """

    def __init__(self, read_format: Callable[[Path | None], ChatFormat]) -> None:
        self.read_format = read_format
        self._base = read_format(None)
        self._by_digest = WeakValueDictionary[str, ChatFormat]()
        self._of_version = WeakKeyDictionary[Version, ChatFormat]()

    def forget(self, version: Version) -> None:
        """Drop the cached tokenizer and template of an adapter version, so that they are read again.

        Its template may have changed while the weights are the same.
        """
        self._of_version.pop(version, None)

    def __call__(self, version: Version | None) -> ChatFormat:
        """Return an adapter version's tokenizer and template, or the base's for None and adapters without their own."""
        if version is None:
            return self._base
        if (form := self._of_version.get(version)) is None:
            form = self._of_version[version] = self._load(version.folder)
        return form

    def _load(self, folder: Path) -> ChatFormat:
        """Read the tokenizer and template in an adapter's folder, or return the ones cached for equal tokenizer files.

        Returns those of the base if the folder holds none.
        """
        if not (folder / "tokenizer_config.json").is_file():
            return self._base
        digest = tokenizer_digest(folder)
        if (form := self._by_digest.get(digest)) is None:
            form = self._by_digest[digest] = self.read_format(folder)
        return form


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of a request, as token ids.

    Attributes:
        ids: token ids, at least one.
        text: the request's text; None for a chat and for token ids.
        opens_reasoning: see `ChatFormat.opens_reasoning`.
    """

    ids: tuple[int, ...]
    text: str | None = None
    opens_reasoning: bool = False


def build_chat_prompt(form: ChatFormat, body: ChatBody) -> Prompt:
    """Render a chat request with the model's template, and return the prompt as token ids.

    Raises:
        Refusal: the model has no template, or does not support a message or a tool; or the server does not.
    """
    if not form.tokenizer.chat_template:
        raise invalid_request("model", "This model has no chat template: use /v1/completions.")
    tools = list_offered_tools(form, body)
    messages = [to_template_message(message, i) for i, message in enumerate(body.messages)]
    try:
        ids = encode_tool_prompt(form.tokenizer, messages, tools)
    except InputError as error:
        raise invalid_request(error.field, f"{error.problem}. {error.remedy}") from error
    return Prompt(tuple(ids), opens_reasoning=form.opens_reasoning(ids))


def list_offered_tools(form: ChatFormat, body: ChatBody) -> list[dict[str, Any]]:
    """Convert the tools of a chat request to dictionaries for the chat template, or return [] if none may be called.

    Raises:
        Refusal: the template supports no tools, or `tool_choice` demands a call and no tools are offered.
    """
    if not body.tools and body.tool_choice not in ("none", "auto"):
        raise invalid_request("tool_choice", "tool_choice demands a call, and there are no tools.")
    if not body.tools or body.tool_choice == "none":
        return []
    if not form.takes_tools:
        raise not_supported("tools", "This model's chat template takes no tools.")
    return [tool.model_dump(exclude_none=True, exclude_unset=False) for tool in body.tools]


def to_template_message(message: ChatMessage, index: int) -> dict[str, Any]:
    """Convert a message of a request to a dictionary for the chat template.

    Its content is one text that starts with the reasoning, and the arguments of tool calls are objects.

    Args:
        index: index of the message in the request, for error messages.

    Raises:
        Refusal: the message is empty, or holds anything but text.
    """
    field = f"messages.{index}"
    for name in ("audio", "function_call", "images", "refusal"):
        if (message.model_extra or {}).get(name):
            raise not_supported(f"{field}.{name}", f"The field '{name}' of a message is not supported.")
    text = join_content(message.content, field)
    if text is None and not message.tool_calls:
        raise invalid_request(f"{field}.content", "A message needs content.")
    if message.role == "assistant" and message.reasoning_content:
        text = prepend_reasoning(text or "", message.reasoning_content)
    role = "system" if message.role == "developer" else message.role
    template_message: dict[str, Any] = {"role": role, "content": text or ""}
    if message.role == "assistant" and message.tool_calls:
        template_message["tool_calls"] = [
            {
                **({"id": call.id} if call.id else {}),
                "type": "function",
                "function": {"name": call.function.name, "arguments": parse_arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":  # as `align.core.types.Message.as_dict`
        fields = {"name": (message.model_extra or {}).get("name"), "tool_call_id": message.tool_call_id}
        template_message |= {name: value for name, value in fields.items() if isinstance(value, str) and value}
    return template_message


def join_content(content: str | Sequence[Mapping[str, Any]] | None, field: str) -> str | None:
    """Return a message's content as one text, with its parts joined by line breaks, or None if there is no content.

    Args:
        field: name of the message in error messages.

    Raises:
        Refusal: a part holds anything but text.
    """
    if content is None or isinstance(content, str):
        return content
    texts = []
    for part in content:
        if part.get("type") not in ("text", "refusal"):
            message = f"Parts of type '{str(part.get('type'))[:40]}' are not supported: this is a model of text."
            raise not_supported(f"{field}.content", message)
        text = part.get(str(part["type"]))
        if not isinstance(text, str):
            raise invalid_request(f"{field}.content", "A part of type 'text' needs a text.")
        texts.append(text)
    return "\n".join(texts)


def parse_arguments(text: str) -> dict[str, Any] | str:
    """Parse the JSON arguments of a tool call as an object, or return the text if it is no JSON object."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return arguments if isinstance(arguments, dict) else text


def build_prompts(form: ChatFormat, body: ChatBody | CompletionBody, embedding_rows: int) -> list[Prompt]:
    """Tokenise the prompts of a request: its rendered chat, or the texts or token ids that a completion continues.

    Special tokens that a text spells out are encoded as plain text.

    Args:
        embedding_rows: rows of the base's embedding, below which token ids have to be.

    Raises:
        Refusal: a prompt is empty, there are too many, or an id is out of range; or see `build_chat_prompt`.
    """
    if isinstance(body, ChatBody):
        return [build_chat_prompt(form, body)]
    prompts = body.prompts
    if len(prompts) * body.n > MOST_ANSWERS:
        raise invalid_request("prompt", f"At most {MOST_ANSWERS} answers may be asked for at once.")
    encoded_prompts = []
    for prompt in prompts:
        if isinstance(prompt, str):
            if half := find_lone_surrogate(prompt):
                raise invalid_request("prompt", f"It has {half}, half a character.")
            encoded_prompts.append(Prompt((*form.leading_token_ids, *tokenize_text(form.tokenizer, prompt)), prompt))
        else:
            if any(not 0 <= id < embedding_rows for id in prompt):
                raise invalid_request("prompt", f"A token id is not between 0 and {embedding_rows - 1}.")
            encoded_prompts.append(Prompt(tuple(prompt)))
    if not all(prompt.ids for prompt in encoded_prompts):
        raise invalid_request("prompt", "A prompt has no tokens.")
    return encoded_prompts


def choose_sampling(
    form: ChatFormat,
    body: ChatBody | CompletionBody,
    prompt: Prompt,
    context_length: int,
    max_answer_tokens: int | None,
) -> SamplingParams:
    """Build the sampling parameters of a prompt's first answer from a request, with its token limit and seed.

    Other answers differ in their seed only, see `derive_seed`.

    Args:
        context_length: maximum tokens of a prompt and its answer together.
        max_answer_tokens: limit of an answer if the request sets none; None for as many as the context holds.

    Raises:
        Refusal: the prompt leaves no room for the answer.
    """
    room = context_length - len(prompt.ids)
    max_tokens = body.most_tokens
    if room < (1 if max_tokens is None else max_tokens):
        message = f"The context is {context_length} tokens. The prompt has {len(prompt.ids)}"
        message += "." if max_tokens is None else f", and {max_tokens} are asked for."
        param = "messages" if isinstance(body, ChatBody) else "prompt"
        raise Refusal(400, message, param="max_tokens" if room > 0 else param, code="context_length_exceeded")
    return SamplingParams(
        max_tokens=min(room, max_answer_tokens or room) if max_tokens is None else max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        stop_ids=() if body.ignore_eos else form.stop_ids,
        logprobs=body.alternatives,
        prompt_logprobs=body.alternatives if isinstance(body, CompletionBody) and body.echo else None,
    )


def derive_seed(seed: int, i: int) -> int:
    """Derive the seed of a request's answer number `i`. Answer 0 has the request's seed: it is the same as with n=1."""
    if i == 0:
        return seed
    return int.from_bytes(sha256(f"{seed}:{i}".encode()).digest()[:8], "big", signed=True)


def build_reward_prompts(
    form: ChatFormat, body: RewardBody, hides_reasoning: bool, context_length: int
) -> list[Prompt]:
    """Tokenise each conversation of a reward request as in the training of the reward model.

    Args:
        hides_reasoning: whether the reward model was trained on answers without their reasoning.
        context_length: maximum tokens of a conversation.

    Raises:
        Refusal: a conversation does not end with an answer, holds anything but text, or is too long.
    """
    encoded_prompts = []
    is_batch = len(body.conversations) > 1 or isinstance(body.messages[0], list)
    for i, messages in enumerate(body.conversations):
        field = f"messages.{i}" if is_batch else "messages"
        chat = tuple(to_scored_message(message, f"{field}.{j}") for j, message in enumerate(messages))
        if len(chat) < 2 or chat[-1].role != "assistant":
            raise invalid_request(
                field, "A conversation must end with the answer to score, after the message that it answers."
            )
        context_messages, answer = (
            (strip_all_reasoning(chat[:-1]), strip_reasoning(chat[-1].content))
            if hides_reasoning
            else (chat[:-1], chat[-1].content)
        )
        try:
            ids = encode_for_reward_model(form.tokenizer, Conversation(context_messages), answer, True, form.stop_ids)
        except InputError as error:
            raise invalid_request(field, f"{error.problem}. {error.remedy}") from error
        if len(ids) > context_length:
            raise invalid_request(
                field, f"The context is {context_length} tokens, and the conversation has {len(ids)}."
            )
        encoded_prompts.append(Prompt(tuple(ids)))
    return encoded_prompts


def to_scored_message(message: ChatMessage, field: str) -> Message:
    """Convert a request's message to a Message for a reward model, or raise Refusal if it is empty or uses tools.

    Its text starts with the reasoning.
    """
    role = "system" if message.role == "developer" else message.role
    if role == "tool" or message.tool_calls:
        raise not_supported(field, "Reward models read no tools.")
    text = join_content(message.content, field)
    if not text:
        raise invalid_request(f"{field}.content", "A message needs content.")
    if role == "assistant" and message.reasoning_content:
        text = prepend_reasoning(text, message.reasoning_content)
    return Message(role, text)
