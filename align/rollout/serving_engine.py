"""The interface of serving engines, with their request queue, adapters, thread and token sampling."""

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
    """The decoding state of one answer under a grammar, which masks the tokens that may come next.

    Attributes:
        source: the grammar in llguidance's Lark, for external engines; None if Lark cannot express it.
    """

    source: str | None

    def compute_mask(self) -> np.ndarray:
        """Return a bool mask [V] of the tokens that may come next, at least one."""
        ...

    def accept(self, token: int) -> bool:
        """Advance the state by a sampled token, and return whether the answer ends with it."""
        ...


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The sampling parameters of one answer: token limit, temperature, top-p, seed, stop tokens and logprobs.

    The token at a position is a function of the seed, the position and the distribution there.

    Attributes:
        max_tokens: maximum tokens of the answer including its stop token; 0 to get the prompt's logprobs only.
        temperature: divisor of the logits; 0 is greedy decoding.
        top_p: sample from the likeliest tokens whose probabilities add up to this (Holtzman et al., 2020).
        seed: int64.
        stop_ids: tokens that end the answer, which includes them.
        logprobs: number of alternatives returned with each token's logprob; None for no logprobs.
        prompt_logprobs: the same for the prompt's tokens, given the previous tokens.
        processed_logprobs: whether logprobs are of the distribution that is sampled from, with temperature; otherwise
            they are the model's own, at temperature 1.
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
    """A request to an engine for one answer to a prompt, or for a reward model's score of it.

    Attributes:
        prompt_ids: token ids, at least one.
        adapter: digest of a registered adapter; None for the base alone.
        tenant: name of the tenant. Slots are shared fairly between tenants, and prefixes are cached for each tenant.
        scored: whether the request asks for a reward model's score of the prompt, and no answer.
        grammar: constraint of the answer; None for a free answer.
        ends: called with each sampled token by the engine's thread; returns True to end the answer with it.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    adapter: str | None = None
    tenant: str = ""
    scored: bool = False
    grammar: Grammar | None = None
    ends: Callable[[int], bool] | None = None


class Token(NamedTuple):
    """A token id, its logprob in nats, and the likeliest tokens at its position as (id, logprob), best first.

    The logprob is nan if logprobs were not requested.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Output(NamedTuple):
    """New tokens of an answer, which the engine passes to the request's listener.

    The last output has a `finish_reason`.

    Attributes:
        tokens: new tokens since the last output.
        finish_reason: `stop` for a stop token, `ends` or the grammar; `length` for `max_tokens` or a full context.
        error: the exception, if `finish_reason` is `error`.
        prompt_logprobs: in the first output, if requested; None for the first token of the prompt.
        cached_tokens: in the first output, tokens of the prompt that came from the prefix cache.
        score: in the first output, a reward model's score, if requested.
    """

    tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    prompt_logprobs: tuple[Token | None, ...] | None = None
    cached_tokens: int = 0
    score: float | None = None


Listener = Callable[[Output], None]
"""Function that the engine's thread calls with each new output of an answer. It must not block."""


class QueueFull(InputError):
    """An error for a request that was not added because the engine's queue is full."""


@dataclass(slots=True, eq=False)
class Completion:
    """A request in the engine's queue or batch, with the progress of its answer.

    Attributes:
        is_aborted: whether it was aborted; the engine ends it at its next step.
        has_begun: whether the engine has started to process its prompt.
        has_read: whether the prompt was processed, and the first output sent.
        length: number of tokens so far.
        finished: the reason why the answer ended; None until then.
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
        """The uniform random number in [0, 1) that the next token is sampled with; 0 at temperature 0."""
        if self._numbers is None:  # computed lazily: external engines need none
            self._numbers = draw_uniform_numbers(self.request.sampling)
        return self._numbers[self.length] if self._numbers else 0.0

    def compute_mask(self) -> np.ndarray | None:
        """Return a bool mask of the tokens that the request's grammar allows next, or None if it has no grammar.

        Also returns None if the grammar failed, which ends the request with its error.
        """
        try:
            return None if self.request.grammar is None else self.request.grammar.compute_mask()
        except Exception as error:
            self.fail(error)
            return None

    def begin(
        self, prompt_logprobs: tuple[Token | None, ...] | None, cached_tokens: int = 0, score: float | None = None
    ) -> None:
        """Send the answer's first output to the listener, once the prompt was processed.

        It is the last one of a request for a score or for prompt logprobs only.
        """
        self.has_read = True
        if score is not None and not math.isfinite(score):
            self.fail(NonFiniteLogits("the score is nan or infinite"))
            return
        ends = self.request.scored or self.request.sampling.max_tokens == 0
        self._send(Output((), "length" if ends else None, None, prompt_logprobs, cached_tokens, score))

    def take(self, token: Token | None) -> None:
        """Add the next token to the answer, end the answer if it is the last one, and send it to the listener.

        A token of None means that its logits were not finite. An exception in the request's grammar, `ends` or listener
        ends the request.
        """
        if token is None:
            self.fail(NonFiniteLogits("the logits are nan or infinite"))
            return
        request = self.request
        self.length += 1
        is_last = token.id in request.sampling.stop_ids
        try:
            if request.grammar is not None:
                is_last |= request.grammar.accept(token.id)
            if request.ends is not None:
                is_last |= request.ends(token.id)
        except Exception as error:
            self.fail(error)
            return
        is_full = self.length == request.sampling.max_tokens
        output = Output((token,), "stop" if is_last else "length" if is_full else None)
        try:
            self._send(output)
        except Exception as error:  # raised by the listener
            self.fail(error)

    def stop(self) -> None:
        """End the answer after the last token that was added, with the finish reason `stop`."""
        self._send(Output((), "stop"))

    def abort(self) -> None:
        self._send(Output((), "abort"))

    def fail(self, error: Exception) -> None:
        """End the answer with an error, which is sent to the listener.

        An error that the input did not cause is logged.
        """
        if not isinstance(error, AlignError | NonFiniteLogits):
            log.exception("a request failed", exc_info=error)
        self._send(Output((), "error", error))

    def _send(self, output: Output) -> None:
        if self.finished is None:
            self.finished = output.finish_reason
            self.listener(output)


class Stats(NamedTuple):
    """An engine's counts of requests, steps and tokens since its start, for metrics.

    Attributes:
        waiting, running: present number of requests.
        steps: decode steps.
        prompt_tokens, cached_tokens, generated_tokens: total tokens; prompt tokens include the cached ones.
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
class RequestQueue:
    """A queue of requests that wait for a slot, fair between tenants.

    Next is the tenant with the fewest running requests, and among equal ones the one that was served longest ago.

    A tenant may have three times as many waiting requests as there is room left (dynamic thresholds: Choudhury and
    Hahne, 1998): a single tenant gets three quarters of the room, and there is always some left for another.

    Attributes:
        room: maximum waiting requests.
        queues: tenant → its waiting requests.
        turns: tenant → number of its last turn.
        turn: number of the last turn of any tenant.
    """

    room: int
    queues: dict[str, deque[Completion]] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)
    turn: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.queues.values()))

    def require_room(self, tenant: str) -> None:
        """Raise QueueFull if a tenant has as many waiting requests as it may have at present."""
        if len(self.queues.get(tenant, ())) >= SHARE * (self.room - len(self)):
            problem = f"{len(self)} requests wait already"
            raise QueueFull("queue", len(self), problem, "Try again in a moment, or raise stage.queue.")

    def add(self, completion: Completion) -> None:
        """Append a request to its tenant's queue, or raise QueueFull as `require_room` does."""
        self.require_room(completion.request.tenant)
        self.queues.setdefault(completion.request.tenant, deque()).append(completion)

    def take(self, running: Iterable[str], allow_second_request: bool = True) -> Completion | None:
        """Remove and return the next waiting request, or None if the queue is empty or no request may run.

        Args:
            running: the tenant of each running request.
            allow_second_request: whether a tenant with a running request may get another.
        """
        if not self.queues:
            return None
        count = dict.fromkeys(self.queues, 0)
        for tenant in running:
            if tenant in count:
                count[tenant] += 1
        tenant = min(self.queues, key=lambda t: (count[t], self.turns.get(t, -1)))
        if count[tenant] and not allow_second_request:
            return None
        completion = self.queues[tenant].popleft()
        self.turn += 1
        self.turns[tenant] = self.turn
        if not self.queues[tenant]:
            del self.queues[tenant]
        if (
            len(self.turns) > 2 * len(self.queues) + 1024
        ):  # forget tenants that are not waiting, so that the table is bounded
            self.turns = {t: n for t, n in self.turns.items() if t in self.queues}
        return completion

    def remove(self, completion: Completion) -> bool:
        """Remove a request from the queue, and return whether it was in the queue."""
        tenant = completion.request.tenant
        if completion not in self.queues.get(tenant, ()):
            return False
        self.queues[tenant].remove(completion)
        if not self.queues[tenant]:
            del self.queues[tenant]
        return True


@dataclass(slots=True)
class RegisteredAdapter:
    """An adapter that requests may use, with its folders and the number of requests that use it.

    Attributes:
        folders: folders that hold these weights; several, if the adapter has several names.
        held: number of requests that use it.
        registered: whether new requests may use it.
    """

    folders: list[Path]
    held: int = 0
    registered: bool = True


@dataclass(slots=True)
class AdapterRegistry:
    """A reference-counted table of the adapters that requests may use, by the digest of their two files.

    An adapter that is unregistered while requests use it is removed when they have finished. Threads may share the
    object.
    """

    by_digest: dict[str, RegisteredAdapter] = field(default_factory=dict)
    lock: RLock = field(default_factory=RLock)

    def hold(self, digest: str) -> None:
        """Add a use to an adapter, which keeps it available until `release`, or raise InputError if it is unknown.

        An adapter in use can be held again even if it was unregistered.

        Raises:
            InputError: it is neither registered nor in use.
        """
        with self.lock:
            if digest not in self.by_digest:
                raise not_registered_error(digest)
            self.by_digest[digest].held += 1

    def release(self, digest: str) -> None:
        with self.lock:
            self.by_digest[digest].held -= 1
            self._forget(digest)

    def folder(self, digest: str) -> Path:
        """Return a folder that still holds an adapter's weights unchanged, or raise CorruptFile if no folder does.

        Raises:
            CorruptFile: its files are missing, or were changed since it was registered.
        """
        for folder in self.by_digest[digest].folders:
            if folder.is_dir() and adapter_digest(folder) == digest:
                return folder
        problem = "its files were changed after it was registered"
        raise CorruptFile("adapter", digest[:12], problem, "Load it again, so that the new weights get their name.")

    def __contains__(self, digest: str) -> bool:
        return digest in self.by_digest

    def _forget(self, digest: str) -> None:
        adapter = self.by_digest[digest]
        if not adapter.registered and adapter.held == 0:
            del self.by_digest[digest]


def not_registered_error(digest: str) -> InputError:
    return InputError("adapter", digest, "is not registered", "Load it first.")


class ServingEngine:
    """The base class of engines that answer requests for any adapters on one base model.

    Subclasses define `step`, `give_up` and `stats`. `step` and `give_up` must be called by one thread; any thread may
    call the other methods.

    Args:
        context: maximum tokens of a prompt and its answer together.
        queue: maximum waiting requests.
        reserve: slots that are kept for tenants without a running request.

    Attributes:
        known: the registered adapters. A caller holds the adapter that it has chosen until its request was added, so
            that it stays available if it is unregistered in between.
    """

    def __init__(self, context: int, queue: int, reserve: int = 0) -> None:
        self.context = context
        self.reserve = reserve
        self.known = AdapterRegistry()
        self._waiting = RequestQueue(queue)
        self._lock = Lock()

    def register(self, folder: Path, expected: str = "") -> str:
        """Let requests use the adapter in a folder, and return its digest.

        Args:
            expected: digest that the files had before; empty to accept any.

        Raises:
            CorruptFile: the files have another digest.
        """
        digest = adapter_digest(folder)
        if expected not in ("", digest):
            problem = "its files were changed while it was loaded"
            raise CorruptFile("adapter", expected[:12], problem, "Load it again, once it is written whole.")
        with self.known.lock:
            adapter = self.known.by_digest.setdefault(digest, RegisteredAdapter([]))
            adapter.folders = [*(each for each in adapter.folders if each != folder), folder]
            adapter.registered = True
        return digest

    def unregister(self, digest: str) -> None:
        """Refuse new requests for an adapter from now on. Requests that were added before still use it.

        Raises:
            InputError: it is not registered.
        """
        with self.known.lock:
            adapter = self.known.by_digest.get(digest)
            if adapter is None or not adapter.registered:
                raise not_registered_error(digest)
            adapter.registered = False
            self.known._forget(digest)

    def require_queue_room(self, tenant: str) -> None:
        """Raise QueueFull if the queue has no room for another request of a tenant.

        Callers check it before they read a request.
        """
        with self._lock:
            self._waiting.require_room(tenant)

    def add(self, request: Request, listener: Listener) -> Completion:
        """Add a request to the queue, and return its Completion, which can be passed to `abort`.

        Args:
            listener: called with each output.

        Raises:
            QueueFull: the queue is full.
            InputError: the prompt leaves no room for an answer, or the adapter is not registered.
        """
        require_context_room(request, self.context)
        completion = Completion(request, listener)
        if request.adapter is not None:
            self.known.hold(request.adapter)
        try:
            with self._lock:
                self._waiting.add(completion)
        except AlignError:
            self._release(request)
            raise
        return completion

    def abort(self, completion: Completion) -> None:
        """Abort a waiting or running request, whose slot is free within two steps.

        The listener is called unless the request had finished already.
        """
        completion.is_aborted = True
        with self._lock:
            was_waiting = self._waiting.remove(completion)
        if was_waiting:
            self._release(completion.request)
            completion.abort()

    def step(self) -> bool:
        """Do one step of work, such as a token of each running answer, and return whether there is more work."""
        raise NotImplementedError

    def stats(self) -> Stats:
        raise NotImplementedError

    def give_up(self, error: Exception) -> None:
        """End all waiting and running requests with an error that no single request caused."""
        with self._lock:
            waiting = [completion for queue in self._waiting.queues.values() for completion in queue]
            self._waiting.queues.clear()
        for completion in waiting:
            self._release(completion.request)
            completion.fail(error)

    def is_sound(self) -> bool:
        """Return whether the engine can still answer requests: True unless a subclass finds a failure."""
        return True

    def _pop_next_request(self, running: Iterable[str], free: int) -> Completion | None:
        """Remove and return the next waiting request, or None if none may run, see `RequestQueue.take`.

        Args:
            running: the tenant of each running request.
            free: free slots. The last `reserve` of them are for tenants without a running request.
        """
        with self._lock:
            return self._waiting.take(running, free > self.reserve)

    def _release(self, request: Request) -> None:
        """Remove a finished request's use of its adapter, if it has one."""
        if request.adapter is not None:
            self.known.release(request.adapter)


def require_context_room(request: Request, context: int) -> None:
    """Raise InputError if a prompt is empty, or if it and `max_tokens` do not fit into `context` tokens."""
    require(bool(request.prompt_ids), "prompt", "", "has no tokens", "Write something.")
    total = len(request.prompt_ids) + request.sampling.max_tokens
    problem = f"with a prompt of {len(request.prompt_ids)} tokens it is {total - context} over the context of {context}"
    remedy = "Shorten the prompt, or lower max_tokens."
    require(total <= context, "max_tokens", request.sampling.max_tokens, problem, remedy)


class EngineThread:
    """A thread that steps a serving engine while there are requests. Any thread may call its methods.

    Args:
        engine: an engine that nothing else steps.
    """

    def __init__(self, engine: ServingEngine) -> None:
        self.engine = engine
        self._changed = Condition()
        self._closing = False
        self._has_work = False
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.engine.is_sound()

    @property
    def cpu_s(self) -> float:
        """CPU time of the engine's thread in seconds; 0 after it has ended."""
        if self._thread.ident is None or not self.alive:
            return 0.0
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def add(self, request: Request, listener: Listener) -> Completion:
        """Add a request to the engine's queue and wake its thread, see `ServingEngine.add`.

        The engine's thread calls the listener.
        """
        completion = self.engine.add(request, listener)
        self._wake()
        return completion

    def abort(self, completion: Completion) -> None:
        self.engine.abort(completion)
        self._wake()

    def close(self, within_s: float) -> bool:
        """Stop the thread once all added requests have finished, or return False after `within_s` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _wake(self) -> None:
        with self._changed:
            self._has_work = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._has_work or self._closing):
                    self._changed.wait()
                self._has_work = False
            try:
                has_more = self.engine.step()
            except Exception as error:  # an internal error; later requests may still succeed
                log.exception("the engine failed")
                self.engine.give_up(error)
                has_more = False
            if has_more:
                self._has_work = True
            elif self._closing and not self._has_work:
                return


def draw_uniform_numbers(sampling: SamplingParams) -> list[float]:
    """Return the uniform random number for each token of an answer by its seed, or [] at temperature 0."""
    if sampling.temperature == 0:
        return []
    return draw_uniform_row(sampling.seed, sampling.max_tokens)


def sample_tokens(
    logits_BV: Tensor,
    settings: Sequence[SamplingParams],
    numbers: Sequence[float],
    allowed: Sequence[np.ndarray | None],
) -> list[Token | None]:
    """Sample the next token of each row from its logits, None for a row whose logits are not finite.

    A row's token does not depend on the other rows: each operation works along a row, or on a single row.

    Args:
        logits_BV: fp32.
        settings: sampling parameters of each row.
        numbers: uniform random number in [0, 1) of each row; ignored at temperature 0.
        allowed: bool mask [V] of the tokens that may come next in each row; None for all.
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
                chances_BV[place] = zero_outside_nucleus(chances_BV[place], settings[row].top_p)
        ids[at] = draw_tokens(chances_BV, torch.tensor([numbers[row] for row in rows], dtype=torch.double))
    tokens: list[Token | None] = []
    for row, (id, each) in enumerate(zip(ids.tolist(), settings, strict=True)):
        if not finite[row]:
            tokens.append(None)
        elif each.logprobs is None:
            tokens.append(Token(id, NAN))
        else:
            logits_V = masked[row] / (each.temperature or 1.0) if each.processed_logprobs else logits_BV[row]
            tokens.append(build_token(id, logits_V.log_softmax(-1), each.logprobs))
    return tokens


def zero_outside_nucleus(chances_V: Tensor, top_p: float) -> Tensor:
    """Return a row's probabilities with 0 outside its nucleus, the likeliest tokens that add up to `top_p`.

    Of equally likely tokens the lower id comes first (Holtzman et al., 2020).
    """
    best, order = chances_V.sort(descending=True, stable=True)
    before = best.double().cumsum(0) - best
    return chances_V.index_fill(0, order[before >= top_p], 0.0)


def build_token(id: int, logprobs_V: Tensor, number: int) -> Token:
    """Build a Token with its logprob and the `number` likeliest tokens at its position, from a row of logprobs."""
    best, where = logprobs_V.topk(number) if number else (logprobs_V[:0], logprobs_V[:0])
    top = tuple(zip((int(i) for i in where.tolist()), best.tolist(), strict=True))
    return Token(id, float(logprobs_V[id]), top)


def score_prompt_tokens(logits_NV: Tensor, ids_N: Sequence[int], number: int) -> list[Token]:
    """Return a prompt's tokens with their logprobs given the previous tokens, and `number` alternatives for each.

    Args:
        logits_NV: logits at the position before each token.
        ids_N: the tokens.
        number: number of alternatives.
    """
    logprobs = logits_NV.log_softmax(-1)
    return [build_token(id, row, number) for id, row in zip(ids_N, logprobs, strict=True)]
