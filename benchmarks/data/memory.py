"""Peak memory of the whole stage, with and without near-duplicates, on documents of `corpus.py`.

    python benchmarks/data/memory.py [--documents 200000 800000] [--corpus FOLDER] [--save benchmarks/data/memory.json]

A run is a process of its own on one thread: it reads, cleans, finds ids, duplicates and contamination by the rows that
are held out (5 %), and publishes. From two sizes or more, what a document takes is said, and what 5 GB of input and
10 M documents take by it. 8,000,000 documents are 5 GB. Files are made in the folder for temporary files (`TMPDIR`),
some five times the size of the input.
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
from corpus import write
from dedup import apart, machine, measured

GIVEN = 5e9
"""Bytes of the input that memory is asked of."""
WAYS = {"with near-duplicates": 0.7, "without": None}


def run(corpus: Path, near: float | None) -> None:
    """The whole stage, in this process."""
    from align.__main__ import main

    with tempfile.TemporaryDirectory() as root:
        value = "null" if near is None else near
        words = [
            "stage=data", f"stage.sources=[{corpus}]", "data.on_bad_row=skip", f"stage.duplicates.near={value}",
            f"stage.contamination.near={value}", "run.name=corpus", f"run.root={root}",
        ]  # fmt: skip
        assert main(words) == 0


def head(corpus: Path, documents: int, target: Path) -> int:
    """The first documents of a corpus. Returns their bytes."""
    with (corpus / "corpus.jsonl").open("rb") as source, target.open("wb") as file:
        file.writelines(islice(source, documents))
    return target.stat().st_size


def line(points: list[dict[str, Any]], way: str) -> str:
    """What a document takes by a line through the points, and what more of them would."""
    count, peak = (
        np.array([point[key] for point in points if point["way"] == way]) for key in ("documents", "peak_mb")
    )
    size = points[-1]["bytes"] / points[-1]["documents"]
    if len(count) < 2:
        return f"{way}: one size says nothing of others"
    each, base = np.polyfit(count, peak, 1)
    asked = {"5 GB": GIVEN / size, "10 M documents": 1e7}
    said = ", ".join(f"{name} {(base + each * many) / 1000:.2f} GB" for name, many in asked.items())
    return f"{way}: {base:.0f} MB and {each * 1e6:.0f} bytes a document; by this, {said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[200_000, 800_000])
    parser.add_argument("--corpus", type=Path, help="a folder that corpus.py made, with at least as many documents")
    parser.add_argument("--save", type=Path, help="the JSON file of the figures")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--near", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run(given.run, WAYS["with near-duplicates"] if given.near else None)
        return
    given.rounds, points = 1, []
    about = machine(given)
    with tempfile.TemporaryDirectory() as work:
        corpus = given.corpus or Path(work) / "corpus"
        if not given.corpus:
            apart(write, corpus, max(given.documents), 0)
        for documents in sorted(given.documents):
            rows = Path(work) / "rows.jsonl"
            size = head(corpus, documents, rows)
            for way, near in WAYS.items():
                command = [sys.executable, __file__, "--run", str(rows), *(["--near"] if near else [])]
                taken = measured(command)
                points.append({"way": way, "documents": documents, "bytes": size, **taken})
                print(f"{documents:,} documents, {size / 1e6:.0f} MB, {way}: {taken['peak_mb']:.0f} MB, "
                      f"{taken['cpu_s']:.0f} CPU seconds", flush=True)  # fmt: skip
    about["load"].append(round(os.getloadavg()[0], 1))
    print("\n".join(line(points, way) for way in WAYS))
    if given.save:
        for point in points:
            del point["said"]
        given.save.write_text(json.dumps({"machine": about, "runs": points}, indent=2) + "\n")


if __name__ == "__main__":
    main()
