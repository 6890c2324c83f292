"""The ASGI app of the registry's pages: one HTML page, whose script loads views as HTML fragments."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers
from starlette.types import ASGIApp

from align.core.errors import InputError, MissingArtifact, StorageError
from align.registry.index import Index, query_index
from align.registry.page.templating import render
from align.registry.page.views import (
    NEWEST,
    Filters,
    describe_error,
    get_record,
    render_aliases,
    render_comparison,
    render_report_blocks,
    render_run,
    render_runs,
)
from align.registry.trace import VoteReader
from align.report.page import POLICY as REPORT_POLICY
from align.run.manifest import Manifest
from align.web.auth import Authenticator, AuthMiddleware, Visitor, build_error_response

STATIC = Path(__file__).parent / "static"
POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
"""Content-Security-Policy of the page and its views: plots have inline styles, and no script is inline."""
INERT = f"sandbox allow-popups allow-top-navigation-by-user-activation; {REPORT_POLICY}"
"""Content-Security-Policy of a run's report: no script runs, and the page has no origin, as anyone may have
written it."""
LONGEST = 2000
"""Largest number of characters of a query's text."""
Text = Annotated[str, Query(max_length=LONGEST)]


def build_registry_application(
    root: Path,
    vote_reader: VoteReader,
    command: Callable[[Manifest], str],
    authenticator: Authenticator[Visitor],
    origins: Sequence[str],
) -> ASGIApp:
    """Return the ASGI app of the registry's read-only pages, with authentication by `authenticator`.

    Args:
        root: the folder of all runs.
        vote_reader: reads the votes of a run from the annotation store.
        command: returns the command line that repeats a manifest's run.
        origins: origins of the server in browsers, such as http://127.0.0.1:7862.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_route("/", lambda request: HTMLResponse(render("page.html")))
    app.include_router(make_view_routes(root, vote_reader, command))
    app.include_router(make_file_routes(root))
    app.mount("/align", StaticFiles(directory=STATIC))
    for error, status in {MissingArtifact: 404, StorageError: 503, InputError: 422}.items():
        app.add_exception_handler(error, make_error_handler(status))
    return AuthMiddleware(app, authenticator, origins, refuse_writes, policy=POLICY, max_streams=0, max_streams_each=0)


def make_error_handler(status: int) -> Callable[[Request, Exception], JSONResponse]:
    """Return an exception handler that turns an InputError into a JSON response with the given HTTP status."""

    def answer(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, InputError)
        return JSONResponse({"problem": describe_error(error)}, status)

    return answer


def refuse_writes(visitor: Visitor | None, method: str, path: str, headers: Headers) -> Response | None:
    """Return None for a GET or HEAD request, and a 405 response for any other."""
    return None if method in ("GET", "HEAD") else build_error_response(405, "This page is read-only.")


def make_view_routes(root: Path, vote_reader: VoteReader, command: Callable[[Manifest], str]) -> APIRouter:
    """Return a router with one GET route per view under `/view`, which return HTML fragments for the page's script."""
    router = APIRouter(prefix="/view", default_response_class=HTMLResponse)
    executor = ThreadPoolExecutor(1, "drawing")  # of its own, so that a plot delays no table

    async def run_drawing(draw: Callable[[], str]) -> str:
        return await asyncio.get_running_loop().run_in_executor(executor, draw)

    @router.get("/runs")
    def runs(
        text: Text = "",
        stage: Text = "",
        status: Text = "",
        where: Text = "",
        sort: Text = NEWEST,
        page: Annotated[int, Query(ge=1, le=10**6)] = 1,
    ) -> str:
        filters = Filters(text, stage, status, where, sort, page)
        return query_index(root, lambda index: render_runs(index, filters, datetime.now(UTC)))

    @router.get("/run")
    def run(run: Text) -> str:
        return query_index(root, lambda index: render_run(index, run, vote_reader, datetime.now(UTC)))

    @router.get("/report")
    async def report(run: Text) -> str:
        return await run_drawing(
            lambda: render_report_blocks(root, query_index(root, lambda index: get_record(index, run)), command)
        )

    @router.get("/compare")
    async def compare(runs: Annotated[list[Text], Query()]) -> str:
        return await run_drawing(lambda: query_index(root, lambda index: render_comparison(index, root, runs)))

    @router.get("/aliases")
    def aliases(alias: Text = "") -> str:
        return query_index(root, lambda index: render_aliases(index, alias))

    return router


def make_file_routes(root: Path) -> APIRouter:
    """Return a router for the generated style sheet and for each run's `report.html` under `/runs/STAGE/NAME/`.

    Links between reports are relative, so they work under these addresses.
    """
    router = APIRouter()

    @router.get("/align/blocks.css")
    def style() -> Response:
        return Response(render("registry-blocks.css"), media_type="text/css")

    @router.get("/runs/{stage}/{name}/report.html")
    def report(stage: str, name: str) -> Response:
        def path_in(index: Index) -> Path:
            return root / get_record(index, f"{stage}:{name}")["folder"] / "report.html"

        path = query_index(root, path_in)
        if path.is_symlink() or not path.is_file():  # a link may lead outside the runs
            raise HTTPException(404, "This run has no report.")
        return FileResponse(path, media_type="text/html; charset=utf-8", headers={"content-security-policy": INERT})

    return router
