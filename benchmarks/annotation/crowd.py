"""A crowd of annotators, as their browsers talk to the server: a draft and a vote an item, the vote sent again until it
is acknowledged. `load.py` measures with it how long they wait; the tests kill the server under it.

    store = filled(url, items=500)
    people = hired(store, 50)                        # accounts with open sessions
    with serving(root, port) as server:
        seen = crowd(f"http://127.0.0.1:{port}", people, every_s=2, seconds=60)
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
from align.annotate.store import Candidate, Store, configure
from align.core.types import Conversation, Message

PROJECT = "crowd"
WORDS = ("the", "answer", "says", "what", "is", "asked", "first", "and", "then", "why", "in", "plain", "words")


@dataclass
class Seen:
    """What the crowd saw.

    Attributes:
        acknowledged: seq and annotator of every vote that the server said it has.
        seconds: from a vote's first sending to the next item, a vote.
        tries: requests that came to nothing and were sent again.
        refused: answers that no browser would get, which say that something is wrong.
    """

    acknowledged: list[tuple[int, str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tries: int = 0
    refused: list[str] = field(default_factory=list)


def filled(url: str, items: int, words: int = 80, **settings: Any) -> Store:
    """A store with a project of `items` pairs of answers of so many words."""
    store, rng = Store.open(url), random.Random(0)
    with store.transaction():
        for i in range(items):
            prompt = Conversation((Message("user", f"Question {i}: {' '.join(rng.choices(WORDS, k=12))}?"),))
            texts = [" ".join(rng.choices(WORDS, k=words)) for _ in range(2)]
            store.add_item(PROJECT, f"item/{i}", prompt, [Candidate(text) for text in texts])
        configure(store, PROJECT, settings)
    return store


def hired(store: Store, number: int) -> dict[str, str]:
    """Names and sessions of new annotators. Their passwords are hashed cheaply: nobody will use them again."""
    accounts = Accounts(store, hasher=PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))
    names = [f"annotator {i}" for i in range(number)]
    return {n: accounts.accept(accounts.invite(PROJECT, "annotator"), n, secrets.token_hex(12)) for n in names}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def serving(
    root: Path, port: int, *more: str, before: Callable[[], None] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """The command that a user gives, until it answers; interrupted at the end. `before` runs in its process first."""
    words = ["stage=annotate", f"project={PROJECT}", f"run.root={root}", f"stage.port={port}", *more]
    command = [sys.executable, "-m", "align", *words]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=before)
    try:
        wait_for(port, server)
        yield server
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)


def wait_for(port: int, server: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            httpx.get(f"http://127.0.0.1:{port}/login", timeout=10)
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError(f"the server did not start (status {server.poll()})")


def crowd(
    url: str,
    people: dict[str, str],
    every_s: float,
    seconds: float = 3600,
    enough: Callable[[Seen], bool] = lambda seen: False,
    seen: Seen | None = None,
) -> Seen:
    """Lets everybody annotate at once until the time is over, `enough` says so, or nothing is left.

    Args:
        people: sessions by name.
        every_s: seconds between an annotator's votes, on average; 0: as fast as they are answered.
        seen: what to write into, for a caller that looks on from another thread.
    """
    seen = seen or Seen()

    async def all_of_them() -> None:
        until = time.monotonic() + seconds
        cookie = f"align_session_{url.rsplit(':', 1)[1]}"
        async with asyncio.TaskGroup() as group:
            for i, (name, session) in enumerate(people.items()):
                person = Annotator(url, name, {cookie: session}, every_s, random.Random(i), seen)
                group.create_task(person.work(lambda: time.monotonic() > until or enough(seen)))

    asyncio.run(all_of_them())
    return seen


@dataclass
class Annotator:
    """One browser."""

    url: str
    name: str
    cookies: dict[str, str]
    every_s: float
    rng: random.Random
    seen: Seen
    place: str = ""

    async def work(self, over: Callable[[], bool]) -> None:
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(base_url=self.url, cookies=self.cookies, timeout=60, limits=limits) as browser:
            await asyncio.sleep(self.rng.uniform(0, self.every_s))  # nobody comes at the same moment
            projects = await self.ask(browser, "projects")
            self.place = projects["projects"][0]["id"]
            step = await self.ask(browser, "task")
            while step["task"] is not None and not over():
                await asyncio.sleep(self.rng.uniform(0.5, 1.5) * self.every_s)
                step = await self.judge(browser, step)

    async def judge(self, browser: httpx.AsyncClient, task_step: dict[str, Any]) -> dict[str, Any]:
        """Send what the page sends of an item, a draft and then the vote, and return the next step."""
        token = task_step["task"]["token"]
        said = {"tiers": self.rng.choice(([[0], [1]], [[1], [0]])), "strength": self.rng.randint(1, 3)}
        await self.ask(browser, "draft", {"token": token, "draft": said})
        vote = {
            "token": token,
            "key": secrets.token_hex(16),
            "terms": task_step["terms"],
            "said": said | {"seconds": self.every_s},
        }
        began = time.perf_counter()
        step = await self.ask(browser, "vote", vote)
        self.seen.seconds.append(time.perf_counter() - began)
        self.seen.acknowledged.append((step["seq"], self.name))
        return step

    async def ask(self, browser: httpx.AsyncClient, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Sends until the server answers, as the page does."""
        headers = {"X-Align": self.place}
        while True:
            try:
                if body is None:
                    answer = await browser.get(f"/api/{path}", headers=headers)
                else:
                    answer = await browser.post(f"/api/{path}", headers=headers, json=body)
                if answer.status_code == 200:
                    return answer.json()
                if answer.status_code != 503:
                    self.seen.refused.append(f"{path}: {answer.status_code} {answer.text[:200]}")
                    raise RuntimeError(self.seen.refused[-1])
            except httpx.TransportError:
                pass
            self.seen.tries += 1
            await asyncio.sleep(0.2)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * round(share * 1000) // 1000) - 1)]
