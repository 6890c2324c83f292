"""The application: what answers, and where."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from align.serve.background_tasks import run_background_tasks
from align.serve.errors import Refusal, fault, invalid
from align.serve.middleware import ServerMiddleware
from align.serve.routes import administration, api, listing
from align.serve.service import Service

UNREADABLE = "unreadable_body"
ROUTING = {
    400: (UNREADABLE, "The body cannot be read. Send JSON in UTF-8."),
    404: ("not_found", "There is nothing at this address."),
    405: ("method_not_allowed", "This address takes another method."),
}
"""What is not routed, by its status: a code and a message."""
CODES = {"too_long": "array_above_max_length", "string_too_long": "string_above_max_length"}
"""OpenAI's codes, by pydantic's types of errors."""
STATIC = Path(__file__).parent / "static"


def application(service: Service, origins: Sequence[str]) -> ASGIApp:
    """The server as an application.

    Args:
        origins: see `ServerMiddleware`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.opened()
        watching = asyncio.create_task(run_background_tasks(service))
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
    return ServerMiddleware(app, service, origins)


async def chat_page() -> Response:
    return FileResponse(STATIC / "index.html")


async def refused(_: Http, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return error.response()


async def misread(_: Http, error: Exception) -> Response:
    """A body that is not what the API takes. What was sent is not repeated."""
    assert isinstance(error, RequestValidationError)
    first = most_telling(error.errors())
    where = ".".join(str(part) for part in first["loc"] if part != "body" and not is_union_member(part))
    if first["type"] == "json_invalid":
        return invalid(None, "The body is no JSON.", UNREADABLE).response()
    if not where and first["type"] in ("missing", "model_attributes_type", "dict_type"):
        message = "The body is no JSON object. Send one, with Content-Type: application/json."
        return invalid(None, message, UNREADABLE).response()
    message = first["msg"][:1].upper() + first["msg"][1:]
    return invalid(where or None, f"{where or 'The body'}: {message}.", CODES.get(first["type"])).response()


def most_telling(errors: Sequence[Any]) -> Any:
    """Return the first error. Of a field that takes several types, the one about the type that was sent."""
    of_field = [each for each in errors if each["loc"][:2] == errors[0]["loc"][:2]]
    return next((each for each in of_field if not each["type"].endswith("_type")), errors[0])


def is_union_member(part: Any) -> bool:
    """Return whether a part of an error's place names a type, such as `list[constrained-str]`, and no field."""
    return isinstance(part, str) and (not part.isidentifier() or part in ("str", "int", "float", "bool"))


async def failed(_: Http, error: Exception) -> Response:
    """A fault of ours, which ServerMiddleware logs."""
    return fault().response()


async def not_routed(_: Http, error: Exception) -> Response:
    """A path or method that is not there, or a body that cannot be read."""
    assert isinstance(error, HTTPException)
    code, words = ROUTING.get(error.status_code, (None, str(error.detail)))
    response = Refusal(error.status_code, words, code=code).response()
    response.headers.update(error.headers or {})
    return response
