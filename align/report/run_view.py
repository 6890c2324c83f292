"""The contents of a run's folder, from which its report is built."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.core.files import open_text, read_text
from align.run.manifest import Manifest
from align.track import Progress, read_rows

if TYPE_CHECKING:
    from align.report.page import Report


@dataclass(frozen=True)
class RunView:
    """A run's manifest, streams and artifact as they are on disk.

    Attributes:
        folder: the run's folder, `<root>/<stage>/<name>`.
        manifest: its `metrics` are empty until the run is done.
        command: the command line that repeats the run.
        progress: None if the stage reports no progress, or none yet.
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
        """The configuration under `stage`."""
        return self.config["stage"]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of the metrics stream."""
        return read_rows(self.folder / "metrics.jsonl")

    def read_stream(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a JSONL file in the run's folder. Returns an empty list if the file is missing."""
        return read_rows(self.folder / name)

    def iter_stream(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of a JSONL file one by one, so that a few rows of a large file can be read.

        Stops at a line without a line break, which a crash cut short.
        """
        path = self.folder / name
        if path.is_file():
            with open_text(path) as file:
                for line in file:
                    if not line.endswith("\n"):
                        return
                    yield json.loads(line)

    def read_json(self, name: str) -> Any:
        """Return the content of a JSON file in the run's folder. Returns an empty mapping if the file is missing."""
        path = self.folder / name
        return json.loads(read_text(path, name)) if path.is_file() else {}


@dataclass(frozen=True, slots=True)
class PageSections:
    """Functions that write the page of a data set, a judge or a suite.

    Attributes:
        summarize: returns the summary of a run.
        add_body: adds the sections after the curves.
        add_overview: adds the sections after the summary; None if there are no such sections.
    """

    summarize: Callable[[RunView], str]
    add_body: Callable[[Report, RunView], None]
    add_overview: Callable[[Report, RunView], None] | None = None


def load_page_sections(view: RunView) -> PageSections | None:
    """Import the module that writes the page of a data set, a judge or a suite. Returns None for any other run."""
    if view.manifest.stage == "data":
        return import_module("align.report.data_set_page").PAGE_SECTIONS
    if "card" in view.metrics:
        return import_module("align.report.judge_page").PAGE_SECTIONS
    if "systems" in view.metrics:
        return import_module("align.report.suite_page").PAGE_SECTIONS
    return None
