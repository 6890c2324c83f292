"""How fast a tenant's refusals leave, by a clock that the test moves."""

from __future__ import annotations

import pytest

from align.serve.pace import AT_ONCE, LONGEST_S, PER_S, Pace


class Clock:
    """Seconds that stand until they are moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


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
    assert max(waits) == pytest.approx(LONGEST_S)
    clock.now += LONGEST_S + AT_ONCE / PER_S
    assert [pace.wait("ann") for _ in range(AT_ONCE)] == pytest.approx([0] * AT_ONCE)
