"""Compare deduplication with other tools: documents a CPU second, peak memory, recall, precision, removals without a
kept twin.

    benchmarks/data/peers.sh VENV
    python benchmarks/data/dedup.py --peers VENV [--documents 200000] [--rounds 3] [--save benchmarks/data/dedup.json]

Each engine reads the same JSON Lines (`corpus.py`) and writes Parquet, in a process of its own on one core, by turns.
CPU seconds are the process's whole user and system time, imports included. The documents that it keeps are compared
with the truth by sets of strings. `--documents 2000000 --rounds 1` without `--peers` measures memory.
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
from corpus import NEGATIVE, TWIN, compute_jaccard, compute_shingles, write_corpus

from align.run import environment

HERE = Path(__file__).resolve().parent
THRESHOLD = 0.7
BYTES_PER_DOCUMENT = {
    "order and places": 8 + 8 + 4,
    "sizes": 4,
    "ends of texts and of shingles": 8 + 8,
    "digests": 16,
    "one column of keys, sorted": 8 + 8 + 8 + 8 + 4,
    "ids": 12,
    "what is kept": 1,
}
"""Array → bytes of memory per document, at the step that needs most."""


def measure_command(command: list[str]) -> dict[str, Any]:
    """Run a command on one thread. Returns its CPU seconds, peak MB and the last line that it prints."""
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "RAYON", "POLARS")}
    variables = os.environ | threads | {"DO_NOT_TRACK": "1", "PYTHONPATH": str(HERE.parents[1])}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=variables)
    assert process.stdout
    lines = process.stdout.read().decode().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{' '.join(command)} ended with {status}"
    return {
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "wall_s": time.perf_counter() - start,
        "peak_mb": usage.ru_maxrss / 1024,
        "said": lines[-1] if lines else "",
    }


def call_in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a spawned process, because a forked child's peak memory would include its parent's."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def score_output(folder: Path, output: Path) -> dict[str, Any]:
    """Compare the documents that an engine kept with the planted ones.

    A planted pair is found if at most one of it is kept. A removal is right if some other document reaches the
    similarity threshold; it has a kept twin if such a document is kept.

    Args:
        folder: of the corpus.
        output: the engine's Parquet file.
    """
    with (folder / "corpus.jsonl").open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    truth = pq.read_table(folder / "truth.parquet")
    families, kinds, jaccards = (truth[name].to_pylist() for name in ("family", "kind", "jaccard"))
    kept_rows = {int(id) for id in pq.read_table(output, columns=["id"])["id"].to_pylist()}
    members: dict[int, list[int]] = {}
    for row, family in enumerate(families):
        members.setdefault(family, []).append(row)
    originals = {family: row for row, family in enumerate(families) if kinds[row] == "original"}
    planted = [row for row, kind in enumerate(kinds) if kind == TWIN]
    pairs_found = sum(not (row in kept_rows and originals[families[row]] in kept_rows) for row in planted)
    removed = [row for row, kind in enumerate(kinds) if row not in kept_rows and kind != "short"]
    twins = {
        row: [
            member
            for member in members[families[row]]
            if member != row and compute_jaccard(texts[row], texts[member]) >= THRESHOLD
        ]
        for row in removed
    }
    without_kept_twin = {row for row in removed if not any(twin in kept_rows for twin in twins[row])}
    for row, twin in find_accidental_twins(texts, without_kept_twin):
        twins[row].append(twin)
    right_removals = sum(map(bool, twins.values()))
    return {
        "kept": len(kept_rows),
        "removed": len(removed),
        "planted": len(planted),
        "negatives": kinds.count(NEGATIVE),
        "lowest": min(jaccards[row] for row in planted),
        "recall": pairs_found / len(planted),
        "precision": right_removals / max(len(removed), 1),
        "without_a_kept_twin": sum(not any(twin in kept_rows for twin in twins[row]) for row in removed),
    }


def find_accidental_twins(texts: list[str], rows: set[int]) -> Iterator[tuple[int, int]]:
    """Yield pairs of one of these rows and any row that reaches the similarity threshold, planted or not."""
    rows_by_shingle: dict[tuple[str, ...], list[int]] = {}
    sizes = {}
    for row in rows:
        shingles = compute_shingles(texts[row])
        sizes[row] = len(shingles)
        for shingle in shingles:
            rows_by_shingle.setdefault(shingle, []).append(row)
    for twin, text in enumerate(texts):
        shingles = compute_shingles(text)
        common_counts = Counter(row for shingle in shingles for row in rows_by_shingle.get(shingle, ()) if row != twin)
        for row, common in common_counts.items():
            if common / (sizes[row] + len(shingles) - common) >= THRESHOLD:
                yield row, twin


def describe_benchmark(rounds: int, documents: int | list[int]) -> dict[str, Any]:
    """Return the settings of a benchmark, and the machine and its load average."""
    return {
        "system": platform.platform(),
        "cpu": environment.describe_processor(environment.describe_machine()),
        "cores": os.cpu_count(),
        "threads": 1,
        "rounds": rounds,
        "documents": documents,
        "load": [round(os.getloadavg()[0], 1)],
        "versions": [f"{name}=={version(name)}" for name in ("numpy", "pyarrow")],
    }


def select_commands(engines: list[str], peers: Path | None) -> dict[str, list[str]]:
    """Return the commands of the selected engines. Those of other tools need the environment `peers`."""
    commands = {
        "stage": [sys.executable, str(HERE / "align_stage.py")],
        "align": [sys.executable, str(HERE / "align_pipeline.py")],
    }
    if peers:
        python = str(peers / "bin" / "python")
        commands |= {name: [python, str(HERE / "peer_pipelines.py"), name] for name in ("daft", "datatrove")}
    return {name: command for name, command in commands.items() if name in engines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3, help="each engine is measured once a round, by turns")
    parser.add_argument("--engines", default="stage,align,daft,datatrove", help="the engines to measure, if available")
    parser.add_argument("--peers", type=Path, help="the environment that peers.sh made")
    parser.add_argument("--save", type=Path, help="the JSON file of the results")
    options = parser.parse_args()
    pa.set_cpu_count(1)
    benchmark = describe_benchmark(options.rounds, options.documents)
    commands = select_commands(options.engines.split(","), options.peers)
    runs: dict[str, list[dict[str, Any]]] = {}
    scores: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as work:
        corpus = Path(work) / "corpus"
        call_in_new_process(write_corpus, corpus, options.documents, 0)
        for number in range(options.rounds):
            for name, command in commands.items():
                output = Path(work) / f"{name}-{number}.parquet"
                runs.setdefault(name, []).append(measure_command([*command, str(corpus), str(output)]))
                if name not in scores:
                    scores[name] = call_in_new_process(score_output, corpus, output)
                print(name, json.dumps(runs[name][-1]), json.dumps(scores[name]), flush=True)
    benchmark["load"].append(round(os.getloadavg()[0], 1))
    rows = {name: summarize_runs(options.documents, rounds) | scores[name] for name, rounds in runs.items()}
    if options.save:
        options.save.write_text(json.dumps({"machine": benchmark, "rows": rows}, indent=2) + "\n")
    print("\n" + format_table(rows) + "\n" + describe_memory(options.documents, rows["align"]["peak_mb"]))


def summarize_runs(documents: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians of an engine's runs, and microseconds a document by step if the engine printed its steps."""
    medians = {key: round(statistics.median(run[key] for run in runs), 2) for key in ("cpu_s", "wall_s", "peak_mb")}
    step_seconds = [json.loads(run["said"])["s"] for run in runs if run["said"].startswith("{")]
    microseconds = {
        name: round(1e6 * statistics.median(seconds[name] for seconds in step_seconds) / documents, 1)
        for name in (step_seconds[0] if step_seconds else ())
    }
    return medians | {"documents_per_cpu_s": round(documents / medians["cpu_s"]), "us_a_document": microseconds}


COLUMNS = ("engine", "documents a CPU second", "peak RSS, MB", "recall", "precision", "removed without a kept twin")


def format_table(rows: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table of the engines, and a line with the steps of `align`."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, row in rows.items():
        cells = (
            f"{row['documents_per_cpu_s']:,}",
            f"{row['peak_mb']:.0f}",
            f"{row['recall']:.5f}",
            f"{row['precision']:.5f}",
            f"{row['without_a_kept_twin']:,}",
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    steps = ", ".join(f"{name} {us}" for name, us in rows["align"]["us_a_document"].items())
    return "\n".join(lines) + f"\n\nMicroseconds a document of align: {steps}.\n"


def describe_memory(documents: int, peak_mb: float) -> str:
    """Return a sentence that computes the memory of 10 M documents from the bytes per document."""
    total = sum(BYTES_PER_DOCUMENT.values())
    parts = ", ".join(f"{name} {size}" for name, size in BYTES_PER_DOCUMENT.items())
    return (
        f"A document needs {total} bytes ({parts}) and what its pairs need: 10 M need {total / 100:.2f} GB and their "
        f"pairs. Measured: {peak_mb:.0f} MB at {documents:,} documents."
    )


if __name__ == "__main__":
    main()
