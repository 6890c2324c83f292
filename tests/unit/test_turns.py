"""Requests share slots, the queue and the adapter bank fairly."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving_engines import (
    FAMILIES,
    add_request,
    build_engine,
    build_sampling_params,
    draw_prompt,
    save_random_adapters,
    submit_request,
)

from align.rollout import continuous
from align.rollout.serving_engine import QueueFull, Request, ServingEngine

CONFIG = FAMILIES["llama"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_random_adapters(CONFIG, tmp_path_factory.mktemp("adapters"), ({"r": 16}, {"r": 4}))


def run_until_idle(serving_engine: ServingEngine) -> None:
    while serving_engine.step():
        pass


def test_a_slot_is_free_within_two_steps():
    serving_engine = build_engine(CONFIG, slots=1)
    first_completion, first_answer = add_request(serving_engine, Request(draw_prompt(5), build_sampling_params(300)))
    waiting_answer = submit_request(serving_engine, Request(draw_prompt(5), build_sampling_params(1)))
    serving_engine.step()
    serving_engine.abort(first_completion)
    serving_engine.step()
    serving_engine.step()
    assert first_answer.reason == "abort"
    assert waiting_answer.reason == "length"


def test_turns_are_fair_over_tenants():
    """A tenant floods the queue; the first request of another is answered next, and then both take turns."""
    serving_engine = build_engine(CONFIG, slots=2)
    order: list[str] = []

    def build_request(tenant: str) -> Request:
        return Request(
            draw_prompt(3), build_sampling_params(2), tenant=tenant, ends=lambda id: order.append(tenant) or False
        )

    for tenant in "aaaaaa":
        submit_request(serving_engine, build_request(tenant))
    serving_engine.step()
    for tenant in "bbb":
        submit_request(serving_engine, build_request(tenant))
    run_until_idle(serving_engine)
    assert order.index("b") <= 4
    assert order[:12].count("b") >= 4


def test_who_has_fewer_running_goes_first():
    """A tenant has all slots; the other gets those that come free until both have as many."""
    serving_engine = build_engine(CONFIG, slots=4)
    lengths = iter((2, 4, 6, 8))
    began: list[str] = []

    def build_request(tenant: str, length: int) -> Request:
        unreported = [tenant]
        return Request(
            draw_prompt(3),
            build_sampling_params(length),
            tenant=tenant,
            ends=lambda id: bool(unreported and began.append(unreported.pop())) or False,
        )

    for length in lengths:
        submit_request(serving_engine, build_request("a", length))
    serving_engine.step()
    for _ in range(3):
        submit_request(serving_engine, build_request("a", 20))
        submit_request(serving_engine, build_request("b", 20))
    run_until_idle(serving_engine)
    assert began[:6] == ["a"] * 4 + ["b"] * 2


def test_who_waits_for_room_in_the_bank_keeps_its_turn(folders: list[Path], monkeypatch: pytest.MonkeyPatch):
    """Other requests overtake it only for a while."""
    monkeypatch.setattr(continuous, "PATIENCE", 3)
    serving_engine = build_engine(CONFIG, slots=4, resident=1)
    loaded_digest, waiting_digest = (serving_engine.register(folder) for folder in folders[:2])
    finished_digests: list[str] = []

    def build_request(digest: str) -> Request:
        return Request(
            draw_prompt(3), build_sampling_params(4), digest, ends=lambda id: finished_digests.append(digest) or False
        )

    submit_request(serving_engine, build_request(loaded_digest))
    serving_engine.step()
    submit_request(serving_engine, build_request(waiting_digest))
    later_answers = []
    for _ in range(12):
        later_answers.append(submit_request(serving_engine, build_request(loaded_digest)))
        serving_engine.step()
    run_until_idle(serving_engine)
    assert all(each.reason == "length" for each in later_answers)
    assert 4 < finished_digests.index(waiting_digest) < 4 + 4 * 6  # some requests overtook it, but not all


def test_nobody_waits_for_room_in_the_bank_who_has_gone_or_needs_none(folders: list[Path]):
    serving_engine = build_engine(CONFIG, slots=4, resident=1)
    loaded_digest, waiting_digest = (serving_engine.register(folder) for folder in folders[:2])
    running_answer = submit_request(serving_engine, Request(draw_prompt(3), build_sampling_params(40), loaded_digest))
    serving_engine.step()
    aborted_completion, aborted_answer = add_request(
        serving_engine, Request(draw_prompt(3), build_sampling_params(4), waiting_digest)
    )
    serving_engine.step()
    base_answer = submit_request(serving_engine, Request(draw_prompt(3), build_sampling_params(4)))
    for _ in range(6):
        serving_engine.step()
    assert base_answer.reason == "length"
    serving_engine.abort(aborted_completion)
    serving_engine.step()
    assert aborted_answer.reason == "abort"
    assert running_answer.reason is None
    assert serving_engine.stats().waiting == 0
    run_until_idle(serving_engine)
    assert serving_engine.known.by_digest[waiting_digest].held == 0


def test_a_tenant_leaves_room_in_the_queue_and_slots_for_others():
    serving_engine = build_engine(CONFIG, slots=8, queue=16, reserve=1)

    def build_request(tenant: str, length: int) -> Request:
        return Request(draw_prompt(3), build_sampling_params(length), tenant=tenant)

    for _ in range(7):
        submit_request(serving_engine, build_request("a", 200))
    serving_engine.step()
    for _ in range(12):  # three quarters of the queue
        submit_request(serving_engine, build_request("a", 200))
    with pytest.raises(QueueFull):
        submit_request(serving_engine, build_request("a", 200))
    serving_engine.step()
    answer_of_b = submit_request(serving_engine, build_request("b", 3))
    for _ in range(3):
        serving_engine.step()
    assert answer_of_b.reason == "length"  # in the slot that is reserved
    assert serving_engine.stats().running == 7
