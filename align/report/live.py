"""When a run's page is written: as it begins, from time to time while it trains, and as it ends.

Nobody but the runner knows of it, and training knows of it least: the page reads what lies on disk, draws no random
number, takes at most 2 % of the run's time and the time of one drawing, and an error of it is logged and forgotten.
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
from align.report.figure_labels import describe_scarce, table_of
from align.report.figure_text import duration
from align.report.headlines import verdict_of
from align.report.origins import origins, written_at
from align.report.page import Block, Report
from align.report.run_view import RunView, load_own_page
from align.report.stages import SECTIONS, UNITS, add_curves, add_latest_figures, add_trained_on, iter_notes
from align.run.folder import Run, utc_now
from align.run.manifest import Manifest
from align.track import Progress

EVERY_S = 20.0
"""Seconds from one writing to the next at least."""
REFRESH_S = 20
"""After so many an open page loads itself anew."""
SHARE = 0.02
"""Of a run's time, the most that writing its page takes; one drawing may take it beyond, for nobody knows beforehand
how long it will take."""
FIRST_DRAWING_S = 1.2
"""About what the first curves take, matplotlib's import among it: they are drawn after a minute."""
PATIENCE_S = 2.0
"""How long a run that is interrupted goes on drawing curves."""
TITLES = {
    "sft": "Supervised fine-tuning", "full": "Supervised fine-tuning of every weight", "sample": "Sampled answers",
    "annotate": "Annotation", "reward": "Reward model", "dpo": "Direct preference optimisation (DPO)",
    "kto": "Kahneman-Tversky optimisation (KTO)",
    "ppo": "Proximal policy optimisation (PPO)", "eval": "Evaluation", "export": "Export", "verify": "PPO, verified",
    "serve": "Server", "data": "Data set",
}  # fmt: skip
OTHERWISE = {
    "rloo": "Policy optimisation by RLOO", "grpo": "Group relative policy optimisation (GRPO)",
    "reinforce_pp": "Policy optimisation by REINFORCE++", "ipo": "Identity preference optimisation (IPO)",
    "orpo": "Odds ratio preference optimisation (ORPO)", "simpo": "Simple preference optimisation (SimPO)",
}  # fmt: skip
"""`stage.advantage` of PPO or `stage.loss` of DPO → the title of what is not called after its stage."""

STATES: Mapping[str, Literal["done", "running", "failed"]] = {"done": "done", "running": "running"}
"""Status of a run → how its verdict is marked; of the others, as failed."""

log = logging.getLogger("align")


class LivePage:
    """The `report.html` of a run that is at work.

    Args:
        run: open, and begun.
        command: the line that makes it again.
        hardware: what it computes on, as far as that is known when it is asked.
    """

    def __init__(self, run: Run, command: str, hardware: Callable[[], Mapping[str, str]] = dict) -> None:
        self.run, self.command, self.hardware = run, command, hardware
        self._progress: Progress | None = None
        self._began = self._written = time.perf_counter()
        self._spent, self._drawing = 0.0, FIRST_DRAWING_S
        self._curves: list[Block] = []

    def begun(self) -> None:
        """The first page, which has no curves and costs a few milliseconds."""
        self._try(self._running)

    def advanced(self, progress: Progress) -> None:
        """Write it anew, if that is due; curves only where the time that they take is there."""
        self._progress = progress
        at = time.perf_counter()
        if at - self._written < EVERY_S or self._spent > SHARE * (at - self._began):
            return
        if self._spent + self._drawing <= SHARE * (at - self._began):
            self._try(self._drawn)
            self._drawing = time.perf_counter() - at
        self._try(self._running)
        self._written = time.perf_counter()
        self._spent += self._written - at

    def finished(self, metrics: Any, hardware: Any) -> None:
        """The page of a run that is about to be published. What goes wrong with it does not take the run along.

        Raises:
            StorageError: it cannot be written.
        """
        manifest = self.run.manifest
        done = replace(
            manifest, status="done", metrics=dict(metrics), times={**manifest.times, "finished": utc_now()},
            hardware={**manifest.hardware, **hardware},
        )  # fmt: skip
        try:
            report = finished_page(RunView(self.run.folder, done, self.command))
        except Exception:
            log.exception("the report could not be made")
            report = Report(*self._titles()).verdict("The run is done, and its report could not be made: see log.txt.")
        report.write(self.run.folder / "report.html")

    def failed(self, error: BaseException) -> None:
        """The page of a run that ended before it was done. Whoever interrupts it again while it draws waits no longer,
        and finds a page without the last curves."""
        self._try(lambda: self._ended(error))
        until = time.perf_counter() + PATIENCE_S if isinstance(error, KeyboardInterrupt) else math.inf
        self._try(lambda: self._drawn(until))
        self._try(lambda: self._ended(error))

    def _running(self) -> None:
        report = Report(*self._titles(), refresh=REFRESH_S)
        report.verdict(f"{how_far(self._progress, self.run.manifest.stage)} Written on {written_at()}.", "running")
        add_known(report, self._seen(), self._curves)
        self._write(report)

    def _drawn(self, until: float = math.inf) -> None:
        """Draw the curves as they are by now; at the time `until`, those that are left are left out."""
        drawn = Report("")
        add_curves(drawn, self._seen(), until)
        self._curves = drawn.blocks

    def _ended(self, error: BaseException) -> None:
        far = how_far(self._progress, self.run.manifest.stage, running=False)
        interrupted = isinstance(error, KeyboardInterrupt)
        said = f"Interrupted{far}. The same command continues it." if interrupted else f"Failed{far}: {said_of(error)}"
        report = Report(*self._titles()).verdict(said, "failed")
        add_known(report, self._seen(), self._curves, "What it was made of", "Up to then")
        if self.run.manifest.stage == "verify":
            SECTIONS["verify"](report, self._seen())
        self._write(report)

    def _seen(self) -> RunView:
        manifest, hardware = self.run.manifest, dict(self.run.manifest.hardware)
        with suppress(AlignError):  # of a run that failed, it may be the device that was missing
            hardware |= self.hardware()
        known = replace(manifest, metrics=self.run.known_metrics, hardware=hardware)
        return RunView(self.run.folder, known, self.command)

    def _titles(self) -> tuple[str, str]:
        return title_of(self.run.manifest), self.run.name

    def _write(self, report: Report) -> None:
        report.write(self.run.folder / "report.html")

    def _try(self, write: Any) -> None:
        try:
            write()
        except Exception:
            log.warning("report.html could not be written", exc_info=True)


def title_of(manifest: Manifest) -> str:
    settings = manifest.config.get("stage", {})
    chosen = {"ppo": "advantage", "dpo": "loss"}.get(manifest.stage, "")
    return OTHERWISE.get(settings.get(chosen, ""), TITLES[manifest.stage])


def finished_page(seen: RunView) -> Report:
    """The verdict; what the run was made of; its figures; its curves and what was said."""
    stage = seen.manifest.stage
    report = Report(title_of(seen.manifest), seen.manifest.name).verdict(verdict_of(seen))
    if found := list(iter_notes(seen)):
        report.text("\n".join(f"- {note}" for note in found))
    own_page = load_own_page(seen)
    if own_page and "systems" in seen.metrics:
        own_page.overview(report, seen)
    report.heading("What it was made of").facts(origins(seen))
    known = {anchor["name"].replace(" ", "_") for anchor in seen.json("artifact/anchors.json")}
    metrics = {key: value for key, value in seen.metrics.items() if key not in known}  # the anchors have a table
    if rows := table_of(metrics):
        report.heading("Figures").table(("figure", "value", "how to read it"), rows, "Figures")
        if sentence := describe_scarce(metrics):
            report.text(sentence)
    add_curves(drawn := Report(""), seen)
    if drawn.blocks:
        report.heading("Curves").blocks += drawn.blocks
    if own_page:
        own_page.add_body(report, seen)
    elif stage in SECTIONS:
        SECTIONS[stage](report, seen)
    add_trained_on(report, seen)
    return report


def as_it_lies(seen: RunView, status: str, error: str) -> list[Block]:
    """The blocks of a run as its folder has it, whoever looks and whenever.

    Args:
        status: as the registry knows it; what the manifest says of a run that was killed is that it is running.
        error: why it ended; empty where it did not, or nobody knows.
    """
    if status == "done":
        return finished_page(seen).blocks
    report = Report("").verdict(f"{status.capitalize()}{f': {error}' if error else ''}.", STATES.get(status, "failed"))
    drawn = Report("")
    add_curves(drawn, seen)
    if seen.manifest.stage in ("ppo", "sample"):
        SECTIONS[seen.manifest.stage](drawn, seen)
    add_known(report, seen, drawn.blocks)
    return report.blocks


def add_known(
    report: Report, seen: RunView, drawn: Sequence[Block], origin: str = "What it is made of", course: str = "So far"
) -> None:
    """Add the origins of a run that is not done, its newest figures, what is drawn of it, and what it trains on."""
    report.heading(origin).facts(origins(seen))
    if seen.rows:
        add_latest_figures(report.heading(course), seen)
    report.blocks += drawn
    add_trained_on(report, seen)


def how_far(progress: Progress | None, stage: str, running: bool = True) -> str:
    """`Running, step 120 of 400, about 12 minutes left.`; of a run that ended, ` after step 120 of 400`."""
    unit = UNITS.get(stage, "step")
    if progress is None:
        return "Running." if running else ""
    at = f"{unit} {progress.done:,} of {progress.total:,}"
    if not running:
        return f" after {at}"
    if progress.done >= progress.total:
        return f"Running: all {progress.total:,} {unit}s are done, and what came of them is being measured."
    left = progress.seconds_left
    return f"Running, {at}, about {duration(left)} left." if left is not None else f"Running, {at}."


def said_of(error: BaseException) -> str:
    kind = "" if isinstance(error, AlignError) else f"{type(error).__name__}: "
    return make_printable(f"{kind}{error}")
