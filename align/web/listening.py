"""The port of a server, and uvicorn on it for as many connections as the process can hold."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from align.core.errors import InputError
from align.core.redaction import Formatter
from align.web.connections import Connection, Connections, log

MOST, BATCH, QUEUE, RESERVE = 2048, 64, 1024, 256
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
    """Serves until interrupted. `ready` is called when the port is ours.

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
            app, host=host, port=port, log_config=None, log_level="warning", ws="none", loop="asyncio",
            timeout_graceful_shutdown=3, backlog=BATCH, access_log=False,
        )  # fmt: skip
        proxies = ProxyHeadersMiddleware(cast(Any, app), config.forwarded_allow_ips).trusted_hosts
        self.all = Connections(connection_limit(), lambda address: address in proxies)
        config.http = cast(Any, partial(Connection, self.all))
        super().__init__(config)
        self._drain, self._signals = drain, 0
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
    """How many connections this process can hold, once its soft limit of descriptors is raised to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS says that there is no limit, and has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return MOST if soft == resource.RLIM_INFINITY else min(MOST, max(soft - RESERVE - BATCH, soft // 4))


@contextmanager
def log_to_console(names: Sequence[str] = ()) -> Iterator[None]:
    """What the server has to say goes to the run's log and, here, to whoever started it."""
    console = logging.StreamHandler()
    console.setFormatter(Formatter())
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", log.name, *names)]
    for logger in loggers:
        logger.addHandler(console)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(console)
