"""Clients in a closed loop: each asks anew as soon as it was answered; and what they saw."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from common import FIRST_ID, LAST_ID, quantile

from align.rollout.continuous import ContinuousBatch
from align.rollout.serving_engine import Output, Request, SamplingParams

PROMPT, ANSWER = (10, 60), (20, 60)
"""Tokens, from and below."""


class Asked(NamedTuple):
    """One request; `adapter` is the number of one, None for the base."""

    ids: tuple[int, ...]
    new: int
    seed: int
    adapter: int | None


class Event(NamedTuple):
    """Tokens that came to a client at a time."""

    client: int
    at: float
    tokens: int
    finished: bool


class Server(Protocol):
    def ask(self, client: int, asked: Asked) -> None: ...

    def events(self) -> list[Event]:
        """What happened since; works, or waits a moment, where nothing did."""
        ...


class Seen(NamedTuple):
    """Attributes:
    tokens_per_s: until the end.
    ttft_s: of each request, time to the first token.
    adapters: of each of these requests.
    tokens: in all, those after the end too.
    """

    tokens_per_s: float
    ttft_s: list[float]
    adapters: list[int | None]
    tokens: int

    def figures(self) -> dict[str, float]:
        ms = [1e3 * each for each in self.ttft_s]
        return {"tokens_per_s": self.tokens_per_s, "p50_ms": quantile(ms, 0.5), "p95_ms": quantile(ms, 0.95)}


def requests(adapters: Sequence[int | None], seed: int) -> Iterator[Asked]:
    """Random tokens; every server is asked the same ones."""
    draw = random.Random(seed)
    while True:
        ids = tuple(draw.randrange(FIRST_ID, LAST_ID) for _ in range(draw.randrange(*PROMPT)))
        yield Asked(ids, draw.randrange(*ANSWER), draw.randrange(1 << 30), draw.choice(adapters))


def closed_loop(server: Server, asked: Iterator[Asked], clients: int, seconds: float) -> Seen:
    """So many clients, for so long at least, and until as many requests as clients have been answered: a slow server
    is not measured by its first burst of prompts alone. What is under way then is finished, and not counted."""
    asked_at, waits, adapters, tokens = {}, [], [], []
    idle, answered = list(range(clients)), 0
    began, end = time.perf_counter(), None
    while end is None or len(idle) < clients:
        while idle and end is None:
            client, each = idle.pop(), next(asked)
            asked_at[client] = time.perf_counter()
            adapters.append(each.adapter)
            server.ask(client, each)
        for event in server.events():
            if event.client in asked_at and event.tokens:
                waits.append(event.at - asked_at.pop(event.client))
            tokens.append((event.at, event.tokens))
            if event.finished:
                idle.append(event.client)
                answered += 1
        now = time.perf_counter()
        if end is None and now >= began + seconds and answered >= clients:
            end = now
    counted = sum(n for at, n in tokens if at <= end)
    return Seen(counted / (end - began), waits, adapters, sum(n for _, n in tokens))


class Engine:
    """The engine of this package, in this process and this thread."""

    def __init__(self, batch: ContinuousBatch, digests: Sequence[str]) -> None:
        self.batch, self.digests = batch, digests
        self._events: list[Event] = []

    def ask(self, client: int, asked: Asked) -> None:
        digest = None if asked.adapter is None else self.digests[asked.adapter]
        request = Request(asked.ids, SamplingParams(asked.new, seed=asked.seed), digest)
        self.batch.add(request, partial(self._hear, client))

    def events(self) -> list[Event]:
        self.batch.step()
        events, self._events = self._events, []
        return events

    def _hear(self, client: int, output: Output) -> None:
        if output.error is not None:
            raise output.error
        finished = output.finish_reason is not None
        self._events.append(Event(client, time.perf_counter(), len(output.tokens), finished))
