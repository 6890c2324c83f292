"""What every engine that serves does before it answers: requests come in from any thread, hold their adapters, and
wait for their turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from align.core.errors import AlignError, require
from align.models.known_adapters import KnownAdapters
from align.rollout.answer import Answer
from align.rollout.requests import Listener, Pending, QueueFull, Request

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

    def take(self, running: Iterable[str], may: Callable[[int], bool] = lambda number: True) -> Pending | None:
        """The next one; None where nobody may go.

        Args:
            running: the tenant of each request that is being answered.
            may: whether a tenant with so many running may have another.
        """
        if not self.queues:
            return None
        count = dict.fromkeys(self.queues, 0)
        for tenant in running:
            if tenant in count:
                count[tenant] += 1
        tenant = min(self.queues, key=lambda t: (count[t], self.turns.get(t, -1)))
        if not may(count[tenant]):
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


class Intake:
    """The part of `align.rollout.requests.ServingEngine` that any thread may call.

    Args:
        context: tokens of a prompt and its answer together, at most.
        queue: requests that may wait.
    """

    def __init__(self, context: int, queue: int) -> None:
        self.context, self.known = context, KnownAdapters()
        self._waiting, self._lock = Waiting(queue), Lock()

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
            waited = self._waiting.drop(pending)
        if waited:
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

    def _next(
        self, running: Iterable[str] = (), may: Callable[[int], bool] = lambda number: True
    ) -> Pending | None:  # fmt: skip
        """Whose turn it is, see `Waiting.take`."""
        with self._lock:
            return self._waiting.take(running, may)

    def _release(self, request: Request) -> None:
        """A request is done with its adapter."""
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
