"""Metrics and progress: what is deterministic to `metrics.jsonl`, the rest to `timing.jsonl`, a live line for the eyes.

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
"""Largest number of updates of PPO that `last_updates` returns."""
STEPS = "steps.jsonl"
"""The stream with a row for every step of a trainer, which a replay is compared with."""


def peak_rss_mb() -> float:
    """Peak resident memory of this process so far, in MiB (Linux counts `ru_maxrss` in KiB)."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def device_in_use() -> str:
    """`cuda` where this process computes on a GPU. Imports no torch: who has not, does not."""
    torch = sys.modules.get("torch")
    return "cuda" if torch is not None and torch.cuda.is_initialized() else "cpu"


def peak_gpu_mb() -> dict[str, float]:
    """Peak memory in tensors on the GPU of this process so far, in MiB; nothing where it uses none."""
    if device_in_use() == "cpu":
        return {}
    return {"peak_gpu_mb": round(sys.modules["torch"].cuda.max_memory_allocated() / 2**20, 1)}


def peak_memory() -> dict[str, float]:
    """The most that this process held, and on a GPU what its tensors took there, in MiB."""
    return {"peak_rss_mb": peak_rss_mb(), **peak_gpu_mb()}


def finite(value: Any) -> Any:
    """`value` as JSON can hold it: a float that is not finite becomes None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, slots=True)
class Table:
    """Rows for people to read."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Mirror(Protocol):
    """Whoever shows elsewhere what a run logs, see `align.mirrors`."""

    def log(self, step: int, figures: Mapping[str, Any], tables: Mapping[str, Table]) -> None: ...


class Tracker:
    """Appends one object a step to a run's streams.

    Args:
        folder: the run's folder.
        keep_below: on resume, rows of this step and later are dropped: the run will write them again.
        mirror: is told the same, see `align.mirrors`.
    """

    def __init__(self, folder: Path, keep_below: int = 0, mirror: Mirror | None = None) -> None:
        self.metrics_path, self.timing_path = folder / "metrics.jsonl", folder / "timing.jsonl"
        self.samples_path = folder / "samples.jsonl"
        self.steps_path = folder / STEPS
        self._started = time.perf_counter()
        optional = [path for path in (self.samples_path, self.steps_path) if path.exists()]
        for path in (self.metrics_path, self.timing_path, *optional):
            kept = [row for row in read_rows(path) if row["step"] < keep_below]
            replace_file(path, "".join(map(line_of, kept)).encode(), sync=False)
        self._mirror, self._shown = mirror, dict[str, Table]()

    def log(self, step: int, metrics: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
        """Append `metrics` (deterministic) and `timing` (not) under `step`."""
        row = {"step": step, **metrics}
        clock = {"step": step, "elapsed_s": round(time.perf_counter() - self._started, 3), **peak_memory()}
        append(self.metrics_path, row)
        append(self.timing_path, {**clock, **(timing or {})})
        if self._mirror:
            self._mirror.log(step, {**metrics, **{f"time/{k}": v for k, v in (timing or {}).items()}}, self._shown)
            self._shown = {}

    def log_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append `metrics` under `step` to `steps.jsonl`, which has a row for every step, logged or not."""
        append(self.steps_path, {"step": step, **metrics})

    def keep(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append what was answered at `step` to `samples.jsonl`."""
        for sample in samples:
            append(self.samples_path, {"step": step, **sample})

    def show(self, step: int, samples: Sequence[Mapping[str, Any]], heading: str) -> None:
        """What was answered at `step`, for the eyes: kept, printed under a heading, and mirrored as a
        table with the figures of the step."""
        self.keep(step, samples)
        print(heading)
        for sample in samples:
            print(f"  {shortened(last_turn(sample))} → {shortened(sample['answer'])}  ({sample['score']:.2f})")
        columns = list(samples[0]) if samples else []
        shown = [{**sample, "prompt": in_turns(sample["prompt"])} for sample in samples]
        self._shown = {"samples": Table(columns, [[row[c] for c in columns] for row in shown])}

    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.metrics_path)


def last_turn(sample: Mapping[str, Any]) -> str:
    """What a line of `samples.jsonl` asks last."""
    return turn_text(sample["prompt"][-1])


def in_turns(messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as text, `role: content` a turn."""
    return "\n".join(f"{message['role']}: {turn_text(message)}" for message in messages)


def turn_text(message: Mapping[str, Any]) -> str:
    """What a turn says to somebody who looks, each call of a tool on a line of its own."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    told = [f"calls {call['name']} {json.dumps(call['arguments'], ensure_ascii=False)}" for call in calls]
    return "\n".join(told if calls and not message["content"] else [message["content"], *told])


def shortened(text: str, width: int = 60) -> str:
    """Return a text on one line, cut to `width` characters. Erasure looks for this very form in logs and pages."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def line_of(row: Mapping[str, Any]) -> str:
    """One line of a stream."""
    return json.dumps({k: finite(v) for k, v in row.items()}, ensure_ascii=False) + "\n"


def append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line_of(row))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a stream; a last line that a crash cut short is left out."""
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
    """Return the rows of a metrics stream of PPO that are updates. The row of the measured start has step 0."""
    return [row for row in rows if row["step"] > 0]


def last_updates(updates: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the updates that `last_…` of PPO's metrics is a mean over: at most half of a run."""
    return updates[-max(1, min(LAST_UPDATES, len(updates) // 2)) :]


WATCHER: ContextVar[Callable[[Progress], None] | None] = ContextVar("WATCHER", default=None)


@contextmanager
def watched(watcher: Callable[[Progress], None]) -> Iterator[None]:
    """Have every `Progress` that is made inside the block tell `watcher` of each of its steps."""
    token = WATCHER.set(watcher)
    try:
        yield
    finally:
        WATCHER.reset(token)


class Progress:
    """How far along a loop is: a live bar on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self, label: str, total: int, start: int = 0) -> None:
        self.label, self.total, self.done, self._start = label, total, start, start
        self._began = self._printed = time.perf_counter()
        self._watcher = WATCHER.get()
        self._bar = self._task = None
        ranks.set_position(f"{label} {start}/{total}")
        if sys.stderr.isatty() and ranks.is_main():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"), console=Console(stderr=True),
            )  # fmt: skip
            self._task = self._bar.add_task(label, total=total, completed=start, figures="")
            self._bar.start()

    def advance(self, done: int, **figures: float) -> None:
        """Say that `done` of `total` are behind us, with the two or three figures that matter."""
        self.done = done
        ranks.set_position(f"{self.label} {done}/{self.total}")
        if self._watcher:
            self._watcher(self)
        text = "  ".join(f"{k} {v:.3g}" for k, v in figures.items())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, figures=text)
            return
        clock = time.perf_counter()
        if ranks.is_main() and (clock - self._printed >= PLAIN_EVERY_S or done >= self.total):
            self._printed = clock
            left = self.seconds_left or 0.0
            print(f"{self.label} {done}/{self.total}  eta {left:.0f}s  {text}".rstrip(), file=sys.stderr, flush=True)

    @property
    def seconds_left(self) -> float | None:
        """By how long the steps of this process took; None before the first."""
        done = self.done - self._start
        return (time.perf_counter() - self._began) / done * (self.total - self.done) if done > 0 else None

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def progress(label: str, total: int, start: int = 0) -> Iterator[Progress]:
    """A `Progress` that is taken down whatever happens."""
    bar = Progress(label, total, start)
    try:
        yield bar
    finally:
        bar.close()


class Clock:
    """Seconds a phase, and tokens a second."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = round(now - self._last, 4), now

    def rates(self, tokens: int) -> None:
        """Tokens a second of each phase so far, for a batch of so many response tokens."""
        for name, seconds in list(self.laps.items()):
            self.laps[f"{name.removesuffix('_s')}_tok_s"] = round(tokens / max(seconds, 1e-9), 1)
