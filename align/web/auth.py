"""Authentication middleware, which every request passes first.

It refuses requests for another host name (DNS rebinding), requests from pages of another origin (another port of this
machine included), requests of unknown visitors, and requests that the application does not allow this visitor.
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
"""Query parameter of a login link that holds its key, which a redirect removes from the address."""


class Visitor(Protocol):
    """An authenticated visitor."""

    @property
    def name(self) -> str: ...


V = TypeVar("V", bound=Visitor, covariant=True)


class Authenticator(Protocol[V]):
    """Interface that maps a request's cookies or login link to a visitor."""

    def find_visitor(self, cookies: Mapping[str, str]) -> V | None:
        """Return the visitor to whom the session cookies belong, or None if they belong to no visitor."""
        ...

    def create_link_cookie(self, key: str) -> str | None:
        """Return the `Set-Cookie` value that logs in a visitor who opens a login link with this key, or None if the key
        is not valid."""
        ...

    def refuse_unknown_visitor(self, path: str, query: Mapping[str, str]) -> Response | None:
        """Return the response for a visitor who is not logged in, such as a redirect to the login page, or None if the
        path is public."""
        ...


class TooManyStreams(Exception):
    """Exception for a visitor who opens more server-sent event streams than allowed."""


class AuthMiddleware:
    """ASGI middleware that authenticates requests and refuses those from another origin, for another host name, or that
    `check` refuses. It sets `scope["person"]` to the visitor, or None, and `scope["origin"]` to the origin by which
    they reached the server.

    Args:
        origins: addresses by which browsers reach the server, such as https://annotate.example.org.
        check: takes the visitor, the method, the path and the headers of a request. Returns the response that refuses
            the request, or None to let it pass.
        policy: the Content-Security-Policy header of every response.
        closed_paths: substrings of paths that are closed to everyone.
        max_streams, max_streams_each: maximum number of open event streams, of all visitors and of one visitor. Each
            stream holds a connection.
    """

    def __init__(
        self,
        app: ASGIApp,
        authenticator: Authenticator[Visitor],
        origins: Sequence[str],
        check: Callable[[Any, str, str, Headers], Response | None],
        *,
        policy: str,
        closed_paths: Sequence[str] = (),
        max_streams: int,
        max_streams_each: int,
    ) -> None:
        self.app = app
        self.authenticator = authenticator
        self.check = check
        self.closed_paths = closed_paths
        self.max_streams = max_streams
        self.max_streams_each = max_streams_each
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
                response = await self._run_app(scope, receive, send)
            elif response.status_code >= 400 and "text/html" in ",".join(connection.headers.getlist("accept")):
                # A browser shows plain text to a person who typed the address.
                response = PlainTextResponse(json.loads(bytes(response.body))["problem"], response.status_code)
            if response is not None:
                response.raw_headers.extend(self.headers)
                await response(scope, receive, send)

    async def _run_app(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """Run the app and add security headers to its response. Returns None, or a 429 response if the app opens an
        event stream beyond the maximum."""
        visitor_name = scope["person"].name if scope["person"] else ""
        is_stream = False

        async def send_with_headers(message: Any) -> None:
            nonlocal is_stream
            if message["type"] == "http.response.start":
                headers = message.get("headers", [])
                if any(name == b"content-type" and b"event-stream" in value for name, value in headers):
                    if self.streams[visitor_name] >= self.max_streams_each or self.streams.total() >= self.max_streams:
                        raise TooManyStreams
                    self.streams[visitor_name] += 1
                    is_stream = True
                message = message | {"headers": [*headers, *self.headers]}
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except TooManyStreams:
            return build_error_response(429, "Too many pages are open and waiting: close one first.")
        except ClientDisconnect:  # while the app read a form: there is no client to answer
            pass
        finally:
            if is_stream:
                self.streams[visitor_name] -= 1
                if self.streams[visitor_name] == 0:
                    del self.streams[visitor_name]
        return None

    async def _refuse(self, request: HTTPConnection) -> Response | None:
        """Authenticate a request and store its visitor in the ASGI scope. Returns None if the request passes, else the
        response that redirects or refuses it."""
        path = request.scope["path"]
        origin = self.origins.get(request.headers.get("host", ""))
        if origin is None:
            return build_error_response(421, "This server is known by another name.")
        if request.headers.get("origin", origin) != origin:
            return build_error_response(403, "Another page asks.")
        if any(part in path for part in self.closed_paths):
            return build_error_response(404, "There is nothing here.")
        query = request.query_params
        cookie = self.authenticator.create_link_cookie(next(filter(None, query.getlist(KEY)), ""))
        if cookie is not None:
            parameters = urlencode([pair for pair in query.multi_items() if pair[0] != KEY])
            return RedirectResponse(f"/?{parameters}" if parameters else "/", 303, {"set-cookie": cookie})
        try:
            person = await run_in_threadpool(self.authenticator.find_visitor, request.cookies)
        except StorageError:
            return build_error_response(503, CANNOT_READ)  # without the cause, which an unknown visitor must not read
        if person is None:
            response = self.authenticator.refuse_unknown_visitor(path, query)
            if response is not None:
                return response
        request.scope["person"] = person
        request.scope["origin"] = origin
        return self.check(person, request.scope["method"], path, request.headers)


def build_error_response(status: int, problem: str) -> Response:
    """Return a JSON response with a status code and an error message, once as plain text and once as HTML for
    Gradio."""
    content = {"problem": problem, "detail": escape(problem)}  # Gradio's pages show the latter, as HTML
    return JSONResponse(content, status)
