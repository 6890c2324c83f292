"""What a page is made from: a run's folder as it lies on disk, and how far along the run is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from align.core.files import open_text, read_text
from align.run.manifest import Manifest
from align.track import Progress, read_rows


@dataclass(frozen=True)
class RunView:
    """One look at a run.

    Attributes:
        folder: of the run, `<root>/<stage>/<name>`.
        manifest: what is known of it so far; its `metrics` are empty before the end.
        command: the line that makes the run again.
        progress: how far along it is; None where the stage does not count, or has not begun to.
    """

    folder: Path
    manifest: Manifest
    command: str
    progress: Progress | None = None

    @property
    def metrics(self) -> Mapping[str, Any]:
        return self.manifest.metrics

    @property
    def config(self) -> Mapping[str, Any]:
        return self.manifest.config

    @property
    def settings(self) -> Mapping[str, Any]:
        """The stage's own part of the configuration."""
        return self.config["stage"]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Of the metrics stream."""
        return read_rows(self.folder / "metrics.jsonl")

    def evidence(self, name: str) -> list[dict[str, Any]]:
        """The rows of another stream beside the report, or of the artifact's; none where there is no such file."""
        return read_rows(self.folder / name)

    def each(self, name: str) -> Iterator[dict[str, Any]]:
        """The same, one at a time: of a large file the first few are read. What a crash cut short is the end."""
        path = self.folder / name
        if path.is_file():
            with open_text(path) as file:
                for line in file:
                    if not line.endswith("\n"):
                        return
                    yield json.loads(line)

    def json(self, name: str) -> Any:
        """Return the content of a JSON file beside the report or in the artifact; an empty mapping if there is no such
        file."""
        path = self.folder / name
        return json.loads(read_text(path, name)) if path.is_file() else {}


def load_own_page(seen: RunView) -> ModuleType | None:
    """Import the module that describes a data set, a suite or a judge: `summarize(seen)` is its verdict, and
    `add_body(report, seen)` adds the rest. Returns None for any other run."""
    if seen.manifest.stage == "data":
        return import_module("align.report.data_set_page")
    if "card" in seen.metrics:
        return import_module("align.report.judge_page")
    return import_module("align.report.suite_page") if "systems" in seen.metrics else None
