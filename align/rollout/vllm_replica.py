"""One of vLLM's servers that answer for the policy: started here, or running already."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable

import httpx

from align.core.errors import InputError, require
from align.rollout.probes import Logprobs
from align.rollout.vllm_client import KEY, LOCKED, VllmClient, VllmFailed
from align.rollout.vllm_process import VllmProcess

BUSY = 429
STOPPING_S, LOOK_S = 10.0, 0.5
"""How long a server has to end; and how often one that does not answer is asked again."""


class Replica:
    """
    Args:
        where: its URL; or the Python that it is started by, with `start` and `log`.
        within_s: time that it has to answer.
        log: what it says where it is started here: of several servers, the file that tells which.

    Attributes:
        base: the name of the model that it was started with.
        base_said: what that says of the probes; empty where it was not asked yet.
        loaded: the names of the adapters that it was given.
    """

    def __init__(
        self, where: str, within_s: float, start: Callable[[], VllmProcess] | None = None, log: str = "vllm.log"
    ) -> None:
        self.where, self.within_s, self._start, self.log = f"{where} ({log})" if start else where, within_s, start, log
        self.client: VllmClient | None = None if start else VllmClient(where)
        self._process: VllmProcess | None = None
        self._closed = False
        self.base, self.base_said, self.loaded = "", (), set[str]()

    @property
    def field(self) -> str:
        return "rollout.python" if self._start else "rollout.urls"

    @property
    def asked(self) -> VllmClient:
        assert self.client is not None, "it was not opened"
        return self.client

    def open(self) -> None:
        """Start it, or wait until it answers; again where it is gone.

        Raises:
            InputError: it does not come up, or answers by names that it was never given.
        """
        self.base_said: Logprobs
        self.base_said, self.loaded = (), set()
        require(not self._closed, self.field, self.where, "is closed", "Run the same command again.")
        if self._start:
            self._stop()
            self._process = self._start()
            self._process.wait_until_ready(self.within_s)
            self.client = VllmClient(self._process.socket)
        self._wait()
        try:
            self.base = self.asked.base()
            unknown = self.asked.knows(f"never-given-{secrets.token_hex(8)}")
        except (VllmFailed, httpx.TransportError) as error:
            raise self.failed(error, f"fails at its first question ({error})") from error
        problem = "it answers by a name that it was never given, where a status 404 is due"
        require(not unknown, self.field, self.where, problem, "Use another vLLM.")

    def _wait(self) -> None:
        until, told = time.monotonic() + self.within_s, self._start is not None  # whose start was announced
        while not self.asked.up():
            if not told:
                print(f"waiting for {self.where}, {self.within_s:g} seconds at most", flush=True)
                told = True
            problem = f"does not answer within {self.within_s:g} seconds"
            require(time.monotonic() < until and not self._closed, self.field, self.where, problem, self.remedy)
            time.sleep(LOOK_S)

    def failed(self, error: Exception, problem: str, remedy: str = "") -> InputError:
        """What is said of it after an error: that, or that it asks for a key."""
        if isinstance(error, VllmFailed) and error.status in LOCKED:
            takes = (
                f"does not take the key in {KEY}" if os.environ.get(KEY) else f"asks for a key, and {KEY} is not set"
            )
            problem = f"{takes} (status {error.status})"
            remedy = f"Set {KEY} in the environment to the key that the server was started with (--api-key)."
        return InputError(self.field, self.where, problem, remedy or self.remedy)

    @property
    def remedy(self) -> str:
        what = f"Read {self.log} in the run's folder" if self._start else "See to this server"
        return f"{what}; the same command then goes on from the run's last checkpoint."

    def close(self) -> None:
        """End it where it was started here. May be called again, and while others ask."""
        self._closed = True
        self._stop()
        if self.client is not None:
            self.client.close()

    def _stop(self) -> None:
        if self._start and self.client is not None:
            self.client.close()
        if self._process is not None:
            self._process.stop(STOPPING_S)
            self._process = None


def gone(error: Exception) -> bool:
    """Whether an error says that the server is gone, and not that it refuses something."""
    if isinstance(error, VllmFailed):
        return error.status >= 500 or error.status == BUSY
    return isinstance(error, httpx.TransportError | TimeoutError)
