"""Delays of a tenant's refusals, measured by a clock that the test moves."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest
from clocks import Clock

from align.serve.rate_limits import (
    LONGEST_HOLD_S,
    MAX_HELD,
    MAX_HELD_PER_TENANT,
    REFUSAL_BURST,
    REFUSALS_PER_S,
    ReadTurns,
    RefusalPacer,
)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_first_leave_at_once_and_the_others_evenly(clock: Clock):
    pace = RefusalPacer(clock)
    waits = [pace.reserve_delay("ann") for _ in range(REFUSAL_BURST + 3)]
    assert waits == pytest.approx([0] * REFUSAL_BURST + [1 / REFUSALS_PER_S, 2 / REFUSALS_PER_S, 3 / REFUSALS_PER_S])
    assert pace.reserve_delay("bob") == 0


def test_one_client_that_waits_for_each_answer_gets_so_many_a_second(clock: Clock):
    pace = RefusalPacer(clock)
    started = clock.now
    refusals = 0
    while clock.now < started + 60:
        clock.now += pace.reserve_delay("ann") + 0.001
        refusals += 1
    assert REFUSAL_BURST + 60 * REFUSALS_PER_S - 2 <= refusals <= REFUSAL_BURST + 60 * REFUSALS_PER_S + 2


def test_none_is_held_for_longer_than_the_longest_wait_and_what_was_long_ago_is_forgotten(clock: Clock):
    pace = RefusalPacer(clock)
    waits = [pace.reserve_delay("ann") for _ in range(1000)]
    assert LONGEST_HOLD_S - 1 < max(waits) <= LONGEST_HOLD_S
    waits_at_limit = waits[int(REFUSAL_BURST + LONGEST_HOLD_S * REFUSALS_PER_S) + 1 :]
    assert min(waits_at_limit) >= LONGEST_HOLD_S / 2
    assert len({int(wait) for wait in waits_at_limit}) > LONGEST_HOLD_S / 4  # the clients do not come back all at once
    clock.now += LONGEST_HOLD_S + REFUSAL_BURST / REFUSALS_PER_S
    assert [pace.reserve_delay("ann") for _ in range(REFUSAL_BURST)] == pytest.approx([0] * REFUSAL_BURST)


def test_a_tenant_has_so_many_prompts_read_at_once_and_another_does_not_wait_for_them():
    readers = ReadTurns(max_concurrent=2)
    reading = dict.fromkeys(("ann", "bob"), 0)
    peaks = dict.fromkeys(("ann", "bob"), 0)
    finished_tenants: list[str] = []

    async def read(tenant: str) -> None:
        async with readers.turn(tenant):
            reading[tenant] += 1
            peaks[tenant] = max(peaks[tenant], reading[tenant])
            await asyncio.sleep(0.001)
            reading[tenant] -= 1
            finished_tenants.append(tenant)

    async def read_all() -> None:
        await asyncio.gather(*(read("ann") for _ in range(20)), read("bob"))

    asyncio.run(read_all())
    assert peaks == {"ann": 2, "bob": 1}
    assert finished_tenants.index("bob") <= 2


def test_so_many_are_held_at_once_and_others_leave_at_once(clock: Clock):
    pace = RefusalPacer(clock)
    with ExitStack() as stack:
        waits = [stack.enter_context(pace.hold("ann")) for _ in range(MAX_HELD_PER_TENANT + 1)]
        assert waits[-2] > 0
        assert waits[-1] == 0
        for i in range(MAX_HELD - MAX_HELD_PER_TENANT - 1):
            stack.enter_context(pace.hold(f"t{i}"))
        for _ in range(REFUSAL_BURST + 1):  # one of these would be held if there were room
            with pace.hold("bob") as wait:
                assert wait == 0
    for _ in range(REFUSAL_BURST):
        pace.reserve_delay("cid")
    with pace.hold("cid") as wait:
        assert wait > 0
