"""Who asks: a tenant, what it may ask for, and how much."""

from __future__ import annotations

from dataclasses import dataclass, field

from align.serve.identity import Allowed


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant may use. None: no limit.

    Attributes:
        requests_per_minute: requests, averaged over a minute.
        tokens_per_minute: tokens of prompts and answers, averaged over a minute.
        concurrency: answers at once.
        token_budget: tokens of prompts and answers in all.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    token_budget: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """Attributes:
    admin: whether it may load and unload adapters.
    key: sha256 of the key that it came with, hex; empty where there are none.
    """

    name: str
    admin: bool = False
    limits: Limits = field(default_factory=Limits)
    allowed: Allowed = field(default_factory=Allowed)
    key: str = field(default="", compare=False, repr=False)


LOCAL = Tenant("local", admin=True)
"""Whoever reaches a server without a key file, which listens on the loopback interface only."""
