"""Engines that serve: requests and the tokens that answer them, their queue, the adapters that may be asked for, the
thread that steps an engine, and the draw of one token a row."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Lock, RLock, Thread
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from align.core.errors import AlignError, CorruptFile, InputError, NonFiniteLogits, require
from align.ops.philox import draw_tokens, draw_uniform_row
from align.run.weights import adapter_digest

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)
FinishReason = Literal["stop", "length", "abort", "error"]
NAN = float("nan")


class Grammar(Protocol):
    """The tokens that may come next in one answer. It belongs to one request, and changes with each token.

    Attributes:
        source: the same as llguidance's Lark, for engines that follow it by themselves; None if Lark cannot express it.
    """

    source: str | None

    def allowed(self) -> np.ndarray:
        """Return which tokens may come next [V], bool; at least one."""
        ...

    def accept(self, token: int) -> bool:
        """Take in the token that came. Returns whether the answer ends with it."""
        ...


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters by which one answer is drawn. The draw at a position is a function of the seed, the position and the
    distribution there.

    Attributes:
        max_tokens: of the answer, its stop token included; 0 if only the prompt's logprobs are wanted.
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
    """A request for one answer.

    Attributes:
        prompt_ids: at least one token.
        adapter: digest of a registered adapter; None for the base by itself.
        tenant: who asks. Turns are fair over tenants, and a tenant's prefixes are cached for itself alone.
        scored: what is wanted is the score that a reward model gives to the whole prompt, and no answer.
        grammar: what may come next, if not everything.
        ends: takes each drawn token; True ends the answer with it. It is called by the engine's thread.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: str | None = None
    tenant: str = ""
    scored: bool = False
    grammar: Grammar | None = None
    ends: Callable[[int], bool] | None = None


class Token(NamedTuple):
    """A token, its logprob in nats, and the likeliest at its place with theirs, best first. The logprob is nan if none
    was asked for."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Output(NamedTuple):
    """A piece of an answer as a listener gets it, in order; the last one has a `finish_reason`.

    Attributes:
        tokens: since the last output.
        finish_reason: `stop`: a stop token, `ends` or the grammar; `length`: `max_tokens`, or the context is full.
        error: with `finish_reason` `error`: what went wrong.
        prompt_logprobs: in the first output, if asked for: None for the first token of the prompt.
        cached_tokens: in the first output: tokens of the prompt that came from the prefix cache.
        score: in the first output, if asked for: a reward model's.
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
    """The queue is full. Nothing was begun."""


@dataclass(slots=True, eq=False)
class Completion:
    """A request that was added, and how far its answer is: the handle to abort it by.

    Attributes:
        is_aborted: it is no longer wanted; the engine ends it.
        has_begun: the engine has begun to read its prompt.
        has_read: the prompt has been read, and the listener has heard of it.
        length: tokens so far.
        finished: why the answer ended, once it has.
    """

    request: Request
    listener: Listener
    is_aborted: bool = False
    has_begun: bool = False
    has_read: bool = False
    length: int = 0
    finished: FinishReason | None = None
    _numbers: list[float] | None = None

    @property
    def number(self) -> float:
        """The uniform number for the next draw; 0 at temperature 0."""
        if self._numbers is None:  # an engine that draws by itself asks for none
            self._numbers = draw_numbers(self.request.sampling)
        return self._numbers[self.length] if self._numbers else 0.0

    def allowed(self) -> np.ndarray | None:
        """Return which tokens may come next; None for all. A grammar that fails ends its own request."""
        try:
            return None if self.request.grammar is None else self.request.grammar.allowed()
        except Exception as error:
            self.fail(error)
            return None

    def begin(
        self, prompt_logprobs: tuple[Token | None, ...] | None, cached_tokens: int = 0, score: float | None = None
    ) -> None:
        """Note that the prompt has been read."""
        self.has_read = True
        if score is not None and not math.isfinite(score):
            self.fail(NonFiniteLogits("the score is nan or infinite"))
            return
        ends = self.request.scored or self.request.sampling.max_tokens == 0
        self._tell(Output((), "length" if ends else None, None, prompt_logprobs, cached_tokens, score))

    def take(self, token: Token | None) -> None:
        """Take the next token; None if there was no distribution to draw from. What of the request's own fails on it
        ends the request."""
        if token is None:
            self.fail(NonFiniteLogits("the logits are nan or infinite"))
            return
        request = self.request
        self.length += 1
        ended = token.id in request.sampling.stop_ids
        try:
            if request.grammar is not None:
                ended |= request.grammar.accept(token.id)
            if request.ends is not None:
                ended |= request.ends(token.id)
        except Exception as error:
            self.fail(error)
            return
        is_full = self.length == request.sampling.max_tokens
        output = Output((token,), "stop" if ended else "length" if is_full else None)
        try:
            self._tell(output)
        except Exception as error:  # of the listener
            self.fail(error)

    def stop(self) -> None:
        """End it with the last token."""
        self._tell(Output((), "stop"))

    def abort(self) -> None:
        self._tell(Output((), "abort"))

    def fail(self, error: Exception) -> None:
        """End it by an error. What is no fault of the input is logged."""
        if not isinstance(error, AlignError | NonFiniteLogits):
            log.exception("a request failed", exc_info=error)
        self._tell(Output((), "error", error))

    def _tell(self, output: Output) -> None:
        if self.finished is None:
            self.finished = output.finish_reason
            self.listener(output)


class Stats(NamedTuple):
    """Counts of an engine since it was made, for metrics.

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


SHARE = 3


@dataclass(slots=True)
class Waiting:
    """Requests that wait for a slot, fair over tenants: first the tenant with the fewest running, then the one that was
    served longest ago.

    A tenant may have three times as many waiting as there is room left (dynamic thresholds: Choudhury and Hahne, 1998):
    one alone gets three quarters of the room, and there is always some for another.

    Attributes:
        room: how many may wait.
    """

    room: int
    queues: dict[str, deque[Completion]] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)
    turn: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.queues.values()))

    def check(self, tenant: str) -> None:
        """Raise QueueFull if as many of a tenant wait as may."""
        if len(self.queues.get(tenant, ())) >= SHARE * (self.room - len(self)):
            problem = f"{len(self)} requests wait already"
            raise QueueFull("queue", len(self), problem, "Try again in a moment, or raise stage.queue.")

    def put(self, completion: Completion) -> None:
        """Add a request. Raises QueueFull as `check` does."""
        self.check(completion.request.tenant)
        self.queues.setdefault(completion.request.tenant, deque()).append(completion)

    def take(self, running: Iterable[str], several: bool = True) -> Completion | None:
        """Take out the next one. Returns None if none may go.

        Args:
            running: the tenant of each request that is being answered.
            several: whether a tenant who has some running may have another.
        """
        if not self.queues:
            return None
        count = dict.fromkeys(self.queues, 0)
        for tenant in running:
            if tenant in count:
                count[tenant] += 1
        tenant = min(self.queues, key=lambda t: (count[t], self.turns.get(t, -1)))
        if count[tenant] and not several:
            return None
        taken = self.queues[tenant].popleft()
        self.turn += 1
        self.turns[tenant] = self.turn
        if not self.queues[tenant]:
            del self.queues[tenant]
        if len(self.turns) > 2 * len(self.queues) + 1024:  # tenants come and go; those who wait keep their turn
            self.turns = {t: n for t, n in self.turns.items() if t in self.queues}
        return taken

    def drop(self, completion: Completion) -> bool:
        """Take a request out. Returns whether it was there."""
        tenant = completion.request.tenant
        if completion not in self.queues.get(tenant, ()):
            return False
        self.queues[tenant].remove(completion)
        if not self.queues[tenant]:
            del self.queues[tenant]
        return True


@dataclass(slots=True)
class KnownAdapter:
    """Attributes:
    folders: where it lies; in several, if it has several names.
    held: requests that use it.
    registered: whether new requests may.
    """

    folders: list[Path]
    held: int = 0
    registered: bool = True


@dataclass(slots=True)
class KnownAdapters:
    """Adapters by the digest of their two files. One that is unregistered while requests use it is forgotten once they
    have finished. Safe to share between threads."""

    by_digest: dict[str, KnownAdapter] = field(default_factory=dict)
    lock: RLock = field(default_factory=RLock)

    def hold(self, digest: str) -> None:
        """Use an adapter until `release`. One that is held may be held by others too, also once it is unregistered.

        Raises:
            InputError: it is not registered, and not held.
        """
        with self.lock:
            if digest not in self.by_digest:
                raise unregistered(digest)
            self.by_digest[digest].held += 1

    def release(self, digest: str) -> None:
        with self.lock:
            self.by_digest[digest].held -= 1
            self._forget(digest)

    def folder(self, digest: str) -> Path:
        """Return where an adapter that is held lies.

        Raises:
            CorruptFile: its files are gone, or not those that were registered.
        """
        for folder in self.by_digest[digest].folders:
            if folder.is_dir() and adapter_digest(folder) == digest:
                return folder
        problem = "its files were changed after it was registered"
        raise CorruptFile("adapter", digest[:12], problem, "Load it again, so that the new weights get their name.")

    def __contains__(self, digest: str) -> bool:
        return digest in self.by_digest

    def _forget(self, digest: str) -> None:
        known = self.by_digest[digest]
        if not known.registered and known.held == 0:
            del self.by_digest[digest]


def unregistered(digest: str) -> InputError:
    return InputError("adapter", digest, "is not registered", "Load it first.")


class ServingEngine:
    """Answers requests of any adapters on one base. `step`, `give_up` and `stats` are an engine's own; its other
    methods may be called by any thread, `step` and `give_up` by one.

    Args:
        context: tokens of a prompt and its answer together, at most.
        queue: requests that may wait.
        reserve: slots that are kept for tenants who have none.

    Attributes:
        known: adapters that may be asked for. A request holds the one that it has chosen until it was added: one that
            is unregistered in the meantime stays there for it.
    """

    def __init__(self, context: int, queue: int, reserve: int = 0) -> None:
        self.context = context
        self.reserve = reserve
        self.known = KnownAdapters()
        self._waiting = Waiting(queue)
        self._lock = Lock()

    def register(self, folder: Path, expected: str = "") -> str:
        """Make the adapter in a folder known. Returns its digest.

        Args:
            expected: the digest that was read before, if one was.

        Raises:
            CorruptFile: its files have changed since.
        """
        digest = adapter_digest(folder)
        if expected not in ("", digest):
            problem = "its files were changed while it was loaded"
            raise CorruptFile("adapter", expected[:12], problem, "Load it again, once it is written whole.")
        with self.known.lock:
            known = self.known.by_digest.setdefault(digest, KnownAdapter([]))
            known.folders = [*(each for each in known.folders if each != folder), folder]
            known.registered = True
        return digest

    def unregister(self, digest: str) -> None:
        """Let no new request use an adapter. Requests that were added before finish with it.

        Raises:
            InputError: it is not registered.
        """
        with self.known.lock:
            known = self.known.by_digest.get(digest)
            if known is None or not known.registered:
                raise unregistered(digest)
            known.registered = False
            self.known._forget(digest)

    def check_queue(self, tenant: str) -> None:
        """Raise QueueFull if no request of a tenant may wait now: asked before anything is made of one."""
        with self._lock:
            self._waiting.check(tenant)

    def add(self, request: Request, listener: Listener) -> Completion:
        """Have a request answered.

        Raises:
            QueueFull: as many wait as may.
            InputError: the prompt leaves no room for an answer, or the adapter is not registered.
        """
        check_room(request, self.context)
        completion = Completion(request, listener)
        if request.adapter is not None:
            self.known.hold(request.adapter)
        try:
            with self._lock:
                self._waiting.put(completion)
        except AlignError:
            self._release(request)
            raise
        return completion

    def abort(self, completion: Completion) -> None:
        """End a request; its slot is free within two steps. Its listener hears of it, if it had not finished."""
        completion.is_aborted = True
        with self._lock:
            was_waiting = self._waiting.drop(completion)
        if was_waiting:
            self._release(completion.request)
            completion.abort()

    def step(self) -> bool:
        """Do a piece of work. Returns whether any is left."""
        raise NotImplementedError

    def stats(self) -> Stats:
        raise NotImplementedError

    def give_up(self, error: Exception) -> None:
        """Fail every request: a step raised what no request is to blame for."""
        with self._lock:
            waiting = [completion for queue in self._waiting.queues.values() for completion in queue]
            self._waiting.queues.clear()
        for completion in waiting:
            self._release(completion.request)
            completion.fail(error)

    def is_sound(self) -> bool:
        """Return whether it can still answer."""
        return True

    def _next(self, running: Iterable[str], free: int) -> Completion | None:
        """Take out the request whose turn it is, see `Waiting.take`.

        Args:
            free: slots. The last ones, `reserve`, are for tenants who have none.
        """
        with self._lock:
            return self._waiting.take(running, free > self.reserve)

    def _release(self, request: Request) -> None:
        """Say that a request is done with its adapter."""
        if request.adapter is not None:
            self.known.release(request.adapter)


def check_room(request: Request, context: int) -> None:
    """Raise InputError if the prompt leaves no room for an answer of `max_tokens`."""
    require(bool(request.prompt_ids), "prompt", "", "has no tokens", "Write something.")
    asked = len(request.prompt_ids) + request.sampling.max_tokens
    problem = f"with a prompt of {len(request.prompt_ids)} tokens it is {asked - context} over the context of {context}"
    remedy = "Shorten the prompt, or lower max_tokens."
    require(asked <= context, "max_tokens", request.sampling.max_tokens, problem, remedy)


class EngineThread:
    """Steps an engine while there is work. Safe to use from any thread.

    Args:
        engine: stepped by no other.
    """

    def __init__(self, engine: ServingEngine) -> None:
        self.engine = engine
        self._changed = Condition()
        self._closing = False
        self._work = False
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.engine.is_sound()

    @property
    def cpu_s(self) -> float:
        """Processor time of the thread so far, in seconds; 0 once it has ended."""
        if self._thread.ident is None or not self.alive:
            return 0.0
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def add(self, request: Request, listener: Listener) -> Completion:
        """Have a request answered, see `ServingEngine.add`. The listener is called by the engine's thread."""
        completion = self.engine.add(request, listener)
        self._wake()
        return completion

    def abort(self, completion: Completion) -> None:
        self.engine.abort(completion)
        self._wake()

    def close(self, within_s: float) -> bool:
        """Finish what was added, or what of it can be finished in time. Returns whether all was."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _wake(self) -> None:
        with self._changed:
            self._work = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._work or self._closing):
                    self._changed.wait()
                self._work = False
            try:
                more = self.engine.step()
            except Exception as error:  # a fault of ours; the next requests may fare better
                log.exception("the engine failed")
                self.engine.give_up(error)
                more = False
            if more:
                self._work = True
            elif self._closing and not self._work:
                return


def draw_numbers(sampling: SamplingParams) -> list[float]:
    """Return the uniform number of each position of an answer; none at temperature 0."""
    if sampling.temperature == 0:
        return []
    return draw_uniform_row(sampling.seed, sampling.max_tokens)


def next_tokens(
    logits_BV: Tensor,
    settings: Sequence[SamplingParams],
    numbers: Sequence[float],
    allowed: Sequence[np.ndarray | None],
) -> list[Token | None]:
    """The next token of each row; None where its logits are nan or infinite.

    Rows do not see each other: each step below is taken along a row, or by a row alone.

    Args:
        logits_BV: fp32.
        numbers: in [0, 1), one a row; of a row at temperature 0 it is not looked at.
        allowed: which tokens may come, a row [V]; None for all.
    """
    finite = logits_BV.isfinite().all(-1).tolist()
    masked = logits_BV
    if any(each is not None for each in allowed):
        masked = logits_BV.clone()
        for row, each in enumerate(allowed):
            if each is not None:
                masked[row, ~torch.from_numpy(each)] = float("-inf")
    ids = masked.argmax(-1)
    rows = [row for row, each in enumerate(settings) if each.temperature > 0 and finite[row]]
    if rows:
        at = torch.tensor(rows)
        scale = torch.tensor([settings[row].temperature for row in rows])[:, None]
        chances_BV = ((masked if len(rows) == len(masked) else masked[at]) / scale).softmax(-1)
        for place, row in enumerate(rows):
            if settings[row].top_p < 1:
                chances_BV[place] = nucleus(chances_BV[place], settings[row].top_p)
        ids[at] = draw_tokens(chances_BV, torch.tensor([numbers[row] for row in rows], dtype=torch.double))
    tokens: list[Token | None] = []
    for row, (id, each) in enumerate(zip(ids.tolist(), settings, strict=True)):
        if not finite[row]:
            tokens.append(None)
        elif each.logprobs is None:
            tokens.append(Token(id, NAN))
        else:
            logits_V = masked[row] / (each.temperature or 1.0) if each.processed_logprobs else logits_BV[row]
            tokens.append(with_logprobs(id, logits_V.log_softmax(-1), each.logprobs))
    return tokens


def nucleus(chances_V: Tensor, top_p: float) -> Tensor:
    """Nought but for the likeliest tokens whose chances add up to `top_p`: the smallest such set, ties by their
    place in the vocabulary (Holtzman et al., 2020)."""
    best, order = chances_V.sort(descending=True, stable=True)
    before = best.double().cumsum(0) - best
    return chances_V.index_fill(0, order[before >= top_p], 0.0)


def with_logprobs(id: int, logprobs_V: Tensor, number: int) -> Token:
    """Return a token with its logprob and the likeliest so many at its place."""
    best, where = logprobs_V.topk(number) if number else (logprobs_V[:0], logprobs_V[:0])
    top = tuple(zip((int(i) for i in where.tolist()), best.tolist(), strict=True))
    return Token(id, float(logprobs_V[id]), top)


def prompt_tokens(logits_NV: Tensor, ids_N: Sequence[int], number: int) -> list[Token]:
    """The prompt's tokens under what was predicted at the place before each.

    Args:
        logits_NV: at those places.
        number: of alternatives.
    """
    logprobs = logits_NV.log_softmax(-1)
    return [with_logprobs(id, row, number) for id, row in zip(ids_N, logprobs, strict=True)]
