"""Reading a run's manifest, metrics and other files from its folder, to build its report."""

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
    """A run's manifest, and access to the JSON and JSONL files in its folder, for its report.

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
        """The part of the run's configuration under the key `stage`, as a mapping."""
        return self.config["stage"]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the run's `metrics.jsonl`, read once; empty if the file is missing."""
        return read_rows(self.folder / "metrics.jsonl")

    def read_stream(self, name: str) -> list[dict[str, Any]]:
        """Return all rows of a JSONL file in the run's folder, or an empty list if the file is missing."""
        return read_rows(self.folder / name)

    def iter_stream(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the rows of a JSONL file in the run's folder one by one, without reading the whole file at once.

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
        """Return the content of a JSON file in the run's folder, or an empty mapping if the file is missing."""
        path = self.folder / name
        return json.loads(read_text(path, name)) if path.is_file() else {}


@dataclass(frozen=True, slots=True)
class PageSections:
    """The functions that write the summary and sections of the report of a data set, a judge or an evaluation suite.

    Attributes:
        summarize: returns the summary of a run.
        add_body: adds the sections after the curves.
        add_overview: adds the sections after the summary; None if there are no such sections.
    """

    summarize: Callable[[RunView], str]
    add_body: Callable[[Report, RunView], None]
    add_overview: Callable[[Report, RunView], None] | None = None


def load_page_sections(view: RunView) -> PageSections | None:
    """Return the functions for the report of a data set, a judge or an evaluation suite, or None for any other run.

    Imports their module.
    """
    if view.manifest.stage == "data":
        return import_module("align.report.data_set_page").PAGE_SECTIONS
    if "card" in view.metrics:
        return import_module("align.report.judge_page").PAGE_SECTIONS
    if "systems" in view.metrics:
        return import_module("align.report.suite_page").PAGE_SECTIONS
    return None
