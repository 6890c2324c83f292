"""Settings of `stage=data` decide which rows are published, and on which side."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from data_sets import build_data_set, build_question_row, draw_sentence, write_three_sources
from json_lines import write_rows

from align.core.types import Conversation
from align.data.sets.published import load_data_set


def write_two_sources(folder: Path) -> list[str]:
    """Write `a` with ten rows, one of them twice, and `b` with four of these and a near-duplicate of a fifth. Return
    the command."""
    draw = random.Random(2)
    rows = [build_question_row(f"Which way is {i}?", draw_sentence(draw, i)) for i in range(10)]
    near_duplicate = build_question_row("Which way is 5?", rows[5]["messages"][1]["content"] + " indeed")
    write_rows(folder / "a.jsonl", [*rows, rows[0]])
    write_rows(folder / "b.jsonl", [*rows[:4], near_duplicate])
    sources = f"[{{path: {folder / 'a.jsonl'}}}, {{path: {folder / 'b.jsonl'}}}]"
    return ["stage=data", f"stage.sources={sources}", f"run.root={folder / 'runs'}", "data.held_out=0"]


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ([], {"a": 10, "b": 0}),
        (["stage.duplicates.prefer=[b]"], {"a": 5, "b": 5}),
        (["stage.duplicates.among=within"], {"a": 10, "b": 5}),
        (["stage.duplicates.among=across"], {"a": 11, "b": 0}),
        (["stage.duplicates.near=null"], {"a": 10, "b": 1}),
        (["stage.duplicates.exact=false"], {"a": 10, "b": 0}),
        (["stage.duplicates.exact=false", "stage.duplicates.near=null"], {"a": 11, "b": 5}),
        (["stage.duplicates.over=answers"], {"a": 10, "b": 0}),
        (["stage.duplicates.over=prompts"], {"a": 10, "b": 0}),
        (["stage.duplicates.near=0.99"], {"a": 10, "b": 1}),
        (["stage.duplicates.action=report"], {"a": 11, "b": 5}),
    ],
)
def test_which_duplicate_survives(tmp_path: Path, words: list[str], kept: dict[str, int]) -> None:
    folder, data, _ = build_data_set(tmp_path, *write_two_sources(tmp_path), *words)
    assert {source["name"]: source["splits"]["train"]["rows"] for source in data["sources"]} == kept
    if "stage.duplicates.action=report" in words:
        manifest = json.loads((folder / "manifest.json").read_text())
        assert (manifest["metrics"]["exact_duplicates"], manifest["metrics"]["near_duplicates"]) == (5, 1)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["stage.duplicates.near=null"],
        ["stage.duplicates.near=0.99"],
        ["stage.duplicates.over=prompts"],
        ["stage.duplicates.among=within"],
        ["stage.duplicates.action=report"],
    ],
    ids=lambda words: (words or ["as it is"])[0],
)
def test_no_row_to_train_on_nearly_is_one_to_measure_on(tmp_path: Path, words: list[str]) -> None:
    """Train and test rows are compared whichever duplicates were removed before. Rows are too short to share a run of
    13 words, and differ in their last word."""
    draw = random.Random(4)
    lines = [" ".join(draw.choices([f"word{i}" for i in range(500)], k=11)) for _ in range(40)]
    for part in ("train", "dev"):
        rows = [
            {"prompt": f"{part}{i} {line[:40]}", "completion": f"{line[41:]} {part}", "split": part}
            for i, line in enumerate(lines)
        ]
        write_rows(tmp_path / f"{part}.jsonl", rows)
    sources = f"[{tmp_path / 'train.jsonl'}, {tmp_path / 'dev.jsonl'}, {tmp_path / 'other.jsonl'}]"
    write_rows(
        tmp_path / "other.jsonl", [{**build_question_row("Who is it?", "Nobody that you know"), "split": "train"}]
    )
    folder, _, _ = build_data_set(
        tmp_path,
        "stage=data",
        f"stage.sources={sources}",
        f"run.root={tmp_path / 'runs'}",
        "stage.split.by=column",
        "stage.duplicates.exact=false",
        *words,
    )
    rows = load_data_set(folder / "artifact")
    train, test = ([extract_trigrams(record) for record in rows.load_records(side)] for side in ("train", "test"))
    assert len(train) > 0
    assert len(test) >= 1
    assert max(len(a & b) / len(a | b) for a in train for b in test) < 0.7


def extract_trigrams(record: Conversation) -> set[tuple[str, ...]]:
    """Return the runs of three words in all messages."""
    words = " ".join(message.content for message in record.messages).split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def read_test_questions(root: Path, *arguments: str) -> set[str]:
    """Make a data set of `rows.jsonl`, and return the questions of its test side."""
    source = f"stage.sources=[{root / 'rows.jsonl'}]"
    folder, _, _ = build_data_set(root, "stage=data", source, f"run.root={root / 'runs'}", *arguments)
    records = load_data_set(folder / "artifact").load_records("test")
    return {record.messages[0].content for record in records if isinstance(record, Conversation)}


def test_sides_by_time_and_by_column(tmp_path: Path) -> None:
    draw = random.Random(3)
    rows = [
        {
            "prompt": f"Is it {i}?",
            "completion": draw_sentence(draw, i),
            "created_at": f"2026-11-{i + 1:02d}",
            "part": "dev" if i % 3 == 0 else "train",
            "group_id": f"g{i // 2}",
        }
        for i in range(12)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    late_questions = read_test_questions(tmp_path, "stage.split.by=time", "stage.split.since=2026-11-10")
    assert late_questions == {f"Is it {i}?" for i in (8, 9, 10, 11)}  # 9 is late, and 8 is in its group
    dev_questions = read_test_questions(tmp_path, "stage.split.by=column", "stage.split.column=part")
    assert dev_questions == {f"Is it {i}?" for i in (0, 1, 2, 3, 6, 7, 8, 9)}  # 0, 3, 6 and 9, and their groups


def test_tokens_are_those_of_the_model(tmp_path: Path, tiny_model: Path) -> None:
    folder = write_three_sources(tmp_path)
    command = [
        "stage=data",
        f"stage.sources=[{folder / 'general.parquet'}, {{path: {folder / 'support.jsonl'}, weight: 0.2}}]",
        f"run.root={folder / 'runs'}",
        "stage.mix.by=tokens",
        "model=hub",
        f"model.path={tiny_model}",
    ]
    data = build_data_set(folder, *command)[1]
    assert {source["name"]: source["got"] for source in data["sources"]}["support"] == pytest.approx(0.2, abs=0.02)


def test_what_min_hash_does_not_find_below_its_best_is_found_between_the_sides(tmp_path: Path) -> None:
    draw = random.Random(6)
    rows: dict[str, list[dict[str, str]]] = {"train": [], "dev": []}
    for i in range(80):
        words = [f"word{draw.randrange(5000)}" for _ in range(26)]
        for part, part_rows in rows.items():
            varied = [f"{part}{i}x{at}" if at in (6, 13, 20) else word for at, word in enumerate(words)]
            part_rows.append({"prompt": f"{part}{i}", "completion": " ".join(varied), "split": part})
    # The Jaccard similarity of each pair is 0.43.
    paths = [str(write_rows(tmp_path / f"{part}.jsonl", part_rows)) for part, part_rows in rows.items()]
    for setting, finds_all in (("stage.contamination.test=false", False), ("stage.contamination.test=true", True)):
        folder, _, _ = build_data_set(
            tmp_path,
            "stage=data",
            f"stage.sources=[{', '.join(paths)}]",
            "stage.split.by=column",
            f"run.root={tmp_path / 'runs'}",
            "stage.duplicates.near=0.4",
            "stage.contamination.near=0.4",
            setting,
        )
        data_set = load_data_set(folder / "artifact")
        train, test = (
            [extract_trigrams(record) for record in data_set.load_records(side)] for side in ("train", "test")
        )
        highest_overlap = max((len(a & b) / len(a | b) for a in train for b in test), default=0)
        assert len(test) > 5
        assert (highest_overlap < 0.4) == finds_all
