"""One data set by every engine: in one process, by Daft on this machine, by Daft on Ray, with one worker and several,
and killed again and again. All roots, and all bytes, have to be the same.

    python benchmarks/data/engines.py [--rows 4000] [--workers 2] [--kills 10] [--save benchmarks/data/engines.json]

Run it with the Python of an environment that has Daft (docs/data.md, "Beyond one machine"), or let `engines.sh VENV`
make one. The sources are lines with bad rows, a folder of shards of three formats, a table and trees of messages, with
near-duplicates and copies; they are cleaned, compared with each other and with an evaluation set, divided and mixed. A
second data set has preference pairs. A part has 500 rows here and not 50,000, so that there is work to divide.
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
from corpus import Writer
from dedup import machine

PART = 500
CLEAN = "[unicode, control, empty, roles, {length: {least: 3}}, repetition, boilerplate, {pii: {action: mask}}]"


def chat(asked: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def write_sources(folder: Path, rows: int) -> None:
    """Sources of a data set of documents, and of one of pairs."""
    write, draw = Writer(1), random.Random(1)
    texts = [write.original() for _ in range(4 * rows)]
    for i in range(0, len(texts), 5):  # every fifth is a changed copy of another one
        while (copy := write.changed(texts[draw.randrange(len(texts))], 0.7, 1.0)) is None:
            pass  # another text, for that one is a single long word
        texts[i], _ = copy
    for i in range(0, len(texts), 23):
        texts[i] += f" Write to a{i}@example.org. SchÃ¶n\u200b!"
    quarter = [texts[i * rows : (i + 1) * rows] for i in range(4)]
    with (folder / "support.jsonl").open("w", encoding="utf-8") as file:
        for i, text in enumerate(quarter[0]):
            file.write("\n" if i % 50 == 7 else "{no json\n" if i % 97 == 5 else "")
            file.write(json.dumps(chat(f"Question {i}?", text if i % 61 else "")) + "\n")
    shards = folder / "shards"
    shards.mkdir()
    general = [{"prompt": f"Tell me of day {i}", "completion": text} for i, text in enumerate(quarter[1])]
    third = len(general) // 3
    with gzip.open(shards / "0.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in general[:third])
    pq.write_table(pa.Table.from_pylist(general[third : 2 * third]), shards / "1.parquet", row_group_size=300)
    (shards / "2.json").write_text(json.dumps(general[2 * third :]))
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["question", "answer"])
        table.writerows([f"Is shop {i} open?", text] for i, text in enumerate(quarter[2]))
    with (folder / "trees.jsonl").open("w", encoding="utf-8") as file:
        for i in range(0, rows, 4):
            root = {"message_id": f"{i}", "parent_id": None, "role": "prompter", "text": f"Tree {i}?"}
            answers = [
                {"message_id": f"{i}.{k}", "parent_id": f"{i}", "role": "assistant", "text": quarter[3][i + k]}
                for k in range(i // 4 % 4)
            ]
            file.writelines(json.dumps(row) + "\n" for row in (root, *answers))
    with (folder / "evals.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in (*general[5:9], {"prompt": "Is shop 7 open?"}))
    (folder / "rated").mkdir()
    rated = [
        {"prompt": f"Rated {i}?", "response": texts[i + k], "helpfulness": (i + k) % 4}
        for i in range(rows // 3) for k in range(1 + i % 4)
    ]  # fmt: skip
    for name, some in (("0", rated[: len(rated) // 2]), ("1", rated[len(rated) // 2 :])):  # a group stands in both
        (folder / "rated" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


def commands(root: Path) -> dict[str, list[str]]:
    """Data set → its command line, but for the engine."""
    chats = (
        "[{path: support.jsonl, weight: 0.5}, {path: shards, name: general}, "
        "{path: table.csv, columns: {prompt: question, completion: answer}}, {path: trees.jsonl, cap: 500}]"
    )
    return {
        name: [
            sys.executable, __file__, "--line", "stage=data", f"stage.sources={sources}", f"stage.clean={CLEAN}",
            "data.on_bad_row=skip", "data.held_out=0.1", f"run.root={root}", f"run.name={name}", *more,
        ]
        for name, sources, more in (
            ("chats", chats, ["stage.contamination.against=[evals.jsonl]", "stage.mix.repeat=2"]),
            ("pairs", "[rated]", []),
        )
    }  # fmt: skip


def run_in_small_parts(line: list[str]) -> int:
    """`python -m align`, with parts of `PART` rows."""
    from align.__main__ import main
    from align.data.sets import gather

    gather.PART = PART
    return main(line)


def made(root: Path, folder: Path, turns: Sequence[Sequence[str]], kills: int) -> dict[str, Any]:
    """Make both data sets, one engine after another taking its turn, until each has ended by itself.

    Args:
        kills: of the first, with SIGKILL, at any moment; the time until the next one grows. Fewer are done where a run
            ends by itself first.
    """
    draw, began, done, turn = random.Random(0), time.perf_counter(), 0, 0
    for name, command in commands(root).items():
        while True:
            limit = draw.uniform(1.5, 3 + 1.5 * turn) if name == "chats" and done < kills else None
            words, turn = [*command, *turns[turn % len(turns)]], turn + 1
            process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            try:
                said, _ = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                done += 1
                continue
            assert process.returncode == 0, said
            break
    return {"seconds": round(time.perf_counter() - began, 1), "kills": done, "kills_asked": kills}


def digests(root: Path) -> dict[str, str]:
    """File → SHA-256, of all that a data set and its report are made of."""
    found = {}
    for folder in sorted((root / "data").iterdir()):
        for path in sorted([*(folder / "artifact").iterdir(), *folder.glob("*.jsonl")]):
            if path.name != "timing.jsonl":
                found[f"{folder.name}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def ways(workers: int, kills: int) -> dict[str, tuple[list[list[str]], int]]:
    """What is measured: the engines that take turns, and how often they are killed."""
    daft, ray = (["stage.engine=daft"], ["stage.engine=ray"])
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
    parser.add_argument("--rows", type=int, default=4000, help="of each source")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    given.rounds, given.documents = 1, 4 * given.rows
    about = machine(given)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "sources"
        folder.mkdir()
        write_sources(folder, given.rows)
        rows, first = [], dict[str, str]()
        for name, (turns, kills) in ways(given.workers, given.kills).items():
            figures = made(root := Path(work) / str(len(rows)), folder, turns, kills)
            found = digests(root)
            first = first or found
            data = json.loads((root / "data" / "chats" / "artifact" / "data.json").read_text())
            rows.append({"way": name, **figures, "root": data["root"], "files": len(found), "same": found == first})
            print(f"{name}: {figures['seconds']} s, {figures['kills']} of {kills} kills, root {data['root'][:12]}, "
                  f"{len(found)} files {'the same' if found == first else 'DIFFER'}", flush=True)  # fmt: skip
    about["load"].append(round(os.getloadavg()[0], 1))
    if given.save:
        given.save.write_text(json.dumps({"machine": about, "runs": rows}, indent=2) + "\n")
    unkilled = [row["way"] for row in rows if row["kills_asked"] and not row["kills"]]
    if unkilled:
        print(f"ended before the first kill: {'; '.join(unkilled)}. Give more --rows.", file=sys.stderr)
    if unkilled or not all(row["same"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--line"]:
        sys.exit(run_in_small_parts(sys.argv[2:]))
    main()
