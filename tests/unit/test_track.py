"""Metrics are deterministic apart from times, stored in whole rows, and resumed without gaps."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from align import track
from align.mirrors import Artifact, Table
from align.track import Progress, Tracker, read_rows


def test_clocks_stay_out_of_the_metrics(tmp_path: Path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        tracker = Tracker(folder)
        tracker.log(1, {"loss": 0.5, "naïve": 1}, {"tokens_s": 7.0})
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()
    assert read_rows(tmp_path / "a/metrics.jsonl") == [{"step": 1, "loss": 0.5, "naïve": 1}]
    (timing,) = read_rows(tmp_path / "a/timing.jsonl")
    assert timing.keys() == {"step", "elapsed_s", "peak_rss_mb", "tokens_s"}
    assert timing["peak_rss_mb"] > 1


def test_no_row_that_json_does_not_know(tmp_path: Path):
    Tracker(tmp_path).log(1, {"loss": math.nan, "kl": math.inf}, {"rate": -math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for name, row in (("metrics", {"loss": None, "kl": None}), ("timing", {"rate": None})):
        logged_row = json.loads((tmp_path / f"{name}.jsonl").read_text(), parse_constant=refuse)
        assert row.items() <= logged_row.items()


def test_a_resumed_stream_equals_an_unbroken_one(tmp_path: Path):
    unbroken = tmp_path / "whole"
    broken = tmp_path / "broken"
    for folder, steps in ((unbroken, (1, 2, 3, 4)), (broken, (1, 2, 3))):
        folder.mkdir()
        tracker = Tracker(folder)
        for step in steps:
            tracker.log(step, {"loss": 1 / step, "text": "é\u2028"})
    with (broken / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 4, "text": "é'.encode()[:-1])  # a crash in the middle of a character
    resumed = Tracker(broken, keep_below=3)  # the checkpoint is of step 2
    assert [row["step"] for row in resumed.rows()] == [1, 2]
    for step in (3, 4):
        resumed.log(step, {"loss": 1 / step, "text": "é\u2028"})
    assert (broken / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
    assert sorted(p.name for p in broken.iterdir()) == ["metrics.jsonl", "timing.jsonl"]


def test_a_new_run_starts_empty(tmp_path: Path):
    Tracker(tmp_path).log(1, {"loss": 1.0})
    assert Tracker(tmp_path).rows() == []


def test_a_crash_while_the_kept_rows_are_written_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Tracker(tmp_path).log(1, {"loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Tracker(tmp_path, keep_below=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_plain_progress_comes_at_intervals_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    clock = [100.0]
    monkeypatch.setattr(track.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    bar = Progress("ppo", 50, start=10)
    for steps_done, seconds in ((15, 104.0), (20, 110.0), (25, 111.0), (50, 112.0)):
        clock[0] = seconds
        bar.advance(steps_done, loss=0.12345, kl=2.0)
    bar.close()
    # 10 steps in 10 s leave 30 s for 30 more. Steps before the resumption do not count.
    assert capsys.readouterr().err.splitlines() == [
        "ppo 20/50  eta 30s  loss 0.123  kl 2",
        "ppo 50/50  eta 0s  loss 0.123  kl 2",
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with track.show_progress("sft", 3) as bar:
        bar.advance(3, loss=0.5)
    output = capsys.readouterr()
    assert "3/3" in output.err
    assert "loss 0.5" in output.err
    assert output.out == ""


class Told:
    """A mirror that keeps all rows."""

    last = -1

    def __init__(self) -> None:
        self.rows: list[tuple[int, Mapping[str, Any], Mapping[str, Table]]] = []

    def log(self, step: int, figures: Mapping[str, Any], tables: Mapping[str, Table]) -> None:
        self.rows.append((step, figures, tables))

    def publish(self, artifact: Artifact) -> None: ...

    def finish(self, figures: Mapping[str, Any], failed: bool) -> None: ...


def test_answers_are_shown_as_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    mirror = Told()
    tracker = Tracker(tmp_path, mirror=mirror)
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?\n"}]
    tracker.show(7, [{"prompt": prompt, "answer": "Because " * 20, "score": 0.123}], "update 7: better")
    tracker.log(7, {"loss": 1.0}, {"update_s": 2.0})
    tracker.log(8, {"loss": 0.5})
    assert capsys.readouterr().out == f"update 7: better\n  Why? → {'Because ' * 7}Bec…  (0.12)\n"
    assert read_rows(tmp_path / "samples.jsonl") == [
        {"step": 7, "prompt": prompt, "answer": "Because " * 20, "score": 0.123}
    ]
    answers = [["system: Be brief.\nuser: Why?\n", "Because " * 20, 0.123]]
    assert mirror.rows == [
        (7, {"loss": 1.0, "time/update_s": 2.0}, {"samples": Table(["prompt", "answer", "score"], answers)}),
        (8, {"loss": 0.5}, {}),
    ]
