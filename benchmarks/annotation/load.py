"""Measure how long annotators wait for the next item, with the server of `stage=annotate` and a crowd on one machine.

    python benchmarks/annotation/load.py [--seconds 60] [--save benchmarks/annotation/load.json]

Each annotator sends a draft and a vote for each item. Measured is the time from sending a vote until the next item is
received; a browser's drawing is left out. Accounts, sessions and the hash chain are as in use; the store is SQLite with
`synchronous=FULL`, on the disk of `--root`. The crowd is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from crowd import create_accounts, create_store, find_free_port, percentile, run_crowd, run_server

from align.annotate.store import Store

CROWDS = ((50, 5.0, 300), (50, 2.0, 300), (200, 20.0, 500))
"""The number of annotators, seconds between two votes of each, and the bar of the 95th percentile in milliseconds."""
ITEMS = 10_000


def measure_crowd(root: Path, annotators: int, every_s: float, seconds: float) -> dict[str, Any]:
    """Return the figures of one crowd against one server."""
    url = f"sqlite:///{root / 'annotations.db'}"
    port = find_free_port()
    with create_store(url, ITEMS) as store:
        sessions = create_accounts(store, annotators)
    with run_server(root, port, f"store.url={url}") as server:
        cpu_start = read_cpu_seconds(server.pid)
        result = run_crowd(f"http://127.0.0.1:{port}", sessions, every_s, seconds)
        cpu_used = read_cpu_seconds(server.pid) - cpu_start
    with Store.open(url, create_if_missing=False) as store:
        store.verify()
        votes = store.rankings("crowd")
    items = {vote.item for vote in votes}
    assert len(votes) == len(result.acknowledged) == len(items), "a vote was lost or counted twice"
    return {
        "annotators": annotators,
        "every_s": every_s,
        "votes": len(votes),
        "tries": result.tries,
        "ms": {f"p{share}": round(1000 * percentile(result.seconds, share / 100), 1) for share in (50, 95, 99)},
        "max_ms": round(1000 * max(result.seconds), 1),
        "server_cpu_ms_a_vote": round(1000 * cpu_used / len(votes), 1),
    }


def format_table(results: dict[str, Any]) -> str:
    """Return the results as the Markdown table of docs/annotating-for-a-team.md."""
    lines = [
        "| annotators | a vote every | votes | p50, ms | p95, ms | p99, ms | asked: p95, ms | server CPU a vote, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        times = " | ".join(f"{row['ms'][name]:.0f}" for name in ("p50", "p95", "p99"))
        crowd = f"| {row['annotators']} | {row['every_s']:g} s | {row['votes']:,} | {times} "
        lines.append(f"{crowd}| {row['bar_p95_ms']} | {row['server_cpu_ms_a_vote']:.0f} |")
    return "\n".join(lines) + "\n"


def read_cpu_seconds(pid: int) -> float:
    """Return a process's time in user and system mode together (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="duration of each crowd")
    parser.add_argument("--root", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    rows = []
    for annotators, every_s, bar in CROWDS:
        with tempfile.TemporaryDirectory(dir=options.root) as root:
            row = measure_crowd(Path(root), annotators, every_s, options.seconds) | {"bar_p95_ms": bar}
        rows.append(row)
        print(f"{annotators} annotators, a vote every {every_s:g} s: {row['votes']} votes, {row['ms']} ms, bar {bar}")
    results = {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "items": ITEMS, "rows": rows}
    print("\n" + format_table(results))
    if options.save:
        options.save.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
