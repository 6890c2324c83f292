"""Everyday uses of `stage=data`: forgetting twice, a data set as a source, no rows left, and the name in a report."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import datasets
import pytest
from data_sets import build_data_set, build_question_row, build_support_rows, draw_sentence
from json_lines import write_rows
from stage_commands import Workshop
from vote_data import build_data_command, build_forget_command, read_artifact_pairs

from align.annotate.store import Store
from align.run.folder import lock_folder


def test_two_that_forget_rows_of_one_data_set(tmp_path: Path) -> None:
    arguments = [
        "stage=data",
        f"stage.sources=[{write_rows(tmp_path / 'a.jsonl', build_support_rows(40))}]",
        f"run.root={tmp_path / 'runs'}",
    ]
    old, _, _ = build_data_set(tmp_path, *arguments, "run.name=old")
    content_id = read_artifact_pairs(old)[0]["content_id"]
    shop = Workshop(tmp_path / "runs", tmp_path)
    command = build_forget_command(arguments, "old", f"stage.forget=[{content_id}]", "run.name=new")
    lock = lock_folder(old)  # as another command holds it
    try:
        shop.refuses(*command, says="another command is forgetting rows of it")
        assert len(read_artifact_pairs(old)) > 0
    finally:
        os.close(lock)
    assert shop.run_command(*command) == 0, shop.output
    assert content_id not in {row["content_id"] for row in read_artifact_pairs(tmp_path / "runs" / "data" / "new")}


@pytest.mark.parametrize(("held_out", "side"), [("0", "train"), ("1", "test")])
def test_a_data_set_of_one_side_is_read_by_datasets(tmp_path: Path, held_out: str, side: str) -> None:
    arguments = [
        f"stage.sources=[{write_rows(tmp_path / 'a.jsonl', build_support_rows(20))}]",
        f"run.root={tmp_path / 'runs'}",
    ]
    folder, data, _ = build_data_set(tmp_path, "stage=data", *arguments, f"data.held_out={held_out}")
    splits = datasets.load_dataset(str(folder / "artifact"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(splits[name]) for name in splits} == {side: data["splits"][side]["rows"]}


def test_a_data_set_is_a_source_of_another(tmp_path: Path) -> None:
    """One side is read with the same ids. A data set with two sides is refused with the remedy."""
    draw = random.Random(4)
    rows = build_support_rows(40)
    rows += [{"text": draw_sentence(draw, 900)}]
    tool_chat = build_question_row("What time?", "Noon.")
    tool_call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "clock", "arguments": "{}"}}],
    }
    tool_chat["messages"][1:1] = [tool_call, {"role": "tool", "content": "12:00"}]
    rows.append({"tools": [{"name": "clock"}], **tool_chat})
    arguments = [f"stage.sources=[{write_rows(tmp_path / 'a.jsonl', rows)}]", f"run.root={tmp_path / 'runs'}"]
    full_set, first, _ = build_data_set(tmp_path, "stage=data", *arguments, "data.held_out=0", "run.name=whole")
    for source in (full_set, full_set / "artifact"):
        command = [f"stage.sources=[{source}]", arguments[1], "data.held_out=0"]
        _, second, _ = build_data_set(tmp_path, "stage=data", *command, f"run.name=again-{source.name}")
        assert second["ids_root"] == first["ids_root"]
    two_sides, _, _ = build_data_set(tmp_path, "stage=data", *arguments, "data.held_out=0.3", "run.name=halves")
    shop = Workshop(tmp_path / "runs", tmp_path)
    shop.refuses("stage=data", f"stage.sources=[{two_sides}]", arguments[1], says="is a data set with two splits")
    side = f"{two_sides / 'artifact'}/train-*.parquet"
    assert side in shop.output
    one_side, _, _ = build_data_set(
        tmp_path, "stage=data", f"stage.sources=['{side}']", arguments[1], "data.held_out=0", "run.name=one"
    )
    assert {row["content_id"] for row in read_artifact_pairs(one_side)} < {
        row["content_id"] for row in read_artifact_pairs(two_sides)
    }


def test_rows_of_votes_are_no_rows_of_a_file(vote_store: Store, store_url: str, tmp_path: Path) -> None:
    folder, _, _ = build_data_set(tmp_path, *build_data_command(tmp_path, store_url), "run.name=votes")
    shop = Workshop(tmp_path / "runs", tmp_path)
    sources = f"stage.sources=['{folder / 'artifact'}/train-*.parquet']"
    shop.refuses(
        "stage=data", sources, f"run.root={tmp_path / 'runs'}", says="Name the project: {annotations: PROJECT}"
    )


def test_nothing_is_left(tmp_path: Path) -> None:
    rows = [build_question_row(f"What of {i}?", draw_sentence(random.Random(i), i)) for i in range(8)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    shop = Workshop(tmp_path / "runs", tmp_path)
    arguments = ["stage=data", f"stage.sources=[{path}]", f"run.root={tmp_path / 'runs'}"]
    for held_out in ("data.held_out=0.1", "data.held_out=1"):
        shop.refuses(
            *arguments,
            f"stage.contamination.against=[{path}]",
            held_out,
            says=("all are like rows of stage.contamination.against", "stage.contamination.action=report"),
        )
    similar_rows = [build_question_row(f"Number {i}?", f"{draw_sentence(random.Random(7), 7)} {i}") for i in range(8)]
    arguments[1] = f"stage.sources=[{write_rows(tmp_path / 'b.jsonl', similar_rows)}]"
    shop.refuses(
        *arguments,
        "stage.duplicates.near=null",
        "data.held_out=0.3",
        says=("similar to test rows", "stage.contamination.test=false"),
    )


def test_a_report_names_a_data_set_as_its_user_did(tmp_path: Path, tiny_model: Path) -> None:
    arguments = [
        f"stage.sources=[{write_rows(tmp_path / 'a.jsonl', build_support_rows(20))}]",
        f"run.root={tmp_path / 'runs'}",
    ]
    build_data_set(tmp_path, "stage=data", *arguments, "run.name=mine")
    shop = Workshop(tmp_path / "runs", tmp_path)
    sft = [
        "stage=sft",
        "model=hub",
        f"model.path={tiny_model}",
        "method=lora",
        "device=cpu",
        "stage.epochs=1",
        arguments[1],
    ]
    assert shop.run_command(*sft, "data=manifest", "data.path=data:latest", "run.name=saw") == 0, shop.output
    assert "on data data:mine" in shop.output or "data data:mine" in shop.output
    folder = tmp_path / "runs" / "sft" / "saw"
    page = (folder / "report.html").read_text()
    assert "data.path=data:mine" in page
    assert str(tmp_path / "runs" / "data" / "mine") not in page
    assert json.loads((folder / "manifest.json").read_text())["inputs"]["data"]["ref"] == "data:mine"
    assert shop.run_command(*sft, "data=manifest", "data.path=data:mine", "run.name=saw") == 0, shop.output
    assert "finished already" in shop.output
