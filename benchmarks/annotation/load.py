"""How long annotators wait for the next item: the server of `stage=annotate`, and a crowd on the same machine.

    python benchmarks/annotation/load.py [--seconds 60] [--save benchmarks/annotation/load.json]

Each annotator sends a draft and a vote an item; what is measured is the time from sending a vote until the next item
is there, with everything that a browser would wait for but its own drawing. Accounts, sessions and the hash chain are
as in use; the store is SQLite with `synchronous=FULL`, on the disk of `--root`. The crowd is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from crowd import crowd, filled, free_port, hired, percentile, serving

from align.annotate.store import Store

CROWDS = ((50, 5.0, 300), (50, 2.0, 300), (200, 20.0, 500))
"""Annotators, seconds between two votes of each, and the milliseconds that 95 % of the votes are to stay under."""
ITEMS = 10_000


def measured(root: Path, annotators: int, every_s: float, seconds: float) -> dict[str, Any]:
    """The figures of one crowd against one server."""
    url, port = f"sqlite:///{root / 'annotations.db'}", free_port()
    with filled(url, ITEMS) as store:
        people = hired(store, annotators)
    with serving(root, port, f"store.url={url}") as server:
        began = cpu_seconds(server.pid)
        seen = crowd(f"http://127.0.0.1:{port}", people, every_s, seconds)
        spent = cpu_seconds(server.pid) - began
    with Store.open(url, create=False) as store:
        store.verify()
        kept = store.rankings("crowd")
    assert len(kept) == len(seen.acknowledged) == len({vote.item for vote in kept}), "a vote was lost or counted twice"
    return {
        "annotators": annotators, "every_s": every_s, "votes": len(kept), "tries": seen.tries,
        "ms": {f"p{share}": round(1000 * percentile(seen.seconds, share / 100), 1) for share in (50, 95, 99)},
        "max_ms": round(1000 * max(seen.seconds), 1), "server_cpu_ms_a_vote": round(1000 * spent / len(kept), 1),
    }  # fmt: skip


def format_table(found: dict[str, Any]) -> str:
    """The table of docs/annotating-for-a-team.md."""
    lines = [
        "| annotators | a vote every | votes | p50, ms | p95, ms | p99, ms | asked: p95, ms | server CPU a vote, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        times = " | ".join(f"{row['ms'][name]:.0f}" for name in ("p50", "p95", "p99"))
        who = f"| {row['annotators']} | {row['every_s']:g} s | {row['votes']:,} | {times} "
        lines.append(f"{who}| {row['bar_p95_ms']} | {row['server_cpu_ms_a_vote']:.0f} |")
    return "\n".join(lines) + "\n"


def cpu_seconds(pid: int) -> float:
    """Of a process, in user and system mode together (Linux)."""
    words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="that each crowd annotates")
    parser.add_argument("--root", type=Path, help="a folder on the disk that is to be measured")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    rows = []
    for annotators, every_s, bar in CROWDS:
        with tempfile.TemporaryDirectory(dir=given.root) as root:
            row = measured(Path(root), annotators, every_s, given.seconds) | {"bar_p95_ms": bar}
        rows.append(row)
        print(f"{annotators} annotators, a vote every {every_s:g} s: {row['votes']} votes, {row['ms']} ms, bar {bar}")
    found = {"machine": f"{os.cpu_count()} cores, {platform.machine()}", "items": ITEMS, "rows": rows}
    print("\n" + format_table(found))
    if given.save:
        given.save.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
