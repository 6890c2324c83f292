"""A deadline for chat templates, which are programs that may loop for ever on some conversations.

A thread cannot be killed, but Jinja templates run as Python code: a second thread raises an exception in the thread
whose template exceeds its CPU time. CPU time is measured, so that a busy machine makes no difference. The exception
arrives only after a single C operation, such as a power of huge numbers; `align.data.chat.template` refuses such
templates.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

RENDER_S = 10.0
"""Maximum CPU seconds to render one conversation. A template needs milliseconds for 100,000 tokens."""
LOOK_S = 0.5
"""Seconds between two checks of the deadlines."""


class RenderDeadline(Exception):
    """Exception that is raised in a thread whose chat template exceeds its CPU time."""

    def __str__(self) -> str:
        return f"it has not ended after {RENDER_S:g} s"


@dataclass(slots=True)
class Rendering:
    """A rendering of a chat template in progress: its thread, and its deadline in CPU time.

    Attributes:
        thread_id: the thread that renders.
        deadline: deadline, in CPU seconds of the thread.
        expired: whether the exception was raised in the thread.
    """

    thread_id: int
    deadline: float
    expired: bool = False


class RenderWatch:
    """All renderings in progress in this process, and a thread that checks their deadlines."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.renderings: dict[int, Rendering] = {}
        self.watching = False

    def begin_rendering(self) -> Rendering:
        """Register a rendering in this thread with its deadline, and start the thread that checks deadlines if it is
        not running."""
        thread_id = threading.get_ident()
        rendering = Rendering(thread_id, time.thread_time() + RENDER_S)
        with self.lock:
            self.renderings[thread_id] = rendering
            if not self.watching:
                self.watching = True
                threading.Thread(target=self.watch_deadlines, name="render-deadline", daemon=True).start()
        return rendering

    def end_rendering(self, rendering: Rendering) -> None:
        """Remove a rendering that has ended, so that its deadline is no longer checked."""
        with self.lock:
            self.renderings.pop(rendering.thread_id, None)

    def watch_deadlines(self) -> None:
        """Raise RenderDeadline in each thread whose rendering exceeds its CPU time. Never returns."""
        while True:
            time.sleep(LOOK_S)
            with self.lock:
                for rendering in self.renderings.values():
                    if not rendering.expired and get_thread_time(rendering.thread_id) > rendering.deadline:
                        rendering.expired = True
                        exception = ctypes.py_object(RenderDeadline)
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(rendering.thread_id), exception)


def get_thread_time(thread_id: int) -> float:
    """Return the CPU seconds that a running thread of this process has used."""
    return time.clock_gettime(time.pthread_getcpuclockid(thread_id))


def wait_for_exception() -> None:
    """Run Python code for a moment, so that an exception that another thread raised in this one arrives here."""
    for _ in range(1_000):
        time.sleep(0)


WATCH = RenderWatch()


def reset_watch_after_fork() -> None:
    """Replace the global RenderWatch in a forked process, in which the thread that checks deadlines does not run."""
    global WATCH
    WATCH = RenderWatch()


os.register_at_fork(after_in_child=reset_watch_after_fork)


@contextmanager
def render_deadline() -> Iterator[None]:
    """Raise RenderDeadline in this thread if the block uses more than `RENDER_S` seconds of CPU time. Blocks must not
    be nested."""
    watch = WATCH
    rendering = watch.begin_rendering()
    delivered = False
    try:
        try:
            yield
        except RenderDeadline:
            delivered = True
            raise
        finally:
            watch.end_rendering(rendering)
            if rendering.expired and not delivered:
                wait_for_exception()
    except RenderDeadline:
        watch.end_rendering(rendering)
        raise RenderDeadline from None
