"""A crowd that owes the server something: 2,000 connections that say nothing, slow heads, bodies that stop half-way,
bodies of 100 MB. Requests of others are answered meanwhile, and no body is kept."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from processes import Forks
from serving import Server, serving

IDLE, SLOW, HALF, LARGE = 2000, 50, 50, 8
SIZE = 100_000_000
PIECE = b" " * 250_000
BODY = {"model": "pocket", "prompt": "Hello", "max_tokens": 8, "ignore_eos": True}


@pytest.fixture
def server(forks: Forks, tmp_path: Path) -> Iterator[Server]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < IDLE + 1000:
        pytest.skip(f"a process may hold {hard} descriptors here, and this needs {IDLE + 1000}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with serving(forks, tmp_path, "model=pocket") as server:
        yield server
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def crowd(port: int) -> Iterator[tuple[list[socket.socket], list[bytes]]]:
    """All of them at once, as long as the block lasts. Gives the connections that say nothing, and the first line of
    each answer to a large body."""
    over, answers = threading.Event(), list[bytes]()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n" % port
    with ExitStack() as stack:

        def connected(said: bytes = b"") -> socket.socket:
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            one.sendall(said)
            return one

        def trickle(slow: list[socket.socket]) -> None:
            while not over.wait(0.2):
                for one in slow:
                    with suppress(OSError):  # it was ended: it is too slow
                        one.sendall(b"x")

        def pour(chunked: bool) -> None:
            length = b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Content-Length: %d\r\n\r\n" % SIZE
            piece = b"%x\r\n%b\r\n" % (len(PIECE), PIECE) if chunked else PIECE
            with socket.create_connection(("127.0.0.1", port), timeout=30) as one, suppress(OSError):
                one.sendall(head + length)
                for _ in range(SIZE // len(PIECE)):
                    if over.is_set():
                        return
                    one.sendall(piece)
                answers.append(one.recv(4096).partition(b"\r\n")[0])

        idle = [connected() for _ in range(IDLE)]
        for _ in range(HALF):
            connected(head + b'Content-Length: 100\r\n\r\n{"model": ')
        slow = [connected(head + b"X: ") for _ in range(SLOW)]
        working = [threading.Thread(target=trickle, args=(slow,))]
        working += [threading.Thread(target=pour, args=(i % 2 == 0,)) for i in range(LARGE)]
        for thread in working:
            thread.start()
        try:
            yield idle, answers
        finally:
            over.set()
            for thread in working:
                thread.join()


def is_open(idle: socket.socket) -> bool:
    idle.setblocking(False)
    try:
        return idle.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def resident_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def waits(server: Server, requests: int) -> list[float]:
    """How long each request took, one after the other."""
    taken = []
    for _ in range(requests):
        began = time.monotonic()
        status, found = server.post("/v1/completions", BODY)
        assert (status, found["usage"]["completion_tokens"]) == (200, 8)
        taken.append(time.monotonic() - began)
    return taken


@pytest.mark.slow
def test_requests_of_others_go_on_in_a_crowd(server: Server) -> None:
    waits(server, 1)  # the first waits for more than the others
    before = resident_mb(server.child.pid)
    with crowd(server.port) as (idle, answers):
        taken, most = waits(server, 1), 0.0
        assert (
            sum(map(is_open, idle)) > IDLE // 2
        )  # all, but where connecting took longer than they are let say nothing
        while len(answers) < LARGE or len(taken) < 20:
            taken += waits(server, 1)
            most = max(most, resident_mb(server.child.pid))
            assert len(taken) < 2000, answers
    assert answers == [b"HTTP/1.1 413 Request Entity Too Large"] * LARGE
    assert max(taken) < 5
    assert most - before < SIZE / 1e6
    assert server.get("/ready")[0] == 200
    assert "Traceback" not in (server.folder / "log.txt").read_text()
