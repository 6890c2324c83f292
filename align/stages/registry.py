"""What is known of the runs: questions that are answered from the folders, and make none."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from align.config.registry import RegistryConfig
from align.config.root import Config
from align.config.stages import WITH_RUNS
from align.errors import MissingArtifact, require
from align.registry.index import Index, asked
from align.registry.query import found
from align.registry.record import Record
from align.registry.shown import as_csv, as_json, as_table, details

IN_A_TABLE = 100
"""Runs that a table has unless told."""
ALL = 2**62


def listed(config: Config) -> Iterable[str]:
    stage: RegistryConfig = config.stage
    table = stage.format == "table"
    limit = stage.limit or (IN_A_TABLE if table else ALL)
    sort = [stage.sort] if isinstance(stage.sort, str) else list(stage.sort)
    records = asked(root_of(config), lambda index: found(index, stage.where or {}, sort, limit + 1, stage.columns))
    more, records = len(records) > limit, records[:limit]
    if not table:
        return {"json": as_json, "csv": as_csv}[stage.format](records, stage.columns)
    return in_table(records, stage, more)


def in_table(records: list[Record], stage: RegistryConfig, more: bool) -> Iterator[str]:
    if not records:
        yield "no run meets this" if stage.where else "no runs yet"
        return
    yield from as_table(records, stage.columns, datetime.now(UTC))
    if more:
        yield f"These are the first {len(records):,}: stage.limit=N shows more."


def shown(config: Config) -> Iterable[str]:
    stage: RegistryConfig = config.stage
    record = asked(root_of(config), lambda index: named(index, str(stage.run)))
    if stage.format == "table":
        return details(record)
    return as_json([record], stage.columns) if stage.format == "json" else as_csv([record], stage.columns)


def named(index: Index, given: str) -> Record:
    """The record of `STAGE:NAME`, `STAGE:latest` or a run's folder.

    Raises:
        MissingArtifact: there is none; the message has the nearest name.
    """
    stage, colon, name = given.partition(":")
    folder = Path(given)
    if not colon and folder.parent.name in WITH_RUNS:
        stage, name = folder.parent.name, folder.name
    elif name == "latest":
        newest = found(index, {"stage": stage, "status": "done"}, ["-finished"], 1) if stage in WITH_RUNS else []
        name = newest[0]["name"] if newest else name
    if record := index.record(f"{stage}:{name}"):
        return record
    close = difflib.get_close_matches(f"{stage}:{name}", index.names(), n=1)
    remedy = f"Did you mean {close[0]}? " if close else ""
    remedy += "`python -m align stage=registry` lists the runs."
    raise MissingArtifact("stage.run", given, f"is no run under {index.root}", remedy)


def rebuilt(config: Config) -> Iterable[str]:
    began = time.monotonic()
    with Index(root_of(config), rebuild=True) as index:
        where = "in memory: it cannot be written there" if index.path is None else str(index.path)
        yield f"{index.changed:,} runs in {time.monotonic() - began:.1f} s; {where}"


def root_of(config: Config) -> Path:
    root = Path(config.run.root).expanduser()
    require(root.is_dir(), "run.root", config.run.root, "is no folder", "Name the folder that holds your runs.")
    return root


PRINTS: dict[str, Callable[[Config], Iterable[str]]] = {"list": listed, "show": shown, "rebuild": rebuilt}
"""By `stage.action`: the lines that it prints."""
