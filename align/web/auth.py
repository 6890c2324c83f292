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
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, cookie_parser
from starlette.types import ASGIApp, Receive, Scope, Send

from align.core.errors import StorageError
from align.web.errors import CANNOT_READ

HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),  # with no-referrer a browser's own forms come with Origin: null
    (b"cache-control", b"no-store"),
)
KEY = "key"
"""What the query of a link calls its key. It does not stay in the address."""
Answer = tuple[int, bytes, list[tuple[bytes, bytes]]]
"""Status, body and headers."""


class Visitor(Protocol):
    """Whoever is known."""

    @property
    def name(self) -> str: ...


V = TypeVar("V", bound=Visitor, covariant=True)


class Authenticator(Protocol[V]):
    """Find the visitor of a request."""

    def who(self, cookies: Mapping[str, str]) -> V | None: ...

    def opened(self, query: str) -> str | None:
        """The cookie that a link gives whoever opens it; None where it is no such link."""
        ...

    def unauthenticated(self, path: str, query: str) -> Answer | None:
        """What somebody unknown is told; None where they may have what they ask for."""
        ...


class TooManyStreams(Exception):
    """Somebody asks for an answer without an end who has as many as they may."""


class AuthMiddleware:
    """See the module. The scope of a request that passes says who asks (`person`) and by which of our origins.

    Args:
        origins: under which browsers know the server, such as https://annotate.example.org.
        check: of visitor, method, path and headers: what the request is answered instead; None where it may pass.
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
        check: Callable[[Any, str, str, Mapping[bytes, str]], Answer | None],
        *,
        policy: str,
        unused: Sequence[str] = (),
        streams: int,
        streams_each: int,
    ) -> None:
        self.app, self.authenticator, self.check, self.unused = app, authenticator, check, unused
        self.most_streams, self.most_each = streams, streams_each
        self.origins = {urlsplit(origin).netloc: origin for origin in origins}
        self.headers = ((b"content-security-policy", policy.encode()), *HEADERS)
        self.streams: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            answer = await self._refused(scope)
            if answer is None:
                await self._answered(scope, receive, send)
            else:
                page = any(name == b"accept" and b"text/html" in value for name, value in scope["headers"])
                await self._respond(send, *(in_words(*answer) if page else answer))

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app's answer, with our headers; a stream only where another is still allowed."""
        who, begun = scope["person"].name if scope["person"] else "", False

        async def sending(message: Any) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                headers = message.get("headers", [])
                if any(name == b"content-type" and b"event-stream" in value for name, value in headers):
                    if self.streams[who] >= self.most_each or self.streams.total() >= self.most_streams:
                        raise TooManyStreams
                    self.streams[who] += 1
                    begun = True
                message = message | {"headers": [*headers, *self.headers]}
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except TooManyStreams:
            await self._respond(send, *refusal(429, "Close a page first: too many wait for something."))
        except ClientDisconnect:  # in the middle of a form: nobody is there to be told
            pass
        finally:
            if begun:
                self.streams[who] -= 1
                if self.streams[who] == 0:
                    del self.streams[who]

    async def _refused(self, scope: Scope) -> Answer | None:
        """What the request is told in place of an answer; None where it may pass."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        cookies = "; ".join(value.decode("latin-1") for name, value in scope["headers"] if name == b"cookie")
        query, path = scope["query_string"].decode("latin-1"), scope["path"]
        ours = self.origins.get(headers.get(b"host", ""))
        if ours is None:
            return refusal(421, "This server is known by another name.")
        if headers.get(b"origin", ours) != ours:
            return refusal(403, "Another page asks.")
        if any(part in path for part in self.unused):
            return refusal(404, "There is nothing here.")
        cookie = self.authenticator.opened(query)
        if cookie is not None:
            rest = urlencode([pair for pair in parse_qsl(query, keep_blank_values=True) if pair[0] != KEY])
            where = f"/?{rest}" if rest else "/"
            return 303, b"", [(b"location", where.encode()), (b"set-cookie", cookie.encode())]
        try:
            person = await run_in_threadpool(self.authenticator.who, cookie_parser(cookies))
        except StorageError:
            return refusal(503, CANNOT_READ)  # and not why: it may be a stranger who asks
        if person is None and (answer := self.authenticator.unauthenticated(path, query)) is not None:
            return answer
        scope["person"], scope["origin"] = person, ours
        return self.check(person, scope["method"], path, headers)

    async def _respond(self, send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [*headers, *self.headers]})
        await send({"type": "http.response.body", "body": body})


def refusal(status: int, problem: str) -> Answer:
    content = {"problem": problem, "detail": escape(problem)}  # Gradio's pages show the latter, as HTML
    return status, json.dumps(content).encode(), [(b"content-type", b"application/json")]


def in_words(status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> Answer:
    """A refusal for whoever typed an address into a browser."""
    if not body:
        return status, body, headers
    return status, json.loads(body)["problem"].encode(), [(b"content-type", b"text/plain; charset=utf-8")]
