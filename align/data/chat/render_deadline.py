"""A deadline for chat templates: a template is a program of the model's, which may loop for some conversations only.

A thread cannot be killed, but Jinja's loops are Python: a watching thread raises an exception in the thread whose
template has used up its processor time. Time of the processor counts, so that a busy machine changes nothing. What one
operation of C computes, such as a power of huge numbers, ends first; `align.data.chat.template` refuses such templates.
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
"""Seconds of the processor that one conversation may take. A template needs milliseconds for 100,000 tokens."""
LOOK_S = 0.5


class RenderDeadline(Exception):
    """A chat template that did not end in time."""

    def __str__(self) -> str:
        return f"it has not ended after {RENDER_S:g} s"


@dataclass(slots=True)
class Rendering:
    """One template at work.

    Attributes:
        thread: that renders.
        ends: the thread's processor time at which it has to be done.
        expired: the exception was raised in the thread.
    """

    thread: int
    ends: float
    expired: bool = False


class RenderWatch:
    """The templates at work in this process, and the thread that ends those which are late."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.renderings: dict[int, Rendering] = {}
        self.watching = False

    def begin(self) -> Rendering:
        thread = threading.get_ident()
        rendering = Rendering(thread, time.thread_time() + RENDER_S)
        with self.lock:
            self.renderings[thread] = rendering
            if not self.watching:
                self.watching = True
                threading.Thread(target=self.watch, name="render-deadline", daemon=True).start()
        return rendering

    def end(self, rendering: Rendering) -> None:
        with self.lock:
            self.renderings.pop(rendering.thread, None)

    def watch(self) -> None:
        while True:
            time.sleep(LOOK_S)
            with self.lock:
                for rendering in self.renderings.values():
                    if not rendering.expired and thread_time_of(rendering.thread) > rendering.ends:
                        rendering.expired = True
                        raised = ctypes.py_object(RenderDeadline)
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(rendering.thread), raised)


def thread_time_of(thread: int) -> float:
    """Return the processor time of a thread of this process that has not ended, in seconds."""
    return time.clock_gettime(time.pthread_getcpuclockid(thread))


def wait_for_exception() -> None:
    """Let an exception arrive that another thread has raised in this one: it does so between two steps of a loop."""
    for _ in range(1_000):
        time.sleep(0)


WATCH = RenderWatch()


def forget_threads() -> None:
    """Begin anew in a forked process, which has none of its parent's threads but the one that forked."""
    global WATCH
    WATCH = RenderWatch()


os.register_at_fork(after_in_child=forget_threads)


@contextmanager
def render_deadline() -> Iterator[None]:
    """Raise RenderDeadline in this thread if the block takes too long. Blocks may not lie within one another."""
    watch = WATCH
    rendering = watch.begin()
    delivered = False
    try:
        try:
            yield
        except RenderDeadline:
            delivered = True
            raise
        finally:
            watch.end(rendering)
            if rendering.expired and not delivered:
                wait_for_exception()
    except RenderDeadline:
        watch.end(rendering)
        raise RenderDeadline from None
