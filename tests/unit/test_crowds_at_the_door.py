"""Tests of log-ins during a crowd of strangers: members get in, and a busy server counts no wrong password."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from annotator_accounts import GOOD, accept_invitation
from argon2 import PasswordHasher
from waiting import becomes_true

from align.annotate.accounts import FREE_ATTEMPTS, FREE_ATTEMPTS_IN_ALL, Accounts
from align.core.errors import StorageError
from align.web.credentials import MAX_HASHING, MAX_WAIT_S, MAX_WAITING, AccessRefused
from align.web.throttle import FairQueue, ServerBusy

STRANGERS = 40


@pytest.fixture
def slow(accounts: Accounts, monkeypatch) -> Counter[str]:
    """Number of hashes under way, and the most at once. Each hash takes 30 ms."""
    counts = Counter()
    lock = threading.Lock()
    hasher = accounts.passwords.hasher

    class Slow(PasswordHasher):
        def verify(self, kept, password):
            with lock:
                counts["under way"] += 1
                counts["most"] = max(counts["most"], counts["under way"])
            try:
                time.sleep(0.03)
                return hasher.verify(kept, password)
            finally:
                with lock:
                    counts["under way"] -= 1

    monkeypatch.setattr(accounts.passwords, "hasher", Slow(time_cost=1, memory_cost=8, parallelism=1))
    return counts


@contextmanager
def simulate_crowd(accounts: Accounts, address: Callable[[int], str], failed: int) -> Iterator[Counter[str]]:
    """Try wrong passwords for new names from many threads until the block ends. The block begins after `failed`
    failures of each address: before them, strangers look like members."""
    stop = threading.Event()
    outcomes = Counter()

    def guess_passwords(number: int) -> None:
        tries = 0
        while not stop.is_set():
            tries += 1
            try:
                accounts.log_in(f"stranger {number} {tries}", "a wrong password", address(number))
            except ServerBusy:
                outcomes["busy"] += 1
                time.sleep(0.01)  # forty threads ask a hundred times as often as passwords can be checked
            except AccessRefused as error:
                outcomes["looked at" if "no such name" in error.problem else "throttled"] += 1
                outcomes[address(number)] += "no such name" in error.problem
                time.sleep(0.01 if "too many" in error.problem else 0)

    threads = [threading.Thread(target=guess_passwords, args=(number,), daemon=True) for number in range(STRANGERS)]
    for thread in threads:
        thread.start()
    try:
        deadline = time.monotonic() + 60
        while min(outcomes[address(number)] for number in range(STRANGERS)) < failed and time.monotonic() < deadline:
            time.sleep(0.05)
        yield outcomes
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)


@pytest.mark.parametrize("addresses", [1, 2, STRANGERS])
def test_forty_strangers_keep_nobody_out(accounts, slow, addresses):
    accept_invitation(accounts, "ann")
    waits = []
    with simulate_crowd(accounts, lambda number: f"10.0.0.{number % addresses}", failed=1) as outcomes:
        for _ in range(10):
            start = time.monotonic()
            assert accounts.log_in("ann", GOOD, "192.0.2.7")
            waits.append(time.monotonic() - start)
    assert outcomes["looked at"] > 0
    assert outcomes["busy"] + outcomes["throttled"] > 0
    assert slow["most"] == MAX_HASHING  # each takes 64 MiB
    assert max(waits) < MAX_WAIT_S / 2


def test_somebody_who_mistyped_comes_before_those_who_guess_on(accounts, slow):
    accept_invitation(accounts, "ann")
    with simulate_crowd(accounts, lambda number: f"10.0.0.{number}", failed=3):
        with pytest.raises(AccessRefused, match="no such name"):
            accounts.log_in("ann", "a typing error", "192.0.2.7")
        assert accounts.log_in("ann", GOOD, "192.0.2.7")


@contextmanager
def fill_queue(accounts: Accounts) -> Iterator[None]:
    """Fill the places of those who are served and those who wait with visitors who never failed."""
    stop = threading.Event()
    queue = accounts.passwords.queue

    def hold_turn() -> None:
        try:
            with queue.take_turn("", -1):
                stop.wait(20)
        except ServerBusy:
            pass

    threads = [threading.Thread(target=hold_turn, daemon=True) for _ in range(MAX_HASHING + MAX_WAITING)]
    for thread in threads:
        thread.start()
    assert becomes_true(lambda: len(queue.waiting) >= MAX_WAITING and not queue.free)
    yield
    stop.set()
    for thread in threads:
        thread.join(20)


def test_busy_is_no_wrong_password(accounts):
    accept_invitation(accounts, "ann")
    with fill_queue(accounts):
        for _ in range(2 * FREE_ATTEMPTS_IN_ALL):
            with pytest.raises(ServerBusy, match="many passwords"):
                accounts.log_in("ann", GOOD, "here")
    assert [accounts._throttle.count_failures(name) for name in ("name ann from here", "name ann", "from here")] == [
        0,
        0,
        0,
    ]
    assert accounts.log_in("ann", GOOD, "here")


def test_nor_is_a_store_that_cannot_be_read(accounts, monkeypatch):
    accept_invitation(accounts, "ann")

    def raise_locked(*_):
        raise StorageError("store.url", "x", "it is locked", "Wait.")

    with monkeypatch.context() as patched:
        patched.setattr("align.annotate.accounts.find_user", raise_locked)
        for _ in range(2 * FREE_ATTEMPTS_IN_ALL):
            with pytest.raises(StorageError):
                accounts.log_in("ann", GOOD, "here")
    assert accounts.log_in("ann", GOOD, "here")


def test_wrong_ones_count_as_before_though_the_door_was_busy_between(accounts):
    accept_invitation(accounts, "ann")
    for _ in range(FREE_ATTEMPTS):
        with pytest.raises(AccessRefused, match="no such name"):
            accounts.log_in("ann", "a wrong password", "here")
        with fill_queue(accounts), pytest.raises(ServerBusy):
            accounts.log_in("ann", "a wrong password", "here")
    with pytest.raises(AccessRefused, match="no such name"):
        accounts.log_in("ann", "a wrong password", "here")
    with pytest.raises(AccessRefused, match="too many attempts"):
        accounts.log_in("ann", GOOD, "here")


def record_order(visitors: list[tuple[str, int]], room: int = 20) -> list[str]:
    """Return the order in which waiting visitors are served. Visitors who are sent away are left out."""
    queue = FairQueue(1, room, 60, "password")
    served = []
    lock = threading.Lock()
    release = threading.Event()
    sent_away = []

    def hold_turn() -> None:
        with queue.take_turn("holder", 0):
            release.wait(60)

    def wait_for_turn(number: int, share: str, failures: int) -> None:
        try:
            with queue.take_turn(share, failures), lock:
                served.append(f"{share}{number}")
        except ServerBusy:
            sent_away.append(number)

    threads = [threading.Thread(target=hold_turn)]
    threads += [threading.Thread(target=wait_for_turn, args=(n, *visitor)) for n, visitor in enumerate(visitors)]
    for waiters, thread in enumerate(threads):
        thread.start()
        assert becomes_true(lambda n=waiters: queue.free == 0 and len(queue.waiting) + len(sent_away) == n)
    release.set()
    for thread in threads:
        thread.join(10)
    assert (queue.waiting, queue.free) == ([], 1)
    return served


def test_one_of_each_address_then_the_next_of_each_and_whoever_failed_last():
    visitors = [("a", 0), ("a", 0), ("a", 0), ("b", 0), ("c", 3), ("b", 0), ("d", 1)]
    assert record_order(visitors) == ["a0", "b3", "a1", "b5", "a2", "d6", "c4"]


def test_who_comes_last_in_that_order_makes_room():
    visitors = [("a", 0), ("a", 0), ("a", 0), ("c", 3), ("b", 0), ("d", 9), ("e", 0)]
    assert record_order(visitors, room=4) == ["a0", "b4", "e6", "a1"]


def test_nobody_waits_for_ever():
    queue = FairQueue(1, 5, 0.2, "password")
    with queue.take_turn("a", 0):
        start = time.monotonic()
        errors: list[BaseException] = []

        def wait_for_turn() -> None:
            try:
                with queue.take_turn("b", 0):
                    pass
            except ServerBusy as error:
                errors.append(error)

        thread = threading.Thread(target=wait_for_turn)
        thread.start()
        thread.join(5)
        assert (len(errors), queue.waiting) == (1, [])
        assert 0.15 < time.monotonic() - start < 2
    assert MAX_WAIT_S < 60
