"""A run's `metrics.json`: writing it, and reading it with a check against its digest in the manifest.

The manifest repeats the metrics of `metrics.json`. Gates, the registry and model cards read the file and learn whether
it still agrees with the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from align.core.errors import CorruptFile, InputError
from align.core.files import read_bytes
from align.core.redaction import mask_tree
from align.run.files import write_json
from align.run.manifest import Manifest

FILE = "metrics.json"
"""Name of the file with all metrics of a run, beside its manifest."""
IN_ARTIFACT = f"artifact/{FILE}"
"""Path of the file with the metrics that an evaluation computed from its samples, relative to the run's folder."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The metrics of a run, with a reason if they may differ from the published ones.

    Attributes:
        metrics: content of the hashed file; those of the manifest if the file is not the published one.
        altered: why they may differ from the published ones; empty if they agree.
    """

    metrics: Mapping[str, Any]
    altered: str = ""


def write_figures(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Write `metrics.json` into a run's folder, with secrets masked."""
    write_json(folder / FILE, mask_tree(metrics))


def read_figures(folder: Path, manifest: Manifest) -> Figures:
    """Return the metrics of a run, with a reason in `altered` if its metrics files do not match the manifest's digests.

    Args:
        manifest: the one in the folder.
    """
    if not manifest.done:
        return Figures(manifest.metrics)
    metrics: Any = None
    for name in (FILE, IN_ARTIFACT):
        if name not in manifest.outputs:
            continue
        try:
            data = read_bytes(folder / name, name)
        except InputError:
            return Figures(manifest.metrics, f"{name} is missing")
        if sha256(data).hexdigest() != manifest.outputs[name]:
            return Figures(manifest.metrics, f"{name} is not the file that was published")
        if name == FILE:
            metrics = json.loads(data)
    if metrics is None:
        problem = f"the manifest has no digest of {FILE}, so its figures cannot be checked" if manifest.metrics else ""
        return Figures(manifest.metrics, problem)
    if canonical(metrics) != canonical(manifest.metrics):
        return Figures(metrics, f"manifest.json and {FILE} have different figures")
    return Figures(metrics)


def load_published_figures(folder: Path, manifest: Manifest) -> Mapping[str, Any]:
    """Return the metrics of a run, or raise CorruptFile if its metrics files do not match the manifest.

    Raises:
        CorruptFile: The metrics may differ from the published ones.
    """
    figures = read_figures(folder, manifest)
    remedy = "Restore the run's files, or make it again with resume=never."
    if figures.altered:
        raise CorruptFile("metrics", manifest.ref, figures.altered, remedy)
    return figures.metrics


def get_collapse_verdict(metrics: Mapping[str, Any]) -> str | None:
    """Return an evaluation's verdict on mode collapse: `collapsed`, `varied` or `not measured`; None if it has none."""
    collapse = metrics.get("collapse")
    return collapse.get("verdict") if isinstance(collapse, Mapping) else None


def get_suite_collapse(metrics: Mapping[str, Any], through: str) -> Mapping[str, Any] | None:
    """Return the mode-collapse verdict on one of several evaluated models, or None if it was not measured.

    Args:
        metrics: metrics of the evaluation.
        through: name of the system among the evaluation's inputs, such as `systems.new`.
    """
    collapse = metrics.get("collapse")
    systems = collapse.get("systems") if isinstance(collapse, Mapping) else None
    verdict = systems.get(through.removeprefix("systems.")) if isinstance(systems, Mapping) else None
    measured = isinstance(verdict, Mapping) and verdict.get("verdict") in ("collapsed", "varied")
    return verdict if measured else None


def canonical(metrics: Any) -> str:
    """Return metrics as JSON text with sorted keys, for a comparison in which NaN equals NaN."""
    return json.dumps(metrics, sort_keys=True)
