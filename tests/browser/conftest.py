"""Fixtures that open the annotation app in headless Chromium, against a server that the test starts."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from annotation_app import KEY, WHO, App, fill
from argon2 import PasswordHasher
from free_ports import pick_free_port

from align.annotate.accounts import Accounts, Person
from align.annotate.store import Store


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser for the tests of one file. While Playwright runs, no test in this process can run an event loop."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed (Debian's package `chromium`)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra `dev`)")
    wait = playwright.Page.wait_for_function

    def wait_with_timer(page: Any, expression: str, **options: Any) -> Any:
        """Poll by time, not by animation frame as Playwright does: on a loaded machine frames may be rare."""
        return wait(page, expression, **({"polling": 100} | options))

    with pytest.MonkeyPatch.context() as patch, playwright.sync_playwright() as running:
        patch.setattr(playwright.Page, "wait_for_function", wait_with_timer)
        browser = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(20_000)
    yield page
    context.close()


def wrap_in_proxy(app: Any, instead: dict[str, tuple[int, str]]) -> Any:
    """Wrap an ASGI application: the paths of `instead` get these responses, as of a proxy that cannot reach it."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] not in instead:
            await app(scope, receive, send)
            return
        while (await receive()).get("more_body"):
            pass
        status, body = instead[scope["path"]]
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body.encode()})

    return answer


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., App]]:
    """A function that starts the app on items with the given answers. Visitors need the link or, with `accounts`, an
    account."""
    import uvicorn

    from align.annotate.web.access import AccountAuthenticator
    from align.annotate.web.server import build_app
    from align.web.key_link import KeyAuthenticator

    running: list[tuple[Any, threading.Thread, Store]] = []

    def start(answers: Sequence[Sequence[str]], accounts: bool = False, **settings: Any) -> App:
        store = Store.open(f"sqlite:///{tmp_path / 'annotations.db'}")
        port = pick_free_port()
        fill(store, answers, **settings)
        user_accounts = Accounts(store, hasher=PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))
        authenticator = KeyAuthenticator(KEY, Person(WHO, {"p": "annotator"}), f"align_key_{port}")
        authenticator = AccountAuthenticator(user_accounts, f"align_session_{port}") if accounts else authenticator
        app = build_app(store, authenticator, [f"http://127.0.0.1:{port}"])
        instead: dict[str, tuple[int, str]] = {}
        proxied_app = wrap_in_proxy(app, instead)
        server = uvicorn.Server(uvicorn.Config(proxied_app, host="127.0.0.1", port=port, log_level="error", ws="none"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread, store))
        while not server.started:
            time.sleep(0.01)
        return App(store, f"http://127.0.0.1:{port}", user_accounts, instead)

    yield start
    for server, thread, store in running:
        server.should_exit = True
        thread.join(20)
        store.close()
