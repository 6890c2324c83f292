"""Rate limits: requests and tokens a minute, concurrent answers, the pace of refusals, turns to tokenise prompts."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any

from align.serve import operator_log
from align.serve.errors import BudgetSpent, Limited, UsageUnwritable, invalid
from align.serve.tenants import Tenant
from align.serve.usage import Usage

MINUTE_S = 60.0
CONCURRENCY_RETRY_S = 1.0
"""`Retry-After` of a refusal for concurrency, for which no time is known."""
REFUSALS_PER_S = 10.0
"""A tenant's refusals a second."""
REFUSAL_BURST = 20
"""A tenant's refusals that leave without a wait."""
LONGEST_HOLD_S = 30.0
"""Longest wait of a refusal: clients' timeouts are longer."""
MAX_HELD_PER_TENANT = 256
MAX_HELD = 512
"""Refusals that wait at once: each has a connection, and the server has 2,048."""
CONCURRENT_READS = 4
"""Prompts of one tenant that are tokenised at once."""


@dataclass(frozen=True, slots=True)
class LimitStatus:
    """A tenant's limit by the minute, and what is left of it.

    Attributes:
        reset_s: seconds until all of it is there again.
    """

    limit: int
    remaining: int
    reset_s: float


@dataclass(slots=True)
class Bucket:
    """A token bucket: it holds what a minute allows, fills evenly, and is full at first.

    A request that asks for more than it can ever hold passes when it is full; the debt is paid before the next one. So
    the average stays what it is, and a request without max_tokens is not refused for good.

    Attributes:
        rate: what a minute allows.
        level: what is in it, at `at`; below 0 for a debt.
        at: seconds by the clock.
    """

    rate: int
    level: float
    at: float

    def wait(self, amount: float, now: float) -> float:
        """Return the seconds until so much may be taken; 0 for now."""
        self.level = min(self.rate, self.level + (now - self.at) * self.rate / MINUTE_S)
        self.at = now
        return max(0.0, (min(amount, self.rate) - self.level) * MINUTE_S / self.rate)


@dataclass(slots=True)
class TenantLoad:
    """A tenant's answers that are under way, and its buckets by the name of the limit.

    Attributes:
        running: answers.
    """

    running: int = 0
    buckets: dict[str, Bucket] = field(default_factory=dict)


class Limiter:
    """Lets requests in by the limits and the budget of their tenants, and counts what they used (`align.serve.usage`).

    Each tenant has buckets of its own: none waits for another. Safe to share between threads.

    Args:
        clock: seconds that run evenly.
        concurrency: answers that a tenant has at once if its own limits do not say; None for any number.
        usage: None if no tenant has a budget.

    Attributes:
        unsettled: what requests used that could not be written down yet.
    """

    def __init__(self, clock: Callable[[], float], concurrency: int | None = None, usage: Usage | None = None) -> None:
        self.clock = clock
        self.concurrency = concurrency
        self.usage = usage
        self.unsettled: dict[str, tuple[int, int]] = {}
        self._warned_budgets: dict[str, int | None] = {}
        self._loads = defaultdict[str, TenantLoad](TenantLoad)
        self._lock = Lock()

    @contextmanager
    def enter(self, tenant: Tenant, answers: int = 1, least: int = 0, request_id: str = "") -> Iterator[Charge]:
        """Let a request in for as long as the block lasts, before its prompt is tokenised: the prompt's tokens are
        charged once they are known.

        Args:
            answers: that are made at once.
            least: tokens that it will use at the least.
            request_id: one that no other request has had.

        Raises:
            Limited, BudgetSpent: the tenant may not have it now. Nothing is charged then.
            Refusal: it asks for more answers than the tenant may ever have at once.
            UsageUnwritable: what it used could not be counted. It is, as soon as it can be.
        """
        own_limit = tenant.limits.concurrency
        most, limit = (self.concurrency, "stage.max_answers") if own_limit is None else (own_limit, "concurrency")
        if most is not None and answers > most:
            problem = f"Asks for {answers} answers at once, and your key may have {most} ({limit})"
            raise invalid("n", f"{problem}. Ask for fewer at once.")
        with self._lock:
            load = self._loads[tenant.name]
            if most is not None and load.running + answers > most:
                raise Limited("concurrency", CONCURRENCY_RETRY_S)
            buckets, now = self._buckets(tenant)
            amounts = {"requests_per_minute": 1, "tokens_per_minute": least}
            waits = {name: bucket.wait(amounts[name], now) for name, bucket in buckets.items()}
            longest = max(waits, key=lambda name: waits[name], default="")  # after it all of them let it pass
            if waits.get(longest, 0) > 0:
                raise Limited(longest, waits[longest])
            if "requests_per_minute" in buckets:
                buckets["requests_per_minute"].level -= 1
            load.running += answers
        charge = Charge(self, tenant, request_id)
        try:
            if (left := self.left(tenant)) is not None and left < least:
                raise self._warn_once(tenant, BudgetSpent(tenant.limits.token_budget or 0, left))
            yield charge
        finally:
            with self._lock:
                load.running -= answers
                if (bucket := load.buckets.get("tokens_per_minute")) is not None:
                    bucket.level += max(0, charge.charged - sum(charge.used))  # `wait` cuts off what is too much
            if self.usage is not None and charge.reserved:
                try:
                    self.usage.settle(request_id, *charge.used)
                except UsageUnwritable:
                    self.unsettled[request_id] = charge.used
                    raise

    def reserve(self, charge: Charge, tokens: int) -> None:
        """Take what a request may use at most, see `Charge.reserve`. What it did not use is given back at its end."""
        tenant = charge.tenant
        with self._lock:
            buckets, now = self._buckets(tenant)
            if (bucket := buckets.get("tokens_per_minute")) is not None:
                if (wait := bucket.wait(tokens, now)) > 0:
                    raise Limited("tokens_per_minute", wait)
                bucket.level -= tokens
        charge.charged = tokens
        if self.usage is not None:
            for late, used in list(self.unsettled.items()):
                self.usage.settle(late, *used)
                del self.unsettled[late]
            try:
                self.usage.reserve(tenant, charge.request_id, tokens)
            except BudgetSpent as error:
                raise self._warn_once(tenant, error) from None
            charge.reserved = True

    def running(self, tenant: str) -> int:
        """Return how many answers of a tenant are under way."""
        with self._lock:
            return self._loads[tenant].running if tenant in self._loads else 0

    def status_of(self, tenant: Tenant) -> dict[str, LimitStatus]:
        """Return how a tenant stands with each of its limits by the minute."""
        with self._lock:
            buckets, now = self._buckets(tenant)
            waits = {name: bucket.wait(bucket.rate, now) for name, bucket in buckets.items()}
            return {
                name: LimitStatus(bucket.rate, max(0, int(bucket.level)), waits[name])
                for name, bucket in buckets.items()
            }

    def _buckets(self, tenant: Tenant) -> tuple[dict[str, Bucket], float]:
        """Return the buckets of the limits that a tenant has now, and the time. One that was lifted has none, and
        begins anew if it comes back."""
        load = self._loads[tenant.name]
        now = self.clock()
        rates = {name: getattr(tenant.limits, name) for name in ("requests_per_minute", "tokens_per_minute")}
        buckets = {
            name: load.buckets.get(name) or Bucket(rate, rate, now) for name, rate in rates.items() if rate is not None
        }
        for name, bucket in buckets.items():
            bucket.rate = rates[name]
        load.buckets = buckets
        return buckets, now

    def left(self, tenant: Tenant) -> int | None:
        """Return the tokens that are left of a budget; None if there is no budget."""
        budget = tenant.limits.token_budget
        if self.usage is None or budget is None:
            return None
        return self.usage.used(tenant.name).left_of(budget)

    def as_json(self, tenant: Tenant, usage: Usage) -> dict[str, Any]:
        """Return what a tenant has used, its limits, and what is left of them."""
        used = usage.used(tenant.name)
        limits = asdict(tenant.limits)
        remaining: dict[str, int | None] = {name: each.remaining for name, each in self.status_of(tenant).items()}
        if tenant.limits.concurrency is not None:
            remaining["concurrency"] = max(0, tenant.limits.concurrency - self.running(tenant.name))
        if tenant.limits.token_budget is not None:
            remaining["token_budget"] = used.left_of(tenant.limits.token_budget)
        return {
            "object": "usage",
            "tenant": tenant.name,
            "requests": used.requests,
            "prompt_tokens": used.prompt_tokens,
            "completion_tokens": used.completion_tokens,
            "total_tokens": used.tokens,
            "reserved_tokens": used.reserved,
            "limits": limits,
            "remaining": {name: remaining.get(name) for name in limits},
        }

    def headers(self, tenant: Tenant) -> dict[str, str]:
        """Return how a tenant stands with its limits by the minute, as OpenAI's clients read it."""
        headers = {}
        for name, status in self.status_of(tenant).items():
            kind = name.partition("_")[0]
            headers[f"x-ratelimit-limit-{kind}"] = str(status.limit)
            headers[f"x-ratelimit-remaining-{kind}"] = str(status.remaining)
            headers[f"x-ratelimit-reset-{kind}"] = duration(status.reset_s)
        return headers

    def _warn_once(self, tenant: Tenant, error: BudgetSpent) -> BudgetSpent:
        """Tell the operator of the first request that a budget refuses. Returns the error."""
        budget = tenant.limits.token_budget
        if self._warned_budgets.get(tenant.name) != budget:
            self._warned_budgets[tenant.name] = budget
            message = "tenant %s has %s of its %s tokens left: a request was refused"
            operator_log.warning(message, tenant.name, f"{error.left:,}", f"{budget:,}")
        return error


@dataclass(slots=True)
class Charge:
    """A request that was let in.

    Attributes:
        charged: tokens that were taken for it from its tenant's minute.
        reserved: whether they were set aside from its tenant's budget too.
        used: tokens of its prompts and of its answers. The caller sets it before the request ends.
    """

    limiter: Limiter
    tenant: Tenant
    request_id: str
    charged: int = 0
    reserved: bool = False
    used: tuple[int, int] = (0, 0)

    def room(self, prompt_tokens: int, answers: int) -> int | None:
        """Return how long an answer may be by what the tenant has left, in tokens and at least 1; None if nothing
        bounds it. A minute that never holds the prompt is no bound: its debt is paid afterwards."""
        bounds = list[int]()
        minute = self.limiter.status_of(self.tenant).get("tokens_per_minute")
        if minute is not None and prompt_tokens < minute.limit:
            bounds.append(minute.remaining)
        if (budget := self.limiter.left(self.tenant)) is not None:
            bounds.append(budget)
        return max(1, (min(bounds) - prompt_tokens) // answers) if bounds else None

    def reserve(self, tokens: int) -> None:
        """Set aside what the request may use at most, prompts and answers.

        Raises:
            Limited, BudgetSpent: the tenant has not so many left. The request itself stays charged: it was read.
            UsageUnwritable: they could not be counted.
        """
        self.limiter.reserve(self, tokens)


def duration(seconds: float) -> str:
    """Write a duration as OpenAI's headers have it: `20ms`, `1.5s`, `6m0s`.

    https://platform.openai.com/docs/guides/rate-limits
    """
    ms = round(seconds * 1000)
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest_ms = divmod(ms, 60_000)
    return f"{minutes}m{rest_ms / 1000:g}s" if minutes else f"{rest_ms / 1000:g}s"


class RefusalPacer:
    """The pace of refusals. One takes a millisecond, but a client that asks again at once, regardless of the answer,
    asks as fast as it is refused.

    The generic cell rate algorithm (ITU-T I.371) for each tenant: refusals beyond the first ones leave evenly. If so
    many connections ask that the wait would be longer than the longest one, it is drawn from the upper half of that:
    refusals that left together would come back together.

    Args:
        clock: seconds that run evenly.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._due: dict[str, float] = {}
        self._held: Counter[str] = Counter()

    @contextmanager
    def hold(self, tenant: str) -> Iterator[float]:
        """Count a refusal that waits. Yields the seconds until it may leave, 0 if too many wait already."""
        full = self._held[tenant] >= MAX_HELD_PER_TENANT or self._held.total() >= MAX_HELD
        self._held[tenant] += 1
        try:
            yield 0.0 if full else self.wait(tenant)
        finally:
            self._held[tenant] -= 1
            if not self._held[tenant]:
                del self._held[tenant]

    def wait(self, tenant: str) -> float:
        """Return the seconds until a refusal may leave."""
        now = self.clock()
        slack = REFUSAL_BURST / REFUSALS_PER_S
        due = max(now, self._due.get(tenant, now)) + 1 / REFUSALS_PER_S
        if due > now + slack + LONGEST_HOLD_S:
            return random.uniform(LONGEST_HOLD_S / 2, LONGEST_HOLD_S)
        self._due[tenant] = due
        return max(0.0, due - now - slack)


class ReadTurns:
    """Turns to have a prompt tokenised: a tenant has so many at once, and no other's prompt waits for hundreds of
    its."""

    def __init__(self, at_once: int = CONCURRENT_READS) -> None:
        self._turns = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(at_once))

    def turn(self, tenant: str) -> asyncio.Semaphore:
        """Return what to hold while a prompt is tokenised."""
        return self._turns[tenant]
