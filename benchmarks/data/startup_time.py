"""Measure the time that a run spends on its data before the stage begins: reading rows, and computing their ids.

    python benchmarks/data/startup_time.py FOLDER [--rows 200000] [--rounds 3] [--as manifest jsonl]

Writes `rows.jsonl` to the folder (conversations of a question and an answer of some 620 bytes), makes a data set of it,
and measures both in fresh processes, read as `data=manifest` and as `data=files` in the way of `stage=sft`. Imports are
made before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from corpus import DocumentGenerator

from align.data.sources import DataSource, build_data_inputs, list_held_out_sources, read_divided_documents
from align.data.trained_ids import write_trained_ids
from align.stages.runner import pause_garbage_collector

DATA_SET = "runs/data/rows/artifact"


def write_rows(path: Path, count: int) -> None:
    """Write conversations of a question and an answer as JSON lines."""
    generator = DocumentGenerator(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            question = f"{generator.draw.choice(generator.utterances)} {i}"
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": generator.create_original()},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def create_data_set(folder: Path) -> None:
    """Make a data set of `rows.jsonl` by `stage=data`."""
    arguments = ["stage=data", f"stage.sources=[{folder / 'rows.jsonl'}]", "stage.duplicates.near=null"]
    arguments += ["stage.clean=[]", "stage.contamination.test=false", f"run.root={folder / 'runs'}", "run.name=rows"]
    subprocess.run([sys.executable, "-m", "align", *arguments], check=True, stdout=subprocess.DEVNULL)


def measure_source(source: DataSource) -> dict[str, float]:
    """Return the CPU seconds of each step and of all of them, and the wall-clock seconds."""
    import pandas  # noqa: F401, which pyarrow imports when it first makes an array
    import pyarrow.parquet  # noqa: F401

    times = [time.process_time()]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, pause_garbage_collector():
        build_data_inputs(source)
        times.append(time.process_time())
        train, _ = read_divided_documents(source)
        list_held_out_sources(source)
        times.append(time.process_time())
        write_trained_ids(Path(folder), train)
        times.append(time.process_time())
    times.append(time.process_time())
    seconds = [end - begin for begin, end in pairwise(times)]
    steps = dict(zip(("digest", "rows", "ids", "end"), seconds, strict=True))
    return {**steps, "all": times[-1] - times[0], "wall": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--as", dest="kinds", nargs="*", default=["manifest", "jsonl"])
    parser.add_argument("--measure", default="", help="measure one of these kinds in this process")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = options.folder / "rows.jsonl"
    if options.measure:
        path = options.folder / DATA_SET if options.measure == "manifest" else rows
        print(json.dumps(measure_source(DataSource(options.measure, str(path), held_out=0.05))))
        return
    if not rows.is_file():
        write_rows(rows, options.rows)
    if "manifest" in options.kinds and not (options.folder / DATA_SET / "data.json").is_file():
        create_data_set(options.folder)
    for kind in options.kinds:
        for _ in range(options.rounds):
            command = [sys.executable, __file__, str(options.folder), "--measure", kind]
            process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            seconds = ", ".join(f"{name} {value:.2f}" for name, value in json.loads(process.stdout).items())
            print(f"{kind}: {seconds}; load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
