"""What a tenant may still have, by its limits and its budget together, and what its requests used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from align.serve.events import log
from align.serve.limits import Entered, Limiter
from align.serve.tenants import Tenant
from align.serve.usage import BudgetSpent, Usage, UsageUnwritable


@dataclass(slots=True)
class Charge:
    """A request that was let in.

    Attributes:
        used: tokens of its prompts and of its answers. The caller sets it before the request ends.
    """

    accounting: Accounting
    entered: Entered
    request_id: str
    reserved: bool = False
    used: tuple[int, int] = (0, 0)

    def room(self, prompt_tokens: int, answers: int) -> int | None:
        """How long an answer may be by what the tenant has left, in tokens and at least 1; None for as long as it
        likes. A minute that never holds the prompt is no bound: its debt is paid afterwards."""
        tenant, left = self.entered.tenant, list[int]()
        minute = self.accounting.limits.standing(tenant).get("tokens_per_minute")
        if minute is not None and prompt_tokens < minute.limit:
            left.append(minute.remaining)
        budget = self.accounting.left(tenant)
        left += [] if budget is None else [budget]
        return max(1, (min(left) - prompt_tokens) // answers) if left else None

    def reserve(self, tokens: int) -> None:
        """Set aside what it may use at most, prompts and answers.

        Raises:
            Limited, BudgetSpent: the tenant has not so many left.
            UsageUnwritable: they could not be counted.
        """
        self.accounting.limits.charge(self.entered, tokens)
        if (usage := self.accounting.usage) is not None:
            self.accounting.settle_late()
            with self.accounting.told_once(self.entered.tenant):
                usage.reserve(self.entered.tenant, self.request_id, tokens)
            self.reserved = True


class Accounting:
    """See the module.

    Args:
        usage: None where nobody has a budget.

    Attributes:
        unsettled: what requests used that could not be written down yet.
    """

    def __init__(self, limits: Limiter, usage: Usage | None = None) -> None:
        self.limits, self.usage = limits, usage
        self.unsettled: dict[str, tuple[int, int]] = {}
        self._spent: dict[str, int | None] = {}

    @contextmanager
    def enter(self, tenant: Tenant, request_id: str, answers: int, least: int) -> Iterator[Charge]:
        """For as long as a request is under way. It is asked before anything is made of the prompt.

        Args:
            request_id: one that no other request has had.
            answers: that are made at once.
            least: tokens that it will use at the least.

        Raises:
            Limited, BudgetSpent, InputError: the tenant may not have it now, or ever.
            UsageUnwritable: what it used could not be counted. It is, as soon as it can be.
        """
        with self.limits.enter(tenant, answers, least) as entered:
            if (left := self.left(tenant)) is not None and left < least:
                with self.told_once(tenant):
                    raise BudgetSpent(tenant.limits.token_budget or 0, left)
            charge = Charge(self, entered, request_id)
            try:
                yield charge
            finally:
                entered.tokens = sum(charge.used)
                if charge.reserved:
                    self._settle(charge)

    def left(self, tenant: Tenant) -> int | None:
        """Tokens that are left of a budget; None for no end of them."""
        budget = tenant.limits.token_budget
        if self.usage is None or budget is None:
            return None
        return self.usage.used(tenant.name).left_of(budget)

    def as_json(self, tenant: Tenant, usage: Usage) -> dict[str, Any]:
        """What a tenant has used, its limits, and what is left of them."""
        used, limits = usage.used(tenant.name), asdict(tenant.limits)
        left: dict[str, int | None] = {name: each.remaining for name, each in self.limits.standing(tenant).items()}
        if tenant.limits.concurrency is not None:
            left["concurrency"] = max(0, tenant.limits.concurrency - self.limits.running(tenant.name))
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
        for name, each in self.limits.standing(tenant).items():
            kind = name.partition("_")[0]
            found[f"x-ratelimit-limit-{kind}"] = str(each.limit)
            found[f"x-ratelimit-remaining-{kind}"] = str(each.remaining)
            found[f"x-ratelimit-reset-{kind}"] = duration(each.reset_s)
        return found

    def settle_late(self) -> None:
        """Write down what could not be written when it was used.

        Raises:
            UsageUnwritable: nor can it be now.
        """
        assert self.usage is not None
        for id, used in list(self.unsettled.items()):
            self.usage.settle(id, *used)
            del self.unsettled[id]

    @contextmanager
    def told_once(self, tenant: Tenant) -> Iterator[None]:
        """Says that a request was refused for its tenant's budget, the first time that one is."""
        try:
            yield
        except BudgetSpent as error:
            if self._spent.get(tenant.name) != (budget := tenant.limits.token_budget):
                self._spent[tenant.name] = budget
                log.warning("tenant %s has %s of its %s tokens left: a request was refused", tenant.name,
                            f"{error.left:,}", f"{budget:,}")  # fmt: skip
            raise

    def _settle(self, charge: Charge) -> None:
        assert self.usage is not None
        try:
            self.usage.settle(charge.request_id, *charge.used)
        except UsageUnwritable:
            self.unsettled[charge.request_id] = charge.used
            raise


def duration(seconds: float) -> str:
    """A duration as OpenAI's headers have it: `20ms`, `1.5s`, `6m0s`.

    https://platform.openai.com/docs/guides/rate-limits
    """
    ms = round(seconds * 1000)
    if ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"
