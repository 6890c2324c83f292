"""Replay of runs: repeat a run from its manifest in a temporary folder, and compare the logged metrics bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from align.core.errors import InputError, MissingArtifact, require
from align.registry.differences import describe_code, describe_inputs, iter_pair_lines, pair_differences
from align.registry.record import Record, make_record
from align.report.figure_text import pluralize
from align.run.environment import THREADS
from align.run.lineage import find_base_producer, find_producing_run
from align.run.manifest import Input, Manifest, read_manifest
from align.track import STEPS, read_rows

REPLAYED = ("sft", "full", "reward", "dpo", "kto", "ppo")
"""Stages that log their metrics step by step, so that their runs can be replayed."""
STREAMS = (STEPS, "metrics.jsonl")
"""Metric logs that are compared: every step of a trainer, and `metrics.jsonl`, in which PPO has one row per update."""
LOOK_S = 0.2
"""Seconds between two reads of the replay's metric logs."""
TOLD_S = 10.0
"""Seconds between two progress messages."""
NAME = "replay"
FIELD = "stage.run"
ArgumentBuilder = Callable[[Mapping[str, Any], Mapping[str, str]], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first metric value that differs between a run and its replay.

    Attributes:
        was, now: its values; None if one of the two rows lacks it.
    """

    step: int
    figure: str
    was: Any
    now: Any


def replay(
    root: Path,
    record: Record,
    steps: int | None,
    store_url: str,
    build_arguments: ArgumentBuilder,
    report_progress: Callable[[str], object],
) -> dict[str, Any]:
    """Repeat a run in a temporary folder until a metric differs or the last step is reached, and compare both.

    Returns plain JSON, see `compare`.

    Args:
        root: the folder of all runs.
        record: record of the run.
        steps: last step; None for all that it logged.
        store_url: URL of the annotation store.
        build_arguments: returns the arguments of an align command for a configuration and the paths of its inputs.
        report_progress: called with lines about the progress.

    Raises:
        MissingArtifact: An input of the run is gone.
        InputError: It logged nothing to compare, or it cannot be repeated.
    """
    folder = root / record["folder"]
    problem = f"is a run of stage={record['stage']}, which logs no steps"
    require(record["stage"] in REPLAYED, FIELD, record["run"], problem, f"Name a run of {', '.join(REPLAYED)}.")
    manifest = read_manifest(folder)
    logged: dict[str, list[dict[str, Any]]] = {}
    for name in STREAMS:
        rows = [row for row in read_rows(folder / name) if steps is None or row["step"] <= steps]
        if rows:
            logged[name] = rows
    problem = "logged no step" if steps is None else f"logged no step up to {steps}"
    require(bool(logged), FIELD, record["run"], problem, "Name another run, or more stage.steps.")
    last_step = max(rows[-1]["step"] for rows in logged.values())
    with TemporaryDirectory(prefix="align-replay-") as scratch:
        arguments = [
            *build_repeat_arguments(manifest, root, build_arguments, store_url),
            f"run.root={scratch}",
            f"run.name={NAME}",
        ]
        report_progress(f"makes {record['run']} again up to step {last_step:,}")
        new_folder = Path(scratch) / record["stage"] / NAME
        output = Path(scratch) / "said.txt"
        replayed: dict[str, list[dict[str, Any]]] = {name: [] for name in logged}
        with run_align(arguments, output, manifest.hardware["threads"]) as process:
            reported_at = time.monotonic()
            while not is_decided(logged, replayed):
                has_ended = process.poll() is not None  # checked first, so that its last rows are read
                replayed = {name: read_rows(new_folder / name) for name in logged}
                if has_ended:
                    break
                step = max((rows[-1]["step"] for rows in replayed.values() if rows), default=0)
                if step and time.monotonic() - reported_at > TOLD_S:
                    reported_at = time.monotonic()
                    report_progress(f"step {step:,}: the same so far")
                time.sleep(LOOK_S)
        if not any(replayed.values()) and process.returncode:
            lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last_line = lines[-1] if lines else f"exit status {process.returncode}"
            problem = f"cannot be made again: {last_line.removeprefix('align: ')}"
            raise InputError(FIELD, record["run"], problem, "Resolve this, and run the same command again.")
        return compare(record, logged, replayed, manifest, read_manifest(new_folder))


def is_decided(
    logged: Mapping[str, Sequence[Mapping[str, Any]]], replayed: Mapping[str, Sequence[Mapping[str, Any]]]
) -> bool:
    """Return whether a replay can stop, because a metric differs or all logged rows of the run were repeated.

    Args:
        logged, replayed: stream → its rows.
    """
    differs = any(find_first_difference(rows, replayed[name], allow_missing_rows=True) for name, rows in logged.items())
    return differs or all(len(replayed[name]) >= len(rows) for name, rows in logged.items())


def build_repeat_arguments(
    manifest: Manifest, root: Path, build_arguments: ArgumentBuilder, store_url: str
) -> list[str]:
    """Return the arguments of the align command that repeats a run, with the present paths of its inputs and its base.

    Raises:
        MissingArtifact: An input is gone.
    """
    paths = {name: find_input_path(name, input, root) for name, input in manifest.inputs.items()}
    refs = {name: path for name, path in paths.items() if path}
    arguments = [
        word for word in build_arguments(manifest.config, refs) if not word.startswith(("run.", "track", "store.url"))
    ]
    base_folder = find_base_producer(manifest.base, root) if manifest.base is not None else None
    if isinstance(base_folder, Path):
        arguments = [word for word in arguments if not word.startswith("model.path=")]
        arguments.append(f"model.path={base_folder / 'artifact'}")
    if any(input.project for input in manifest.inputs.values()):
        arguments.append(f"store.url={store_url}")
    return arguments


def find_input_path(name: str, input: Input, root: Path) -> str:
    """Return the present path of an input that a run or a data set provided, or an empty text for any other input.

    Raises:
        MissingArtifact: It is gone.
    """
    if input.stage:
        if (folder := find_producing_run(input, root)) is None:
            raise MissingArtifact(FIELD, input.run, f"which it read as {name}, is gone", "Restore it.")
        return str((folder / "artifact").absolute())
    if input.ref.startswith("data:"):
        if not Path(input.path).is_dir():
            raise MissingArtifact(FIELD, input.ref, f"which it read as {name}, is gone", "Restore it.")
        return input.path
    return ""


@contextmanager
def run_align(arguments: Sequence[str], log: Path, threads: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `python -m align` as a subprocess during the block, yield the process, and kill it at the end of the block.

    Args:
        arguments: arguments of `python -m align`.
        log: file that its output is written to.
        threads: number of threads of the run, see `align.run.environment.THREADS`; empty if it was not recorded.
    """
    environment = os.environ | ({THREADS: threads} if threads else {})
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "align", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def find_first_difference(
    logged: Sequence[Mapping[str, Any]], replayed: Sequence[Mapping[str, Any]], allow_missing_rows: bool = False
) -> Difference | None:
    """Return the first metric value that differs between a run's logged rows and those of its replay.

    Returns None if all are equal.

    Args:
        allow_missing_rows: missing rows at the end are no difference.
    """
    for old_row, new_row in zip(logged, replayed, strict=False):
        for key in dict.fromkeys((*old_row, *new_row)):
            if old_row.get(key) != new_row.get(key) or (key in old_row) != (key in new_row):
                return Difference(old_row["step"], key, old_row.get(key), new_row.get(key))
    if len(replayed) < len(logged) and not allow_missing_rows:
        return Difference(logged[len(replayed)]["step"], "step", logged[len(replayed)]["step"], None)
    return None


def compare(
    record: Record,
    logged: Mapping[str, Sequence[Mapping[str, Any]]],
    replayed: Mapping[str, Sequence[Mapping[str, Any]]],
    manifest: Manifest,
    new_manifest: Manifest,
) -> dict[str, Any]:
    """Compare the logged rows, code, packages, hardware and inputs of a run and its replay, and return plain JSON.

    Its keys are `steps`, the last step that was compared; `rows` and `figures`, the numbers of rows and values that are
    equal to the bit; `first_difference`; and `unlike`, key → both values, of what else differs between the runs.

    Args:
        record, manifest: those of the run.
        logged: stream → rows of the run.
        replayed: stream → rows of the replay.
        new_manifest: manifest of the replay.
    """
    differences = [find_first_difference(rows, replayed[name]) for name, rows in logged.items()]
    first = min(filter(None, differences), key=lambda difference: difference.step, default=None)
    name = next(iter(logged))  # the stream with every step, if there is one
    same = [row for row in logged[name][: len(replayed[name])] if first is None or row["step"] < first.step]
    inputs = pair_differences(describe_inputs(record), describe_inputs(make_record(Path(), new_manifest)))
    differences_by_part = {
        "code": pair_differences(describe_code(manifest), describe_code(new_manifest)),
        "packages": pair_differences(manifest.packages, new_manifest.packages),
        "hardware": {
            key: pair
            for key, pair in pair_differences(manifest.hardware, new_manifest.hardware).items()
            if None not in pair
        },
        "made from": {key: pair for key, pair in inputs.items() if have_other_digests(pair)},
    }
    return {
        "run": record["run"],
        "same": first is None,
        "steps": same[-1]["step"] if same else 0,
        "rows": len(same),
        "figures": sum(len(row) - 1 for row in same),
        "first_difference": first and asdict(first),
        "unlike": {part: pairs for part, pairs in differences_by_part.items() if pairs},
    }


def have_other_digests(pair: Sequence[Any]) -> bool:
    """Return whether two inputs, each written as `NAME (DIGEST)`, have different digests. Names may differ."""
    return len({str(value).rpartition(" (")[2] for value in pair}) > 1


def as_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the result of a replay, as `compare` returns it, as lines of text for the console."""
    same = f"{pluralize(result['rows'], 'row')} with {pluralize(result['figures'], 'figure')} the same to the bit"
    first = result["first_difference"]
    if first is None:
        yield f"{result['run']}: {same}, up to step {result['steps']:,}"
    else:
        yield f"{result['run']}: step {first['step']:,}, {first['figure']}: {first['was']!r} then, {first['now']!r} now"
        yield f"before it, {same}"
    for part, pairs in result["unlike"].items():
        yield f"different {part}:" if part != "made from" else "made from others:"
        yield from (f"  {line}" for line in iter_pair_lines(pairs))
    if first is not None and not result["unlike"]:
        yield "Code, packages, hardware, threads and inputs are the same."
