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
from workshop import Workshop

from align.config.compose import check, compose_raw
from align.config.root import plain


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chats(name: str, count: int) -> list[dict[str, Any]]:
    first = sum(map(ord, name)) * 1000
    return [
        {"prompt": f"{name} {i}?", "completion": sentence(random.Random(first + i), first + i)} for i in range(count)
    ]


@pytest.mark.parametrize(
    ("weights", "more"),
    [
        ((0.2, 0.8), ()),
        ((0.2, 0.8), ("stage.mix.repeat=4",)),
        ((0.7, 0.3), ("stage.mix.repeat=3", "stage.mix.total=1000")),
    ],
)
def test_a_loader_gets_the_shares_that_were_asked_for(
    weights: tuple[float, float], more: tuple[str, ...], tmp_path: Path
) -> None:
    """Of the published folder, as `datasets` loads it, with every row repeated about as often as another of its
    source."""
    given = [
        f"{{path: {write(tmp_path / f'{name}.jsonl', chats(name, 300))}, weight: {weight}}}"
        for name, weight in zip("ab", weights, strict=True)
    ]
    words = ["stage=data", f"stage.sources=[{', '.join(given)}]", f"run.root={tmp_path / 'runs'}", *more]
    folder, data, _ = made(tmp_path, *words, "stage.duplicates.near=null", "stage.contamination.near=null")
    loaded = datasets.load_dataset(str(folder / "artifact"), cache_dir=str(tmp_path / "cache"))["train"]
    counts = Counter(loaded["source"])
    for name, weight in zip("ab", weights, strict=True):
        assert counts[name] / len(loaded) == pytest.approx(weight, abs=0.01)
        times = Counter(id for id, source in zip(loaded["content_id"], loaded["source"], strict=True) if source == name)
        assert max(times.values()) - min(times.values()) <= 1 or len(times) < 280
    side = data["splits"]["train"]
    assert (side["rows"], side["distinct"]) == (len(loaded), len({*loaded["content_id"]}))
    assert (side["rows"] > side["distinct"]) == bool(more)
    again = made(tmp_path, *words, "stage.duplicates.near=null", "stage.contamination.near=null", "run.name=again")[1]
    assert again["root"] == data["root"]


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


@pytest.mark.parametrize("columns", ["", "columns: {prompt: ask, completion: say}, "])
def test_a_long_column_that_nothing_reads_ends_the_stage_once(columns: str, tmp_path: Path) -> None:
    note = "the shop opens at nine and closes at six, but for Sundays"
    rows = [{**row, "note": f"{i}: {note}"} for i, row in enumerate(chats("a", 40))]
    if columns:
        rows = [{"ask": row["prompt"], "say": row["completion"], "note": row["note"]} for row in rows]
    path = write(tmp_path / "a.jsonl", rows)
    shop = Workshop(tmp_path / "runs", tmp_path)
    words = ["stage=data", f"run.root={tmp_path / 'runs'}"]
    assert shop.ended(*words, f"stage.sources=[{{{columns}path: {path}}}]", "data.on_bad_row=skip") == 2
    assert shop.said.count("column 'note' holds text") == 1
    assert "metadata: [note]" in shop.said
    told = "columns: {prompt: ask, completion: say, context: note}" if columns else "columns: {context: note}"
    assert told in shop.said
    assert shop.ended(*words, f"stage.sources=[{{{columns}metadata: [note], path: {path}}}]") == 0, shop.said


def test_files_and_jsonl_are_one_choice() -> None:
    words = ["stage=sft", "model=pocket", "data.path=a.csv", "data.metadata=[note]"]
    named, alias = (plain(check(compose_raw([*words, f"data={name}"]))) for name in ("files", "jsonl"))
    assert named == alias
