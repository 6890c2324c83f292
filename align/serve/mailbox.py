"""From the engine's thread to the event loop, and on to the task that waits: each is woken once for all that was put in
since the last time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Waking a loop writes to a pipe: it is done once for a step of the engine, and not once for each row of it.

    Args:
        loop: in which letters are handed over.
        deliver: is given all letters that came since the last time, in their order.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[list[T]], None]) -> None:
        self._loop, self._hand_over = loop, deliver
        self._letters: list[T] = []
        self._called = False

    def put(self, letter: T) -> None:
        """Safe to call from any thread."""
        self._letters.append(letter)
        if not self._called:
            self._called = True
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # before anything is taken out: what comes now calls again
        letters, self._letters = self._letters, []
        self._hand_over(letters)


class Inbox(Generic[T]):
    """What one task waits for, in one event loop: asyncio's queue without bounds, which is emptied at once."""

    def __init__(self) -> None:
        self._letters: list[T] = []
        self._waiting: asyncio.Future[None] | None = None

    def put(self, letter: T) -> None:
        self._letters.append(letter)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def take(self) -> list[T]:
        """All letters that came since the last time, one at least."""
        while not self._letters:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        letters, self._letters = self._letters, []
        return letters
