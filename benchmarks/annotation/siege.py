"""Annotators vote while the server is besieged: idle connections, half-sent bodies, and heartbeats.

    python benchmarks/annotation/siege.py [--seconds 30] [--save benchmarks/annotation/siege.json]

The server runs under a limit of 1,024 descriptors, soft and hard. The besiegers are a process of their own, and open
again what the server closes: connections that say nothing, forms of which the last byte never
comes (as a stranger can send them), and Gradio's heartbeats (as somebody with an account can). Each connection is one
of the loopback interface, so that no address tells a besieger from an annotator.
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

from crowd import Seen, crowd, filled, free_port, hired, percentile, serving

from align.annotate.store import Store

DESCRIPTORS = 1024
IDLE, BODIES, HEARTBEATS = 2000, 400, 1100
AGAIN_S = 5
"""Seconds between the end of a besieger's connection and its next: some 500 new ones a second."""


def idle(host: str, session: str) -> bytes:
    return b""


def body(host: str, session: str) -> bytes:
    """A log-in of which the last bytes never come."""
    form = "application/x-www-form-urlencoded"
    head = f"POST /login HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nContent-Type: {form}"
    return f"{head}\r\nContent-Length: 1000\r\n\r\nname=".encode()


def heartbeat(host: str, session: str) -> bytes:
    cookie = f"align_session_{host.rsplit(':', 1)[1]}={session}"
    return (
        f"GET /gradio_api/heartbeat/{os.urandom(8).hex()} HTTP/1.1\r\nHost: {host}\r\nCookie: {cookie}\r\n\r\n".encode()
    )


async def besieger(what: Any, host: str, session: str, again_s: float, seen: Counter[str]) -> None:
    """One connection at a time, for ever."""
    name, (address, port) = what.__name__, host.rsplit(":", 1)
    while True:
        with suppress(OSError):
            reader, writer = await asyncio.open_connection(address, int(port))
            seen[name] += 1
            seen[f"open {name}"] += 1
            seen[f"most {name}"] = max(seen[f"most {name}"], seen[f"open {name}"])
            try:
                writer.write(what(host, session))
                await writer.drain()
                while await reader.read(4096):
                    pass
            finally:
                seen[f"open {name}"] -= 1
                writer.transport.abort()
        await asyncio.sleep(again_s)


def besiege(host: str, session: str, again_s: float, there: Any, over: Any, found: Any) -> None:
    """The whole siege, in a process of its own, until `over` is set: sets `there` once each has come, and puts what it
    saw into the queue `found`."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    seen: Counter[str] = Counter()

    async def all_of_them() -> None:
        kinds = [idle] * IDLE + [body] * BODIES + [heartbeat] * HEARTBEATS
        tasks = [asyncio.create_task(besieger(kind, host, session, again_s, seen)) for kind in kinds]
        while not over.is_set():
            if seen["idle"] >= IDLE and seen["body"] >= BODIES and seen["heartbeat"] >= HEARTBEATS:
                there.set()
            await asyncio.sleep(0.2)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(all_of_them())
    found.put(dict(seen))


@contextmanager
def besieged(host: str, session: str, again_s: float) -> Iterator[dict[str, int]]:
    """A siege of the server for as long as the block lasts; what it saw is in the mapping afterwards."""
    context = multiprocessing.get_context("spawn")
    there, over, found, seen = context.Event(), context.Event(), context.Queue(), {}
    besiegers = context.Process(target=besiege, args=(host, session, again_s, there, over, found), daemon=True)
    besiegers.start()
    try:
        there.wait(120)
        yield seen
    finally:
        over.set()
        with suppress(Exception):
            seen.update(found.get(timeout=30))
        besiegers.join(30)
        besiegers.kill()


def limited() -> None:
    """In the server's process, before it begins."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def measured(
    root: Path, annotators: int, every_s: float, seconds: float, url: str = "", votes: int = 1_000_000,
    again_s: float = AGAIN_S,
) -> dict[str, Any]:  # fmt: skip
    """How long votes take in peace and under siege; raises where an acknowledged vote is missing or counts twice.

    Args:
        seconds: of each, or less where there are so many `votes` before.
    """

    def enough(seen: Seen) -> bool:
        return len(seen.acknowledged) >= votes

    url, port = url or f"sqlite:///{root / 'annotations.db'}", free_port()
    with filled(url, max(1000, min(2 * votes, round(4 * annotators * seconds / max(every_s, 0.1))))) as store:
        people = hired(store, annotators + 1)
    (_, session), *others = people.items()  # one of them besieges, too
    host, names = f"127.0.0.1:{port}", dict(others)
    with serving(root, port, f"store.url={url}", before=limited) as server:
        peace = crowd(f"http://{host}", names, every_s, seconds, enough)
        with besieged(host, session, again_s) as siege:
            war = crowd(f"http://{host}", names, every_s, seconds, enough)
            most, alive = descriptors(server.pid), server.poll() is None
    assert alive, "the server ended"
    with Store.open(url, create=False) as store:
        store.verify()
        kept = Counter(vote.seq for vote in store.rankings("crowd"))
    acknowledged = [seq for seen in (peace, war) for seq, _ in seen.acknowledged]
    assert set(acknowledged) == set(kept), "a vote was lost, or taken that nobody was told of"
    assert len(acknowledged) == len(set(acknowledged)) == len(kept), "a vote counted twice"
    log = sorted(root.glob("annotate/*/log.txt"))[-1].read_text() if list(root.glob("annotate/*/log.txt")) else ""
    return {
        "annotators": annotators, "every_s": every_s, "descriptors": DESCRIPTORS, "descriptors_used": most,
        "besiegers": {"idle": IDLE, "body": BODIES, "heartbeat": HEARTBEATS}, "siege": siege,
        "peace": told(peace), "war": told(war), "log_lines": len(log.splitlines()), "log": log,
    }  # fmt: skip


def told(seen: Seen) -> dict[str, Any]:
    figures = {f"p{share}_ms": round(1000 * percentile(seen.seconds or [0], share / 100), 1) for share in (50, 95, 99)}
    return {"votes": len(seen.acknowledged), "tries": seen.tries, "refused": seen.refused[:5], **figures}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="of peace, and of siege")
    parser.add_argument("--annotators", type=int, default=20)
    parser.add_argument("--every", type=float, default=2, help="seconds between two votes of each")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as root:
        found = measured(Path(root), given.annotators, given.every, given.seconds)
    log = found.pop("log")
    found = {"machine": f"{os.cpu_count()} cores, {platform.machine()}", **found}
    print(json.dumps(found, indent=2), log, sep="\n")
    if given.save:
        given.save.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
