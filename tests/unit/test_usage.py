"""Tokens that a client received are counted exactly once, even if the server is killed at any time."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.core.errors import StorageError
from align.serve.errors import BudgetSpent, UsageUnwritable
from align.serve.tenants import Limits, Tenant
from align.serve.usage import TenantUsage, UsageDatabase, build_usage_path

ROOT = Path(__file__).resolve().parents[2]
ACME = Tenant("acme")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return build_usage_path(tmp_path / "keys.json")


@pytest.fixture
def usage(path: Path) -> Iterator[UsageDatabase]:
    with UsageDatabase(path) as usage:
        yield usage


def test_a_request_is_counted_once(usage: UsageDatabase) -> None:
    usage.reserve(ACME, "r", 100)
    assert usage.read_usage("acme") == TenantUsage(reserved=100)
    assert usage.settle("r", 7, 3)
    assert not usage.settle("r", 7, 3)
    assert not usage.settle("never reserved", 7, 3)
    assert usage.read_usage("acme") == TenantUsage(1, 7, 3)
    assert usage.read_usage("other") == TenantUsage()


def test_what_was_sent_is_counted_though_less_is_told(usage: UsageDatabase) -> None:
    for request in ("r", "s"):
        usage.reserve(ACME, request, 100)
    usage.record_sent({"r": (7, 3), "s": (5, 1)})
    usage.record_sent({"r": (7, 4)})
    usage.record_sent({"r": (7, 2), "gone": (9, 9)})  # arrives late
    usage.settle("r", 7, 1)
    usage.settle("s", 5, 2)
    assert usage.read_usage("acme") == TenantUsage(2, 12, 6)


def test_a_budget_is_not_spent_twice_by_requests_at_once(usage: UsageDatabase) -> None:
    tenant = Tenant("acme", limits=Limits(token_budget=100))
    usage.reserve(tenant, "a", 60)
    with pytest.raises(BudgetSpent, match=r"^token_budget=100: 40 tokens of your key are left, fewer"):
        usage.reserve(tenant, "b", 41)
    usage.reserve(tenant, "b", 40)
    usage.settle("a", 10, 10)
    usage.reserve(tenant, "c", 40)
    with pytest.raises(BudgetSpent, match="0 tokens"):
        usage.reserve(tenant, "d", 1)
    usage.reserve(Tenant("acme", limits=Limits(token_budget=101)), "d", 1)  # the budget may grow while requests run
    usage.reserve(Tenant("other", limits=Limits(token_budget=1)), "e", 1)
    with pytest.raises(BudgetSpent, match=r"^token_budget=0: 0 tokens"):
        usage.reserve(Tenant("third", limits=Limits(token_budget=0)), "f", 1)


def test_a_request_has_one_reservation(usage: UsageDatabase) -> None:
    usage.reserve(ACME, "r", 10)
    with pytest.raises(UsageUnwritable):
        usage.reserve(ACME, "r", 10)
    assert usage.read_usage("acme") == TenantUsage(reserved=10)


def test_a_server_that_ended_leaves_what_was_sent_and_one_that_lives_is_left_alone(path: Path) -> None:
    with UsageDatabase(path) as running_database:
        running_database.reserve(ACME, "mine", 50)
        running_database.record_sent({"mine": (1, 1)})
        with UsageDatabase(path) as closed_database:
            closed_database.reserve(ACME, "sent", 50)
            closed_database.record_sent({"sent": (5, 2)})
            closed_database.reserve(ACME, "unsent", 50)
        with UsageDatabase(path) as new_database:
            assert new_database.read_usage("acme") == TenantUsage(2, 5, 2, reserved=50)
        assert running_database.settle("mine", 3, 3)
        assert running_database.read_usage("acme") == TenantUsage(3, 8, 5)


def test_nothing_is_left_beside_the_file(path: Path) -> None:
    with UsageDatabase(path):
        pass
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\0" + b"x" * 4000])
def test_a_file_that_is_none(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StorageError, match="usage cannot be counted"):
        UsageDatabase(path)
    with pytest.raises(StorageError):
        UsageDatabase(path.parent / "none" / "usage.db")


def test_nothing_is_answered_that_cannot_be_counted(usage: UsageDatabase, path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE reservations")
    for act in (
        lambda: usage.reserve(ACME, "r", 1),
        lambda: usage.record_sent({"r": (1, 1)}),
        lambda: usage.read_usage("acme"),
    ):
        with pytest.raises(UsageUnwritable) as caught:
            act()
        assert str(path) not in str(caught.value)
    connection.close()


def test_threads_and_two_servers_at_once(path: Path) -> None:
    tenant = Tenant("acme", limits=Limits(token_budget=1000))
    with UsageDatabase(path) as first_database, UsageDatabase(path) as second_database:

        def ask(usage: UsageDatabase, thread_number: int) -> None:
            for i in range(60):
                request = f"{thread_number}-{i}"
                try:
                    usage.reserve(tenant, request, 5)
                except BudgetSpent:
                    continue
                usage.record_sent({request: (2, 1)})
                usage.settle(request, 2, 3)
                assert usage.read_usage("acme").tokens <= 1000

        threads = [
            threading.Thread(target=ask, args=((first_database, second_database)[thread_number % 2], thread_number))
            for thread_number in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert first_database.read_usage("acme") == TenantUsage(200, 400, 600)


SERVER = """
import os, sys, threading
from pathlib import Path
from align.serve.tenants import Tenant
from align.serve.usage import UsageDatabase

def serve(tenant):
    for i in range(10**6):
        request = f"{tenant.name}/{i}"
        usage.reserve(tenant, request, PROMPT + ANSWER)
        for n in range(1, ANSWER):
            usage.record_sent({request: (PROMPT, n)})
            os.write(1, f"{request} {n}\\n".encode())
        usage.settle(request, PROMPT, ANSWER)
        os.write(1, f"{request} {ANSWER}\\n".encode())

PROMPT, ANSWER = 11, 5
for line in sys.stdin:  # a number of a server, which is a fork: importing takes longer than it lives
    if os.fork() == 0:
        os.write(1, f"{os.getpid()}\\n".encode())
        usage = UsageDatabase(Path(sys.argv[1]))
        threads = [threading.Thread(target=serve, args=(Tenant(f"{line.strip()}-{who}"),)) for who in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    _, status = os.wait()
    os.write(1, f"ended {status}\\n".encode())
"""
PROMPT = 11
ANSWER = 5
KILLS = 25


def run_server_until_killed(servers: subprocess.Popen[str], kill: int, after: int) -> Counter[str]:
    """Kill a server after some lines. Returns the tokens that the client received of each request."""
    assert servers.stdin is not None
    assert servers.stdout is not None
    received: Counter[str] = Counter()
    print(kill, file=servers.stdin, flush=True)
    pid = int(servers.stdout.readline())
    for number, line in enumerate(servers.stdout):
        request, tokens = line.split()
        if request == "ended":
            assert int(tokens) == signal.SIGKILL
            return received
        received[request] = int(tokens)
        if number == after:
            os.kill(pid, signal.SIGKILL)  # lines still in the pipe count as received
    raise AssertionError("the servers ended")


def test_whenever_it_is_killed_what_a_client_received_is_counted_and_nothing_twice(path: Path) -> None:
    rng = random.Random(1)
    unsent = 0
    command = [sys.executable, "-c", SERVER, str(path)]
    with (
        # Another server on the same file, which has a request under way all the time.
        UsageDatabase(path) as running_database,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as servers,
    ):
        running_database.reserve(ACME, "mine", 50)
        for kill in range(KILLS):
            received = run_server_until_killed(servers, kill, rng.randrange(1, 400))
            for _ in range(2):  # settled requests are not settled again
                with UsageDatabase(path) as usage:
                    usage_by_thread = {
                        thread_number: usage.read_usage(f"{kill}-{thread_number}") for thread_number in range(3)
                    }
            for thread_number, thread_usage in usage_by_thread.items():
                received_counts = [
                    n for request, n in received.items() if request.startswith(f"{kill}-{thread_number}/")
                ]
                assert thread_usage.reserved == 0
                # One request may have sent nothing yet.
                assert len(received_counts) <= thread_usage.requests <= len(received_counts) + 1
                assert sum(received_counts) <= thread_usage.completion_tokens <= sum(received_counts) + 1
                assert (
                    len(received_counts) * PROMPT <= thread_usage.prompt_tokens <= (len(received_counts) + 1) * PROMPT
                )
                unsent += thread_usage.completion_tokens - sum(received_counts)
        assert running_database.read_usage("acme") == TenantUsage(reserved=50)
    assert unsent < 3 * KILLS  # the extra token is not counted every time
