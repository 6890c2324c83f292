"""Whose turn it is: slots, the queue and the bank among requests that want them."""

from __future__ import annotations

from pathlib import Path

import pytest
from many_adapters import FAMILIES, adapters, added, asked, engine, prompt, sampled

from align.rollout import continuous
from align.rollout.serving_engine import QueueFull, Request, ServingEngine

CONFIG = FAMILIES["llama"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return adapters(CONFIG, tmp_path_factory.mktemp("adapters"), ({"r": 16}, {"r": 4}))


def finish(made: ServingEngine) -> None:
    while made.step():
        pass


def test_a_slot_is_free_within_two_steps():
    made = engine(CONFIG, slots=1)
    first, heard = added(made, Request(prompt(5), sampled(300)))
    waiting = asked(made, Request(prompt(5), sampled(1)))
    made.step()
    made.abort(first)
    made.step()
    made.step()
    assert heard.reason == "abort"
    assert waiting.reason == "length"


def test_turns_are_fair_over_tenants():
    """One floods; the other's first is answered next, and then they take turns."""
    made = engine(CONFIG, slots=2)
    order: list[str] = []

    def request(tenant: str) -> Request:
        return Request(prompt(3), sampled(2), tenant=tenant, ends=lambda id: order.append(tenant) or False)

    for tenant in "aaaaaa":
        asked(made, request(tenant))
    made.step()
    for tenant in "bbb":
        asked(made, request(tenant))
    finish(made)
    assert order.index("b") <= 4
    assert order[:12].count("b") >= 4


def test_who_has_fewer_running_goes_first():
    """One has every slot; as they come free, the other gets them until both have as many."""
    made = engine(CONFIG, slots=4)
    lengths = iter((2, 4, 6, 8))
    began: list[str] = []

    def request(tenant: str, length: int) -> Request:
        told = [tenant]
        return Request(
            prompt(3), sampled(length), tenant=tenant, ends=lambda id: bool(told and began.append(told.pop())) or False
        )  # fmt: skip

    for length in lengths:
        asked(made, request("a", length))
    made.step()
    for _ in range(3):
        asked(made, request("a", 20))
        asked(made, request("b", 20))
    finish(made)
    assert began[:6] == ["a"] * 4 + ["b"] * 2


def test_who_waits_for_room_in_the_bank_keeps_its_turn(folders: list[Path], monkeypatch: pytest.MonkeyPatch):
    """Others go by for a while."""
    monkeypatch.setattr(continuous, "PATIENCE", 3)
    made = engine(CONFIG, slots=4, resident=1)
    one, other = (made.register(folder) for folder in folders[:2])
    ended: list[str] = []

    def request(digest: str) -> Request:
        return Request(prompt(3), sampled(4), digest, ends=lambda id: ended.append(digest) or False)

    asked(made, request(one))
    made.step()
    asked(made, request(other))
    later = []
    for _ in range(12):
        later.append(asked(made, request(one)))
        made.step()
    finish(made)
    assert all(each.reason == "length" for each in later)
    assert 4 < ended.index(other) < 4 + 4 * 6  # some went by, and not all of them


def test_nobody_waits_for_room_in_the_bank_who_has_gone_or_needs_none(folders: list[Path]):
    made = engine(CONFIG, slots=4, resident=1)
    one, other = (made.register(folder) for folder in folders[:2])
    running = asked(made, Request(prompt(3), sampled(40), one))
    made.step()
    gone, heard = added(made, Request(prompt(3), sampled(4), other))
    made.step()
    beside = asked(made, Request(prompt(3), sampled(4)))
    for _ in range(6):
        made.step()
    assert beside.reason == "length"
    made.abort(gone)
    made.step()
    assert heard.reason == "abort"
    assert running.reason is None
    assert made.stats().waiting == 0
    finish(made)
    assert made.known.by_digest[other].held == 0


def test_a_tenant_leaves_room_in_the_queue_and_slots_for_others():
    made = engine(CONFIG, slots=8, queue=16, reserve=1)

    def request(tenant: str, length: int) -> Request:
        return Request(prompt(3), sampled(length), tenant=tenant)

    for _ in range(7):
        asked(made, request("a", 200))
    made.step()
    for _ in range(12):  # three quarters of the room
        asked(made, request("a", 200))
    with pytest.raises(QueueFull):
        asked(made, request("a", 200))
    made.step()
    other = asked(made, request("b", 3))
    for _ in range(3):
        made.step()
    assert other.reason == "length"  # in the slot that no flood gets
    assert made.stats().running == 7
