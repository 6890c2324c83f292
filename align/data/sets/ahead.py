"""Parts of sources made ahead by many workers, each of which takes rows from anywhere in a source.

A part is the same whoever makes it. Afterwards `Gathering.run` takes the parts in order and makes those that are
missing. A worker that meets an error does not raise it: it leaves the part out, and `Gathering.run` meets the same
error. So errors, and their order, do not depend on the workers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby, takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from align.data.read.rows import is_seekable, rows_in
from align.data.sets import reads
from align.data.sets.engines import Engine
from align.data.sets.gather import Gathering
from align.errors import InputError

PIECES, PACKED_PIECES = 32, 4
"""Of one file at most. Each begins by passing over what is before it, which costs nearly nothing in plain lines,
Parquet and Arrow, and a few hundredths of all other work in a file that is packed, a table or an array."""
FAILED = ".failed"
"""Ending of what a worker leaves behind where it failed, so that nobody works on what is behind that."""
SEEN_WITHIN, PAUSE = 60.0, 0.5
"""Seconds. A network file system may show a file that another machine wrote up to a minute later."""


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
    """The rows of a file, and whether they are passed over at hardly any cost; or why they could not be counted."""

    rows: int
    cheap: bool
    why: str = ""


def make_ahead(
    engine: Engine, gatherings: Sequence[Gathering], done: Callable[[int, int], None] = lambda made, of: None
) -> None:
    """Make the parts of all sources that are files, as far as they can be counted.

    Args:
        done: is told how many parts are made, and of how many.

    Raises:
        InputError: workers write to a folder that this process cannot see.
    """
    of_files = {gathering.number: gathering for gathering in gatherings if gathering.source.path}  # no project's key
    files = [
        (number, gathering.source.field, file)
        for number, gathering in of_files.items() for file in gathering.source.files
    ]  # fmt: skip
    counts, tasks, read = dict(engine(counted, files)), list[Task](), 0
    for number, of_source in groupby(range(len(files)), key=lambda i: files[i][0]):
        known = [*takewhile(lambda count: not count.why, map(counts.__getitem__, of_source))]
        read += len(known)
        gathering = of_files[number]
        gathering.known = [count.rows for count in known]
        tasks += [Task(number, parts) for parts in missing(pieces(known), gathering.parts())]
    tell_uncounted([(path, counts[i].why) for i, (*_, path) in enumerate(files) if counts[i].why], len(files), read)
    spool = gatherings[0].spool
    for left in spool.folder.glob(f"*{FAILED}"):  # by a run that was cut off
        left.unlink()
    made, total, failed = 0, sum(len(task.parts) for task in tasks), dict[int, dict[int, str]]()
    for _, result in engine(partial(work, of_files), tasks):
        wait_for([spool.folder / f"{of_files[result.task.source].name(part)}.json" for part in result.parts])
        if result.failed is not None:
            failed.setdefault(result.task.source, {})[result.failed] = result.why
        made += len(result.parts)
        done(made, total)
    for number, of_source in failed.items():
        of_files[number].failed = of_source


def tell_uncounted(uncounted: Sequence[tuple[Path, str]], files: int, read: int) -> None:
    """Print how many files workers do not read, and why. A file behind one that could not be counted is one of them."""
    if uncounted:
        path, why = uncounted[0]
        print(
            f"files that this process reads without workers: {files - read} of {files}. "
            f"A worker could not count the rows of {path}: {why}",
            flush=True,
        )


def wait_for(paths: Sequence[Path]) -> None:
    """Return when all files of workers are seen here.

    Raises:
        InputError: one of them is not seen within `SEEN_WITHIN`.
    """
    end = time.monotonic() + SEEN_WITHIN
    for path in paths:
        while not os.path.exists(path):  # unlike Path.exists, of no error of a network file system an exception
            if time.monotonic() > end:
                problem = f"workers write to a folder that this process cannot see ({path.name} is missing)"
                remedy = "Give all of them one file system, with the sources and run.root at the same paths."
                raise InputError("stage.engine", "(workers)", problem, remedy)
            time.sleep(PAUSE)


def counted(file: tuple[int, str, Path]) -> Count:
    """The rows of a file, or why they cannot be counted."""
    _, field, path = file
    try:
        return Count(rows_in(path, field), is_seekable(path, field))
    except (InputError, OSError) as error:
        return Count(0, False, str(error))


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
        try:
            if any(other.name < mark.name for other in mark.parent.glob(f"*{FAILED}")):
                return Made(task, made)
            account = gathering.write(part)
        except (InputError, OSError) as error:
            leave(mark)
            return Made(task, made, part, str(error))
        made.append(part)
        if account["bad_rows"] and not gathering.skips:
            leave(mark)
            return Made(task, made)
    return Made(task, made)


def leave(mark: Path) -> None:
    """Keep others from what is behind. They would only work in vain, so a folder that takes no mark is no error."""
    with suppress(OSError):
        mark.touch()
