"""Rate limits: requests and tokens a minute, concurrent answers, the pace of refusals, turns to tokenise prompts."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any

from align.core.errors import InputError, require
from align.serve import operator_log
from align.serve.tenants import Tenant
from align.serve.usage import BudgetSpent, Usage, UsageUnwritable

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
class TenantLoad:
    """What a tenant has under way, and its buckets by the name of the limit.

    Attributes:
        running: answers.
    """

    running: int = 0
    buckets: dict[str, Bucket] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LimitStatus:
    """How a tenant stands with a limit by the minute.

    Attributes:
        reset_s: seconds until all of it is there again.
    """

    limit: int
    remaining: int
    reset_s: float


class Limiter:
    """Lets requests in by the limits and the budget of their tenants, and counts what they used (`align.serve.usage`).

    Each tenant has buckets of its own: none waits for another. Safe to share between threads.

    Args:
        clock: seconds that run evenly.
        concurrency: answers that a tenant has at once if its own limits do not say; None for any number.
        usage: None where nobody has a budget.

    Attributes:
        unsettled: what requests used that could not be written down yet.
    """

    def __init__(self, clock: Callable[[], float], concurrency: int | None = None, usage: Usage | None = None) -> None:
        self.clock = clock
        self.concurrency = concurrency
        self.usage = usage
        self.unsettled: dict[str, tuple[int, int]] = {}
        self._spent: dict[str, int | None] = {}
        self._loads: dict[str, TenantLoad] = {}
        self._lock = Lock()

    @contextmanager
    def enter(self, tenant: Tenant, answers: int = 1, least: int = 0, request_id: str = "") -> Iterator[Charge]:
        """For as long as a request is under way. It is asked before anything is made of the prompt, whose tokens are
        charged once they are known.

        Args:
            answers: that are made at once.
            least: tokens that it will use at the least.
            request_id: one that no other request has had.

        Raises:
            Limited, BudgetSpent: the tenant may not have it now. Nothing is charged then.
            InputError: it asks for more answers than the tenant may ever have at once.
            UsageUnwritable: what it used could not be counted. It is, as soon as it can be.
        """
        most = self._most_at_once(tenant)
        limit = "concurrency" if tenant.limits.concurrency is not None else "stage.max_answers"
        problem = f"asks for {answers} answers at once, and your key may have {most} ({limit})"
        require(most is None or answers <= most, "n", answers, problem, "Ask for fewer at once.")
        self._take(tenant, answers, least)
        charge = Charge(self, tenant, request_id)
        try:
            if (left := self.left(tenant)) is not None and left < least:
                with self.log_spent_budget(tenant):
                    raise BudgetSpent(tenant.limits.token_budget or 0, left)
            yield charge
        finally:
            self._give_back(tenant, answers, max(0, charge.charged - sum(charge.used)))
            if self.usage is not None and charge.reserved:
                try:
                    self.usage.settle(request_id, *charge.used)
                except UsageUnwritable:
                    self.unsettled[request_id] = charge.used
                    raise

    def take_tokens(self, tenant: Tenant, tokens: int) -> None:
        """Take what a request may use at most, prompt and answers. What it did not use is given back at its end.

        Raises:
            Limited: the minute has not so many left. The request itself stays charged: it was read.
        """
        with self._lock:
            load, now = self._loads[tenant.name], self.clock()
            buckets = self._buckets(load, tenant, now)
            if (rate := tenant.limits.tokens_per_minute) is not None:
                bucket = buckets["tokens_per_minute"]
                if (wait := bucket.wait(tokens, rate, now)) > 0:
                    raise Limited("tokens_per_minute", rate, wait)
                bucket.level -= tokens

    def running(self, tenant: str) -> int:
        """Answers of a tenant that are under way."""
        with self._lock:
            return self._loads[tenant].running if tenant in self._loads else 0

    def status_of(self, tenant: Tenant) -> dict[str, LimitStatus]:
        """How a tenant stands with each of its limits by the minute."""
        with self._lock:
            now = self.clock()
            buckets = self._buckets(self._loads.setdefault(tenant.name, TenantLoad()), tenant, now)
            found = {}
            for name, rate in minute_limits(tenant).items():
                reset_s = buckets[name].wait(rate, rate, now)
                found[name] = LimitStatus(rate, max(0, int(buckets[name].level)), reset_s)
            return found

    def _most_at_once(self, tenant: Tenant) -> int | None:
        own = tenant.limits.concurrency
        return self.concurrency if own is None else own

    def _take(self, tenant: Tenant, answers: int, least: int) -> None:
        most, amounts = self._most_at_once(tenant), {"requests_per_minute": 1, "tokens_per_minute": least}
        with self._lock:
            now, load = self.clock(), self._loads.setdefault(tenant.name, TenantLoad())
            if most is not None and load.running + answers > most:
                raise Limited("concurrency", most, CONCURRENCY_RETRY_S)
            buckets = self._buckets(load, tenant, now)
            waits = {name: buckets[name].wait(amounts[name], rate, now) for name, rate in minute_limits(tenant).items()}
            for name, wait in waits.items():
                if wait > 0 and wait == max(waits.values()):  # after the longest all of them let it pass
                    raise Limited(name, minute_limits(tenant)[name], wait)
            if "requests_per_minute" in buckets:
                buckets["requests_per_minute"].level -= 1
            load.running += answers

    def _buckets(self, load: TenantLoad, tenant: Tenant, now: float) -> dict[str, Bucket]:
        """Those of the limits that a tenant has now. One that was lifted has none, and begins anew if it comes back."""
        load.buckets = {
            name: load.buckets.get(name) or Bucket(rate, now) for name, rate in minute_limits(tenant).items()
        }  # fmt: skip
        return load.buckets

    def _give_back(self, tenant: Tenant, answers: int, tokens: int) -> None:
        with self._lock:
            load = self._loads[tenant.name]
            load.running -= answers
            if (bucket := load.buckets.get("tokens_per_minute")) is not None:
                bucket.level += tokens  # above what it holds, `wait` cuts it off

    def left(self, tenant: Tenant) -> int | None:
        """Tokens that are left of a budget; None for no end of them."""
        budget = tenant.limits.token_budget
        if self.usage is None or budget is None:
            return None
        return self.usage.used(tenant.name).left_of(budget)

    def as_json(self, tenant: Tenant, usage: Usage) -> dict[str, Any]:
        """What a tenant has used, its limits, and what is left of them."""
        used, limits = usage.used(tenant.name), asdict(tenant.limits)
        left: dict[str, int | None] = {name: each.remaining for name, each in self.status_of(tenant).items()}
        if tenant.limits.concurrency is not None:
            left["concurrency"] = max(0, tenant.limits.concurrency - self.running(tenant.name))
        if tenant.limits.token_budget is not None:
            left["token_budget"] = used.left_of(tenant.limits.token_budget)
        return {
            "object": "usage", "tenant": tenant.name, "requests": used.requests,
            "prompt_tokens": used.prompt_tokens, "completion_tokens": used.completion_tokens,
            "total_tokens": used.tokens, "reserved_tokens": used.reserved, "limits": limits,
            "remaining": {name: left.get(name) for name in limits},
        }  # fmt: skip

    def headers(self, tenant: Tenant) -> dict[str, str]:
        """How a tenant stands with its limits by the minute, as OpenAI's clients read it."""
        found = {}
        for name, each in self.status_of(tenant).items():
            kind = name.partition("_")[0]
            found[f"x-ratelimit-limit-{kind}"] = str(each.limit)
            found[f"x-ratelimit-remaining-{kind}"] = str(each.remaining)
            found[f"x-ratelimit-reset-{kind}"] = duration(each.reset_s)
        return found

    @contextmanager
    def log_spent_budget(self, tenant: Tenant) -> Iterator[None]:
        """Log that a request was refused for its tenant's budget, the first time that one is."""
        try:
            yield
        except BudgetSpent as error:
            if self._spent.get(tenant.name) != (budget := tenant.limits.token_budget):
                self._spent[tenant.name] = budget
                message = "tenant %s has %s of its %s tokens left: a request was refused"
                operator_log.warning(message, tenant.name, f"{error.left:,}", f"{budget:,}")
            raise


def minute_limits(tenant: Tenant) -> dict[str, int]:
    """The limits by the minute that a tenant has."""
    found = {name: getattr(tenant.limits, name) for name in ("requests_per_minute", "tokens_per_minute")}
    return {name: rate for name, rate in found.items() if rate is not None}


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
        """How long an answer may be by what the tenant has left, in tokens and at least 1; None for as long as it
        likes. A minute that never holds the prompt is no bound: its debt is paid afterwards."""
        left = list[int]()
        minute = self.limiter.status_of(self.tenant).get("tokens_per_minute")
        if minute is not None and prompt_tokens < minute.limit:
            left.append(minute.remaining)
        budget = self.limiter.left(self.tenant)
        left += [] if budget is None else [budget]
        return max(1, (min(left) - prompt_tokens) // answers) if left else None

    def reserve(self, tokens: int) -> None:
        """Set aside what it may use at most, prompts and answers.

        Raises:
            Limited, BudgetSpent: the tenant has not so many left.
            UsageUnwritable: they could not be counted.
        """
        limiter = self.limiter
        limiter.take_tokens(self.tenant, tokens)
        self.charged = tokens
        if limiter.usage is not None:
            for late, used in list(limiter.unsettled.items()):
                limiter.usage.settle(late, *used)
                del limiter.unsettled[late]
            with limiter.log_spent_budget(self.tenant):
                limiter.usage.reserve(self.tenant, self.request_id, tokens)
            self.reserved = True


def duration(seconds: float) -> str:
    """A duration as OpenAI's headers have it: `20ms`, `1.5s`, `6m0s`.

    https://platform.openai.com/docs/guides/rate-limits
    """
    ms = round(seconds * 1000)
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"


class RefusalPacer:
    """When a refusal may leave. It takes a millisecond, but a client that asks again at once, whatever it is told, asks
    as fast as it is refused.

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
        """Around the wait of a refusal: the seconds until it may leave, 0 where too many wait already. It counts."""
        full = self._held[tenant] >= MAX_HELD_PER_TENANT or self._held.total() >= MAX_HELD
        self._held[tenant] += 1
        try:
            yield 0.0 if full else self.wait(tenant)
        finally:
            self._held[tenant] -= 1
            if not self._held[tenant]:
                del self._held[tenant]

    def wait(self, tenant: str) -> float:
        """See `hold`."""
        now, slack = self.clock(), REFUSAL_BURST / REFUSALS_PER_S
        due = max(now, self._due.get(tenant, now)) + 1 / REFUSALS_PER_S
        if due > now + slack + LONGEST_HOLD_S:
            return random.uniform(LONGEST_HOLD_S / 2, LONGEST_HOLD_S)
        self._due[tenant] = due
        return max(0.0, due - now - slack)


class ReadTurns:
    """Who may have a prompt read now: a tenant has so many at once, and no other's prompt waits for hundreds of its."""

    def __init__(self, at_once: int = CONCURRENT_READS) -> None:
        self._turns = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(at_once))

    def turn(self, tenant: str) -> asyncio.Semaphore:
        """To hold while a prompt is read."""
        return self._turns[tenant]
