"""The table at the end of a sweep is built from manifests of runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import INPUTS, build_run_config

from align.cli.batch import JobResult, format_table
from align.run import Run


def publish_run(name: str, **metrics: object) -> JobResult:
    with Run.open(build_run_config(Path("runs"), name), INPUTS, None, "tiny") as run:
        run.begin("a: 1\n")
        run.publish(metrics)
    return JobResult(0, run.folder.absolute())


SWEPT = [{"+experiment": "a", "seed": str(n)} for n in range(4)]


@pytest.fixture(autouse=True)
def narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")


def test_figures_that_tell_jobs_apart_as_many_as_there_is_room_for():
    jobs = [
        publish_run(
            "x", a_loss=1.23456, rows=7, win={"value": 0.5, "low": 0.1, "high": 1.0}, text="a", ok=True, width=12
        ),
        JobResult(2, None),
        publish_run(
            "y", a_loss=2, rows=7, win={"value": 0.6, "low": 0.1, "high": 1.0}, text="b", ok=False, width=3, more=1
        ),
    ]
    assert format_table(SWEPT, jobs).splitlines() == [
        "more in each manifest.json: win",
        "experiment  seed  status      a_loss  width  folder",
        "a           0     done        1.235   12     runs/sft/x",
        "a           1     failed (2)",
        "a           2     done        2       3      runs/sft/y",
        "a           3     not run",
    ]


def test_two_figures_and_the_end_of_a_long_value_are_shown_in_any_case():
    jobs = [publish_run(name, loss=n, score=n, third=n) for n, name in enumerate("xy")]
    settings = [{"data.path": f"/a/folder/far/away/from/here/{n}.jsonl"} for n in range(2)]
    assert format_table(settings, jobs).splitlines() == [
        "more in each manifest.json: third",
        "data.path                         status  loss  score  folder",
        "…lder/far/away/from/here/0.jsonl  done    0     0      runs/sft/x",
        "…lder/far/away/from/here/1.jsonl  done    1     1      runs/sft/y",
    ]


def test_what_a_sweep_is_for_stands_in_front_of_counts_of_rows():
    """The order of metrics in the manifest, which is by name, is not that of the table, even if a job failed."""
    figures = {
        "cut": 0,
        "dropped_too_long": 1,
        "held_out_rows": 2,
        "loss_after": 1.5,
        "loss_before": 2.5,
        "train_rows": 9,
    }
    jobs = [publish_run("x", **figures), JobResult(2, None)]
    header = format_table(SWEPT[:2], jobs).splitlines()[1]
    assert header.split() == ["experiment", "seed", "status", "loss_after", "loss_before", "folder"]


def test_no_password_is_shown():
    settings = [{"store.url": f"'postgresql://u:hunter{n}@h/x'"} for n in range(2)]
    assert "hunter" not in format_table(settings, [JobResult(2, None)])


def test_one_done_job_shows_all_that_it_has():
    assert format_table(SWEPT[:1], [publish_run("x", rows=7)]).splitlines() == [
        "experiment  seed  status  rows  folder",
        "a           0     done    7     runs/sft/x",
    ]


def test_none_done_and_no_sweep_at_all(tmp_path: Path):
    assert format_table(SWEPT[:2], [JobResult(130, tmp_path / "gone")]).splitlines() == [
        "experiment  seed  status       folder",
        "a           0     interrupted  gone",
        "a           1     not run",
    ]
    assert format_table([{}], [JobResult(137, None)]).splitlines() == ["status        folder", "failed (137)"]
    assert format_table([{}], [JobResult(3, None)]).splitlines()[1] == "done, gates not passed"
