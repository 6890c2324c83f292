"""The tenants of a key file as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from align.serve.keys import Account
from align.serve.usage import Used

HEAD = (
    "tenant", "keys", "may ask for", "requests/min", "tokens/min", "concurrency", "requests", "tokens used",
    "token budget", "tokens left",
)  # fmt: skip
NOTHING = "-"


def as_table(accounts: Sequence[Account], used: Mapping[str, Used]) -> list[str]:
    """One line a tenant, below the names of the columns.

    Args:
        used: by the tenant's name.
    """
    rows = [HEAD, *(row_of(account, used[account.tenant.name]) for account in accounts)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]


def row_of(account: Account, used: Used) -> tuple[str, ...]:
    tenant, limits = account.tenant, account.tenant.limits
    names = tenant.allowed.names
    may = "every name" if names is None else ", ".join(sorted(names)) or "nothing"
    budget = limits.token_budget
    left = None if budget is None else used.left_of(budget)
    figures = (
        limits.requests_per_minute, limits.tokens_per_minute, limits.concurrency, used.requests, used.tokens, budget,
        left,
    )  # fmt: skip
    return (
        tenant.name,
        ", ".join(key.id for key in account.keys) or NOTHING,
        may + (" (admin)" if tenant.admin else ""),
        *(NOTHING if figure is None else f"{figure:,}" for figure in figures),
    )
