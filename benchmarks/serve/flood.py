"""Tenants of a server beside one that floods it: what they wait, with the flood and without.

    python benchmarks/serve/flood.py [--models pocket] [--clients 32] [--flood 256] [--rounds 5] [--seconds 12]

Eight tenants share the clients, each of whom asks anew as soon as it was answered. One request in ten is left by its
client on the way, and an administrator loads or unloads an adapter every second. Then the same beside a ninth tenant on
`--flood` connections, which asks anew at once whatever it is told: without limits, and with `stage.concurrency=4`. The
answers are streamed. Requests of the first seconds, when all come at once, are not counted. The server runs on the
first core where the system can pin one, all clients on the second.

Own clients and not locust's: a client of Python's own asyncio takes less of the core that all of them share, and what a
streamed answer took would have to be measured by hand there too.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from clients import Asked, requests
from common import Record, bases, linear_shapes, median, options, quantile, random_adapter, table
from over_http import ADAPTERS, our_server, pin, says_its_base

from align.run import Base
from align.serve.tenants import change_tenant

HERE = Path(__file__).resolve().parent
TENANTS, LEAVE, LATEST, HOT_S, BEFORE_S, BAR = 8, 0.1, 10, 1.0, 4.0, 2.0
"""Tenants who do not flood; the share of requests that are left, after so many events at the latest; how often an
adapter is loaded or unloaded, in seconds; how many seconds after the first requests they are counted; how many times as
long the others may wait beside a flood."""
FLOODS = {"no flood": None, "a flood": "flood", "a flood of 4 at once": "limited"}
"""Case → the tenant that floods."""


class Seen(NamedTuple):
    """Attributes:
    answers: by HTTP status; 0 of a connection that was ended.
    ttft_s, whole_s: of each request that came so far.
    """

    answers: Counter[int]
    ttft_s: list[float]
    whole_s: list[float]


class Connection:
    """One connection of HTTP/1.1, which is kept: libraries would take the core that the clients share."""

    def __init__(self, port: int, key: str) -> None:
        self.port, self.key = port, key
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[int | bytes]:
        """The status, then each line of the body."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self._streams
        sent = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nAuthorization: Bearer {self.key}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n".encode() + sent)
        status, *headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        yield int(status.split()[1])
        length = next((int(h.split()[1]) for h in headers if h.startswith("content-length:")), None)
        if length is not None:
            yield await reader.readexactly(length)
            return
        while size := int(await reader.readline(), 16):
            for line in (await reader.readexactly(size + 2)).splitlines():
                yield line
        await reader.readline()

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


class Crowd(NamedTuple):
    """All who ask one server.

    Attributes:
        keys: of each tenant.
        start, until: when requests begin to count, and when nobody asks any more, by `perf_counter`.
    """

    port: int
    keys: Mapping[str, str]
    start: float
    until: float

    async def client(self, tenant: str, asked: Iterator[Asked], draw: random.Random | None, seen: Seen) -> None:
        """Asks until the end.

        Args:
            draw: of whether it leaves; None of the flood, which never leaves and asks until it is cancelled.
        """
        connection = Connection(self.port, self.keys[tenant])
        try:
            for each in asked:
                if draw is not None and time.perf_counter() > self.until:
                    break
                leaves = draw.randrange(LATEST) if draw is not None and draw.random() < LEAVE else None
                try:
                    await self._ask(connection, each, leaves, seen)
                except (OSError, asyncio.IncompleteReadError):
                    seen.answers[0] += 1
                    connection.close()
        finally:
            connection.close()

    async def _ask(self, connection: Connection, asked: Asked, leaves: int | None, seen: Seen) -> None:
        body = {
            "model": f"a{asked.adapter}", "prompt": list(asked.ids), "max_tokens": asked.new, "seed": asked.seed,
            "stream": True, "ignore_eos": True,
        }  # fmt: skip
        began, events = time.perf_counter(), 0
        seen = seen if began > self.start else Seen(seen.answers, [], [])
        async for told in connection.post("/v1/completions", body):
            if isinstance(told, int):
                seen.answers[told] += 1
            elif told.startswith(b"data: {"):
                events += 1
                if events == 1:
                    seen.ttft_s.append(time.perf_counter() - began)
                if b'"error"' in told:
                    raise RuntimeError(told.decode())
            elif told == b"data: [DONE]":
                seen.whole_s.append(time.perf_counter() - began)
            if leaves is not None and events >= leaves:
                connection.close()
                return

    async def administrator(self, folder: Path) -> int:
        """Loads or unloads an adapter every second; how often."""
        connection, done = Connection(self.port, self.keys["admin"]), 0
        while time.perf_counter() < self.until or done % 2:
            action, more = ("unload", {}) if done % 2 else ("load", {"lora_path": str(folder)})
            told = [each async for each in connection.post(f"/v1/{action}_lora_adapter", {"lora_name": "hot", **more})]
            if told[0] != 200:
                raise RuntimeError(str(told))
            done += 1
            await asyncio.sleep(HOT_S)
        connection.close()
        return done


async def crowded(
    port: int, keys: Mapping[str, str], hot: Path, flooding: str | None, seed: int, given: Any
) -> dict[str, float]:
    """What the tenants saw in one case of one round."""
    start = time.perf_counter() + BEFORE_S
    crowd = Crowd(port, keys, start, start + given.seconds)
    seen, theirs = (Seen(Counter(), [], []) for _ in range(2))
    every = tuple(range(ADAPTERS))
    others = [
        crowd.client(f"t{i % TENANTS}", requests(every, 1000 * seed + i), random.Random(seed * 1000 + i), seen)
        for i in range(given.clients)
    ]
    connections = range(given.flood if flooding else 0)
    flood = [
        asyncio.create_task(crowd.client(str(flooding), requests(every, 10**6 + i), None, theirs)) for i in connections
    ]
    *_, loads = await asyncio.gather(*others, crowd.administrator(hot))
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)
    if set(seen.answers) != {200}:
        raise RuntimeError(f"the others were answered {dict(seen.answers)}")
    ttft, whole = ([1e3 * each for each in of] for of in (seen.ttft_s, seen.whole_s))
    return {
        "ttft_p50_ms": quantile(ttft, 0.5), "ttft_p95_ms": quantile(ttft, 0.95), "whole_p50_ms": quantile(whole, 0.5),
        "whole_p95_ms": quantile(whole, 0.95), "answers": len(whole), "loads": loads,
        "flood_answers": theirs.answers[200], "flood_refused": theirs.answers[429],
    }  # fmt: skip


def measured(base: Base, name: str, given: Any) -> dict[str, dict[str, float]]:
    """Figures by case: the median of the rounds. Ratios are to the same round without a flood."""
    dtype = torch.float32 if name == "pocket" else torch.bfloat16
    found: dict[str, list[dict[str, float]]] = {case: [] for case in FLOODS}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hot = random_adapter(base, linear_shapes(base), ADAPTERS, 16, work / "hot")
        says_its_base(hot, base)
        keys = tenants(work / "keys.json")
        words = [f"stage.keys={work / 'keys.json'}", f"stage.roots=[{work / 'hot'}]"]
        kind = str(dtype).removeprefix("torch.")
        server = stack.enter_context(our_server(base, kind, given.slots, given.threads, work, *words))
        pin(0, 1)
        for number in range(-1, given.rounds):  # the first warms up
            for case, flooding in FLOODS.items():
                figures = asyncio.run(crowded(server.port, keys, hot, flooding, number + 1, given))
                print(f"round {number}, {case}: {json.dumps({k: round(v) for k, v in figures.items()})}", flush=True)
                if number >= 0:
                    found[case].append(figures)
                    plain = found["no flood"][number]
                    for key in ("ttft_p95", "whole_p95"):
                        figures[f"{key}_ratio"] = figures[f"{key}_ms"] / plain[f"{key}_ms"]
    return {case: {key: median([one[key] for one in each]) for key in each[0]} for case, each in found.items()}


def tenants(file: Path) -> dict[str, str]:
    """The key of each tenant of a new key file."""
    rights = {f"t{i}": (False, {}) for i in range(TENANTS)}
    rights |= {"flood": (False, {}), "limited": (False, {"concurrency": 4}), "admin": (True, {})}
    keys = {}
    for tenant, (admin, limits) in rights.items():
        made = change_tenant(file, tenant, admin=admin, allow=None, limits=limits, lift=(), revoke=None)
        keys[tenant] = str(made.key)
    return keys


def format_table(found: Mapping[str, Any]) -> str:
    rows = []
    for name, cases in found["rows"].items():
        for case, figures in cases.items():
            first, whole = (
                f"{figures[f'{key}_ms']:.0f}"
                + ("" if case == "no flood" else f": {figures[f'{key}_ratio']:.2f} (≤ {BAR:g})")
                for key in ("ttft_p95", "whole_p95")
            )
            medians = [f"{figures['ttft_p50_ms']:.0f}", first, f"{figures['whole_p50_ms']:.0f}", whole]
            theirs = [f"{figures[key]:.0f}" for key in ("answers", "flood_answers", "flood_refused")]
            rows.append([name, case, *medians, *theirs])
    columns = ["", "", "TTFT p50, ms", "p95", "answer p50, ms", "p95", "answers", "begun of the flood", "refused of it"]
    return table(columns, rows)


def main() -> int:
    parser = options(__doc__, 5, HERE / "flood.json")
    parser.set_defaults(models="pocket")
    parser.add_argument("--clients", type=int, default=32, help="of the tenants who do not flood")
    parser.add_argument("--flood", type=int, default=256, help="connections of the one who does")
    parser.add_argument("--slots", type=int, default=32, help="stage.slots")
    parser.add_argument("--seconds", type=float, default=12.0, help="of one case in one round")
    given = parser.parse_args()
    record = Record(given)
    for name, base in bases(given.models).items():
        record.add(Path(name).name, measured(base, name, given))
    print("\n" + format_table(record.found))
    return 0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
