"""Answers on their way out: as server-sent events, or whole; and what happens when the client goes away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from pydantic_core import to_json
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from align.serve.answers import Answers
from align.serve.errors import Refusal, fault
from align.serve.service import Call, gone

log = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"


def event(data: Any) -> bytes:
    return b"data: " + to_json(data) + b"\n\n"


@asynccontextmanager
async def answering(call: Call, receive: Receive) -> AsyncIterator[None]:
    """For as long as a call is under way: if the client goes, the call ends, and its slot is free."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        call.end(gone())

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        call.close()
        with suppress(asyncio.CancelledError):
            await watching


async def whole(call: Call, answers: Answers, receive: Receive, headers: Mapping[str, str]) -> Response:
    """All answers at once.

    Raises:
        Refusal: one of them failed, or the client has gone.
    """
    async with answering(call, receive):
        async for heard in call.outputs():
            for i, output in heard:
                for _ in answers.take(i, output):
                    pass
    return JSONResponse(answers.whole(), headers=dict(headers))


class EventStream(Response):
    """The answers in chunks, while they are made. An error on the way is an event of its own, and the last.

    As a response it only adds itself to the scope's `streams`. `align.serve.middleware.ServerMiddleware` sends it when
    routing is done: otherwise each piece would pass through twenty layers.
    """

    media_type = "text/event-stream"

    def __init__(self, call: Call, answers: Answers, usage: bool, headers: Mapping[str, str]) -> None:
        super().__init__(headers=dict(headers))
        del self.headers["content-length"]
        self.call, self.answers, self.usage = call, answers, usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["streams"].append(self)

    async def answer(self, receive: Receive, send: Send) -> None:
        try:
            await self._answer(receive, send)
        except Refusal as refusal:  # what was used could not be counted: the head has gone, and the log says why
            log.error("%s: %s", self.call.record.id, refusal.message)
            self.call.record.status = refusal.status
        await send({"type": "http.response.body", "body": b""})

    async def _answer(self, receive: Receive, send: Send) -> None:
        async with answering(self.call, receive):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for part in self._events():
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            except Refusal as refusal:
                await self._fail(refusal, send)
            except Exception:
                log.exception("%s failed", self.call.record.id)
                await self._fail(fault(), send)

    async def _events(self) -> AsyncIterator[bytes]:
        if first := b"".join(map(event, self.answers.first())):
            yield first
        async for heard in self.call.outputs():
            if chunks := b"".join(event(chunk) for i, output in heard for chunk in self.answers.take(i, output)):
                yield chunks
        self.call.close()  # what was used is settled before the client hears that it has all of it
        yield (event(self.answers.usage_chunk()) if self.usage else b"") + DONE

    async def _fail(self, refusal: Refusal, send: Send) -> None:
        self.call.record.status = refusal.status
        await send({"type": "http.response.body", "body": event(refusal.body), "more_body": True})
