"""Tokens are counted once: whatever a client has received, whenever the server is killed."""

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
    usage.record_sent({"r": (7, 2), "gone": (9, 9)})  # late
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
    usage.reserve(Tenant("acme", limits=Limits(token_budget=101)), "d", 1)  # a larger one, while it runs
    usage.reserve(Tenant("other", limits=Limits(token_budget=1)), "e", 1)
    with pytest.raises(BudgetSpent, match=r"^token_budget=0: 0 tokens"):
        usage.reserve(Tenant("third", limits=Limits(token_budget=0)), "f", 1)


def test_a_request_has_one_reservation(usage: UsageDatabase) -> None:
    usage.reserve(ACME, "r", 10)
    with pytest.raises(UsageUnwritable):
        usage.reserve(ACME, "r", 10)
    assert usage.read_usage("acme") == TenantUsage(reserved=10)


def test_a_server_that_ended_leaves_what_was_sent_and_one_that_lives_is_left_alone(path: Path) -> None:
    with UsageDatabase(path) as alive:
        alive.reserve(ACME, "mine", 50)
        alive.record_sent({"mine": (1, 1)})
        with UsageDatabase(path) as ended:
            ended.reserve(ACME, "sent", 50)
            ended.record_sent({"sent": (5, 2)})
            ended.reserve(ACME, "unsent", 50)
        with UsageDatabase(path) as next_one:
            assert next_one.read_usage("acme") == TenantUsage(2, 5, 2, reserved=50)
        assert alive.settle("mine", 3, 3)
        assert alive.read_usage("acme") == TenantUsage(3, 8, 5)


def test_nothing_is_left_beside_the_file(path: Path) -> None:
    with UsageDatabase(path):
        pass
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\0" + b"x" * 4000])
def test_a_file_that_is_none(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(StorageError, match="usage cannot be counted"):
        UsageDatabase(path)
    with pytest.raises(StorageError):
        UsageDatabase(path.parent / "none" / "usage.db")


def test_nothing_is_answered_that_cannot_be_counted(usage: UsageDatabase, path: Path) -> None:
    other = sqlite3.connect(path)
    other.execute("DROP TABLE reservations")
    for act in (
        lambda: usage.reserve(ACME, "r", 1),
        lambda: usage.record_sent({"r": (1, 1)}),
        lambda: usage.read_usage("acme"),
    ):
        with pytest.raises(UsageUnwritable) as caught:
            act()
        assert str(path) not in str(caught.value)
    other.close()


def test_threads_and_two_servers_at_once(path: Path) -> None:
    tenant = Tenant("acme", limits=Limits(token_budget=1000))
    with UsageDatabase(path) as one, UsageDatabase(path) as two:

        def ask(usage: UsageDatabase, who: int) -> None:
            for i in range(60):
                request = f"{who}-{i}"
                try:
                    usage.reserve(tenant, request, 5)
                except BudgetSpent:
                    continue
                usage.record_sent({request: (2, 1)})
                usage.settle(request, 2, 3)
                assert usage.read_usage("acme").tokens <= 1000

        threads = [threading.Thread(target=ask, args=((one, two)[who % 2], who)) for who in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert one.read_usage("acme") == TenantUsage(200, 400, 600)


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
PROMPT, ANSWER, KILLS = 11, 5, 25


def killed(servers: subprocess.Popen[str], kill: int, after: int) -> Counter[str]:
    """Request → tokens of its answer that the client has received, of a server that is killed after some lines."""
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
            os.kill(pid, signal.SIGKILL)  # and what is in the pipe was received
    raise AssertionError("the servers ended")


def test_whenever_it_is_killed_what_a_client_received_is_counted_and_nothing_twice(path: Path) -> None:
    rng, unsent = random.Random(1), 0
    command = [sys.executable, "-c", SERVER, str(path)]
    with (
        UsageDatabase(path) as beside,  # another server on the same file, with a request under way all the time
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as servers,
    ):
        beside.reserve(ACME, "mine", 50)
        for kill in range(KILLS):
            received = killed(servers, kill, rng.randrange(1, 400))
            for _ in range(2):  # what was settled is not settled again
                with UsageDatabase(path) as usage:
                    found = {who: usage.read_usage(f"{kill}-{who}") for who in range(3)}
            for who, used in found.items():
                seen = [n for request, n in received.items() if request.startswith(f"{kill}-{who}/")]
                assert used.reserved == 0
                assert len(seen) <= used.requests <= len(seen) + 1  # and the one that had sent nothing yet
                assert sum(seen) <= used.completion_tokens <= sum(seen) + 1
                assert len(seen) * PROMPT <= used.prompt_tokens <= (len(seen) + 1) * PROMPT
                unsent += used.completion_tokens - sum(seen)
        assert beside.read_usage("acme") == TenantUsage(reserved=50)
    assert unsent < 3 * KILLS  # it is not that one too many is always counted
