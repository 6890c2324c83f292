"""Verdict files: what an evaluator said of an artifact, for gates to ask.

    {"schema_version": 1, "gate": "safety", "verdict": "pass", "figure": {"value": 0.98, "low": 0.95, "high": 0.99},
     "inputs": {"artifact": SHA256, "data": SHA256}}

They lie in `verdicts/` of a run's artifact, or of the folder of all runs, for those that another tool wrote. Only
`pass` counts, and only of the artifact that `inputs.artifact` is the digest of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.errors import CorruptFile, InputError, require_schema_version
from align.registry.shown import figure as in_words
from align.run.artifacts import readable
from align.run.digests import file_digest
from align.run.files import json_object
from align.run.manifest import Manifest

SCHEMA = 1
FOLDER = "verdicts"
PASS = "pass"
REMEDY = "See docs/registry.md for what a verdict file holds."
AGAIN = "Evaluate again with stage=eval resume=never, or write the file anew: docs/registry.md says what it holds."


@dataclass(frozen=True, slots=True)
class Verdict:
    """Attributes:
    source: the run that it lies in, or the name of its file.
    run: that run's manifest; None of a file beside the runs.
    """

    gate: str
    verdict: str
    figure: Any
    inputs: dict[str, str]
    source: str
    run: Manifest | None


def read_verdict(path: Path, source: str, run: Manifest | None) -> Verdict:
    """One verdict file.

    Raises:
        CorruptFile: it is none.
        InputError: another version wrote it.
    """
    found = json_object(path, "verdict", REMEDY)
    require_schema_version(found.get("schema_version"), SCHEMA, "verdict", str(path), AGAIN)
    inputs = found.get("inputs")
    texts = isinstance(found.get("gate"), str) and isinstance(found.get("verdict"), str)
    digests = isinstance(inputs, dict) and all(isinstance(value, str) for value in inputs.values())
    if not texts or not isinstance(inputs, dict) or not digests:
        raise CorruptFile("verdict", str(path), "is no verdict file", REMEDY)
    return Verdict(found["gate"], found["verdict"], found.get("figure"), inputs, source, run)


def verdicts(root: Path) -> Iterator[Verdict]:
    """All of them, those of runs that are done and those beside the runs.

    Raises:
        CorruptFile, InputError: as `read_verdict`.
    """
    for path in sorted(root.glob(f"*/*/artifact/{FOLDER}/*.json")):
        folder = path.parents[2]
        manifest = readable(folder)
        if manifest is not None and manifest.done:
            name = path.relative_to(folder).as_posix()
            if file_digest(path) != manifest.outputs.get(name):
                problem = "is not the file that the run published"
                raise CorruptFile("verdict", str(path), problem, "Restore it, or evaluate again with resume=never.")
            yield read_verdict(path, manifest.ref, manifest)
    for path in sorted((root / FOLDER).glob("*.json")):
        yield read_verdict(path, path.name, None)


def verdict_on(root: Path, gate: str, digest: str) -> tuple[bool, str]:
    """Whether a verdict of this name says `pass` of an artifact, and what it says. Of runs, the newest counts; of files
    beside the runs, which have no order, each."""
    try:
        named = [one for one in verdicts(root) if one.gate == gate]
    except InputError as error:
        return False, str(error)
    found = [one for one in named if one.inputs.get("artifact") == digest]
    if not found:
        others = f"; there are {len(named)} on other artifacts" if named else ""
        return False, f"nobody has given one on this artifact ({digest[:12]}){others}"
    newest = max((one.run.publication for one in found if one.run), default=None)
    count = [one for one in found if one.run is None or one.run.publication == newest]
    worst = next((one for one in count if one.verdict != PASS), count[0])
    figure = "" if worst.figure is None else f", {in_words(worst.figure)}"
    return worst.verdict == PASS, f"{worst.source}: {worst.verdict}{figure}"
