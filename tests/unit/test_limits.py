"""Rate limits of a tenant, by a clock that the test moves."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest
from clocks import Clock
from hypothesis import given, settings
from hypothesis import strategies as st

from align.serve.errors import RateLimited, Refusal
from align.serve.rate_limits import LimitStatus, RateLimiter
from align.serve.tenants import Limits, Tenant


def build_tenant(name: str = "acme", **limits: int) -> Tenant:
    return Tenant(name, limits=Limits(**limits))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def send_request(limits: RateLimiter, tenant: Tenant, tokens: int = 1, used: int | None = None) -> float:
    """Return 0 for a request that was admitted and has ended, else the seconds to wait."""
    try:
        with limits.admit(tenant, min_tokens=tokens) as charge:
            charge.reserve(tokens)
            charge.used = 0, tokens if used is None else used
        return 0.0
    except RateLimited as error:
        return error.retry_after_s or 0.0


def test_without_limits_everything_passes(clock: Clock) -> None:
    limits = RateLimiter(clock)
    assert [send_request(limits, build_tenant(), 10**9) for _ in range(100)] == [0.0] * 100


def test_requests_a_minute(clock: Clock) -> None:
    limits = RateLimiter(clock)
    tenant = build_tenant(requests_per_minute=3)
    assert [send_request(limits, tenant) for _ in range(4)] == [0, 0, 0, pytest.approx(20)]
    clock.now += 19.9
    assert send_request(limits, tenant) == pytest.approx(0.1)
    clock.now += 0.11
    assert send_request(limits, tenant) == 0
    clock.now += 600  # at most a minute's requests are saved up
    assert [send_request(limits, tenant) for _ in range(4)][:3] == [0, 0, 0]
    assert send_request(limits, tenant) > 0


def test_tokens_a_minute_and_what_was_not_used_is_given_back(clock: Clock) -> None:
    limits = RateLimiter(clock)
    tenant = build_tenant(tokens_per_minute=600)
    assert send_request(limits, tenant, 500, used=100) == 0
    assert send_request(limits, tenant, 500) == 0
    assert send_request(limits, tenant, 10) == pytest.approx(1)  # all 600 are used, and 10 a second return
    clock.now += 1
    assert send_request(limits, tenant, 10) == 0


def test_a_request_larger_than_a_minutes_tokens_passes_when_the_bucket_is_full_and_is_paid_for(clock: Clock) -> None:
    limits = RateLimiter(clock)
    tenant = build_tenant(tokens_per_minute=60)
    assert send_request(limits, tenant, 300) == 0
    assert send_request(limits, tenant, 1) == pytest.approx(241)
    clock.now += 240
    assert send_request(limits, tenant, 300) == pytest.approx(60)
    clock.now += 60
    assert send_request(limits, tenant, 300) == 0


def test_answers_at_once(clock: Clock) -> None:
    limits = RateLimiter(clock)
    tenant = build_tenant(concurrency=4, requests_per_minute=4)
    with ExitStack() as stack:
        stack.enter_context(limits.admit(tenant, 3))
        with pytest.raises(RateLimited) as caught, limits.admit(tenant, 2):
            pass
        assert caught.value.param == "concurrency"
        stack.enter_context(limits.admit(tenant, 1))
        assert limits.count_running_answers("acme") == 4
    assert limits.count_running_answers("acme") == 0
    assert [send_request(limits, tenant) for _ in range(3)][:2] == [0, 0]  # the refused one was charged nothing


def test_more_answers_than_there_may_ever_be_are_no_matter_of_waiting(clock: Clock) -> None:
    limits = RateLimiter(clock)
    with pytest.raises(Refusal) as caught, limits.admit(build_tenant(concurrency=4), 5):
        pass
    assert not isinstance(caught.value, RateLimited)
    assert (caught.value.status, caught.value.param) == (400, "n")


def test_what_is_refused_before_its_prompt_is_read_is_charged_nothing(clock: Clock) -> None:
    limits = RateLimiter(clock)
    tenant = build_tenant(requests_per_minute=3, tokens_per_minute=60)
    assert send_request(limits, tenant, 60) == 0
    for _ in range(5):
        with pytest.raises(RateLimited) as caught, limits.admit(tenant, min_tokens=30):
            pass
        assert caught.value.retry_after_s == pytest.approx(30)
    assert [send_request(limits, tenant, 0) for _ in range(3)] == [0, 0, pytest.approx(20)]


def test_a_prompt_that_was_read_counts_as_a_request_whatever_it_came_to(clock: Clock) -> None:
    limits = RateLimiter(clock)
    tenant = build_tenant(requests_per_minute=3, tokens_per_minute=60)
    assert send_request(limits, tenant, 40) == 0
    with limits.admit(tenant, min_tokens=1) as charge, pytest.raises(RateLimited) as caught:
        charge.reserve(30)
    assert caught.value.retry_after_s == pytest.approx(10)
    assert limits.status_of(tenant)["tokens_per_minute"].remaining == 20
    assert limits.status_of(tenant)["requests_per_minute"].remaining == 1


def test_how_a_tenant_stands(clock: Clock) -> None:
    limits = RateLimiter(clock)
    tenant = build_tenant(tokens_per_minute=60, concurrency=1)
    assert limits.status_of(tenant) == {"tokens_per_minute": LimitStatus(60, 60, 0.0)}
    assert send_request(limits, tenant, 90) == 0
    assert limits.status_of(tenant) == {"tokens_per_minute": LimitStatus(60, 0, pytest.approx(90))}
    clock.now += 40.5
    assert limits.status_of(tenant) == {"tokens_per_minute": LimitStatus(60, 10, pytest.approx(49.5))}


def test_an_error_inside_frees_the_place(clock: Clock) -> None:
    limits = RateLimiter(clock)
    tenant = build_tenant(concurrency=1)
    with pytest.raises(KeyError), limits.admit(tenant, 1):
        raise KeyError
    assert send_request(limits, tenant) == 0


def test_one_tenant_that_floods_costs_another_nothing(clock: Clock) -> None:
    limits = RateLimiter(clock)
    flood = build_tenant("flood", requests_per_minute=5)
    calm = build_tenant("calm", requests_per_minute=5)
    for second in range(60):
        for _ in range(100):
            send_request(limits, flood)
        assert second % 12 or send_request(limits, calm) == 0
        clock.now += 1


def test_limits_that_change_while_it_runs(clock: Clock) -> None:
    limits = RateLimiter(clock)
    assert send_request(limits, build_tenant(requests_per_minute=1)) == 0
    assert send_request(limits, build_tenant(requests_per_minute=1)) == pytest.approx(60)
    assert send_request(limits, build_tenant(requests_per_minute=60)) == pytest.approx(1)
    assert send_request(limits, build_tenant()) == 0
    assert send_request(limits, build_tenant(requests_per_minute=1)) == 0  # a limit that was removed starts full
    clock.now += 6000
    assert [send_request(limits, build_tenant(requests_per_minute=2)) for _ in range(3)] == [0, 0, pytest.approx(30)]


def test_the_message_says_when_and_nothing_of_the_tenant(clock: Clock) -> None:
    limits = RateLimiter(clock)
    tenant = build_tenant(requests_per_minute=1)
    send_request(limits, tenant)
    with pytest.raises(RateLimited, match="Try again in 60 s") as caught, limits.admit(tenant):
        pass
    assert "acme" not in str(caught.value)


@settings(max_examples=200)
@given(
    st.integers(1, 500),
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 800), st.floats(0, 1)), min_size=1, max_size=60),
)
def test_no_minute_lets_more_than_its_share_in(per_minute: int, steps: list[tuple[float, int, float]]) -> None:
    """The tokens used are at most a full bucket, the refill since the start, and the debt of the last request."""
    clock = Clock()
    limits = RateLimiter(clock)
    tenant = build_tenant(tokens_per_minute=per_minute)
    total_used = 0
    started_at = clock.now
    for wait, tokens, share in steps:
        clock.now += wait
        used = round(tokens * share)
        if send_request(limits, tenant, tokens, used) == 0:
            total_used += used
            assert total_used <= per_minute * (1 + (clock.now - started_at) / 60) + max(0, tokens - per_minute) + 1e-6


def test_many_threads(clock: Clock) -> None:
    limits = RateLimiter(clock)
    tenant = build_tenant(requests_per_minute=500, concurrency=8)
    admissions: list[int] = []
    refused_params: set[str | None] = set()

    def send_requests() -> None:
        for _ in range(100):
            try:
                with limits.admit(tenant):
                    assert limits.count_running_answers("acme") <= 8
                    admissions.append(1)
            except RateLimited as error:
                refused_params.add(error.param)

    threads = [threading.Thread(target=send_requests) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(admissions) <= 500
    assert refused_params <= {"requests_per_minute", "concurrency"}
    assert limits.count_running_answers("acme") == 0
