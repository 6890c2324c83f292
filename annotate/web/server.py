"""The app: what answers, and where. One process serves a store, every project of it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

from align.errors import InputError, StorageError
from annotate.credentials import Refused
from annotate.store import AlreadyJudged

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # else it calls out when it starts

import gradio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.types import ASGIApp

from annotate.web.connections import Server, heard, places
from annotate.web.dashboard import files
from annotate.web.entrance import entrance
from annotate.web.gate import CANNOT_READ, MANAGE, AccountAuthenticator, Authenticator, Gate, KeyAuthenticator
from annotate.web.manage import MANAGE_HEAD, Manager, manage_page
from annotate.web.page import HEAD, page
from annotate.web.queues import AssignmentQueues
from annotate.web.routes import routes
from annotate.web.words import STATIC

__all__ = ["AccountAuthenticator", "Authenticator", "KeyAuthenticator", "application", "serve"]


def application(queues: AssignmentQueues, authenticator: Authenticator, origins: Sequence[str]) -> ASGIApp:
    """The app for whoever comes in by `authenticator`.

    Args:
        origins: under which browsers know the server, such as http://127.0.0.1:7861.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(routes(queues, accounts=isinstance(authenticator, AccountAuthenticator)))
    known = authenticator.accounts if isinstance(authenticator, AccountAuthenticator) else None
    if isinstance(authenticator, AccountAuthenticator):
        app.include_router(entrance(authenticator.accounts, authenticator.cookie))
    app.include_router(files(queues.store))
    app.mount("/align", StaticFiles(directory=STATIC))
    app.add_exception_handler(RequestValidationError, misread)
    for error, status in ((AlreadyJudged, 409), (StorageError, 503), (Refused, 403), (InputError, 422)):
        app.add_exception_handler(error, explained(status))
    quiet = {"footer_links": [], "run_history": False, "ssr_mode": False, "enable_monitoring": False}
    app = gradio.mount_gradio_app(
        app, manage_page(Manager(queues, known, authenticator, origins[0])), path=MANAGE, head=MANAGE_HEAD, **quiet
    )
    app = gradio.mount_gradio_app(app, page(), path="/", head=HEAD, **quiet)  # what comes after it is never asked
    return Gate(app, authenticator, origins, streams=places() // 4)


def explained(status: int) -> Callable[[Request, Exception], JSONResponse]:
    """An error of ours as JSON."""

    def answer(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, InputError)
        if isinstance(error, StorageError) and request.scope["person"] is None:
            return JSONResponse({"problem": CANNOT_READ}, status)  # a database says more than strangers should read
        return JSONResponse({"field": error.field, "problem": error.problem, "remedy": error.remedy}, status)

    return answer


def misread(_: Request, error: Exception) -> JSONResponse:
    """A body that is none, without its words: they may be what cannot be written."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    return JSONResponse({"field": where, "problem": f"{where}: {first['msg']}", "remedy": "Reload the page."}, 422)


def serve(app: ASGIApp, host: str, port: int, told: Callable[[], None]) -> None:
    """Serves until interrupted. `told` is called when the port is ours.

    Raises:
        InputError: the port is taken, or the host is none of this machine's.
    """
    with listening(host, port) as listener, heard():
        told()
        with suppress(KeyboardInterrupt):  # which the server passes on when it has ended what was under way
            Server(app, host, port).run(sockets=[listener])


def listening(host: str, port: int) -> socket.socket:
    """A socket on the port; raises as `serve` does.

    It says that it is TCP: asyncio turns Nagle's algorithm off for sockets that do, and else an answer of two pieces
    waits 40 ms for the browser to acknowledge the first.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        remedy = f"Give another, such as stage.port={port + 1 if port < 65535 else port - 1}."
        raise InputError("stage.port", port, f"it cannot be had ({error.strerror})", remedy) from error
    return listener
