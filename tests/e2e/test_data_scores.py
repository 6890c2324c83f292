"""`stage=data` with scores by a model's loss and by rewards, cut at quantiles of all rows, and resumed after a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from data_sets import build_data_set, build_question_row, build_sources_command, write_three_sources
from json_lines import write_rows
from stage_commands import Ready, Workshop, run_in_fork

from align.data.sets import score_cuts as scoring
from align.report.data_set_page import iter_drop_counts

ALONE = ("stage.duplicates.exact=false", "stage.duplicates.near=null", "stage.contamination.test=false")
"""Settings with which only scores leave rows out."""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return write_three_sources(tmp_path)


def read_data_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in (folder / "artifact").glob("*.parquet") for row in pq.read_table(path).to_pylist()]


def build_loss_command(here: Path, model: Path, *arguments: str) -> list[str]:
    return [
        *build_sources_command(here),
        *ALONE,
        "device=cpu",
        "model=hub",
        f"model.path={model}",
        "stage.score.by=loss",
        *arguments,
    ]


def test_quantiles_of_the_loss_leave_out_the_rows_at_the_ends(here: Path, tiny_model: Path) -> None:
    folder, data, _ = build_data_set(here, *build_loss_command(here, tiny_model), "run.name=whole")
    all_rows = read_data_rows(folder)
    assert all(math.isfinite(row["score"]) for row in all_rows)
    assert "after_score" in data["sources"][0]["counts"]
    for scope in ("source", "all"):
        arguments = build_loss_command(here, tiny_model, "stage.score.keep=[0.1,0.75]", f"stage.score.within={scope}")
        cut_folder, cut_data, stdout = build_data_set(here, *arguments, f"run.name={scope}")
        groups = [[row for row in all_rows if row["source"] == name] for name in ("support", "general")]
        expected = set[str]()
        for group in groups if scope == "source" else [all_rows]:
            order = sorted(group, key=lambda row: (row["score"], row["content_id"], row["row"]))
            expected |= {f"{r['source']}:{r['row']}" for r in order[round(0.1 * len(order)) : round(0.75 * len(order))]}
        assert {f"{row['source']}:{row['row']}" for row in read_data_rows(cut_folder)} == expected
        dropped_count = sum(dict(iter_drop_counts(source))["dropped by score"] for source in cut_data["sources"])
        manifest = json.loads((cut_folder / "manifest.json").read_text())
        assert len(all_rows) - len(expected) == dropped_count == manifest["metrics"]["dropped_by_score"]
        assert "dropped by score" in stdout
    page = (cut_folder / "report.html").read_text()
    assert "Scores of support" in page
    assert "kept, just above the lower cut" in page
    assert "Traceback" not in (cut_folder / "log.txt").read_text()


def test_without_scores_nothing_speaks_of_them(here: Path) -> None:
    folder, data, _ = build_data_set(here, *build_sources_command(here))
    assert "scores" not in data
    assert "score" not in read_data_rows(folder)[0]
    assert not (folder / "scores.jsonl").exists()
    assert "after_score" not in data["sources"][0]["counts"]


def test_killed_while_it_scores_it_goes_on(here: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "PIECE", 64)
    command = build_loss_command(here, tiny_model, "stage.score.keep=[0.1,0.75]")
    full_data = build_data_set(here, *command, "run.name=whole")[1]
    load_records = scoring.load_records
    assert run_in_fork([*command, "run.name=killed"], deadly=["align.data.sets.score_cuts.load_records"], times=3) == -9
    [path] = (here / "runs" / "data" / "killed" / "checkpoints").glob(scoring.FILE)
    assert path.stat().st_size == 3 * 64 * 8
    batch_sizes = list[int]()
    monkeypatch.setattr(
        scoring,
        "load_records",
        lambda *arguments: (batch_sizes.append(len(arguments[-1])), load_records(*arguments))[1],
    )
    _, resumed_data, stdout = build_data_set(here, *command, "run.name=killed")
    assert "continues" in stdout
    assert sum(batch_sizes) == sum(source["counts"]["kept"] for source in full_data["sources"]) - 3 * 64
    assert (resumed_data["root"], resumed_data["scores"]) == (full_data["root"], full_data["scores"])


def test_personal_data_is_not_shown_beside_scores(tmp_path: Path) -> None:
    rows = [build_question_row(f"Who is {i}?", f"Write to someone{i}@example.com, " + "x" * i) for i in range(9)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = ["stage=data", f"stage.sources=[{path}]", f"run.root={tmp_path / 'runs'}", *ALONE]
    arguments += ["stage.clean=[{pii: {action: report}}]", "reward=sentiment", "stage.score.by=reward"]
    folder, _, _ = build_data_set(tmp_path, *arguments, "stage.score.keep=[0.2,0.9]")
    scores_text = (folder / "scores.jsonl").read_text()
    assert "[EMAIL]" in scores_text
    assert "@example.com" not in scores_text
    assert "@example.com" not in (folder / "report.html").read_text()


def test_a_function_scores_the_last_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_scores.py").write_text("def words(all):\n    return [len(c[-1]['content'].split()) for c in all]\n")
    rows = [build_question_row(f"Question {i}?", " ".join([f"w{i}"] * (i + 1))) for i in range(20)]
    rows.append({"messages": [{"role": "user", "content": "Nobody answers?"}]})
    path = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = [
        "stage=data",
        f"stage.sources=[{path}]",
        f"run.root={tmp_path / 'runs'}",
        *ALONE,
        "reward=fn",
        "reward.fn=my_scores:words",
        "stage.score.by=reward",
        "stage.score.least=5",
        "stage.score.most=10",
    ]
    folder, data, stdout = build_data_set(tmp_path, *arguments)
    scores = {row["row"]: row["score"] for row in read_data_rows(folder)}
    assert scores == {**{i: float(i) for i in range(5, 11)}, 21: None}
    assert data["scores"]["scorer"] == "my_scores:words"
    assert "1 row without a score" in stdout
    inputs = json.loads((folder / "manifest.json").read_text())["inputs"]
    assert inputs["reward.fn"]["ref"] == "my_scores:words"


def test_a_reward_model_scores_pairs_by_their_difference(ready: Ready, tmp_path: Path) -> None:
    answers = ["Yes, until six in the evening.", "No.", "I do not know that.", "It is far away."]
    pairs = [
        {"prompt": f"Question {i // 4}?", "chosen": answers[i % 4], "rejected": answers[(i + 1) % 4]} for i in range(12)
    ]
    path = write_rows(tmp_path / "pairs.jsonl", [*pairs, {**pairs[0], "chosen": "word " * 400}])
    arguments = ["stage=data", f"stage.sources=[{path}]", f"run.root={ready.root}", f"run.name={tmp_path.name}"]
    arguments += ["stage.score.by=reward", "reward.ref=reward:a", "device=cpu", *ALONE]
    folder, data, _ = build_data_set(tmp_path, *arguments)
    score_of_row = {row["row"]: row["score"] for row in read_data_rows(folder)}
    assert score_of_row[13] is None  # its chosen answer is longer than the model's context
    scores = [score_of_row[i] for i in range(1, 13)]
    assert len({round(score, 7) for score in scores}) > 3  # the model hardly learned, and still distinguishes answers
    assert max(map(abs, scores)) > 1e-5
    for first in (0, 4, 8):  # around a circle of four answers to one question
        assert sum(scores[first : first + 4]) == pytest.approx(0, abs=1e-6)
    assert data["scores"]["scorer"] == "reward:a"


def test_forgetting_keeps_the_scores_of_the_others(here: Path, tiny_model: Path) -> None:
    folder, _, _ = build_data_set(here, *build_loss_command(here, tiny_model), "run.name=old")
    old_scores = {row["content_id"]: row["score"] for row in read_data_rows(folder)}
    forgotten_id = min(old_scores)
    new_folder, data, _ = build_data_set(
        here,
        "stage=data",
        "stage.action=forget",
        "data.path=data:old",
        f"stage.forget=[{forgotten_id}]",
        f"run.root={here / 'runs'}",
        "run.name=new",
    )
    assert {row["content_id"]: row["score"] for row in read_data_rows(new_folder)} == {
        id: score for id, score in old_scores.items() if id != forgotten_id
    }
    assert "scores" not in data
    assert not (here / "runs" / "data" / "old" / "scores.jsonl").exists()


def test_rows_that_are_not_scored(tmp_path: Path) -> None:
    shop = Workshop(tmp_path / "runs", tmp_path)
    for row, says in (
        ({"prompt": "q", "completion": "a", "label": True}, "labelled answers"),
        ({"text": "plain text"}, "finds nothing to score"),
    ):
        sources = f"stage.sources=[{write_rows(tmp_path / 'rows.jsonl', [row] * 9)}]"
        shop.refuses("stage=data", sources, "reward=sentiment", "stage.score.by=reward", says=says)
