"""The records that packages exchange. They are frozen, and checked when they are created.

Shape suffixes are those of CONTRIBUTING.md: `B` batch, `S` prompt + response, `P` prompt, `T` response, `V` vocabulary.
This module imports no torch: tensors are only named, their shapes read through `.shape`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROLES = ("system", "user", "assistant", "tool")


def dump_json(value: Any) -> str:
    """Return a value as JSON text as chat templates write it: keys in their order, a space after commas and colons.

    Raises:
        ValueError: the value holds NaN or an infinite number, which JSON does not have.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool by the assistant.

    Attributes:
        name: of the tool.
        arguments: a JSON object, as `dump_json` writes it; see `from_arguments`.
        id: the id by which a result names the call; empty if it has none.
    """

    name: str
    arguments: str = "{}"
    id: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a tool call names no tool")
        value = json.loads(self.arguments)
        if not isinstance(value, dict) or dump_json(value) != self.arguments:
            raise ValueError(f"arguments={self.arguments!r} of a call of {self.name} are no JSON object as it is kept")

    @classmethod
    def from_arguments(cls, name: str, arguments: Mapping[str, Any], id: str = "") -> ToolCall:
        """Create a tool call from a mapping of its arguments, which are stored as JSON text.

        Raises:
            ValueError: JSON cannot represent the arguments.
        """
        return cls(name, dump_json(dict(arguments)), id)

    def as_dict(self) -> dict[str, Any]:
        """Return the call as OpenAI's mapping for chat templates, with the arguments as an object, not as JSON text."""
        id = {"id": self.id} if self.id else {}
        return {**id, "type": "function", "function": {"name": self.name, "arguments": json.loads(self.arguments)}}


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that is offered to the assistant.

    Attributes:
        name: the name that calls use.
        schema: `{"type": "function", "function": {name, description, parameters, …}}`, as `dump_json` writes it.
    """

    name: str
    schema: str

    @classmethod
    def from_dict(cls, schema: Mapping[str, Any]) -> Tool:
        """Create a tool from OpenAI's schema `{type, function}`, or from its `function` object alone.

        Keys are put in the order in which servers write them, so that the model reads the same text in training and
        behind a server.

        Raises:
            ValueError: the schema names no function.
        """
        function = schema.get("function", schema)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise ValueError("a tool has no name")
        first = {key: function[key] for key in ("name", "description", "parameters", "strict") if key in function}
        members = {**first, **function}
        extra = {}
        if function is schema:  # OpenAI's flat form, whose `type` is written outside
            members.pop("type", None)
        else:
            extra = {key: value for key, value in schema.items() if key not in ("type", "function")}
        declared = {key: value for key, value in members.items() if value is not None}
        return cls(name, dump_json({"type": "function", "function": declared, **extra}))

    def as_dict(self) -> dict[str, Any]:
        return json.loads(self.schema)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: `system`, `user`, `assistant` or `tool`.
        content: the text, without any template around it; of a `tool` turn, what the tool returned.
        trained: False for an assistant's turn that takes no part in the loss.
        tool_calls: calls of the assistant in this turn, after the text.
        tool_call_id: of a `tool` turn, the id of the call that it answers; empty if unknown.
        name: of a `tool` turn, the tool; empty if unknown.
    """

    role: str
    content: str
    trained: bool = True
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role={self.role!r} is none of {', '.join(ROLES)}")
        if not isinstance(self.content, str):
            raise TypeError(f"content of a {self.role} message is {type(self.content).__name__}, not text")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"a {self.role} message calls tools")
        if (self.tool_call_id or self.name) and self.role != "tool":
            raise ValueError(f"a {self.role} message is the result of a tool")

    @classmethod
    def from_dict(cls, message: Mapping[str, Any]) -> Message:
        """Create a message from a mapping as `as_dict` returns it."""
        calls = tuple(
            ToolCall.from_arguments(call["function"]["name"], call["function"]["arguments"], call.get("id", ""))
            for call in message.get("tool_calls") or ()
        )
        name = message.get("name", "") if message["role"] == "tool" else ""
        id = message.get("tool_call_id", "")
        return cls(message["role"], message["content"], tool_calls=calls, tool_call_id=id, name=name)

    def as_dict(self) -> dict[str, Any]:
        """Return the mapping that transformers and TRL read: `role`, `content`, and tool calls and ids if any.

        `trained` is not part of it.
        """
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        if self.name:
            message["name"] = self.name
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation: its messages in order, an id within its data set, and the tools that are offered.

    Attributes:
        messages: at least one message.
        id: stable within its data set; written to samples and lineage.
        tools: tools that the assistant may call.
        row: the other columns of its row, such as `answer`, as JSON; empty if there is no other. Checks of answers
            read them, and models do not, so neither digests nor data sets nor the annotation store include them.
    """

    messages: tuple[Message, ...]
    id: str = ""
    tools: tuple[Tool, ...] = ()
    row: str = ""

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError("a conversation has no messages")

    @classmethod
    def from_messages(
        cls, messages: Sequence[Mapping[str, Any] | Message], id: str = "", tools: Sequence[Tool] = ()
    ) -> Conversation:
        """Create a conversation from messages, or from mappings in the form of `Message.as_dict`."""
        return cls(tuple(m if isinstance(m, Message) else Message.from_dict(m) for m in messages), id, tuple(tools))

    @property
    def uses_tools(self) -> bool:
        """True if a tool is offered, or a message calls a tool or is a tool's result."""
        return bool(self.tools) or any(m.tool_calls or m.role == "tool" for m in self.messages)

    @property
    def columns(self) -> dict[str, Any]:
        """The values of the row's other columns, parsed from the JSON in `row`: column → value."""
        return json.loads(self.row) if self.row else {}

    def as_dicts(self) -> list[dict[str, Any]]:
        return [m.as_dict() for m in self.messages]

    def tool_dicts(self) -> list[dict[str, Any]] | None:
        """Return the tools as mappings for the `tools` argument of chat templates, or None if there are no tools."""
        return [tool.as_dict() for tool in self.tools] or None

    def turns(self, end: int) -> Conversation:
        """Return a conversation of the messages before index `end`."""
        return replace(self, messages=self.messages[:end])

    def with_answer(self, answer: str | Message) -> Conversation:
        """Return this conversation with an answer, as a message or its text, appended as the assistant's turn."""
        turn = answer if isinstance(answer, Message) else Message("assistant", answer)
        return replace(self, messages=(*self.messages, turn))


Document = Conversation | str
"""A row of supervised training: a conversation, or plain text."""


@dataclass(frozen=True, slots=True)
class Preference:
    """A preference pair: a prompt with a chosen and a rejected answer.

    Attributes:
        prompt: the conversation up to the answer.
        chosen: the turns preferred, usually one assistant message.
        rejected: the turns not preferred.
        group_id: pairs from one ranking share it and never straddle a split.
        margin: how much better, in the annotator's units; None if unknown.
        posterior: probability in [0, 1] that the chosen answer is better, given all judgements; None if unknown.
        source: origin of the judgement: `human`, `simulated`, or the data set's name.
        scorer: the score that a simulated annotator ranked by, such as `vader`; empty if unknown.
        tools: tools that the assistant may call.
        chosen_ended, rejected_ended: False if sampling cut the answer at its length limit. A reward model then reads it
            like a rollout that was cut, without the token that ends a turn.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    id: str = ""
    group_id: str = ""
    margin: float | None = None
    annotator: str = ""
    source: str = ""
    strength: int | None = None
    guideline_version: str = ""
    created_at: str = ""
    chosen_ended: bool = True
    rejected_ended: bool = True
    scorer: str = ""
    tools: tuple[Tool, ...] = ()
    posterior: float | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "chosen", "rejected"):
            if not getattr(self, name):
                raise ValueError(f"{name} of preference {self.id or '(no id)'} is empty")
        if self.chosen == self.rejected:
            raise ValueError(f"chosen and rejected of preference {self.id or '(no id)'} are the same")


@dataclass(frozen=True, slots=True)
class Feedback:
    """A prompt and an answer with a label, desirable or not, which KTO learns from.

    Attributes:
        prompt: the conversation up to the answer.
        completion: the answer, usually one assistant message.
        label: True for a desirable answer.
        tools: tools that the assistant may call.
    """

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    label: bool
    id: str = ""
    tools: tuple[Tool, ...] = ()

    def __post_init__(self) -> None:
        for name in ("prompt", "completion"):
            if not getattr(self, name):
                raise ValueError(f"{name} of feedback {self.id or '(no id)'} is empty")


Record = Document | Preference | Feedback
"""A row of a data set: a conversation, a text, a preference pair or a labelled answer."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A batch of prompts and the responses sampled for them, as padded tensors of token ids with masks.

    Prompts are padded on the left, responses on the right, so that every response starts at column P. The masks are
    those of sampling. `tokens != pad` would not do: a model whose pad token is its EOS token would lose its EOS.

    Attributes:
        tokens_BS: token ids, prompt then response; S = P + T. int64.
        mask_BS: True on real tokens of prompt and response (the EOS token included), False on padding.
        prompt_width: P, the columns of the padded prompts.
        ended_B: True if the response ended with a stop token, False if it was cut at the length limit.
        logprobs_BT: the sampler's log p of each response token, at the temperature of sampling; fp32, 0 outside the
            mask. None if the responses were not sampled, or the engine does not return them.
    """

    tokens_BS: Tensor
    mask_BS: Tensor
    prompt_width: int
    ended_B: Tensor
    logprobs_BT: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens_BS.shape != self.mask_BS.shape:
            raise ValueError(
                f"tokens {tuple(self.tokens_BS.shape)} and mask {tuple(self.mask_BS.shape)} differ in shape"
            )
        if self.ended_B.shape[0] != self.tokens_BS.shape[0]:
            raise ValueError(f"{self.ended_B.shape[0]} flags for {self.tokens_BS.shape[0]} rows")
        if not 0 < self.prompt_width < self.tokens_BS.shape[1]:
            raise ValueError(
                f"prompt_width={self.prompt_width} leaves no room for a response in {self.tokens_BS.shape[1]} columns"
            )
        if self.logprobs_BT is not None and self.logprobs_BT.shape != self.response_BT.shape:
            shapes = f"logprobs {tuple(self.logprobs_BT.shape)} and responses {tuple(self.response_BT.shape)}"
            raise ValueError(f"{shapes} differ in shape")

    @property
    def response_mask_BT(self) -> Tensor:
        """Mask of the response columns: True on the response's tokens, its stop token included, False on padding."""
        return self.mask_BS[:, self.prompt_width :]

    @property
    def response_BT(self) -> Tensor:
        return self.tokens_BS[:, self.prompt_width :]

    @property
    def position_ids_BS(self) -> Tensor:
        """Position ids of all tokens, counted over real tokens only, so that left padding shifts nothing."""
        return (self.mask_BS.long().cumsum(-1) - 1).clamp_min(0)

    @property
    def lengths_B(self) -> Tensor:
        """Number of tokens of each response, its stop token included."""
        return self.response_mask_BT.sum(-1)

    def to(self, device: Any) -> Rollout:
        """Return a rollout with all tensors on a device. An engine may sample on another one than the learner's."""
        logprobs = None if self.logprobs_BT is None else self.logprobs_BT.to(device)
        return Rollout(
            self.tokens_BS.to(device), self.mask_BS.to(device), self.prompt_width, self.ended_B.to(device), logprobs
        )

    def rows(self, index: Any) -> Rollout:
        """Return a rollout of the rows that `index` selects, without columns that are padding in all of them.

        Args:
            index: a slice or an index tensor.
        """
        mask = self.mask_BS[index]
        used_columns = mask.any(0).nonzero()
        start = min(int(used_columns[0]), self.prompt_width - 1)
        end = max(int(used_columns[-1]), self.prompt_width) + 1
        logprobs = None if self.logprobs_BT is None else self.logprobs_BT[index][:, : end - self.prompt_width]
        tokens = self.tokens_BS[index][:, start:end]
        return Rollout(tokens, mask[:, start:end], self.prompt_width - start, self.ended_B[index], logprobs)


@dataclass(frozen=True, slots=True)
class StageResult:
    """The result of a run's stage: its main metrics, and lines to print.

    Attributes:
        metrics: the headline figures, written to the manifest. `exit_status` among them is the status of a run that is
            published although it is no success.
        summary: a few lines for the terminal.
    """

    metrics: Mapping[str, Any] = field(default_factory=dict)
    summary: tuple[str, ...] = ()
