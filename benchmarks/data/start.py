"""What data cost a run before its stage begins: reading the rows, and the ids and roots of what is trained on.

    python benchmarks/data/start.py FOLDER [--rows 200000] [--rounds 3] [--as manifest jsonl]

Writes `rows.jsonl` to the folder (conversations of a question and an answer of some 620 bytes), makes a data set of it,
and measures both in fresh processes, as `data=manifest` and as `data=files` read them, which is what `stage=sft` does.
Imports are made before the clock starts.
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

from corpus import Writer

from align.data.sources import DataSource, build_data_inputs, list_held_out_sources, read_divided_documents
from align.data.trained_ids import write_trained_ids
from align.stages.runner import pause_garbage_collector

SET = "runs/data/rows/artifact"


def written(path: Path, rows: int) -> None:
    writer = Writer(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            turns = ("user", f"{writer.draw.choice(writer.utterances)} {i}"), ("assistant", writer.original())
            file.write(json.dumps({"messages": [{"role": role, "content": said} for role, said in turns]}) + "\n")


def made(folder: Path) -> None:
    words = [
        "stage=data", f"stage.sources=[{folder / 'rows.jsonl'}]", "stage.duplicates.near=null", "stage.clean=[]",
        "stage.contamination.test=false", f"run.root={folder / 'runs'}", "run.name=rows",
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "align", *words], check=True, stdout=subprocess.DEVNULL)


def measured(source: DataSource) -> dict[str, float]:
    """CPU seconds of each step, and of all of them with what is around them."""
    import pandas  # noqa: F401, which pyarrow imports when it first makes an array
    import pyarrow.parquet  # noqa: F401

    clock = [time.process_time()]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, pause_garbage_collector():
        build_data_inputs(source)
        clock.append(time.process_time())
        train, _ = read_divided_documents(source)
        list_held_out_sources(source)
        clock.append(time.process_time())
        write_trained_ids(Path(folder), train)
        clock.append(time.process_time())
    clock.append(time.process_time())
    steps = dict(zip(("digest", "rows", "ids", "end"), (b - a for a, b in pairwise(clock)), strict=True))
    return {**steps, "all": clock[-1] - clock[0], "wall": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--as", dest="kinds", nargs="*", default=["manifest", "jsonl"])
    parser.add_argument("--measure", default="", help="one of them, in this process")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = given.folder / "rows.jsonl"
    if given.measure:
        path = given.folder / SET if given.measure == "manifest" else rows
        print(json.dumps(measured(DataSource(given.measure, str(path), held_out=0.05))))
        return
    if not rows.is_file():
        written(rows, given.rows)
    if "manifest" in given.kinds and not (given.folder / SET / "data.json").is_file():
        made(given.folder)
    for kind in given.kinds:
        for _ in range(given.rounds):
            words = [sys.executable, __file__, str(given.folder), "--measure", kind]
            found = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
            told = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
            print(f"{kind}: {told}; load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
