"""The annotation app in a real browser: Chromium, headless, against a server of the test's own."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from align.types import Conversation, Message
from annotate.assignment import Desk
from annotate.store import Candidate, Store, Vote, configure

KEY = "k" * 32
WHO = "ann"


@dataclass
class App:
    """A store, the server on it, and what the page asked for and complained about."""

    store: Store
    url: str
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def votes(self) -> list[Vote]:
        return self.store.rankings("p")

    def open(self, page: Any) -> Any:
        """The page with its first item, watched."""
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: (self.errors.append(dialog.message), dialog.dismiss()))
        page.goto(f"{self.url}/?key={KEY}")
        page.wait_for_selector("#align-rank header", timeout=60_000)
        return page


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def fill(store: Store, answers: Sequence[Sequence[str]], **settings: Any) -> None:
    """One item for each sequence of answers."""
    for i, texts in enumerate(answers):
        prompt = Conversation((Message("system", "Be kind."), Message("user", f"Question {i}?")))
        store.add_item("p", f"run/{i}", prompt, [Candidate(text) for text in texts])
    configure(store, "p", settings)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed (Debian's package `chromium`)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra `dev`)")
    with playwright.sync_playwright() as running:
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


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., App]]:
    """Starts the app on items with these answers."""
    import uvicorn

    from annotate.web.server import application

    running: list[tuple[Any, threading.Thread, Store]] = []

    def start(answers: Sequence[Sequence[str]], **settings: Any) -> App:
        store, port = Store.open(f"sqlite:///{tmp_path / 'annotations.db'}"), free_port()
        fill(store, answers, **settings)
        app = application(Desk(store, "p"), WHO, KEY, port)
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", ws="none"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread, store))
        while not server.started:
            time.sleep(0.01)
        return App(store, f"http://127.0.0.1:{port}")

    yield start
    for server, thread, store in running:
        server.should_exit = True
        thread.join(20)
        store.close()
