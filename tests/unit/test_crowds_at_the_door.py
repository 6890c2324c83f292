"""Log-ins while strangers crowd the door: nobody is kept out, and what was not looked at is no wrong password."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from argon2 import PasswordHasher
from people import GOOD, member
from waiting import settles

from align.annotate.accounts import FREE_ATTEMPTS, FREE_ATTEMPTS_IN_ALL, Accounts
from align.core.errors import StorageError
from align.web.credentials import MAX_HASHING, MAX_WAIT_S, MAX_WAITING, AccessRefused
from align.web.throttle import FairQueue, ServerBusy

STRANGERS = 40


@pytest.fixture
def slow(accounts: Accounts, monkeypatch) -> Counter[str]:
    """Hashes that take 30 ms; how many are under way, and the most there were."""
    now, lock, hasher = Counter(), threading.Lock(), accounts.passwords.hasher

    class Slow(PasswordHasher):
        def verify(self, kept, password):
            with lock:
                now["under way"] += 1
                now["most"] = max(now["most"], now["under way"])
            try:
                time.sleep(0.03)
                return hasher.verify(kept, password)
            finally:
                with lock:
                    now["under way"] -= 1

    monkeypatch.setattr(accounts.passwords, "hasher", Slow(time_cost=1, memory_cost=8, parallelism=1))
    return now


@contextmanager
def crowd(accounts: Accounts, address: Callable[[int], str], failed: int) -> Iterator[Counter[str]]:
    """Strangers who try wrong passwords for names of their own, one after the other, as long as the block lasts. It
    begins once each address has `failed` so often: until then nothing tells them from anybody else."""
    over, seen = threading.Event(), Counter()

    def guessing(number: int) -> None:
        tries = 0
        while not over.is_set():
            tries += 1
            try:
                accounts.log_in(f"stranger {number} {tries}", "a wrong password", address(number))
            except ServerBusy:
                seen["busy"] += 1
                time.sleep(0.01)  # forty such threads ask a hundred times as often as anybody can be looked at
            except AccessRefused as error:
                seen["looked at" if "no such name" in error.problem else "throttled"] += 1
                seen[address(number)] += "no such name" in error.problem
                time.sleep(0.01 if "too many" in error.problem else 0)

    threads = [threading.Thread(target=guessing, args=(number,), daemon=True) for number in range(STRANGERS)]
    for thread in threads:
        thread.start()
    try:
        deadline = time.monotonic() + 60
        while min(seen[address(number)] for number in range(STRANGERS)) < failed and time.monotonic() < deadline:
            time.sleep(0.05)
        yield seen
    finally:
        over.set()
        for thread in threads:
            thread.join(20)


@pytest.mark.parametrize("addresses", [1, 2, STRANGERS])
def test_forty_strangers_keep_nobody_out(accounts, slow, addresses):
    member(accounts, "ann")
    waits = []
    with crowd(accounts, lambda number: f"10.0.0.{number % addresses}", failed=1) as seen:
        for _ in range(10):
            began = time.monotonic()
            assert accounts.log_in("ann", GOOD, "192.0.2.7")
            waits.append(time.monotonic() - began)
    assert seen["looked at"] > 0
    assert seen["busy"] + seen["throttled"] > 0
    assert slow["most"] == MAX_HASHING  # each takes 64 MiB
    assert max(waits) < MAX_WAIT_S / 2


def test_somebody_who_mistyped_comes_before_those_who_guess_on(accounts, slow):
    member(accounts, "ann")
    with crowd(accounts, lambda number: f"10.0.0.{number}", failed=3):
        with pytest.raises(AccessRefused, match="no such name"):
            accounts.log_in("ann", "a typing error", "192.0.2.7")
        assert accounts.log_in("ann", GOOD, "192.0.2.7")


@contextmanager
def full(accounts: Accounts) -> Iterator[None]:
    """All who may are served or wait, and none of them has ever failed."""
    over, turns = threading.Event(), accounts.passwords.queue

    def holding() -> None:
        try:
            with turns.take_turn("", -1):
                over.wait(20)
        except ServerBusy:
            pass

    threads = [threading.Thread(target=holding, daemon=True) for _ in range(MAX_HASHING + MAX_WAITING)]
    for thread in threads:
        thread.start()
    assert settles(lambda: len(turns.waiting) >= MAX_WAITING and not turns.free)
    yield
    over.set()
    for thread in threads:
        thread.join(20)


def test_busy_is_no_wrong_password(accounts):
    member(accounts, "ann")
    with full(accounts):
        for _ in range(2 * FREE_ATTEMPTS_IN_ALL):
            with pytest.raises(ServerBusy, match="many people"):
                accounts.log_in("ann", GOOD, "here")
    assert [accounts._throttle.count_failures(name) for name in ("name ann from here", "name ann", "from here")] == [
        0,
        0,
        0,
    ]
    assert accounts.log_in("ann", GOOD, "here")


def test_nor_is_a_store_that_cannot_be_read(accounts, monkeypatch):
    member(accounts, "ann")

    def unreadable(*_):
        raise StorageError("store.url", "x", "it is locked", "Wait.")

    with monkeypatch.context() as patched:
        patched.setattr("align.annotate.accounts.find_user", unreadable)
        for _ in range(2 * FREE_ATTEMPTS_IN_ALL):
            with pytest.raises(StorageError):
                accounts.log_in("ann", GOOD, "here")
    assert accounts.log_in("ann", GOOD, "here")


def test_wrong_ones_count_as_before_though_the_door_was_busy_between(accounts):
    member(accounts, "ann")
    for _ in range(FREE_ATTEMPTS):
        with pytest.raises(AccessRefused, match="no such name"):
            accounts.log_in("ann", "a wrong password", "here")
        with full(accounts), pytest.raises(ServerBusy):
            accounts.log_in("ann", "a wrong password", "here")
    with pytest.raises(AccessRefused, match="no such name"):
        accounts.log_in("ann", "a wrong password", "here")
    with pytest.raises(AccessRefused, match="too many attempts"):
        accounts.log_in("ann", GOOD, "here")


def order_of(asked: list[tuple[str, int]], room: int = 20) -> list[str]:
    """In which order those who came while one was served were served; who was sent away is not in it."""
    turns, served, lock, over = FairQueue(1, room, 60, "password"), [], threading.Lock(), threading.Event()
    sent_away = []

    def holding() -> None:
        with turns.take_turn("holder", 0):
            over.wait(60)

    def waiting(number: int, share: str, failures: int) -> None:
        try:
            with turns.take_turn(share, failures), lock:
                served.append(f"{share}{number}")
        except ServerBusy:
            sent_away.append(number)

    threads = [threading.Thread(target=holding)]
    threads += [threading.Thread(target=waiting, args=(n, *who)) for n, who in enumerate(asked)]
    for waiters, thread in enumerate(threads):
        thread.start()
        assert settles(lambda n=waiters: turns.free == 0 and len(turns.waiting) + len(sent_away) == n)
    over.set()
    for thread in threads:
        thread.join(10)
    assert (turns.waiting, turns.free) == ([], 1)
    return served


def test_one_of_each_address_then_the_next_of_each_and_whoever_failed_last():
    asked = [("a", 0), ("a", 0), ("a", 0), ("b", 0), ("c", 3), ("b", 0), ("d", 1)]
    assert order_of(asked) == ["a0", "b3", "a1", "b5", "a2", "d6", "c4"]


def test_who_comes_last_in_that_order_makes_room():
    asked = [("a", 0), ("a", 0), ("a", 0), ("c", 3), ("b", 0), ("d", 9), ("e", 0)]
    assert order_of(asked, room=4) == ["a0", "b4", "e6", "a1"]


def test_nobody_waits_for_ever():
    turns = FairQueue(1, 5, 0.2, "password")
    with turns.take_turn("a", 0):
        began = time.monotonic()
        found: list[BaseException] = []

        def waiting() -> None:
            try:
                with turns.take_turn("b", 0):
                    pass
            except ServerBusy as error:
                found.append(error)

        thread = threading.Thread(target=waiting)
        thread.start()
        thread.join(5)
        assert (len(found), turns.waiting) == (1, [])
        assert 0.15 < time.monotonic() - began < 2
    assert MAX_WAIT_S < 60
