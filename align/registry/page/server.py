"""The app: one page that Gradio draws, which a script fills with views; and the views, as HTML of our own making."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # else it calls out when it starts

import gradio
from fastapi import APIRouter, FastAPI, HTTPException, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from align.core.errors import InputError, MissingArtifact, StorageError
from align.registry.index import Index, asked
from align.registry.page.templating import render
from align.registry.page.views import (
    NEWEST,
    Filters,
    aliases_view,
    compare_view,
    describe_error,
    record_in,
    report_view,
    run_view,
    runs_view,
)
from align.registry.trace import Voters
from align.report.page import POLICY as REPORT_POLICY
from align.run.manifest import Manifest
from align.web.auth import Authenticator, AuthMiddleware, Visitor, refusal
from align.web.gradio_pages import POLICY, QUIET, UNUSED
from align.web.server import connection_limit

STATIC = Path(__file__).parent / "static"
HEAD = """<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="align/blocks.css"><link rel="stylesheet" href="align/registry.css">
<script type="module" src="align/registry.js"></script>"""
STREAMS = 8
"""Answers without an end that one visitor may have at once; Gradio has none for a page without events."""
SHUT = (*UNUSED, "/queue/", "/dev/", "/openapi.json")
"""Ways of Gradio's that this page does not go."""
INERT = f"sandbox allow-popups allow-top-navigation-by-user-activation; {REPORT_POLICY}"
"""What a report may do, whoever wrote the file: nothing, and it is of no origin."""
LONGEST = 2000
"""Characters of what somebody types."""
Text = Annotated[str, Query(max_length=LONGEST)]


def application(
    root: Path,
    voters: Voters,
    command: Callable[[Manifest], str],
    authenticator: Authenticator[Visitor],
    origins: Sequence[str],
) -> ASGIApp:
    """The app for whoever comes in by `authenticator`.

    Args:
        root: the folder of all runs.
        voters: asks the annotation store whose votes a run read.
        command: of a manifest, the line that makes its run again.
        origins: under which browsers know the server, such as http://127.0.0.1:7862.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(views(root, voters, command))
    app.include_router(files(root))
    app.mount("/align", StaticFiles(directory=STATIC))
    for error, status in {MissingArtifact: 404, StorageError: 503, InputError: 422}.items():
        app.add_exception_handler(error, told(status))
    app = gradio.mount_gradio_app(app, page(), path="/", head=HEAD, **QUIET)  # what comes after it is never asked
    streams = connection_limit() // 4
    return AuthMiddleware(
        whole(app), authenticator, origins, check, policy=POLICY, unused=SHUT, streams=streams, streams_each=STREAMS
    )


def whole(app: ASGIApp) -> ASGIApp:
    """An app whose page is the same at each address: the query is the script's, and Gradio would read it as its own."""

    async def without_query(scope: Scope, receive: Receive, send: Send) -> None:
        page = scope["type"] == "http" and scope["path"] == "/"
        await app({**scope, "query_string": b""} if page else scope, receive, send)

    return without_query


def told(status: int) -> Callable[[Request, Exception], JSONResponse]:
    """An error of ours for the script, which shows it."""

    def answer(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, InputError)
        return JSONResponse({"problem": describe_error(error)}, status)

    return answer


def page() -> gradio.Blocks:
    with gradio.Blocks(title="align registry", analytics_enabled=False, fill_width=True) as blocks:
        gradio.HTML('<div id="align-registry"></div>', padding=False)
    return blocks


def check(visitor: Visitor | None, method: str, path: str, headers: Headers) -> Response | None:
    """The page reads, and nothing else."""
    return None if method in ("GET", "HEAD") else refusal(405, "There is nothing here that could be changed.")


def views(root: Path, voters: Voters, command: Callable[[Manifest], str]) -> APIRouter:
    """Each view of the page by itself, as the script asks for it."""
    router = APIRouter(prefix="/view", default_response_class=HTMLResponse)
    drawing = ThreadPoolExecutor(1, "drawing")  # of its own, so that whoever waits for a picture holds up no table

    async def drawn(draw: Callable[[], str]) -> str:
        return await asyncio.get_running_loop().run_in_executor(drawing, draw)

    @router.get("/runs")
    def runs(
        text: Text = "", stage: Text = "", status: Text = "", where: Text = "", sort: Text = NEWEST,
        page: Annotated[int, Query(ge=1, le=10**6)] = 1,
    ) -> str:  # fmt: skip
        filters = Filters(text, stage, status, where, sort, page)
        return asked(root, lambda index: runs_view(index, filters, datetime.now(UTC)))

    @router.get("/run")
    def run(run: Text) -> str:
        return asked(root, lambda index: run_view(index, run, voters, datetime.now(UTC)))

    @router.get("/report")
    async def report(run: Text) -> str:
        return await drawn(lambda: report_view(root, asked(root, lambda index: record_in(index, run)), command))

    @router.get("/compare")
    async def compare(runs: Annotated[list[Text], Query()]) -> str:
        return await drawn(lambda: asked(root, lambda index: compare_view(index, root, runs)))

    @router.get("/aliases")
    def aliases(alias: Text = "") -> str:
        return asked(root, lambda index: aliases_view(index, alias))

    return router


def files(root: Path) -> APIRouter:
    """The style of blocks, and the runs' own pages, at addresses under which their links to each other lead on."""
    router = APIRouter()

    @router.get("/align/blocks.css")
    def style() -> Response:
        return Response(render("registry-blocks.css"), media_type="text/css")

    @router.get("/runs/{stage}/{name}/report.html")
    def report(stage: str, name: str) -> Response:
        def path_in(index: Index) -> Path:
            return root / record_in(index, f"{stage}:{name}")["folder"] / "report.html"

        path = asked(root, path_in)
        if path.is_symlink() or not path.is_file():  # a link may lead anywhere
            raise HTTPException(404, "This run has no report.")
        return FileResponse(path, media_type="text/html; charset=utf-8", headers={"content-security-policy": INERT})

    return router
