"""How often a tenant may ask: requests and tokens a minute, and answers at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

from align.errors import InputError, require
from align.serve.tenants import Tenant

MINUTE_S = 60.0
AT_ONCE_S = 1.0
"""When one who has as many answers under way as it may is to come back: nobody knows when one of them ends."""


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
    """What a tenant has under way, and its buckets by the name of the limit.

    Attributes:
        running: answers.
    """

    running: int = 0
    buckets: dict[str, Bucket] = field(default_factory=dict)


@dataclass(slots=True)
class Entered:
    """A request that was let in.

    Attributes:
        charged: tokens that were taken for it.
        tokens: of these, that it used. The caller lowers it before the request ends.
    """

    tenant: Tenant
    charged: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Standing:
    """How a tenant stands with a limit by the minute.

    Attributes:
        reset_s: seconds until all of it is there again.
    """

    limit: int
    remaining: int
    reset_s: float


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What one request may ask for, whoever sends it. Defaults are in `align.config.serve`.

    Attributes:
        prompts: prompts, or conversations of a reward model.
        logprobs: entries of the answer's logprobs.
    """

    prompts: int
    logprobs: int


class Limiter:
    """Counts what each tenant has asked for. Each tenant has buckets of its own: none waits for another. Safe to share
    between threads.

    Args:
        clock: seconds that run evenly.
        concurrency: answers that a tenant has at once if its own limits do not say; None for any number.
    """

    def __init__(self, clock: Callable[[], float], concurrency: int | None = None) -> None:
        self.clock = clock
        self.concurrency = concurrency
        self._accounts: dict[str, Account] = {}
        self._lock = Lock()

    @contextmanager
    def enter(self, tenant: Tenant, answers: int = 1, least: int = 0) -> Iterator[Entered]:
        """For as long as a request is under way. It is asked before anything is made of the prompt, whose tokens are
        charged once they are known.

        Args:
            answers: that are made at once.
            least: tokens that will be charged for at the least.

        Raises:
            Limited: a limit is reached. Nothing is charged then.
            InputError: it asks for more answers than the tenant may ever have at once.
        """
        most = self._most_at_once(tenant)
        limit = "concurrency" if tenant.limits.concurrency is not None else "stage.max_answers"
        problem = f"asks for {answers} answers at once, and your key may have {most} ({limit})"
        require(most is None or answers <= most, "n", answers, problem, "Ask for fewer at once.")
        self._take(tenant, answers, least)
        entered = Entered(tenant)
        try:
            yield entered
        finally:
            self._give_back(tenant, answers, max(0, entered.charged - entered.tokens))

    def charge(self, entered: Entered, tokens: int) -> None:
        """Take what a request may use at most, prompt and answers. What it did not use is given back at its end.

        Raises:
            Limited: the minute has not so many left. The request itself stays charged: it was read.
        """
        with self._lock:
            account, now = self._accounts[entered.tenant.name], self.clock()
            buckets = self._buckets(account, entered.tenant, now)
            if (rate := entered.tenant.limits.tokens_per_minute) is not None:
                bucket = buckets["tokens_per_minute"]
                if (wait := bucket.wait(tokens, rate, now)) > 0:
                    raise Limited("tokens_per_minute", rate, wait)
                bucket.level -= tokens
        entered.charged = entered.tokens = tokens

    def running(self, tenant: str) -> int:
        """Answers of a tenant that are under way."""
        with self._lock:
            return self._accounts[tenant].running if tenant in self._accounts else 0

    def standing(self, tenant: Tenant) -> dict[str, Standing]:
        """How a tenant stands with each of its limits by the minute."""
        with self._lock:
            now = self.clock()
            buckets = self._buckets(self._accounts.setdefault(tenant.name, Account()), tenant, now)
            found = {}
            for name, rate in rates(tenant).items():
                reset_s = buckets[name].wait(rate, rate, now)
                found[name] = Standing(rate, max(0, int(buckets[name].level)), reset_s)
            return found

    def _most_at_once(self, tenant: Tenant) -> int | None:
        own = tenant.limits.concurrency
        return self.concurrency if own is None else own

    def _take(self, tenant: Tenant, answers: int, least: int) -> None:
        most, amounts = self._most_at_once(tenant), {"requests_per_minute": 1, "tokens_per_minute": least}
        with self._lock:
            now, account = self.clock(), self._accounts.setdefault(tenant.name, Account())
            if most is not None and account.running + answers > most:
                raise Limited("concurrency", most, AT_ONCE_S)
            buckets = self._buckets(account, tenant, now)
            waits = {name: buckets[name].wait(amounts[name], rate, now) for name, rate in rates(tenant).items()}
            for name, wait in waits.items():
                if wait > 0 and wait == max(waits.values()):  # after the longest all of them let it pass
                    raise Limited(name, rates(tenant)[name], wait)
            if "requests_per_minute" in buckets:
                buckets["requests_per_minute"].level -= 1
            account.running += answers

    def _buckets(self, account: Account, tenant: Tenant, now: float) -> dict[str, Bucket]:
        """Those of the limits that a tenant has now. One that was lifted has none, and begins anew if it comes back."""
        account.buckets = {
            name: account.buckets.get(name) or Bucket(rate, now) for name, rate in rates(tenant).items()
        }  # fmt: skip
        return account.buckets

    def _give_back(self, tenant: Tenant, answers: int, tokens: int) -> None:
        with self._lock:
            account = self._accounts[tenant.name]
            account.running -= answers
            if (bucket := account.buckets.get("tokens_per_minute")) is not None:
                bucket.level += tokens  # above what it holds, `wait` cuts it off


def rates(tenant: Tenant) -> dict[str, int]:
    """The limits by the minute that a tenant has."""
    found = {name: getattr(tenant.limits, name) for name in ("requests_per_minute", "tokens_per_minute")}
    return {name: rate for name, rate in found.items() if rate is not None}
