"""Rows of templates in `stage=data`, warnings of steps that remove much, and the report's pictures."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from data_sets import build_data_set, build_question_row
from json_lines import write_rows

from align.report.figure_text import format_percent

SHARED = " ".join(f"instruct{a}{b}" for a in "abcdefgh" for b in "klmnopq")
WORDS = [a + b for a in ("ka", "lo", "mi", "ru", "te", "so", "pa") for b in ("bor", "len", "mar", "tis", "von", "zel")]


def write_templated_rows(folder: Path, rows: int = 120) -> str:
    """Write rows of one instruction and eight random words, with a copy of every tenth row, and return the path."""
    draw = random.Random(0)
    originals = [
        build_question_row(f"{SHARED} {' '.join(draw.choices(WORDS, k=8))}", draw.choice(WORDS)) for _ in range(rows)
    ]
    copies = [
        build_question_row(row["messages"][0]["content"].replace(" ", ", ", 3).title(), row["messages"][1]["content"])
        for row in originals[::10]
    ]
    return str(write_rows(folder / "rows.jsonl", [*originals, *copies]))


def build_rows(count: int) -> list[dict[str, Any]]:
    """Return conversations of random words."""
    draw = random.Random(1)
    conversations = list[dict[str, Any]]()
    for _ in range(count):
        question, answer = (" ".join(draw.choices(WORDS, k=word_count)) for word_count in (6, 9))
        conversations.append(build_question_row(f"Where is {question}?", answer))
    return conversations


def test_rows_of_one_instruction_lose_their_copies_alone(tmp_path: Path) -> None:
    arguments = [
        "stage=data",
        f"stage.sources=[{write_templated_rows(tmp_path)}]",
        f"run.root={tmp_path / 'runs'}",
        "data.held_out=0",
    ]
    _, data, stdout = build_data_set(tmp_path, *arguments)
    assert data["found"]["near_duplicates"] == 12
    assert data["splits"]["train"]["rows"] == 120
    assert "warning" not in stdout


@pytest.mark.parametrize("setting", ["over=prompts", "near=null"])
def test_rows_of_one_instruction_stay_on_both_sides(tmp_path: Path, setting: str) -> None:
    """Training rows that share the instruction with test rows are no leaks; copies of test rows are."""
    sources = f"stage.sources=[{write_templated_rows(tmp_path)}]"
    arguments = ["stage=data", sources, f"run.root={tmp_path / 'runs'}", "data.held_out=0.2"]
    arguments += ["stage.duplicates.exact=false", f"stage.duplicates.{setting}"]
    _, data, _ = build_data_set(tmp_path, *arguments)
    assert data["splits"]["test"]["rows"] >= 10
    assert data["found"]["shared_with_test"] <= 12
    assert data["splits"]["train"]["rows"] >= 80


def test_a_step_that_removes_much_is_warned_of_first_with_examples_and_the_setting(tmp_path: Path) -> None:
    rows = build_rows(60)
    rows[0]["messages"][1]["content"] += " write to anna@example.com or to somebody else"
    all_rows = [*rows, *rows[:20], *(build_question_row(f"What is {word}?", "short") for word in WORDS[:30])]
    clean = "stage.clean=[{length: {least: 6, by: words}}, {pii: {kinds: [email]}}]"
    path = write_rows(tmp_path / "rows.jsonl", all_rows)
    arguments = ["stage=data", f"stage.sources=[{{path: {path}, cap: 40}}]", clean, f"run.root={tmp_path / 'runs'}"]
    folder, _, stdout = build_data_set(tmp_path, *arguments)
    lines = stdout.splitlines()
    warnings = [line for line in lines if "warning: rows: " in line]
    dropped = "step length of stage.clean removed 30 of 110 rows"
    length_warning = f"warning: rows: {dropped} ({format_percent(30 / 110)}). Setting: loosen"
    dropped = "exact duplicates removed 20 of 80 rows"
    exact_warning = f"warning: rows: {dropped} ({format_percent(0.25)}). Setting: stage.duplicates.exact="
    cap_warning = (
        f"warning: rows: over the cap removed 20 of 60 rows ({format_percent(1 / 3)}). Setting: the source's cap"
    )
    for warning, start in zip(warnings, 2 * (length_warning, exact_warning, cap_warning), strict=True):
        assert warning.strip().startswith(start)
    examples = [i for i, line in enumerate(lines) if line.startswith("  for example: ")]
    assert len(examples) == 9
    assert [lines[i - 1].startswith("warning") for i in examples[::3]] == [True] * 3  # each after its warning
    summary = next(i for i, line in enumerate(lines) if line.startswith("  rows: 110 read"))
    assert all(line.startswith("  warning: ") for line in lines[summary - 3 : summary])  # first of the summary
    assert "anna@example.com" not in stdout
    assert "[EMAIL]" in stdout
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "Warning: rows: exact duplicates removed 20 of 80 rows" in report
    assert "anna@example.com" not in report


def test_many_skipped_rows_are_warned_of(tmp_path: Path) -> None:
    rows = [build_question_row(f"What is {word}?", f"{word} is a word") for word in WORDS]
    rows += [build_question_row(f"Is {word}?", "") for word in WORDS[:20]]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = ["stage=data", f"stage.sources=[{path}]", f"run.root={tmp_path / 'runs'}", "data.on_bad_row=skip"]
    _, _, stdout = build_data_set(tmp_path, *arguments)
    removed = f"rows that cannot be read removed 20 of 62 rows ({format_percent(20 / 62)})"
    assert f"warning: rows: {removed}. Setting: data.on_bad_row=skip" in stdout


def test_a_step_that_removes_a_fifth_is_not_warned_of(tmp_path: Path) -> None:
    rows = build_rows(40)
    path = write_rows(tmp_path / "rows.jsonl", [*rows, *rows[:10]])
    _, data, stdout = build_data_set(tmp_path, "stage=data", f"stage.sources=[{path}]", f"run.root={tmp_path / 'runs'}")
    assert data["found"]["exact_duplicates"] == 10
    assert "warning" not in stdout


def test_the_report_draws_what_was_removed_the_sources_and_their_lengths(tmp_path: Path) -> None:
    path = write_templated_rows(tmp_path)
    sources = f"stage.sources=[{{path: {path}, name: support}}, {{data: chitchat, weight: 0.3}}]"
    folder, _, _ = build_data_set(tmp_path, "stage=data", sources, f"run.root={tmp_path / 'runs'}")
    report = (folder / "report.html").read_text(encoding="utf-8")
    alts = re.findall(r'alt="([^"]*)"', report)
    removed = next(alt for alt in alts if alt.startswith("Bars of the rows that each step removed, by source: "))
    assert "near-duplicates 12" in removed
    rows = next(alt for alt in alts if alt.startswith("Bars of the rows of each source: support "))
    assert "chitchat" in rows
    assert any(alt.startswith("Bars of the characters of each source: support ") for alt in alts)
    lengths = next(alt for alt in alts if alt.startswith("Histogram of the characters of rows, by source: "))
    assert "from 512 to 1,023" in lengths
