"""Make one data set with every engine: in one process, with Daft on this machine, and with Daft on Ray, with one worker
and several, and with runs that are killed repeatedly. All roots and all bytes have to be the same.

    python benchmarks/data/engines.py [--rows 4000] [--workers 2] [--kills 10] [--save benchmarks/data/engines.json]

Run it with the Python of an environment that has Daft (docs/data.md, "Beyond one machine"), or let `engines.sh VENV`
make one. The sources are JSON lines with bad rows, a folder of shards of three formats, a table and trees of messages,
with near-duplicates and copies. They are cleaned, compared with each other and with an evaluation set, divided and
mixed. A second data set has preference pairs. A part has 500 rows here and not 50,000, so that there is work to divide.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from corpus import DocumentGenerator
from dedup import describe_benchmark

ROWS_PER_PART = 500
CLEAN_STEPS = "[unicode, control, empty, roles, {length: {least: 3}}, repetition, boilerplate, {pii: {action: mask}}]"


def build_chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_sources(folder: Path, rows: int) -> None:
    """Write the sources of a data set of documents, and of one of preference pairs."""
    generator = DocumentGenerator(1)
    draw = random.Random(1)
    texts = [generator.create_original() for _ in range(4 * rows)]
    for i in range(0, len(texts), 5):  # every fifth text is a changed copy of another one
        while (copy := generator.create_near_copy(texts[draw.randrange(len(texts))], 0.7, 1.0)) is None:
            pass  # try another text, because this one is a single long word
        texts[i], _ = copy
    for i in range(0, len(texts), 23):
        texts[i] += f" Write to a{i}@example.org. SchÃ¶n\u200b!"
    quarters = [texts[i * rows : (i + 1) * rows] for i in range(4)]
    with (folder / "support.jsonl").open("w", encoding="utf-8") as file:
        for i, text in enumerate(quarters[0]):
            file.write("\n" if i % 50 == 7 else "{no json\n" if i % 97 == 5 else "")
            file.write(json.dumps(build_chat(f"Question {i}?", text if i % 61 else "")) + "\n")
    shards = folder / "shards"
    shards.mkdir()
    shard_rows = [{"prompt": f"Tell me of day {i}", "completion": text} for i, text in enumerate(quarters[1])]
    third = len(shard_rows) // 3
    with gzip.open(shards / "0.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in shard_rows[:third])
    pq.write_table(pa.Table.from_pylist(shard_rows[third : 2 * third]), shards / "1.parquet", row_group_size=300)
    (shards / "2.json").write_text(json.dumps(shard_rows[2 * third :]))
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["question", "answer"])
        table.writerows([f"Is shop {i} open?", text] for i, text in enumerate(quarters[2]))
    with (folder / "trees.jsonl").open("w", encoding="utf-8") as file:
        for i in range(0, rows, 4):
            root = {"message_id": f"{i}", "parent_id": None, "role": "prompter", "text": f"Tree {i}?"}
            answers = [
                {
                    "message_id": f"{i}.{reply}",
                    "parent_id": f"{i}",
                    "role": "assistant",
                    "text": quarters[3][i + reply],
                }
                for reply in range(i // 4 % 4)
            ]
            file.writelines(json.dumps(row) + "\n" for row in (root, *answers))
    with (folder / "evals.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in (*shard_rows[5:9], {"prompt": "Is shop 7 open?"}))
    (folder / "rated").mkdir()
    rated = [
        {"prompt": f"Rated {i}?", "response": texts[i + answer], "helpfulness": (i + answer) % 4}
        for i in range(rows // 3)
        for answer in range(1 + i % 4)
    ]
    middle = len(rated) // 2  # the answers to one prompt may be in both files
    for name, file_rows in (("0", rated[:middle]), ("1", rated[middle:])):
        (folder / "rated" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in file_rows))


def build_commands(root: Path) -> dict[str, list[str]]:
    """Return the command of each data set, without the arguments that select the engine."""
    chats = (
        "[{path: support.jsonl, weight: 0.5}, {path: shards, name: general}, "
        "{path: table.csv, columns: {prompt: question, completion: answer}}, {path: trees.jsonl, cap: 500}]"
    )
    return {
        name: [
            sys.executable,
            __file__,
            "--line",
            "stage=data",
            f"stage.sources={sources}",
            f"stage.clean={CLEAN_STEPS}",
            "data.on_bad_row=skip",
            "data.held_out=0.1",
            f"run.root={root}",
            f"run.name={name}",
            *more,
        ]
        for name, sources, more in (
            ("chats", chats, ["stage.contamination.against=[evals.jsonl]", "stage.mix.repeat=2"]),
            ("pairs", "[rated]", []),
        )
    }


def run_with_small_parts(arguments: list[str]) -> int:
    """Run `python -m align` with parts of `ROWS_PER_PART` rows."""
    from align.__main__ import main
    from align.data.sets import gather

    gather.PART = ROWS_PER_PART
    return main(arguments)


def create_data_sets(root: Path, folder: Path, engines: Sequence[Sequence[str]], kills: int) -> dict[str, Any]:
    """Make both data sets, restarting killed runs until each has ended by itself.

    Args:
        root: `run.root`.
        folder: of the sources.
        engines: arguments that select an engine. Each attempt takes the next one.
        kills: how often the first data set's run is killed with SIGKILL, at a random time that grows with each attempt.
            There are fewer kills if a run ends by itself first.
    """
    draw = random.Random(0)
    start = time.perf_counter()
    kills_done = 0
    attempt = 0
    for name, command in build_commands(root).items():
        while True:
            timeout_s = draw.uniform(1.5, 3 + 1.5 * attempt) if name == "chats" and kills_done < kills else None
            arguments = [*command, *engines[attempt % len(engines)]]
            attempt += 1
            process = subprocess.Popen(
                arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            try:
                output, _ = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills_done += 1
                continue
            assert process.returncode == 0, output
            break
    return {"seconds": round(time.perf_counter() - start, 1), "kills": kills_done, "kills_asked": kills}


def compute_digests(root: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of the data sets and of their reports, except for timings."""
    digests = {}
    for folder in sorted((root / "data").iterdir()):
        for path in sorted([*(folder / "artifact").iterdir(), *folder.glob("*.jsonl")]):
            if path.name != "timing.jsonl":
                digests[f"{folder.name}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def build_ways(workers: int, kills: int) -> dict[str, tuple[list[list[str]], int]]:
    """Return each way to make the data sets: the arguments of the engines that take turns, and the number of kills."""
    daft = ["stage.engine=daft"]
    ray = ["stage.engine=ray"]
    several = f"stage.workers={workers}"
    return {
        "embedded": ([[]], 0),
        "Daft, 1 worker": ([[*daft, "stage.workers=1"]], 0),
        f"Daft, {workers} workers": ([[*daft, several]], 0),
        "Daft on Ray, 1 worker": ([[*ray, "stage.workers=1"]], 0),
        f"Daft on Ray, {workers} workers": ([[*ray, several]], 0),
        "embedded, killed": ([[]], kills),
        "Daft, killed": ([[*daft, several]], kills),
        "each in turn, killed": ([[*daft, several], [], [*ray, several]], kills),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000, help="rows of each source")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    benchmark = describe_benchmark(1, 4 * options.rows)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "sources"
        folder.mkdir()
        write_sources(folder, options.rows)
        rows: list[dict[str, Any]] = []
        reference: dict[str, str] = {}
        for name, (engines, kills) in build_ways(options.workers, options.kills).items():
            root = Path(work) / str(len(rows))
            figures = create_data_sets(root, folder, engines, kills)
            digests = compute_digests(root)
            reference = reference or digests
            same = digests == reference
            data = json.loads((root / "data" / "chats" / "artifact" / "data.json").read_text())
            rows.append({"way": name, **figures, "root": data["root"], "files": len(digests), "same": same})
            print(
                f"{name}: {figures['seconds']} s, {figures['kills']} of {kills} kills, root {data['root'][:12]}, "
                f"{len(digests)} files {'the same' if same else 'DIFFER'}",
                flush=True,
            )
    benchmark["load"].append(round(os.getloadavg()[0], 1))
    if options.save:
        options.save.write_text(json.dumps({"machine": benchmark, "runs": rows}, indent=2) + "\n")
    without_kills = [row["way"] for row in rows if row["kills_asked"] and not row["kills"]]
    if without_kills:
        print(f"ended before the first kill: {'; '.join(without_kills)}. Give more --rows.", file=sys.stderr)
    if without_kills or not all(row["same"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--line"]:
        sys.exit(run_with_small_parts(sys.argv[2:]))
    main()
