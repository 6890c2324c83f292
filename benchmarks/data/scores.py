"""Count how many of the rows that a score drops are damaged, with `stage.score.by=loss` of the built-in model, on real
rows with 10 % damaged ones.

    apt-get download dict-jargon && dpkg -x dict-jargon_*.deb jargon
    python benchmarks/data/scores.py jargon/usr/share/dictd [--seeds 0,1,2] [--save benchmarks/data/scores.json]

Two sources: the Jargon File (see `ratio.py`), whose topics are new to the model, and chats that it was not trained on
(`data=chitchat`, part `test`). One row in ten of each is damaged, with equal numbers of each kind of damage.
`stage=data` writes the scores of all rows. Then 10 % are dropped, the highest, the lowest, or half from either end, and
the damaged rows among them are counted. Random rows would have 10 % damaged ones.
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
from ratio import read_jargon_file, run_align, write_rows

from align.data import chitchat

HERE = Path(__file__).resolve().parent
DAMAGED_SHARE = 0.1
Row = dict[str, Any]


def decode_wrongly(text: str, draw: random.Random) -> str:
    return text.replace("e", "é").replace("'", "’").encode().decode("cp1252", "replace")


def shuffle_words(text: str, draw: random.Random) -> str:
    words = text.split()
    return " ".join(draw.sample(words, len(words)))


def repeat_beginning(text: str, draw: random.Random) -> str:
    return " ".join(text.split()[:4] * 12)


def add_page_remains(text: str, draw: random.Random) -> str:
    return f"Skip to content. Accept all cookies. {text} Sign up for our newsletter. All rights reserved."


def keep_text(text: str, draw: random.Random) -> str:
    """Return the text, which is the answer to another question already."""
    return text


DAMAGES: Mapping[str, Callable[[str, random.Random], str]] = {
    "decoded wrongly": decode_wrongly,
    "words shuffled": shuffle_words,
    "repeated": repeat_beginning,
    "remains of a page": add_page_remains,
    "answer to another question": keep_text,
}
CUTS: Mapping[str, tuple[float, float]] = {
    "the highest 10 %": (0.0, 0.9),
    "the lowest 10 %": (0.1, 1.0),
    "5 % at either end": (0.05, 0.95),
}
"""Cut → start and end of the kept rows, as shares of all rows in ascending order of their scores."""


def load_chats() -> list[Row]:
    return [{"messages": chat.as_dicts()} for chat in chitchat.load_conversations("test")]


def load_jargon(folder: Path) -> list[Row]:
    return [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in read_jargon_file(folder)
    ]


def damage_rows(rows: Sequence[Row], seed: int) -> tuple[list[Row], dict[int, str]]:
    """Damage some rows, and all answers of a row in the same way.

    Returns the rows, and the kind of damage of each damaged row by its number from 1.
    """
    draw = random.Random(seed)
    kinds = list(DAMAGES)
    damaged_rows = list(rows)
    indexes = draw.sample(range(len(rows)), round(len(rows) * DAMAGED_SHARE))
    damages = {index: kinds[i % len(kinds)] for i, index in enumerate(indexes)}
    for index, kind in damages.items():
        foreign_answers = [turn["content"] for turn in draw.choice(rows)["messages"] if turn["role"] == "assistant"]
        turns = []
        for turn in rows[index]["messages"]:
            if turn["role"] == "assistant":
                text = draw.choice(foreign_answers) if kind == "answer to another question" else turn["content"]
                turn = {**turn, "content": DAMAGES[kind](text, draw)}
            turns.append(turn)
        damaged_rows[index] = {"messages": turns}
    return damaged_rows, {index + 1: kind for index, kind in damages.items()}


def compute_scores(root: Path, rows: Sequence[Row], name: str) -> dict[int, float]:
    """Run `stage=data` with scores. Returns the score of each row that has one, by number of the row."""
    path = write_rows(root / f"{name}.jsonl", rows)
    run_align(
        root,
        "stage=data",
        f"stage.sources=[{{path: '{path}'}}]",
        "stage.clean=[]",
        "stage.duplicates.exact=false",
        "stage.duplicates.near=null",
        "stage.contamination.test=false",
        "model=pocket",
        "device=cpu",
        "stage.score.by=loss",
        f"run.name={name}",
        "data.on_bad_row=skip",
    )
    scores = {}
    for file in (root / "data" / name / "artifact").glob("*.parquet"):
        row_numbers, file_scores = (
            column.to_pylist() for column in pq.read_table(file, columns=["row", "score"]).columns
        )
        for row, score in zip(row_numbers, file_scores, strict=True):
            if score is not None:
                scores[row] = score
    return scores


def count_dropped(scores: Mapping[int, float], damage_by_row: Mapping[int, str]) -> dict[str, Any]:
    """Return for each cut how many rows are dropped, how many of them are damaged, and the share of each kind."""
    order = sorted(scores, key=lambda row: (scores[row], row))
    damages = list(damage_by_row.values())
    results: dict[str, Any] = {}
    for cut, (low, high) in CUTS.items():
        dropped = {*order[: round(low * len(order))], *order[round(high * len(order)) :]}
        by_kind = {
            kind: sum(row in dropped for row, damage in damage_by_row.items() if damage == kind) / damages.count(kind)
            for kind in DAMAGES
        }
        results[cut] = {"dropped": len(dropped), "damaged": len(dropped & damage_by_row.keys()), "by_kind": by_kind}
    return results


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results as the Markdown table of README.md, means over the seeds."""
    lines = [f"| rows | dropped | damaged among these | {' | '.join(DAMAGES)} |", "| --- " * (3 + len(DAMAGES)) + "|"]
    for source, by_seed in results.items():
        for cut in CUTS:
            counts = [by_cut[cut] for by_cut in by_seed.values()]
            share = statistics.mean(count["damaged"] / count["dropped"] for count in counts)
            kinds = [statistics.mean(count["by_kind"][kind] for count in counts) for kind in DAMAGES]
            lines.append(f"| {source} | {cut} | {share:.0%} | {' | '.join(f'{kind:.0%}' for kind in kinds)} |")
    return "\n".join(lines)


def run_benchmark() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jargon", type=Path, help="the folder with jargon.index and jargon.dict.dz")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--save", type=Path, default=HERE / "scores.json")
    options = parser.parse_args()
    sources = {"Jargon File": load_jargon(options.jargon), "chats": load_chats()}
    results: dict[str, Any] = {source: {} for source in sources}
    with tempfile.TemporaryDirectory() as folder:
        for seed in map(int, options.seeds.split(",")):
            for source, rows in sources.items():
                start = time.perf_counter()
                damaged_rows, damage_by_row = damage_rows(rows, seed)
                scores = compute_scores(Path(folder), damaged_rows, f"{source.split()[0]}-{seed}")
                results[source][seed] = count_dropped(scores, damage_by_row)
                seconds = time.perf_counter() - start
                print(
                    f"{source}, seed {seed}: {len(rows):,} rows, {seconds:.0f} s: {results[source][seed]}", flush=True
                )
                options.save.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n" + format_table(results))


if __name__ == "__main__":
    run_benchmark()
