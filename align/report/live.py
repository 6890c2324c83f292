"""Writing `report.html` when a run starts, periodically while it trains, and when it ends.

The page is built from the files in the run's folder and draws no random numbers, so it cannot change the training. It
takes at most 2 % of the run's time plus one drawing of the curves. An error while writing it is logged, and the run
goes on.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

from align.core.errors import AlignError, make_printable
from align.report.figure_labels import build_figure_table, describe_small_samples
from align.report.figure_text import format_duration
from align.report.headlines import summarize_run
from align.report.origins import format_current_time, list_origins
from align.report.page import Block, Report
from align.report.run_view import RunView, load_page_sections
from align.report.stages import (
    SECTIONS,
    UNITS,
    add_curves,
    add_greedy_answers,
    add_latest_figures,
    add_training_rows,
    iter_notes,
)
from align.run.folder import Run, utc_now
from align.run.manifest import Manifest
from align.track import Progress

WRITE_INTERVAL_S = 20.0
"""Minimum number of seconds between two writes of a run's `report.html`."""
REFRESH_S = 20
"""Seconds after which an open page of a running run reloads itself."""
MAX_TIME_SHARE = 0.02
"""Maximum share of a run's time that is spent on writing its report. One drawing of the curves may exceed it, since
the time that it takes is known only afterwards."""
FIRST_DRAWING_S = 1.2
"""Estimated seconds of the first drawing of the curves, with the import of matplotlib. It is due after one minute."""
PATIENCE_S = 2.0
"""Seconds after an interrupt (Ctrl-C) during which curves are still drawn."""
TITLES = {
    "sft": "Supervised fine-tuning",
    "full": "Supervised fine-tuning of every weight",
    "sample": "Sampled answers",
    "annotate": "Annotation",
    "reward": "Reward model",
    "dpo": "Direct preference optimisation (DPO)",
    "kto": "Kahneman-Tversky optimisation (KTO)",
    "ppo": "Proximal policy optimisation (PPO)",
    "eval": "Evaluation",
    "export": "Export",
    "verify": "PPO, verified",
    "serve": "Server",
    "data": "Data set",
}
"""Name of a stage → title of its report page."""
VARIANT_TITLES = {
    "rloo": "Policy optimisation by RLOO",
    "grpo": "Group relative policy optimisation (GRPO)",
    "reinforce_pp": "Policy optimisation by REINFORCE++",
    "ipo": "Identity preference optimisation (IPO)",
    "orpo": "Odds ratio preference optimisation (ORPO)",
    "simpo": "Simple preference optimisation (SimPO)",
}
"""`stage.advantage` of PPO or `stage.loss` of DPO → title of the report, for variants with a name of their own."""

VERDICT_STATES: Mapping[str, Literal["done", "running", "failed"]] = {"done": "done", "running": "running"}
"""Status of a run → state that sets the colour of its summary. Any other status is shown as failed."""

log = logging.getLogger("align")


class LivePage:
    """The writer of a run's `report.html` at its start, during training and at its end.

    Args:
        run: the run, which has started.
        command: the command line that repeats the run.
        hardware: returns a description of the hardware, as far as it is known at the time of the call.
    """

    def __init__(self, run: Run, command: str, hardware: Callable[[], Mapping[str, str]] = dict) -> None:
        self.run = run
        self.command = command
        self.hardware = hardware
        self._progress: Progress | None = None
        self._start = time.perf_counter()
        self._last_write = self._start
        self._seconds_spent = 0.0
        self._drawing_seconds = FIRST_DRAWING_S
        self._curves: list[Block] = []

    def write_first(self) -> None:
        """Write `report.html` without curves when a run starts, which takes a few milliseconds."""
        self._write_or_warn(self._write_running_page)

    def update(self, progress: Progress) -> None:
        """Store the progress, and rewrite `report.html` if WRITE_INTERVAL_S have passed since the last write.

        Curves are drawn again, and the page written at all, only within MAX_TIME_SHARE of the run's time.
        """
        self._progress = progress
        now = time.perf_counter()
        budget = MAX_TIME_SHARE * (now - self._start)
        if now - self._last_write < WRITE_INTERVAL_S or self._seconds_spent > budget:
            return
        if self._seconds_spent + self._drawing_seconds <= budget:
            self._write_or_warn(self._draw_curves)
            self._drawing_seconds = time.perf_counter() - now
        self._write_or_warn(self._write_running_page)
        self._last_write = time.perf_counter()
        self._seconds_spent += self._last_write - now

    def write_finished(self, metrics: Any, hardware: Any) -> None:
        """Write the final `report.html` of a run that is about to be published. If building it fails, write a short
        note.

        Raises:
            StorageError: the page cannot be written.
        """
        manifest = self.run.manifest
        done_manifest = replace(
            manifest,
            status="done",
            metrics=dict(metrics),
            times={**manifest.times, "finished": utc_now()},
            hardware={**manifest.hardware, **hardware},
        )
        try:
            report = build_finished_page(RunView(self.run.folder, done_manifest, self.command))
        except Exception:
            log.exception("the report could not be made")
            report = self._create_report()
            report.verdict("The run is done, and its report could not be made: see log.txt.")
        self._write(report)

    def write_failed(self, error: BaseException) -> None:
        """Write the final `report.html` of a run that failed or was interrupted, with its error.

        It is written before and after the curves are drawn: if the user interrupts the drawing too, the page without
        the last curves is already there.
        """
        self._write_or_warn(lambda: self._write_failed_page(error))
        deadline = time.perf_counter() + PATIENCE_S if isinstance(error, KeyboardInterrupt) else math.inf
        self._write_or_warn(lambda: self._draw_curves(deadline))
        self._write_or_warn(lambda: self._write_failed_page(error))

    def _write_running_page(self) -> None:
        report = self._create_report(refresh=REFRESH_S)
        progress = describe_progress(self._progress, self.run.manifest.stage)
        report.verdict(f"{progress} Written on {format_current_time()}.", "running")
        add_unfinished_sections(report, self._create_view(), self._curves)
        self._write(report)

    def _draw_curves(self, deadline: float = math.inf) -> None:
        """Draw the training curves of the steps so far and keep them for the next page.

        No curve is begun after `deadline`, in seconds of `time.perf_counter`.
        """
        report = Report("")
        add_curves(report, self._create_view(), deadline)
        self._curves = report.blocks

    def _write_failed_page(self, error: BaseException) -> None:
        progress = describe_progress(self._progress, self.run.manifest.stage, is_running=False)
        verdict = f"Failed{progress}: {describe_error(error)}"
        if isinstance(error, KeyboardInterrupt):
            verdict = f"Interrupted{progress}. The same command continues it."
        report = self._create_report().verdict(verdict, "failed")
        view = self._create_view()
        add_unfinished_sections(report, view, self._curves, "Inputs and settings", "Figures until then")
        if self.run.manifest.stage == "verify":
            SECTIONS["verify"](report, view)
        self._write(report)

    def _create_view(self) -> RunView:
        manifest = self.run.manifest
        hardware = dict(manifest.hardware)
        with suppress(AlignError):  # the run may have failed because the device is missing
            hardware |= self.hardware()
        manifest = replace(manifest, metrics=self.run.known_metrics, hardware=hardware)
        return RunView(self.run.folder, manifest, self.command)

    def _create_report(self, refresh: int = 0) -> Report:
        return Report(get_title(self.run.manifest), self.run.name, refresh)

    def _write(self, report: Report) -> None:
        report.write(self.run.folder / "report.html")

    def _write_or_warn(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception:
            log.warning("report.html could not be written", exc_info=True)


def get_title(manifest: Manifest) -> str:
    """Return the title of a run's report page for its stage, or for its variant of PPO or DPO, such as GRPO."""
    settings = manifest.config.get("stage", {})
    variant_key = {"ppo": "advantage", "dpo": "loss"}.get(manifest.stage, "")
    return VARIANT_TITLES.get(settings.get(variant_key, ""), TITLES[manifest.stage])


def build_finished_page(view: RunView) -> Report:
    """Build the report page of a finished run: summary, inputs, metrics, curves and the sections of its stage."""
    stage = view.manifest.stage
    report = Report(get_title(view.manifest), view.manifest.name).verdict(summarize_run(view))
    if notes := list(iter_notes(view)):
        report.text("\n".join(f"- {note}" for note in notes))
    sections = load_page_sections(view)
    if sections and sections.add_overview:
        sections.add_overview(report, view)
    elif sections is None and stage == "eval":
        add_greedy_answers(report, view)
    report.heading("Inputs and settings").facts(list_origins(view))
    anchors = {anchor["name"].replace(" ", "_") for anchor in view.read_json("artifact/anchors.json")}
    metrics = {key: value for key, value in view.metrics.items() if key not in anchors}  # anchors have their own table
    if rows := build_figure_table(metrics):
        report.heading("Figures").table(("figure", "value", "how to read it"), rows, "Figures")
        if sentence := describe_small_samples(metrics):
            report.text(sentence)
    curves = Report("")
    add_curves(curves, view)
    if curves.blocks:
        report.heading("Curves").blocks += curves.blocks
    if sections:
        sections.add_body(report, view)
    elif stage in SECTIONS:
        SECTIONS[stage](report, view)
    add_training_rows(report, view)
    return report


def build_page_blocks(view: RunView, status: str, error: str) -> list[Block]:
    """Build the HTML blocks of the report of a running, finished or failed run from its folder.

    Args:
        status: the status in the registry. The manifest of a run that was killed still says "running".
        error: why the run ended; empty if it did not fail, or if the reason is unknown.
    """
    if status == "done":
        return build_finished_page(view).blocks
    verdict = f"{status.capitalize()}{f': {error}' if error else ''}."
    report = Report("").verdict(verdict, VERDICT_STATES.get(status, "failed"))
    drawings = Report("")
    add_curves(drawings, view)
    if view.manifest.stage in ("ppo", "sample"):
        SECTIONS[view.manifest.stage](drawings, view)
    add_unfinished_sections(report, view, drawings.blocks)
    return report.blocks


def add_unfinished_sections(
    report: Report,
    view: RunView,
    drawings: Sequence[Block],
    origins_heading: str = "Inputs and settings",
    figures_heading: str = "So far",
) -> None:
    """Add the sections of an unfinished run to the report page: settings, newest metrics, curves, training rows."""
    report.heading(origins_heading).facts(list_origins(view))
    if view.rows:
        add_latest_figures(report.heading(figures_heading), view)
    report.blocks += drawings
    add_training_rows(report, view)


def describe_progress(progress: Progress | None, stage: str, is_running: bool = True) -> str:
    """Return the progress of a run as a sentence: `Running, step 120 of 400, about 12 minutes left.`

    For a run that ended it is the part of a sentence ` after step 120 of 400`, or empty if the progress is unknown.
    """
    unit = UNITS.get(stage, "step")
    if progress is None:
        return "Running." if is_running else ""
    step = f"{unit} {progress.done:,} of {progress.total:,}"
    if not is_running:
        return f" after {step}"
    if progress.done >= progress.total:
        return f"Running: all {progress.total:,} {unit}s are done, and the result is being evaluated."
    seconds_left = progress.seconds_left
    if seconds_left is None:
        return f"Running, {step}."
    return f"Running, {step}, about {format_duration(seconds_left)} left."


def describe_error(error: BaseException) -> str:
    kind = "" if isinstance(error, AlignError) else f"{type(error).__name__}: "
    return make_printable(f"{kind}{error}")
