"""Who may come in: everything that is asked of the server passes here first.

Refused are other hosts' names (DNS rebinding), other pages' requests (another port's of this machine too), requests of
nobody who is known, and what changes something unless the page itself sends it: JSON with the header X-Align, which a
form of another site cannot send, or one of our own forms, which comes with our own Origin.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Protocol
from urllib.parse import parse_qs, quote, urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, cookie_parser
from starlette.types import ASGIApp, Receive, Scope, Send

from align.errors import StorageError, require
from annotate.accounts import Accounts, Person
from annotate.web.words import WORDS

BODY_LIMIT, FORM_LIMIT = 1_000_000, 20_000
"""Bytes of a request: of JSON, of a form."""
STREAMS = 8
"""Answers without an end that one person may have at once, for each holds a connection: a manager's page has one while
it waits for figures."""
UNUSED = ("/proxy=", "/heartbeat/")
"""Gradio's ways that no page of ours goes: it would fetch from elsewhere; and it would hold a connection for as long as
somebody likes, to know when to forget a session's state, of which our pages have none."""
FORMS = ("/login", "/logout", "/invite", "/password")
MANAGE = "/manage"
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
    (b"referrer-policy", b"same-origin"),  # with no-referrer a browser's own forms come with Origin: null
    (b"cache-control", b"no-store"),
)
CANNOT_READ = "The server cannot read its store."
Answer = tuple[int, bytes, list[tuple[bytes, bytes]]]
"""Status, body and headers."""


class Authenticator(Protocol):
    """How the gate knows who comes."""

    def who(self, cookies: Mapping[str, str]) -> Person | None: ...

    def opened(self, query: str) -> str | None:
        """The cookie that a link gives whoever opens it; None where it is no such link."""
        ...

    def unauthenticated(self, path: str, query: str) -> Answer | None:
        """What somebody unknown is told; None where they may have what they ask for."""
        ...


class KeyAuthenticator:
    """One person, who has the link that the server prints, as with a notebook server.

    Args:
        cookie: its name; browsers send a host's cookies to all of its ports.
    """

    def __init__(self, key: str, person: Person, cookie: str) -> None:
        require(len(key) >= 32, "key", "(not shown)", "it is too short to keep anybody out", "Give 32 characters.")
        self.key, self.person, self.cookie = key, person, cookie

    def who(self, cookies: Mapping[str, str]) -> Person | None:
        return self.person if self._fits(cookies.get(self.cookie, "")) else None

    def opened(self, query: str) -> str | None:
        given = parse_qs(query).get("key", [""])[0]
        return f"{self.cookie}={given}; Path=/; HttpOnly; SameSite=Strict" if self._fits(given) else None

    def unauthenticated(self, path: str, query: str) -> Answer | None:
        return refusal(403, "Open the link that the server printed when it started.")

    def _fits(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.key.encode())


class AccountAuthenticator:
    """Whoever has an account, and a session of it in a cookie."""

    def __init__(self, accounts: Accounts, cookie: str) -> None:
        self.accounts, self.cookie = accounts, cookie

    def who(self, cookies: Mapping[str, str]) -> Person | None:
        session = cookies.get(self.cookie, "")
        return self.accounts.who(session) if session else None

    def opened(self, query: str) -> str | None:
        return None

    def unauthenticated(self, path: str, query: str) -> Answer | None:
        if path in ("/login", "/invite", "/align/app.css"):
            return None
        if path in ("/", MANAGE, f"{MANAGE}/", "/password", "/logout"):
            project = parse_qs(query).get("project", [""])[0] if path == "/" else ""
            where = f"/login?project={quote(project, safe='')}" if project else "/login"
            return 303, b"", [(b"location", where.encode())]
        return refusal(401, WORDS["session_over"] if path.startswith(MANAGE) else "Log in.")


class TooManyStreams(Exception):
    """Somebody asks for an answer without an end who has as many as they may."""


class Gate:
    """See the module.

    Args:
        origins: under which browsers know the server, such as https://annotate.example.org.
        streams: answers without an end that all people together may have at once.
    """

    def __init__(self, app: ASGIApp, authenticator: Authenticator, origins: Sequence[str], streams: int = 256) -> None:
        self.app, self.authenticator, self.most_streams = app, authenticator, streams
        self.origins = {urlsplit(origin).netloc: origin for origin in origins}
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
                await respond(send, *(in_words(*answer) if page else answer))

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app's answer, with our headers; a stream only where another is still allowed."""
        who, begun = scope["person"].name if scope["person"] else "", False

        async def sending(message: Any) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                headers = message.get("headers", [])
                if any(name == b"content-type" and b"event-stream" in value for name, value in headers):
                    if self.streams[who] >= STREAMS or self.streams.total() >= self.most_streams:
                        raise TooManyStreams
                    self.streams[who] += 1
                    begun = True
                message = message | {"headers": [*headers, *HEADERS]}
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except TooManyStreams:
            await respond(send, *refusal(429, "Close a page first: too many wait for something."))
        except ClientDisconnect:  # in the middle of a form: nobody is there to be told
            pass
        finally:
            if begun:
                self.streams[who] -= 1
                if self.streams[who] == 0:
                    del self.streams[who]

    async def _refused(self, scope: Scope) -> Answer | None:
        """What the request is told in place of an answer; None where it may pass: then its scope says who asks, and by
        which of our origins."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        cookies = "; ".join(value.decode("latin-1") for name, value in scope["headers"] if name == b"cookie")
        query, path = scope["query_string"].decode("latin-1"), scope["path"]
        ours = self.origins.get(headers.get(b"host", ""))
        if ours is None:
            return refusal(421, "This server is known by another name.")
        if headers.get(b"origin", ours) != ours:
            return refusal(403, "Another page asks.")
        if any(part in path for part in UNUSED):
            return refusal(404, "There is nothing here.")
        cookie = self.authenticator.opened(query)
        if cookie is not None:
            return 303, b"", [(b"location", b"/"), (b"set-cookie", cookie.encode())]
        try:
            person = await run_in_threadpool(self.authenticator.who, cookie_parser(cookies))
        except StorageError:
            return refusal(503, CANNOT_READ)  # and not why: it may be a stranger who asks
        if person is None and (answer := self.authenticator.unauthenticated(path, query)) is not None:
            return answer
        if path.startswith(MANAGE) and not (person and manages(person)):
            return refusal(403, "This page is for reviewers and admins.")
        scope["person"], scope["origin"] = person, ours
        problem = unlike_the_page(scope["method"], path, headers)
        return refusal(415, problem) if problem else None


def manages(person: Person) -> bool:
    """Whether there is a project of which they see more than its items."""
    return any(person.may(project, "reviewer") for project in person.roles)


def unlike_the_page(method: str, path: str, headers: Mapping[bytes, str]) -> str:
    """What keeps a request from being one of our own pages'; empty where nothing does."""
    if method in ("GET", "HEAD"):
        return ""
    sent, most = headers.get(b"content-type", ""), BODY_LIMIT
    if path in FORMS:
        most = FORM_LIMIT
        if not sent.startswith("application/x-www-form-urlencoded") or b"origin" not in headers:
            return "Send the form from its own page."
    elif path.startswith("/api/"):
        if not sent.startswith("application/json") or b"x-align" not in headers:
            return "Send JSON, with the header X-Align."
    elif path.startswith(f"{MANAGE}/gradio_api/queue/"):
        if not sent.startswith("application/json") or b"origin" not in headers:
            return "Send JSON from the page itself."
    else:  # Gradio's own, such as uploads, which no page has a use for
        return "There is nothing here that could be changed."
    length = headers.get(b"content-length", "") if b"transfer-encoding" not in headers else ""
    return "" if length.isdigit() and int(length) <= most else f"Send at most {most} bytes, and say so."


def session_cookie(name: str, session: str, origin: str, seconds: int) -> str:
    """The header that gives a browser a session; an empty one with 0 seconds takes it."""
    secure = "; Secure" if origin.startswith("https:") else ""
    return f"{name}={quote(session)}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Lax{secure}"


def refusal(status: int, problem: str) -> Answer:
    said = {"problem": problem, "detail": escape(problem)}  # Gradio's pages show the latter, as HTML
    return status, json.dumps(said).encode(), [(b"content-type", b"application/json")]


def in_words(status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> Answer:
    """A refusal for whoever typed an address into a browser."""
    if not body:
        return status, body, headers
    return status, json.loads(body)["problem"].encode(), [(b"content-type", b"text/plain; charset=utf-8")]


async def respond(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *HEADERS]})
    await send({"type": "http.response.body", "body": body})
