"""The outermost layer of the server: authentication, size of the body, headers, and the request log.

Without a key file the server listens on the loopback interface, and a page of another site in a browser on this machine
could ask it: other names of the host (DNS rebinding) and other origins are refused. With one, a request has a key.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from align.core.errors import readable
from align.serve.errors import SERVER, Refusal, fault
from align.serve.rate_limits import RefusalPacer
from align.serve.request_log import Record, Stopwatch
from align.serve.service import CLOSED, Service
from align.serve.tenants import LOCAL, KeysUnreadable, Tenant
from align.web.auth import HEADERS

log = logging.getLogger(__name__)
ASKED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/rewards"})
"""Paths that hold no secret of anybody's. Looking for one reads the whole environment."""
OPEN = re.compile(r"/|/health|/ready|/static/[\w.-]+")
"""Paths that anybody may ask for: they tell nothing of anybody."""
BODY_LIMIT = 1_000_000
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class Gone(Exception):
    """The client has gone before it was read."""


class ServerMiddleware:
    """See the module. The scope of a request that passes has its `tenant`, its `record`, a `watch` that was started
    when it came, and `streams`: the `align.serve.service.EventStream` that is to answer it, if one is.

    Args:
        origins: under which browsers on this machine know the server; asked where there are no keys.
        body_limit: bytes.
    """

    def __init__(self, app: ASGIApp, service: Service, origins: Sequence[str], body_limit: int = BODY_LIMIT) -> None:
        self.app, self.service, self.body_limit = app, service, body_limit
        self.pace = RefusalPacer(time.monotonic)
        self.origins: Collection[str] = {origin.lower() for origin in origins}
        self.hosts: Collection[str] = {urlsplit(origin).netloc for origin in self.origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["path"] in ASKED else readable(scope["path"][:100])
        record = Record(f"req-{secrets.token_hex(12)}", path)
        scope["record"], scope["watch"], scope["streams"] = record, Stopwatch(), list[Any]()
        counted = scope["path"].startswith("/v1/") and scope["method"] == "POST"

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] == 429:
                    with self.pace.hold(record.tenant) as wait, suppress(TimeoutError):
                        if wait > 0:  # or the server ends
                            await asyncio.wait_for(self.service.ending.wait(), wait)
                record.status = record.status or message["status"]
                headers = [*message.get("headers", []), *HEADERS, (b"content-security-policy", POLICY.encode())]
                if record.tenant and counted:
                    limits = self.service.limiter.headers(scope["tenant"])
                    headers += [(name.encode(), value.encode()) for name, value in limits.items()]
                message = {**message, "headers": [*headers, (b"x-request-id", record.id.encode())]}
            await send(message)

        try:
            headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
            scope["tenant"] = tenant = await self._tenant(scope["path"], headers)
            record.tenant = tenant.name if tenant else ""
            receiving = replayed(await self._body(headers, receive), receive)
            await self.app(scope, receiving, sending)
            for stream in scope["streams"]:
                await stream.answer(receiving, sending)
        except Refusal as refusal:
            await refusal.response()(scope, receive, sending)
        except Gone:
            record.status = CLOSED
        except Exception:
            log.exception("%s failed", record.id)
            if not record.status:
                await fault().response()(scope, receive, sending)
        finally:
            record.seconds = scope["watch"]()
            if counted:
                self.service.done(record)

    async def _tenant(self, path: str, headers: dict[bytes, str]) -> Tenant | None:
        """Who asks; None for somebody unknown at an open path.

        Raises:
            Refusal: they may not.
        """
        if self.service.keys is None:
            if headers.get(b"host", "").lower() not in self.hosts:
                raise Refusal(421, "This server is known by another name.")
            if headers.get(b"origin", "").lower() not in {"", *self.origins}:
                raise Refusal(403, "Another page asks.")
            return LOCAL
        kind, _, key = headers.get(b"authorization", "").partition(" ")
        if kind.lower() != "bearer" or not key:
            if OPEN.fullmatch(path):
                return None
            raise Refusal(401, "Send your key: Authorization: Bearer KEY.", code="missing_api_key")
        try:
            tenant = self.service.keys.find_tenant(key.strip())
        except KeysUnreadable as error:
            raise Refusal(503, str(error), type=SERVER, retry_after_s=10) from error
        if tenant is None and not OPEN.fullmatch(path):
            raise Refusal(401, "This key is not known here.", code="invalid_api_key")
        return tenant

    async def _body(self, headers: dict[bytes, str], receive: Receive) -> bytes:
        """The whole body, which is read before anything is done with it.

        Raises:
            Refusal: it is larger than it may be.
            Gone: it was never sent whole.
        """
        said = headers.get(b"content-length", "0")
        parts, size = [], int(said) if said.isdigit() else 0
        while size <= self.body_limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            parts.append(message.get("body", b""))
            size = max(size, sum(map(len, parts)))
            if not message.get("more_body", False):
                return b"".join(parts)
        # uvicorn passes over the rest, until its deadline: a client that is cut off while it sends reads no answer.
        raise Refusal(413, f"Send at most {self.body_limit:,} bytes.", code="request_too_large")


def replayed(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, then whatever else is received: that the client has gone."""
    read = False

    async def receiving() -> Message:
        nonlocal read
        if read:
            return await receive()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receiving
