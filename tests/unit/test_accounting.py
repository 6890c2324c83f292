"""Remaining allowance of a tenant, by its rate limits and its token budget together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from align.serve.errors import BudgetSpent, Refusal
from align.serve.rate_limits import RateLimiter, format_duration
from align.serve.tenants import Limits, Tenant
from align.serve.usage import UsageDatabase


@pytest.fixture
def accounting(tmp_path: Path) -> Iterator[RateLimiter]:
    with UsageDatabase(tmp_path / "usage.db") as usage:
        yield RateLimiter(lambda: 0.0, usage=usage)


def build_tenant(**limits: int) -> Tenant:
    return Tenant("acme", limits=Limits(**limits))


@pytest.mark.parametrize(
    ("limits", "prompt_tokens", "answers", "room"),
    [
        ({}, 10, 1, None),
        ({"tokens_per_minute": 100}, 10, 1, 90),
        ({"tokens_per_minute": 100}, 10, 4, 22),
        ({"tokens_per_minute": 100, "token_budget": 50}, 10, 1, 40),
        ({"tokens_per_minute": 100, "token_budget": 500}, 10, 1, 90),
        ({"tokens_per_minute": 100}, 100, 1, None),  # more than a minute allows: it is charged afterwards
        ({"token_budget": 50}, 60, 1, 1),  # more than the budget: it is refused afterwards
    ],
)
def test_how_long_an_answer_of_no_given_length_may_be(
    accounting: RateLimiter, limits: dict[str, int], prompt_tokens: int, answers: int, room: int | None
) -> None:
    with accounting.admit(build_tenant(**limits), answers, 1, "r") as charge:
        assert charge.compute_max_answer_tokens(prompt_tokens, answers) == room


def test_what_is_used_is_counted_and_what_is_not_is_given_back(accounting: RateLimiter) -> None:
    acme = build_tenant(tokens_per_minute=100, token_budget=1000, concurrency=4)
    assert accounting.usage is not None
    with accounting.admit(acme, 3, 10, "r") as charge:
        charge.reserve(60)
        usage_json = accounting.usage_to_json(acme, accounting.usage)
        assert usage_json["remaining"] == {
            "requests_per_minute": None,
            "tokens_per_minute": 40,
            "concurrency": 1,
            "token_budget": 940,
        }
        charge.used = 7, 5
    usage_json = accounting.usage_to_json(acme, accounting.usage)
    assert (usage_json["requests"], usage_json["total_tokens"], usage_json["reserved_tokens"]) == (1, 12, 0)
    assert usage_json["remaining"] == {
        "requests_per_minute": None,
        "tokens_per_minute": 88,
        "concurrency": 4,
        "token_budget": 988,
    }


def test_what_is_refused_leaves_nothing_behind(accounting: RateLimiter) -> None:
    acme = build_tenant(tokens_per_minute=100, token_budget=20, concurrency=2)
    with pytest.raises(Refusal), accounting.admit(acme, 3, 1, "many"):
        pass
    with pytest.raises(BudgetSpent), accounting.admit(acme, 1, 21, "early"):
        pass
    with pytest.raises(BudgetSpent), accounting.admit(acme, 1, 1, "late") as charge:
        charge.reserve(30)
    assert accounting.usage is not None
    usage_json = accounting.usage_to_json(acme, accounting.usage)
    assert (usage_json["requests"], usage_json["reserved_tokens"]) == (0, 0)
    assert (usage_json["remaining"]["tokens_per_minute"], usage_json["remaining"]["concurrency"]) == (100, 2)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0ms"), (0.0204, "20ms"), (1.5, "1.5s"), (59.9996, "1m0s"), (360, "6m0s"), (90.25, "1m30.25s")],
)
def test_a_duration_as_openai_writes_it(seconds: float, said: str) -> None:
    assert format_duration(seconds) == said
