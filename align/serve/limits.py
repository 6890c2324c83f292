"""How often a tenant may ask: requests and tokens a minute, and requests at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

from align.errors import InputError
from align.serve.tenants import Tenant

MINUTE_S = 60.0
AT_ONCE_S = 1.0
"""When one who has as many requests under way as it may is to come back: nobody knows when one of them ends."""


class Limited(InputError):
    """The tenant asks too often. Status 429.

    Attributes:
        retry_after_s: seconds until it may ask again.
    """

    def __init__(self, limit: str, value: int, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        wait = f"Try again in {math.ceil(retry_after_s)} s."
        super().__init__(limit, value, "this limit of your key is used up for now", wait)


@dataclass(slots=True)
class Bucket:
    """A token bucket: it holds what a minute allows, fills evenly, and is full at first.

    A request that asks for more than it can ever hold passes when it is full; the debt is paid before the next one. So
    the average stays what it is, and a request without max_tokens is not refused for good.

    Attributes:
        level: what is in it, at `at`; below 0 for a debt.
        at: seconds by the clock.
    """

    level: float
    at: float

    def wait(self, amount: float, per_minute: int, now: float) -> float:
        """Seconds until so much may be taken; 0 for now."""
        self.level = min(per_minute, self.level + (now - self.at) * per_minute / MINUTE_S)
        self.at = now
        return max(0.0, (min(amount, per_minute) - self.level) * MINUTE_S / per_minute)


@dataclass(slots=True)
class Account:
    """What a tenant has under way, and its buckets by the name of the limit."""

    running: int = 0
    buckets: dict[str, Bucket] = field(default_factory=dict)


@dataclass(slots=True)
class Entered:
    """A request that was let in.

    Attributes:
        tokens: that it is charged for. The caller lowers it to what was used, before the request ends.
    """

    tokens: int


class Limiter:
    """Counts what each tenant has asked for. Each tenant has buckets of its own: none waits for another. Safe to share
    between threads.

    Args:
        clock: seconds that run evenly.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._accounts: dict[str, Account] = {}
        self._lock = Lock()

    @contextmanager
    def enter(self, tenant: Tenant, tokens: int) -> Iterator[Entered]:
        """For as long as a request is under way.

        Args:
            tokens: that it may use at most, prompt and answer. What it did not use is given back at the end.

        Raises:
            Limited: a limit is reached. Nothing is charged then.
        """
        self._take(tenant, tokens)
        entered = Entered(tokens)
        try:
            yield entered
        finally:
            self._give_back(tenant, max(0, tokens - entered.tokens))

    def running(self, tenant: str) -> int:
        """Requests of a tenant that are under way."""
        with self._lock:
            return self._accounts[tenant].running if tenant in self._accounts else 0

    def _take(self, tenant: Tenant, tokens: int) -> None:
        limits = tenant.limits
        asked = {
            "requests_per_minute": (limits.requests_per_minute, 1),
            "tokens_per_minute": (limits.tokens_per_minute, tokens),
        }
        due = {name: (rate, amount) for name, (rate, amount) in asked.items() if rate is not None}
        with self._lock:
            now, account = self.clock(), self._accounts.setdefault(tenant.name, Account())
            if limits.concurrency is not None and account.running >= limits.concurrency:
                raise Limited("concurrency", limits.concurrency, AT_ONCE_S)
            # A limit that was lifted has no bucket, and begins anew if it comes back.
            account.buckets = {name: account.buckets.get(name) or Bucket(rate, now) for name, (rate, _) in due.items()}
            waits = {name: account.buckets[name].wait(amount, rate, now) for name, (rate, amount) in due.items()}
            for name, wait in waits.items():
                if wait > 0 and wait == max(waits.values()):  # after the longest all of them let it pass
                    raise Limited(name, due[name][0], wait)
            for name, (_, amount) in due.items():
                account.buckets[name].level -= amount
            account.running += 1

    def _give_back(self, tenant: Tenant, tokens: int) -> None:
        with self._lock:
            account = self._accounts[tenant.name]
            account.running -= 1
            if (bucket := account.buckets.get("tokens_per_minute")) is not None:
                bucket.level += tokens  # above what it holds, `wait` cuts it off
