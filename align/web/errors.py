"""JSON responses for errors, with the field, the problem and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from align.core.errors import InputError, StorageError

CANNOT_READ = "The server cannot read its store."


def add_error_handlers(app: FastAPI, statuses: Mapping[type[InputError], int]) -> None:
    """Register exception handlers on a FastAPI app that respond to each InputError class of `statuses` with its HTTP
    status, and to an invalid request body with 422."""
    app.add_exception_handler(RequestValidationError, respond_to_invalid_body)
    for error, status in statuses.items():
        app.add_exception_handler(error, make_error_handler(status))


def make_error_handler(status: int) -> Callable[[Request, Exception], JSONResponse]:
    """Return a FastAPI exception handler that responds to an InputError with this HTTP status and its field, problem
    and remedy as JSON. A StorageError's message is replaced for visitors who are not logged in."""

    def respond(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, InputError)
        if isinstance(error, StorageError) and request.scope["person"] is None:
            # The message of a database holds more than an unknown visitor may read.
            return JSONResponse({"problem": CANNOT_READ}, status)
        return JSONResponse({"field": error.field, "problem": error.problem, "remedy": error.remedy}, status)

    return respond


def respond_to_invalid_body(_: Request, error: Exception) -> JSONResponse:
    """Return a JSON response with status 422 that names the first invalid field of a request body. The field's value is
    left out, since it may not be encodable."""
    assert isinstance(error, RequestValidationError)
    first_error = error.errors()[0]
    field = ".".join(str(part) for part in first_error["loc"][1:])
    content = {"field": field, "problem": f"{field}: {first_error['msg']}", "remedy": "Reload the page."}
    return JSONResponse(content, 422)
