"""Measure votes while attackers hold the server's connections: idle ones, half-sent bodies, and heartbeats.

    python benchmarks/annotation/siege.py [--seconds 30] [--save benchmarks/annotation/siege.json]

The server runs under a limit of 1,024 descriptors, soft and hard. The attackers run in a process of their own and open
a connection again after the server closes it. Idle connections and unfinished forms need no account; Gradio's
heartbeats need one. All connections come from the loopback interface, so the server cannot tell an attacker from an
annotator by the address.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import resource
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from crowd import (
    CrowdResult,
    create_accounts,
    create_store,
    find_free_port,
    percentile,
    run_crowd,
    run_server,
)

from align.annotate.store import Store

DESCRIPTORS = 1024
IDLE = 2000
BODIES = 400
HEARTBEATS = 1100
AGAIN_S = 5
"""Seconds between the end of an attacker's connection and its next: some 500 new ones a second."""


def idle(host: str, session: str) -> bytes:
    return b""


def body(host: str, session: str) -> bytes:
    """Return a log-in request without its last bytes."""
    form = "application/x-www-form-urlencoded"
    head = f"POST /login HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nContent-Type: {form}"
    return f"{head}\r\nContent-Length: 1000\r\n\r\nname=".encode()


def heartbeat(host: str, session: str) -> bytes:
    cookie = f"align_session_{host.rsplit(':', 1)[1]}={session}"
    return (
        f"GET /gradio_api/heartbeat/{os.urandom(8).hex()} HTTP/1.1\r\nHost: {host}\r\nCookie: {cookie}\r\n\r\n".encode()
    )


async def attack_forever(build_request: Any, host: str, session: str, again_s: float, counts: Counter[str]) -> None:
    """Open one connection at a time, until cancelled, and count connections by kind."""
    kind = build_request.__name__
    address, port = host.rsplit(":", 1)
    while True:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection(address, int(port))
            counts[kind] += 1
            counts[f"open {kind}"] += 1
            counts[f"most {kind}"] = max(counts[f"most {kind}"], counts[f"open {kind}"])
            try:
                writer.write(build_request(host, session))
                await writer.drain()
                while await reader.read(4096):
                    pass
            finally:
                counts[f"open {kind}"] -= 1
                writer.transport.abort()
        await asyncio.sleep(again_s)


def run_attackers(host: str, session: str, again_s: float, all_connected: Any, is_over: Any, results: Any) -> None:
    """Run all attackers until `is_over` is set. Sets `all_connected` once each has connected, and puts the counts of
    connections into the queue `results`."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    counts: Counter[str] = Counter()

    async def run_all() -> None:
        requests = [idle] * IDLE + [body] * BODIES + [heartbeat] * HEARTBEATS
        tasks = [asyncio.create_task(attack_forever(each, host, session, again_s, counts)) for each in requests]
        while not is_over.is_set():
            if counts["idle"] >= IDLE and counts["body"] >= BODIES and counts["heartbeat"] >= HEARTBEATS:
                all_connected.set()
            await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run_all())
    results.put(dict(counts))


@contextmanager
def attack(host: str, session: str, again_s: float) -> Iterator[dict[str, int]]:
    """Attack the server inside the block. After the block, the yielded mapping holds the counts of connections."""
    context = multiprocessing.get_context("spawn")
    all_connected = context.Event()
    is_over = context.Event()
    results = context.Queue()
    counts: dict[str, int] = {}
    arguments = (host, session, again_s, all_connected, is_over, results)
    attackers = context.Process(target=run_attackers, args=arguments, daemon=True)
    attackers.start()
    try:
        all_connected.wait(120)
        yield counts
    finally:
        is_over.set()
        with suppress(Exception):
            counts.update(results.get(timeout=30))
        attackers.join(30)
        attackers.kill()


def limit_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))


def count_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def measure_attack(
    root: Path,
    annotators: int,
    every_s: float,
    seconds: float,
    url: str = "",
    votes: int = 1_000_000,
    again_s: float = AGAIN_S,
) -> dict[str, Any]:
    """Measure votes without and with attackers.

    Args:
        seconds: the duration of each part, which ends earlier after so many `votes`.

    Raises:
        AssertionError: the server ended, or an acknowledged vote is missing or counts twice.
    """

    def is_enough(result: CrowdResult) -> bool:
        return len(result.acknowledged) >= votes

    url = url or f"sqlite:///{root / 'annotations.db'}"
    port = find_free_port()
    items = max(1000, min(2 * votes, round(4 * annotators * seconds / max(every_s, 0.1))))
    with create_store(url, items) as store:
        sessions = create_accounts(store, annotators + 1)
    attacker_session = sessions.pop(next(iter(sessions)))
    host = f"127.0.0.1:{port}"
    with run_server(root, port, f"store.url={url}", before=limit_descriptors) as server:
        peace = run_crowd(f"http://{host}", sessions, every_s, seconds, is_enough)
        with attack(host, attacker_session, again_s) as connection_counts:
            war = run_crowd(f"http://{host}", sessions, every_s, seconds, is_enough)
            descriptors_used = count_descriptors(server.pid)
            is_alive = server.poll() is None
    assert is_alive, "the server ended"
    with Store.open(url, create_if_missing=False) as store:
        store.verify()
        stored = [vote.seq for vote in store.rankings("crowd")]
    acknowledged = [seq for result in (peace, war) for seq, _ in result.acknowledged]
    assert set(acknowledged) == set(stored), "a vote was lost, or stored without an acknowledgement"
    assert len(acknowledged) == len(set(acknowledged)) == len(stored), "a vote counted twice"
    logs = sorted(root.glob("annotate/*/log.txt"))
    log = logs[-1].read_text() if logs else ""
    return {
        "annotators": annotators,
        "every_s": every_s,
        "descriptors": DESCRIPTORS,
        "descriptors_used": descriptors_used,
        "besiegers": {"idle": IDLE, "body": BODIES, "heartbeat": HEARTBEATS},
        "siege": connection_counts,
        "peace": summarize(peace),
        "war": summarize(war),
        "log_lines": len(log.splitlines()),
        "log": log,
    }


def summarize(result: CrowdResult) -> dict[str, Any]:
    seconds = result.seconds or [0]
    percentiles = {f"p{share}_ms": round(1000 * percentile(seconds, share / 100), 1) for share in (50, 95, 99)}
    return {
        "votes": len(result.acknowledged),
        "tries": result.tries,
        "refused": result.refused[:5],
        **percentiles,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="without attackers, and with them")
    parser.add_argument("--annotators", type=int, default=20)
    parser.add_argument("--every", type=float, default=2, help="seconds between two votes of an annotator")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as root:
        results = measure_attack(Path(root), options.annotators, options.every, options.seconds)
    log = results.pop("log")
    results = {"machine": f"{os.cpu_count()} cores, {platform.machine()}", **results}
    print(json.dumps(results, indent=2), log, sep="\n")
    if options.save:
        options.save.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
