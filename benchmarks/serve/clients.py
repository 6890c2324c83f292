"""Clients in a closed loop, which send the next request as soon as they have an answer, and their measurements."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

from common import FIRST_ID, LAST_ID, quantile

from align.rollout.continuous import ContinuousBatch
from align.rollout.serving_engine import Output, Request, SamplingParams

PROMPT_TOKENS = (10, 60)
ANSWER_TOKENS = (20, 60)
"""Numbers of tokens: the least, and the first that is too many."""


class ClientRequest(NamedTuple):
    """A request. `adapter` is an adapter's number, or None for the base."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    seed: int
    adapter: int | None


class TokenEvent(NamedTuple):
    """The arrival of tokens at a client. `time_s` is a time of `time.perf_counter`."""

    client: int
    time_s: float
    token_count: int
    finished: bool


class Server(Protocol):
    """A server under test."""

    def submit(self, client: int, request: ClientRequest) -> None: ...

    def poll_events(self) -> list[TokenEvent]:
        """Return the events since the last call. Computes a step, or waits for a moment, if none has happened."""
        ...


class LoopResult(NamedTuple):
    """Measurements of a closed loop.

    Attributes:
        tokens_per_s: tokens a second until the end of the measured time.
        ttft_s: the time to the first token of each request, in seconds.
        adapters: the adapter of each of these requests.
        tokens: the number of all tokens, also of those after the measured time.
    """

    tokens_per_s: float
    ttft_s: list[float]
    adapters: list[int | None]
    tokens: int

    def summarize(self) -> dict[str, float]:
        """Return the throughput, and two quantiles of the time to the first token in milliseconds."""
        ttft_ms = [1e3 * seconds for seconds in self.ttft_s]
        return {
            "tokens_per_s": self.tokens_per_s,
            "p50_ms": quantile(ttft_ms, 0.5),
            "p95_ms": quantile(ttft_ms, 0.95),
        }


def generate_requests(adapters: Sequence[int | None], seed: int) -> Iterator[ClientRequest]:
    """Yield requests with random tokens, without end. A seed gives every server the same requests."""
    draw = random.Random(seed)
    while True:
        ids = tuple(draw.randrange(FIRST_ID, LAST_ID) for _ in range(draw.randrange(*PROMPT_TOKENS)))
        yield ClientRequest(ids, draw.randrange(*ANSWER_TOKENS), draw.randrange(1 << 30), draw.choice(adapters))


def run_closed_loop(server: Server, requests: Iterator[ClientRequest], clients: int, seconds: float) -> LoopResult:
    """Let a number of clients send requests for at least so many seconds.

    The measured time lasts until as many requests as clients have been answered, so that a slow server is not measured
    by its first burst of prompts alone. Requests in flight at its end are finished, but their later tokens are not
    counted in the throughput.
    """
    sent_at: dict[int, float] = {}
    ttft_s: list[float] = []
    adapters: list[int | None] = []
    tokens: list[tuple[float, int]] = []
    idle = list(range(clients))
    answered = 0
    start = time.perf_counter()
    end = None
    while end is None or len(idle) < clients:
        while idle and end is None:
            client = idle.pop()
            request = next(requests)
            sent_at[client] = time.perf_counter()
            adapters.append(request.adapter)
            server.submit(client, request)
        for event in server.poll_events():
            if event.client in sent_at and event.token_count:
                ttft_s.append(event.time_s - sent_at.pop(event.client))
            tokens.append((event.time_s, event.token_count))
            if event.finished:
                idle.append(event.client)
                answered += 1
        now = time.perf_counter()
        if end is None and now >= start + seconds and answered >= clients:
            end = now
    counted = sum(count for time_s, count in tokens if time_s <= end)
    return LoopResult(counted / (end - start), ttft_s, adapters, sum(count for _, count in tokens))


class InProcessServer:
    """The serving engine of this package, in this process and this thread."""

    def __init__(self, batch: ContinuousBatch, digests: Sequence[str]) -> None:
        self.batch = batch
        self.digests = digests
        self._events: list[TokenEvent] = []

    def submit(self, client: int, request: ClientRequest) -> None:
        digest = None if request.adapter is None else self.digests[request.adapter]
        sampling = SamplingParams(request.max_new_tokens, seed=request.seed)
        self.batch.add(Request(request.prompt_ids, sampling, digest), partial(self._collect, client))

    def poll_events(self) -> list[TokenEvent]:
        self.batch.step()
        events = self._events
        self._events = []
        return events

    def _collect(self, client: int, output: Output) -> None:
        if output.error is not None:
            raise output.error
        finished = output.finish_reason is not None
        self._events.append(TokenEvent(client, time.perf_counter(), len(output.tokens), finished))
