"""A run made again from its manifest, in a folder that is thrown away, and compared with what it logged then."""

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
from align.registry.differences import code_of, made_from, rows, unlike
from align.registry.record import Record, record_of
from align.report.figure_text import counted
from align.run.environment import THREADS
from align.run.lineage import base_made_in, made_in
from align.run.manifest import Input, Manifest, read_manifest
from align.track import STEPS, read_rows

REPLAYED = ("sft", "full", "reward", "dpo", "kto", "ppo")
"""The stages that log step by step."""
STREAMS = (STEPS, "metrics.jsonl")
"""The streams that are compared: every step of a trainer, and what was logged; PPO logs every update."""
LOOK_S, TOLD_S = 0.2, 10.0
NAME = "replay"
FIELD = "stage.run"
Words = Callable[[Mapping[str, Any], Mapping[str, str]], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first figure that is another one.

    Attributes:
        was, now: None where one of the two rows does not have it.
    """

    step: int
    figure: str
    was: Any
    now: Any


def replay(
    root: Path, record: Record, steps: int | None, store: str, words: Words, say: Callable[[str], object]
) -> dict[str, Any]:
    """Make a run again up to a step, or up to the first figure that differs. Returns what came of it, see `compare`.

    Args:
        root: the folder of all runs.
        record: of the run.
        steps: how far; None for all that it logged.
        store: URL of the annotation store.
        words: makes the words of a command line out of a configuration, and of where its inputs lie.
        say: is called with lines on how far it is.

    Raises:
        MissingArtifact: something that the run read is gone.
        InputError: it logged nothing that could be compared, or cannot be made again.
    """
    folder = root / record["folder"]
    require(
        record["stage"] in REPLAYED, FIELD, record["run"], f"is a run of stage={record['stage']}, which logs no steps",
        f"Name a run of {', '.join(REPLAYED)}.",
    )  # fmt: skip
    manifest = read_manifest(folder)
    logged: dict[str, list[dict[str, Any]]] = {}
    for name in STREAMS:
        rows = [row for row in read_rows(folder / name) if steps is None or row["step"] <= steps]
        if rows:
            logged[name] = rows
    problem = "logged no step" if steps is None else f"logged no step up to {steps}"
    require(bool(logged), FIELD, record["run"], problem, "Name another run, or more stage.steps.")
    last = max(found[-1]["step"] for found in logged.values())
    with TemporaryDirectory(prefix="align-replay-") as scratch:
        again = [*line_of(manifest, root, words, store), f"run.root={scratch}", f"run.name={NAME}"]
        say(f"makes {record['run']} again up to step {last:,}")
        there = Path(scratch) / record["stage"] / NAME
        now: dict[str, list[dict[str, Any]]] = {name: [] for name in logged}
        with working(again, Path(scratch) / "said.txt", manifest.hardware["threads"]) as child:
            told = time.monotonic()
            while not is_decided(logged, now):
                ended = child.poll() is not None  # before the look: what it wrote last is then seen
                now = {name: read_rows(there / name) for name in logged}
                if ended:
                    break
                reached = max((found[-1]["step"] for found in now.values() if found), default=0)
                if reached and time.monotonic() - told > TOLD_S:
                    told = time.monotonic()
                    say(f"step {reached:,}: the same so far")
                time.sleep(LOOK_S)
        if not any(now.values()) and child.returncode:
            why = (Path(scratch) / "said.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            said_last = why[-1] if why else f"exit status {child.returncode}"
            problem = f"cannot be made again: {said_last.removeprefix('align: ')}"
            raise InputError(FIELD, record["run"], problem, "Mend that, and ask again.")
        return compare(record, logged, now, manifest, read_manifest(there))


def is_decided(
    logged: Mapping[str, Sequence[Mapping[str, Any]]], now: Mapping[str, Sequence[Mapping[str, Any]]]
) -> bool:
    """Return whether a replay need not go on: a figure differs, or every row of every stream is there."""
    differs = any(first_difference(rows, now[name], partial=True) for name, rows in logged.items())
    return differs or all(len(now[name]) >= len(rows) for name, rows in logged.items())


def line_of(manifest: Manifest, root: Path, words: Words, store: str) -> list[str]:
    """Return the words of the command that makes a run again, each input where it lies by now.

    Raises:
        MissingArtifact: one is gone.
    """
    places = {name: place_of(name, found, root) for name, found in manifest.inputs.items()}
    refs = {name: place for name, place in places.items() if place}
    line = [word for word in words(manifest.config, refs) if not word.startswith(("run.", "track", "store.url"))]
    if manifest.base is not None and isinstance(made := base_made_in(manifest.base, root), Path):
        line = [word for word in line if not word.startswith("model.path=")] + [f"model.path={made / 'artifact'}"]
    votes = any(found.project for found in manifest.inputs.values())
    return [*line, *([f"store.url={store}"] if votes else [])]


def place_of(name: str, found: Input, root: Path) -> str:
    """Return where an input that a run made lies by now; empty for any other.

    Raises:
        MissingArtifact: it is gone.
    """
    if found.stage:
        if (folder := made_in(found, root)) is None:
            raise MissingArtifact(FIELD, found.run, f"which it read as {name}, is gone", "Restore it.")
        return str((folder / "artifact").absolute())
    if found.ref.startswith("data:"):
        if not Path(found.path).is_dir():
            raise MissingArtifact(FIELD, found.ref, f"which it read as {name}, is gone", "Restore it.")
        return found.path
    return ""


@contextmanager
def working(line: Sequence[str], log: Path, threads: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command of align in a process of its own, which ends with the block: nothing of it is kept.

    Args:
        threads: as the run had them, see `align.run.environment.THREADS`; empty where the environment did not say.
    """
    environment = os.environ | ({THREADS: threads} if threads else {})
    with log.open("wb") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "align", *line],
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def first_difference(
    before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], partial: bool = False
) -> Difference | None:
    """Return the first figure of the first row that is another one; None if all are the same.

    Args:
        partial: rows that are not there yet are no difference.
    """
    for was, found in zip(before, now, strict=False):
        for key in dict.fromkeys((*was, *found)):
            if was.get(key) != found.get(key) or (key in was) != (key in found):
                return Difference(was["step"], key, was.get(key), found.get(key))
    if len(now) < len(before) and not partial:
        return Difference(before[len(now)]["step"], "step", before[len(now)]["step"], None)
    return None


def compare(
    record: Record,
    before: Mapping[str, Sequence[Mapping[str, Any]]],
    now: Mapping[str, Sequence[Mapping[str, Any]]],
    manifest: Manifest,
    other: Manifest,
) -> dict[str, Any]:
    """Compare a run with its replay, as plain JSON.

    Returns `steps`, the last one that was compared; `rows` and `figures`, how many were the same, to the bit;
    `first_difference`; and `unlike`, what is different about the two runs, each key with its two values.

    Args:
        record, manifest: of the run.
        before: stream → its rows.
        now: the same of the replay.
        other: the manifest of its replay.
    """
    differences = [first_difference(rows, now[name]) for name, rows in before.items()]
    first = min(filter(None, differences), key=lambda difference: difference.step, default=None)
    name = next(iter(before))  # every step, where a stream has them
    same = [row for row in before[name][: len(now[name])] if first is None or row["step"] < first.step]
    inputs = unlike(made_from(record), made_from(record_of(Path(), other)))
    known = {
        "code": unlike(code_of(manifest), code_of(other)),
        "packages": unlike(manifest.packages, other.packages),
        "hardware": {key: pair for key, pair in unlike(manifest.hardware, other.hardware).items() if None not in pair},
        "made from": {key: pair for key, pair in inputs.items() if digests(pair)},
    }
    return {
        "run": record["run"],
        "same": first is None,
        "steps": same[-1]["step"] if same else 0,
        "rows": len(same),
        "figures": sum(len(row) - 1 for row in same),
        "first_difference": first and asdict(first),
        "unlike": {part: pairs for part, pairs in known.items() if pairs},
    }


def digests(pair: Sequence[Any]) -> bool:
    """Return whether two inputs differ in more than their names."""
    one, other = (str(value).rpartition(" (")[2] for value in pair)
    return one != other


def as_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what came of it as text."""
    same = f"{counted(found['rows'], 'row')} with {counted(found['figures'], 'figure')} the same to the bit"
    first = found["first_difference"]
    if first is None:
        yield f"{found['run']}: {same}, up to step {found['steps']:,}"
    else:
        yield f"{found['run']}: step {first['step']:,}, {first['figure']}: {first['was']!r} then, {first['now']!r} now"
        yield f"before it, {same}"
    for part, pairs in found["unlike"].items():
        yield f"different {part}:" if part != "made from" else "made from others:"
        yield from (f"  {line}" for line in rows(pairs))
    if first is not None and not found["unlike"]:
        yield "Code, packages, hardware, threads and inputs are the same."
