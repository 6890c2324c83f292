"""A store with votes, the command that builds a data set from them, and searches for traces of a forgotten text."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from data_sets import draw_sentence
from json_lines import write_rows
from sqlalchemy import create_engine, text

from align.annotate.store import Candidate, Judgement, Store
from align.core.types import Conversation, Message

SECRET = "Ottilie Grünberg lives at the old mill"
"""Text about one person."""


@contextmanager
def open_filled_store(store_url: str) -> Iterator[Store]:
    """Open a store with thirty items that ann ranked; bob ranked every third too. Item 4 holds `SECRET`."""
    with Store.open(store_url) as store:
        draw = random.Random(5)
        for i in range(30):
            answer = SECRET if i == 4 else draw_sentence(draw, i)
            prompt = Conversation((Message("user", f"What of day {i}?"),))
            answers = [Candidate(answer), Candidate(f"no {i}", ended=False)] + [Candidate(f"maybe {i}")] * (i % 2)
            item = store.add_item("greetings", f"run/{i}", prompt, answers)
            tiers = tuple((f"{item}-{k}",) for k in range(len(answers)))
            for annotator in ("ann@example.org", "bob")[: 1 + (i % 3 == 0)]:
                judgement = Judgement(
                    tiers if annotator != "bob" else tiers[::-1], strength=2 if len(answers) == 2 else 0
                )
                store.record("greetings", item, judgement, annotator=annotator, key=f"{len(annotator)}/{i}")
        yield store


def build_data_command(tmp_path: Path, store_url: str) -> list[str]:
    """Return the command that builds a data set from votes and from pairs in a file."""
    rows = [{"prompt": f"file {i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(40)]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    sources = f"[{{annotations: greetings}}, {{path: {path}, name: file}}]"
    return [
        "stage=data",
        f"stage.sources={sources}",
        f"store.url={store_url}",
        f"run.root={tmp_path / 'runs'}",
        "data.held_out=0.2",
    ]


def read_artifact_pairs(folder: Path) -> list[dict[str, Any]]:
    tables = [pq.read_table(path) for path in sorted((folder / "artifact").glob("*.parquet"))]
    return [row for table in tables for row in table.to_pylist()]


def encode_pair_canonically(row: dict[str, Any]) -> bytes:
    """Return the canonical JSON of a pair as docs/data.md defines it, without the code of `align`."""
    content = {part: row[part] for part in ("prompt", "chosen", "rejected")}
    content |= {name: False for name in ("chosen_ended", "rejected_ended") if row.get(name) is False}
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def find_files_with(where: Path, *needles: str) -> list[str]:
    """Return the files below a folder that hold one of these texts, compressed Parquet included."""
    matches = []
    for path in where.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            if path.suffix == ".parquet":
                data += json.dumps(pq.read_table(path).to_pylist(), ensure_ascii=False).encode()
            forms = [form for needle in needles for form in (needle, json.dumps(needle)[1:-1])]
            if any(form.encode() in data for form in forms):
                matches.append(str(path.relative_to(where)))
    return matches


def dump_database(url: str) -> str:
    """Return all rows of all tables of a database as text."""
    engine = create_engine(url)
    with engine.connect() as connection:
        listing = "SELECT name FROM sqlite_master WHERE type = 'table'"
        if "postgresql" in url:
            listing = "SELECT table_name FROM information_schema.tables WHERE table_schema = current_schema()"
        names = connection.execute(text(listing)).scalars().all()
        content = "\n".join(str(row) for name in names for row in connection.execute(text(f"SELECT * FROM {name}")))
    engine.dispose()
    return content


def build_forget_command(words: list[str], name: str, *more: str) -> list[str]:
    settings = [word for word in words if word.startswith(("run.root", "store.url"))]
    return ["stage=data", "stage.action=forget", f"data.path=data:{name}", *settings, *more]


def compute_merkle_root(leaves: list[bytes]) -> bytes:
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + compute_merkle_root(leaves[:k]) + compute_merkle_root(leaves[k:])).digest()


def compute_merkle_leaves(folder: Path, side: str) -> list[bytes]:
    """Compute the leaves of a split from its files: its rows, and the tombstones that `data.json` lists."""
    data = json.loads((folder / "data.json").read_text())
    tables = [pq.read_table(path) for path in sorted(folder.glob(f"{side}-*.parquet"))]
    leaves = [
        bytes.fromhex(row["content_id"]) + (1).to_bytes(4, "big") for table in tables for row in table.to_pylist()
    ]
    for position, tombstone in data["splits"][side].get("forgotten", []):
        leaves.insert(position, bytes.fromhex(tombstone))
    return leaves


def find_secret_ids(folder: Path) -> list[str]:
    return [row["content_id"] for row in read_artifact_pairs(folder) if SECRET in json.dumps(row, ensure_ascii=False)]
