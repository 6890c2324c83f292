"""Helpers for tests of the annotation app: a filled store, a free port, and a page whose requests are recorded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from align.annotate.accounts import Accounts
from align.annotate.store import Candidate, Store, Vote, configure_project
from align.core.types import Conversation, Message

KEY = "k" * 32
WHO = "ann"
LOST = (502, "nobody is there")
"""The response of a proxy that cannot reach the server, see `App.instead`."""


@dataclass
class App:
    """A store, the server on it, and the requests and errors of the page.

    Attributes:
        instead: path → the status and body that are sent there instead of the server's response.
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
        """Open the page, wait for its first item, and record its requests and errors."""
        self.watch(page).goto(f"{self.url}/?key={KEY}")
        page.wait_for_selector("#align-app header", timeout=60_000)
        return page


def fill(store: Store, answers: Sequence[Sequence[str]], **settings: Any) -> None:
    """Add an item for each sequence of answers, and configure the project."""
    for i, texts in enumerate(answers):
        prompt = Conversation((Message("system", "Be kind."), Message("user", f"Question {i}?")))
        store.add_item("p", f"run/{i}", prompt, [Candidate(text) for text in texts])
    configure_project(store, "p", settings)


def wait_for_status(page: Any, text: str) -> None:
    """Wait until the status line has this text. A failure shows its text and the page's."""
    try:
        page.wait_for_function("text => document.querySelector('#said').textContent.includes(text)", arg=text)
    except Exception as error:
        texts = page.evaluate("[document.querySelector('#said').textContent, document.body.innerText.slice(0, 600)]")
        raise AssertionError(f"no {text!r} on the page: {texts}") from error


def read_question(page: Any) -> str:
    return re.search(r"Question \d+", page.inner_text(".prompt"))[0]


def wait_for_next_item(page: Any, before: str) -> None:
    """Wait until the page shows another item, or no item."""
    page.wait_for_function(
        "before => !document.querySelector('.prompt')?.textContent.includes(before + '?')", arg=before
    )


def send_vote(page: Any) -> None:
    before = read_question(page)
    page.keyboard.press("Enter")
    wait_for_next_item(page, before)
