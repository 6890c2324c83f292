"""Errors as JSON: the field, the problem and the remedy, for the page that asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from align.core.errors import InputError, StorageError

CANNOT_READ = "The server cannot read its store."


def explain_errors(app: FastAPI, statuses: Mapping[type[InputError], int]) -> None:
    """Has an app answer errors of ours with these statuses, and a body that cannot be read with 422."""
    app.add_exception_handler(RequestValidationError, respond_to_invalid_body)
    for error, status in statuses.items():
        app.add_exception_handler(error, respond_by(status))


def respond_by(status: int) -> Callable[[Request, Exception], JSONResponse]:
    """An error of ours as JSON."""

    def answer(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, InputError)
        if isinstance(error, StorageError) and request.scope["person"] is None:
            return JSONResponse({"problem": CANNOT_READ}, status)  # a database says more than strangers should read
        return JSONResponse({"field": error.field, "problem": error.problem, "remedy": error.remedy}, status)

    return answer


def respond_to_invalid_body(_: Request, error: Exception) -> JSONResponse:
    """A body that is none, without its words: they may be what cannot be written."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    return JSONResponse({"field": where, "problem": f"{where}: {first['msg']}", "remedy": "Reload the page."}, 422)
