"""The page of a running run: it shows the progress, is written seldom and cheaply, and never stops the run."""

from __future__ import annotations

import logging
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from run_folders import open_run

from align import track
from align.core.errors import InputError
from align.report import live
from align.report.live import MAX_TIME_SHARE, WRITE_INTERVAL_S, LivePage
from align.run import Run
from align.track import Tracker, show_progress, watch_progress

REFRESH = 'http-equiv="refresh"'


class Clock:
    """A clock that the test moves, for the page and for the progress."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for module in (track, live):
            patch.setattr(module.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def run(tmp_path: Path):
    with open_run(tmp_path) as run:
        run.begin("")
        yield run


def read_page(run: Run) -> str:
    return (run.folder / "report.html").read_text(encoding="utf-8")


def test_a_page_is_there_from_the_beginning_and_says_how_far_it_is(run: Run, clock: Clock):
    page = LivePage(run, "python -m align stage=sft")
    page.write_first()
    assert "Running." in read_page(run)
    assert REFRESH in read_page(run)
    with watch_progress(page.update), show_progress("sft", 400) as bar:
        clock.now += 90
        bar.advance(1)
        assert "Running, step 1 of 400, about 9 h 58 min left." in read_page(run)
        clock.now += 270
        bar.advance(120)
    assert "Running, step 120 of 400, about 14 minutes left." in read_page(run)
    assert "python -m align stage=sft" in read_page(run)


def test_it_is_written_every_twenty_seconds_at_most(run: Run, clock: Clock, monkeypatch: pytest.MonkeyPatch):
    page = LivePage(run, "")
    write_times = []
    monkeypatch.setattr(page, "_write", lambda report: write_times.append(clock.now - 1000))
    with watch_progress(page.update), show_progress("sft", 1000) as bar:
        for step in range(1, 1001):
            clock.now += 0.125
            bar.advance(step)
    assert len(write_times) == 125 // WRITE_INTERVAL_S
    assert all(b - a >= WRITE_INTERVAL_S for a, b in pairwise(write_times))


@pytest.mark.parametrize("drawing", [0.3, 1.0, 5.0, 60.0])
def test_it_takes_no_more_than_its_share(run: Run, clock: Clock, monkeypatch: pytest.MonkeyPatch, drawing: float):
    page = LivePage(run, "")
    drawing_times = []

    def draw_slowly(*_: Any) -> None:
        clock.now += drawing
        drawing_times.append(drawing)

    monkeypatch.setattr(live, "add_curves", draw_slowly)
    with watch_progress(page.update), show_progress("sft", 4000) as bar:
        for step in range(1, 4001):
            clock.now += 5
            bar.advance(step)
            # The time of the first drawing is unknown beforehand.
            assert sum(drawing_times[1:]) <= MAX_TIME_SHARE * (clock.now - 1000)
    assert len(drawing_times) >= 2
    if drawing > 1:
        assert sum(drawing_times) >= 0.8 * MAX_TIME_SHARE * (clock.now - 1000)  # the share is used


def test_an_error_of_the_page_is_logged_and_the_run_goes_on(
    run: Run, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def raise_disk_full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    page = LivePage(run, "")
    monkeypatch.setattr(live.Report, "write", raise_disk_full)
    page.write_first()
    with caplog.at_level(logging.WARNING), watch_progress(page.update), show_progress("sft", 10) as bar:
        clock.now += 30
        bar.advance(5)
    assert bar.done == 5
    assert "report.html could not be written" in caplog.text
    assert "No space left" in caplog.text
    page.write_failed(ValueError("x"))


def test_the_curves_come_once_there_is_time_for_them(run: Run, clock: Clock):
    page = LivePage(run, "")
    tracker = Tracker(run.folder)
    with watch_progress(page.update), show_progress("sft", 10) as bar:
        tracker.log(1, {"loss": 5.0, "lr": 0.1})
        clock.now += 30
        bar.advance(1)
        assert "<img" not in read_page(run)
        tracker.log(2, {"loss": 4.0, "lr": 0.1})
        clock.now += 90
        bar.advance(2)
        assert "from 5 at step 1 to 4 at step 2" in read_page(run)
        tracker.log(3, {"loss": 3.0, "lr": 0.1})
        page._drawing_seconds = 100.0  # there is no time to draw: the curves stay
        clock.now += 30
        bar.advance(3)
    assert "Running, step 3 of 10" in read_page(run)
    assert "from 5 at step 1 to 4 at step 2" in read_page(run)


def test_its_newest_figures_stand_there_before_any_curve(run: Run, clock: Clock):
    page = LivePage(run, "")
    tracker = Tracker(run.folder)
    page.write_first()
    assert "Figures so far" not in read_page(run)
    with watch_progress(page.update), show_progress("sft", 10) as bar:
        tracker.log(1, {"loss": 5.0, "held_out_loss": 6.25, "lr": 0.1})
        tracker.log(2, {"loss": 4.5, "lr": 0.1})
        clock.now += 30
        bar.advance(2)
    assert "<img" not in read_page(run)
    cells = re.findall(r"<td.*?>(.*?)</td>", read_page(run))
    assert cells == [
        "Loss, training (nats a token)",
        "5 at step 1",
        "4.5 at step 2",
        "Loss, held out (nats a token)",
        "6.25 at step 1",
        "6.25 at step 1",
        "Learning rate",
        "0.1 at step 1",
        "0.1 at step 2",
    ]


def test_what_it_computes_on_and_its_rows_are_said_as_soon_as_they_are_known(tmp_path: Path, clock: Clock):
    data = {"name": "jsonl", "path": "a.jsonl", "max_length": 100}
    with open_run(tmp_path, data=data, device="auto", dtype="auto") as run:
        run.begin("")
        hardware: dict[str, str] = {}
        page = LivePage(run, "", lambda: hardware)
        page.write_first()
        assert "cpu, bfloat16" not in read_page(run)
        assert "rows" not in read_page(run)
        hardware.update(device="cpu", dtype="bfloat16")
        run.known_metrics = {"train_rows": 285, "held_out_rows": 40, "dropped_too_long": 8}
        with watch_progress(page.update), show_progress("sft", 10) as bar:
            clock.now += 30
            bar.advance(2)
        assert "cpu, bfloat16" in read_page(run)
        assert "285 of 293 rows to train on; dropped 8 for being longer than 100 tokens" in read_page(run)


def test_a_run_whose_device_is_missing_says_so(run: Run):
    def raise_missing_device() -> dict[str, str]:
        raise InputError("device", "cuda", "there is none", "Leave it out.")

    LivePage(run, "", raise_missing_device).write_failed(InputError("device", "cuda", "there is none", "Leave it out."))
    assert "device=cuda: there is none. Leave it out." in read_page(run)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("x")], ids=["interrupted", "failed"])
def test_a_run_that_ends_early_shows_the_curves_up_to_then(run: Run, clock: Clock, error: BaseException):
    page = LivePage(run, "")
    tracker = Tracker(run.folder)
    tracker.log(1, {"loss": 5.0, "lr": 0.1})
    tracker.log(2, {"loss": 4.5, "lr": 0.1})
    page.write_failed(error)
    assert read_page(run).count("<img") == 2
    assert "from 5 at step 1 to 4.5 at step 2" in read_page(run)
    assert "Figures so far" in read_page(run)


def test_an_interrupted_run_draws_for_a_moment_only(run: Run, clock: Clock, monkeypatch: pytest.MonkeyPatch):
    from align.report import stages

    def draw_slowly(report: Any, *_: Any) -> None:
        clock.now += 1.5
        report.plot(b"<svg/>", "", "a curve")

    monkeypatch.setattr(stages, "add_curve", draw_slowly)
    page = LivePage(run, "")
    tracker = Tracker(run.folder)
    for step in (1, 2):
        tracker.log(step, {"loss": 5.0, "lr": 0.1, "grad_norm": 1.0})
    page.write_failed(KeyboardInterrupt())
    assert read_page(run).count("<img") == 2
    page.write_failed(ValueError("x"))
    assert read_page(run).count("<img") == 3


def test_interrupted_again_while_it_draws_it_ends_at_once(run: Run, monkeypatch: pytest.MonkeyPatch):
    def raise_interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    page = LivePage(run, "")
    page.write_first()
    monkeypatch.setattr(live, "add_curves", raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        page.write_failed(KeyboardInterrupt())
    assert "Interrupted. The same command continues it." in read_page(run)  # instead of "Running"


def test_how_a_run_ended_without_being_done_is_said(run: Run, clock: Clock):
    page = LivePage(run, "python -m align stage=sft")
    with watch_progress(page.update), show_progress("sft", 400) as bar:
        bar.advance(120)
    page.write_failed(InputError("stage.lr", 9.0, "the run has <b>diverged</b>", "Lower it."))
    assert (
        "Failed after step 120 of 400: stage.lr=9.0: the run has &lt;b&gt;diverged&lt;/b&gt;. Lower it."
        in read_page(run)
    )
    assert REFRESH not in read_page(run)
    page.write_failed(ZeroDivisionError("division by zero"))
    assert "Failed after step 120 of 400: ZeroDivisionError: division by zero" in read_page(run)
    page.write_failed(KeyboardInterrupt())
    assert "Interrupted after step 120 of 400. The same command continues it." in read_page(run)
    assert REFRESH not in read_page(run)


def test_a_run_that_failed_at_once_is_told_without_matplotlib(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "align.report.plots", None)  # any import of it fails
    page = LivePage(run, "")
    page.write_first()
    page.write_failed(InputError("data.path", "x", "is empty", "Fill it."))
    assert "data.path=x: is empty. Fill it." in read_page(run)


def test_a_report_that_cannot_be_made_costs_nobody_the_run(run: Run, caplog: pytest.LogCaptureFixture):
    page = LivePage(run, "")
    page.write_finished({"loss_before": "no number", "loss_after": "none either", "held_out_rows": 1}, {})
    assert "its report could not be made" in read_page(run)
    assert "Traceback" in caplog.text


def test_nobody_is_told_behind_the_block(clock: Clock):
    steps: list[int] = []
    with watch_progress(lambda bar: steps.append(bar.done)):
        progress = track.Progress("sft", 3)
        progress.advance(1)
    progress.advance(2)
    track.Progress("sft", 3).advance(3)
    assert steps == [1, 2]


def test_a_failed_run_leaves_its_name_to_another(tmp_path: Path):
    with open_run(tmp_path, name="mine") as run:
        run.begin("")
        page = LivePage(run, "")
        page.write_first()
        page.write_failed(ValueError("bad"))
        run.fail(ValueError("bad"))
    with open_run(tmp_path, name="mine", seed=7) as run:
        assert run.folder.name == "mine"
        assert not (run.folder / "report.html").exists()
