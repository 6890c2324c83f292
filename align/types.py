"""The records that travel between rooms: frozen, checked where they are born, trusted afterwards.

Shape suffixes are those of CONTRIBUTING.md: `B` batch, `S` prompt + response, `P` prompt, `T` response, `V` vocabulary.
This module imports no torch: tensors are only named, their shapes read through `.shape`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: `system`, `user` or `assistant`.
        content: the text, without any template around it.
        trained: False for an assistant's turn that is read and not imitated.
    """

    role: str
    content: str
    trained: bool = True

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role={self.role!r} is none of {', '.join(ROLES)}")
        if not isinstance(self.content, str):
            raise TypeError(f"content of a {self.role} message is {type(self.content).__name__}, not text")

    def as_dict(self) -> dict[str, str]:
        """The `{role, content}` form that transformers and TRL read. What is trained on is no part of it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, with an identity that survives shuffling.

    Attributes:
        messages: at least one message.
        id: stable within its data set; goes into samples and lineage.
    """

    messages: tuple[Message, ...]
    id: str = ""

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError("a conversation has no messages")

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, str] | Message], id: str = "") -> Conversation:
        """From `{role, content}` mappings or messages."""
        return cls(tuple(m if isinstance(m, Message) else Message(m["role"], m["content"]) for m in messages), id)

    def as_dicts(self) -> list[dict[str, str]]:
        return [m.as_dict() for m in self.messages]

    def answered(self, text: str) -> Conversation:
        """This conversation with `text` as the assistant's next turn."""
        return Conversation((*self.messages, Message("assistant", text)), self.id)


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
    """

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    label: bool
    id: str = ""

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
        metrics: the stage's headline figures, written to the manifest.
        summary: a few lines for the terminal.
    """

    metrics: Mapping[str, Any] = field(default_factory=dict)
    summary: tuple[str, ...] = ()
