"""How fast a tenant's refusals leave, by a clock that the test moves."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest
from clocks import Clock

from align.serve.pace import AT_ONCE, HELD, HELD_OF_ONE, LONGEST_S, PER_S, Pace, Readers


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_first_leave_at_once_and_the_others_evenly(clock: Clock):
    pace = Pace(clock)
    waits = [pace.wait("ann") for _ in range(AT_ONCE + 3)]
    assert waits == pytest.approx([0] * AT_ONCE + [1 / PER_S, 2 / PER_S, 3 / PER_S])
    assert pace.wait("bob") == 0


def test_one_client_that_waits_for_each_answer_gets_so_many_a_second(clock: Clock):
    pace, began, refused = Pace(clock), clock.now, 0
    while clock.now < began + 60:
        clock.now += pace.wait("ann") + 0.001
        refused += 1
    assert AT_ONCE + 60 * PER_S - 2 <= refused <= AT_ONCE + 60 * PER_S + 2


def test_none_is_held_for_longer_than_the_longest_wait_and_what_was_long_ago_is_forgotten(clock: Clock):
    pace = Pace(clock)
    waits = [pace.wait("ann") for _ in range(1000)]
    assert LONGEST_S - 1 < max(waits) <= LONGEST_S
    crowded = waits[int(AT_ONCE + LONGEST_S * PER_S) + 1 :]
    assert min(crowded) >= LONGEST_S / 2
    assert len({int(wait) for wait in crowded}) > LONGEST_S / 4  # they do not come back together
    clock.now += LONGEST_S + AT_ONCE / PER_S
    assert [pace.wait("ann") for _ in range(AT_ONCE)] == pytest.approx([0] * AT_ONCE)


def test_a_tenant_has_so_many_prompts_read_at_once_and_another_does_not_wait_for_them():
    readers, reading, most = Readers(at_once=2), dict.fromkeys(("ann", "bob"), 0), dict.fromkeys(("ann", "bob"), 0)
    ended: list[str] = []

    async def read(tenant: str) -> None:
        async with readers.turn(tenant):
            reading[tenant] += 1
            most[tenant] = max(most[tenant], reading[tenant])
            await asyncio.sleep(0.001)
            reading[tenant] -= 1
            ended.append(tenant)

    async def crowd() -> None:
        await asyncio.gather(*(read("ann") for _ in range(20)), read("bob"))

    asyncio.run(crowd())
    assert most == {"ann": 2, "bob": 1}
    assert ended.index("bob") <= 2


def test_so_many_are_held_at_once_and_others_leave_at_once(clock: Clock):
    pace = Pace(clock)
    with ExitStack() as stack:
        waits = [stack.enter_context(pace.held("ann")) for _ in range(HELD_OF_ONE + 1)]
        assert waits[-2] > 0
        assert waits[-1] == 0
        for i in range(HELD - HELD_OF_ONE - 1):
            stack.enter_context(pace.held(f"t{i}"))
        for _ in range(AT_ONCE + 1):  # one of these would wait, if there were room
            with pace.held("bob") as wait:
                assert wait == 0
    for _ in range(AT_ONCE):
        pace.wait("cid")
    with pace.held("cid") as wait:
        assert wait > 0
