"""Who may come in, and what answers: one process, one project, one annotator on this machine.

Whoever has the link that the server prints comes in, as with a notebook server: the link's key becomes a cookie that no
script reads and no other site sends. Everything else is refused: other hosts' names (DNS rebinding), other pages'
requests (another port's of this machine too), requests without the cookie, and what changes something unless it is JSON
of the page's own, which a form cannot send. There are no accounts yet: until there are, it binds to the loopback
interface alone.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs

from align.errors import InputError, StorageError, require
from annotate.assignment import Desk
from annotate.store import AlreadyJudged

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # else it calls out when it starts

import gradio
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Receive, Scope, Send

from annotate.web.page import HEAD, page
from annotate.web.routes import routes
from annotate.web.words import STATIC

BODY_LIMIT = 1_000_000
"""Bytes of a request."""
# Gradio's templates are evaluated from strings; what models wrote never gets there.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "font-src 'self' data:",
        "frame-ancestors 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


def application(desk: Desk, annotator: str, key: str, port: int) -> ASGIApp:
    """The app for one annotator, who comes in by `/?key=KEY`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(routes(desk, lambda: annotator))
    app.mount("/rank", StaticFiles(directory=STATIC))
    app.add_exception_handler(RequestValidationError, misread)
    for error, status in ((AlreadyJudged, 409), (StorageError, 503), (InputError, 422)):
        app.add_exception_handler(error, explained(status))
    app = gradio.mount_gradio_app(
        app, page(), path="/", footer_links=[], run_history=False, ssr_mode=False, enable_monitoring=False, head=HEAD
    )
    return Gate(app, key, port)


def explained(status: int) -> Callable[[Request, Exception], JSONResponse]:
    """An error of ours as JSON."""

    def answer(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, InputError)
        return JSONResponse({"field": error.field, "problem": error.problem, "remedy": error.remedy}, status)

    return answer


def misread(_: Request, error: Exception) -> JSONResponse:
    """A body that is none, without its words: they may be what cannot be written."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    return JSONResponse({"field": where, "problem": f"{where}: {first['msg']}", "remedy": "Reload the page."}, 422)


class Gate:
    """Lets in who has the key, and nobody else's pages; see the module."""

    def __init__(self, app: ASGIApp, key: str, port: int) -> None:
        require(len(key) >= 32, "key", "(not shown)", "it is too short to keep anybody out", "Give 32 characters.")
        self.app, self.key = app, key
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self.cookie = f"align_key_{port}"  # browsers send a host's cookies to all of its ports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if host not in self.hosts:
            await refuse(scope, send, 421, "This server is known by another name.")
        elif origin not in (None, f"http://{host}"):
            await refuse(scope, send, 403, "Another page asks.")
        elif self.known(given := parse_qs(scope["query_string"].decode("latin-1")).get("key", [""])[0]):
            cookie = f"{self.cookie}={given}; Path=/; HttpOnly; SameSite=Strict"
            await respond(send, 303, b"", [(b"location", b"/"), (b"set-cookie", cookie.encode())])
        elif not self.known(cookie_parser(headers.get(b"cookie", "")).get(self.cookie, "")):
            await refuse(scope, send, 403, "Open the link that the server printed when it started.")
        elif scope["type"] == "http" and (problem := unlike_the_page(scope, headers)):
            await refuse(scope, send, 415, problem)
        else:
            await self.app(scope, receive, with_headers(send))

    def known(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.key.encode())


def unlike_the_page(scope: Scope, headers: dict[bytes, str]) -> str:
    """What keeps a request from being one of the page's own; empty where nothing does."""
    if scope["method"] in ("GET", "HEAD"):
        return ""
    if not scope["path"].startswith("/api/"):  # Gradio's own, such as uploads, which the page has no use for
        return "There is nothing here that could be changed."
    if not headers.get(b"content-type", "").startswith("application/json") or b"x-align" not in headers:
        return "Send JSON, with the header X-Align."
    length = headers.get(b"content-length", "")
    return "" if length.isdigit() and int(length) <= BODY_LIMIT else f"Send at most {BODY_LIMIT} bytes, and say so."


def with_headers(send: Send) -> Send:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = message | {"headers": [*message.get("headers", []), *HEADERS]}
        await send(message)

    return sending


async def refuse(scope: Scope, send: Send, status: int, problem: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await respond(send, status, problem.encode(), [(b"content-type", b"text/plain; charset=utf-8")])


async def respond(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *HEADERS]})
    await send({"type": "http.response.body", "body": body})


def serve(desk: Desk, annotator: str, port: int, key: str, told: Callable[[str], None] = print) -> None:
    """Serves until interrupted. `told` is given the link.

    Raises:
        InputError: the port is taken.
    """
    config = uvicorn.Config(
        application(desk, annotator, key, port),
        host="127.0.0.1",
        port=port,
        log_level="warning",
        ws="none",
        timeout_graceful_shutdown=3,
    )
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            remedy = "Give another, such as stage.port=7862."
            raise InputError("stage.port", port, f"it cannot be had ({error.strerror})", remedy) from error
        told(f"open http://127.0.0.1:{port}/?key={key}")
        with suppress(KeyboardInterrupt):  # which the server passes on when it has ended what was under way
            uvicorn.Server(config).run(sockets=[listener])
