"""The application: what answers, and where."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from align.serve.door import Door
from align.serve.refusals import Refusal, fault, invalid
from align.serve.routes import administration, api, listing
from align.serve.service import Service
from align.serve.watching import watch

STATIC = Path(__file__).parent / "static"


def application(service: Service, origins: Sequence[str]) -> ASGIApp:
    """The server as an application.

    Args:
        origins: see `Door`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.opened()
        watching = asyncio.create_task(watch(service))
        yield
        watching.cancel()

    app = FastAPI(title="align", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.include_router(listing(service))
    app.include_router(api(service))
    app.include_router(administration(service))
    app.mount("/static", StaticFiles(directory=STATIC))
    app.add_api_route("/", chat_page, include_in_schema=False)
    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(RequestValidationError, misread)
    app.add_exception_handler(HTTPException, not_routed)
    app.add_exception_handler(Exception, failed)
    return Door(app, service, origins)


async def chat_page() -> Response:
    return FileResponse(STATIC / "index.html")


async def refused(_: Http, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return answer(error)


async def misread(_: Http, error: Exception) -> Response:
    """A body that is not what the API takes. What was sent is not repeated."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid":
        return answer(invalid(None, "The body is no JSON."))
    if not where and first["type"] in ("model_attributes_type", "dict_type"):
        return answer(invalid(None, "The body is no JSON object. Send one, with Content-Type: application/json."))
    message = first["msg"][:1].upper() + first["msg"][1:]
    return answer(invalid(where or None, f"{where or 'The body'}: {message}."))


async def failed(_: Http, error: Exception) -> Response:
    """A fault of ours, which Door logs."""
    return answer(fault())


async def not_routed(_: Http, error: Exception) -> Response:
    """A path or method that is not there, or a body that cannot be read."""
    assert isinstance(error, HTTPException)
    words = {404: "There is nothing at this address.", 405: "This address takes another method."}
    refusal = Refusal(error.status_code, words.get(error.status_code, str(error.detail)), code="not_found")
    made = answer(refusal)
    made.headers.update(error.headers or {})
    return made


def answer(refusal: Refusal) -> Response:
    return Response(refusal.encoded, refusal.status, refusal.headers, "application/json")
