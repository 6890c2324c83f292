"""Measure the peak memory of the whole data stage, with and without near-duplicates, on documents of `corpus.py`.

    python benchmarks/data/memory.py [--documents 200000 800000] [--corpus FOLDER] [--save benchmarks/data/memory.json]

A run is a process of its own on one thread: it reads, cleans, finds ids, duplicates and contamination by the held-out
rows (5 %), and publishes. With two sizes or more, a line through them gives the bytes per document, and the memory of
5 GB of input and of 10 M documents. 8,000,000 documents are 5 GB. Files are made in the folder for temporary files
(`TMPDIR`) and take some five times the size of the input.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from corpus import write_corpus
from dedup import call_in_new_process, describe_benchmark, measure_command

TARGET_BYTES = 5e9
"""Size of the input whose memory is extrapolated."""
WAYS = {"with near-duplicates": 0.7, "without": None}
"""Way → threshold of near-duplicates."""


def run_stage(corpus: Path, near: float | None) -> None:
    """Run the data stage in this process. `near` is the threshold of near-duplicates."""
    from align.__main__ import main

    with tempfile.TemporaryDirectory() as root:
        threshold = "null" if near is None else near
        arguments = ["stage=data", f"stage.sources=[{corpus}]", "data.on_bad_row=skip"]
        arguments += [f"stage.duplicates.near={threshold}", f"stage.contamination.near={threshold}"]
        arguments += ["run.name=corpus", f"run.root={root}"]
        assert main(arguments) == 0


def copy_head(corpus: Path, documents: int, target: Path) -> int:
    """Copy the first documents of a corpus. Returns the size of the copy in bytes."""
    with (corpus / "corpus.jsonl").open("rb") as source, target.open("wb") as file:
        file.writelines(islice(source, documents))
    return target.stat().st_size


def describe_growth(runs: list[dict[str, Any]], way: str) -> str:
    """Return a sentence with the bytes per document by a line through the runs, and extrapolated sizes."""
    documents, peak_mb = (np.array([run[key] for run in runs if run["way"] == way]) for key in ("documents", "peak_mb"))
    if len(documents) < 2:
        return f"{way}: one size says nothing of others"
    mb_per_document, base_mb = np.polyfit(documents, peak_mb, 1)
    document_bytes = runs[-1]["bytes"] / runs[-1]["documents"]
    targets = {"5 GB": TARGET_BYTES / document_bytes, "10 M documents": 1e7}
    predictions = ", ".join(
        f"{name} {(base_mb + mb_per_document * count) / 1000:.2f} GB" for name, count in targets.items()
    )
    return f"{way}: {base_mb:.0f} MB and {mb_per_document * 1e6:.0f} bytes a document; by this, {predictions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[200_000, 800_000])
    parser.add_argument("--corpus", type=Path, help="a folder that corpus.py made, with at least as many documents")
    parser.add_argument("--save", type=Path, help="the JSON file of the results")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--near", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_stage(options.run, WAYS["with near-duplicates"] if options.near else None)
        return
    runs = []
    benchmark = describe_benchmark(1, options.documents)
    with tempfile.TemporaryDirectory() as work:
        corpus = options.corpus or Path(work) / "corpus"
        if not options.corpus:
            call_in_new_process(write_corpus, corpus, max(options.documents), 0)
        for documents in sorted(options.documents):
            rows = Path(work) / "rows.jsonl"
            size = copy_head(corpus, documents, rows)
            for way, near in WAYS.items():
                command = [sys.executable, __file__, "--run", str(rows), *(["--near"] if near else [])]
                usage = measure_command(command)
                runs.append({"way": way, "documents": documents, "bytes": size, **usage})
                print(
                    f"{documents:,} documents, {size / 1e6:.0f} MB, {way}: {usage['peak_mb']:.0f} MB, "
                    f"{usage['cpu_s']:.0f} CPU seconds",
                    flush=True,
                )
    benchmark["load"].append(round(os.getloadavg()[0], 1))
    print("\n".join(describe_growth(runs, way) for way in WAYS))
    if options.save:
        for run in runs:
            del run["said"]
        options.save.write_text(json.dumps({"machine": benchmark, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
