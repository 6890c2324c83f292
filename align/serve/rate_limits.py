"""Rate limits: requests and tokens per minute, concurrent answers, delayed refusals, concurrent tokenisation."""

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
from align.serve.errors import BudgetSpent, RateLimited, UsageUnwritable, invalid_request
from align.serve.tenants import Tenant
from align.serve.usage import UsageDatabase

MINUTE_S = 60.0
CONCURRENCY_RETRY_S = 1.0
"""`Retry-After` in seconds if too many answers run: it is unknown when one will end."""
REFUSALS_PER_S = 10.0
"""Refusals per second that a tenant is sent after its first `REFUSAL_BURST` ones."""
REFUSAL_BURST = 20
"""Number of refusals that a tenant is sent without delay."""
LONGEST_HOLD_S = 30.0
"""Longest delay of a refusal in seconds, below the usual timeouts of clients."""
MAX_HELD_PER_TENANT = 256
MAX_HELD = 512
"""Maximum delayed refusals at once: each holds one of the server's 2,048 connections."""
CONCURRENT_READS = 4
"""Maximum prompts of one tenant that are tokenised at once."""


@dataclass(frozen=True, slots=True)
class LimitStatus:
    """A tenant's limit on requests or tokens per minute, and how much of it remains.

    Attributes:
        reset_s: seconds until the whole limit is available again.
    """

    limit: int
    remaining: int
    reset_s: float


@dataclass(slots=True)
class Bucket:
    """A token bucket: its capacity is the limit per minute, it refills evenly, and it starts full.

    A request for more than the capacity passes when the bucket is full, and leaves a debt that delays the next one. The
    average rate is kept, and a request without max_tokens can pass at some point.

    Attributes:
        rate: limit per minute.
        level: amount available at time `at`; negative for a debt.
        at: time of the last update, in seconds of the clock.
    """

    rate: int
    level: float
    at: float

    def compute_wait(self, amount: float, now: float) -> float:
        """Refill the bucket up to the time `now`, and return the seconds until `amount` may be taken, 0 for at once."""
        self.level = min(self.rate, self.level + (now - self.at) * self.rate / MINUTE_S)
        self.at = now
        return max(0.0, (min(amount, self.rate) - self.level) * MINUTE_S / self.rate)


@dataclass(slots=True)
class TenantLoad:
    """A tenant's number of running answers, and its token buckets.

    Attributes:
        running: number of answers in progress.
        buckets: name of the limit → its bucket.
    """

    running: int = 0
    buckets: dict[str, Bucket] = field(default_factory=dict)


class RateLimiter:
    """An admission control, which refuses requests beyond their tenants' rate limits, concurrency and token budgets.

    It records the usage of tokens in `align.serve.usage`.

    Each tenant has its own buckets, so that tenants do not slow down each other. Threads may share a limiter.

    Args:
        clock: returns the time of a monotonic clock in seconds.
        concurrency: maximum answers at once of a tenant without such a limit; None for any number.
        usage: the recorded usage; None if it is not recorded.

    Attributes:
        unsettled: id of a request → prompt and completion tokens that could not be written yet.
    """

    def __init__(
        self, clock: Callable[[], float], concurrency: int | None = None, usage: UsageDatabase | None = None
    ) -> None:
        self.clock = clock
        self.concurrency = concurrency
        self.usage = usage
        self.unsettled: dict[str, tuple[int, int]] = {}
        self._warned_budgets: dict[str, int | None] = {}
        self._loads = defaultdict[str, TenantLoad](TenantLoad)
        self._lock = Lock()

    @contextmanager
    def admit(
        self, tenant: Tenant, answer_count: int = 1, min_tokens: int = 0, request_id: str = ""
    ) -> Iterator[Charge]:
        """Admit a request within its tenant's limits and yield its Charge, or raise RateLimited or BudgetSpent.

        Its answers count as in progress during the block.

        This happens before its prompt is tokenised; the prompt's tokens are charged by `Charge.reserve`. Unused tokens
        are returned at the end of the block, and the used ones are recorded.

        Args:
            answer_count: number of answers.
            min_tokens: minimum number of tokens that the request will use.
            request_id: a unique id.

        Raises:
            RateLimited, BudgetSpent: a limit or the budget does not allow it now. Nothing is charged then.
            Refusal: it asks for more answers than the tenant may ever have at once.
            UsageUnwritable: its usage could not be recorded. It is recorded with the next request.
        """
        max_answers = tenant.limits.concurrency
        limit = "concurrency"
        if max_answers is None:
            max_answers = self.concurrency
            limit = "stage.max_answers"
        if max_answers is not None and answer_count > max_answers:
            problem = f"Asks for {answer_count} answers at once, and your key may have {max_answers} ({limit})"
            raise invalid_request("n", f"{problem}. Ask for fewer at once.")
        with self._lock:
            load = self._loads[tenant.name]
            if max_answers is not None and load.running + answer_count > max_answers:
                raise RateLimited("concurrency", CONCURRENCY_RETRY_S)
            buckets, now = self._update_buckets(tenant)
            amounts = {"requests_per_minute": 1, "tokens_per_minute": min_tokens}
            waits = {name: bucket.compute_wait(amounts[name], now) for name, bucket in buckets.items()}
            longest = max(waits, key=lambda name: waits[name], default="")  # after this wait, all buckets allow it
            if waits.get(longest, 0) > 0:
                raise RateLimited(longest, waits[longest])
            if "requests_per_minute" in buckets:
                buckets["requests_per_minute"].level -= 1
            load.running += answer_count
        charge = Charge(self, tenant, request_id)
        try:
            if (remaining := self.compute_remaining_budget(tenant)) is not None and remaining < min_tokens:
                raise self._warn_once(tenant, BudgetSpent(tenant.limits.token_budget or 0, remaining))
            yield charge
        finally:
            with self._lock:
                load.running -= answer_count
                if (bucket := load.buckets.get("tokens_per_minute")) is not None:
                    # `compute_wait` caps the level at the rate.
                    bucket.level += max(0, charge.charged - sum(charge.used))
            if self.usage is not None and charge.reserved:
                try:
                    self.usage.settle(request_id, *charge.used)
                except UsageUnwritable:
                    self.unsettled[request_id] = charge.used
                    raise

    def reserve(self, charge: Charge, tokens: int) -> None:
        """Take the maximum tokens that a request may use from its tenant's tokens per minute and budget.

        Unused tokens are returned when the request ends. Raises as `Charge.reserve` does.
        """
        tenant = charge.tenant
        with self._lock:
            buckets, now = self._update_buckets(tenant)
            if (bucket := buckets.get("tokens_per_minute")) is not None:
                if (wait := bucket.compute_wait(tokens, now)) > 0:
                    raise RateLimited("tokens_per_minute", wait)
                bucket.level -= tokens
        charge.charged = tokens
        if self.usage is not None:
            for request_id, used in list(self.unsettled.items()):
                self.usage.settle(request_id, *used)
                del self.unsettled[request_id]
            try:
                self.usage.reserve(tenant, charge.request_id, tokens)
            except BudgetSpent as error:
                raise self._warn_once(tenant, error) from None
            charge.reserved = True

    def count_running_answers(self, tenant: str) -> int:
        """Return the number of a tenant's answers in progress."""
        with self._lock:
            return self._loads[tenant].running if tenant in self._loads else 0

    def status_of(self, tenant: Tenant) -> dict[str, LimitStatus]:
        """Return limit name → its present state, for a tenant's limits on requests and tokens per minute."""
        with self._lock:
            buckets, now = self._update_buckets(tenant)
            waits = {name: bucket.compute_wait(bucket.rate, now) for name, bucket in buckets.items()}
            return {
                name: LimitStatus(bucket.rate, max(0, int(bucket.level)), waits[name])
                for name, bucket in buckets.items()
            }

    def _update_buckets(self, tenant: Tenant) -> tuple[dict[str, Bucket], float]:
        """Adapt a tenant's token buckets to its present limits per minute, and return (limit → bucket, time now).

        The bucket of a removed limit is dropped, and starts full if the limit is set again.
        """
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

    def compute_remaining_budget(self, tenant: Tenant) -> int | None:
        """Return the tokens left of a tenant's budget, or None if it has no budget or usage is not recorded."""
        budget = tenant.limits.token_budget
        if self.usage is None or budget is None:
            return None
        return self.usage.read_usage(tenant.name).compute_remaining(budget)

    def usage_to_json(self, tenant: Tenant, usage: UsageDatabase) -> dict[str, Any]:
        """Return the JSON body of `/v1/usage`: a tenant's used and reserved tokens, its limits and their remainders."""
        used = usage.read_usage(tenant.name)
        limits = asdict(tenant.limits)
        remaining: dict[str, int | None] = {name: each.remaining for name, each in self.status_of(tenant).items()}
        if tenant.limits.concurrency is not None:
            remaining["concurrency"] = max(0, tenant.limits.concurrency - self.count_running_answers(tenant.name))
        if tenant.limits.token_budget is not None:
            remaining["token_budget"] = used.compute_remaining(tenant.limits.token_budget)
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
        """Return the `x-ratelimit-…` headers of a tenant's limits per minute, in OpenAI's form."""
        headers = {}
        for name, status in self.status_of(tenant).items():
            kind = name.partition("_")[0]
            headers[f"x-ratelimit-limit-{kind}"] = str(status.limit)
            headers[f"x-ratelimit-remaining-{kind}"] = str(status.remaining)
            headers[f"x-ratelimit-reset-{kind}"] = format_duration(status.reset_s)
        return headers

    def _warn_once(self, tenant: Tenant, error: BudgetSpent) -> BudgetSpent:
        """Return `error` for the caller to raise, and log a warning the first time that a tenant's budget is spent."""
        budget = tenant.limits.token_budget
        if self._warned_budgets.get(tenant.name) != budget:
            self._warned_budgets[tenant.name] = budget
            message = "tenant %s has %s of its %s tokens left: a request was refused"
            operator_log.warning(message, tenant.name, f"{error.left:,}", f"{budget:,}")
        return error


@dataclass(slots=True)
class Charge:
    """An admitted request, with the tokens that its tenant was charged for it.

    Attributes:
        charged: tokens taken from the tenant's limit per minute.
        reserved: whether they were reserved from the tenant's budget as well.
        used: prompt and completion tokens; the caller sets it before the request ends.
    """

    limiter: RateLimiter
    tenant: Tenant
    request_id: str
    charged: int = 0
    reserved: bool = False
    used: tuple[int, int] = (0, 0)

    def compute_max_answer_tokens(self, prompt_tokens: int, answer_count: int) -> int | None:
        """Return the maximum tokens per answer that the tenant's limits still allow, at least 1; None for no limit.

        A limit per minute below the prompt's length does not apply: it leaves a debt instead.
        """
        bounds = list[int]()
        minute = self.limiter.status_of(self.tenant).get("tokens_per_minute")
        if minute is not None and prompt_tokens < minute.limit:
            bounds.append(minute.remaining)
        if (budget := self.limiter.compute_remaining_budget(self.tenant)) is not None:
            bounds.append(budget)
        return max(1, (min(bounds) - prompt_tokens) // answer_count) if bounds else None

    def reserve(self, tokens: int) -> None:
        """Take the maximum tokens of the request's prompts and answers from the limits and the budget of its tenant.

        Raises:
            RateLimited, BudgetSpent: the tenant has fewer left. The request still counts as one of its minute.
            UsageUnwritable: the reservation could not be written.
        """
        self.limiter.reserve(self, tokens)


def format_duration(seconds: float) -> str:
    """Format a duration as in OpenAI's headers: `20ms`, `1.5s`, `6m0s`.

    https://platform.openai.com/docs/guides/rate-limits
    """
    ms = round(seconds * 1000)
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest_ms = divmod(ms, 60_000)
    return f"{minutes}m{rest_ms / 1000:g}s" if minutes else f"{rest_ms / 1000:g}s"


class RefusalPacer:
    """A schedule of delays for refusals, so that a client which retries at once does not flood the server.

    The generic cell rate algorithm (ITU-T I.371) for each tenant: after an initial burst, refusals are sent at an even
    rate. If the delay would exceed `LONGEST_HOLD_S`, it is a random one from the upper half of that: clients refused at
    the same time would retry at the same time.

    Args:
        clock: returns the time of a monotonic clock in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._due: dict[str, float] = {}
        self._held: Counter[str] = Counter()

    @contextmanager
    def hold(self, tenant: str) -> Iterator[float]:
        """Yield the seconds to wait before a tenant's refusal is sent, or 0 if too many refusals are waiting already.

        The caller waits in the block, during which the refusal counts as waiting.
        """
        is_full = self._held[tenant] >= MAX_HELD_PER_TENANT or self._held.total() >= MAX_HELD
        self._held[tenant] += 1
        try:
            yield 0.0 if is_full else self.reserve_delay(tenant)
        finally:
            self._held[tenant] -= 1
            if not self._held[tenant]:
                del self._held[tenant]

    def reserve_delay(self, tenant: str) -> float:
        """Schedule a tenant's next refusal at an even rate, and return the seconds until it is due.

        Returns a random delay if that would be longer than `LONGEST_HOLD_S`.
        """
        now = self.clock()
        slack = REFUSAL_BURST / REFUSALS_PER_S
        due = max(now, self._due.get(tenant, now)) + 1 / REFUSALS_PER_S
        if due > now + slack + LONGEST_HOLD_S:
            return random.uniform(LONGEST_HOLD_S / 2, LONGEST_HOLD_S)
        self._due[tenant] = due
        return max(0.0, due - now - slack)


class ReadTurns:
    """Semaphores that limit how many prompts of one tenant are tokenised at once, so that others need not wait."""

    def __init__(self, max_concurrent: int = CONCURRENT_READS) -> None:
        self._turns = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(max_concurrent))

    def turn(self, tenant: str) -> asyncio.Semaphore:
        """Return the tenant's semaphore, which the caller holds while a prompt is tokenised."""
        return self._turns[tenant]
