"""The annotation app. One process serves a store with all its projects."""

from __future__ import annotations

import os
from collections.abc import Sequence

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # else it sends data when it starts

import gradio
from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.types import ASGIApp

from align.annotate.accounts import Person
from align.annotate.store import AlreadyJudged, Store
from align.annotate.web.access import MANAGE, AccountAuthenticator, require_login
from align.annotate.web.dashboard import build_figure_routes
from align.annotate.web.login import build_login_routes
from align.annotate.web.manage import MANAGE_HEAD, Manager, build_manage_page
from align.annotate.web.routes import build_routes
from align.annotate.web.templating import STATIC
from align.core.errors import InputError, StorageError
from align.web.auth import Authenticator
from align.web.credentials import AccessRefused
from align.web.errors import add_error_handlers
from align.web.gradio_pages import MOUNT_SETTINGS
from align.web.server import raise_connection_limit

HEAD = """<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="/align/app.css"><script type="module" src="/align/rank.js"></script>"""


def build_page() -> gradio.Blocks:
    with gradio.Blocks(title="align", analytics_enabled=False, fill_width=True) as blocks:
        gradio.HTML('<div id="align-app"></div>', elem_id="align", padding=False)
    return blocks


def build_app(store: Store, authenticator: Authenticator[Person], origins: Sequence[str]) -> ASGIApp:
    """Build the annotation server's ASGI app: the annotators' and managers' pages and JSON routes, behind a login.

    Args:
        origins: origins of the server as browsers know it, such as http://127.0.0.1:7861.
    """
    accounts = authenticator.accounts if isinstance(authenticator, AccountAuthenticator) else None
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(build_routes(store, has_accounts=accounts is not None))
    if isinstance(authenticator, AccountAuthenticator):
        app.include_router(build_login_routes(authenticator.accounts, authenticator.cookie))
    app.include_router(build_figure_routes(store))
    app.mount("/align", StaticFiles(directory=STATIC))
    add_error_handlers(app, {AlreadyJudged: 409, StorageError: 503, AccessRefused: 403, InputError: 422})
    manager = Manager(store, accounts, authenticator, origins[0])
    app = gradio.mount_gradio_app(app, build_manage_page(manager), path=MANAGE, head=MANAGE_HEAD, **MOUNT_SETTINGS)
    # Mounted last, because it matches every path.
    app = gradio.mount_gradio_app(app, build_page(), path="/", head=HEAD, **MOUNT_SETTINGS)
    return require_login(app, authenticator, origins, streams=raise_connection_limit() // 4)
