"""A server's port, uvicorn on it for as many connections as the process can hold, and the deadlines of these."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import signal
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, cast

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from align.core.errors import InputError
from align.core.redaction import RedactingFormatter

log = logging.getLogger(__name__)

HEAD_S = 10
BODY_S = 30
ANSWER_S = 30
PART = 16_384
"""Seconds that a client has for the head of a request, for its body, and for taking in each `PART` bytes of an
answer."""
WARN_EVERY_S = 60
"""What happens to a thousand connections is one line of the log."""


class Connections:
    """Every connection of a server.

    Args:
        most: that are held at once. An address that is no trusted proxy may hold half of them.
        trusted: whether an address is a proxy's, whose `X-Forwarded-For` names the client.
    """

    def __init__(self, most: int, trusted: Callable[[str], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self.trusted = trusted
        self.clock = clock
        self.open: set[Connection] = set()
        self._peers: Counter[str] = Counter()
        self._warned_at: dict[str, float] = {}
        self._unreported: Counter[str] = Counter()

    def admit(self, newcomer: Connection) -> None:
        """Make room for a connection, or end it if all others are being answered."""
        self.open.add(newcomer)
        self._peers[newcomer.peer] += 1
        full = len(self.open) > self.most
        crowded = self._peers[newcomer.peer] > self.most // 2 and not self.trusted(newcomer.peer)
        if full or crowded:
            self.warn(f"all {self.most} places for connections are taken, or half of them by one address")
            self._make_room(newcomer, newcomer.peer if crowded else None)

    def leave(self, connection: Connection) -> None:
        if connection in self.open:
            self.open.remove(connection)
            self._peers[connection.peer] -= 1
            if self._peers[connection.peer] == 0:
                del self._peers[connection.peer]

    def _make_room(self, newcomer: Connection, peer: str | None) -> None:
        """End some connections that keep the server waiting, of one peer or of all: first of the address that holds
        most connections, then those never answered, then those that began longest ago. Some and not one, for looking at
        all of them costs a millisecond."""
        waiting = [c for c in self.open if c.is_stalled and c is not newcomer and peer in (None, c.peer)]
        shares = Counter(connection.address for connection in self.open)
        waiting.sort(key=lambda c: (-shares[c.address], min(c.answered, 1), c.since))
        for connection in waiting[: max(1, self.most // 20)] or [newcomer]:
            connection.end()

    def warn(self, what: str) -> None:
        """Log what befalls connections, at most once in a while."""
        self._unreported[what] += 1
        if self.clock() - self._warned_at.get(what, float("-inf")) > WARN_EVERY_S:
            log.warning("%s (%d times since this was last said)", what, self._unreported.pop(what))
            self._warned_at[what] = self.clock()

    def failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handle an exception of the loop: a full table of descriptors ends the connections that keep the server
        waiting, and is logged once. The loop itself tries again every second."""
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
            loop.default_exception_handler(context)
            return
        self.warn(f"no descriptor is left for another connection ({error.strerror})")
        for connection in [connection for connection in self.open if connection.is_stalled]:
            connection.end()


class Connection(H11Protocol):
    """One connection: uvicorn's, with deadlines.

    Attributes:
        owes: what the server waits for: `head`, `body`, or nothing while a request is answered.
        since: when it began to wait for it.
        answered: how many requests were.
    """

    def __init__(self, all_of_them: Connections, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self.all = all_of_them
        self.owes = ""
        self.since = 0.0
        self.answered = 0
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._left = 0

    @property
    def is_stalled(self) -> bool:
        """For a request, or for an answer to be taken in."""
        return bool(self.owes) or self.flow.write_paused

    @property
    def peer(self) -> str:
        """The address that is connected: the client's, or its proxy's."""
        return self.client[0] if self.client else ""

    @property
    def address(self) -> str:
        """The client's, once a trusted proxy has named it."""
        client = self.client if self.scope is None else self.scope["client"]
        return client[0] if client else ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._reckon()
        self.all.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.all.leave(self)
        for timer in self._timers.values():
            timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._reckon()

    def on_response_complete(self) -> None:
        self.answered += 1
        super().on_response_complete()
        self._reckon()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._left = self.transport.get_write_buffer_size()
        self._end_in(ANSWER_S, "answer")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_in(None, "answer")

    def end(self) -> None:
        """End it at once, even what the client has not taken in yet."""
        self.all.leave(self)
        self.transport.abort()

    def _reckon(self) -> None:
        """Set the deadline of what the client owes; more bytes of it put nothing off."""
        state = self.conn.their_state
        owes = "head" if state is h11.IDLE else "body" if state is h11.SEND_BODY else ""
        if owes != self.owes:
            self.owes, self.since = owes, self.all.clock()
            self._end_in({"head": HEAD_S, "body": BODY_S}.get(owes), "request")

    def _end_in(self, seconds: float | None, why: str) -> None:
        """End the connection after some seconds; None cancels that."""
        if why in self._timers:
            self._timers.pop(why).cancel()
        if seconds is not None:
            self._timers[why] = self.loop.call_later(seconds, self._late, seconds, why)

    def _late(self, seconds: float, why: str) -> None:
        unsent = self.transport.get_write_buffer_size()
        if why == "answer" and unsent <= self._left - PART:
            self._left = unsent
            self._end_in(seconds, why)
        elif self.owes == "body" and self.flow.read_paused:  # it is we who have not read on
            self._end_in(seconds, why)
        else:
            self.end()


MOST = 2048
BATCH = 64
QUEUE = 1024
RESERVE = 256
"""Connections at most; how many are accepted before any is looked at; how many the kernel keeps until then; and
descriptors for a store (65 connections of SQLite take up to three each), the log and what else is open."""


def serve(
    app: ASGIApp,
    host: str,
    port: int,
    ready: Callable[[], None],
    drain: Callable[[bool], Awaitable[None]] | None = None,
    told: Sequence[str] = (),
) -> None:
    """Serve until interrupted. `ready` is called when the port is ours.

    Args:
        drain: awaited after a signal, while the server still answers; then it ends. It is told whether to be done at
            once: after Ctrl+C, and after a second signal.
        told: names of further loggers whose lines go to the console.

    Raises:
        InputError: the port is taken, or the host is none of this machine's.
    """
    with listening(host, port) as listener, log_to_console(told):
        ready()
        with suppress(KeyboardInterrupt):  # which the server passes on when it has ended what was under way
            Server(app, host, port, drain).run(sockets=[listener])


def listening(host: str, port: int) -> socket.socket:
    """A socket on the port; raises as `serve` does.

    It says that it is TCP: asyncio turns Nagle's algorithm off for sockets that do, and else an answer of two pieces
    waits 40 ms for the browser to acknowledge the first.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        remedy = f"Give another, such as stage.port={port + 1 if port < 65535 else port - 1}."
        raise InputError("stage.port", port, f"it cannot be had ({error.strerror})", remedy) from error
    return listener


class Server(uvicorn.Server):
    """uvicorn's, for as many connections as there are descriptors for."""

    def __init__(
        self, app: ASGIApp, host: str, port: int, drain: Callable[[bool], Awaitable[None]] | None = None
    ) -> None:
        # Its own logging configuration would close the run's log, which then opens its file anew at the next line.
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            log_level="warning",
            ws="none",
            loop="asyncio",
            timeout_graceful_shutdown=3,
            backlog=BATCH,
            access_log=False,
        )
        proxies = ProxyHeadersMiddleware(cast(Any, app), config.forwarded_allow_ips).trusted_hosts
        self.all = Connections(connection_limit(), lambda address: address in proxies)
        config.http = cast(Any, partial(Connection, self.all))
        super().__init__(config)
        self._drain = drain
        self._signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        at_once = sig == signal.SIGINT or self._signals > 1
        if self._drain is None or self._loop is None or self._signals > 2:
            super().handle_exit(sig, frame)
        else:
            self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drained(at_once)))

    async def _drained(self, at_once: bool) -> None:
        assert self._drain is not None
        try:
            await self._drain(at_once)
        finally:
            self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = loop = asyncio.get_running_loop()
        loop.set_exception_handler(self.all.failed)
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(QUEUE)  # the loop asked for as few as it accepts at a time


def connection_limit() -> int:
    """Return how many connections this process can hold, with its soft limit of descriptors raised to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS says that there is no limit, and has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return MOST if soft == resource.RLIM_INFINITY else min(MOST, max(soft - RESERVE - BATCH, soft // 4))


@contextmanager
def log_to_console(names: Sequence[str] = ()) -> Iterator[None]:
    """Send the server's log lines to the console too."""
    console = logging.StreamHandler()
    console.setFormatter(RedactingFormatter())
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", log.name, *names)]
    for logger in loggers:
        logger.addHandler(console)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(console)
