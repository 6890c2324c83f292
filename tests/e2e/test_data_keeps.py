"""Content of a data set's files: the requested mixture, and every column of the sources."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from data_sets import build_data_set, draw_sentence
from json_lines import write_rows

from align.config.compose import build_config, compose_tree
from align.config.root import to_plain_dict


def build_rows(name: str, count: int) -> list[dict[str, Any]]:
    first_seed = sum(map(ord, name)) * 1000
    return [
        {"prompt": f"{name} {i}?", "completion": draw_sentence(random.Random(first_seed + i), first_seed + i)}
        for i in range(count)
    ]


def test_a_loader_gets_the_shares_that_were_asked_for(tmp_path: Path) -> None:
    """`datasets` loads the published folder with the requested shares. All rows of a source are repeated about equally
    often."""
    weights = {"a": 0.7, "b": 0.3}
    sources = [
        f"{{path: {write_rows(tmp_path / f'{name}.jsonl', build_rows(name, 300))}, weight: {weight}}}"
        for name, weight in weights.items()
    ]
    arguments = ["stage=data", f"stage.sources=[{', '.join(sources)}]", f"run.root={tmp_path / 'runs'}"]
    arguments += [
        "stage.mix.repeat=3",
        "stage.mix.total=1000",
        "stage.duplicates.near=null",
        "stage.contamination.near=null",
    ]
    folder, data, _ = build_data_set(tmp_path, *arguments)
    loaded = datasets.load_dataset(str(folder / "artifact"), cache_dir=str(tmp_path / "cache"))["train"]
    for name, weight in weights.items():
        ids = [id for id, source in zip(loaded["content_id"], loaded["source"], strict=True) if source == name]
        counts = Counter(ids).values()
        assert len(ids) / len(loaded) == pytest.approx(weight, abs=0.01)
        assert max(counts) - min(counts) <= 1 or len(counts) < 280
    train_counts = data["splits"]["train"]
    assert train_counts["rows"] == len(loaded) > train_counts["distinct"] == len({*loaded["content_id"]})
    assert build_data_set(tmp_path, *arguments, "run.name=again")[1]["root"] == data["root"]


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
        for i, row in enumerate(build_rows("a", 40))
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    folder, data, stdout = build_data_set(
        tmp_path,
        "stage=data",
        f"stage.sources=[{{path: {path}}}]",
        f"run.root={tmp_path / 'runs'}",
        "stage.clean=[unicode, {pii: {action: mask}}]",
    )
    assert "a: columns kept as metadata: Topic, mail, stars, when" in stdout
    assert data["sources"][0]["metadata"] == ["Topic", "mail", "stars", "when"]
    published = [row for file in (folder / "artifact").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert len(published) == 40
    for row in published:
        i = row["row"] - 1
        metadata = {"Topic": "shops", "stars": i % 5, "when": {"day": i}, "mail": "[EMAIL]"}
        assert json.loads(row["metadata"]) == metadata
        assert row["messages"][0]["content"] == f"{rows[i]['prompt']}\nnote {i}"
    sources = f"stage.sources=[{{path: '{folder}/artifact/train-*.parquet'}}]"
    second_folder = build_data_set(tmp_path, "stage=data", sources, f"run.root={tmp_path / 'runs'}", "run.name=second")[
        0
    ]
    [file, *_] = (second_folder / "artifact").glob("train-*.parquet")
    cells = pq.read_table(file)["metadata"].to_pylist()
    assert all({"Topic", "stars", "when", "mail"} <= json.loads(cell).keys() for cell in cells)


def test_files_and_jsonl_are_one_choice() -> None:
    arguments = ["stage=sft", "model=pocket", "data.path=a.csv", "data.metadata=[note]"]
    files_config, jsonl_config = (
        to_plain_dict(build_config(compose_tree([*arguments, f"data={name}"]))) for name in ("files", "jsonl")
    )
    assert files_config == jsonl_config
