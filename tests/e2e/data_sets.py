"""Sources with planted duplicates, and data sets built from them."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from json_lines import write_rows
from stage_commands import Workshop

WORDS = [
    "lamp",
    "table",
    "window",
    "river",
    "stone",
    "garden",
    "winter",
    "letter",
    "kitchen",
    "corner",
    "silver",
    "paper",
]


def draw_sentence(draw: random.Random, number: int) -> str:
    """Return random words that end in the number, so that two numbers' texts share no word."""
    return " ".join(f"{word}{number}" for word in draw.choices(WORDS, k=30))


def build_support_rows(rows: int = 120) -> list[dict[str, Any]]:
    """Build conversations: every tenth has a copy, every fifteenth a near-duplicate."""
    draw = random.Random(0)
    conversations = []
    for i in range(rows):
        question = f"Where is the {WORDS[i % 12]} number {i}?"
        answer = draw_sentence(draw, i)
        conversations.append(build_question_row(question, answer))
        if i % 10 == 0:
            conversations.append(build_question_row(question.upper(), f"  {answer} "))
        if i % 15 == 0:
            conversations.append(build_question_row(question, f"{answer} indeed"))
    return conversations


def build_question_row(asked: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def write_three_sources(tmp_path: Path) -> Path:
    """Write three sources in three formats and an evaluation set to a folder. Returns the folder."""
    write_rows(tmp_path / "support.jsonl", build_support_rows())
    draw = random.Random(1)
    general = [{"prompt": f"Tell me of day {i}", "completion": draw_sentence(draw, 1000 + i)} for i in range(200)]
    pq.write_table(pa.Table.from_pylist(general), tmp_path / "general.parquet")
    with (tmp_path / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["question", "answer"])
        table.writerows([f"Is shop {i} open?", draw_sentence(draw, 2000 + i)] for i in range(50))
    write_rows(tmp_path / "evals.jsonl", [general[5], {"prompt": "Is shop 7 open?"}])
    return tmp_path


def build_sources_command(here: Path, *more: str) -> list[str]:
    entries = ["{path: %s}" % (here / "support.jsonl"), "{path: %s}" % (here / "general.parquet")]
    return ["stage=data", f"stage.sources=[{', '.join([*entries, *more])}]", f"run.root={here / 'runs'}"]


def build_data_set(here: Path, *words: str) -> tuple[Path, dict[str, Any], str]:
    """Build a data set. Returns its folder, the content of its `data.json`, and the output of the command."""
    shop = Workshop(here / "runs", here)
    assert shop.run_command(*words) == 0, shop.output
    folder = Path(shop.output.splitlines()[-1])
    return folder, json.loads((folder / "artifact" / "data.json").read_text()), shop.output
