"""What the tests of the annotation app share: a filled store, a free port, and the page as it is watched."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from align.annotate.accounts import Accounts
from align.annotate.store import Candidate, Store, Vote, configure
from align.core.types import Conversation, Message

KEY = "k" * 32
WHO = "ann"
LOST = (502, "nobody is there")
"""What a proxy answers that has lost the server, see `App.instead`."""


@dataclass
class App:
    """A store, the server on it, and what the page asked for and complained about.

    Attributes:
        instead: path → the status and body that are answered there in place of the server's own.
    """

    store: Store
    url: str
    accounts: Accounts
    instead: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def votes(self) -> list[Vote]:
        return self.store.rankings("p")

    def watch(self, page: Any) -> Any:
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: (self.errors.append(dialog.message), dialog.dismiss()))
        return page

    def open(self, page: Any) -> Any:
        """The page with its first item, watched."""
        self.watch(page).goto(f"{self.url}/?key={KEY}")
        page.wait_for_selector("#align-app header", timeout=60_000)
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


def said(page: Any) -> str:
    return page.inner_text("#said")


def until(page: Any, text: str) -> None:
    """Waits until the status line has this text; a failure says what it has instead."""
    try:
        page.wait_for_function("text => document.querySelector('#said').textContent.includes(text)", arg=text)
    except Exception as error:
        shown = page.evaluate("[document.querySelector('#said').textContent, document.body.innerText.slice(0, 600)]")
        raise AssertionError(f"no {text!r} on the page: {shown}") from error


def question(page: Any) -> str:
    return re.search(r"Question \d+", page.inner_text(".prompt"))[0]


def next_one(page: Any, before: str) -> None:
    """Waits until another item (or none) is shown."""
    page.wait_for_function(
        "before => !document.querySelector('.prompt')?.textContent.includes(before + '?')", arg=before
    )


def send(page: Any) -> None:
    before = question(page)
    page.keyboard.press("Enter")
    next_one(page, before)
