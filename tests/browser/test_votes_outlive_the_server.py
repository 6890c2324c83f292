"""Votes survive a server that is killed and started again, other tabs, full disks and locked databases."""

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
from annotation_app import LOST, fill, wait_for_status
from free_ports import pick_free_port
from sqlalchemy import event

from align.annotate.store import Store, connections

pytestmark = pytest.mark.slow


def start(root: Path, port: int) -> tuple[subprocess.Popen[str], str]:
    """Start a server by its command, and return the process and the link that it prints."""
    overrides = ["stage=annotate", "stage.demo=true", "project=p", f"run.root={root}", f"stage.port={port}"]
    server = subprocess.Popen([sys.executable, "-u", "-m", "align", *overrides], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        if match := re.match(r"open (http://127\.0\.0\.1:\d+/\?key=\S+)", line):
            return server, match[1]
    raise AssertionError("the server did not start")


def open_page(page: Any, link: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            page.goto(link)
            break
        except Exception:  # it has printed its link and does not listen yet
            assert time.monotonic() < deadline
            time.sleep(0.2)
    page.wait_for_selector("#align-app header", timeout=60_000)


def test_killed_in_the_middle_it_loses_nothing_and_the_page_goes_on(page: Any, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    port = pick_free_port()
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
    wait_for_status(page, "does not answer")
    server, second_link = start(root, port)
    assert second_link == link  # the page's key still opens
    page.wait_for_function("document.querySelector('#said').textContent.includes('Saved')", timeout=60_000)
    page.wait_for_selector("#align-app form")
    page.keyboard.press("4")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('header').textContent.includes('You: 4')")
    server.send_signal(signal.SIGINT)
    out = server.communicate(timeout=60)[0]
    assert server.returncode == 0
    assert "2 rankings; all: 4 of 6" in out
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
    app.instead["/api/vote"] = answer
    page.keyboard.press("6")
    page.keyboard.press("Enter")
    wait_for_status(page, "does not answer")
    del app.instead["/api/vote"]
    page.wait_for_selector("text=Nothing is left")
    assert [vote.strength for vote in app.votes] == [2]


def test_words_written_while_the_server_was_away_outlive_a_reload(serve: Any, page: Any) -> None:
    app = serve([("yes", "no")])
    app.open(page)
    app.instead["/api/draft"] = LOST
    page.keyboard.press("w")
    page.keyboard.type("a long answer of my own")
    wait_for_status(page, "does not answer")
    page.reload()
    page.wait_for_selector("#align-demonstration")
    assert page.input_value("#align-demonstration") == "a long answer of my own"
    del app.instead["/api/draft"]
    page.keyboard.press("s")
    page.keyboard.press("5")
    page.wait_for_selector("text=Nothing is left")
    assert [(skip.skipped, skip.demonstration) for skip in app.store.skips("p")] == [
        ("other", "a long answer of my own")
    ]


def test_two_tabs_of_one_annotator(serve: Any, page: Any) -> None:
    app = serve([("yes", "no"), ("yes", "no")])
    app.open(page)
    other_page = app.open(page.context.new_page())
    assert page.inner_text(".prompt") == other_page.inner_text(".prompt")
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('header').textContent.includes('You: 1')")
    other_page.keyboard.press("7")
    other_page.keyboard.press("Enter")
    other_page.wait_for_function("document.querySelector('header').textContent.includes('You: 1')")
    assert [vote.strength for vote in app.votes] == [3]
    assert other_page.inner_text(".prompt") == page.inner_text(".prompt")  # both show the next item
    assert app.errors == []


def test_a_full_disk_is_said_to_the_annotator_and_the_vote_is_taken_once_there_is_room(serve: Any, page: Any) -> None:
    app = serve([("yes", "no")] * 2)
    app.open(page)
    limit = [1]  # SQLite raises a limit below the file's size to that size
    engine = app.store._engine
    event.listen(engine, "checkout", lambda driver, *_: driver.execute(f"PRAGMA max_page_count = {limit[0]}"))
    page.keyboard.press("r")
    page.keyboard.type("because ")
    page.evaluate("document.activeElement.value = 'because '.repeat(2400)")
    page.keyboard.type("x")
    page.keyboard.press("Escape")
    wait_for_status(page, "disk is full")
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    page.wait_for_timeout(2000)
    assert "are kept in this browser" in page.inner_text("#said")
    assert app.votes == []
    limit[0] = 1_000_000
    page.wait_for_function("document.querySelector('header').textContent.includes('You: 1')")
    assert [len(vote.rationale) for vote in app.votes] == [len("because " * 2400) + 1]


def test_a_database_that_is_locked_for_long_costs_a_wait_and_nothing_else(
    serve: Any, page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock lasts longer than the server waits, and than the page waits before its warning."""
    monkeypatch.setattr(connections, "LOCKED_S", 8)
    app = serve([("yes", "no")] * 2)
    app.open(page)
    with app.store.transaction():  # another writer
        page.keyboard.press("1")
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('#said').textContent.includes('locked')", timeout=45_000)
        assert "are kept in this browser" in page.inner_text("#said")
    page.wait_for_function("document.querySelector('header').textContent.includes('You: 1')", timeout=60_000)
    assert [vote.strength for vote in app.votes] == [3]
    assert app.errors == []
