"""Parts of sources made ahead by many workers, each of which takes rows from anywhere in a source.

What is made is what `Gathering.run` would make, which counts it afterwards and makes what is missing. So a worker that
meets an error leaves its part to that, and the error is the same, in the same order, whoever works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align.data.formats.rows import passed_over, rows_in
from align.data.sets import reads
from align.data.sets.engines import Engine
from align.data.sets.gather import Gathering
from align.errors import InputError

PIECES, PACKED_PIECES = 32, 4
"""Of one file at most. Each begins by passing over what is before it, which costs nearly nothing in plain lines,
Parquet and Arrow, and a few hundredths of all other work in a file that is packed, a table or an array."""
FAILED = ".failed"
"""Ending of what a worker leaves behind where it failed, so that nobody works on what is behind that."""


class Task(NamedTuple):
    """Consecutive parts of one source."""

    source: int
    parts: tuple[int, ...]


class Made(NamedTuple):
    """What became of a task: the parts that were made, and which one was not, and why."""

    task: Task
    parts: list[int]
    failed: int | None = None
    why: str = ""


class Count(NamedTuple):
    """The rows of a file, and whether they are passed over at hardly any cost."""

    rows: int
    cheap: bool


def make_ahead(
    engine: Engine, gatherings: Sequence[Gathering], done: Callable[[int, int], None] = lambda made, of: None
) -> None:
    """Make the parts of all sources that are files, as far as they can be counted.

    Args:
        done: is told how many parts are made, and of how many.

    Raises:
        InputError: workers write where this process does not see it.
    """
    of_files = {gathering.number: gathering for gathering in gatherings if gathering.source.path}  # no project's key
    files = [
        (number, gathering.source.field, file)
        for number, gathering in of_files.items() for file in gathering.source.files
    ]  # fmt: skip
    counts, tasks = dict(engine(counted, files)), list[Task]()
    for number, of_source in groupby(range(len(files)), key=lambda i: files[i][0]):
        known: list[Any] = [*takewhile(bool, map(counts.get, of_source))]
        gathering = of_files[number]
        gathering.known = [count.rows for count in known]
        tasks += [Task(number, parts) for parts in missing(pieces(known), gathering.parts())]
    spool = gatherings[0].spool
    for left in spool.folder.glob(f"*{FAILED}"):  # by a run that was cut off
        left.unlink()
    made, total, failed = 0, sum(len(task.parts) for task in tasks), dict[int, dict[int, str]]()
    for _, result in engine(partial(work, of_files), tasks):
        there = of_files[result.task.source].parts()
        if lost := {*result.parts} - there:
            problem = f"has workers that write where this process does not see it (part {min(lost)} is missing)"
            remedy = "Give all of them one file system, with the sources and run.root at the same paths."
            raise InputError("stage.engine", "(workers)", problem, remedy)
        if result.failed is not None:
            failed.setdefault(result.task.source, {})[result.failed] = result.why
        made += len(result.parts)
        done(made, total)
    for number, of_source in failed.items():
        of_files[number].failed = of_source


def counted(file: tuple[int, str, Path]) -> Count | None:
    """The rows of a file; None where they cannot be counted, which whoever reads them will tell."""
    _, field, path = file
    try:
        return Count(rows_in(path, field), passed_over(path, field))
    except (InputError, OSError):
        return None


def pieces(counts: Sequence[Count]) -> Iterator[range]:
    """The parts of a source with such files, in pieces that each begin in another file, or at another place in one."""
    ends = np.cumsum([count.rows for count in counts], dtype=np.int64)
    total = -(-int(ends[-1]) // reads.PART) if len(ends) else 0
    begins_in = np.searchsorted(ends, np.arange(total) * reads.PART, "right").tolist()
    for file, parts in groupby(range(total), key=begins_in.__getitem__):
        of_file = [*parts]
        size = -(-len(of_file) // (PIECES if counts[file].cheap else PACKED_PIECES))
        for at in range(0, len(of_file), size):
            yield range(of_file[at], of_file[min(at + size, len(of_file)) - 1] + 1)


def missing(wanted: Iterator[range], there: set[int]) -> Iterator[tuple[int, ...]]:
    """Runs of parts that are not there."""
    for piece in wanted:
        for is_there, parts in groupby(piece, key=there.__contains__):
            if not is_there:
                yield tuple(parts)


def work(gatherings: Mapping[int, Gathering], task: Task) -> Made:
    """Make the parts of a task, up to one that fails.

    Args:
        gatherings: by the number of the source.
    """
    gathering, made = gatherings[task.source], list[int]()
    for part in task.parts:
        mark = gathering.spool.folder / f"{gathering.name(part)}{FAILED}"
        if any(other.name < mark.name for other in mark.parent.glob(f"*{FAILED}")):
            return Made(task, made)
        try:
            account = gathering.write(part)
        except (InputError, OSError) as error:
            mark.touch()
            return Made(task, made, part, str(error))
        made.append(part)
        if account["bad_rows"] and not gathering.skips:
            mark.touch()
            return Made(task, made)
    return Made(task, made)
