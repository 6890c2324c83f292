"""A server that neither answers nor exits: the page reports it, aborts a request and sends the same vote again."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from annotation_app import fill
from free_ports import pick_free_port
from test_votes_outlive_the_server import open_page, start

from align.annotate.store import Store
from align.annotate.store.connections import LOCKED_S
from align.annotate.web.templating import STATIC

pytestmark = pytest.mark.slow
SCRIPTS = "".join(path.read_text(encoding="utf-8") for path in STATIC.glob("*.js"))
SLOW_MS, DEADLINE_MS = (int(re.search(rf"{name} = (\d+)", SCRIPTS)[1]) for name in ("SLOW_MS", "DEADLINE_MS"))
SLOW_S = 2.0
DEADLINE_S = 10.0
"""The page's times in these tests, so that no test waits for a minute."""


class Served(NamedTuple):
    """Attributes:
    pid: of the server.
    link: that it printed.
    """

    pid: int
    link: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with items for tests that pause it and resume it."""
    root = tmp_path_factory.mktemp("stopped") / "runs"
    root.mkdir()
    with Store.open(f"sqlite:///{root / 'annotations.db'}") as store:
        fill(store, [("yes", "no")] * 9)
    server, link = start(root, pick_free_port())
    yield Served(server.pid, link)
    os.kill(server.pid, signal.SIGCONT)
    server.send_signal(signal.SIGINT)
    server.communicate(timeout=60)


def shorten_timeouts(page: Any) -> None:
    """Serve the page's own scripts with shorter times."""

    def serve_script(route: Any) -> None:
        response = route.fetch()
        body = response.text()
        for name, original_ms, seconds in (("SLOW_MS", SLOW_MS, SLOW_S), ("DEADLINE_MS", DEADLINE_MS, DEADLINE_S)):
            assert f"{name} = {original_ms}" in body
            body = body.replace(f"{name} = {original_ms}", f"{name} = {seconds * 1000:.0f}")
        route.fulfill(response=response, body=body)

    page.route("**/server.js*", serve_script)


def test_it_is_said_and_the_vote_arrives_once(page: Any, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    port = pick_free_port()
    root.mkdir()
    with Store.open(f"sqlite:///{root / 'annotations.db'}") as store:
        fill(store, [("yes", "no")] * 3)
    server, link = start(root, port)
    vote_requests = []
    failed_urls = []
    page.on("request", lambda request: vote_requests.append(request) if request.url.endswith("/api/vote") else None)
    page.on("requestfailed", lambda request: failed_urls.append(request.url) if "/api/" in request.url else None)
    shorten_timeouts(page)
    try:
        open_page(page, link)
        os.kill(server.pid, signal.SIGSTOP)
        page.keyboard.press("6")
        page.keyboard.press("Enter")
        started_at = time.monotonic()
        page.wait_for_selector("#said:has-text('Saving')")
        page.wait_for_selector("#said:has-text('does not answer')")
        assert time.monotonic() - started_at < SLOW_S + 3
        assert "are kept in this browser" in page.inner_text("#said")
        while len(vote_requests) < 2 and time.monotonic() - started_at < DEADLINE_S + 15:
            page.wait_for_timeout(200)
        assert DEADLINE_S - 1 < time.monotonic() - started_at < DEADLINE_S + 10
        assert any(url.endswith("/api/vote") for url in failed_urls)
        os.kill(server.pid, signal.SIGCONT)
        page.wait_for_function("document.querySelector('header').textContent.includes('You: 1')")
        page.wait_for_selector("#said:has-text('Saved')")
        bodies = [json.loads(request.post_data) for request in vote_requests]
        assert bodies == bodies[:1] * len(bodies)  # with one key, which counts once
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('header').textContent.includes('You: 2')")
    finally:
        os.kill(server.pid, signal.SIGCONT)
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)
    with Store.open(f"sqlite:///{root / 'annotations.db'}") as store:
        store.verify()
        assert [vote.strength for vote in store.rankings("p")] == [2, 3]


def test_every_request_of_the_page_has_the_deadline() -> None:
    assert SCRIPTS.count("fetch(") == 1
    assert SCRIPTS.count("signal: deadline.signal") == 1
    assert DEADLINE_MS / 1000 > LOCKED_S  # LOCKED_S: the server's own wait for a locked database


@pytest.mark.parametrize("act", ["u", "d", "a word"])
def test_whatever_was_asked_the_page_comes_back(page: Any, served: Served, act: str) -> None:
    shorten_timeouts(page)
    open_page(page, served.link)
    vote_count = int(re.search(r"You: (\d+)", page.inner_text("header"))[1])
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"header:has-text('You: {vote_count + 1}')")
    os.kill(served.pid, signal.SIGSTOP)
    try:
        if act == "a word":
            page.keyboard.press("r")
            page.keyboard.type(act)
        else:
            page.keyboard.press(act)
        page.wait_for_selector("#said:has-text('does not answer')")
    finally:
        os.kill(served.pid, signal.SIGCONT)
    page.wait_for_function("!document.querySelector('#said').textContent.includes('does not answer')")
    expected = {"u": "Vote undone", "d": "", "a word": "Draft saved"}[act]
    page.wait_for_function("text => document.querySelector('#said').textContent.includes(text)", arg=expected)
    if act == "d":
        page.wait_for_selector("dialog[open] h2:has-text('Differences')")
