"""A thread that steps an engine, for whoever must not wait: a server's event loop."""

from __future__ import annotations

import logging
import time
from threading import Condition, Thread
from typing import TypeVar

from align.rollout.requests import Listener, Pending, Request, ServingEngine

T = TypeVar("T")
log = logging.getLogger(__name__)


class EngineThread:
    """Steps an engine while there is work. Safe to use from any thread.

    Args:
        engine: nobody else steps it.
    """

    def __init__(self, engine: ServingEngine) -> None:
        self.engine = engine
        self._changed = Condition()
        self._closing, self._work = False, False
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.engine.sound()

    @property
    def cpu_s(self) -> float:
        """Processor time of the thread so far, in seconds; 0 where it has ended."""
        if self._thread.ident is None or not self.alive:
            return 0.0
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    def add(self, request: Request, listener: Listener) -> Pending:
        """See `ServingEngine.add`. The listener is called by the engine's thread."""
        pending = self.engine.add(request, listener)
        self._wake()
        return pending

    def abort(self, pending: Pending) -> None:
        self.engine.abort(pending)
        self._wake()

    def close(self, within_s: float) -> bool:
        """Finish what was added, or what of it can be finished in time. Whether all was."""
        until = time.monotonic() + within_s
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(max(0.0, until - time.monotonic()))
        return not self._thread.is_alive()

    def _wake(self) -> None:
        with self._changed:
            self._work = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._work or self._closing):
                    self._changed.wait()
                self._work = False
            try:
                more = self.engine.step()
            except Exception as error:  # a fault of ours; who comes next may fare better
                log.exception("the engine failed")
                self.engine.give_up(error)
                more = False
            if more:
                self._work = True
            elif self._closing and not self._work:
                return
