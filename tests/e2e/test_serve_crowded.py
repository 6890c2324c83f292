"""A server answers requests during an attack: 2,000 idle connections, slow headers, incomplete bodies and bodies of 100
MB. No body is kept in memory."""

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
from serving import Server, run_serve_stage

IDLE = 2000
SLOW = 50
HALF = 50
LARGE = 8
SIZE = 100_000_000
PIECE = b" " * 250_000
BODY = {"model": "pocket", "prompt": "Hello", "max_tokens": 8, "ignore_eos": True}


@pytest.fixture
def server(forks: Forks, tmp_path: Path) -> Iterator[Server]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < IDLE + 1000:
        pytest.skip(f"a process may hold {hard} descriptors here, and this needs {IDLE + 1000}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with run_serve_stage(forks, tmp_path, "model=pocket") as server:
        yield server
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def crowd(port: int) -> Iterator[tuple[list[socket.socket], list[bytes]]]:
    """Open all these connections for the length of the block. Yields the idle connections and the first line of each
    answer to a large body."""
    stop = threading.Event()
    answers = list[bytes]()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n" % port
    with ExitStack() as stack:

        def connect(data: bytes = b"") -> socket.socket:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            connection.sendall(data)
            return connection

        def trickle(slow: list[socket.socket]) -> None:
            while not stop.wait(0.2):
                for connection in slow:
                    with suppress(OSError):  # the server closed it because it is too slow
                        connection.sendall(b"x")

        def pour(chunked: bool) -> None:
            length = b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Content-Length: %d\r\n\r\n" % SIZE
            piece = b"%x\r\n%b\r\n" % (len(PIECE), PIECE) if chunked else PIECE
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection, suppress(OSError):
                connection.sendall(head + length)
                for _ in range(SIZE // len(PIECE)):
                    if stop.is_set():
                        return
                    connection.sendall(piece)
                answers.append(connection.recv(4096).partition(b"\r\n")[0])

        idle = [connect() for _ in range(IDLE)]
        for _ in range(HALF):
            connect(head + b'Content-Length: 100\r\n\r\n{"model": ')
        slow = [connect(head + b"X: ") for _ in range(SLOW)]
        threads = [threading.Thread(target=trickle, args=(slow,))]
        threads += [threading.Thread(target=pour, args=(i % 2 == 0,)) for i in range(LARGE)]
        for thread in threads:
            thread.start()
        try:
            yield idle, answers
        finally:
            stop.set()
            for thread in threads:
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


def measure_latencies(server: Server, requests: int) -> list[float]:
    """Send requests one after the other and return how many seconds each took."""
    durations = []
    for _ in range(requests):
        began = time.monotonic()
        status, answer = server.post("/v1/completions", BODY)
        assert (status, answer["usage"]["completion_tokens"]) == (200, 8)
        durations.append(time.monotonic() - began)
    return durations


@pytest.mark.slow
def test_requests_of_others_go_on_in_a_crowd(server: Server) -> None:
    measure_latencies(server, 1)  # the first request is slower than the others
    before_mb = resident_mb(server.child.pid)
    with crowd(server.port) as (idle, answers):
        durations = measure_latencies(server, 1)
        peak_mb = 0.0
        assert sum(map(is_open, idle)) > IDLE // 2  # some time out if connecting all of them is slow
        while len(answers) < LARGE or len(durations) < 20:
            durations += measure_latencies(server, 1)
            peak_mb = max(peak_mb, resident_mb(server.child.pid))
            assert len(durations) < 2000, answers
    assert answers == [b"HTTP/1.1 413 Request Entity Too Large"] * LARGE
    assert max(durations) < 5
    assert peak_mb - before_mb < SIZE / 1e6
    assert server.get("/ready")[0] == 200
    assert "Traceback" not in (server.folder / "log.txt").read_text()
