"""The web server: uvicorn with a limit on connections and a deadline for each request."""

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
"""Seconds in which a client has to send the head of a request."""
BODY_S = 30
"""Seconds in which a client has to send the body of a request."""
ANSWER_S = 30
"""Seconds in which a client has to read each `ANSWER_PART` bytes of a response."""
ANSWER_PART = 16_384
WARN_EVERY_S = 60
"""Minimum seconds between two log lines of the same warning, which may concern a thousand connections."""


class Connections:
    """The open connections of a server, with a limit on their number.

    Args:
        limit: maximum number of open connections. One address may hold half of them, unless it is a trusted proxy.
        is_proxy: returns whether an address is a trusted proxy's, whose `X-Forwarded-For` names the client.
    """

    def __init__(
        self, limit: int, is_proxy: Callable[[str], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limit = limit
        self.is_proxy = is_proxy
        self.clock = clock
        self.open: set[Connection] = set()
        self._peers: Counter[str] = Counter()
        self._warned_at: dict[str, float] = {}
        self._unreported: Counter[str] = Counter()

    def admit(self, newcomer: Connection) -> None:
        """Add a new connection, and close some stalled ones if the server or its address now has too many. Closes the
        new one if no other is stalled."""
        self.open.add(newcomer)
        self._peers[newcomer.peer] += 1
        is_full = len(self.open) > self.limit
        peer_is_full = self._peers[newcomer.peer] > self.limit // 2 and not self.is_proxy(newcomer.peer)
        if is_full or peer_is_full:
            self.warn(f"all {self.limit} places for connections are taken, or half of them by one address")
            self._make_room(newcomer, newcomer.peer if peer_is_full else None)

    def remove(self, connection: Connection) -> None:
        if connection in self.open:
            self.open.remove(connection)
            self._peers[connection.peer] -= 1
            if self._peers[connection.peer] == 0:
                del self._peers[connection.peer]

    def _make_room(self, newcomer: Connection, peer: str | None) -> None:
        """Close up to a twentieth of `limit` of the stalled connections, or only `newcomer` if none is stalled. It is
        several at a time because sorting all of them takes a millisecond.

        The order is by address, the one with most connections first; then connections that have answered no request
        yet; then by how long they have been stalled.

        Args:
            peer: address whose connections are ended; None for all addresses.
        """
        stalled = [c for c in self.open if c.is_stalled and c is not newcomer and peer in (None, c.peer)]
        shares = Counter(connection.address for connection in self.open)
        stalled.sort(key=lambda c: (-shares[c.address], min(c.answered, 1), c.since))
        for connection in stalled[: max(1, self.limit // 20)] or [newcomer]:
            connection.end()

    def warn(self, warning: str) -> None:
        """Log a warning with the number of times it occurred, at most once in `WARN_EVERY_S` seconds."""
        self._unreported[warning] += 1
        if self.clock() - self._warned_at.get(warning, float("-inf")) > WARN_EVERY_S:
            log.warning("%s (%d times since this was last said)", warning, self._unreported.pop(warning))
            self._warned_at[warning] = self.clock()

    def handle_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Close all stalled connections if the event loop's exception says that no file descriptor is left. Any other
        exception goes to asyncio's default handler. The loop accepts connections again after a second."""
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
            loop.default_exception_handler(context)
            return
        self.warn(f"no descriptor is left for another connection ({error.strerror})")
        stalled = [connection for connection in self.open if connection.is_stalled]
        for connection in stalled:
            connection.end()


class Connection(H11Protocol):
    """A uvicorn connection that is closed if the client is too slow to send a request or to read a response.

    Attributes:
        awaited: the part of a request that the server waits for, `head` or `body`; empty while a request is answered.
        since: time at which the server began to wait for it.
        answered: number of requests that were answered.
    """

    def __init__(self, all_connections: Connections, **uvicorn_arguments: Any) -> None:
        super().__init__(**uvicorn_arguments)
        self.all_connections = all_connections
        self.awaited = ""
        self.since = 0.0
        self.answered = 0
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._unsent = 0

    @property
    def is_stalled(self) -> bool:
        """True while the server waits for the client to send a request or to read a response, or while the connection
        is idle."""
        return bool(self.awaited) or self.flow.write_paused

    @property
    def peer(self) -> str:
        """IP address of the other end of the socket, which may be a proxy's, or an empty string."""
        return self.client[0] if self.client else ""

    @property
    def address(self) -> str:
        """IP address of the client, which a trusted proxy names in each request. Before the first request it is that of
        the peer."""
        client = self.client if self.scope is None else self.scope["client"]
        return client[0] if client else ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._update_deadline()
        self.all_connections.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.all_connections.remove(self)
        for timer in self._timers.values():
            timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_deadline()

    def on_response_complete(self) -> None:
        self.answered += 1
        super().on_response_complete()
        self._update_deadline()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self.transport.get_write_buffer_size()
        self._set_timer("answer", ANSWER_S)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._set_timer("answer", None)

    def end(self) -> None:
        """Close the connection at once, without sending the rest of a response."""
        self.all_connections.remove(self)
        self.transport.abort()

    def _update_deadline(self) -> None:
        """Start the deadline for the request's head or body when the server begins to wait for it, or stop it after
        that. Further bytes of the same part do not extend it."""
        state = self.conn.their_state
        awaited = "head" if state is h11.IDLE else "body" if state is h11.SEND_BODY else ""
        if awaited != self.awaited:
            self.awaited = awaited
            self.since = self.all_connections.clock()
            self._set_timer("request", {"head": HEAD_S, "body": BODY_S}.get(awaited))

    def _set_timer(self, timer: str, seconds: float | None) -> None:
        """Start or restart the timer named `timer`, `request` or `answer`, to expire after `seconds`; None stops it."""
        if timer in self._timers:
            self._timers.pop(timer).cancel()
        if seconds is not None:
            self._timers[timer] = self.loop.call_later(seconds, self._handle_timeout, timer, seconds)

    def _handle_timeout(self, timer: str, seconds: float) -> None:
        unsent = self.transport.get_write_buffer_size()
        if timer == "answer" and unsent <= self._unsent - ANSWER_PART:
            self._unsent = unsent
            self._set_timer(timer, seconds)
        elif self.awaited == "body" and self.flow.read_paused:  # the app, and not the client, is slow
            self._set_timer(timer, seconds)
        else:
            self.end()


MAX_CONNECTIONS = 2048
"""Maximum number of open connections of a server."""
BATCH = 64
"""Maximum number of connections that the event loop accepts before it handles any of them."""
QUEUE = 1024
"""Maximum number of connections that the kernel queues until they are accepted."""
RESERVE = 256
"""File descriptors that are left for other uses: a store (65 SQLite connections with up to three each), the log and
others."""


def serve_app(
    app: ASGIApp,
    host: str,
    port: int,
    on_ready: Callable[[], None],
    drain: Callable[[bool], Awaitable[None]] | None = None,
    loggers: Sequence[str] = (),
) -> None:
    """Serve an ASGI app with uvicorn until the process is interrupted.

    Args:
        on_ready: called when the port is open.
        drain: awaited after a signal, while the server still answers. Its argument is True if it has to end at once:
            after Ctrl+C, and after a second signal.
        loggers: names of further loggers whose lines go to the console.

    Raises:
        InputError: the port is in use, or this machine has no such host address.
    """
    with open_listener(host, port) as listener, log_to_console(loggers):
        on_ready()
        with suppress(KeyboardInterrupt):  # uvicorn raises it again after it has shut down
            Server(app, host, port, drain).run(sockets=[listener])


def open_listener(host: str, port: int) -> socket.socket:
    """Return a TCP socket bound to the address and port, or raise InputError if that is not possible.

    The socket names TCP as its protocol, since only then asyncio turns Nagle's algorithm off: with it, a response of
    two pieces waits 40 ms for the browser to acknowledge the first one.
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
    """A uvicorn server with a limit on connections, which awaits `drain` after a signal and before it shuts down."""

    def __init__(
        self, app: ASGIApp, host: str, port: int, drain: Callable[[bool], Awaitable[None]] | None = None
    ) -> None:
        # uvicorn's own logging configuration would close the run's log, which then reopens its file at the next line.
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
        self.connections = Connections(raise_connection_limit(), lambda address: address in proxies)
        config.http = cast(Any, partial(Connection, self.connections))
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
            self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain_and_exit(at_once)))

    async def _drain_and_exit(self, at_once: bool) -> None:
        assert self._drain is not None
        try:
            await self._drain(at_once)
        finally:
            self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = loop = asyncio.get_running_loop()
        loop.set_exception_handler(self.connections.handle_loop_error)
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(QUEUE)  # asyncio has set the kernel's queue to `BATCH`


def raise_connection_limit() -> int:
    """Raise the process's soft limit on file descriptors to the hard limit, and return how many connections the server
    can hold."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS reports an infinite hard limit and refuses to set it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return (
        MAX_CONNECTIONS
        if soft == resource.RLIM_INFINITY
        else min(MAX_CONNECTIONS, max(soft - RESERVE - BATCH, soft // 4))
    )


@contextmanager
def log_to_console(names: Sequence[str] = ()) -> Iterator[None]:
    """Also send the log lines of uvicorn, this module and the named loggers to stderr while the `with` block runs."""
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
