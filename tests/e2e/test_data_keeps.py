"""What is in the files of a data set: the mixture that was asked for, and every column of the sources."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from data_sets import made, sentence

from align.config.compose import build_config, compose_tree
from align.config.root import to_plain_dict


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chats(name: str, count: int) -> list[dict[str, Any]]:
    first = sum(map(ord, name)) * 1000
    return [
        {"prompt": f"{name} {i}?", "completion": sentence(random.Random(first + i), first + i)} for i in range(count)
    ]


def test_a_loader_gets_the_shares_that_were_asked_for(tmp_path: Path) -> None:
    """Of the published folder, as `datasets` loads it, with every row repeated about as often as another of its
    source."""
    weights = {"a": 0.7, "b": 0.3}
    given = [
        f"{{path: {write(tmp_path / f'{name}.jsonl', chats(name, 300))}, weight: {weight}}}"
        for name, weight in weights.items()
    ]
    words = ["stage=data", f"stage.sources=[{', '.join(given)}]", f"run.root={tmp_path / 'runs'}"]
    words += [
        "stage.mix.repeat=3",
        "stage.mix.total=1000",
        "stage.duplicates.near=null",
        "stage.contamination.near=null",
    ]
    folder, data, _ = made(tmp_path, *words)
    loaded = datasets.load_dataset(str(folder / "artifact"), cache_dir=str(tmp_path / "cache"))["train"]
    for name, weight in weights.items():
        ids = [id for id, source in zip(loaded["content_id"], loaded["source"], strict=True) if source == name]
        times = Counter(ids).values()
        assert len(ids) / len(loaded) == pytest.approx(weight, abs=0.01)
        assert max(times) - min(times) <= 1 or len(times) < 280
    side = data["splits"]["train"]
    assert side["rows"] == len(loaded) > side["distinct"] == len({*loaded["content_id"]})
    assert made(tmp_path, *words, "run.name=again")[1]["root"] == data["root"]


def test_columns_of_sources_are_in_the_data_set(tmp_path: Path) -> None:
    rows = [
        {
            **row,
            "context": f"note {i}",
            "Topic": "shops",
            "stars": i % 5,
            "when": {"day": i},
            "mail": f"ann{i}@example.org",
        }
        for i, row in enumerate(chats("a", 40))
    ]
    path = write(tmp_path / "a.jsonl", rows)
    folder, data, said = made(
        tmp_path, "stage=data", f"stage.sources=[{{path: {path}}}]", f"run.root={tmp_path / 'runs'}",
        "stage.clean=[unicode, {pii: {action: mask}}]",
    )  # fmt: skip
    assert "a: columns kept as metadata: Topic, mail, stars, when" in said
    assert data["sources"][0]["metadata"] == ["Topic", "mail", "stars", "when"]
    published = [row for file in (folder / "artifact").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert len(published) == 40
    for row in published:
        i = row["row"] - 1
        metadata = {"Topic": "shops", "stars": i % 5, "when": {"day": i}, "mail": "[EMAIL]"}
        assert json.loads(row["metadata"]) == metadata
        assert row["messages"][0]["content"] == f"{rows[i]['prompt']}\nnote {i}"
    again = f"stage.sources=[{{path: '{folder}/artifact/train-*.parquet'}}]"
    second = made(tmp_path, "stage=data", again, f"run.root={tmp_path / 'runs'}", "run.name=second")[0]
    [file, *_] = (second / "artifact").glob("train-*.parquet")
    kept = pq.read_table(file)["metadata"].to_pylist()
    assert all({"Topic", "stars", "when", "mail"} <= json.loads(one).keys() for one in kept)


def test_files_and_jsonl_are_one_choice() -> None:
    words = ["stage=sft", "model=pocket", "data.path=a.csv", "data.metadata=[note]"]
    named, alias = (to_plain_dict(build_config(compose_tree([*words, f"data={name}"]))) for name in ("files", "jsonl"))
    assert named == alias
