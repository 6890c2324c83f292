"""Duplicates beside peers: documents a CPU second, peak memory, recall, precision, removals without a kept twin.

    benchmarks/data/peers.sh VENV
    python benchmarks/data/dedup.py --peers VENV [--documents 200000] [--rounds 3] [--save benchmarks/data/dedup.json]

Each engine reads the same JSON Lines (`corpus.py`) and writes Parquet, in a process of its own on one core, by turns.
CPU seconds are the child's whole user and system time, imports included. What it kept is compared with the truth here,
by sets of strings. `--documents 2000000 --rounds 1` without `--peers` measures memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from corpus import NEGATIVE, TWIN, shingles, similarity, write

from align.run import environment

HERE = Path(__file__).resolve().parent
THRESHOLD = 0.7
BYTES = {
    "order and places": 8 + 8 + 4, "sizes": 4, "ends of texts and of shingles": 8 + 8, "digests": 16,
    "one column of keys, sorted": 8 + 8 + 8 + 8 + 4, "ids": 12, "what is kept": 1,
}  # fmt: skip
"""Of memory, a document, at the step that needs most."""


def measured(command: list[str]) -> dict[str, Any]:
    """CPU seconds, peak MB and the last line of what a process prints."""
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "RAYON", "POLARS")}
    given = os.environ | threads | {"DO_NOT_TRACK": "1", "PYTHONPATH": str(HERE.parents[1])}
    began, process = (
        time.perf_counter(),
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=given),
    )
    assert process.stdout
    said = process.stdout.read().decode().splitlines()
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, f"{' '.join(command)} ended with {status}"
    return {"cpu_s": used.ru_utime + used.ru_stime, "wall_s": time.perf_counter() - began,
            "peak_mb": used.ru_maxrss / 1024, "said": said[-1] if said else ""}  # fmt: skip


def apart(work: Callable[..., Any], *given: Any) -> Any:
    """Done in a process of its own: a child's peak memory begins with its parent's."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def scored(folder: Path, output: Path) -> dict[str, Any]:
    """What an engine kept, beside what was planted.

    A planted pair is found if not both of it are kept. A removal is right if some document is as similar as the
    threshold, and has a kept twin if one of these is kept.
    """
    with (folder / "corpus.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    truth = pq.read_table(folder / "truth.parquet")
    family, kind, reached = (truth[name].to_pylist() for name in ("family", "kind", "jaccard"))
    kept = {int(id) for id in pq.read_table(output, columns=["id"])["id"].to_pylist()}
    members: dict[int, list[int]] = {}
    for row, number in enumerate(family):
        members.setdefault(number, []).append(row)
    original = {number: row for row, number in enumerate(family) if kind[row] == "original"}
    planted = [row for row in range(len(kind)) if kind[row] == TWIN]
    found = sum(not (row in kept and original[family[row]] in kept) for row in planted)
    removed = [row for row in range(len(kind)) if row not in kept and kind[row] != "short"]
    twins = {row: [other for other in members[family[row]] if other != row and alike(texts[row], texts[other])]
             for row in removed}  # fmt: skip
    lonely = {row for row in removed if not any(other in kept for other in twins[row])}
    for row, other in alike_by_chance(texts, lonely):
        twins[row].append(other)
    right = sum(map(bool, twins.values()))
    alone = sum(not any(other in kept for other in twins[row]) for row in removed)
    return {"kept": len(kept), "removed": len(removed), "planted": len(planted), "negatives": kind.count(NEGATIVE),
            "lowest": min(reached[row] for row in planted), "recall": found / len(planted),
            "precision": right / max(len(removed), 1), "without_a_kept_twin": alone}  # fmt: skip


def alike(a: str, b: str) -> bool:
    return similarity(a, b) >= THRESHOLD


def alike_by_chance(texts: list[str], rows: set[int]) -> Iterator[tuple[int, int]]:
    """Pairs of one of these documents and any other one that reach the threshold, planted or not."""
    having: dict[tuple[str, ...], list[int]] = {}
    sizes = {}
    for row in rows:
        found = shingles(texts[row])
        sizes[row] = len(found)
        for shingle in found:
            having.setdefault(shingle, []).append(row)
    for other, text in enumerate(texts):
        found = shingles(text)
        common = Counter(row for shingle in found for row in having.get(shingle, ()) if row != other)
        for row, many in common.items():
            if many / (sizes[row] + len(found) - many) >= THRESHOLD:
                yield row, other


def machine(given: argparse.Namespace) -> dict[str, Any]:
    return {"system": platform.platform(), "cpu": environment.describe_processor(environment.describe_machine()),
            "cores": os.cpu_count(), "threads": 1, "rounds": given.rounds,
            "documents": given.documents, "load": [round(os.getloadavg()[0], 1)],
            "versions": [f"{name}=={version(name)}" for name in ("numpy", "pyarrow")]}  # fmt: skip


def commands(given: argparse.Namespace) -> dict[str, list[str]]:
    found = {"stage": [sys.executable, str(HERE / "stage.py")], "align": [sys.executable, str(HERE / "engine.py")]}
    if given.peers:
        python = str(given.peers / "bin" / "python")
        found |= {name: [python, str(HERE / "peers.py"), name] for name in ("daft", "datatrove")}
    return {name: command for name, command in found.items() if name in given.engines.split(",")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3, help="each engine is measured once a round, by turns")
    parser.add_argument("--engines", default="stage,align,daft,datatrove", help="those to measure, of those there are")
    parser.add_argument("--peers", type=Path, help="the environment that peers.sh made")
    parser.add_argument("--save", type=Path, help="the JSON file of the figures")
    given = parser.parse_args()
    pa.set_cpu_count(1)
    about, taken, scores = machine(given), {}, {}
    with tempfile.TemporaryDirectory() as work:
        corpus = Path(work) / "corpus"
        apart(write, corpus, given.documents, 0)
        for number in range(given.rounds):
            for name, command in commands(given).items():
                output = Path(work) / f"{name}-{number}.parquet"
                taken.setdefault(name, []).append(measured([*command, str(corpus), str(output)]))
                if name not in scores:
                    scores[name] = apart(scored, corpus, output)
                print(name, json.dumps(taken[name][-1]), json.dumps(scores[name]), flush=True)
    about["load"].append(round(os.getloadavg()[0], 1))
    rows = {name: summed(given.documents, runs) | scores[name] for name, runs in taken.items()}
    if given.save:
        given.save.write_text(json.dumps({"machine": about, "rows": rows}, indent=2) + "\n")
    print("\n" + format_table(rows) + "\n" + arithmetic(given.documents, rows["align"]["peak_mb"]))


def summed(documents: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    middle = {key: round(statistics.median(run[key] for run in runs), 2) for key in ("cpu_s", "wall_s", "peak_mb")}
    steps = [json.loads(run["said"])["s"] for run in runs if run["said"].startswith("{")]
    by_step = {
        name: round(1e6 * statistics.median(s[name] for s in steps) / documents, 1)
        for name in (steps[0] if steps else ())
    }
    return middle | {"documents_per_cpu_s": round(documents / middle["cpu_s"]), "us_a_document": by_step}


COLUMNS = ("engine", "documents a CPU second", "peak RSS, MB", "recall", "precision", "removed without a kept twin")


def format_table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, row in rows.items():
        cells = (f"{row['documents_per_cpu_s']:,}", f"{row['peak_mb']:.0f}", f"{row['recall']:.5f}",
                 f"{row['precision']:.5f}", f"{row['without_a_kept_twin']:,}")  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    steps = ", ".join(f"{name} {us}" for name, us in rows["align"]["us_a_document"].items())
    return "\n".join(lines) + f"\n\nMicroseconds a document of align: {steps}.\n"


def arithmetic(documents: int, peak_mb: float) -> str:
    """What 10 M documents need, by what a document needs."""
    each = sum(BYTES.values())
    parts = ", ".join(f"{name} {size}" for name, size in BYTES.items())
    return (
        f"A document needs {each} bytes ({parts}) and what its pairs need: 10 M need {each / 100:.2f} GB and their "
        f"pairs. Measured: {peak_mb:.0f} MB at {documents:,} documents."
    )


if __name__ == "__main__":
    main()
