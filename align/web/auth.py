"""Authentication: every request passes here first.

Refused are other hosts' names (DNS rebinding), other pages' requests (another port's of this machine too), requests
without a known visitor, and what the application does not take from this visitor.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, Protocol, TypeVar
from urllib.parse import urlencode, urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from align.core.errors import StorageError
from align.web.errors import CANNOT_READ

HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),  # with no-referrer a browser's own forms come with Origin: null
    (b"cache-control", b"no-store"),
)
KEY = "key"
"""The parameter of a link that holds its key. It does not stay in the address."""


class Visitor(Protocol):
    """A visitor who is known."""

    @property
    def name(self) -> str: ...


V = TypeVar("V", bound=Visitor, covariant=True)


class Authenticator(Protocol[V]):
    """Finds the visitor of a request."""

    def who(self, cookies: Mapping[str, str]) -> V | None: ...

    def cookie_of_link(self, key: str) -> str | None:
        """Return the cookie that a link with this key gives the visitor who opens it; None if it is no such link."""
        ...

    def unauthenticated(self, path: str, query: Mapping[str, str]) -> Response | None:
        """Return the response to an unknown visitor; None if they may have what they ask for."""
        ...


class TooManyStreams(Exception):
    """A visitor asks for an answer without an end who has as many as they may."""


class AuthMiddleware:
    """See the module. The scope of a request that passes says who asks (`person`) and by which of our origins.

    Args:
        origins: under which browsers know the server, such as https://annotate.example.org.
        check: of visitor, method, path and headers: the response that refuses the request; None if it may pass.
        policy: the Content-Security-Policy of every answer.
        unused: parts of paths at which there is nothing for anybody.
        streams, streams_each: answers without an end that all visitors together, and one of them, may have at once,
            for each holds a connection.
    """

    def __init__(
        self,
        app: ASGIApp,
        authenticator: Authenticator[Visitor],
        origins: Sequence[str],
        check: Callable[[Any, str, str, Headers], Response | None],
        *,
        policy: str,
        unused: Sequence[str] = (),
        streams: int,
        streams_each: int,
    ) -> None:
        self.app = app
        self.authenticator = authenticator
        self.check = check
        self.unused = unused
        self.most_streams = streams
        self.most_each = streams_each
        self.origins = {urlsplit(origin).netloc: origin for origin in origins}
        self.headers = ((b"content-security-policy", policy.encode()), *HEADERS)
        self.streams: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            connection = HTTPConnection(scope)
            response = await self._refuse(connection)
            if response is None:
                response = await self._pass_on(scope, receive, send)
            elif response.status_code >= 400 and "text/html" in ",".join(connection.headers.getlist("accept")):
                # for a person who typed an address into a browser
                response = PlainTextResponse(json.loads(bytes(response.body))["problem"], response.status_code)
            if response is not None:
                response.raw_headers.extend(self.headers)
                await response(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """Send the app's answer, with our headers. Returns another one if it is a stream and no further one is
        allowed."""
        who = scope["person"].name if scope["person"] else ""
        is_stream = False

        async def send_with_headers(message: Any) -> None:
            nonlocal is_stream
            if message["type"] == "http.response.start":
                headers = message.get("headers", [])
                if any(name == b"content-type" and b"event-stream" in value for name, value in headers):
                    if self.streams[who] >= self.most_each or self.streams.total() >= self.most_streams:
                        raise TooManyStreams
                    self.streams[who] += 1
                    is_stream = True
                message = message | {"headers": [*headers, *self.headers]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except TooManyStreams:
            return refusal(429, "Close a page first: too many wait for something.")
        except ClientDisconnect:  # in the middle of a form: nobody waits for an answer
            pass
        finally:
            if is_stream:
                self.streams[who] -= 1
                if self.streams[who] == 0:
                    del self.streams[who]
        return None

    async def _refuse(self, request: HTTPConnection) -> Response | None:
        """Return the response to a request that does not pass; None if it may."""
        path = request.scope["path"]
        origin = self.origins.get(request.headers.get("host", ""))
        if origin is None:
            return refusal(421, "This server is known by another name.")
        if request.headers.get("origin", origin) != origin:
            return refusal(403, "Another page asks.")
        if any(part in path for part in self.unused):
            return refusal(404, "There is nothing here.")
        query = request.query_params
        cookie = self.authenticator.cookie_of_link(next(filter(None, query.getlist(KEY)), ""))
        if cookie is not None:
            rest = urlencode([pair for pair in query.multi_items() if pair[0] != KEY])
            return RedirectResponse(f"/?{rest}" if rest else "/", 303, {"set-cookie": cookie})
        try:
            person = await run_in_threadpool(self.authenticator.who, request.cookies)
        except StorageError:
            return refusal(503, CANNOT_READ)  # and not why: it may be a stranger who asks
        if person is None and (response := self.authenticator.unauthenticated(path, query)) is not None:
            return response
        request.scope["person"] = person
        request.scope["origin"] = origin
        return self.check(person, request.scope["method"], path, request.headers)


def refusal(status: int, problem: str) -> Response:
    content = {"problem": problem, "detail": escape(problem)}  # Gradio's pages show the latter, as HTML
    return JSONResponse(content, status)
