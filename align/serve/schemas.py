"""What clients send: the bodies of OpenAI's chat completions and completions, and of vLLM's loading of adapters.

A null is a default, as in OpenAI's API. A field that is not declared here is looked up in `NOT_SUPPORTED`; any
other one changes no answer, and is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from align.serve.errors import unsupported

MOST_ANSWERS = 128
MOST_STOPS = 4
LONGEST_STOP = 256
MOST_LOGPROBS = 20
SEEDS = 2**63
FEW, SHORT, IDS = (Field(max_length=most, fail_fast=True) for most in (MOST_ANSWERS, 2048, 2**20))
"""Lists of prompts, of messages and of token ids. The first element that is wrong ends their reading: a body of a
million wrong ones is refused at once."""
AT_LEAST_ONE = Field(min_length=1)
MOST_CHOICES = 1000
RENAMED = "is deprecated and not supported: use structured_outputs"

NOT_SUPPORTED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "add_generation_prompt": ((True,), "is not supported"),
    "add_special_tokens": ((True, False), "is not supported"),
    "allowed_token_ids": ((), "is not supported"),
    "audio": ((), "is not supported: models of text answer in text"),
    "bad_words": (([],), "is not supported"),
    "best_of": ((1,), "is not supported: ask for n answers"),
    "chat_template": ((), "is not supported: the model's own template is used"),
    "chat_template_kwargs": (({},), "is not supported: arguments of the template are set in training"),
    "continue_final_message": ((False,), "is not supported"),
    "documents": (([],), "is not supported"),
    "frequency_penalty": ((0,), "is not supported"),
    "function_call": (("none",), "is deprecated and not supported: use tool_choice"),
    "functions": (([],), "is deprecated and not supported: use tools"),
    "guided_choice": ((), RENAMED),
    "guided_grammar": ((), RENAMED),
    "guided_json": ((), RENAMED),
    "guided_regex": ((), RENAMED),
    "length_penalty": ((1,), "is not supported"),
    "logit_bias": (({},), "is not supported"),
    "min_p": ((0,), "is not supported"),
    "min_tokens": ((0,), "is not supported"),
    "modalities": ((["text"],), "is not supported: models of text answer in text"),
    "prediction": ((), "is not supported"),
    "presence_penalty": ((0,), "is not supported"),
    "prompt_embeds": ((), "is not supported"),
    "prompt_logprobs": ((), "is not supported: use echo with logprobs, in /v1/completions"),
    "repetition_penalty": ((1,), "is not supported"),
    "skip_special_tokens": ((True,), "is not supported"),
    "stop_token_ids": (([],), "is not supported: use stop"),
    "suffix": (("",), "is not supported"),
    "top_k": ((-1, 0), "is not supported: use top_p"),
    "truncate_prompt_tokens": ((), "is not supported"),
    "use_beam_search": ((False,), "is not supported"),
    "web_search_options": ((), "is not supported"),
}
"""Parameters of OpenAI's and vLLM's that would change an answer: the values that change nothing, and what is said of
any other."""


class Body(BaseModel):
    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class ErrorContent(BaseModel):
    """What an error says."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error, in OpenAI's form."""

    error: ErrorContent


class StreamOptions(Body):
    include_usage: bool = False


class JsonSchema(Body):
    """Attributes:
    strict: answers follow the schema whether it is set or not.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    of: dict[str, Any] = Field(alias="schema")
    strict: bool = False


class ResponseFormat(Body):
    """https://platform.openai.com/docs/guides/structured-outputs"""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def has_a_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("the type json_schema needs json_schema")
        return self


class StructuredOutputs(Body):
    """vLLM's: one of these."""

    of: dict[str, Any] | str | None = Field(None, alias="json", description="A schema, or one as text.")
    regex: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    choice: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(min_length=1, max_length=MOST_CHOICES)
    ] | None = None  # fmt: skip
    json_object: bool = False


class Sampled(Body):
    """What both APIs ask for."""

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1, le=MOST_ANSWERS)
    seed: int | None = Field(None, ge=-SEEDS, lt=SEEDS)
    stop: (
        Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]], Field(max_length=MOST_STOPS)
        ]
    ) = []  # fmt: skip
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    user: str | None = None
    response_format: ResponseFormat = ResponseFormat(type="text")
    structured_outputs: StructuredOutputs | None = None
    ignore_eos: bool = Field(False, description="vLLM's: no token ends the answer, for measuring.")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def constrains(self) -> bool:
        """Whether an answer may have to follow a grammar."""
        return self.response_format.type != "text" or self.structured_outputs is not None

    def refuse_unsupported(self, also: Mapping[str, tuple[tuple[Any, ...], str]] = {}) -> None:
        """Raises: Refusal: a field asks for what would change the answer, and is not done here."""
        known = {**NOT_SUPPORTED, **also}
        for name, value in (self.model_extra or {}).items():
            if name in known and not any(same(value, neutral) for neutral in known[name][0]):
                raise unsupported(name, f"The parameter '{name}' {known[name][1]}.")


def same(value: Any, neutral: Any) -> bool:
    """Equal, and no truth value taken for a number."""
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


class ChatBody(Sampled):
    """https://platform.openai.com/docs/api-reference/chat/create"""

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
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class CompletionBody(Sampled):
    """https://platform.openai.com/docs/api-reference/completions/create"""

    prompt: (
        str | Annotated[list[str], FEW] | Annotated[list[int], IDS] | Annotated[list[Annotated[list[int], IDS]], FEW]
    ) = Field("", description="Texts or token ids.")
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool = False

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        given: Any = self.prompt
        return given if isinstance(given, list) and given and isinstance(given[0], str | list) else [given]


class RewardBody(Body):
    """Conversations that each end with an answer, for a reward model."""

    model: str
    messages: (
        Annotated[list[ChatMessage], SHORT, AT_LEAST_ONE]
        | Annotated[list[Annotated[list[ChatMessage], SHORT]], FEW, AT_LEAST_ONE]
    ) = Field(description="One conversation, or a list of them.")
    user: str | None = None

    @property
    def conversations(self) -> list[list[ChatMessage]]:
        several = [each for each in self.messages if isinstance(each, list)]
        return several or [[each for each in self.messages if isinstance(each, ChatMessage)]]


class LoadAdapter(Body):
    """vLLM's `/v1/load_lora_adapter`."""

    lora_name: str = Field(min_length=1, max_length=64)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = Field(False, description="Replace what has this name.")


class UnloadAdapter(Body):
    lora_name: str = Field(min_length=1, max_length=64)
