"""Simulate a crowd of annotators by the requests of their browsers: for each item a draft and then a vote, sent again
until the server acknowledges it. `load.py` measures response times with it; a test kills the server under it.

    store = create_store(url, items=500)
    sessions = create_accounts(store, 50)
    with run_server(root, port) as server:
        result = run_crowd(f"http://127.0.0.1:{port}", sessions, every_s=2, seconds=60)
"""

from __future__ import annotations

import asyncio
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from argon2 import PasswordHasher

from align.annotate.accounts import Accounts
from align.annotate.store import Candidate, Store, configure_project
from align.core.types import Conversation, Message

PROJECT = "crowd"
WORDS = ("the", "answer", "says", "what", "is", "asked", "first", "and", "then", "why", "in", "plain", "words")


@dataclass
class CrowdResult:
    """The votes of a crowd and how long they took.

    Attributes:
        acknowledged: sequence number and annotator of every acknowledged vote.
        seconds: for each vote the time from its first sending to the next item.
        tries: requests that failed and were sent again.
        refused: responses with an unexpected status.
    """

    acknowledged: list[tuple[int, str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tries: int = 0
    refused: list[str] = field(default_factory=list)


def create_store(url: str, items: int, words: int = 80, **settings: Any) -> Store:
    """Create a store with a project of `items` pairs of answers, each of so many words."""
    store = Store.open(url)
    rng = random.Random(0)
    with store.transaction():
        for i in range(items):
            prompt = Conversation((Message("user", f"Question {i}: {' '.join(rng.choices(WORDS, k=12))}?"),))
            texts = [" ".join(rng.choices(WORDS, k=words)) for _ in range(2)]
            store.add_item(PROJECT, f"item/{i}", prompt, [Candidate(text) for text in texts])
        configure_project(store, PROJECT, settings)
    return store


def create_accounts(store: Store, number: int) -> dict[str, str]:
    """Create annotators and log them in. Returns their sessions by name. Passwords are hashed cheaply."""
    accounts = Accounts(store, hasher=PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))
    names = [f"annotator {i}" for i in range(number)]
    return {name: accounts.accept(accounts.invite(PROJECT, "annotator"), name, secrets.token_hex(12)) for name in names}


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def run_server(
    root: Path, port: int, *settings: str, before: Callable[[], None] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run `stage=annotate` and yield its process once it responds. At the end, stop it by SIGINT.

    Args:
        settings: further settings of the stage.
        before: called in the server's process before the command starts.
    """
    settings = ("stage=annotate", f"project={PROJECT}", f"run.root={root}", f"stage.port={port}", *settings)
    command = [sys.executable, "-m", "align", *settings]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=before)
    try:
        wait_until_ready(port, server)
        yield server
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)


def wait_until_ready(port: int, server: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            httpx.get(f"http://127.0.0.1:{port}/login", timeout=10)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError(f"the server did not start (status {server.poll()})")


def run_crowd(
    url: str,
    sessions: dict[str, str],
    every_s: float,
    seconds: float = 3600,
    is_enough: Callable[[CrowdResult], bool] = lambda result: False,
    result: CrowdResult | None = None,
) -> CrowdResult:
    """Let all annotators vote concurrently until the time is over, `is_enough` returns True, or no item is left.

    Args:
        sessions: by the annotators' names.
        every_s: mean seconds between two votes of an annotator. With 0, a vote follows the response to the one before.
        result: updated in place, for a caller that reads it from another thread.
    """
    result = result or CrowdResult()

    async def run_all() -> None:
        until = time.monotonic() + seconds
        cookie = f"align_session_{url.rsplit(':', 1)[1]}"
        async with asyncio.TaskGroup() as group:
            for i, (name, session) in enumerate(sessions.items()):
                annotator = Annotator(url, name, {cookie: session}, every_s, random.Random(i), result)
                group.create_task(annotator.work(lambda: time.monotonic() > until or is_enough(result)))

    asyncio.run(run_all())
    return result


@dataclass
class Annotator:
    """An annotator's browser."""

    url: str
    name: str
    cookies: dict[str, str]
    every_s: float
    rng: random.Random
    result: CrowdResult
    project_id: str = ""

    async def work(self, is_over: Callable[[], bool]) -> None:
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(base_url=self.url, cookies=self.cookies, timeout=60, limits=limits) as browser:
            await asyncio.sleep(self.rng.uniform(0, self.every_s))  # they do not start together
            projects = await self.send(browser, "projects")
            self.project_id = projects["projects"][0]["id"]
            step = await self.send(browser, "task")
            while step["task"] is not None and not is_over():
                await asyncio.sleep(self.rng.uniform(0.5, 1.5) * self.every_s)
                step = await self.judge(browser, step)

    async def judge(self, browser: httpx.AsyncClient, task_step: dict[str, Any]) -> dict[str, Any]:
        """Send an item's draft and then its vote, as the page does, and return the next step."""
        token = task_step["task"]["token"]
        judgement = {"tiers": self.rng.choice(([[0], [1]], [[1], [0]])), "strength": self.rng.randint(1, 3)}
        await self.send(browser, "draft", {"token": token, "draft": judgement})
        vote = {
            "token": token,
            "key": secrets.token_hex(16),
            "terms": task_step["terms"],
            "said": judgement | {"seconds": self.every_s},
        }
        start = time.perf_counter()
        step = await self.send(browser, "vote", vote)
        self.result.seconds.append(time.perf_counter() - start)
        self.result.acknowledged.append((step["seq"], self.name))
        return step

    async def send(self, browser: httpx.AsyncClient, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request until the server responds, as the page does, and return the response's JSON."""
        headers = {"X-Align": self.project_id}
        while True:
            try:
                if body is None:
                    response = await browser.get(f"/api/{path}", headers=headers)
                else:
                    response = await browser.post(f"/api/{path}", headers=headers, json=body)
                if response.status_code == 200:
                    return response.json()
                if response.status_code != 503:
                    self.result.refused.append(f"{path}: {response.status_code} {response.text[:200]}")
                    raise RuntimeError(self.result.refused[-1])
            except httpx.TransportError:
                pass
            self.result.tries += 1
            await asyncio.sleep(0.2)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * round(share * 1000) // 1000) - 1)]
