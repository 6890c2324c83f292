"""Errors as JSON: the field, the problem and the remedy, for the page that sent the request."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from align.core.errors import InputError, StorageError

CANNOT_READ = "The server cannot read its store."


def add_error_handlers(app: FastAPI, statuses: Mapping[type[InputError], int]) -> None:
    """Register handlers on a FastAPI app that answer our errors with these HTTP statuses, and an invalid body with
    422."""
    app.add_exception_handler(RequestValidationError, respond_to_invalid_body)
    for error, status in statuses.items():
        app.add_exception_handler(error, make_error_handler(status))


def make_error_handler(status: int) -> Callable[[Request, Exception], JSONResponse]:
    """Return a handler that answers an error with this HTTP status and its message as JSON."""

    def respond(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, InputError)
        if isinstance(error, StorageError) and request.scope["person"] is None:
            # The message of a database holds more than an unknown visitor may read.
            return JSONResponse({"problem": CANNOT_READ}, status)
        return JSONResponse({"field": error.field, "problem": error.problem, "remedy": error.remedy}, status)

    return respond


def respond_to_invalid_body(_: Request, error: Exception) -> JSONResponse:
    """Return the response to an invalid body: the first wrong field, without its value, which may not be encodable."""
    assert isinstance(error, RequestValidationError)
    first_error = error.errors()[0]
    field = ".".join(str(part) for part in first_error["loc"][1:])
    content = {"field": field, "problem": f"{field}: {first_error['msg']}", "remedy": "Reload the page."}
    return JSONResponse(content, 422)
