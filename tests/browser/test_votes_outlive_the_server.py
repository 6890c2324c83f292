"""The server is killed and started again under an annotator's hands; another tab; another window's vote."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from annotation_app import fill, free_port

from annotate.store import Store

pytestmark = pytest.mark.slow


def start(root: Path, port: int) -> tuple[subprocess.Popen[str], str]:
    """The command that a user gives, and the link that it prints."""
    words = ["stage=annotate", "project=p", f"run.root={root}", f"stage.port={port}"]
    server = subprocess.Popen([sys.executable, "-u", "-m", "align", *words], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.match(r"open (http://127\.0\.0\.1:\d+/\?key=\S+)", line):
            return server, found[1]
    raise AssertionError("the server did not start")


def open_page(page: Any, link: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            page.goto(link)
            break
        except Exception:  # it has said its link and is not listening yet
            assert time.monotonic() < deadline
            time.sleep(0.2)
    page.wait_for_selector("#align-rank header", timeout=60_000)


def test_killed_in_the_middle_it_loses_nothing_and_the_page_goes_on(page: Any, tmp_path: Path) -> None:
    root, port = tmp_path / "runs", free_port()
    root.mkdir()
    with Store.open(f"sqlite:///{root / 'annotations.db'}") as store:
        fill(store, [("yes", "no")] * 6)
    server, link = start(root, port)
    open_page(page, link)
    for _ in range(2):
        page.keyboard.press("2")
        page.keyboard.press("Enter")
        page.wait_for_timeout(800)
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    page.keyboard.press("6")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#said').textContent.includes('does not answer')")
    server, again = start(root, port)
    assert again == link  # the page's key still opens
    page.wait_for_function("document.querySelector('#said').textContent.includes('Saved')", timeout=60_000)
    page.wait_for_selector("#align-rank form")
    page.keyboard.press("4")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('header').textContent.includes('You: 4')")
    server.send_signal(signal.SIGINT)
    out = server.communicate(timeout=60)[0]
    assert server.returncode == 0
    assert "2 rankings by" in out
    assert (root / "annotate.key").stat().st_mode & 0o777 == 0o600
    with Store.open(f"sqlite:///{root / 'annotations.db'}") as store:
        store.verify()
        votes = store.rankings("p")
        assert [vote.strength for vote in votes] == [2, 2, 2, 0]
        assert len({vote.item for vote in votes}) == 4


def test_what_waits_for_one_project_is_not_thrown_at_another(serve: Any, page: Any) -> None:
    app = serve([("yes", "no")])
    page.add_init_script("localStorage.setItem('align-outbox/another', '[{\"key\": \"theirs\"}]')")
    app.open(page)
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Nothing is left")
    assert page.evaluate("localStorage.getItem('align-outbox/another')") == '[{"key": "theirs"}]'


@pytest.mark.parametrize("answer", [(404, "<h1>not here</h1>"), (200, "<h1>hello</h1>"), (200, "{}"), (503, "{}")])
def test_an_answer_that_is_not_the_servers_loses_nothing(serve: Any, page: Any, answer: tuple[int, str]) -> None:
    app = serve([("yes", "no")])
    app.open(page)
    status, body = answer
    page.route("**/api/vote", lambda route: route.fulfill(status=status, body=body))
    page.keyboard.press("6")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#said').textContent.includes('does not answer')")
    page.unroute("**/api/vote")
    page.wait_for_selector("text=Nothing is left")
    assert [vote.strength for vote in app.votes] == [2]


def test_words_written_while_the_server_was_away_outlive_a_reload(serve: Any, page: Any) -> None:
    app = serve([("yes", "no")])
    app.open(page)
    page.route("**/api/draft", lambda route: route.abort())
    page.keyboard.press("w")
    page.keyboard.type("a long answer of my own")
    page.wait_for_function("document.querySelector('#said').textContent.includes('does not answer')")
    page.reload()
    page.wait_for_selector("#align-demonstration")
    assert page.input_value("#align-demonstration") == "a long answer of my own"
    page.unroute("**/api/draft")
    page.keyboard.press("s")
    page.keyboard.press("5")
    page.wait_for_selector("text=Nothing is left")
    assert [(skip.skipped, skip.demonstration) for skip in app.store.skips("p")] == [
        ("other", "a long answer of my own")
    ]


def test_two_tabs_of_one_annotator(serve: Any, page: Any) -> None:
    app = serve([("yes", "no"), ("yes", "no")])
    app.open(page)
    other = app.open(page.context.new_page())
    assert page.inner_text(".prompt") == other.inner_text(".prompt")
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('header').textContent.includes('You: 1')")
    other.keyboard.press("7")
    other.keyboard.press("Enter")
    other.wait_for_function("document.querySelector('header').textContent.includes('You: 1')")
    assert [vote.strength for vote in app.votes] == [3]
    assert other.inner_text(".prompt") == page.inner_text(".prompt")  # both have gone on
    assert app.errors == []
