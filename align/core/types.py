"""The records that travel between rooms: frozen, checked where they are born, trusted afterwards.

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


def json_text(value: Any) -> str:
    """A JSON value as chat templates write it: keys in their order, a space behind commas and colons.

    Raises:
        ValueError: it is, or holds, what JSON has not (NaN, an infinite number).
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool that the assistant calls.

    Attributes:
        name: of the tool.
        arguments: a JSON object, as `json_text` writes it; see `of`.
        id: that a result names; empty where nobody gave one.
    """

    name: str
    arguments: str = "{}"
    id: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a tool call names no tool")
        value = json.loads(self.arguments)
        if not isinstance(value, dict) or json_text(value) != self.arguments:
            raise ValueError(f"arguments={self.arguments!r} of a call of {self.name} are no JSON object as it is kept")

    @classmethod
    def of(cls, name: str, arguments: Mapping[str, Any], id: str = "") -> ToolCall:
        """Raises: ValueError: JSON has no such arguments."""
        return cls(name, json_text(dict(arguments)), id)

    def as_dict(self) -> dict[str, Any]:
        """The form that chat templates read: arguments are an object, and not its text."""
        given = {"id": self.id} if self.id else {}
        return {
            **given, "type": "function", "function": {"name": self.name, "arguments": json.loads(self.arguments)}
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that is offered to the assistant.

    Attributes:
        name: that calls have.
        schema: `{"type": "function", "function": {name, description, parameters, …}}`, as `json_text` writes it.
    """

    name: str
    schema: str

    @classmethod
    def of(cls, schema: Mapping[str, Any]) -> Tool:
        """From OpenAI's form, or from its `function` alone. Names stand in the order in which servers write them, whose
        requests pass through a schema of their own: a model reads when it is asked what it read in training.

        Raises:
            ValueError: it names no function.
        """
        function = schema.get("function", schema)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise ValueError("a tool has no name")
        first = {key: function[key] for key in ("name", "description", "parameters", "strict") if key in function}
        typed = {"type"} if function is schema else set()  # OpenAI's flat form: `type` is said once, outside
        said = {key: value for key, value in {**first, **function}.items() if value is not None and key not in typed}
        beside = {key: value for key, value in schema.items() if key not in ("type", "function")}
        beside = beside if function is not schema else {}
        return cls(name, json_text({"type": "function", "function": said, **beside}))

    def as_dict(self) -> dict[str, Any]:
        return json.loads(self.schema)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: `system`, `user`, `assistant` or `tool`.
        content: the text, without any template around it; of a `tool` turn, what the tool returned.
        trained: False for an assistant's turn that is read and not imitated.
        tool_calls: what the assistant calls in this turn, behind the text.
        tool_call_id: of a `tool` turn, the id of the call that it answers; empty where nobody gave one.
        name: of a `tool` turn, the tool; empty where nobody gave one.
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
    def of(cls, message: Mapping[str, Any]) -> Message:
        """The inverse of `as_dict`."""
        calls = tuple(
            ToolCall.of(call["function"]["name"], call["function"]["arguments"], call.get("id", ""))
            for call in message.get("tool_calls") or ()
        )
        id, name = message.get("tool_call_id", ""), message.get("name", "") if message["role"] == "tool" else ""
        return cls(message["role"], message["content"], tool_calls=calls, tool_call_id=id, name=name)

    def as_dict(self) -> dict[str, Any]:
        """The form that transformers and TRL read: `{role, content}`, and of calls and results what there is. What is
        trained on is no part of it."""
        made: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            made["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        if self.name:
            made["name"] = self.name
        if self.tool_call_id:
            made["tool_call_id"] = self.tool_call_id
        return made


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, with an identity that survives shuffling.

    Attributes:
        messages: at least one message.
        id: stable within its data set; goes into samples and lineage.
        tools: what the assistant may call.
        row: the columns of its row that the prompt is not made of, such as `answer`, as JSON; empty where there are
            none. What checks an answer reads them, and no model does: they are no part of what the conversation says,
            so neither its digests nor data sets nor the annotation store have them.
    """

    messages: tuple[Message, ...]
    id: str = ""
    tools: tuple[Tool, ...] = ()
    row: str = ""

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError("a conversation has no messages")

    @classmethod
    def of(
        cls, messages: Sequence[Mapping[str, Any] | Message], id: str = "", tools: Sequence[Tool] = ()
    ) -> Conversation:
        """From messages, or mappings as `Message.as_dict` makes them."""
        return cls(tuple(m if isinstance(m, Message) else Message.of(m) for m in messages), id, tuple(tools))

    @property
    def uses_tools(self) -> bool:
        """Whether a tool is offered, called or answers."""
        return bool(self.tools) or any(m.tool_calls or m.role == "tool" for m in self.messages)

    @property
    def columns(self) -> dict[str, Any]:
        """What `row` holds, by the name of the column."""
        return json.loads(self.row) if self.row else {}

    def as_dicts(self) -> list[dict[str, Any]]:
        return [m.as_dict() for m in self.messages]

    def tool_dicts(self) -> list[dict[str, Any]] | None:
        """What chat templates take as `tools`; None where there are none."""
        return [tool.as_dict() for tool in self.tools] or None

    def turns(self, end: int) -> Conversation:
        """The conversation up to, and without, turn `end`."""
        return replace(self, messages=self.messages[:end])

    def answered(self, answer: str | Message) -> Conversation:
        """This conversation with an answer, or its text, as the assistant's next turn."""
        turn = answer if isinstance(answer, Message) else Message("assistant", answer)
        return replace(self, messages=(*self.messages, turn))


Document = Conversation | str
"""What supervised training imitates: a conversation, or plain text."""


@dataclass(frozen=True, slots=True)
class Preference:
    """One judged pair: the same prompt, an answer chosen over another.

    Attributes:
        prompt: the conversation up to the answer.
        chosen: the turns preferred, usually one assistant message.
        rejected: the turns not preferred.
        group_id: pairs from one ranking share it and never straddle a split.
        margin: how much better, in the annotator's units; None where nobody said.
        source: who or what judged: `human`, `simulated`, or the data set's name.
        scorer: the name of what a simulated annotator ranked by, such as `vader`; empty where nobody said.
        tools: what the assistant may call.
        chosen_ended, rejected_ended: False where sampling cut the answer at its length limit; a reward model then
            reads it as a rollout that was cut, without the token that ends a turn.
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

    def __post_init__(self) -> None:
        for name in ("prompt", "chosen", "rejected"):
            if not getattr(self, name):
                raise ValueError(f"{name} of preference {self.id or '(no id)'} is empty")
        if self.chosen == self.rejected:
            raise ValueError(f"chosen and rejected of preference {self.id or '(no id)'} are the same")


@dataclass(frozen=True, slots=True)
class Feedback:
    """One answer that somebody took or refused, without another beside it: what KTO learns from.

    Attributes:
        prompt: the conversation up to the answer.
        completion: the answer, usually one assistant message.
        label: True where it was wanted.
        tools: what the assistant may call.
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
"""What one row of a data set says."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """Prompts and the responses sampled for them, as the learner reads them.

    Prompts are padded on the left, responses on the right, so that every response starts at column P.
    The masks are kept from the moment of sampling and never re-derived from `tokens != pad`:
    a model whose pad token is its EOS token would lose its EOS.

    Attributes:
        tokens_BS: token ids, prompt then response; S = P + T. int64.
        mask_BS: True on real tokens of prompt and response (the EOS token included), False on padding.
        prompt_width: P, the columns the (padded) prompts take.
        ended_B: True where the response ended with a stop token; False where it was cut at the length limit.
        logprobs_BT: log p of each response token as the sampler drew it, at the temperature of sampling; fp32, 0
            outside the mask. None where nobody sampled, or the engine does not say.
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
            found, asked = tuple(self.logprobs_BT.shape), tuple(self.response_BT.shape)
            raise ValueError(f"logprobs {found} and responses {asked} differ in shape")

    @property
    def response_mask_BT(self) -> Tensor:
        """True on the response's tokens, its stop token included."""
        return self.mask_BS[:, self.prompt_width :]

    @property
    def response_BT(self) -> Tensor:
        return self.tokens_BS[:, self.prompt_width :]

    @property
    def position_ids_BS(self) -> Tensor:
        """Positions counted over real tokens only, so that left padding shifts nothing."""
        return (self.mask_BS.long().cumsum(-1) - 1).clamp_min(0)

    @property
    def lengths_B(self) -> Tensor:
        """Tokens of each response, its stop token included."""
        return self.response_mask_BT.sum(-1)

    def to(self, device: Any) -> Rollout:
        """The same on another device: an engine may sample elsewhere than its learner computes."""
        tokens, mask, ended = (x.to(device) for x in (self.tokens_BS, self.mask_BS, self.ended_B))
        logprobs = None if self.logprobs_BT is None else self.logprobs_BT.to(device)
        return Rollout(tokens, mask, self.prompt_width, ended, logprobs)

    def rows(self, index: Any) -> Rollout:
        """The rows that `index` selects (a slice or an index tensor), without the columns that only pad the others."""
        tokens, mask = self.tokens_BS[index], self.mask_BS[index]
        used = mask.any(0).nonzero()
        first, last = min(int(used[0]), self.prompt_width - 1), max(int(used[-1]), self.prompt_width)
        width = self.prompt_width - first
        logprobs = None if self.logprobs_BT is None else self.logprobs_BT[index][:, : last + 1 - self.prompt_width]
        return Rollout(tokens[:, first : last + 1], mask[:, first : last + 1], width, self.ended_B[index], logprobs)


@dataclass(frozen=True, slots=True)
class Result:
    """What a stage hands back to `__main__`: the figures that describe it, and the lines worth printing.

    Attributes:
        metrics: the stage's headline figures, written to the manifest. `exit_status` among them is what a run ends with
            that is published and still no success.
        summary: a few lines for the terminal.
    """

    metrics: Mapping[str, Any] = field(default_factory=dict)
    summary: tuple[str, ...] = ()
