"""Metrics and progress of a run: `metrics.jsonl`, `timing.jsonl` and a progress bar.

`metrics.jsonl` holds nothing that changes between two runs of the same command, so that two runs can be compared by
`cmp`. Clocks, rates and memory go to `timing.jsonl`.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from align import ranks
from align.core.files import read_bytes
from align.core.outputs import replace_file

PLAIN_EVERY_S = 10.0
LAST_UPDATES = 10
"""Largest number of updates that `last_updates` returns."""
STEPS = "steps.jsonl"
"""Name of the file with one row for every step of a trainer, which a replay compares."""


def get_peak_rss_mb() -> float:
    """Return the peak resident memory of this process so far, in MiB (Linux counts `ru_maxrss` in KiB)."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def detect_device() -> str:
    """Return `cuda` if this process has initialized CUDA in torch, else `cpu`, without importing torch."""
    torch = sys.modules.get("torch")
    return "cuda" if torch is not None and torch.cuda.is_initialized() else "cpu"


def get_peak_gpu_mb() -> dict[str, float]:
    """Return the peak memory of torch's tensors on a GPU so far as `peak_gpu_mb`, in MiB, or an empty dictionary
    without a GPU."""
    if detect_device() == "cpu":
        return {}
    return {"peak_gpu_mb": round(sys.modules["torch"].cuda.max_memory_allocated() / 2**20, 1)}


def get_peak_memory() -> dict[str, float]:
    """Return the peak resident memory of this process as `peak_rss_mb`, and on a GPU that of its tensors as
    `peak_gpu_mb`, both in MiB."""
    return {"peak_rss_mb": get_peak_rss_mb(), **get_peak_gpu_mb()}


@dataclass(frozen=True, slots=True)
class Table:
    """Column names and rows of a table that a metrics service displays."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Mirror(Protocol):
    """A service that displays the metrics of a run, see `align.mirrors`."""

    def log(self, step: int, figures: Mapping[str, Any], tables: Mapping[str, Table]) -> None: ...


class Tracker:
    """A writer of the files `metrics.jsonl`, `timing.jsonl`, `samples.jsonl` and `steps.jsonl` in a run's folder, with
    one JSON object on each line.

    Args:
        folder: the run's folder.
        keep_below: drop rows of this step and later, which a resumed run writes again.
        mirror: a service that gets the same metrics.
    """

    def __init__(self, folder: Path, keep_below: int = 0, mirror: Mirror | None = None) -> None:
        self.metrics_path = folder / "metrics.jsonl"
        self.timing_path = folder / "timing.jsonl"
        self.samples_path = folder / "samples.jsonl"
        self.steps_path = folder / STEPS
        self._started = time.perf_counter()
        optional = [path for path in (self.samples_path, self.steps_path) if path.exists()]
        for path in (self.metrics_path, self.timing_path, *optional):
            rows = [row for row in read_rows(path) if row["step"] < keep_below]
            replace_file(path, "".join(map(format_row, rows)).encode(), sync=False)
        self._mirror = mirror
        self._tables: dict[str, Table] = {}  # for the mirror's next step

    def log(self, step: int, metrics: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
        """Append a row with `metrics`, which are deterministic, to `metrics.jsonl`, and one with `timing` to
        `timing.jsonl`. The timing row also gets the seconds since the start and the peak memory. Both go to the mirror
        too."""
        row = {"step": step, **metrics}
        clock = {"step": step, "elapsed_s": round(time.perf_counter() - self._started, 3), **get_peak_memory()}
        append_row(self.metrics_path, row)
        append_row(self.timing_path, {**clock, **(timing or {})})
        if self._mirror:
            self._mirror.log(step, {**metrics, **{f"time/{k}": v for k, v in (timing or {}).items()}}, self._tables)
            self._tables = {}

    def log_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a row with `metrics` to `steps.jsonl`, which also has the training steps that are not logged to
        `metrics.jsonl`."""
        append_row(self.steps_path, {"step": step, **metrics})

    def keep(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append the samples of a step to `samples.jsonl`, one row each, without printing them."""
        for sample in samples:
            append_row(self.samples_path, {"step": step, **sample})

    def show(self, step: int, samples: Sequence[Mapping[str, Any]], heading: str) -> None:
        """Append the samples of a step to `samples.jsonl` and print their prompts, answers and scores under a heading.
        The mirror gets them as a table with the next metrics."""
        self.keep(step, samples)
        print(heading)
        for sample in samples:
            prompt = truncate_text(format_last_turn(sample))
            print(f"  {prompt} → {truncate_text(sample['answer'])}  ({sample['score']:.2f})")
        columns = list(samples[0]) if samples else []
        rows = [{**sample, "prompt": format_conversation(sample["prompt"])} for sample in samples]
        self._tables = {"samples": Table(columns, [[row[c] for c in columns] for row in rows])}

    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.metrics_path)


def format_last_turn(sample: Mapping[str, Any]) -> str:
    """Return the text of the last message of a sample's prompt."""
    return format_turn(sample["prompt"][-1])


def format_conversation(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return a conversation as text, with one `role: content` for each message."""
    return "\n".join(f"{message['role']}: {format_turn(message)}" for message in messages)


def format_turn(message: Mapping[str, Any]) -> str:
    """Return a message's content as text, and below it one line `calls NAME ARGUMENTS` for each tool call."""
    functions = [call["function"] for call in message.get("tool_calls", ())]
    calls = [f"calls {call['name']} {json.dumps(call['arguments'], ensure_ascii=False)}" for call in functions]
    return "\n".join(calls if calls and not message["content"] else [message["content"], *calls])


def truncate_text(text: str, width: int = 60) -> str:
    """Return a text on one line, cut to `width` characters with an ellipsis at the end. Erasure searches logs and pages
    for exactly this form."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def format_row(row: Mapping[str, Any]) -> str:
    """Return a row as a line of JSON with a newline, in which a float that is not finite becomes null."""
    values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(values, ensure_ascii=False) + "\n"


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(format_row(row))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON Lines file up to the first line that is not a JSON object. A crash may cut the last
    line short. Returns an empty list if the file does not exist."""
    rows = []
    if path.is_file():
        for line in read_bytes(path, path.name).decode("utf-8", "replace").split("\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(row, dict):
                break
            rows.append(row)
    return rows


def select_updates(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of PPO's metrics with a step above 0. Step 0 holds the metrics measured before the first
    update."""
    return [row for row in rows if row["step"] > 0]


def last_updates(updates: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the last updates of a PPO run, at most ten and at most half of them, over which the metrics `last_…` are
    averaged."""
    return updates[-max(1, min(LAST_UPDATES, len(updates) // 2)) :]


WATCHER: ContextVar[Callable[[Progress], None] | None] = ContextVar("WATCHER", default=None)


@contextmanager
def watch_progress(watcher: Callable[[Progress], None]) -> Iterator[None]:
    """Call `watcher` with a `Progress` whenever it advances, for each `Progress` that is created in the `with`
    block."""
    token = WATCHER.set(watcher)
    try:
        yield
    finally:
        WATCHER.reset(token)


class Progress:
    """The progress of a loop: a live bar on a terminal, otherwise a line on stderr at most every ten seconds.

    Attributes:
        done: number of finished steps, of `total`.
    """

    def __init__(self, label: str, total: int, start: int = 0) -> None:
        self.label = label
        self.total = total
        self.done = start
        self._start = start
        self._began = self._printed = time.perf_counter()
        self._watcher = WATCHER.get()
        self._bar = self._task = None
        ranks.record_position(f"{label} {start}/{total}")
        if sys.stderr.isatty() and ranks.is_main():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(label, total=total, completed=start, figures="")
            self._bar.start()

    def advance(self, done: int, **figures: float) -> None:
        """Set the number of finished steps to `done` and display it with a few metrics."""
        self.done = done
        ranks.record_position(f"{self.label} {done}/{self.total}")
        if self._watcher:
            self._watcher(self)
        text = "  ".join(f"{k} {v:.3g}" for k, v in figures.items())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, figures=text)
            return
        clock = time.perf_counter()
        if ranks.is_main() and (clock - self._printed >= PLAIN_EVERY_S or done >= self.total):
            self._printed = clock
            eta_s = self.seconds_left or 0.0
            print(f"{self.label} {done}/{self.total}  eta {eta_s:.0f}s  {text}".rstrip(), file=sys.stderr, flush=True)

    @property
    def seconds_left(self) -> float | None:
        """Estimated remaining seconds, from the mean duration of this process's steps, or None before its first step is
        finished."""
        finished = self.done - self._start
        if finished <= 0:
            return None
        return (time.perf_counter() - self._began) / finished * (self.total - self.done)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def show_progress(label: str, total: int, start: int = 0) -> Iterator[Progress]:
    """Yield a new `Progress` and close its bar when the `with` block ends."""
    bar = Progress(label, total, start)
    try:
        yield bar
    finally:
        bar.close()


class Clock:
    """A stopwatch that measures the seconds of each phase of a PPO update.

    Attributes:
        laps: seconds of each phase, and tokens a second if `rates` was called.
    """

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 4)
        self._last = now

    def rates(self, tokens: int) -> None:
        """Add the throughput of each phase so far to `laps` as `PHASE_tok_s`, for a batch with `tokens` response
        tokens."""
        for name, seconds in list(self.laps.items()):
            self.laps[f"{name.removesuffix('_s')}_tok_s"] = round(tokens / max(seconds, 1e-9), 1)
