"""The sums of `recipes/arithmetic`: training and evaluation share none, and the checks accept only right answers."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

from align.data.sources import DataSource, read_source_prompts
from align.reward.check import CheckReward

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "arithmetic"


def prepare_data(folder: Path, seed: int) -> dict[str, list[dict[str, Any]]]:
    runpy.run_path(str(RECIPE / "prepare.py"))["main"](folder, seed)
    files = sorted(folder.glob("*.jsonl"))
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


def extract_addends(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(sorted(map(int, re.findall(r"\d+", row["prompt"]))))


def test_no_sum_is_in_two_files_whichever_way_round(tmp_path: Path) -> None:
    parts = prepare_data(tmp_path / "a", 0)
    assert sorted(parts) == ["held_out", "practised", "taught"]
    pairs = [{extract_addends(row) for row in rows} for rows in parts.values()]
    assert sum(map(len, pairs)) == len(set.union(*pairs)) == 210
    assert sum(map(len, parts.values())) == 400
    assert all(len(rows) >= 100 for rows in parts.values())
    assert prepare_data(tmp_path / "b", 0) == parts
    assert prepare_data(tmp_path / "c", 1) != parts


def test_the_checks_take_the_sum_and_nothing_else(tmp_path: Path) -> None:
    prepare_data(tmp_path, 0)
    for part in ("practised", "held_out"):
        prompts = read_source_prompts(DataSource("jsonl", str(tmp_path / f"{part}.jsonl")), "train")
        sums = [sum(extract_addends({"prompt": prompt.messages[-1].content})) for prompt in prompts]
        right_answers = [prompt.with_answer(str(total)) for prompt, total in zip(prompts, sums, strict=True)]
        assert CheckReward().score(right_answers).mean() == 1
        wrong_formats = ["{}.", "{} {}", "It is {}", "0{}", ""]
        wrong_answers = [
            prompt.with_answer(text.format(total, total + 1))
            for prompt, total in zip(prompts, sums, strict=True)
            for text in wrong_formats
        ]
        assert CheckReward().score(wrong_answers).sum() == 0
    rows = [json.loads(line) for line in (tmp_path / "taught.jsonl").read_text().splitlines()]
    assert all(int(row["completion"]) == sum(extract_addends(row)) for row in rows)
