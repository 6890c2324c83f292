"""How many of the rows that a score drops are damaged: `stage.score.by=loss` of the built-in model, on real rows of
which 10 % were damaged.

    apt-get download dict-jargon && dpkg -x dict-jargon_*.deb jargon
    python benchmarks/data/scores.py jargon/usr/share/dictd [--seeds 0,1,2] [--save benchmarks/data/scores.json]

Two sources: the Jargon File (see `ratio.py`), of which the model knows nothing, and chats that it was not trained on
(`data=chitchat`, part `test`). Of each, one row in ten is damaged, by each kind of damage as many. `stage=data` writes
the scores of all rows; at 10 % dropped, the highest, the lowest, or half from either end, it is counted how many of the
dropped are damaged. A choice by lot would have 10 %.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from ratio import align, entries, written

from align.data import chitchat

HERE = Path(__file__).resolve().parent
DAMAGED = 0.1
Row = dict[str, Any]


def decoded_wrongly(text: str, draw: random.Random) -> str:
    return text.replace("e", "é").replace("'", "’").encode().decode("cp1252", "replace")


def shuffled(text: str, draw: random.Random) -> str:
    words = text.split()
    return " ".join(draw.sample(words, len(words)))


def repeated(text: str, draw: random.Random) -> str:
    return " ".join(text.split()[:4] * 12)


def cut_from_a_page(text: str, draw: random.Random) -> str:
    return f"Skip to content. Accept all cookies. {text} Sign up for our newsletter. All rights reserved."


def exchanged(text: str, draw: random.Random) -> str:
    """The answer to another question; whoever damages fills it in."""
    return text


KINDS: Mapping[str, Callable[[str, random.Random], str]] = {
    "decoded wrongly": decoded_wrongly, "words shuffled": shuffled, "repeated": repeated,
    "remains of a page": cut_from_a_page, "answer to another question": exchanged,
}  # fmt: skip
ENDS: Mapping[str, tuple[float, float]] = {
    "the highest 10 %": (0.0, 0.9), "the lowest 10 %": (0.1, 1.0), "5 % at either end": (0.05, 0.95),
}  # fmt: skip


def chats() -> list[Row]:
    """Chats as rows of messages."""
    return [{"messages": chat.as_dicts()} for chat in chitchat.load_conversations("test")]


def jargon(folder: Path) -> list[Row]:
    return [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in entries(folder)
    ]


def damaged(rows: Sequence[Row], seed: int) -> tuple[list[Row], dict[int, str]]:
    """The rows with some damaged, and which are (from 1) in which way. All answers of a row are damaged alike."""
    draw, found, kinds = random.Random(seed), list(rows), list(KINDS)
    places = draw.sample(range(len(rows)), round(len(rows) * DAMAGED))
    told = {place: kinds[i % len(kinds)] for i, place in enumerate(places)}
    for place, kind in told.items():
        other = [turn["content"] for turn in draw.choice(rows)["messages"] if turn["role"] == "assistant"]
        turns = []
        for turn in rows[place]["messages"]:
            if turn["role"] == "assistant":
                text = draw.choice(other) if kind == "answer to another question" else turn["content"]
                turn = {**turn, "content": KINDS[kind](text, draw)}
            turns.append(turn)
        found[place] = {"messages": turns}
    return found, {place + 1: kind for place, kind in told.items()}


def scores(root: Path, rows: Sequence[Row], name: str) -> dict[int, float]:
    """Row → its score, of all rows that have one."""
    path = written(root / f"{name}.jsonl", rows)
    align(
        root, "stage=data", f"stage.sources=[{{path: '{path}'}}]", "stage.clean=[]", "stage.duplicates.exact=false",
        "stage.duplicates.near=null", "stage.contamination.test=false", "model=pocket", "device=cpu",
        "stage.score.by=loss", f"run.name={name}", "data.on_bad_row=skip",
    )  # fmt: skip
    tables = [pq.read_table(file, columns=["row", "score"])
              for file in (root / "data" / name / "artifact").glob("*.parquet")]  # fmt: skip
    pairs = [pair for table in tables for pair in zip(*(column.to_pylist() for column in table.columns), strict=True)]
    return {row: score for row, score in pairs if score is not None}


def counted(scores: Mapping[int, float], told: Mapping[int, str]) -> dict[str, Any]:
    """At each end: how many rows are dropped, how many of them are damaged, and which share of each kind is."""
    order, found = sorted(scores, key=lambda row: (scores[row], row)), dict[str, Any]()
    for end, (low, high) in ENDS.items():
        first, last = round(low * len(order)), round(high * len(order))
        dropped = {*order[:first], *order[last:]}
        by_kind = {
            kind: sum(row in dropped for row, of in told.items() if of == kind) / list(told.values()).count(kind)
            for kind in KINDS
        }
        found[end] = {"dropped": len(dropped), "damaged": len(dropped & told.keys()), "by_kind": by_kind}
    return found


def format_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of README.md: means over the seeds."""
    lines = [f"| rows | dropped | damaged among these | {' | '.join(KINDS)} |", "| --- " * (3 + len(KINDS)) + "|"]
    for source, by_seed in found.items():
        for end in ENDS:
            each = [of[end] for of in by_seed.values()]
            share = statistics.mean(of["damaged"] / of["dropped"] for of in each)
            kinds = [statistics.mean(of["by_kind"][kind] for of in each) for kind in KINDS]
            lines.append(f"| {source} | {end} | {share:.0%} | {' | '.join(f'{kind:.0%}' for kind in kinds)} |")
    return "\n".join(lines)


def measure() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jargon", type=Path, help="the folder with jargon.index and jargon.dict.dz")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--save", type=Path, default=HERE / "scores.json")
    given = parser.parse_args()
    sources = {"Jargon File": jargon(given.jargon), "chats": chats()}
    found: dict[str, Any] = {source: {} for source in sources}
    with tempfile.TemporaryDirectory() as folder:
        for seed in map(int, given.seeds.split(",")):
            for source, rows in sources.items():
                began, (worse, told) = time.perf_counter(), damaged(rows, seed)
                found[source][seed] = counted(scores(Path(folder), worse, f"{source.split()[0]}-{seed}"), told)
                took = time.perf_counter() - began
                print(f"{source}, seed {seed}: {len(rows):,} rows, {took:.0f} s: {found[source][seed]}", flush=True)
                given.save.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n" + format_table(found))


if __name__ == "__main__":
    measure()
