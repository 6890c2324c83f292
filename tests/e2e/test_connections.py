"""Connections that keep the server waiting are closed, and others go on. The server survives a full table of
descriptors."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from waiting import becomes_true

from align.web import server as connections
from align.web.server import MAX_CONNECTIONS, Connections, Server, open_listener, raise_connection_limit

WAIT_S = 0.4
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
LARGE = 50_000_000


async def app(scope, receive, send):
    """Read the body and answer: `/work` after a second, `/large` with more than a socket holds, other paths at once."""
    if scope["type"] != "http":
        return
    while (message := await receive())["type"] == "http.request" and message["more_body"]:
        pass
    if message["type"] == "http.disconnect":
        return
    if scope["path"] == "/work":
        await asyncio.sleep(1)
    body = b"x" * (LARGE if scope["path"] == "/large" else 2)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def short(monkeypatch):
    for name in ("HEAD_S", "BODY_S", "ANSWER_S"):
        monkeypatch.setattr(connections, name, WAIT_S)


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[int, Server]]]:
    running = []

    def start(most: int = 100, trusted: tuple[str, ...] = ("127.0.0.1",)) -> tuple[int, Server]:
        listener = open_listener("127.0.0.1", 0)
        server = Server(app, "127.0.0.1", listener.getsockname()[1])
        server.connections.limit = most
        server.connections.is_proxy = trusted.__contains__
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        running.append((server, thread, listener))
        while not server.started:
            time.sleep(0.01)
        return listener.getsockname()[1], server

    yield start
    for server, thread, listener in running:
        server.should_exit = True
        thread.join(20)
        listener.close()


@contextmanager
def connect(port: int, data: bytes = b"", source: str = "127.0.0.1") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=10, source_address=(source, 0)) as connection:
        connection.sendall(data)
        yield connection


def count_pending(server: Server) -> int:
    """Return the number of requests that have been read completely and are not answered yet."""
    return sum(
        connection.scope is not None and not connection.is_stalled for connection in list(server.connections.open)
    )


def is_answering(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def ends_within(connection: socket.socket, seconds: float, trickle: bytes = b"") -> bool:
    """Return whether the server ends a connection, even if a byte comes now and then."""
    connection.settimeout(0.05)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if trickle:
                connection.sendall(trickle[:1])
            if connection.recv(65536) == b"":
                return True
        except TimeoutError:
            pass
        except OSError as error:
            return error.errno in (errno.ECONNRESET, errno.EPIPE)
    return False


FORM = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"


@pytest.mark.parametrize(
    ("said", "trickle"),
    [
        (b"", b""),
        (b"G", b""),
        (b"", b"x"),
        (b"GET / HTTP/1.1\r\nX: ", b"x"),
        (FORM, b""),
        (FORM, b"x"),
        (GET, b"x"),
        (GET + GET, b"x"),
        (FORM + b"x" * 100_000, b"x"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b""),
    ],
)
def test_what_a_client_owes_has_a_deadline_that_further_bytes_do_not_put_off(serve, short, said, trickle):
    port, _ = serve()
    with connect(port, said) as connection:
        assert ends_within(connection, 4 * WAIT_S, trickle)
    assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200


def test_an_answer_that_nobody_takes_in_ends_and_one_that_is_slow_to_come_does_not(serve, short):
    port, server = serve()
    with connect(port, b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n"):
        deadline = time.monotonic() + 10
        while not server.connections.open and time.monotonic() < deadline:
            time.sleep(0.01)
        while server.connections.open and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.connections.open == set()
    assert httpx.get(f"http://127.0.0.1:{port}/work").status_code == 200  # longer than any deadline


def test_an_answer_that_is_taken_in_slowly_arrives(serve, monkeypatch):
    monkeypatch.setattr(connections, "ANSWER_S", 1.0)
    port, _ = serve()
    began = time.monotonic()
    received = 0
    with connect(port, b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n") as slow:
        while received < LARGE and (chunk := slow.recv(1_000_000)):
            received += len(chunk)
            time.sleep(0.04)
    assert received >= LARGE
    assert time.monotonic() - began > 1.5  # longer than it has for a part


def test_who_waits_longest_makes_room_and_who_is_answered_does_not(serve):
    port, server = serve(most=20)
    with connect(port, b"GET /work HTTP/1.1\r\nHost: x\r\n\r\n") as working:
        assert becomes_true(lambda: count_pending(server) == 1)
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
        assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
        assert len(server.connections.open) <= 20
        assert ends_within(idle[0], 2)
        working.settimeout(10)
        assert working.recv(4096).startswith(b"HTTP/1.1 200")
        for connection in idle:
            connection.close()


def test_where_all_are_being_answered_a_newcomer_is_sent_away(serve):
    port, server = serve(most=5)
    working = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
    for connection in working:
        connection.sendall(b"GET /work HTTP/1.1\r\nHost: x\r\n\r\n")
    assert becomes_true(lambda: count_pending(server) == 5)
    with connect(port) as late:
        assert ends_within(late, 0.5)
    for connection in working:
        connection.settimeout(10)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.close()


def test_one_address_holds_half_of_the_places_and_a_trusted_proxy_all(serve):
    port, server = serve(most=40)
    same_address = [socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0)) for _ in range(60)]
    with connect(port, GET, source="127.0.0.3") as other_address:
        other_address.settimeout(5)
        assert other_address.recv(4096).startswith(b"HTTP/1.1 200")
        assert server.connections._peers["127.0.0.2"] <= 20
        from_proxy = [socket.create_connection(("127.0.0.1", port)) for _ in range(15)]
        assert becomes_true(lambda: server.connections._peers["127.0.0.1"] == 15)
    for connection in same_address + from_proxy:
        connection.close()


def test_behind_a_proxy_the_client_that_holds_most_makes_room(serve):
    port, server = serve(most=20)

    def connect_through_proxy(address: str) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(FORM.replace(b"Host", f"X-Forwarded-For: {address}\r\nHost".encode()))
        return connection

    honest = connect_through_proxy("10.0.0.1")  # the oldest of all
    assert becomes_true(lambda: [connection.address for connection in list(server.connections.open)] == ["10.0.0.1"])
    greedy = [connect_through_proxy("10.0.0.2") for _ in range(40)]
    last_address = greedy[-1].getsockname()
    assert becomes_true(lambda: last_address in [connection.client for connection in list(server.connections.open)])
    honest.sendall(b"x" * 100_000)
    honest.settimeout(5)
    assert honest.recv(4096).startswith(b"HTTP/1.1 200")
    for connection in [honest, *greedy]:
        connection.close()


def test_what_befalls_a_thousand_connections_is_one_line(caplog):
    now = [0.0]
    connection_table = Connections(10, lambda address: True, clock=lambda: now[0])
    with caplog.at_level(logging.WARNING), suppress(RuntimeError):
        for _ in range(1000):
            connection_table.warn("it is full")
        connection_table.warn("something else")
        now[0] += connections.WARN_EVERY_S + 1
        connection_table.warn("it is full")
    assert [record.getMessage() for record in caplog.records] == [
        "it is full (1 times since this was last said)",
        "something else (1 times since this was last said)",
        "it is full (1000 times since this was last said)",
    ]


FULL = """
import logging, os, resource, sys, threading, time
sys.path[:0] = sys.argv[2:]
from test_connections import app
from align.web.server import Server, open_listener, raise_connection_limit

logging.basicConfig(filename=sys.argv[1], force=True)
listener = open_listener("127.0.0.1", 0)
server = Server(app, "127.0.0.1", listener.getsockname()[1])
server.connections.limit = 10_000  # more than there are descriptors for: somebody else took them
threading.Thread(target=server.run, args=([listener],), daemon=True).start()
while not server.started:
    time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))
taken = []
print(listener.getsockname()[1], flush=True)
for line in sys.stdin:
    if line == "take\\n":
        try:
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
    else:
        while taken:
            os.close(taken.pop())
    print("done", flush=True)
"""


@pytest.mark.parametrize("by", ["connections", "somebody else"])
def test_a_full_table_of_descriptors_is_survived_and_said_once(tmp_path: Path, by: str):
    test_path = Path(__file__).resolve()
    command = [sys.executable, "-c", FULL, str(tmp_path / "log"), *map(str, test_path.parents[:3])]
    program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert program.stdin is not None
    assert program.stdout is not None
    try:
        port = int(program.stdout.readline())
        if by == "somebody else":
            program.stdin.write("take\n")
            program.stdin.flush()
            program.stdout.readline()
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
        assert becomes_true(lambda: "descriptor" in (tmp_path / "log").read_text() or program.poll() is not None)
        time.sleep(2.5)  # the loop tries again every second, and logs nothing more
        assert program.poll() is None
        program.stdin.write("give\n")
        program.stdin.flush()
        program.stdout.readline()
        for connection in idle:
            connection.close()
        assert becomes_true(lambda: is_answering(port))
    finally:
        program.kill()
        program.communicate()
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if "descriptor" in line]
    assert len(lines) == 1
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_there_are_fewer_places_than_descriptors_and_the_soft_limit_is_raised():
    program = (
        "import resource, sys; from align.web.server import raise_connection_limit;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])));"
        "print(raise_connection_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    for soft, hard, expected in ((256, 1024, 704), (1024, 1024, 704), (128, 128, 32), (1024, 20_000, MAX_CONNECTIONS)):
        process = subprocess.run([sys.executable, "-c", program, str(soft), str(hard)], capture_output=True, text=True)
        assert process.stdout.split() == [str(expected), str(hard), str(hard)], process.stderr
    assert raise_connection_limit() > 0
