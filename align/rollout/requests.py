"""What an engine that serves is asked for, and what it gives: requests, and tokens one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from align.core.errors import InputError
from align.models.known_adapters import KnownAdapters

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

FinishReason = Literal["stop", "length", "abort", "error"]


class Grammar(Protocol):
    """What may come next in one answer. It belongs to one request, and changes with each token.

    Attributes:
        source: the same as llguidance's Lark, for engines that follow it by themselves; None where that says less.
    """

    source: str | None

    def allowed(self) -> np.ndarray:
        """Which tokens may come next [V], bool; at least one."""
        ...

    def accept(self, token: int) -> bool:
        """Take in the token that came; whether the answer ends with it."""
        ...


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one answer is drawn. What is drawn at a position is a function of the seed, the position and the
    distribution there.

    Attributes:
        max_tokens: of the answer, its stop token included; 0 where only the prompt's logprobs are wanted.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: of the likeliest tokens whose chances add up to this, one is drawn (Holtzman et al., 2020).
        seed: int64.
        stop_ids: tokens that end the answer, each its last token.
        logprobs: how many alternatives come with each token and its own logprob; None for no logprobs.
        prompt_logprobs: the same of the prompt's tokens, each given those before it.
        processed_logprobs: of the distribution that is drawn from, temperature included; otherwise the model's own, at
            temperature 1.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    processed_logprobs: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One answer that is asked for.

    Attributes:
        prompt_ids: at least one token.
        adapter: digest of a registered adapter; None for the base by itself.
        tenant: who asks. Turns are fair over tenants, and what one left in the prefix cache no other reads.
        scored: what is wanted is the score that a reward model gives to the whole prompt, and no answer.
        grammar: what may come next, if not everything.
        ends: is told each drawn token; True ends the answer with it. It is called by the engine's thread.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: str | None = None
    tenant: str = ""
    scored: bool = False
    grammar: Grammar | None = None
    ends: Callable[[int], bool] | None = None


class Token(NamedTuple):
    """A token, its logprob in nats, and the likeliest at its place with theirs, best first. The logprob is nan where
    none was asked for."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Output(NamedTuple):
    """What a listener is told, in the order of the answer; the last one has a `finish_reason`.

    Attributes:
        tokens: since the last output.
        finish_reason: `stop`: a stop token, `ends` or the grammar; `length`: `max_tokens`, or the context is full.
        error: with `finish_reason` `error`: what went wrong.
        prompt_logprobs: in the first output, where asked for: None for the first token of the prompt.
        cached_tokens: in the first output: tokens of the prompt that came from the prefix cache.
        score: in the first output, where asked for: a reward model's.
    """

    tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    prompt_logprobs: tuple[Token | None, ...] | None = None
    cached_tokens: int = 0
    score: float | None = None


Listener = Callable[[Output], None]
"""Called by the thread that steps the engine: it must hand over and return."""


class QueueFull(InputError):
    """As many wait as may. Nothing was begun."""


@dataclass(slots=True, eq=False)
class Pending:
    """A request that was added: the handle to abort it by.

    Attributes:
        begun: the engine has begun to read its prompt.
    """

    request: Request
    listener: Listener
    aborted: bool = False
    begun: bool = False


class Stats(NamedTuple):
    """Of an engine, since it was made; for metrics.

    Attributes:
        waiting, running: requests now.
        steps: decode steps.
        prompt_tokens, cached_tokens, generated_tokens: in all; cached ones are counted among the prompt's.
        resident: adapters in memory.
    """

    waiting: int
    running: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    resident: int


class ServingEngine(Protocol):
    """Answers requests of any adapters on one base. `add`, `abort`, `register` and `unregister` may be called by any
    thread; `step` by one."""

    context: int
    """Tokens that a prompt and its answer may have together."""
    known: KnownAdapters
    """Adapters that may be asked for. Who has chosen one holds it until its request was added: meanwhile it may be
    unregistered, and is there for them all the same."""

    def register(self, folder: Path, expected: str = "") -> str:
        """Make an adapter known, see `align.models.known_adapters`. Returns its digest."""
        ...

    def unregister(self, digest: str) -> None:
        """Forget an adapter. Requests that were added before finish with it."""
        ...

    def check_queue(self, tenant: str) -> None:
        """Whether a request of a tenant may wait now: asked before anything is made of one.

        Raises:
            QueueFull: as many wait as may.
        """
        ...

    def add(self, request: Request, listener: Listener) -> Pending:
        """Have a request answered.

        Raises:
            QueueFull: as many wait as may.
            InputError: the prompt leaves no room for an answer, or the adapter is not registered.
        """
        ...

    def abort(self, pending: Pending) -> None:
        """End a request; its slot is free within two steps. Its listener hears of it, if it had not finished."""
        ...

    def step(self) -> bool:
        """Do a piece of work; whether any is left."""
        ...

    def give_up(self, error: Exception) -> None:
        """Fail every request: a step raised what no request is to blame for. Called by the thread that steps."""
        ...

    def sound(self) -> bool:
        """Whether it can still answer."""
        ...

    def stats(self) -> Stats: ...
