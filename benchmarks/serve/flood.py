"""Measure how long tenants of a server wait, with and without another tenant that floods it with requests.

    python benchmarks/serve/flood.py [--models pocket] [--clients 32] [--flood 256] [--rounds 5] [--seconds 12]

Eight tenants share the clients, and each client sends its next request as soon as it has an answer. One request in ten
is abandoned by its client, and an administrator loads or unloads an adapter every second. Then the same with a ninth
tenant on `--flood` connections, which sends its next request at once even if one was refused: without limits, and with
`stage.concurrency=4`. The answers are streamed. Requests of the first seconds, when all arrive at once, are not
counted. The server runs on the first core if processes can be pinned, all clients on the second.

The clients are our own and not locust's: a client of Python's asyncio takes less of the core that all of them share,
and the times of streamed answers would have to be measured by hand there too.
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
from clients import ClientRequest, generate_requests
from common import (
    BenchmarkRecord,
    create_parser,
    create_random_adapter,
    find_bases,
    find_linear_shapes,
    format_rows,
    quantile,
    round_median,
)
from over_http import ADAPTERS, pin_to_core, run_server, write_base_metadata

from align.run import Base
from align.serve.tenants import change_tenant

HERE = Path(__file__).resolve().parent
TENANTS = 8
"""Number of tenants besides the one that floods."""
ABANDONED_SHARE = 0.1
"""Share of the requests that their clients abandon."""
ABANDONED_BEFORE = 10
"""An abandoned request is closed before this many events."""
ADMIN_INTERVAL_S = 1.0
"""Seconds between two loads or unloads of an adapter."""
WARM_UP_S = 4.0
"""Seconds after the first requests until requests are counted."""
RATIO_BAR = 2.0
"""Largest ratio of a tenant's wait with a flood to its wait without one."""
FLOODS = {"no flood": None, "a flood": "flood", "a flood of 4 at once": "limited"}
"""Case → the tenant that floods."""


class Measurements(NamedTuple):
    """Measurements of a group of clients.

    Attributes:
        answers: responses by HTTP status; 0 for a closed connection.
        ttft_s: seconds to the first token.
        whole_s: seconds to the end of the answer, for finished requests.
    """

    answers: Counter[int]
    ttft_s: list[float]
    whole_s: list[float]


class Connection:
    """A kept-alive connection of HTTP/1.1, written by hand because libraries take more of the clients' shared core."""

    def __init__(self, port: int, key: str) -> None:
        self.port = port
        self.key = key
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[int | bytes]:
        """Yield the status, then each line of the response's body."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self._streams
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nAuthorization: Bearer {self.key}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
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
    """All clients of one server.

    Attributes:
        keys: API key of each tenant.
        start: the time from which requests are counted, by `time.perf_counter`.
        end: the time at which clients stop sending requests.
    """

    port: int
    keys: Mapping[str, str]
    start: float
    end: float

    async def run_client(
        self, tenant: str, requests: Iterator[ClientRequest], draw: random.Random | None, measurements: Measurements
    ) -> None:
        """Send one request after another until the end.

        Args:
            draw: decides which requests are abandoned. None for a client of the flood, which abandons no request and
                runs until it is cancelled.
        """
        connection = Connection(self.port, self.keys[tenant])
        try:
            for request in requests:
                if draw is not None and time.perf_counter() > self.end:
                    break
                max_events = draw.randrange(ABANDONED_BEFORE) if draw and draw.random() < ABANDONED_SHARE else None
                try:
                    await self._send(connection, request, max_events, measurements)
                except (OSError, asyncio.IncompleteReadError):
                    measurements.answers[0] += 1
                    connection.close()
        finally:
            connection.close()

    async def _send(
        self, connection: Connection, request: ClientRequest, max_events: int | None, measurements: Measurements
    ) -> None:
        """Send a request and measure its answer. After `max_events` events, close the connection."""
        body = {
            "model": f"a{request.adapter}",
            "prompt": list(request.prompt_ids),
            "max_tokens": request.max_new_tokens,
            "seed": request.seed,
            "stream": True,
            "ignore_eos": True,
        }
        sent_at = time.perf_counter()
        if sent_at <= self.start:  # count the answer, but not its times
            measurements = Measurements(measurements.answers, [], [])
        events = 0
        async for line in connection.post("/v1/completions", body):
            if isinstance(line, int):
                measurements.answers[line] += 1
            elif line.startswith(b"data: {"):
                events += 1
                if events == 1:
                    measurements.ttft_s.append(time.perf_counter() - sent_at)
                if b'"error"' in line:
                    raise RuntimeError(line.decode())
            elif line == b"data: [DONE]":
                measurements.whole_s.append(time.perf_counter() - sent_at)
            if max_events is not None and events >= max_events:
                connection.close()
                return

    async def run_administrator(self, folder: Path) -> int:
        """Load or unload an adapter every second. Returns the number of both together."""
        connection = Connection(self.port, self.keys["admin"])
        changes = 0
        while time.perf_counter() < self.end or changes % 2:
            if changes % 2:
                action = "unload"
                body = {"lora_name": "hot"}
            else:
                action = "load"
                body = {"lora_name": "hot", "lora_path": str(folder)}
            response = [line async for line in connection.post(f"/v1/{action}_lora_adapter", body)]
            if response[0] != 200:
                raise RuntimeError(str(response))
            changes += 1
            await asyncio.sleep(ADMIN_INTERVAL_S)
        connection.close()
        return changes


async def measure_crowd(
    port: int, keys: Mapping[str, str], hot_adapter: Path, flooding_tenant: str | None, seed: int, options: Any
) -> dict[str, float]:
    """Return the figures of one case in one round. `hot_adapter` is the folder that the administrator loads."""
    start = time.perf_counter() + WARM_UP_S
    crowd = Crowd(port, keys, start, start + options.seconds)
    measurements = Measurements(Counter(), [], [])
    flood_measurements = Measurements(Counter(), [], [])
    adapters = tuple(range(ADAPTERS))
    clients = [
        crowd.run_client(
            f"t{i % TENANTS}",
            generate_requests(adapters, 1000 * seed + i),
            random.Random(seed * 1000 + i),
            measurements,
        )
        for i in range(options.clients)
    ]
    flood = [
        asyncio.create_task(
            crowd.run_client(str(flooding_tenant), generate_requests(adapters, 10**6 + i), None, flood_measurements)
        )
        for i in range(options.flood if flooding_tenant else 0)
    ]
    *_, loads = await asyncio.gather(*clients, crowd.run_administrator(hot_adapter))
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)
    if set(measurements.answers) != {200}:
        raise RuntimeError(f"the tenants that do not flood received {dict(measurements.answers)}")
    ttft_ms = [1e3 * seconds for seconds in measurements.ttft_s]
    whole_ms = [1e3 * seconds for seconds in measurements.whole_s]
    return {
        "ttft_p50_ms": quantile(ttft_ms, 0.5),
        "ttft_p95_ms": quantile(ttft_ms, 0.95),
        "whole_p50_ms": quantile(whole_ms, 0.5),
        "whole_p95_ms": quantile(whole_ms, 0.95),
        "answers": len(whole_ms),
        "loads": loads,
        "flood_answers": flood_measurements.answers[200],
        "flood_refused": flood_measurements.answers[429],
    }


def measure_floods(base: Base, name: str, options: Any) -> dict[str, dict[str, float]]:
    """Return the median of the rounds by case. Ratios are to the same round without a flood."""
    dtype = torch.float32 if name == "pocket" else torch.bfloat16
    samples: dict[str, list[dict[str, float]]] = {case: [] for case in FLOODS}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hot_adapter = create_random_adapter(base, find_linear_shapes(base), ADAPTERS, 16, work / "hot")
        write_base_metadata(hot_adapter, base)
        keys = create_tenants(work / "keys.json")
        arguments = [f"stage.keys={work / 'keys.json'}", f"stage.roots=[{work / 'hot'}]"]
        dtype_name = str(dtype).removeprefix("torch.")
        server = stack.enter_context(run_server(base, dtype_name, options.slots, options.threads, work, *arguments))
        pin_to_core(0, 1)
        for number in range(-1, options.rounds):  # round -1 warms up
            for case, flooding_tenant in FLOODS.items():
                crowd = measure_crowd(server.port, keys, hot_adapter, flooding_tenant, number + 1, options)
                figures = asyncio.run(crowd)
                print(f"round {number}, {case}: {json.dumps({k: round(v) for k, v in figures.items()})}", flush=True)
                if number >= 0:
                    samples[case].append(figures)
                    baseline = samples["no flood"][number]
                    for key in ("ttft_p95", "whole_p95"):
                        figures[f"{key}_ratio"] = figures[f"{key}_ms"] / baseline[f"{key}_ms"]
    return {
        case: {key: round_median([figures[key] for figures in rounds]) for key in rounds[0]}
        for case, rounds in samples.items()
    }


def create_tenants(key_file: Path) -> dict[str, str]:
    """Write a new key file, and return the key of each tenant."""
    rights = {f"t{i}": (False, {}) for i in range(TENANTS)}
    rights |= {"flood": (False, {}), "limited": (False, {"concurrency": 4}), "admin": (True, {})}
    keys = {}
    for tenant, (admin, limits) in rights.items():
        change = change_tenant(key_file, tenant, admin=admin, allow=None, limits=limits, lift=(), revoke=None)
        keys[tenant] = str(change.key)
    return keys


def format_table(results: Mapping[str, Any]) -> str:
    """Return the results as the Markdown table of README.md."""
    rows = []
    for name, cases in results["rows"].items():
        for case, figures in cases.items():
            ttft_p95, whole_p95 = (
                f"{figures[f'{key}_ms']:.0f}"
                + ("" if case == "no flood" else f": {figures[f'{key}_ratio']:.2f} (≤ {RATIO_BAR:g})")
                for key in ("ttft_p95", "whole_p95")
            )
            times = [f"{figures['ttft_p50_ms']:.0f}", ttft_p95, f"{figures['whole_p50_ms']:.0f}", whole_p95]
            counts = [f"{figures[key]:.0f}" for key in ("answers", "flood_answers", "flood_refused")]
            rows.append([name, case, *times, *counts])
    columns = ["", "", "TTFT p50, ms", "p95", "answer p50, ms", "p95", "answers", "begun of the flood", "refused of it"]
    return format_rows(columns, rows)


def main() -> int:
    parser = create_parser(__doc__, 5, HERE / "flood.json")
    parser.set_defaults(models="pocket")
    parser.add_argument("--clients", type=int, default=32, help="clients of the tenants that do not flood")
    parser.add_argument("--flood", type=int, default=256, help="connections of the tenant that floods")
    parser.add_argument("--slots", type=int, default=32, help="stage.slots")
    parser.add_argument("--seconds", type=float, default=12.0, help="duration of one case in one round")
    options = parser.parse_args()
    record = BenchmarkRecord(options)
    for name, base in find_bases(options.models).items():
        record.add(Path(name).name, measure_floods(base, name, options))
    print("\n" + format_table(record.results))
    return 0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
