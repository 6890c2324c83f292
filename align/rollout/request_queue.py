"""Requests to a serving engine: they come in from any thread, wait for their turn, and are answered by the thread that
steps the engine."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Lock, Thread
from typing import TYPE_CHECKING

from align.core.errors import AlignError, NotFinite, require
from align.models.known_adapters import KnownAdapters
from align.rollout.requests import FinishReason, Listener, Output, Pending, QueueFull, Request, ServingEngine, Token
from align.rollout.sampling import drawn_numbers

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Answer:
    """Attributes:
    pending: what is answered.
    read: the prompt has been read, and the listener was told.
    made: tokens so far.
    finished: why the answer ended, once it has.
    """

    pending: Pending
    read: bool = False
    made: int = 0
    finished: FinishReason | None = None
    _numbers: list[float] | None = None

    @property
    def number(self) -> float:
        """The uniform number for the next draw; 0 at temperature 0."""
        if self._numbers is None:  # an engine that draws by itself asks for none
            self._numbers = drawn_numbers(self.pending.request.sampling)
        return self._numbers[self.made] if self._numbers else 0.0

    def allowed(self) -> np.ndarray | None:
        grammar = self.pending.request.grammar
        return None if grammar is None else grammar.allowed()

    def begin(
        self, prompt_logprobs: tuple[Token | None, ...] | None, cached_tokens: int, score: float | None = None
    ) -> None:
        """The prompt has been read."""
        self.read = True
        if score is not None and not math.isfinite(score):
            self.fail(NotFinite("the score is nan or infinite"))
            return
        ends = self.pending.request.scored or self.pending.request.sampling.max_tokens == 0
        self._tell(Output((), "length" if ends else None, None, prompt_logprobs, cached_tokens, score))

    def take(self, token: Token | None) -> None:
        """The next token; None where there was no distribution to draw from."""
        if token is None:
            self.fail(NotFinite("the logits are nan or infinite"))
            return
        request, self.made = self.pending.request, self.made + 1
        ended = token.id in request.sampling.stop_ids
        if request.grammar is not None:
            ended |= request.grammar.accept(token.id)
        if request.ends is not None:
            ended |= request.ends(token.id)
        reason: FinishReason | None = "stop" if ended else None
        if not ended and self.made == request.sampling.max_tokens:
            reason = "length"
        self._tell(Output((token,), reason))

    def stop(self) -> None:
        """It has ended with the last token."""
        self._tell(Output((), "stop"))

    def abort(self) -> None:
        self._tell(Output((), "abort"))

    def fail(self, error: Exception) -> None:
        """It cannot go on. What is no fault of the input is logged."""
        if not isinstance(error, AlignError | NotFinite):
            log.exception("a request failed", exc_info=error)
        self._tell(Output((), "error", error))

    def _tell(self, output: Output) -> None:
        if self.finished is None:
            self.finished = output.finish_reason
            self.pending.listener(output)


SHARE = 3


@dataclass(slots=True)
class Waiting:
    """Requests that wait for a slot, fair over tenants: whoever has the fewest running goes first, then whoever was
    served longest ago.

    A tenant may have three times as many waiting as there is room left (dynamic thresholds: Choudhury and Hahne, 1998):
    one alone gets three quarters of the room, and there is always some for another.

    Attributes:
        room: how many may wait.
    """

    room: int
    queues: dict[str, deque[Pending]] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)
    turn: int = 0

    def __len__(self) -> int:
        return sum(map(len, self.queues.values()))

    def check(self, tenant: str) -> None:
        """Raises: QueueFull: as many of a tenant wait as may."""
        if len(self.queues.get(tenant, ())) >= SHARE * (self.room - len(self)):
            problem = f"{len(self)} requests wait already"
            raise QueueFull("queue", len(self), problem, "Try again in a moment, or raise stage.queue.")

    def put(self, pending: Pending) -> None:
        """Raises: QueueFull."""
        self.check(pending.request.tenant)
        self.queues.setdefault(pending.request.tenant, deque()).append(pending)

    def take(self, running: Iterable[str], several: bool = True) -> Pending | None:
        """Take out the next one. Returns None if nobody may go.

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
        if len(self.turns) > 2 * len(self.queues) + 1024:  # tenants come and go; who waits keeps their turn
            self.turns = {t: n for t, n in self.turns.items() if t in self.queues}
        return taken

    def drop(self, pending: Pending) -> bool:
        """Take a request out; whether it was there."""
        queue = self.queues.get(pending.request.tenant, ())
        if pending not in queue:
            return False
        self.queues[pending.request.tenant].remove(pending)
        if not self.queues[pending.request.tenant]:
            del self.queues[pending.request.tenant]
        return True

    def clear(self) -> list[Pending]:
        """Take all of them out."""
        taken = [pending for queue in self.queues.values() for pending in queue]
        self.queues.clear()
        return taken


class RequestQueue:
    """The part of `align.rollout.requests.ServingEngine` that any thread may call.

    Args:
        context: tokens of a prompt and its answer together, at most.
        queue: requests that may wait.
        reserve: slots that are kept for tenants who have none.
    """

    def __init__(self, context: int, queue: int, reserve: int = 0) -> None:
        self.context = context
        self.reserve = reserve
        self.known = KnownAdapters()
        self._waiting = Waiting(queue)
        self._lock = Lock()

    def register(self, folder: Path, expected: str = "") -> str:
        return self.known.register(folder, expected)

    def unregister(self, digest: str) -> None:
        self.known.unregister(digest)

    def check_queue(self, tenant: str) -> None:
        with self._lock:
            self._waiting.check(tenant)

    def add(self, request: Request, listener: Listener) -> Pending:
        check_room(request, self.context)
        pending = Pending(request, listener)
        if request.adapter is not None:
            self.known.hold(request.adapter)
        try:
            with self._lock:
                self._waiting.put(pending)
        except AlignError:
            self._release(request)
            raise
        return pending

    def abort(self, pending: Pending) -> None:
        pending.aborted = True
        with self._lock:
            was_waiting = self._waiting.drop(pending)
        if was_waiting:
            self._release(pending.request)
            Answer(pending).abort()

    def give_up(self, error: Exception) -> None:
        with self._lock:
            waiting = self._waiting.clear()
        for pending in waiting:
            self._release(pending.request)
            Answer(pending).fail(error)

    def sound(self) -> bool:
        return True

    def _next(self, running: Iterable[str], free: int) -> Pending | None:
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
    """Raises: InputError: the prompt leaves no room for an answer of `max_tokens`."""
    require(bool(request.prompt_ids), "prompt", "", "has no tokens", "Write something.")
    asked = len(request.prompt_ids) + request.sampling.max_tokens
    require(
        asked <= context, "max_tokens", request.sampling.max_tokens,
        f"with a prompt of {len(request.prompt_ids)} tokens it is {asked - context} over the context of {context}",
        "Shorten the prompt, or lower max_tokens.",
    )  # fmt: skip


class EngineThread:
    """Steps an engine while there is work. Safe to use from any thread.

    Args:
        engine: nobody else steps it.
    """

    def __init__(self, engine: ServingEngine) -> None:
        self.engine = engine
        self._changed = Condition()
        self._closing, self._work = False, False
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.engine.sound()

    @property
    def cpu_s(self) -> float:
        """Processor time of the thread so far, in seconds; 0 where it has ended."""
        if self._thread.ident is None or not self.alive:
            return 0.0
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def add(self, request: Request, listener: Listener) -> Pending:
        """See `ServingEngine.add`. The listener is called by the engine's thread."""
        pending = self.engine.add(request, listener)
        self._wake()
        return pending

    def abort(self, pending: Pending) -> None:
        self.engine.abort(pending)
        self._wake()

    def close(self, within_s: float) -> bool:
        """Finish what was added, or what of it can be finished in time. Whether all was."""
        until = time.monotonic() + within_s
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(max(0.0, until - time.monotonic()))
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
            except Exception as error:  # a fault of ours; who comes next may fare better
                log.exception("the engine failed")
                self.engine.give_up(error)
                more = False
            if more:
                self._work = True
            elif self._closing and not self._work:
                return
